"""`python -m serving.leash PARENT_PID SIGNAL MODULE`: run a module that dies with its parent (C24).

The module's only argument is read from standard input and put into `sys.argv`, so that settings with
secrets never stand in a process list. A child cannot be leashed by `preexec_fn`: code between fork
and exec may deadlock when the parent has threads.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def leash(parent_pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread that started it is gone.

    Exits at once if the parent died before the leash was on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os._exit(1)


def main() -> None:
    """Entry point of the leashed process."""
    leash(int(sys.argv[1]), signal.Signals(int(sys.argv[2])))
    module = sys.argv[3]
    sys.argv = [module, sys.stdin.read()]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
