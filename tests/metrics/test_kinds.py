"""Kinds: every public number takes every type of array; every name which a message recommends exists."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_ls
from hf_ls import metrics
from hf_ls.calibration import posthoc, temperature
from hf_ls.metrics import PredictionStatistics, StreamingCalibration, TokenCalibration
from hf_ls.metrics.intervals import wilson_interval
from hf_ls.metrics.paired import draws_of_examples

# Values which every type of float holds exactly, so that every answer must be the same; rows of probabilities with sum 1.
LOGITS = np.random.default_rng(0).integers(-12, 13, (60, 4)) / 4
LABELS = np.where(np.arange(60) % 3 > 0, LOGITS.argmax(1), np.random.default_rng(1).integers(0, 4, 60))
PROBABILITIES = np.random.default_rng(2).permuted(np.tile([0.5, 0.25, 0.125, 0.125], (60, 1)), axis=1)
CONFIDENCE = np.random.default_rng(3).integers(1, 17, 60) / 16
CORRECT = np.random.default_rng(4).random(60) < CONFIDENCE
TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, "grad", "numpy", "list"]


def as_type(values: np.ndarray, kind: object) -> object:
    if kind == "numpy":
        return values
    if kind == "list":
        return values.tolist()
    if values.dtype.kind != "f":
        return torch.tensor(values)
    return torch.tensor(values, dtype=torch.bfloat16, requires_grad=True) if kind == "grad" else torch.tensor(values, dtype=kind)


def streamed(*arrays: object) -> dict[str, float]:
    state = StreamingCalibration()
    state.update(*arrays)
    return state.compute()


def of_tokens(items: object, labels: object) -> dict[str, dict[str, float]]:
    state = TokenCalibration(repetitions=20, token_counts=torch.arange(4))
    state.update(items, labels)
    return state.metrics()


PAIR, SCORES, OF_P = (CONFIDENCE, CORRECT), (LOGITS, LABELS), (PROBABILITIES, LABELS)
ITEMS = np.stack([CONFIDENCE, CORRECT.astype(float), CONFIDENCE, CONFIDENCE], -1).reshape(12, 5, 4)
CALLS = {
    **{name: (getattr(metrics, name), PAIR) for name in ("ece", "mce", "ece_equal_mass", "rmsce_debiased", "signed_gap")},
    **{name: (getattr(metrics, name), PAIR) for name in ("aurc", "e_aurc", "smooth_ece", "reliability_bins")},
    **{name: (getattr(metrics, name), (CONFIDENCE,)) for name in ("null_ece", "consistency_band")},
    "softmax": (metrics.softmax, (LOGITS,)),
    "nll": (metrics.nll, SCORES),
    "brier": (metrics.brier, OF_P),
    "ece_classwise": (metrics.ece_classwise, OF_P),
    "full_ece": (metrics.full_ece, OF_P),
    "classwise_interval": (lambda *a: metrics.classwise_interval(*a, repetitions=20), OF_P),
    "summarise": (lambda *a: metrics.summarise(*a, repetitions=20), SCORES),
    "PredictionStatistics.from_logits": (PredictionStatistics.from_logits, SCORES),
    "PredictionStatistics.from_probabilities": (PredictionStatistics.from_probabilities, OF_P),
    "StreamingCalibration": (streamed, (CONFIDENCE, CORRECT, CONFIDENCE, CONFIDENCE)),
    "TokenCalibration": (of_tokens, (ITEMS, LABELS.reshape(12, 5))),
    "wilson_interval": (wilson_interval, (np.arange(5.0), np.full(5, 8.0))),
    "bootstrap_interval": (
        lambda *a: metrics.bootstrap_interval("ece", PredictionStatistics.from_logits(*a), repetitions=20),
        SCORES,
    ),
    "draws_of_examples": (lambda *a: draws_of_examples(PredictionStatistics.from_logits(*a), a[1], repetitions=20), SCORES),
    "fit_temperature": (temperature.fit_temperature, SCORES),
    "apply_temperature": (lambda z: temperature.apply_temperature(z, 2.0), (LOGITS,)),
    "fit_vector_scaling": (lambda z, y: posthoc.fit_vector_scaling(z, y)(z), SCORES),
    "fit_isotonic": (lambda z, y: posthoc.fit_isotonic(z, y)(z), SCORES),
    "selective_score": (lambda z: posthoc.selective_score(z, 2), (LOGITS,)),
    "choose_selective_score": (lambda z, y: posthoc.choose_selective_score(z, y).validation_aurc, SCORES),
    "compare_posthoc": (lambda z, y: posthoc.compare_posthoc((z, y), (z, y)), SCORES),
}


def test_the_calls_are_all_public_numbers() -> None:
    others = {"ReliabilityBins", "path"}  # a result, and a folder
    assert set(metrics.__all__) - others <= {name.partition(".")[0] for name in CALLS}


@pytest.mark.parametrize("name", CALLS)
def test_every_type_of_array_gives_the_same_answer(name: str) -> None:
    function, arrays = CALLS[name]
    answers = {str(kind): repr(function(*(as_type(array, kind) for array in arrays))) for kind in TYPES}
    assert {answer: kind for kind, answer in answers.items()}.keys() == {answers["numpy"]}


def test_rows_of_tensors_in_a_list_are_rows() -> None:
    rows = list(torch.tensor(LOGITS, dtype=torch.bfloat16))
    assert metrics.nll(rows, list(torch.tensor(LABELS))) == metrics.nll(LOGITS, LABELS)


def modules() -> list[str]:
    packages = [importlib.import_module(f"hf_ls.{name}") for name in ("metrics", "calibration")]
    found = [m.name for p in packages for m in pkgutil.iter_modules(p.__path__, p.__name__ + ".")]
    return [name for name in found if not name.endswith(".modules")]


def text_of(node: ast.AST) -> str:
    """The text of an expression, "…" for the values in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "".join(text_of(part) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr))


def recommended(source: str) -> set[str]:
    """The names in the remedies of all refusals which are code and not English: with an underscore, a dot or brackets."""
    raised = [node.exc for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    hints = [text_of(argument) for call in raised for argument in call.args]
    found = {name for hint in hints for name in re.findall(r"\b(?:use|call|apply|pass|give|or) (?=([a-z][\w.]*\(?))", hint)}
    return {name for name in found if "_" in name or "." in name.rstrip(".") or "(" in name}


def exists(name: str, home: object, source: str) -> bool:
    """A dotted name from the top; x(…) also a method of the file's classes; else of the package, or a keyword of the file."""
    bare = name.removesuffix("(")
    top, *rest = bare.split(".")
    if top == "pipe":  # the reader's own pipeline
        return True
    if rest:
        try:
            thing = importlib.import_module(top)
        except ImportError:
            return False
        for part in rest:
            thing = getattr(thing, part, None)
        return thing is not None
    places = [hf_ls, metrics, *map(importlib.import_module, [*modules(), "hf_ls.trainer.evaluation"])]
    if any(bare in vars(place) for place in places):
        return True
    owners = [thing for thing in (*vars(home).values(), torch.nn.Module) if inspect.isclass(thing)]
    return any(hasattr(owner, bare) for owner in owners) if name != bare else bool(re.search(rf"\b{bare}\b *[:=]", source))


@pytest.mark.parametrize("module", modules())
def test_every_name_which_a_message_recommends_exists(module: str) -> None:
    home = importlib.import_module(module)
    source = Path(str(home.__file__)).read_text(encoding="utf-8")
    assert not [name for name in sorted(recommended(source)) if not exists(name, home, source)]


def test_an_invented_remedy_is_seen() -> None:
    source = "def f():\n    raise ValueError(f'expected logits, got {x}; use from_probabilities (or update(x)), or call numpy.bincount')\n"
    assert recommended(source) == {"from_probabilities", "update(", "numpy.bincount"}
    assert not exists("from_probabilities", metrics.core, source) and exists("numpy.bincount", metrics.core, source)
    assert exists("update(", metrics.tokens, source) and not exists("numpy.from_probabilities", metrics.core, source)
