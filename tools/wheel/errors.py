"""The one exception that the command line turns into a message."""

from __future__ import annotations

import errno
from pathlib import Path

REASONS = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}


class WheelError(Exception):
    """A problem that the user can mend, told together with the remedy."""


def refused(error: OSError, root: Path) -> WheelError | None:
    """What the user can do about a file that could not be written; None for any other error."""
    reason = REASONS.get(error.errno or 0)
    if reason is None:
        return None
    return WheelError(
        f"{error.filename or root / 'build'}: {reason}. Everything is written to {root / 'build'} and the "
        "output folder: make room or both writable and run the command again, it resumes. --build and "
        "--output choose other folders."
    )
