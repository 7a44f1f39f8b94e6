"""A YAML file of settings as the command-line arguments which say the same."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import yaml

from hf_ls.common.errors import did_you_mean


def yaml_arguments(path: Path, known: set[str], without: Collection[str] = ()) -> list[str]:
    """The settings of a YAML file as command-line arguments, scalars as they are written, some left out.

    Raises: ValueError for a missing or malformed file, an unknown or repeated key, and YAML tags.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        found = f"no file at {path}" if isinstance(error, FileNotFoundError) else f"{path}: {error.strerror}"
        raise ValueError(f"expected a config file, got {found}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"expected valid YAML in {path}, got: {' '.join(str(error).split())}; fix that line") from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"expected `name: value` lines in {path}, got another kind of YAML; see configs/ for examples")
    arguments: list[str] = []
    seen: set[str] = set()
    for key_node, value in node.value:
        key = str(key_node.value)
        if key not in known:
            raise ValueError(f"expected known settings in {path}, got {key!r}{nearest(key, known)}; see --help")
        if key in seen:
            raise ValueError(f"expected each setting once in {path}, got {key!r} twice; remove one")
        seen.add(key)
        arguments += _argument(path, key, value) if key not in without else []
    return arguments


def _argument(path: Path, key: str, node: yaml.Node) -> list[str]:
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
        raise ValueError(f"expected plain values in {path}, got the tag {node.tag} at {key!r}; remove it")
    if isinstance(node, yaml.ScalarNode):
        # `key:` and `key: null` leave the default.
        return [] if node.tag.endswith(":null") else [f"--{key}={node.value}"]
    if isinstance(node, yaml.SequenceNode):
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            raise ValueError(f"expected a list of plain values in {path} at {key!r}, got a nested one; flatten it")
        return [f"--{key}", *(str(item.value) for item in node.value)] if node.value else []
    value = yaml.safe_load(yaml.serialize(node))
    return [f"--{key}={json.dumps(value)}"]


def nearest(name: str, known: Collection[str]) -> str:
    """`did_you_mean` in brackets."""
    found = did_you_mean(name, known)
    return f" ({found})" if found else ""
