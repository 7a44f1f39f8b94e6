"""A file of one's own and an output folder are enough, and what is filled in is said; a dry run shows what would be trained on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from datasets import DatasetDict
from places import ROOT
from sft_rows import conversations, save_chat_model
from tiny_run import save_tiny_model

from hf_ls.run.config import OWN_DATA, parse_config
from hf_ls.run.finetune import finetune
from hf_ls.run.loading import load


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


def rated(path: Path) -> str:
    rows = [
        {"text": f"{('bad', 'meh', 'good')[i % 3]} thing {i}", "votes": {"neg": 5 - i % 3, "pos": 1 + 2 * (i % 3)}}
        for i in range(120)
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def test_raters_are_a_third_row_and_all_rows_are_measured_against_them(tmp_path, capsys):
    tiny = save_tiny_model(tmp_path / "tiny", num_labels=2)
    folder = tmp_path / "out"
    argv = ["--train_file", rated(tmp_path / "a.json"), "--soft_label_columns", "votes", "--output_dir", str(folder)]
    report = finetune(parse_config([*argv, "--model_name_or_path", tiny, "--num_train_epochs", "1", "--use_cpu", "true"]))
    runs = ["baseline", "smoothed", "soft labels"]
    assert list(dict.fromkeys(row.run for row in report.rows)) == runs and report.published == "soft labels"
    assert [row.epsilon for row in report.challengers] == [0.1, 0.0]
    assert report.training.techniques == ["soft labels"]
    assert all({"soft_nll", "soft_brier", "f1_macro"} <= row.metrics.keys() for row in report.rows)
    assert report.difference("soft_nll", report.challengers[1], report.baseline).low is not None
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "soft labels" in card and "soft nll" in card and "Each class:" in card
    assert "Soft labels over 2 classes from votes" in capsys.readouterr().out
    assert (folder / "smoothed" / "outcome.json").is_file() and not (folder / "soft labels").exists()


def test_soft_labels_and_smoothing_at_once_must_be_asked_for(tmp_path):
    argv = [
        "--train_file",
        rated(tmp_path / "a.json"),
        "--soft_label_columns",
        "votes",
        "--output_dir",
        "out",
        "--do_train",
        "--use_cpu",
        "true",
    ]
    with pytest.raises(ValueError, match=r"one technique beside the plain cross entropy, got label smoothing .* and soft labels"):
        parse_config([*argv, "--label_smoothing_factor", "0.1"])
    parse_config([*argv, "--label_smoothing_factor", "0.1", "--allow_combined_softening"])
    parse_config([*argv, "--label_smoothing_factor", "0.1", "--soft_labels", "evaluate"])
    parse_config([*argv, "--metric_for_best_model", "soft_nll"])
    with pytest.raises(ValueError, match="soft_label_columns, which names the data too"):
        parse_config([*argv[:2], *argv[4:], "--label_smoothing_soft_labels"])


@pytest.mark.parametrize(
    ("task", "metric", "greater"),
    [
        *(("text-classification", "f1_macro", True), ("text-classification", "balanced_accuracy", True)),
        *(("token-classification", "entity_f1", True), ("token-classification", "f1_weighted", True)),
        ("text-classification", "nll", False),
    ],
)
def test_scores_by_class_choose_the_best_checkpoint(tmp_path, task, metric, greater):
    argv = ["--train_file", "a.jsonl", "--output_dir", "out", "--task", task, "--do_train", "--use_cpu", "true"]
    more = ["--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "epoch", "--metric_for_best_model", metric]
    assert parse_config([*argv, *more]).training.greater_is_better is greater


def test_rare_classes_weigh_more_in_both_runs(tmp_path):
    from hf_ls.run import training

    rows = [(f"text {i}", "rare" if i % 8 == 0 else "usual") for i in range(80)]
    path = write_csv(tmp_path / "a.csv", ["text", "label"], rows)
    config = parse_config(
        ["--train_file", path, "--output_dir", str(tmp_path / "out"), "--class_weight", "balanced", "--use_cpu", "true"]
    )
    loaded = load(config)
    labels = loaded.tokens["train"]["labels"][:]
    share = [labels.count(k) / len(labels) for k in range(2)]
    trainer = training.make_trainer(training.with_training(config, output_dir=str(tmp_path / "out")), loaded)
    assert trainer.class_weight.tolist() == pytest.approx([1 / (2 * s) for s in share])


def test_conversations_are_enough_too(tmp_path, capsys):
    """Guessed, learnt and measured on the assistant's tokens alone, and the card's code talks with the model."""
    chats, folder = conversations(60), tmp_path / "out"
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    argv = ["--train_file", str(tmp_path / "chats.jsonl"), "--output_dir", str(folder), "--max_steps", "2", "--use_cpu", "true"]
    report = finetune(parse_config([*argv, "--model_name_or_path", save_chat_model(tmp_path / "chat")]))
    out = capsys.readouterr().out
    assert (
        "Task: sft, guessed" in out and "6 of 60 rows of train are held out" in out and "Learnt: what the assistant says" in out
    )
    assert "per_device_train_batch_size: 8" in out and "learning_rate: 2e-5" in out
    assert [row.name for row in report.rows][::2] == ["baseline", "smoothed"]
    # Each answer has from 3 to 6 words and an end; which 6 rows are the test is in no other place.
    tokens = DatasetDict(test=load(parse_config([*argv, "--model_name_or_path", str(tmp_path / "chat")])).data.splits["test"])
    said = sum(len(m["content"].split()) + 1 for row in tokens["test"] for m in row["messages"] if m["role"] == "assistant")
    assert (report.dataset.n, report.dataset.n_sequences) == (said, 6)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "this counts, here and in training: what the assistant says." in card
    code = card.split("```python\n")[1].split("```")[0]
    exec(code.replace('name = "out"', f"name = {str(folder)!r}"), {})
    assert capsys.readouterr().out.strip().endswith("]")


def test_a_model_which_cannot_chat_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, conversations(20))))
    argv = ["--train_file", str(tmp_path / "chats.jsonl"), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    with pytest.raises(ValueError, match=r"a tokenizer with a chat template, got .* without one; .*--chat_template_path"):
        finetune(parse_config(argv))
    assert not (tmp_path / "out").exists()
