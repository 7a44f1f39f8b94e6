"""The comparison end to end on a tiny model and real text: cells, what is held fixed, killed parents, refusals, the ε search."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import transformers as tf
from datasets import Dataset, load_dataset
from forked import Forked, run_file, survivors
from places import ROOT
from tiny_run import save_tiny_model

from hf_ls.calibration.temperature import fit_temperature
from hf_ls.common.errors import one_sentence
from hf_ls.common.files import locked
from hf_ls.compare.cells import CELL, Cell, CellFailed, Spec, cell_config, finished, run_cells
from hf_ls.compare.comparison import Comparison, Variant
from hf_ls.compare.data import flip, prepare_data
from hf_ls.compare.experiment import _with_frozen_config, check_fingerprints, parse_compare, plan, run_comparison
from hf_ls.data.classification import load_snippets
from hf_ls.losses.smoothing import Smoothing
from hf_ls.run.config import parse_config
from hf_ls.run.outcome import run_name
from hf_ls.trainer.arguments import smoothing_of

FAST = [
    *("--dataset_name", "snippets", "--report_to", "none", "--use_cpu", "true", "--max_length", "16", "--disable_tqdm", "true"),
    *("--max_train_samples", "96", "--max_eval_samples", "80", "--max_predict_samples", "90", "--num_train_epochs", "1"),
    *("--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "64", "--learning_rate", "1e-2"),
]
GRID = ["--epsilons", "0", "0.2", "--seeds", "0", "1", "--jobs", "2", "--repetitions", "50"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Whose classifier is new in every run."""
    return save_tiny_model(tmp_path_factory.mktemp("model"), tf.BertModel)


def arguments(model, folder, *extra):
    return ["--model_name_or_path", model, "--output_dir", str(folder), *FAST, *extra]


def compared(argv):
    return run_comparison(*parse_compare(argv))


def script(argv):
    return Forked(run_file, str(ROOT / "scripts" / "compare.py"), argv, environment=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def workers(folder):
    """The processes of cells under a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (
            any(str(folder) in word for word in process.info["cmdline"] or [])
            and "hf_ls.compare.worker" in process.info["cmdline"]
        ):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A comparison that was killed (SIGKILL) once one cell was finished, and then run again."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    table = folder.parent / "other.csv"
    table.write_text("text,label\nquite good stuff indeed,positive\nawful dreadful nonsense,negative\nit is a table,neutral\n")
    argv = arguments(tiny, folder, *GRID, "--flip_labels", "0.25", "--ood_sources", "nytEditorialSnippets", "--ood_file", f"other={table}",
                     "--ood_samples", "40")  # fmt: skip
    parent = script(argv)
    assert wait_for(lambda: list(folder.glob(f"cells/*/{CELL}")) or parent.poll() is not None), "no cell was finished in time"
    assert wait_for(lambda: workers(folder) or parent.poll() is not None)
    assert parent.poll() is None, parent.communicate()[0]
    with pytest.raises(ValueError, match="held by another process; wait for the other comparison"):
        compared(argv)
    children = workers(folder)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert children and not survivors(children, 20), "cells outlived the killed parent"
    kept = {path: path.read_bytes() for path in folder.glob(f"cells/*/{CELL}")}
    comparison = compared(argv)
    return folder, argv, comparison, kept


def test_finished_cells_are_kept_and_the_others_start_again(done):
    folder, _, _, kept = done
    assert 1 <= len(kept) < 4
    assert all(path.read_bytes() == before for path, before in kept.items())
    assert sorted(path.parent.name for path in folder.glob(f"cells/*/{CELL}")) == [
        "baseline-seed0", "baseline-seed1", "smoothed-0.2-seed0", "smoothed-0.2-seed1"]  # fmt: skip
    for name in ("predictions.npz", "ood.npz", "outcome.json", "log.txt", "fingerprint.json"):
        assert len(list(folder.glob(f"cells/*/{name}"))) == 4, name


def test_the_comparison_holds_every_variant_set_and_seed(done):
    folder, _, comparison, _ = done
    assert comparison == Comparison.from_json((folder / "report.json").read_text())
    assert set(comparison.variants) == {
        Variant(n, e, t) for n, e in (("baseline", 0.0), ("smoothed", 0.2)) for t in (False, True)
    }
    assert comparison.seeds == [0, 1]
    assert comparison.sets == {"test": 90, "nytEditorialSnippets": 40, "other": 3}
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    pictures = {path.name for path in (folder / "pictures").iterdir()}
    assert {"penultimate.png", "logit_gap.png"} <= pictures and page.count("data:image/png") == len(pictures)


def test_the_numbers_are_those_of_the_cells(done):
    folder, _, comparison, _ = done
    for epsilon, name in ((0.0, "baseline"), (0.2, "smoothed-0.2")):
        for i, seed in enumerate((0, 1)):
            cell = folder / "cells" / f"{name}-seed{seed}"
            metrics = json.loads((cell / "all_results.json").read_text())
            variant = Variant(name.split("-")[0], epsilon, False)
            assert comparison.measurement(variant, "nll").per_seed[i] == pytest.approx(metrics["test_nll"], abs=1e-9)
            assert comparison.measurement(variant, "accuracy").per_seed[i] == pytest.approx(metrics["test_accuracy"], abs=1e-9)
            assert comparison.validation_nll[variant.label][i] == pytest.approx(metrics["eval_nll"], abs=1e-9)
            with np.load(cell / "predictions.npz") as saved:
                fitted = fit_temperature(saved["logits_validation"], saved["labels_validation"])
            assert comparison.temperatures[Variant(variant.name, epsilon, True).label][i] == pytest.approx(fitted)


def test_cells_of_a_seed_agree_and_seeds_differ(done):
    folder, _, _, _ = done
    prints = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("cells/*/fingerprint.json")}
    assert prints["baseline-seed0"] == prints["smoothed-0.2-seed0"]
    assert prints["baseline-seed1"] == prints["smoothed-0.2-seed1"]
    assert prints["baseline-seed0"]["inputs"] != prints["baseline-seed1"]["inputs"]
    assert prints["baseline-seed0"]["weights"] != prints["baseline-seed1"]["weights"]  # a new classifier for each seed
    assert prints["baseline-seed0"]["steps"] == 6


def test_the_data_are_flipped_in_train_alone_and_keep_the_source_out(done):
    folder, _, _, _ = done
    sources = [s for s in sorted(set(load_snippets().splits["train"]["source"])) if s != "nytEditorialSnippets"]
    clean = load_snippets(sources).splits
    tables = {
        path.stem: load_dataset("parquet", data_files=str(path), split="train") for path in (folder / "data").glob("*.parquet")
    }
    assert set(tables) == {"train-seed0", "train-seed1", "validation", "test", "ood-nytEditorialSnippets", "ood-other"}
    for split, n in (("validation", 80), ("test", 90)):
        assert tables[split]["label"][:] == clean[split]["label"][:n]
    for seed in (0, 1):
        assert tables[f"train-seed{seed}"]["text"][:] == clean["train"]["text"][:96]
        assert np.sum(np.array(tables[f"train-seed{seed}"]["label"]) != np.array(clean["train"]["label"][:96])) == 24
    assert tables["train-seed0"]["label"][:] != tables["train-seed1"]["label"][:]
    assert tables["ood-other"]["label"][:] == [2, 0, 1]
    assert not {t.lower() for t in tables["ood-nytEditorialSnippets"]["text"]} & {
        t.lower() for part in clean.values() for t in part["text"]
    }


def test_a_finished_comparison_runs_nothing_again(done, capsys):
    """Settings in another order, or which decide nothing, are the same ones."""
    folder, argv, comparison, _ = done
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/*")}
    assert compared([*argv[2:], *argv[:2], "--jobs", "1", "--log_level", "error"]) == comparison
    assert {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/*")} == before
    assert "4 of 4 cells are finished already" in capsys.readouterr().out


def test_other_settings_in_the_folder_are_refused(done):
    _, argv, _, _ = done
    for change in (["--weight_decay", "0.1"], ["--flip_labels", "0.1"]):
        with pytest.raises(ValueError, match=f"expected the settings of the comparison in .* {change[0][2:]}: .* then, .* now"):
            compared([*argv, *change])


def test_a_failed_cell_ends_with_its_log_and_folder(done, tmp_path):
    folder, _, _, _ = done
    spec = Spec.from_json((folder / "cells" / "baseline-seed0" / "spec.json").read_text())
    broken = Spec(spec.cell, [*spec.argv, "--optim", "no_such_optimizer"], spec.data, spec.columns, spec.ood)
    with pytest.raises(CellFailed) as error:
        run_cells([broken], tmp_path, jobs=1, threads=1)
    assert re.match(r"expected .*no_such_optimizer.*\nbaseline-seed0 failed", str(error.value))  # a sentence, no log
    assert str(error.value).endswith(
        f"baseline-seed0 failed; its folder is {tmp_path / 'baseline-seed0'}, finished cells are kept"
    )
    assert finished(tmp_path / "baseline-seed0", broken) is None


@pytest.mark.slow
def test_an_interrupt_leaves_no_process(tiny, tmp_path):
    parent = script(arguments(tiny, tmp_path / "out", *GRID))
    assert wait_for(lambda: len(workers(tmp_path)) == 2 or parent.poll() is not None)
    children = workers(tmp_path)
    os.kill(parent.pid, signal.SIGINT)
    output, _ = parent.communicate(timeout=60)
    assert parent.returncode == 1 and "stopped; the same line goes on" in output, output
    assert len(children) == 2
    assert not survivors(children, 20)


def test_a_cell_waits_for_a_dying_one_in_its_folder(tmp_path):
    """A cell holds its lock while it lives, and a second comparison does not write beside it."""
    held = f"import time; from pathlib import Path; from hf_ls.compare.cells import cell_lock\nwith cell_lock(Path({str(tmp_path / 'cell')!r})): print('held', flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", held], env=environment, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    lock = tmp_path / ".cell.lock"
    with pytest.raises(ValueError, match="held by another process; wait"), locked(lock, "wait"):
        pass
    child.kill()
    child.communicate()
    with locked(lock, "wait"), pytest.raises(ValueError, match="held by another process; end"), locked(lock, "end", patience=0.1):
        pass


@pytest.mark.parametrize("cell", [Cell("baseline", "smoothed_ce", None, 0.0, 0), Cell("focal", "focal", '{"gamma": 3}', 0.0, 0)])
def test_a_cell_without_smoothing_has_none_in_any_step(cell, tmp_path):
    """Whatever the shared settings say of a schedule, which holds for the smoothed cells."""
    shared = ["--dataset_name", "snippets", "--use_cpu", "true", "--report_to", "none", "--label_smoothing_schedule", "linear",
              "--label_smoothing_final_factor", "0.4", "--label_smoothing_warmup_steps", "3"]  # fmt: skip
    base = parse_config(shared)
    spec = Spec(cell, shared, {"train": "a.csv", "validation": "b.csv", "test": "c.csv"}, {}, {})
    found = cell_config(base, spec, tmp_path).training
    assert str(smoothing_of(found)) == str(Smoothing(0.0)) and found.label_smoothing_objective == cell.objective
    assert run_name(found) == ("baseline" if cell.variant == "baseline" else "focal")
    smoothed = cell_config(base, replace(spec, cell=Cell("smoothed", "smoothed_ce", None, 0.1, 0)), tmp_path).training
    assert smoothing_of(smoothed).schedule is not None and run_name(smoothed) == "smoothed"


CELLS = [Cell("baseline", "smoothed_ce", None, 0.0, 0), Cell("smoothed", "smoothed_ce", None, 0.1, 0)]


@pytest.mark.parametrize("name", ["weights", "inputs", "batches", "steps", "threads", "device"])
def test_cells_which_differ_in_more_than_their_loss_are_refused(name):
    left = {"fingerprint": {"weights": "a", "inputs": "b", "batches": 8, "steps": 4}, "device": "cpu", "threads": 1}
    other = json.loads(json.dumps(left))
    check_fingerprints(dict(zip(CELLS, (left, other), strict=True)))
    (other["fingerprint"] if name in other["fingerprint"] else other)[name] = "another"
    with pytest.raises(ValueError, match=f"same {name} in baseline-seed0 and smoothed-0.1-seed0, got .* and another"):
        check_fingerprints(dict(zip(CELLS, (left, other), strict=True)))


def test_the_cells_are_the_grid_and_the_objectives(tiny, tmp_path):
    options, _, rest = parse_compare(
        arguments(tiny, tmp_path, "--epsilons", "0.1", "--objectives", "maxsup", 'focal={"gamma": 3}')
    )
    assert [cell.name for cell in plan(options, 7)] == [
        "baseline-seed7",
        "smoothed-0.1-seed7",
        "maxsup-seed7",
        "focal-gamma-3-seed7",
    ]
    assert plan(options, 7)[3] == Cell("focal gamma=3", "focal", '{"gamma": 3}', 0.0, 7)
    assert "--epsilons" not in rest and "--learning_rate" in rest


@pytest.mark.parametrize("joined", [False, True])
def test_cells_read_a_copy_of_the_config_file(tmp_path, joined):
    (tmp_path / "own.yaml").write_text("seed: 3\n")
    given = [f"--config={tmp_path}/own.yaml"] if joined else ["--config", f"{tmp_path}/own.yaml"]
    frozen = _with_frozen_config(["--max_length", "4", *given, "--seed", "1"], tmp_path / "out")
    assert frozen == ["--max_length", "4", f"--config={tmp_path}/out/config.yaml", "--seed", "1"]
    assert (tmp_path / "out" / "config.yaml").read_text() == "seed: 3\n"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--epsilons", "0", "1"], "different epsilons in"),
        (["--epsilons", "0"], "the baseline alone"),
        (["--seeds", "1", "1"], "different seeds"),
        (["--flip_labels", "1"], "flip_labels < 1"),
        (["--ood_file", "nothing"], "name=path.csv"),
        (["--ood_file", "test=x.csv"], "those of the splits"),
        (["--early_stopping_patience", "2", "--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "epoch"],
         "no early_stopping_patience, got one: runs would differ"),
        (["--resume_from_checkpoint", "last"], "finished runs in output_dir are always kept"),
        (["--label_smoothing_objective", "focal"], "objectives in --objectives"),
        (["--mixup_alpha", "0.2"], "the baseline would be trained with it too"),
        (["--task", "token-classification", "--dataset_name", "x", "--flip_labels", "0.1"], "flip_labels only with task text-class"),
        (["--task", "causal-lm", "--dataset_name", "cmudict", "--ood_sources", "tweets"], "ood_sources only with task text-class"),
        (["--task", "causal-lm", "--dataset_name", "cmudict", "--repetitions", "50"], "repetitions only with task text-class"),
        (["--print_cells", "--epsilon", "auto"], "epsilon grid with --print_cells, got auto"),
        (["--sedes", "1"], "expected known settings, got --sedes"),
        (["--jobs", "many"], "--jobs"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(tiny, tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        parse_compare(arguments(tiny, tmp_path, *extra))


@pytest.mark.parametrize("extra", [["--objectives", "focal", "--label_smoothing_factor", "0"], ["--objectives", "no_such"]])
def test_a_dry_run_checks_every_cell_and_trains_none(tiny, tmp_path, capsys, extra):
    argv = arguments(tiny, tmp_path / "out", *GRID, *extra, "--dry_run")
    if "no_such" in extra:
        with pytest.raises(ValueError, match="no_such"):
            compared(argv)
    else:
        assert compared(argv) is None
        said = capsys.readouterr().out
        assert "dry run: 6 runs; " in said and "96 train" in said and "BertForSequenceClassification" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [
    ["--lr_scheduler_kwargs", '{"none_such": 1}'], ["--lr_scheduler_type", "cosine_with_min_lr"], ["--model_name_or_path", "no/such"],
    ["--objectives", "maxsup", "--label_smoothing_prior", "train"],
], ids=lambda words: words[0])  # fmt: skip
def test_a_dry_run_finds_what_would_end_a_cell_before_its_first_step(tiny, tmp_path, words):
    with pytest.raises(ValueError, match=r"^expected ") as found:
        compared(arguments(tiny, tmp_path / "out", *GRID, "--dry_run", *words))
    assert one_sentence(found.value)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_the_folder_of_another_comparison(done, tiny):
    folder, argv, _, _ = done
    before = sorted(folder.rglob("*"))
    assert compared([*argv, "--dry_run"]) is None
    with pytest.raises(ValueError, match=r"expected the settings of the comparison in .* weight_decay: .* then, .* now"):
        compared([*argv, "--weight_decay", "0.1", "--dry_run"])
    assert sorted(folder.rglob("*")) == before


def test_a_dry_run_does_not_settle_the_settings(tiny, tmp_path):
    for epsilon in ("0.1", "0.2"):
        assert compared(arguments(tiny, tmp_path, "--epsilons", epsilon, "--dry_run")) is None


def test_flipping_moves_exactly_the_share_to_other_classes():
    clean = Dataset.from_dict({"text": [str(i) for i in range(3000)], "label": [i % 3 for i in range(3000)]})
    noisy = flip(clean, 0.2, 3, seed=4)
    old, new = np.array(clean["label"]), np.array(noisy["label"])
    assert np.sum(old != new) == 600 and set(new.tolist()) == {0, 1, 2}
    moves = [np.sum((old == a) & (new == b)) for a in range(3) for b in range(3) if a != b]
    assert min(moves) > 70  # 100 expected of each
    assert flip(clean, 0.2, 3, seed=4)["label"][:] == noisy["label"][:] != flip(clean, 0.2, 3, seed=5)["label"][:]
    assert flip(clean, 0.0, 3, seed=4)["label"][:] == clean["label"][:]


def test_out_of_domain_files_with_unknown_labels_or_columns_are_refused(tiny, tmp_path):
    _, config, _ = parse_compare(arguments(tiny, tmp_path))
    for text, message in (("text,label\na,great\n", "labels among .*'great'"), ("words,label\na,0\n", r"no \['text'\]")):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            prepare_data(config, tmp_path / "data", [0], ood_files={"x": str(tmp_path / "x.csv")})
    for label in ("1", " Neutral "):  # an id, and the name as training itself would read it
        (tmp_path / "x.csv").write_text(f"text,label\na new text,{label}\n")
        data = prepare_data(config, tmp_path / "data", [0], ood_files={"x": str(tmp_path / "x.csv")})
        assert load_dataset("parquet", data_files=str(data.ood["x"]), split="train")["label"][:] == [1]
    with pytest.raises(ValueError, match="some, not all, of the sources"):
        prepare_data(config, tmp_path / "data", [0], ood_sources=["times"])


@pytest.mark.slow
def test_the_search_runs_no_second_seed_of_what_the_first_dropped(tiny, tmp_path, monkeypatch):
    asked = []

    def drop(found):
        asked.append({epsilon: [cell.cell.seed for cell in cells] for epsilon, cells in found.items()})
        return {0.9: (0.4, 0.3)}

    monkeypatch.setattr("hf_ls.compare.experiment.clearly_worse", drop)
    argv = arguments(tiny, tmp_path, "--epsilon", "auto", "--epsilons", "0.05", "0.9", "--seeds", "0", "1", "--repetitions", "20")
    comparison = compared([*argv, "--objectives", "maxsup", "--jobs", "2"])
    assert asked == [{0.0: [0], 0.05: [0], 0.9: [0]}]  # after the first seed, not after the last, and of smoothing alone
    assert {(variant.name, variant.epsilon) for variant in comparison.variants} == {
        ("baseline", 0),
        ("smoothed", 0.05),
        ("maxsup", 0),
    }
    cells = {path.parent.name for path in tmp_path.glob(f"cells/*/{CELL}")}
    assert "smoothed-0.9-seed0" in cells and "smoothed-0.9-seed1" not in cells and len(cells) == 7
    assert (
        "ε=0.9 was dropped after seed 0: its validation NLL is 0.400 nats above the best"
        in (tmp_path / "report.html").read_text()
    )
