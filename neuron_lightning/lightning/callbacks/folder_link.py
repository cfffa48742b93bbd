"""A link that always points at a whole checkpoint."""

from __future__ import annotations

import os
from pathlib import Path


def point(link: Path, target: Path) -> bool:
    """Makes ``link`` point at ``target``, atomically; False where something that is no link stands in its place.

    Raises:
        OSError: the file system has no symbolic links, or the folder cannot be written.
    """
    if not link.is_symlink() and link.exists():
        return False
    fresh = link.with_name(link.name + ".new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    os.replace(fresh, link)
    return True
