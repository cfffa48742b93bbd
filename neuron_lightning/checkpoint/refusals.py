"""What to do when the operating system refuses a file."""

from __future__ import annotations

import errno
import os

_RIGHTS = "give user {user} the right to read and write there, or choose another folder"
_ROOM = "make room there, or choose another folder"
_REMEDIES = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "the file system is mounted read-only: choose another folder",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
}


def with_remedy(text: str, error: BaseException) -> str:
    """``text``, and what helps against ``error`` where that is known."""
    remedy = _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    return text if remedy is None else f"{text}; {remedy.format(user=os.geteuid())}"
