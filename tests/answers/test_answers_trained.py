"""Questions beside the training data of a language model: in a run, and in a comparison which is judged by their answers."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from byte_tokenizer import byte_tokenizer
from datasets import DatasetDict
from helpers import tiny_llama

from hf_ls.calibration.temperature import fit_temperature
from hf_ls.compare.cells import CELL, Cell
from hf_ls.compare.comparison import Comparison, Result, Variant
from hf_ls.compare.experiment import parse_compare, run_comparison
from hf_ls.compare.results import Answers, Sequences
from hf_ls.compare.statistics import compare
from hf_ls.compare.worker import run_cell
from hf_ls.data.classification import load_snippets
from hf_ls.metrics.core import PredictionStatistics
from hf_ls.report.calibration_report import CalibrationReport
from hf_ls.run.config import parse_config
from hf_ls.run.finetune import finetune
from hf_ls.run.loading import load, load_tokens

BASE, TEMPERED, SMOOTHED = Variant("baseline", 0.0, False), Variant("baseline", 0.0, True), Variant("smoothed", 0.2, False)
TEMPLATE = r"Number {question}.\nColour:"


def questions(path: Path, n: int, seed: int) -> list[dict[str, Any]]:
    """Colours of numbers, of which 3 or 4 may be chosen, and most are red."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        options = ["red", "green", "blue", "grey"][: 3 + i % 2]
        rows.append(
            {"question": f"{seed}{i}", "choices": options, "answer": int(rng.random() > 0.7) * int(rng.integers(len(options)))}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of questions, pairs to learn from, and a tiny model in float64."""
    folder = tmp_path_factory.mktemp("asked")
    for name, n, seed in (("test", 40, 1), ("dev", 30, 2), ("shots", 2, 3)):
        questions(folder / f"{name}.jsonl", n, seed)
    for name, n, seed in (("train", 24, 4), ("validation", 12, 5), ("heldout", 16, 6)):
        rows = questions(folder / "some.jsonl", n, seed)
        pairs = [{"prompt": f"Number {r['question']}.\nColour:", "completion": " " + r["choices"][r["answer"]]} for r in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tiny_llama(vocab_size=280).double().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    return folder


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    files = {"train_file": "train", "validation_file": "validation", "test_file": "heldout", "question_file": "test"}
    return [
        *("--task", "causal-lm", "--model_name_or_path", str(place / "model"), "--output_dir", str(out), "--max_steps", "16"),
        *(word for name, file in files.items() for word in (f"--{name}", str(place / f"{file}.jsonl"))),
        *("--prompt_template", TEMPLATE, "--answer_is", "index", "--learning_rate", "1e-2", "--use_cpu", "true"),
        *("--report_to", "none", "--disable_tqdm", "true", *more),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cheap() -> Any:
    """No plots, which are not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_ls.report.build.write_plots", lambda *args, **options: [])
        patch.setattr("hf_ls.run.publish.write_plots", lambda *args, **options: [])
        patch.setattr("hf_ls.compare.experiment.write_plots", lambda *args, **options: [])
        yield


def compared(argv: list[str]) -> Any:
    return run_comparison(*parse_compare(argv))


@pytest.fixture(scope="module")
def done(place: Path, cheap: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Comparison]:
    """A comparison whose cells were run one by one, from the lines of `--print_cells`."""
    out = tmp_path_factory.mktemp("compare") / "out"
    argv = arguments(place, out, "--validation_question_file", str(place / "dev.jsonl"))
    argv += ["--few_shot_file", str(place / "shots.jsonl"), "--epsilons", "0.2", "--seeds", "0", "--jobs", "1"]
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_ls.compare.experiment._announce", said.append)
        assert compared([*argv, "--print_cells"]) is None
    assert len(said) == 3
    for line in said[1:]:
        run_cell(Path(shlex.split(line)[-1]))
    times = {path: path.stat().st_mtime_ns for path in out.glob(f"cells/*/{CELL}")}
    comparison = compared(argv)
    assert {path: path.stat().st_mtime_ns for path in out.glob(f"cells/*/{CELL}")} == times and len(times) == 2
    return out, argv, comparison


def by_hand(folder: Path, place: Path, name: str) -> tuple[np.ndarray, list[int]]:
    """log p of each option by one forward of the whole text, and the right places."""
    model, tokenizer = tf.AutoModelForCausalLM.from_pretrained(folder), tf.AutoTokenizer.from_pretrained(place / "model")
    assert model.dtype == torch.float64
    rows, shots = ([json.loads(line) for line in (place / f"{n}.jsonl").read_text().splitlines()] for n in (name, "shots"))
    lead = "".join(f"Number {r['question']}.\nColour: {r['choices'][r['answer']]}\n\n" for r in shots)
    table = np.full((len(rows), 4), -np.inf)
    for i, row in enumerate(rows):
        prompt = tokenizer(f"{lead}Number {row['question']}.\nColour:")["input_ids"]
        for k, option in enumerate(row["choices"]):
            ids = prompt + tokenizer(f" {option}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            table[i, k] = sum(float(log_p[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))
    return table, [row["answer"] for row in rows]


def test_the_numbers_of_a_comparison_are_those_of_one_forward_for_each_option(done, place):
    out, _, comparison = done
    for variant, name in ((BASE, "baseline-seed0"), (SMOOTHED, "smoothed-0.2-seed0")):
        table, answers = by_hand(out / "cells" / name, place, "test")
        temperature = fit_temperature(*by_hand(out / "cells" / name, place, "dev"))
        tempered = Variant(variant.name, variant.epsilon, True)
        assert comparison.temperatures[tempered.label] == [pytest.approx(temperature, rel=1e-6)]
        for one, t in ((variant, 1.0), (tempered, comparison.temperatures[tempered.label][0])):
            p = np.exp(table / t) / np.exp(table / t).sum(1, keepdims=True)
            right = p[np.arange(len(p)), answers]
            expected = {"nll": -np.log(right).mean(), "accuracy": np.mean(p.argmax(1) == answers)}
            expected["brier"] = ((p**2).sum(1) - 2 * right + 1).mean()
            for metric, value in expected.items():
                assert comparison.measurement(one, metric).mean == pytest.approx(value, abs=1e-9), (one, metric)


def test_the_verdict_is_about_the_answers_and_the_tokens_stand_beside(done):
    out, _, comparison = done
    assert comparison == Comparison.from_json((out / "report.json").read_text())
    assert (comparison.what, comparison.size(), comparison.clusters) == ("questions", "40 questions", {})
    assert comparison.guessing == pytest.approx([(1 / 3 + 1 / 4) / 2, (np.log(3) + np.log(4)) / 2])
    tokens = comparison.tokens
    assert tokens is not None and tokens.clusters == {"test": 16} and tokens.tokens is None
    assert {metric for _, _, metric in comparison.verdict.compared} == {"nll", "accuracy", "ece"}
    assert f"Judged are the answers. By the tokens which were learnt: {tokens.verdict.sentence}" in comparison.verdict.evidence
    page = (out / "report.html").read_text()
    assert "test, 40 questions" in page and "tokens of test, " in page and "questions-validation 30" in page


def test_a_comparison_with_other_questions_is_another_one(done, place, tmp_path):
    _, argv, _ = done
    rows = [json.loads(line) for line in (place / "test.jsonl").read_text().splitlines()]
    rows[0]["question"] = "another"
    kept = (place / "test.jsonl").read_text()
    try:
        (place / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match="expected the settings of the comparison"):
            compared(argv)
    finally:
        (place / "test.jsonl").write_text(kept)
    rows[0]["choices"] = ["red"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="row 0 of test"):  # before any cell
        compared([*argv, "--question_file", str(bad), "--output_dir", str(tmp_path / "out"), "--dry_run"])


@pytest.mark.parametrize("task", ["causal-lm", "sft"])
def test_a_run_follows_the_answers_and_reports_them_apart(place, cheap, tmp_path, task):
    out = tmp_path / "out"
    more = ["--task", task, "--validation_question_file", str(place / "dev.jsonl"), "--do_train", "--do_eval", "--do_predict"]
    more += ["--eval_strategy", "steps", "--eval_steps", "8", "--save_strategy", "steps", "--save_steps", "8"]
    more += ["--load_best_model_at_end", "--metric_for_best_model", "answer_nll", "--label_smoothing_factor", "0.1"]
    report = finetune(parse_config(arguments(place, out, *more, "--with_baseline")))
    assert report is not None and report.is_token_task
    logged = [record["eval_answer_nll"] for record in report.history["smoothed"] if "eval_answer_nll" in record]
    assert len(logged) == 2 and json.loads((out / "trainer_state.json").read_text())["best_metric"] == pytest.approx(min(logged))
    answers = report.answered
    assert answers is not None and CalibrationReport.load(out / "calibration.json") == report
    assert "Answers to 40 questions:" in (out / "README.md").read_text()
    assert [row.name for row in answers.rows] == [row.name for row in report.rows]
    assert answers.dataset.name == "test.jsonl" and answers.dataset.n == 40 and answers.label_names == ["A", "B", "C", "D"]
    assert (
        answers.answers is not None and 0 < answers.answers.mass < 1 and answers.answers.template == TEMPLATE.replace(r"\n", "\n")
    )
    assert {d.metric for d in answers.differences} >= {"nll", "accuracy"}


def test_without_validation_questions_no_temperature_is_fitted_and_this_is_said(place, cheap, tmp_path, capsys):
    out = tmp_path / "out"
    finetune(parse_config(arguments(place, out, "--do_predict", "--do_eval")))
    assert "No row with temperature for the answers: there are no questions of validation" in capsys.readouterr().out
    assert [row.tempered for row in CalibrationReport.load(out / "calibration.json").answered.rows] == [False]
    sums = np.ones(3)
    tokens = Sequences(Cell("baseline", "smoothed_ce", None, 0.0, 0), {}, 2 * sums, sums, sums / 2, 0.5)
    found = Answers.load(tokens.cell, out / "answers", tokens=tokens)
    (result,) = found.results()
    assert (result.variant, result.validation_nll, result.temperature) == (BASE, 0.5, 1.0) and found.count.sum() == 6


@pytest.mark.parametrize("differ", [True, False])
def test_models_which_only_guess_have_not_learnt(differ):
    """Options which differ are guessed alike; of shared ones a model may know how frequent each is, which is no learning."""
    rng = np.random.default_rng(0)
    labels = rng.choice(3, size=400, p=[0.7, 0.2, 0.1])
    logits = np.log([0.7, 0.2, 0.1]) + 0.01 * rng.normal(size=(400, 3))  # right in 7 of 10, by the shares alone
    results = []
    for name, epsilon, scale in (("baseline", 0.0, 1.0), ("smoothed", 0.2, 0.9)):
        stats = PredictionStatistics.from_logits(scale * logits, labels)
        results.append(
            Result(Variant(name, epsilon, False), 0, 1.0, float(stats.nll.mean()), {"test": stats}, labels={"test": labels})
        )
    found = compare(results, repetitions=200, what="questions", guessing=(1 / 3, np.log(3)) if differ else None)
    assert (found.verdict.kind == "not_learnt") != differ
    if not differ:
        assert "the share of the most frequent answer of test" in found.verdict.sentence
    guess = compare(results, repetitions=200, what="questions", guessing=(0.75, 0.1))
    assert guess.verdict.kind == "not_learnt" and "that of guessing among the options" in guess.verdict.sentence


def test_the_embedded_sentences_are_learnt_as_the_text_on_which_they_are_asked(place, monkeypatch):
    whole = load_snippets()
    few = replace(whole, splits=DatasetDict({split: part.select(range(40)) for split, part in whole.splits.items()}))
    monkeypatch.setattr("hf_ls.run.loading.load_snippets", lambda sources: few)  # all of them take seconds
    argv = [
        "--task",
        "causal-lm",
        "--dataset_name",
        "snippets",
        "--model_name_or_path",
        str(place / "model"),
        "--max_length",
        "400",
    ]
    argv += ["--prompt_template", r"Sentence: {question}\nSentiment:", "--max_train_samples", "4", "--max_eval_samples", "5"]
    config = parse_config([*argv, "--max_predict_samples", "6", "--completion_only_loss", "false"])
    loaded, snippets = load(config), whole.splits
    asked, rows, tokenizer = loaded.questions, loaded.data.splits, loaded.tokenizer
    assert asked is not None and {split: len(part) for split, part in asked.splits.items()} == {"validation": 5, "test": 6}
    assert asked.label_names == ["negative", "neutral", "positive"]
    for split in ("validation", "test"):
        for question, row, sentence in zip(asked.splits[split], rows[split], snippets[split], strict=False):
            assert row["source"] == question.prompt == f"Sentence: {sentence['text']}\nSentiment:"
            assert row["target"] == f" {question.options[question.answer]}" and question.answer == sentence["label"]
    row, told = loaded.tokens["train"][0], rows["train"][0]
    whole, prompt = (tokenizer(text)["input_ids"] for text in (told["source"] + told["target"], told["source"]))
    assert row["input_ids"] == row["labels"] == [*whole, tokenizer.eos_token_id]
    answer_alone = load_tokens(
        replace(config, data=replace(config.data, completion_only_loss=None)), loaded.data, tokenizer, None
    )
    assert answer_alone["train"][0]["labels"] == [*[-100] * len(prompt), *row["labels"][len(prompt) :]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--task seq2seq --train_file a.csv --question_file q.jsonl", "expected question_file only with task causal-lm or sft"),
        ("--train_file a.csv --prompt_template {question}", "expected prompt_template only with task causal-lm or sft"),
        ("--task sft --train_file a.csv --score letter", "expected question_file with score, got none"),
        ("--task sft --train_file a.csv --validation_question_file q.jsonl", "expected question_file beside validation_question"),
        ("--task sft --train_file a.csv --question_file a.csv", "expected different files for train and questions"),
        ("--task sft --train_file a.csv --question_file q.csv --validation_question_file ./q.csv", "expected different files for"),
        ("--task sft --train_file a.csv --question_file q.csv --score letter --prompt_template {question}", "expected {choices}"),
        ("--task sft --train_file a.csv --question_file q.csv --metric_for_best_model answer_nll", "expected metric_for_best_mod"),
        ("--task causal-lm --train_file a.csv --question_file q.csv --packing true", "expected packing only with task sft"),
        ("--task seq2seq --dataset_name snippets", "expected task text-classification or causal-lm or sft with dataset_name"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        parse_config(line.split())
