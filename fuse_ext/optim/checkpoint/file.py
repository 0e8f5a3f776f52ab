"""A file that is replaced in one piece or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch


def save(obj: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` that leaves either the file that was there or the new one, whole.

    It writes beside the file, waits until that is on the disk, and renames: wherever the process
    or the machine dies, ``torch.load(path)`` finds the last checkpoint that was saved. A process
    that is killed meanwhile leaves a file ``.<name>.<random>`` behind. Of several processes that
    write to one path one wins; where ranks hold the same state, only one of them should save.
    (``torch.distributed.checkpoint`` does as much for a directory, by renaming its metadata, if
    each checkpoint has one of its own.)

    Args:
        obj: What to save, such as a dict of state_dicts.
        path: Where. Its directory must exist and take another file for a moment.

    Raises:
        OSError: The file could not be written; the one that was there stays.
    """
    path = Path(path)
    place, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(place, "wb") as file:
            os.fchmod(place, _mode_of(path))
            torch.save(obj, file)
            file.flush()
            os.fsync(place)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _mode_of(path: Path) -> int:
    """Of the file that is replaced, or of a new one; mkstemp's own are for their owner alone."""
    if path.exists():
        return path.stat().st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_directory(folder: Path) -> None:
    """The new name is on the disk too."""
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
