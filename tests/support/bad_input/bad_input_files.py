"""Rows of the bad-input matrix about files: configs, data, checkpoints, output folders."""

from __future__ import annotations

import json
import os
import shutil

from bad_input import CSV, DEV, OTHER, Call, Place, Row, files, finetune

from hf_ls.run.checkpoint import MARK

LONG = json.dumps([{"text": text, "label": i % 2} for i, text in enumerate(["w1", "w2", "w" * 10_000_001] + ["w3"] * 3)])
JSONL = "".join(json.dumps({"text": f"w{i} w2", "label": i % 2}) + "\n" for i in range(10, 30))


def _yaml(text: str) -> dict[str, Call]:
    return {"given": files(c_yaml=text), "call": finetune("--config", "c.yaml")}


def _with(*argv: str, **content: str | bytes) -> dict[str, Call]:
    """A run of scripts/finetune.py with these files, and arguments which name them."""
    return {"given": files(**content), "call": finetune(*argv)}


def _column(rows: int, *lines: str) -> str:
    return "text,label\n" + "\n".join(lines * rows) + "\n"


CONFIGS = [
    Row("config: key with a typo", sentence=r"known settings in c\.yaml, got 'label_smothing_factor' \(did you mean 'label_smoothing_factor'\?\)", **_yaml("label_smothing_factor: 0.1")),
    Row("config: unknown key", sentence=r"known settings in c\.yaml, got 'wandb_token'", **_yaml("wandb_token: a")),
    Row("config: repeated key", sentence=r"each setting once in c\.yaml, got 'seed' twice; remove one", **_yaml("seed: 1\nseed: 2")),
    Row("config: Python tag", sentence=r"plain values in c\.yaml, got the tag tag:yaml\.org,2002:python/object/apply:os\.system", **_yaml("seed: !!python/object/apply:os.system ['touch owned']")),
    Row("config: own tag", sentence=r"plain values in c\.yaml, got the tag !env", **_yaml("seed: !env SEED")),
    Row("config: nested list", sentence=r"a list of plain values in c\.yaml at 'text_metrics'", **_yaml("text_metrics: [[chrf]]")),
    Row("config: a list", sentence=r"`name: value` lines in c\.yaml", **_yaml("- seed")),
    Row("config: broken YAML", sentence=r"valid YAML in c\.yaml, got: while", **_yaml("seed: [1")),
    Row("config: not UTF-8", sentence=r"valid YAML in c\.yaml, got: .*codec can't decode", given=files(c_yaml=b"seed: \xff\xfe"), call=finetune("--config", "c.yaml")),
    Row("config: missing file", finetune("--config", "c.yaml"), r"a config file, got no file at c\.yaml"),
    Row("config: a folder", finetune("--config", "."), r"a config file, got \.: Is a directory"),
    Row("config: word for a number", sentence=r"got: argument --seed: invalid int value: 'one'", **_yaml("seed: one")),
    Row("config: number for a flag", sentence=r"--bf16.*got|got: .*--bf16", **_yaml("bf16: 3")),
    Row("config: unknown task", sentence=r"got: argument --task: invalid choice: 'question-answering'", **_yaml("task: question-answering")),
    Row("config: unknown strategy", sentence=r"got.*'sometimes'", **_yaml("save_strategy: sometimes")),
    Row("config: unknown scheduler", sentence=r"got.*'expo'", **_yaml("lr_scheduler_type: expo")),
    Row("config: overrides are no mapping", sentence=r"model_config_overrides as a mapping, got \[1\]", **_yaml("model_config_overrides: [1]\n".replace("[1]", "'[1]'"))),
    Row("config: unknown override", sentence=r"got.*num_hiden_layers", **_yaml("model_config_overrides: {num_hiden_layers: 3}")),
    Row("settings: typo on the command line", finetune("--label_smoothing", "0.1"), r"known settings, got --label_smoothing \(did you mean"),
    Row("settings: value missing", finetune("--seed"), r"got: argument --seed: expected one argument"),
    Row("settings: resume from True", finetune("--resume_from_checkpoint", "True"), r"'last' or a checkpoint folder, got 'True'; use last"),
    Row("settings: selection on test", finetune("--metric_for_best_model", "test_nll"), r"metric_for_best_model on validation, got 'test_nll'"),
    Row("settings: baseline of the baseline", finetune("--with_baseline"), r"label_smoothing_factor > 0 with with_baseline, got 0"),
    Row("settings: patience without a best model", finetune("--early_stopping_patience", "2"), r"load_best_model_at_end with early_stopping_patience, got False"),
    Row("settings: temperature without a teacher", finetune("--distillation_temperature", "3"), r"distillation_teacher with distillation_temperature, got none"),
    Row("settings: of another task", finetune("--text_metrics", "bleu"), r"text_metrics only with task seq2seq, got task text-classification"),
    Row("settings: length 0", finetune("--max_length", "0"), r"max_length >= 1, got 0"),
    Row("settings: nothing to do", finetune("--do_train", "false", "--do_eval", "false"), r"do_train, do_eval or do_predict, got none of them"),
    Row("settings: no data", finetune(train=None), r"either dataset_name or train_file, got None and \{\}"),
    Row("settings: two kinds of data", finetune("--dataset_name", "snippets"), r"either dataset_name or train_file, got snippets and"),
    Row("settings: unknown source", finetune("--dataset_name", "snippets", "--snippet_sources", "books", train=None), r"snippet sources among .*, got \['books'\]"),
]  # fmt: skip

DATA = [
    Row("data: missing file", finetune(), r"existing files, got \['train\.csv'\]; check the paths"),
    Row("data: empty file", sentence=r"rows in \['train\.csv'\], got: empty files", **_with(train_csv="")),
    Row("data: header alone", sentence=r"got: a file without a row; check the files", **_with(train_csv="text,label\n")),
    Row("data: one row", sentence=r"got 1 in train", **_with(train_csv="text,label\nw1,good\n")),
    Row("data: missing column", sentence=r"columns \['text', 'label'\] in train, got \['sentence', 'label'\]", **_with("--text_column", "text", train_csv=CSV.replace("text,", "sentence,"))),
    Row("data: missing column in test", sentence=r"rows in \['test\.csv', 'train\.csv'\], got: .*2 new columns.*; give all files the same columns", **_with("--test_file", "test.csv", test_csv="a,b\n1,2\n")),
    Row("data: one class", sentence=r"at least 2 classes in train, got \['good'\]", **_with(train_csv=_column(9, "w1 w2,good"))),
    Row("data: class of test not in train", sentence=r"only labels seen in train, got \['ugly'\] in test", **_with("--test_file", "test.csv", test_csv=OTHER + "w7,ugly\n")),
    Row("data: labels are real numbers", sentence=r"class labels, got floating-point numbers \(regression\)", **_with(train_csv=_column(9, "w1,0.5", "w2,1.5"))),
    Row("data: label missing in a row", sentence=r"a label in every row, got missing labels in train", **_with(train_csv=CSV + "w8,\n")),
    Row("data: text missing in a row", sentence=r"text in every row of train, got 1 empty", **_with(train_csv=CSV + ",good\n")),
    Row("data: texts are numbers", sentence=r"text in column 'text' of train, got", **_with(train_csv=_column(9, "1,good", "2,bad"))),
    Row("data: labels are lists", sentence=r"got .*List", **_with("--train_file", "train.jsonl", train_jsonl="".join(json.dumps({"text": f"w{i}", "label": [i % 2]}) + "\n" for i in range(9)))),
    Row("data: a number for a row", sentence=r"rows such as .* in train\.jsonl, got 3 in line 1; delete that line", given=files(train_jsonl="3\n" + JSONL), call=finetune("--train_file", "train.jsonl")),
    Row("data: malformed JSON", sentence=r"rows in \['train\.jsonl'\], got: .*; check the files", given=files(train_jsonl=JSONL + '{"text": "w1", "lab'), call=finetune("--train_file", "train.jsonl")),
    Row("data: JSON of another shape", sentence=r"got", given=files(train_json='"text"'), call=finetune("--train_file", "train.json")),
    Row("data: ragged CSV", sentence=r"rows in \['train\.csv'\], got: .*; check the files", **_with(train_csv=CSV + "w1,good,and,more\n")),
    Row("data: not UTF-8", sentence=r"rows in \['train\.csv'\], got: .*codec can't decode.*; check the files", **_with(train_csv=CSV.encode() + b"\xff\xfe,good\n")),
    Row("data: not Parquet", sentence=r"rows in \['train\.parquet'\], got: .*; check the files", given=files(train_parquet=CSV), call=finetune("--train_file", "train.parquet")),
    Row("data: a line of 1 GB", sentence=r"lines of at most 10,000,000 bytes in train\.csv, got a longer one", given=lambda p: (files()(p), os.truncate(p.folder / "train.csv", 2**30)), call=finetune()),
    Row("data: a text of 10 MB", sentence=r"texts of at most 10,000,000 bytes, got one of 10,000,001 in train, which begins 'www", given=files(train_json=LONG), call=finetune("--train_file", "train.json")),
    Row("data: unknown type", sentence=r"files of one type among .*, got \['train\.txt'\]", given=files(train_txt=CSV), call=finetune("--train_file", "train.txt")),
    Row("data: mixed types", sentence=r"files of one type among .*, got \['test\.jsonl', 'train\.csv'\]", **_with("--test_file", "test.jsonl", test_jsonl=JSONL)),
    Row("data: the same file twice", sentence=r"different files per split, got", **_with("--test_file", "./train.csv")),
    Row("data: test in other words", sentence=r"a validation split apart from test, got 24 of 24", **_with("--validation_file", "validation.csv", "--test_file", "test.csv", validation_csv=DEV, test_csv=DEV)),
    Row("data: test without train", finetune("--test_file", "test.csv", train=None), r"train_file, got only \['test'\]"),
    Row("data: sequences without a target", sentence=r"columns \['source', 'target'\] in train, got", given=files(), call=finetune("--task", "seq2seq")),
    Row("data: more tags than words", sentence=r"one tag per word, got 1 words and 2 tags", given=files(train_jsonl='{"tokens": ["w1"], "ner_tags": ["A", "B"]}\n' * 9), call=finetune("--task", "token-classification", "--train_file", "train.jsonl")),
    Row("data: a folder", sentence=r"existing files, got \['train\.csv'\]", given=lambda p: (p.folder / "train.csv").mkdir(), call=finetune()),
]  # fmt: skip

MODELS = [
    Row("model: missing folder", sentence=r"a tokenizer ./nowhere on the Hub or in a folder, got: .*; check model_name_or_path", **_with("--model_name_or_path", "./nowhere")),
    Row("model: other classes", sentence=r"got.*size.*ignore_mismatched_sizes", given=files(), call=finetune(model="five")),
    Row("model: weights cut short", sentence=r"got", given=lambda p: (files()(p), _model(p, cut=True)), call=finetune("--model_name_or_path", "model")),
    Row("model: pickle instead of safetensors", sentence=r"got", given=lambda p: (files()(p), _model(p, pickle=True)), call=finetune("--model_name_or_path", "model")),
    Row("model: config is no JSON", sentence=r"got", given=lambda p: (files()(p), _model(p, config="{")), call=finetune("--model_name_or_path", "model")),
    Row("model: unknown architecture", sentence=r"got", given=lambda p: (files()(p), _model(p, config='{"model_type": "brt"}')), call=finetune("--model_name_or_path", "model")),
    Row("model: no tokenizer", sentence=r"got", given=lambda p: (files()(p), _model(p, tokenizer=False)), call=finetune("--model_name_or_path", "model")),
    Row("model: remote code", sentence=r"got.*trust_remote_code", given=lambda p: (files()(p), _model(p, config=json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForSequenceClassification": "mine.M"}}))), call=finetune("--model_name_or_path", "model")),
]  # fmt: skip


def _model(place: Place, *, cut: bool = False, pickle: bool = False, config: str | None = None, tokenizer: bool = True) -> None:
    folder = place.folder / "model"
    shutil.copytree(place.models["good"], folder)
    weights = folder / "model.safetensors"
    if cut:
        weights.write_bytes(weights.read_bytes()[:-1000])
    if pickle:
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    if config is not None:
        (folder / "config.json").write_text(config)
    if not tokenizer:
        for path in folder.glob("tokenizer*"):
            path.unlink()


def _earlier(place: Place, mark: str | None = None, **changes: str) -> None:
    """A run of two steps with ε = 0.1 and a checkpoint, as it was left after the first."""
    files()(place)
    shutil.copytree(place.models["run"], place.folder / "out")
    checkpoint = place.folder / "out" / "checkpoint-1"
    if mark is not None:
        (checkpoint / MARK).write_text(mark)
    for name, what in changes.items():
        stem, _, suffix = name.rpartition("_")
        path = checkpoint / f"{stem}.{suffix}"
        if what == "remove":
            path.unlink()
        elif what == "cut":
            path.write_bytes(path.read_bytes()[:-100])


def _resumed(*argv: str, checkpoint: str = "last", **changes: str | None) -> dict[str, Call]:
    argv = ("--label_smoothing_factor", "0.1", "--max_steps", "2", "--resume_from_checkpoint", checkpoint, *argv)
    return {"given": lambda place: _earlier(place, **changes), "call": finetune(*argv)}  # type: ignore[arg-type]


CHECKPOINTS = [
    Row("output: an earlier run", sentence=r"an output_dir without an earlier run, got out/checkpoint-1; use --resume", given=_earlier, call=finetune()),
    Row("output: other settings", sentence=r"the settings of the run in out, got learning_rate: 0\.001 then, 0\.01 now", **_resumed("--learning_rate", "1e-2")),
    Row("output: overwritten by a model which cannot be", sentence=r"got.*size.*ignore_mismatched_sizes", given=_earlier, call=finetune("--overwrite_output_dir", model="five")),
    Row("output: overwritten with the data in it", sentence=r"a folder of a run alone to delete, got out with out/train\.csv in it", given=lambda p: (_earlier(p), (p.folder / "train.csv").rename(p.folder / "out" / "train.csv")), call=finetune("--overwrite_output_dir", train="out/train.csv")),
    Row("output: overwritten where somebody works", sentence=r"a folder of a run alone to delete, got \. with ", given=lambda p: (_earlier(p), shutil.move(p.folder / "out" / "settings.json", p.folder / "settings.json")), call=finetune("--overwrite_output_dir", "--output_dir", ".")),
    Row("output: a card written by hand", sentence=r"out/README\.md to be absent or generated, got one written by hand; move it away", given=lambda p: (files()(p), (p.folder / "out").mkdir(), (p.folder / "out" / "README.md").write_text("# Mine")), call=finetune()),
    Row("output: settings are no JSON", sentence=r"JSON.*settings\.json.*got", given=lambda p: (_earlier(p), (p.folder / "out" / "settings.json").write_text("{")), call=_resumed()["call"]),
    Row("checkpoint: another epsilon", sentence=r"got label_smoothing_factor: 0\.1 then, 0\.2 now", **_resumed("--label_smoothing_factor", "0.2")),
    Row("checkpoint: another epsilon, by its folder", sentence=r"the settings of checkpoint-1, got epsilon 0\.1 there and 0\.2 here", given=lambda p: (_earlier(p), (p.folder / "out" / "checkpoint-1").rename(p.folder / "checkpoint-1"), shutil.rmtree(p.folder / "out")), call=finetune("--label_smoothing_factor", "0.2", "--resume_from_checkpoint", "checkpoint-1")),
    Row("checkpoint: another number of processes", sentence=r"got num_processes 2 there and 1 here", **_resumed(mark='{"num_processes": 2, "epsilon": 0.1, "convention": "all"}')),
    Row("checkpoint: mark is no JSON", sentence=r"a whole JSON file at .*hf_ls_complete\.json, got: .*; resume from an earlier", **_resumed(mark="{")),
    Row("checkpoint: mark is a list", sentence=r"a JSON mapping at .*hf_ls_complete\.json, got list", **_resumed(mark="[]")),
    Row("checkpoint: not marked", sentence=r"a complete checkpoint, got out/checkpoint-1 without hf_ls_complete\.json", **_resumed(checkpoint="out/checkpoint-1", hf_ls_complete_json="remove")),
    Row("checkpoint: weights cut short", sentence=r"got.*model\.safetensors", **_resumed(model_safetensors="cut")),
    Row("checkpoint: optimizer missing", sentence=r"got.*optimizer\.pt", **_resumed(optimizer_pt="remove")),
    Row("checkpoint: missing folder", sentence=r"a complete checkpoint, got out/checkpoint-9 without", **_resumed(checkpoint="out/checkpoint-9")),
    Row("checkpoint: of another model", sentence=r"got.*hidden_size", given=lambda p: (_earlier(p), shutil.copytree(p.models["other run"], p.folder / "theirs")), call=_resumed(checkpoint="theirs/checkpoint-1")["call"]),
]  # fmt: skip

ROWS = [*CONFIGS, *DATA, *MODELS, *CHECKPOINTS]
