"""What one run wrote, by name: all that this run, and a later start with `--overwrite_output_dir`, may delete.

Each line of the file is the JSON of one name, appended before that name is created, so whatever a run killed at any moment
has left is listed. What is not listed is somebody else's and stays. While a run works it holds a lock file beside it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from hf_ls.common.files import FILE, TEMPORARY, TEMPORARY_FOLDER, locked, told

MANIFEST = "hf_ls_manifest.jsonl"
LOCK = ".hf_ls_manifest.lock"  # held while a run works in the folder
FOLDER = "folder"  # deleted when nothing is left in it
CHECKPOINT = "checkpoint"  # a folder this run has begun to fill: until its files are listed, all in it is the run's
_WHOLE = (TEMPORARY_FOLDER, CHECKPOINT)
_SHOWN = 5
_PATIENCE = 10.0  # seconds: the workers of a killed run hold its lock until they notice


class Manifest:
    """The names in the folder of one run, relative to it, each with its kind."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Read what is listed in this folder: nothing, where no run has written."""
        self.folder = Path(folder)
        self.kinds = self._read()

    def _read(self) -> dict[str, str]:
        path = self.folder / MANIFEST
        kinds: dict[str, str] = {}
        if not path.is_file() or path.is_symlink():
            return kinds
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError, KeyError):  # a torn line: what it was to name was not created
                entry = json.loads(line)
                name = PurePosixPath(entry["name"])
                if not name.is_absolute() and name.parts and ".." not in name.parts:
                    kinds[str(name)] = str(entry["kind"])
        return kinds

    def _name(self, path: str | os.PathLike[str]) -> str | None:
        """The path relative to the folder; None for one outside of it and for the folder itself."""
        with suppress(ValueError):
            name = Path(os.path.abspath(path)).relative_to(os.path.abspath(self.folder)).as_posix()
            return None if name == "." else name
        return None

    def lists(self, path: str | os.PathLike[str]) -> bool:
        """Whether this run wrote it, or was about to."""
        return self._name(path) in self.kinds

    def claim(self, path: str | os.PathLike[str]) -> None:
        """Take a file for this run's, on the word of another manifest; nothing is written."""
        if (name := self._name(path)) is not None:
            self.kinds[name] = FILE

    def add(self, path: str | os.PathLike[str], kind: str = FILE) -> None:
        """List a name which is about to be created, and the folders which will be made for it.

        Only files can be there already: a folder which another made, and all in it, stays the other's.
        """
        name = self._name(path)
        if name is None:
            return
        parents = [parent for parent in reversed(PurePosixPath(name).parents) if str(parent) != "."]
        lines = [(str(parent), FOLDER) for parent in parents if not os.path.lexists(self.folder / parent)]
        if kind in (FILE, TEMPORARY) or not os.path.lexists(self.folder / name):
            lines.append((name, kind))
        self._append([(found, kind) for found, kind in lines if self.kinds.get(found) != kind])

    def finish(self, folder: Path) -> None:
        """List a checkpoint's files one by one, now that all are written: what is put there later is not the run's."""
        name = self._name(folder)
        if name is None or self.kinds.get(name) != CHECKPOINT:
            return
        inside = [(path, FOLDER if path.is_dir() else FILE) for path in sorted(folder.rglob("*")) if not path.is_symlink()]
        listed = [(found, kind) for path, kind in inside if (found := self._name(path)) is not None]
        self._append([*listed, (name, FOLDER)])

    def _append(self, lines: Sequence[tuple[str, str]]) -> None:
        if lines:
            text = "".join("\n" + json.dumps({"name": name, "kind": kind}) for name, kind in lines)
            with open(self.folder / MANIFEST, "a", encoding="utf-8") as file:  # the newline first: a torn line stays alone
                file.write(text)
            self.kinds |= dict(lines)

    @contextmanager
    def recording(self) -> Iterator[Manifest]:
        """List all that this process writes into the folder until the end of the block; delete what killed runs left first.

        Raises: ValueError while another run works in the folder.
        """
        remedy = "wait for the run which works in that folder, or give another output_dir"
        with locked(self.folder / LOCK, remedy, patience=_PATIENCE):
            found = self._read()
            if found != self.kinds:
                raise ValueError(
                    f"expected {self.folder} as it was when this run started, got one in which another run has begun; {remedy}"
                )
            self.remove([name for name, kind in self.kinds.items() if kind in (TEMPORARY, TEMPORARY_FOLDER)])
            with told(self.add):
                yield self

    def files(self) -> list[str]:
        """The names of the files which are there."""
        return [name for name, kind in self.kinds.items() if kind == FILE and self._is_own(name)]

    def foreign(self) -> list[str]:
        """The first few names in the folder which are not listed; a folder's ends with a slash and stands for all in it."""
        found: list[str] = []
        for name in self._strangers(self.folder):
            found.append(name)
            if len(found) == _SHOWN:
                break
        return found

    def _strangers(self, folder: Path) -> Iterator[str]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name = self._name(entry.path) or ""
            kind = None if entry.is_symlink() else self.kinds.get(name)
            if entry.is_dir(follow_symlinks=False):
                if kind == FOLDER:
                    yield from self._strangers(Path(entry.path))
                elif kind not in _WHOLE:
                    yield f"{name}/"
            elif kind not in (FILE, TEMPORARY) and (name not in (MANIFEST, LOCK) or entry.is_symlink()):
                yield name

    def remove(self, names: Sequence[str]) -> None:
        """Delete these names of the run, in this order: files, folders which it alone filled, folders which are empty now."""
        kept = [name for name in names if name in self.kinds and self._is_own(name)]
        for name in kept:
            path = self.folder / name
            if self.kinds[name] in _WHOLE:
                shutil.rmtree(path)  # this run made it, and has told nobody of it
            elif self.kinds[name] != FOLDER:
                path.unlink(missing_ok=True)
        for name in sorted(kept, key=lambda name: -len(PurePosixPath(name).parts)):
            if self.kinds[name] == FOLDER:
                with suppress(OSError):  # somebody put a file there
                    (self.folder / name).rmdir()

    def below(self, folder: Path) -> list[str]:
        """The listed names of a folder: its own, and those in it."""
        name = self._name(folder)
        return [found for found in self.kinds if found == name or found.startswith(f"{name}/")]

    def delete(self, first: str, keep: Sequence[str] = ()) -> None:
        """Delete all that is listed but `keep`, a file without which the rest is no run `first`, then empty the manifest.

        Raises: ValueError for a folder with anything else in it; nothing is deleted then.
        """
        self.check_alone()
        self.remove([first, *(name for name in self.kinds if name not in (first, *keep))])
        if (self.folder / MANIFEST).is_file():
            os.truncate(self.folder / MANIFEST, 0)
        self.kinds = {}

    def check_alone(self) -> None:
        """Refuse a folder in which there is more than what the run wrote.

        Raises: ValueError which names the first few.
        """
        if not self.folder.is_dir() or not (foreign := self.foreign()):
            return
        shown = ", ".join(foreign) + (" and perhaps more" if len(foreign) == _SHOWN else "")
        if not self.kinds and (self.folder / MANIFEST).is_file() is False:
            raise ValueError(
                f"expected {MANIFEST}, which names what a run wrote, to delete an earlier run in {self.folder}, got none beside "
                f"{shown}; delete that folder by hand, or give another output_dir"
            )
        raise ValueError(
            f"expected a folder of one run alone to delete, got {self.folder} with what that run did not write: {shown}; "
            "move it away, or give another output_dir"
        )

    def _is_own(self, name: str) -> bool:
        """Whether it is there, and neither it nor a folder above it has become a link to somewhere else."""
        path = self.folder / name
        parents = [self.folder / parent for parent in PurePosixPath(name).parents if str(parent) != "."]
        if not os.path.lexists(path) or any(found.is_symlink() for found in (path, *parents)):
            return False
        return path.is_dir() == (self.kinds[name] in (FOLDER, *_WHOLE))
