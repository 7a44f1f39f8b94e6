"""Evaluation of a model which is already there: labels of model and data, the report, cards, and probabilities of a pipeline."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluate as hf_evaluate
import numpy as np
import pytest
import torch
import transformers as tf
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from helpers import tiny_bert
from huggingface_hub import ModelCard, parse_eval_result_entries
from places import ROOT
from reports import make_report
from small_tokenizer import WORDS, save_tokenizer, texts

import hf_ls
from hf_ls.data.labels import match_labels, permutation_warning
from hf_ls.metrics import ece, nll
from hf_ls.metrics.probabilities import probabilities
from hf_ls.report.calibration_report import EVALUATED, REPORT, CalibrationReport
from hf_ls.report.card_metadata import BENCHMARKS, eval_results
from hf_ls.run.evaluate import EvaluateArguments, evaluate, parse_evaluation, update_card
from hf_ls.run.outcome import PREDICTIONS

NAMES = ("negative", "neutral", "positive")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with random weights, sharp enough to be over-confident."""
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(folder)
    bert = tiny_bert(3, id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
    with torch.no_grad():
        bert.classifier.weight.mul_(400)
    bert.save_pretrained(folder)
    return folder


def logits_of(folder: Path, lines: list[str]) -> np.ndarray:
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    bert = tf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return bert(**tokenizer(lines, padding=True, return_tensors="pt")).logits.double().numpy()


def write_csv(path: Path, lines: list[str], labels: list[Any]) -> str:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(lines, labels, strict=True)])
    return str(path)


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Local files whose labels agree with the model in about two of three rows."""
    folder, made = tmp_path_factory.mktemp("data"), {}
    for seed, (split, n) in enumerate((("validation", 150), ("test", 200))):
        lines = texts(n, seed)
        right = logits_of(model, lines).argmax(1)
        ids = np.where(np.random.default_rng(seed).random(n) < 0.5, right, np.random.default_rng(seed + 9).integers(0, 3, n))
        made[split] = (write_csv(folder / f"{split}.csv", lines, [NAMES[i].upper() for i in ids]), lines, ids)
    return made


def settings(model: Path, files: dict[str, Any], folder: Path, **changes: Any) -> EvaluateArguments:
    fields = {"test_file": files["test"][0], "validation_file": files["validation"][0], "use_cpu": True, "max_length": 32}
    return EvaluateArguments(str(folder), str(model), **(fields | changes))


def test_report_holds_the_numbers_of_the_model_on_the_data(
    model: Path, files: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    report = evaluate(settings(model, files, tmp_path, write_card=True))
    assert report == CalibrationReport.load(tmp_path / REPORT)
    _, lines, ids = files["test"]
    logits = logits_of(model, lines)
    plain, tempered = report.rows
    assert (plain.name, tempered.name) == (EVALUATED, f"{EVALUATED} + temperature") and tempered.temperature > 1.5
    assert plain.value("nll") == pytest.approx(nll(logits, ids), rel=1e-5)
    assert plain.value("accuracy") == pytest.approx((logits.argmax(1) == ids).mean())
    assert tempered.value("nll") < plain.value("nll") and report.dataset.class_counts == np.bincount(ids).tolist()

    found = report.posthoc
    assert found["temperature"]["nll"] == pytest.approx(tempered.value("nll"))
    assert {"vector scaling", "isotonic", "selective score"} < set(found)
    assert (tmp_path / "plots" / "reliability.png").is_file()
    output = capsys.readouterr().out
    assert "Labels were matched by name." in output and "over-confident" in output and "permuted" not in output


def test_rows_are_evaluated_by_length_and_kept_in_the_order_of_the_data(
    model: Path, files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    padding = []
    forward = tf.BertModel.forward
    monkeypatch.setattr(
        tf.BertModel,
        "forward",
        lambda self, *a, **k: padding.append(float((k["attention_mask"] == 0).sum())) or forward(self, *a, **k),
    )
    evaluate(settings(model, files, tmp_path, batch_size=8))
    shuffled = sum(8 * max(sizes) - sum(sizes) for sizes in _batches([len(line.split()) for line in files["test"][1]], 8))
    assert sum(padding) < shuffled / 4
    with np.load(tmp_path / PREDICTIONS) as kept:
        for split, (_, lines, ids) in files.items():
            np.testing.assert_allclose(kept[f"logits_{split}"], logits_of(model, lines), rtol=0, atol=1e-4)
            assert kept[f"labels_{split}"].tolist() == ids.tolist()


def _batches(values: list[int], size: int) -> list[list[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def test_nothing_is_claimed_about_a_training_which_nobody_saw(model: Path, files: dict[str, Any], tmp_path: Path) -> None:
    said = {"license": "mit", "language": ["en", "pt-BR"], "dataset_title": "Notes of 2026"}
    report = evaluate(settings(model, files, tmp_path, write_card=True, **said))
    assert [row.epsilon for row in report.rows] == [None, None] and report.training is None and report.baseline is None
    card = ModelCard.load(tmp_path / "README.md")
    text = card.text
    assert (card.data.license, card.data.language) == ("mit", ["en", "pt-BR"]) and card.data.datasets is None
    assert {(r.dataset_type, r.dataset_name) for r in card.data.eval_results} == {("local", "Notes of 2026")}
    assert "weights beside" not in text and "this folder" not in text
    assert "not known: this model was not trained here" in text and "- base model: not known" in text
    assert "not trained here (whether label smoothing was used is not known)" in text
    assert "trained from scratch" not in text and "effective epsilon" not in text
    assert "| run | T |" in text and "?" not in next(line for line in text.splitlines() if line.startswith(f"| {EVALUATED} |"))
    said = evaluate(settings(model, files, tmp_path / "said", epsilon=0.1, write_card=True))
    text = ModelCard.load(tmp_path / "said" / "README.md").text
    assert said.rows[0].epsilon == 0.1 and "as its user says" in text and "prior: not known" in text
    assert "convention not known" in text and "`all`" not in text


def test_the_leaderboard_of_a_benchmark_gets_the_accuracy_alone(model: Path, files: dict[str, Any], tmp_path: Path) -> None:
    named = {"dataset_id": "someone/notes", "benchmark_task": "default", "write_card": True}
    report = evaluate(settings(model, files, tmp_path, **named))
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / BENCHMARKS).read_text(encoding="utf-8")))
    assert (entry.dataset_id, entry.task_id, entry.notes) == ("someone/notes", "default", f"n = {len(files['test'][1])}")
    assert entry.value == report.rows[0].metrics["accuracy"]["value"]
    evaluate(settings(model, files, tmp_path / "none", dataset_id="someone/notes", write_card=True))
    assert not (tmp_path / "none" / BENCHMARKS).exists()
    with pytest.raises(ValueError, match="expected dataset_id, the benchmark's id on the Hub"):
        settings(model, files, tmp_path, benchmark_task="default")
    with pytest.raises(ValueError, match="expected benchmark_task only with task text-classification or multiple-choice"):
        settings(model, files, tmp_path, task="token-classification", dataset_id="someone/notes", benchmark_task="default")


def test_the_report_beside_the_weights_says_how_they_were_trained(model: Path, files: dict[str, Any], tmp_path: Path) -> None:
    known = make_report(published="smoothed")
    known.save(model / REPORT)
    try:
        report = evaluate(settings(model, files, tmp_path, write_card=True))
    finally:
        (model / REPORT).unlink()
    assert report.rows[0].epsilon == 0.1 and report.smoothing == known.smoothing and report.training == known.training
    assert "effective epsilon: 0.1" in (tmp_path / "README.md").read_text()


def test_without_validation_there_is_no_temperature(model: Path, files: dict[str, Any], tmp_path: Path) -> None:
    report = evaluate(settings(model, files, tmp_path, validation_file=None, epsilon=0.0))
    assert [row.name for row in report.rows] == [EVALUATED] and report.posthoc == {}


def test_labels_in_another_order_are_matched_by_name_and_it_is_said(model: Path, files: dict[str, Any], tmp_path: Path) -> None:
    order = ["positive", "negative", "neutral"]
    _, lines, ids = files["test"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=order)})
    rows = Dataset.from_dict({"text": lines, "label": [order.index(NAMES[i]) for i in ids]}, features=features)
    rows.to_parquet(tmp_path / "test.parquet")  # carries the names
    report = evaluate(
        settings(model, files, tmp_path / "out", test_file=str(tmp_path / "test.parquet"), validation_file=None, epsilon=0.0)
    )
    assert report.rows[0].value("nll") == pytest.approx(nll(logits_of(model, lines), ids), rel=1e-5)


def test_permuted_ids_are_noticed(model: Path, tmp_path: Path, capsys: Any) -> None:
    lines = texts(200, 7)
    shifted = (logits_of(model, lines).argmax(1) + 1) % 3
    path = write_csv(tmp_path / "test.csv", lines, shifted.tolist())
    evaluate(EvaluateArguments(str(tmp_path / "out"), str(model), test_file=path, use_cpu=True, epsilon=0.0))
    output = " ".join(capsys.readouterr().out.split())
    assert "The data has ids without names, read as the model's: 0 = negative" in output
    assert "The labels look permuted: accuracy 0.000 as they are, 1.000 with" in output


def test_token_classification(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_tokenizer(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=len(WORDS))
    tagger = tf.BertForTokenClassification(tf.BertConfig(id2label={0: "O", 1: "B", 2: "I"}, **sizes)).eval()
    tagger.save_pretrained(folder)
    rows = [
        {"tokens": text.split(), "ner_tags": [("O", "I", "B")[i % 3] for i in range(len(text.split()))]} for text in texts(60, 3)
    ]
    for split, part in (("validation", rows[:30]), ("test", rows[30:])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    report = evaluate(
        EvaluateArguments(
            str(tmp_path / "out"),
            str(folder),
            task="token-classification",
            test_file=str(tmp_path / "test.jsonl"),
            validation_file=str(tmp_path / "validation.jsonl"),
            use_cpu=True,
            epsilon=0.0,
            write_card=True,
        )
    )
    ids = {name: i for i, name in tagger.config.id2label.items()}
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                tagger(input_ids=torch.tensor([[WORDS.index(word) for word in row["tokens"]]])).logits[0].double(),
                torch.tensor([ids[tag] for tag in row["ner_tags"]]), reduction="none",
            )
            for row in rows[30:]
        ]  # fmt: skip
    assert report.is_token_task and report.dataset.n_sequences == 30 and report.rows[0].name == EVALUATED
    assert report.rows[0].value("nll") == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)


def test_what_cannot_be_evaluated_honestly_is_refused(model: Path, files: dict[str, Any], tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "base")
    tiny_bert(3).bert.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"without classifier\.(bias|weight).*which would be random"):
        evaluate(settings(tmp_path / "base", files, tmp_path / "out"))
    path = write_csv(tmp_path / "other.csv", ["w1", "w2"], ["good", "bad"])
    with pytest.raises(ValueError, match=r"expected the labels of the model, negative, neutral, positive, got bad, good"):
        evaluate(settings(model, files, tmp_path / "out", test_file=path, validation_file=None))
    with pytest.raises(ValueError, match="apart from test"):
        copy = write_csv(tmp_path / "copy.csv", files["test"][1], [NAMES[i] for i in files["test"][2]])
        evaluate(settings(model, files, tmp_path / "out", validation_file=copy))
    for wrong, message in (
        ({"validation_file": files["test"][0]}, "two files"),
        ({"test_file": None}, "test_file beside"),
        ({"output_dir": str(model)}, "its own folder"),
        ({"epsilon": 1.5}, "0 <= epsilon < 1"),
        ({"label_map": "[1]"}, "as a mapping"),
        ({"batch_size": 0}, "batch_size >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(settings(model, files, tmp_path), **wrong)


def test_labels_are_matched_by_name_id_or_the_users_word() -> None:
    assert match_labels({"B", "a "}, ["A", "B"]).ids == {"a ": 0, "B": 1}
    other = match_labels({"a", "b"}, ["a", "b"], ["b", "a"])
    assert other.ids == {"a": 0, "b": 1} and "disagree about the order" in other.sentence and "data: b, a" in other.sentence
    assert match_labels({0, 2}, ["a", "b", "c"]).ids == {0: 0, 2: 2}
    generic = match_labels({"x"}, ["LABEL_0", "LABEL_1"], ["y", "x"])
    assert generic.ids == {"y": 0, "x": 1} and not generic.by_name
    assert match_labels({"n", 1}, ["a", "b"], given={"n": "B", "1": "0"}).ids == {"n": 1, 1: 0}  # type: ignore[arg-type]
    for arguments, message in (
        (({"x"}, ["LABEL_0", "LABEL_1"]), "say which is which with label_map"),
        (({3}, ["a", "b"]), "expected ids from 0 to 1"),
        (({"x"}, ["a", "b"], None, {"y": "a"}), "got none for"),
        (({"x"}, ["a", "b"], None, {"x": "c"}), "expected a class of the model"),
        (({"x"}, ["a", "A "]), "distinct names"),
    ):
        with pytest.raises(ValueError, match=message):
            match_labels(*arguments)  # type: ignore[arg-type]


def test_a_bad_model_is_not_called_permuted() -> None:
    rng = np.random.default_rng(0)
    assert permutation_warning(rng.integers(0, 3, 300), rng.integers(0, 3, 300), NAMES) is None
    labels = rng.integers(0, 2, 100)
    assert "0.000 as they are, 1.000 with a → b, b → a" in str(permutation_warning(1 - labels, labels, ["a", "b"]))


def test_update_card_adds_results_and_keeps_everything_else(tmp_path: Path) -> None:
    dataset = replace(make_report(rows=1).dataset, hub_id="owner/snippets")
    report = make_report(rows=1, dataset=dataset)
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# By hand\n\nWords & <b>markup</b>.\n")
    update_card(report, str(tmp_path))
    card = ModelCard.load(path)
    assert card.data.eval_results == eval_results(report) and card.data.license == "mit" and card.data.tags == ["mine"]
    assert "# By hand\n\nWords & <b>markup</b>." in card.text and "verified" not in path.read_text()
    metrics = report.rows[0].metrics
    better = replace(report, rows=[replace(report.rows[0], metrics={**metrics, "nll": {"value": 0.25}})])
    update_card(better, str(path))
    update_card(replace(report, dataset=replace(dataset, split="validation")), str(path))
    found = ModelCard.load(path).data.eval_results
    assert len(found) == 8 and [r.metric_value for r in found if r.metric_type == "nll" and r.dataset_split == "test"] == [0.25]
    with pytest.raises(ValueError, match="id on the Hub"):
        update_card(make_report(rows=1), str(path))
    with pytest.raises(ValueError, match="a folder with one or a Hub id"):
        update_card(report, str(tmp_path / "none" / "of" / "these"))


def test_pipeline_probabilities_feed_an_evaluate_metric(model: Path, files: dict[str, Any]) -> None:
    _, lines, ids = files["test"]
    pipe = tf.pipeline("text-classification", model=str(model), device="cpu")
    scores = probabilities(pipe(lines, top_k=None, batch_size=50), pipe.model.config.label2id)
    logits = torch.tensor(logits_of(model, lines))
    np.testing.assert_allclose(scores, logits.softmax(-1).numpy(), atol=1e-5)
    found = hf_evaluate.load(hf_ls.metrics.path("ece")).compute(predictions=scores, references=ids)
    expected = ece(scores.max(1), scores.argmax(1) == ids)
    assert next(value for value in found.values() if isinstance(value, float)) == pytest.approx(expected)


def test_incomplete_answers_of_a_pipeline_are_refused(model: Path) -> None:
    pipe = tf.pipeline("text-classification", model=str(model), device="cpu")
    label2id = pipe.model.config.label2id
    for answers in (pipe(["w1", "w2"]), pipe("w1", top_k=None)):
        with pytest.raises(TypeError, match="top_k=None"):
            probabilities(answers, label2id)
    with pytest.raises(ValueError, match="got fewer in row 1"):
        probabilities([*pipe(["w1"], top_k=None), *pipe(["w2"], top_k=2)], label2id)
    with pytest.raises(ValueError, match="pass the model's own label2id"):
        probabilities(pipe(["w1"], top_k=None), {"a": 0, "b": 1, "c": 2})
    with pytest.raises(ValueError, match="sum to 1"):
        probabilities(pipe(["w1"], top_k=None, function_to_apply="sigmoid"), label2id)
    with pytest.raises(ValueError, match="ids 0 to K−1"):
        probabilities([], {"a": 1})


def test_script_on_the_embedded_data(model: Path, tmp_path: Path) -> None:
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "--model_name_or_path", str(model), "--output_dir",
                   str(tmp_path / "out"), "--use_cpu", *more]  # fmt: skip
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200)

    done = run("--dataset_name", "snippets", "--max_samples", "64", "--epsilon", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert CalibrationReport.load(tmp_path / "out" / REPORT).dataset.n == 64 and "Labels were matched by name" in done.stdout
    wrong = run("--dataset", "snippets")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr
    with pytest.raises(ValueError, match="output_dir"):
        parse_evaluation(["--model_name_or_path", "x"])
