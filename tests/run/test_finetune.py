"""The main job end to end on a tiny model and real text: files, numbers, processes, killed runs."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load_file
from tiny_run import ALL, arguments, script, started

from hf_ls.calibration.temperature import fit_temperature
from hf_ls.common.errors import one_sentence
from hf_ls.losses.smoothing import Smoothing
from hf_ls.report.calibration_report import CalibrationReport
from hf_ls.report.card import model_card
from hf_ls.run.checkpoint import last_complete_checkpoint
from hf_ls.run.config import parse_config
from hf_ls.run.finetune import _planned, finetune
from hf_ls.run.loading import load
from hf_ls.run.outcome import run_name
from hf_ls.trainer.arguments import smoothing_of, techniques_of
from hf_ls.trainer.mixin import LabelSmoothingTrainer


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    argv = arguments(
        tiny,
        folder,
        *ALL,
        "--label_smoothing_factor",
        "0.1",
        "--with_baseline",
        "--num_train_epochs",
        "2",
        "--save_strategy",
        "no",
    )
    return folder, finetune(parse_config(argv))


def test_a_run_leaves_the_files_it_promises(done):
    folder, _ = done
    for name in ("calibration.json", "README.md", "model.safetensors", "train_results.json", "eval_results.json", "test_results.json",
                 "all_results.json", "plots/loss_curve.png", "plots/reliability.png", "plots/confidence.png", "baseline/model.safetensors"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    assert not list(folder.rglob("*.tmp"))


def test_the_rows_are_both_runs_with_and_without_temperature(done):
    folder, report = done
    assert [row.name for row in report.rows] == ["baseline", "baseline + temperature", "smoothed", "smoothed + temperature"]
    assert [row.epsilon for row in report.rows] == [0.0, 0.0, 0.1, 0.1]
    assert CalibrationReport.load(folder / "calibration.json") == report
    assert report.dataset.split == "test"
    assert report.published == "smoothed"
    for row, name in ((0, "baseline"), (2, ".")):
        with np.load(folder / name / "predictions.npz") as saved:
            temperature = fit_temperature(saved["logits_validation"], saved["labels_validation"])
        assert report.rows[row + 1].temperature == temperature != 1
        assert report.rows[row].value("accuracy") == report.rows[row + 1].value("accuracy")


@pytest.mark.parametrize(("sub", "row"), [("baseline", 0), (".", 2)])
def test_the_report_and_the_trainer_agree(done, sub, row):
    folder, report = done
    results = json.loads((folder / sub / "all_results.json").read_text())
    for name in ("nll", "brier", "ece", "accuracy", "signed_gap"):
        assert report.rows[row].value(name) == pytest.approx(results[f"test_{name}"], abs=1e-9)
    assert results["test_loss"] == results["test_nll"]


def test_both_runs_start_from_the_same_weights_and_data(done):
    _, report = done
    first = {name: next(r for r in records if "loss" in r) for name, records in report.history.items()}
    assert first["baseline"]["nll"] == first["smoothed"]["nll"]
    assert first["baseline"]["smoothing_term"] == 0 != first["smoothed"]["smoothing_term"]


def test_the_published_model_is_the_one_measured(done):
    folder, _ = done
    model = tf.AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    assert model.config.problem_type == "single_label_classification"


def test_an_earlier_run_is_not_overwritten(done, tiny):
    folder, _ = done
    before = (folder / "calibration.json").read_bytes()
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        finetune(parse_config(arguments(tiny, folder, *ALL)))
    with pytest.raises(ValueError, match="seed: 3 then, 4 now"):
        finetune(parse_config([*arguments(tiny, folder, *ALL), "--seed", "4", "--resume_from_checkpoint", "last"]))
    assert (folder / "calibration.json").read_bytes() == before


def test_a_finished_run_resumed_gives_the_same_report(done, capsys):
    folder, report = done
    argv = json.loads((folder / "settings.json").read_text())
    again = finetune(
        parse_config(arguments(argv["model_name_or_path"], folder, *ALL, "--label_smoothing_factor", "0.1", "--with_baseline",
                               "--num_train_epochs", "2", "--save_strategy", "no", "--resume_from_checkpoint", "last"))
    )  # fmt: skip
    assert again.rows == report.rows
    assert "is complete" in capsys.readouterr().out


def test_dry_run_checks_and_writes_nothing(tiny, tmp_path, capsys):
    assert finetune(parse_config(arguments(tiny, tmp_path / "out", *ALL, "--dry_run"))) is None
    assert "256 train, 150 validation, 210 test" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "name"), [
    ("", "baseline"), ("--label_smoothing_factor 0.1", "smoothed"), ("--label_smoothing_objective focal", "focal"),
    ("--label_smoothing_schedule linear --label_smoothing_final_factor 0.4", "smoothed"),  # from 0
    ("--label_smoothing_schedule linear --label_smoothing_factor 0.4", "smoothed"),  # to 0
    ("--label_smoothing_schedule cosine --label_smoothing_warmup_steps 5", "baseline"),  # from 0 to 0
    ("--mixup_alpha 0.2", "mixup"), ("--teacher some/model", "distilled"),
])  # fmt: skip
def test_a_run_is_named_by_what_it_does_and_its_baseline_does_nothing(tmp_path, words, name):
    config = parse_config([*arguments("x/y", tmp_path), *words.split()])
    config = replace(config, run=replace(config.run, with_baseline=True))
    baseline, run = _planned(config)
    assert [run_name(one.training) for one in (baseline, run)] == ["baseline", name]
    assert str(smoothing_of(baseline.training)) == str(Smoothing(0.0)) and not techniques_of(baseline.training)
    assert baseline.training.output_dir == str(tmp_path / "baseline") and run.training.output_dir == str(tmp_path)


@pytest.mark.parametrize("words", [
    ["--lr_scheduler_kwargs", '{"none_such": 1}'], ["--optim", "adafactor", "--optim_args", "x"], ["--report_to", "wandbb"],
    ["--lr_scheduler_type", "cosine_with_min_lr"],
], ids=lambda words: words[0])  # fmt: skip
def test_a_dry_run_finds_what_would_end_the_run_before_its_first_step(tiny, tmp_path, words):
    with pytest.raises(ValueError, match=r"^expected ") as found:
        finetune(parse_config(arguments(tiny, tmp_path / "out", *ALL, "--dry_run", *words)))
    assert one_sentence(found.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "said"), [
    ([], "an output_dir without an earlier run"), (["--resume_from_checkpoint", "last", "--weight_decay", "0.1"], "weight_decay"),
    (["--overwrite_output_dir"], r"did not write: notes\.txt"),
], ids=["again", "other settings", "foreign"])  # fmt: skip
@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["run", "dry run"])
def test_a_dry_run_refuses_the_folder_which_the_run_would(done, tiny, tmp_path, change, said, dry):
    folder = shutil.copytree(done[0], tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    argv = arguments(tiny, folder, *ALL, "--label_smoothing_factor", "0.1", "--with_baseline", "--num_train_epochs", "2",
                     "--save_strategy", "no", *dry, *change)  # fmt: skip
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=f"^expected .*{said}"):
        finetune(parse_config(argv))
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("place", ["file", "file/out", "closed/out"])
def test_a_dry_run_refuses_a_place_which_cannot_be_written(tiny, tmp_path, place, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr("hf_ls.run.output.os.access", lambda path, mode: Path(path).name != "closed")  # root may everywhere
    with pytest.raises(OSError) as found:
        finetune(parse_config(arguments(tiny, tmp_path / place, *ALL, "--dry_run")))
    assert re.match(rf"expected to (read or )?write .*{place}, got: ", one_sentence(found.value) or "")


@pytest.mark.parametrize("name", ["settings.json", "outcome.json", "baseline/outcome.json"])
@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: "[]", lambda text: "{}"])
def test_a_damaged_file_of_an_earlier_run_is_one_sentence(done, tiny, tmp_path, name, damage):
    folder = shutil.copytree(done[0], tmp_path / "out")
    (folder / name).write_text(damage((folder / name).read_text()))
    argv = arguments(tiny, folder, *ALL, "--label_smoothing_factor", "0.1", "--with_baseline", "--num_train_epochs", "2",
                     "--save_strategy", "no", "--resume_from_checkpoint", "last")  # fmt: skip
    with pytest.raises(ValueError) as found:
        finetune(parse_config(argv))
    assert (one_sentence(found.value) or "").startswith("expected "), repr(found.value)


def test_baked_temperature_is_in_the_saved_weights(tiny, tmp_path):
    argv = arguments(tiny, tmp_path, *ALL, "--max_steps", "4", "--save_strategy", "no", "--bake_temperature")
    report = finetune(parse_config(argv))
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    trainer = tf.Trainer(
        model=model, args=tf.TrainingArguments(str(tmp_path / "x"), use_cpu=True, report_to=[], disable_tqdm=True)
    )
    from hf_ls.data.classification import load_snippets, tokenise
    from hf_ls.metrics.core import PredictionStatistics

    test = load_snippets().splits["test"].select(range(210))
    tokens = tokenise(tf_dataset(test), tf.AutoTokenizer.from_pretrained(tmp_path), 32)["train"]
    trainer.data_collator = tf.DataCollatorWithPadding(tf.AutoTokenizer.from_pretrained(tmp_path))
    logits = trainer.predict(tokens.remove_columns("labels")).predictions
    assert report.published == "baseline + temperature"
    assert report.rows[1].value("nll") == pytest.approx(
        PredictionStatistics.from_logits(logits, test["label"]).nll.mean(), abs=1e-5
    )


def tf_dataset(part):
    from datasets import DatasetDict

    return DatasetDict(train=part)


def test_lora_trains_adapters_and_the_head(tiny, tmp_path):
    report = finetune(
        parse_config(arguments(tiny, tmp_path, *ALL, "--max_steps", "3", "--save_strategy", "no", "--peft", "lora"))
    )
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert report.training.peft == "lora"


def test_the_push_carries_our_card_and_no_baseline(tiny, tmp_path, monkeypatch):
    pushes = []

    def commit(self, repo_id, operations, **kwargs):
        pushes.append((repo_id, {found.path_in_repo: found for found in operations}))

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: RepoUrl(f"https://huggingface.co/{name}"))
    monkeypatch.setattr(HfApi, "create_commit", commit)
    push = ["--push_to_hub", "--hub_model_id", "me/tiny", "--label_smoothing_factor", "0.1", "--with_baseline"]
    report = finetune(parse_config(arguments(tiny, tmp_path, *ALL, "--max_steps", "2", "--save_strategy", "no", *push)))
    ((repo_id, files),) = pushes
    assert repo_id == report.model_name == "me/tiny"
    assert files["README.md"].path_or_fileobj.decode() == model_card(report)
    assert {"README.md", "calibration.json", "model.safetensors", "tokenizer.json", "plots/reliability.png"} <= set(files)
    private = ("baseline/", "checkpoint", "predictions", "training_args", "settings", "outcome", "penultimate", "hf_ls_")
    assert not {name for name in files if name.startswith(private)}


def test_early_stopping_ends_the_run_and_keeps_the_best_weights(tiny, tmp_path):
    stop = ["--early_stopping_patience", "2", "--load_best_model_at_end", "--metric_for_best_model", "nll", "--learning_rate", "0.3",
            "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "1"]  # fmt: skip
    finetune(parse_config(arguments(tiny, tmp_path, *ALL, "--max_steps", "60", *stop)))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    evaluated = {r["step"]: r["eval_nll"] for r in state["log_history"] if "eval_nll" in r}
    assert state["best_global_step"] == min(evaluated, key=evaluated.get)
    assert state["global_step"] == state["best_global_step"] + 4 < 60
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["eval_nll"] == pytest.approx(min(evaluated.values()), rel=1e-6)


def test_evaluation_only_and_nothing_asked(tiny, tmp_path):
    report = finetune(parse_config(arguments(tiny, tmp_path / "eval", "--do_eval")))
    assert (report.dataset.split, len(report.rows)) == ("validation", 1)
    with pytest.raises(ValueError, match="do_train"):
        finetune(parse_config(arguments(tiny, tmp_path / "none")))


def test_wrong_settings_end_with_one_sentence():
    code, output = script(["--dataset_name", "snippets", "--learning_rat", "1"], check=False)
    assert code == 1
    assert (
        output.strip()
        .splitlines()[-1]
        .startswith("error: expected known settings, got --learning_rat (did you mean 'learning_rate'?)")
    )
    assert "Traceback" not in output


def test_two_processes_take_the_step_of_one(tiny, tmp_path):
    step = ["--do_train", "--max_steps", "1", "--optim", "sgd", "--learning_rate", "1", "--max_grad_norm", "0", "--save_strategy", "no",
            "--label_smoothing_factor", "0.1", "--lr_scheduler_type", "constant",
            "--model_config_overrides", '{"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}']  # fmt: skip
    script(arguments(tiny, tmp_path / "one", *step))
    script([*arguments(tiny, tmp_path / "two", *step), "--per_device_train_batch_size", "8"], processes=2)
    start = load_file(f"{tiny}/model.safetensors")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    gradient, difference = (
        torch.cat([(a[k].double() - b[k].double()).flatten() for k in a]) for a, b in ((start, one), (one, two))
    )
    assert float(difference.norm() / gradient.norm()) < 1e-6
    losses = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][0] for name in ("one", "two")]
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-6)
    assert losses[1]["nll"] == pytest.approx(losses[0]["nll"], rel=1e-6)


def test_two_processes_report_the_numbers_of_one(tiny, tmp_path):
    fixed = ["--do_eval", "--do_predict"]
    script(arguments(tiny, tmp_path / "one", *fixed))
    script(arguments(tiny, tmp_path / "two", *fixed), processes=2)
    for split in ("eval", "test"):
        one, two = (json.loads((tmp_path / name / f"{split}_results.json").read_text()) for name in ("one", "two"))
        for name in ("loss", "nll", "brier", "ece", "accuracy", "signed_gap"):
            assert two[f"{split}_{name}"] == pytest.approx(one[f"{split}_{name}"], abs=1e-9)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes_to_the_same_bits(tiny, tmp_path, processes):
    """SIGKILL in mid-epoch, after some checkpoint but between two: dropout, data order and Adam must all come back."""
    run = [*ALL, "--num_train_epochs", "3", "--save_strategy", "steps", "--save_steps", "5", "--label_smoothing_factor", "0.1",
           "--save_total_limit", "1", "--per_device_train_batch_size", str(16 // processes)]  # fmt: skip
    script(arguments(tiny, tmp_path / "whole", *run), processes)
    killed = tmp_path / "killed"
    members = started(arguments(tiny, killed, *run), processes)
    deadline = time.monotonic() + 200
    while last_complete_checkpoint(killed) is None and time.monotonic() < deadline and members[0].poll() is None:
        time.sleep(0.005)
    for member in members:
        member.kill()
    assert last_complete_checkpoint(killed), "the run ended before its first checkpoint"
    assert not (killed / "calibration.json").exists()
    _, output = script([*arguments(tiny, killed, *run), "--resume_from_checkpoint", "last"], processes)
    assert "resuming from" in output
    assert (killed / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    whole, resumed = (CalibrationReport.load(folder / "calibration.json") for folder in (tmp_path / "whole", killed))
    assert whole.rows == resumed.rows


@pytest.mark.parametrize(
    ("more", "predicted"),
    [
        (["--eval_strategy", "epoch"], ["test"]),
        (["--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end"], ["eval", "test"]),
        (["--eval_strategy", "no"], ["eval", "test"]),
    ],
)
def test_the_weights_of_the_last_epoch_are_not_evaluated_again(tiny, tmp_path, monkeypatch, more, predicted):
    """What was kept of the last evaluation is, row by row, what a fresh forward gives; other weights are evaluated anew."""
    seen, predict = [], LabelSmoothingTrainer.predict

    def noted(self, dataset, *args, metric_key_prefix="test", **kwargs):
        seen.append(metric_key_prefix)
        return predict(self, dataset, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    monkeypatch.setattr(LabelSmoothingTrainer, "predict", noted)
    config = parse_config(arguments(tiny, tmp_path, *ALL, "--num_train_epochs", "2", "--metric_for_best_model", "nll", *more))
    finetune(config)
    assert seen == predicted
    kept = np.load(tmp_path / "predictions.npz")
    rows = load(config).tokens["validation"]
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0].numpy() for row in rows]
    np.testing.assert_allclose(kept["logits_validation"], logits, atol=1e-5)
    np.testing.assert_array_equal(kept["labels_validation"], rows["labels"])
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_nll"] > 0
