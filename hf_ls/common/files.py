"""Writing files so that a killed run leaves none half-written.

Text, bytes and arrays are written whole or not at all. Whoever wants to know (`told`) hears of each name before it is
created, temporary ones too, so that what a killed run leaves can be told from what is somebody else's.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from hf_ls.common.errors import disk_sentence

UNFINISHED = "_unfinished"  # begins the name of a folder in that of a run whose files are moved out of it when they are whole
FILE, TEMPORARY, TEMPORARY_FOLDER = "file", "temporary", "temporary folder"  # the kinds of names
Listener = Callable[[Path, str], None]
_listeners: list[Listener] = []


@contextmanager
def told(listener: Listener) -> Iterator[None]:
    """Call `listener(path, kind)` before this process creates a file through this module, until the end of the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(path: Path, kind: str) -> None:
    """Say that a name is about to be created."""
    for listener in _listeners:
        listener(path, kind)


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
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    tell(temporary, TEMPORARY)
    tell(target, FILE)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def move(source: Path, target: Path) -> None:
    """Put a whole file in its place."""
    tell(target, FILE)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def temporary_name(folder: Path) -> Path:
    """A name in this folder which nobody has used: for a folder whose files are moved out of it when they are whole."""
    return folder / f"{UNFINISHED}-{secrets.token_hex(8)}"


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder of this name, which is deleted with all in it at the end of the block.

    Raises: FileExistsError where there is one: it is somebody else's.
    """
    tell(path, TEMPORARY_FOLDER)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def locked(path: Path, remedy: str, *, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file, which stays in its place, until the end of the block or of this process.

    Raises: ValueError when another process still holds it after `patience` seconds; OSError as `write_atomically`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, disk_sentence(error, path.parent)) from error
    try:
        with FileLock(path, timeout=patience):
            yield
    except Timeout as error:
        if error.lock_file != str(path):
            raise
        raise ValueError(f"expected {path} to be free, got it held by another process; {remedy}") from None
