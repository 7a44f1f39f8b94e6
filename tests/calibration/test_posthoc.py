"""Vector scaling, isotonic regression and selective scores against scikit-learn, torch and closed forms."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_bert
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from scipy.stats import t as student
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_ls.calibration.posthoc import (
    POWERS,
    choose_selective_score,
    compare_posthoc,
    fit_isotonic,
    fit_structured_matrix_scaling,
    fit_vector_scaling,
    selective_score,
)
from hf_ls.calibration.temperature import apply_temperature, bake_folder, fit_temperature
from hf_ls.metrics import aurc


def toy(n: int = 600, k: int = 4, seed: int = 0, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a model whose classes need different weights and biases to be calibrated."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(n, k)) * 1.5
    labels = np.array([rng.choice(k, p=row) for row in softmax(true, axis=1)])
    return scale * (true * np.linspace(0.7, 2.0, k) + np.linspace(-1, 1, k)), labels


def test_structured_matrix_scaling_is_the_optimum_of_its_objective() -> None:
    pytest.importorskip("probmetrics")
    logits, labels = toy(n=300)
    (n, k), index = logits.shape, np.arange(300)
    tempered = softmax(apply_temperature(logits, fit_temperature(logits, labels)), axis=1)
    x = np.log((n * tempered + 1 / k) / (n + 1))

    def objective(parameters: np.ndarray) -> float:
        w, b = parameters[:-k].reshape(k, k), parameters[-k:]
        off = (w**2).sum() - (np.diag(w) ** 2).sum()
        nll = -log_softmax(x @ w.T + b, axis=1)[index, labels].mean()
        return float(nll + k * (((np.diag(w) - 1) ** 2).sum() + (b**2).sum()) / n + k * (k - 1) * off / n)

    best = minimize(objective, np.concatenate([np.eye(k).ravel(), np.zeros(k)]), method="BFGS")
    expected = softmax(x @ best.x[:-k].reshape(k, k).T + best.x[-k:], axis=1)
    ours = fit_structured_matrix_scaling(logits, labels)
    np.testing.assert_allclose(ours(logits), expected, atol=2e-3)  # its minimiser stops early
    np.testing.assert_allclose(ours(logits[:5] + 7.0), ours(logits[:5]), atol=1e-5)
    with pytest.raises(ValueError, match="4 classes"):
        ours(logits[:, :3])


def test_structured_matrix_scaling_is_ranked_where_its_library_is_installed() -> None:
    data = toy(), toy(seed=1)
    installed = all(importlib.util.find_spec(name) for name in ("probmetrics", "numba"))
    found = compare_posthoc(*data)
    assert ("structured matrix scaling" in found) == installed
    if installed:
        assert found["structured matrix scaling"]["nll_change_high"] < 0
        return
    with pytest.raises(ImportError, match=r"hf_ls\[posthoc\]"):
        fit_structured_matrix_scaling(*data[0])


def test_vector_scaling_is_the_optimum_of_torch_in_float64() -> None:
    logits, labels = toy()
    ours = fit_vector_scaling(logits, labels)
    z, y = torch.tensor(logits - logits.mean(1, keepdims=True)), torch.tensor(labels)
    w, b = torch.ones(4, dtype=torch.float64, requires_grad=True), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([w, b], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(z * w + b, y)
        loss.backward()
        return loss

    optimiser.step(closure)
    np.testing.assert_allclose(ours.weight, w.detach().numpy(), rtol=1e-4)
    np.testing.assert_allclose(ours.bias, (b - b.mean()).detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_vector_scaling_of_other_units_gives_the_same_probabilities(scale: float) -> None:
    logits, labels = toy()
    expected = softmax(fit_vector_scaling(logits, labels)(logits), axis=1)
    scaled = scale * logits
    np.testing.assert_allclose(softmax(fit_vector_scaling(scaled, labels)(scaled), axis=1), expected, atol=1e-4)


def test_vector_scaling_refuses_what_has_no_minimum() -> None:
    logits, labels = toy(40)
    with pytest.raises(ValueError, match=r"at least 8 rows with a label of every class"):
        fit_vector_scaling(logits, np.zeros(40, int))
    with pytest.raises(ValueError, match="separable"):
        fit_vector_scaling(np.eye(4)[labels] * 5.0, labels)
    with pytest.raises(ValueError, match="finite logits"):
        fit_vector_scaling(np.where(np.eye(40, 4) > 0, -np.inf, logits), labels)
    fitted = fit_vector_scaling(*toy())
    with pytest.raises(ValueError, match="expected logits of 4 classes, got 3"):
        fitted(logits[:, :3])


def test_isotonic_maps_are_those_of_scikit_learn_with_ties() -> None:
    logits, labels = toy()
    logits = np.round(logits, 1)  # many ties
    new = toy(seed=1)[0]
    ours = fit_isotonic(logits, labels)
    p, q = softmax(logits, axis=1), softmax(new, axis=1)
    maps = [IsotonicRegression(out_of_bounds="clip").fit(p[:, k], labels == k) for k in range(4)]
    expected = np.stack([m.predict(q[:, k]) for k, m in enumerate(maps)], axis=1)
    np.testing.assert_allclose(ours(new), expected / expected.sum(1, keepdims=True), atol=1e-9)
    np.testing.assert_allclose(ours(new).sum(1), 1.0)


def test_isotonic_equals_the_whole_of_scikit_learns_calibration() -> None:
    class Softmax(ClassifierMixin, BaseEstimator):
        def fit(self, X: np.ndarray, y: np.ndarray) -> Softmax:
            self.classes_ = np.arange(4)
            return self

        def predict_proba(self, X: np.ndarray) -> np.ndarray:
            return softmax(X, axis=1)

        def predict(self, X: np.ndarray) -> np.ndarray:
            return X.argmax(axis=1)

    logits, labels = toy()
    theirs = CalibratedClassifierCV(FrozenEstimator(Softmax().fit(logits, labels)), method="isotonic").fit(logits, labels)
    np.testing.assert_allclose(fit_isotonic(logits, labels)(logits), theirs.predict_proba(logits), atol=1e-6)


def test_isotonic_row_of_zeros_is_uniform_and_its_fit_lowers_the_brier_score() -> None:
    logits, labels = toy(3000, scale=2.0)
    p = fit_isotonic(logits, labels)(logits)
    hot = np.eye(4)[labels]
    assert ((p - hot) ** 2).sum(1).mean() < ((softmax(logits, axis=1) - hot) ** 2).sum(1).mean()
    tied = fit_isotonic([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]], [1, 2, 0])
    np.testing.assert_allclose(tied([[9.0, 9.0, 9.0]]).sum(), 1.0)


def test_selective_score_against_its_formula() -> None:
    logits, _ = toy(50)
    centred = logits - logits.mean(1, keepdims=True)
    for power in POWERS:
        expected = centred.max(1) / np.linalg.norm(centred, ord=power, axis=1)
        np.testing.assert_allclose(selective_score(logits, power), expected, rtol=1e-12)
        np.testing.assert_allclose(selective_score(1e3 * logits + 7.0, power), expected, rtol=1e-9)  # scale and shift
    np.testing.assert_allclose(selective_score(logits), softmax(logits, axis=1).max(1))
    assert selective_score(np.zeros((1, 3)), 2).tolist() == [0.0]
    assert np.isfinite(selective_score(logits * 1e200, 8)).all()


def test_two_classes_have_no_normalised_logit() -> None:
    logits, labels = toy(60, k=2)
    centred = logits - logits.mean(1, keepdims=True)
    assert np.ptp(centred.max(1) / np.linalg.norm(centred, axis=1)) < 1e-12  # why: every row scores the same
    for refused in (lambda: selective_score(logits, 2), lambda: choose_selective_score(logits, labels)):
        with pytest.raises(ValueError, match="3 or more classes"):
            refused()
    assert compare_posthoc((logits, labels), (logits, labels))["selective score"].keys() == {"refused"}


def test_the_score_is_chosen_on_validation_by_aurc_and_the_probability_keeps_ties() -> None:
    # The length of a row says nothing about its correctness, only its direction does: normalising is right here.
    rng = np.random.default_rng(5)
    direction = rng.normal(size=(800, 4))
    direction -= direction.mean(1, keepdims=True)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    labels = np.array([rng.choice(4, p=row) for row in softmax(3 * direction, axis=1)])
    logits = direction * np.exp(1.5 * rng.normal(size=(800, 1)))
    chosen = choose_selective_score(logits, labels)
    assert chosen.power in POWERS and set(chosen.validation_aurc) == {None, *POWERS}
    assert chosen.validation_aurc[chosen.power] == min(chosen.validation_aurc.values()) < chosen.validation_aurc[None]
    correct = logits.argmax(1) == labels
    assert chosen.validation_aurc[chosen.power] == pytest.approx(aurc(chosen(logits), correct))
    assert chosen.name == f"max logit / {chosen.power}-norm"
    every = logits.argmax(1)  # all right: every score has AURC 0
    assert choose_selective_score(logits, every).power is None


def test_all_methods_are_fitted_on_validation_and_judged_on_test() -> None:
    validation, test = toy(3000, seed=1), toy(3000, seed=2)
    found = compare_posthoc(validation, test)
    optional = {"structured matrix scaling"}
    assert [name for name in found if name not in optional] == [
        "none",
        "temperature",
        "vector scaling",
        "isotonic",
        "selective score",
    ]
    nll = {name: found[name]["nll"] for name in ("none", "temperature", "vector scaling")}
    assert nll["vector scaling"] < nll["temperature"] < nll["none"]  # type: ignore[operator]
    assert found["isotonic"]["ece"] < found["none"]["ece"]  # type: ignore[operator]
    assert found["temperature"]["accuracy"] == found["none"]["accuracy"]
    for name in ("temperature", "vector scaling"):
        row = found[name]
        temperature = fit_temperature(*validation)
        z = test[0] / temperature if name == "temperature" else fit_vector_scaling(*validation)(test[0])
        rows = np.arange(len(z))
        change = log_softmax(test[0], 1)[rows, test[1]] - log_softmax(z, 1)[rows, test[1]]
        half = student.ppf(0.975, len(z) - 1) * change.std(ddof=1) / len(z) ** 0.5
        ends = [row[f"nll_change{end}"] for end in ("_low", "", "_high")]
        assert ends == pytest.approx([change.mean() - half, change.mean(), change.mean() + half], abs=0.1 * half)
        assert row["brier_change"] == pytest.approx(row["brier"] - found["none"]["brier"])  # type: ignore[operator]
    assert "nll_change" not in found["none"] and "nll_change" not in found["selective score"]
    all_right = validation[0].argmax(1)
    refused = compare_posthoc((validation[0], all_right), test)
    assert "as T → 0" in str(refused["temperature"]["refused"]) and "separable" in str(refused["vector scaling"]["refused"])


@pytest.fixture
def published(tmp_path: Path) -> Path:
    tiny_bert(3, id2label={0: "bad", 1: "so-so", 2: "good"}).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n")
    return tmp_path


def folder_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.arange(5, 29).reshape(4, 6)
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()(input_ids=ids).logits


def test_a_baked_folder_gives_logits_over_t_to_plain_transformers(published: Path) -> None:
    before, files = folder_logits(published), sorted(os.listdir(published))
    bake_folder(published, 1.7)
    torch.testing.assert_close(folder_logits(published), before / 1.7, rtol=1e-5, atol=1e-6)
    assert sorted(os.listdir(published)) == files and (published / "README.md").read_text() == "# Mine\n"
    config = AutoModelForSequenceClassification.from_pretrained(published).config
    assert config.calibration_temperature == 1.7 and config.id2label[1] == "so-so"
    bake_folder(published, 1.7)  # a resumed run bakes no second time
    torch.testing.assert_close(folder_logits(published), before / 1.7, rtol=1e-5, atol=1e-6)


def test_a_folder_which_would_not_give_them_stays_as_it_was(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folder_logits(published)
    save = BertForSequenceClassification.save_pretrained

    def without_bias(self: Any, folder: str, **kwargs: Any) -> None:
        state = {name: value for name, value in self.state_dict().items() if name != "classifier.weight"}
        save(self, folder, state_dict=state | {"classifier.weight": torch.ones(3, 32)}, **kwargs)

    monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", without_bias)
    with pytest.raises(ValueError, match="when loaded again"):
        bake_folder(published, 1.7)
    torch.testing.assert_close(folder_logits(published), before)
    assert "calibration_temperature" not in (published / "config.json").read_text()


def nll_of_logits(z: np.ndarray, y: np.ndarray) -> float:
    return float(-log_softmax(z, axis=1)[np.arange(len(y)), y].mean())


def nll_of_probabilities(p: np.ndarray, y: np.ndarray) -> float:
    return float(-np.log(p[np.arange(len(y)), y]).mean())


MAPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "temperature": (lambda z, y: partial(apply_temperature, temperature=fit_temperature(z, y)), nll_of_logits),
    "vector scaling": (fit_vector_scaling, nll_of_logits),
    "isotonic": (fit_isotonic, nll_of_probabilities),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("k", [2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_every_map_sees_no_constant_of_a_row_and_is_never_worse_than_none_where_it_was_fitted(
    name: str, k: int, seed: int
) -> None:
    fit, nll = MAPS[name]
    logits, labels = toy(400, k, seed, scale=[0.3, 1.0, 3.0, 1.0][seed])
    shift = np.random.default_rng(seed).normal(size=(400, 1)) * 20
    fitted = fit(logits, labels)
    moved = fit(logits + shift, labels)
    as_p = (lambda out: out) if nll is nll_of_probabilities else partial(softmax, axis=1)
    np.testing.assert_allclose(as_p(fitted(logits + shift)), as_p(fitted(logits)), atol=1e-9)
    np.testing.assert_allclose(as_p(moved(logits)), as_p(fitted(logits)), atol=1e-4)
    assert nll(fitted(logits), labels) <= nll_of_logits(logits, labels) + 1e-9
