"""Each test of this folder runs without drawing, and on one tiny model."""

from __future__ import annotations

import pytest
from blank import blank_figures  # noqa: F401
from tiny_run import save_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))
