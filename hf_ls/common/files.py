"""Writing files so that a killed run leaves none half-written.

Owns: the atomic write, of text, bytes and arrays, and what killed runs leave of it. Does not own: what is written.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_ls.common.errors import disk_sentence

UNFINISHED = "_unfinished"  # begins the name of a folder in that of a run whose files are moved out of it when they are whole


def write_atomically(path: str | os.PathLike[str], data: str | bytes) -> Path:
    """Write a file through a temporary one beside it, flushed to disk and then renamed over the target.

    A reader, or a run killed at any moment, sees the old file or the new one.

    Raises: OSError with a sentence for the user, when the disk is full or the folder cannot be written.
    """
    target = Path(path)
    try:
        return _write(target, data.encode() if isinstance(data, str) else data)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, disk_sentence(error, target)) from error


def write_arrays(path: str | os.PathLike[str], **arrays: NDArray) -> Path:
    """Write arrays by name as a compressed npz.

    Raises: as `write_atomically`.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return write_atomically(path, buffer.getvalue())


def _write(target: Path, data: bytes) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files which killed runs left in a folder that no other run is writing into."""
    for path in [*folder.rglob(".*.tmp"), *folder.rglob(f"{UNFINISHED}*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
