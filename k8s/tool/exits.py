"""Exit codes of `argosy k8s`, and the errors that end in one of them."""

from __future__ import annotations

from typing import Final

DONE: Final = 0
ERROR: Final = 1
CHANGES: Final = 2
REFUSED: Final = 3
UNFINISHED: Final = 4
ROLLED_BACK: Final = 5

MEANINGS: Final = {
    DONE: "done; plan: nothing to change; status: healthy; doctor: nothing found; capacity: everything fits",
    ERROR: "an error: wrong input, no permission, no answer in time; the message names it",
    CHANGES: "plan: there are changes; status: serves, but not as asked; doctor: warnings; capacity: not all fits",
    REFUSED: "refused, and nothing was changed; status: serves nothing; doctor: errors",
    UNFINISHED: "changed, but the goal was not reached in time or at all",
    ROLLED_BACK: "deploy --atomic failed, and the last good revision runs again",
}


class ToolError(Exception):
    """Ends a command with a message for its user. code: one of MEANINGS."""

    def __init__(self, message: str, code: int = ERROR) -> None:
        super().__init__(message)
        self.code = code


class Refused(ToolError):
    """What was asked would do harm; nothing was changed."""

    def __init__(self, message: str) -> None:
        super().__init__(message, REFUSED)


class ApiError(ToolError):
    """The API server said no."""

    def __init__(self, action: str, status: int, reason: str, message: str) -> None:
        """action: what was asked, such as "list pods in argosy". status: of HTTP; 0 = no answer at all."""
        super().__init__(f"{action}: {message or reason}" + (f" ({status} {reason})" if status else ""))
        self.action = action
        self.status = status
        self.reason = reason
        self.message = message

    @property
    def is_missing(self) -> bool:
        return self.status == 404

    @property
    def is_forbidden(self) -> bool:
        return self.status in (401, 403)


class DeadlineError(ToolError):
    """No answer within a call's deadline."""
