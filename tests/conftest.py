"""No test may reach a network, a GPU or the user's caches; tests run on one thread for repeatable sums."""

from __future__ import annotations

import gc
import os
import secrets
import sys
import tempfile
from pathlib import Path

import pytest

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": tempfile.mkdtemp(prefix="hf_ls_tests_"),
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
}
_begun: set[Path] = set()


def hash_tokenizers_by_chance() -> None:
    """`datasets` hashes a whole vocabulary for the cache name of each tokenised split: a quarter of a tiny run, and for nothing."""
    if pickling := sys.modules.get("datasets.utils._dill"):
        pickling._save_transformersPreTrainedTokenizerBase = lambda pickler, tokenizer: pickler.save_reduce(
            str, (secrets.token_hex(8),), obj=tokenizer
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files which start processes first: a long one begun last would leave one of two workers idle."""
    longest = {"run", "compare", "processes"}
    items.sort(key=lambda item: item.path.parent.name not in longest)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures of a file, once its imports are done.

    Every training collects garbage, which would go through a million objects of torch and pytest: most of the time of a tiny one.
    """
    if item.path not in _begun:
        _begun.add(item.path)
        if transformers := sys.modules.get("transformers"):
            transformers.logging.set_verbosity_warning()  # a run with --log_level info inside a test leaves it so
        hash_tokenizers_by_chance()
        gc.collect()
        gc.freeze()
