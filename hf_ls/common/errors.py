"""One sentence for the user in place of the traceback of another library.

Owns: which errors are the user's to mend, and the words for those of the Hub, of model files and of the disk.
Does not own: the checks of `hf_ls` itself, which word their own sentences where they are made.
"""

from __future__ import annotations

import errno
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import NoReturn

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError

_PACKAGE = Path(__file__).parents[1]
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO)
_LOG_IN = "log in with `hf auth login`, or give a token which may do this (HF_TOKEN, hub_token)"


def one_sentence(error: BaseException) -> str | None:
    """What to tell the user, or None for an error which is none of the user's: it deserves its traceback.

    A ValueError, TypeError or OSError which `hf_ls` itself has raised as "expected …, got …; do this" is told as it is; a full
    disk or a folder which cannot be written is put into words, whoever noticed it.
    """
    if isinstance(error, OSError) and error.errno in _DISK and not str(error.strerror).startswith("expected"):
        return disk_sentence(error)
    if isinstance(error, SafetensorError) and "No space left" in str(error):
        return disk_sentence(OSError(errno.ENOSPC, "No space left on device"))
    if not isinstance(error, ValueError | TypeError | OSError):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    text = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
    ours = bool(frames) and Path(frames[-1].filename).is_relative_to(_PACKAGE)
    return text if ours and text.startswith("expected ") else None


def disk_sentence(error: OSError, place: str | Path | None = None) -> str:
    """The words for a file which cannot be written, or for want of a right, not be read."""
    where = place or error.filename
    what = "read or write" if error.errno in (errno.EACCES, errno.EPERM, errno.EIO) else "write"
    return (
        f"expected to {what} {where or 'in output_dir'}, got: {error.strerror}; free some space or give another output_dir. What "
        "was finished before is kept"
    )


def end_with(error: Exception, *, debug: bool = False) -> NoReturn:
    """End the script: with the sentence where there is one, else, and always for `debug`, with the traceback.

    Raises: SystemExit, or the error itself.
    """
    text = None if debug else one_sentence(error)
    if text is None:
        raise error
    sys.exit(f"error: {text}")


@contextmanager
def loading(what: str, remedy: str) -> Iterator[None]:
    """Word the errors of other libraries while something is loaded from a folder or the Hub.

    Raises: ValueError, except for errors which are no matter of what is there.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError, UnpicklingError, RuntimeError) as error:
        text = str(error)
        if text.startswith("expected ") and isinstance(error, ValueError):
            raise
        raise ValueError(f"expected {what}, got: {_cause(error)}; {_advice(error, remedy)}") from error


@contextmanager
def uploading(what: str, place: str) -> Iterator[None]:
    """Word the refusals of the Hub while something is sent there.

    Raises: ValueError for no token, a refused one, no connection.
    """
    try:
        yield
    except (HfHubHTTPError, LocalTokenNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"expected to upload {what} to {place}, got: {_cause(error)}; {_advice(error, 'try again later')}"
        ) from error


def read_json(path: Path, remedy: str) -> dict:
    """The mapping in a JSON file which an earlier run wrote.

    Raises: ValueError for anything else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected a whole JSON file at {path}, got: {error}; {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON mapping at {path}, got {type(found).__name__}; {remedy}")
    return found


def _cause(error: BaseException) -> str:
    """The first line that says something."""
    if isinstance(error, UnpicklingError):
        return "a pickle, which could run any code"
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        return "weights of other sizes"
    if "Repo id must" in str(error):
        return "no such folder, and no name of the Hub"
    if "trust_remote_code" in str(error):
        return "a repository with code of its own"
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".;: ")


def _advice(error: BaseException, remedy: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    chain: list[BaseException] = [error]
    while (chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)  # type: ignore[arg-type]
    statuses = {getattr(getattr(found, "response", None), "status_code", None) for found in chain} | {status}
    if any(isinstance(found, OfflineModeIsEnabled) for found in chain) or "offline" in str(error).lower():
        return "unset HF_HUB_OFFLINE, or give a folder; without a network, download it beforehand with `hf download`"
    if statuses & {401, 403} or any(isinstance(found, LocalTokenNotFoundError) for found in chain):
        return _LOG_IN
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        return "set ignore_mismatched_sizes to start with a new head"
    if "trust_remote_code" in str(error):
        return "read that code, then set trust_remote_code"
    return remedy
