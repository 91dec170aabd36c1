"""The end of a process that makes no progress, so that its supervisor starts another (C13)."""

from __future__ import annotations

import faulthandler
import logging
import os

log = logging.getLogger(__name__)

STALLED_AFTER_S = 10.0
EXIT_STALLED = 70  # EX_SOFTWARE


def disarm() -> None:
    """The process lives on without beats."""
    faulthandler.cancel_dump_traceback_later()


def end_if_stalled(step_age_s: float) -> None:
    """Called with every beat: dumps all stacks and ends the process when the running step is too old.

    If the beats themselves stop, because a kernel holds the interpreter, the timer armed here fires
    without the interpreter's help.
    """
    faulthandler.dump_traceback_later(STALLED_AFTER_S + 2.0, exit=True)
    if step_age_s > STALLED_AFTER_S:
        log.critical("the running step is %.1f s old: ending the process", step_age_s)
        faulthandler.dump_traceback()
        os._exit(EXIT_STALLED)
