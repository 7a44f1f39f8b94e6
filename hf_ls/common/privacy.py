"""What stays on this machine: tokens, which are in no file and on no command line, and the paths of folders here, which are in
nothing that is pushed."""

from __future__ import annotations

import copyreg
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

TEXTS = (".json", ".md", ".txt", ".jinja")  # the ends of the names of files which may hold a path
_VARIABLE = "HF_TOKEN"  # where huggingface_hub looks first


def is_secret(setting: str) -> bool:
    """Whether a setting, or the option of that name, holds a secret: `hub_token`; transformers masks by the same rule."""
    return setting.lstrip("-").split("=")[0].replace("-", "_").endswith("_token")


def without_secrets(argv: Sequence[str]) -> list[str]:
    """Arguments without the options which hold a secret, and without their values."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if not (word.startswith("--") and is_secret(word)):
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return kept


def yaml_without_secrets(text: str) -> str:
    """The text of a YAML file with null in place of each secret, all else as it is written."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    for key, value in reversed(pairs):
        if is_secret(str(key.value)):
            text = text[: value.start_mark.index] + "null" + text[value.end_mark.index :]
    return text


@contextmanager
def token_in_environment(training: Any) -> Iterator[None]:
    """Move `training.hub_token` to the environment of this process until the end of the block.

    There huggingface_hub finds it for reading gated models as well as for pushing, and so do the processes which this one
    starts.
    """
    token, before = training.hub_token, os.environ.get(_VARIABLE)
    if token is None:
        yield
        return
    training.hub_token, os.environ[_VARIABLE] = None, token
    try:
        yield
    finally:
        training.hub_token = token
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


def local_name(path: str | os.PathLike[str]) -> str:
    """How a folder or file here is called in what others read: "./name", which can be no id on the Hub."""
    return f"./{Path(path).name}"


def without_paths(text: str, paths: Sequence[str]) -> str | None:
    """A text for others, in which values of JSON that are one of these paths or lie below it are names; None if some are left.

    Where no path occurs the text is as it was, to the byte.
    """
    if any(path in text for path in paths):
        try:
            text = json.dumps(named(json.loads(text), paths), indent=2, ensure_ascii=False) + "\n"
        except ValueError:  # no JSON
            return None
    return None if any(path in text for path in paths) else text


def named(value: Any, paths: Sequence[str]) -> Any:
    """The value with names in place of these paths and what lies below them, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: named(item, paths) for key, item in value.items()}
    if isinstance(value, list):
        return [named(item, paths) for item in value]
    return local_name(value) if isinstance(value, str) and value.startswith(tuple(paths)) else value


@contextmanager
def pickled_for_others(arguments: Any) -> Iterator[None]:
    """In this block training arguments are pickled without secrets, and with names in place of paths.

    A Trainer writes them as `training_args.bin` beside every model, and uploads that file with each push.
    """
    kind, before = type(arguments), copyreg.dispatch_table.get(type(arguments))
    strings = [value for value in vars(arguments).values() if isinstance(value, str) and os.path.isabs(value)]

    def reduced(given: Any) -> Any:
        paths = [*paths_here(), *strings]
        public = object.__new__(kind)
        vars(public).update({key: None if is_secret(key) else named(value, paths) for key, value in vars(given).items()})
        return object.__reduce_ex__(public, 4)

    copyreg.pickle(kind, reduced)
    try:
        yield
    finally:
        del copyreg.dispatch_table[kind]
        if before is not None:
            copyreg.dispatch_table[kind] = before


def paths_here(*more: str | os.PathLike[str] | None) -> list[str]:
    """The folder where this process works, the home folder, and some more files and folders, as absolute paths."""
    found = {str(found) + os.sep for path in (Path.cwd(), Path.home()) for found in (path, path.resolve()) if path.name}
    for path in (Path(path) for path in more if path and Path(path).exists()):
        found |= {os.path.abspath(path), os.path.realpath(path)}
    return sorted(found)
