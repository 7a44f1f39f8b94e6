"""A file of one's own and an output folder are enough, and what is filled in is said; a dry run shows what would be trained on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from places import ROOT

from hf_ls.run.config import OWN_DATA, parse_config
from hf_ls.run.finetune import finetune


def write_csv(path: Path, header: list[str], rows: list[tuple]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def by_intent(path: Path, classes: int = 77, each: int = 20) -> str:
    """As the intents of a bank: sorted by label."""
    rows = [(f"question {k} {i} " + "long " * (i % 9), f"intent {k:02d}") for k in range(classes) for i in range(each)]
    return write_csv(path, ["utterance", "intent"], rows)


def dry_run(capsys, *argv: str) -> str:
    assert finetune(parse_config([*argv, "--dry_run", "--use_cpu", "true"])) is None
    return capsys.readouterr().out


def test_the_config_file_and_what_stands_for_it_are_the_same():
    written = yaml.safe_load((ROOT / "configs" / "own-data.yaml").read_text(encoding="utf-8"))
    for name in ("train_file", "output_dir", "model_name_or_path", "max_length"):
        del written[name]
    as_written = {name: yaml.safe_load(value) for name, value in OWN_DATA.items()}
    assert written == as_written


def test_a_file_sorted_by_label_is_seen_whole(tmp_path, capsys):
    out = dry_run(capsys, "--train_file", by_intent(tmp_path / "a.csv"), "--output_dir", str(tmp_path / "out"))
    assert "Task: text-classification, guessed" in out and "label_column: 'intent', text_column: 'utterance'" in out
    assert "154 of 1,540 rows of train are held out for it, stratified by label, equal texts together, seed 42" in out
    assert "Rows: 1,247 train, 139 validation, 154 test" in out
    assert "Classes: 77, rows of each" in out and "… 37 more …" in out
    assert "[CLS] question 0 " in out and "[SEP]" in out
    assert not (tmp_path / "out").exists()


def test_a_cap_and_what_is_cut_are_in_the_dry_run(tmp_path, capsys, caplog):
    argv = ["--train_file", by_intent(tmp_path / "a.csv"), "--output_dir", str(tmp_path / "out")]
    out = dry_run(capsys, *argv, "--max_train_samples", "100", "--max_length", "8")
    assert "100 train (a sample of 1,247)" in out
    assert "are used, a random sample, because of max_train_samples" in caplog.text
    assert "of the 77 classes" in caplog.text and "the model cannot learn them" in caplog.text
    (line,) = (line for line in out.splitlines() if line.startswith("Tokens in text of test"))
    share = float(line.split("beyond 8, ")[1].split("%")[0])
    (cut,) = (r.getMessage() for r in caplog.records if r.getMessage().startswith("test: ") and "texts lose" in r.getMessage())
    assert share == pytest.approx(100 * int(cut.split()[1]) / 154, abs=0.06)


def test_none_is_a_class(tmp_path, capsys):
    rows = [(i, f"comment {i}", ("None", "None", "None", "Complaint", "Praise")[i % 5]) for i in range(200)]
    path = write_csv(tmp_path / "a.csv", ["id", "comment", "category"], rows)
    out = dry_run(capsys, "--train_file", path, "--output_dir", str(tmp_path / "out"))
    assert "Classes: 3, rows of each" in out and "\n  None " in out


def test_words_and_tags(tmp_path, capsys):
    rows = [{"words": ["Ann", f"w{i}", "sleeps"], "ner": ["B-PER", "O", "O"]} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = dry_run(capsys, "--train_file", str(tmp_path / "a.jsonl"), "--output_dir", str(tmp_path / "out"))
    assert "Task: token-classification, guessed" in out and "tokens_column: 'words', tags_column: 'ner'" in out
    assert "Classes: 2, words of each" in out and "[CLS] ann/B-PER w/O" in out and "Tokens in words of train" in out


def test_what_is_given_is_not_filled_in(tmp_path):
    path = by_intent(tmp_path / "a.csv", classes=2)
    given = parse_config(["--train_file", path, "--output_dir", "out", "--task", "causal-lm", "--do_train", "--use_cpu", "true"])
    assert given.run.task == "causal-lm" and not given.training.do_predict and not given.notes
    config = parse_config(["--train_file", path, "--output_dir", "out", "--label_smoothing_factor", "0.2", "--use_cpu", "true"])
    assert config.training.label_smoothing_factor == 0.2 and config.run.with_baseline
    assert "label_smoothing_factor" not in config.notes[1]
