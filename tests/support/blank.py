"""Runs inside a test draw no plots, half of what a tiny run costs; `tests/report` draws them, and so do fixtures of whole files."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_ls.common.files import write_atomically
from hf_ls.report import pictures, plots

# A PNG of one black pixel.
_PIXEL = base64.b64decode(b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABAQAAAAA3bvkkAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


def leave_blank(replace: Callable[[object, str, object], None] = setattr) -> None:
    """Every plot is one pixel."""
    for module in (plots, pictures):
        replace(module, "save_figure", lambda figure, path: write_atomically(Path(path), _PIXEL))


@pytest.fixture(autouse=True)
def blank_figures(monkeypatch):
    leave_blank(monkeypatch.setattr)
