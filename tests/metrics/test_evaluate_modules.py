"""The metrics as `evaluate` modules: loaded from their folders without a network, fed in every way, refusing by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from forked import Forked, run_file

from hf_ls import metrics
from hf_ls.metrics.evaluate_modules import Ece, Nll, SignedGap

NAMES = [
    "aurc", "brier", "e_aurc", "ece", "ece_classwise", "ece_equal_mass", "full_ece", "mce", "nll", "rmsce_debiased", "signed_gap",
    "smooth_ece",
]  # fmt: skip


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(120, 3)) * 2
    return logits, metrics.softmax(logits), rng.integers(0, 3, 120)


@pytest.fixture
def load(tmp_path):
    return lambda name, **settings: evaluate.load(metrics.path(name), cache_dir=str(tmp_path), **settings)


def direct(name, logits, labels):
    if name in ("nll", "brier"):
        return getattr(metrics.PredictionStatistics.from_logits(logits, labels), name).mean()
    if name in ("ece_classwise", "full_ece"):
        return getattr(metrics, name)(metrics.softmax(logits), labels)
    stats = metrics.PredictionStatistics.from_logits(logits, labels)
    return getattr(metrics, name)(stats.confidence, stats.correct)


@pytest.mark.parametrize("name", NAMES)
def test_every_module_gives_the_function_as_a_python_float(name, load, data):
    logits, probabilities, labels = data
    metric = load(name)
    assert isinstance(metric, evaluate.Metric) and metric.name == name
    assert metric.description.startswith("Return ")
    result = metric.compute(predictions=probabilities, references=labels)
    assert list(result) == [name] and type(result[name]) is float
    assert result[name] == pytest.approx(direct(name, logits, labels), abs=1e-12)
    from_logits = load(name, from_logits=True).compute(predictions=logits.tolist(), references=labels.tolist())
    assert from_logits[name] == pytest.approx(result[name], abs=1e-12)


def test_one_module_file_per_metric_and_path_refuses_others_with_the_nearest():
    folders = [folder for folder in Path(metrics.path("ece")).parent.iterdir() if not folder.name.startswith("__")]
    assert sorted(folder.name for folder in folders) == NAMES
    with pytest.raises(ValueError, match="'eec'; did you mean 'ece'"):
        metrics.path("eec")
    with pytest.raises(ValueError, match="choose one of aurc, brier"):
        metrics.path("qqqqqq")


def test_added_rows_and_batches_equal_one_call(load, data):
    _, probabilities, labels = data
    whole = load("ece").compute(predictions=probabilities, references=labels)
    metric = load("ece")
    metric.add(prediction=probabilities[0], reference=labels[0])
    metric.add(prediction=probabilities[1].tolist(), reference=int(labels[1]))
    metric.add_batch(predictions=probabilities[2:50].astype(np.float64), references=labels[2:50])
    metric.add_batch(predictions=probabilities[50:119].tolist(), references=labels[50:119].tolist())
    assert len(metric) == 119
    rest = metric.compute(predictions=probabilities[119:], references=labels[119:])
    assert rest["ece"] == pytest.approx(whole["ece"], abs=1e-14)
    again = metric.compute(predictions=probabilities, references=labels)  # nothing is left over
    assert again["ece"] == pytest.approx(whole["ece"], abs=1e-14)


def test_float32_keeps_its_value_through_arrow(load, data):
    logits, _, labels = data
    logits = logits.astype(np.float32)
    metric = load("nll", from_logits=True, keep_in_memory=True)
    assert metric.compute(predictions=logits, references=labels)["nll"] == metrics.nll(logits, labels)


def test_masked_classes_pass_through_arrow(load):
    metric = load("nll", from_logits=True)
    result = metric.compute(predictions=[[0.0, -np.inf, 0.0]], references=[2])
    assert result["nll"] == pytest.approx(np.log(2))


def test_number_of_bins_is_a_setting_of_binned_metrics(load, data):
    _, probabilities, labels = data
    stats = metrics.PredictionStatistics.from_probabilities(probabilities, labels)
    result = load("ece", n_bins=5).compute(predictions=probabilities, references=labels)
    assert result["ece"] == pytest.approx(metrics.ece(stats.confidence, stats.correct, 5), abs=1e-14)
    with pytest.raises(TypeError, match="'n_bins'"):
        SignedGap(n_bins=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"nbins": 5}, "did you mean 'n_bins'"), ({"n_bins": 5.0}, "integer n_bins"), ({"from_logits": 1}, "from_logits")],
)
def test_unknown_and_wrong_settings_are_refused(settings, message):
    with pytest.raises(TypeError, match=message):
        Ece(**settings)


def test_settings_in_compute_are_refused_before_anything_is_stored(load, data):
    metric = load("ece")
    with pytest.raises(TypeError, match=r"constructor: evaluate.load\(path, n_bins="):
        metric.compute(predictions=data[1], references=data[2], n_bins=5)
    assert len(metric) == 0


GOOD = [[0.5, 0.5], [0.1, 0.9]]
WRONG = [
    ([[2.0, -1.0], [0.3, 0.7]], [0, 1], ValueError, "from_logits=True"),
    ([[0.9, 0.9], [0.3, 0.7]], [0, 1], ValueError, "sum to 1 within 0.001"),
    ([[float("nan"), 1.0], [0.3, 0.7]], [0, 1], ValueError, "NaN"),
    ([[None, 1.0], [0.3, 0.7]], [0, 1], TypeError, "None"),
    ([[0.5, 0.5], [1.0]], [0, 1], ValueError, "ragged"),
    ([0, 1], [0, 1], ValueError, "rather than the predicted class"),
    (GOOD, [0, -100], ValueError, "ignore_index"),
    (GOOD, [0, 2], ValueError, r"\[0, 2\), got 2"),
    (GOOD, [0.0, 1.5], TypeError, "integer labels"),
    (GOOD, ["0", "1"], TypeError, "integer labels"),
    (GOOD, [None, 1], TypeError, "integer labels"),
    (GOOD, [0], ValueError, "one label per prediction"),
    (GOOD, None, ValueError, "only one of them"),
    ([], [], ValueError, "at least one"),
]


@pytest.mark.parametrize(("predictions", "references", "error", "message"), WRONG)
def test_wrong_inputs_are_refused_by_compute_and_add_batch_and_leave_nothing_behind(
    load, predictions, references, error, message
):
    metric = load("ece")
    metric.add_batch(predictions=GOOD, references=[0, 1])
    for method in (metric.compute, metric.add_batch):
        with pytest.raises(error, match=message):
            method(predictions=predictions, references=references)
    assert metric.compute() == load("ece").compute(predictions=GOOD, references=[0, 1])


def test_wrong_single_rows_are_refused(load):
    metric = load("ece")
    for prediction, reference, error in [([3.0, 1.0], 0, ValueError), ([0.5, 0.5], 1.0, TypeError), (None, 0, TypeError)]:
        with pytest.raises(error, match="expected"):
            metric.add(prediction=prediction, reference=reference)
    assert len(metric) == 0


@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_computing_nothing_is_refused_by_name(load, keep_in_memory):
    with pytest.raises(ValueError, match="expected at least one prediction"):
        load("ece", keep_in_memory=keep_in_memory).compute()


def test_batches_of_different_width_are_refused_and_the_metric_can_go_on(load):
    metric = load("ece")
    metric.add_batch(predictions=GOOD, references=[0, 1])
    metric.add_batch(predictions=[[0.2, 0.3, 0.5]], references=[2])
    with pytest.raises(ValueError, match="ragged"):
        metric.compute()
    assert metric.compute(predictions=GOOD, references=[0, 1]) == load("ece").compute(predictions=GOOD, references=[0, 1])


def test_direct_compute_hook_validates_too():
    with pytest.raises(TypeError, match="integer labels"):
        Ece()._compute(predictions=GOOD, references=[0.0, 1.0])


def test_nll_of_an_impossible_label_is_an_error_not_infinity(load):
    assert Nll(from_logits=True)._compute([[0.0, 800.0]], [0]) == {"nll": 800.0}
    with pytest.raises(ValueError, match="from_logits=True"):
        load("nll").compute(predictions=[[0.0, 1.0]], references=[0])
    assert load("ece").compute(predictions=[[0.0, 1.0]], references=[0]) == {"ece": 1.0}


def test_combine_and_save_work(load, data, tmp_path):
    _, probabilities, labels = data
    combined = evaluate.combine({name: load(name) for name in NAMES})
    combined.add(prediction=probabilities[0], reference=labels[0])
    combined.add_batch(predictions=probabilities[1:100], references=labels[1:100])
    result = combined.compute(predictions=probabilities[100:], references=labels[100:])
    assert result == {
        name: pytest.approx(load(name).compute(predictions=probabilities, references=labels)[name], abs=1e-12) for name in NAMES
    }
    saved = evaluate.save(tmp_path / "result.json", **result)
    assert {name: json.loads(saved.read_text())[name] for name in NAMES} == result


def test_two_settings_of_one_metric_combine_under_their_own_names(load, data):
    combined = evaluate.combine({"fine": load("ece", n_bins=30), "coarse": load("ece", n_bins=5)})
    assert set(combined.compute(predictions=data[1], references=data[2])) == {"fine_ece", "coarse_ece"}


LOAD_ALL = f"""
import socket
def refuse(*_): raise AssertionError("the network was used")
socket.socket.connect = refuse
import evaluate
from hf_ls import metrics
values = {{}}
for name in {NAMES}:
    values |= evaluate.load(metrics.path(name)).compute(predictions=[[.9, .1], [.4, .6], [.3, .7]], references=[0, 1, 0])
print(values)
"""


def test_two_offline_processes_load_every_module_into_one_fresh_cache_at_once(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    for variable in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        environment.pop(variable, None)
    (tmp_path / "load.py").write_text(LOAD_ALL)
    both = [Forked(run_file, str(tmp_path / "load.py"), [], environment=environment) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0] == outputs[1] and "'smooth_ece'" in outputs[0]
    assert len(list((tmp_path / "home").rglob("smooth_ece.py"))) == 1


def test_the_numpy_core_needs_neither_evaluate_nor_torch():
    code = "import sys, hf_ls.metrics; print({'evaluate', 'datasets', 'torch', 'matplotlib', 'scipy'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
