"""`create_model_card` and `push_to_hub` of the trainers (trap 12), against a Hub on localhost which keeps the uploads."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf
import yaml
from card_reading import HOSTILE, headings, rendered
from fake_hub import fake_hub
from helpers import CLASSES, VOCAB, arguments, classification_rows, collate, tiny_bert, tiny_llama, token_rows
from huggingface_hub import EvalResult, ModelCard
from places import PYTHONPATH, WORKERS
from reports import make_report

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer, Objective, Schedule, Smoothing
from hf_ls.common.text import one_line
from hf_ls.report.calibration_report import REPORT
from hf_ls.report.card import MARKER, model_card
from hf_ls.report.card_metadata import eval_results
from hf_ls.report.facts import TrainingFacts
from hf_ls.trainer.card import last_evaluation

SECTIONS = ["Evaluation", "Label smoothing", "Training", "Limitations", "Versions"]


def made(folder: Path, *, trained: bool = True, model: Any = None, rows: Any = None, smoothing: Any = None, **kwargs: Any) -> Any:
    rows = classification_rows() if rows is None else rows
    given = {name: kwargs.pop(name) for name in ("class_weight", "objective", "compute_metrics") if name in kwargs}
    args = arguments(folder, LabelSmoothingArguments, **kwargs)
    trainer = LabelSmoothingTrainer(
        model=tiny_bert() if model is None else model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate,
        smoothing=smoothing, **given,
    )  # fmt: skip
    if trained:
        trainer.train()
    return trainer


def card_of(trainer: Any, **kwargs: Any) -> ModelCard:
    trainer.create_model_card(**kwargs)
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


def section(card: ModelCard, title: str) -> str:
    return card.text.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is on the fake Hub after the pushes of `push_worker.py`: repository -> README.md, beside the stock card."""
    folder = tmp_path_factory.mktemp("push")
    with fake_hub() as (address, files):
        environment = os.environ | {
            "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": PYTHONPATH, "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        command = [sys.executable, str(WORKERS / "push_worker.py"), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    assert files.pop("me/stock") == {}  # refused before anything was uploaded
    assert all("model.safetensors" in found for found in files.values())
    leaks = [
        (repo, name) for repo, found in files.items() for name, content in found.items()
        if b"hf_fake" in content or str(folder).encode() in content
    ]  # fmt: skip
    assert leaks == [] and all("training_args.bin" in files[repo] for repo in ("me/ours", "me/reported"))
    stock = {"stock": (folder / "stock" / "README.md").read_text(), "refusal": (folder / "stock.txt").read_text()}
    return stock | {repo: found["README.md"].decode() for repo, found in files.items()}


@pytest.mark.stock
def test_trap_12_the_stock_card_loses_the_metrics_and_is_no_yaml(uploads: dict[str, str]) -> None:
    stock = uploads["stock"]
    assert "Invalid metadata in README.md" in uploads["refusal"] and "numpy" in uploads["refusal"]
    assert "!!binary" in stock and "python/object" in stock
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(stock.split("---")[1])
    assert "type: accuracy" in stock and "type: nll" not in stock and "calibration_error" not in stock


def test_trap_12_ours_keeps_every_metric_as_a_plain_number(uploads: dict[str, str]) -> None:
    ours = uploads["me/ours"]
    assert "!!" not in ours.split("---")[1] and MARKER in ours
    header = yaml.safe_load(ours.split("---")[1])
    results = [r for r in ModelCard(ours).data.eval_results if r.dataset_type == "owner/data"]
    values = {result.metric_type: result.metric_value for result in results}
    assert values["accuracy"] == 0.625 and values["nll"] == 1.25 and values["expected_calibration_error"] == 0.125
    assert {"brier_score", "signed_gap"} < set(values) and all(type(value) is float for value in values.values())
    assert header["metrics"] == ["accuracy", "nll", "brier_score", "expected_calibration_error"]
    assert "| nll | 1.2500 |" in ours and "effective epsilon: 0.1" in ours


def test_trap_12_the_card_of_a_report_is_what_is_pushed(uploads: dict[str, str]) -> None:
    card = ModelCard(uploads["me/reported"])
    dataset = replace(make_report(rows=1).dataset, hub_id="owner/snippets")
    report = make_report(dataset=dataset, training=TrainingFacts(seeds=[1], steps=1))
    assert card.data.eval_results == eval_results(report) and card.text.strip() == ModelCard(model_card(report)).text.strip()


def test_update_card_on_the_hub_adds_results_once(uploads: dict[str, str]) -> None:
    data = ModelCard(uploads["me/ours"]).data
    dataset = replace(make_report(rows=1).dataset, hub_id="owner/other")
    other = [result for result in data.eval_results if result.dataset_type == "owner/other"]
    assert other == eval_results(make_report(rows=1, dataset=dataset, published="baseline")) and len(other) == 4
    assert {result.dataset_type for result in data.eval_results} == {"owner/other", "owner/data"}
    assert "# ours" in uploads["me/ours"]  # the text stays


def test_results_survive_another_round_trip(tmp_path: Path) -> None:
    trainer = made(tmp_path, label_smoothing_factor=0.1)
    trainer.evaluate()
    card = card_of(trainer, dataset_tags="owner/data", dataset="Data", dataset_args="v1", license="mit", language=["en", "de"])
    metrics, _ = last_evaluation(trainer)
    assert len(card.data.eval_results) == len(metrics) - 1  # the loss is the nll
    assert all(isinstance(r, EvalResult) and r.dataset_config == "v1" and r.verified is None for r in card.data.eval_results)
    card.save(tmp_path / "again.md")
    assert ModelCard.load(tmp_path / "again.md").data.eval_results == card.data.eval_results
    assert card.data.license == "mit" and card.data.language == ["en", "de"] and card.data.pipeline_tag == "text-classification"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results}["nll"] == metrics["nll"] == metrics["loss"]


def test_sections_and_no_results_without_a_dataset(tmp_path: Path) -> None:
    card = card_of(made(tmp_path))
    assert headings(card.text) == [("h1", tmp_path.name), *(("h2", name) for name in SECTIONS)]
    assert card.data.eval_results is None and "has not evaluated" in section(card, "Evaluation")


def test_trap_12_epsilon_is_claimed_only_where_it_was_used(tmp_path: Path) -> None:
    untrained = card_of(made(tmp_path / "a", trained=False, label_smoothing_factor=0.1))
    assert "not known" in section(untrained, "Label smoothing") and "epsilon" not in untrained.text.split("## Limitations")[0]
    assert "not trained here" in untrained.text and "label-smoothing" not in untrained.data.tags

    plain = card_of(made(tmp_path / "b"))
    assert "No label smoothing was used (epsilon = 0)" in plain.text and "no free win" not in plain.text
    assert "label-smoothing" not in plain.data.tags

    never = Smoothing(0.1, schedule=Schedule("constant", warmup_steps=50))
    assert "No label smoothing was used (epsilon = 0)" in card_of(made(tmp_path / "c", smoothing=never)).text

    focal = card_of(made(tmp_path / "d", label_smoothing_objective="focal", label_smoothing_objective_params='{"gamma": 3}'))
    assert "training objective: focal" in focal.text and "gamma 3" in focal.text and "No label smoothing was used" in focal.text
    dft = card_of(made(tmp_path / "f", label_smoothing_objective="dft"))
    assert "No label smoothing was used (epsilon = 0): the loss is changed by dft" in dft.text
    z_loss = card_of(made(tmp_path / "e", objective=Objective("smoothed_ce", z_loss=1e-4)))
    assert "z loss 0.0001" in z_loss.text


def test_the_smoothing_is_stated_in_full(tmp_path: Path) -> None:
    prior = torch.tensor([0.5, 0.25, 0.25, 0.0, 0.0])
    smoothing = Smoothing(0.2, "wrong", prior=prior, schedule=Schedule("linear", 0.05))
    weight = torch.ones(CLASSES)
    card = card_of(made(tmp_path / "a", smoothing=smoothing, class_weight=weight, max_steps=3))
    text = section(card, "Label smoothing")
    for fact in ("effective epsilon: 0.2", "`wrong`: the mass goes to the 4 other classes only", "2 classes get no mass",
                 "linear, from 0.2 to 0.05", "0.2, 0.125, 0.05", "label −100", "class weights"):  # fmt: skip
        assert fact in text, fact
    assert "logit gap" not in text and "the same as" not in text and "label-smoothing" in card.data.tags

    fixed = section(card_of(made(tmp_path / "b", smoothing=Smoothing(0.1))), "Label smoothing")
    assert f"{Smoothing(0.1).optimal_logit_gap(CLASSES):.3f} nats" in fixed and "0.920" in fixed


def test_a_language_model_is_described_by_its_vocabulary(tmp_path: Path) -> None:
    trainer = made(tmp_path, model=tiny_llama(), rows=token_rows((6, 5)), label_smoothing_factor=0.1)
    trainer.evaluate()
    card = card_of(trainer, dataset_tags="owner/text")
    assert "all tokens of the vocabulary" in card.text and card.data.pipeline_tag == "text-generation"
    assert f"{Smoothing(0.1).max_confidence(VOCAB):.3f}" in card.text
    ece = next(r for r in card.data.eval_results if r.metric_type == "expected_calibration_error")
    assert ece.metric_args["level"] == "token" and ece.metric_name.endswith("per token")


def test_the_best_checkpoint_is_what_is_described(tmp_path: Path) -> None:
    """Stock cards state the evaluation of the last step also where the weights are those of the best one."""
    values = iter([0.9, 0.1])
    kwargs = dict(
        compute_metrics=lambda _: {"score": np.float32(next(values))}, max_steps=2, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="score",
    )  # fmt: skip
    trainer = made(tmp_path, **kwargs)
    metrics, where = last_evaluation(trainer)
    assert metrics["score"] == pytest.approx(0.9) and "step 1" in where


def test_what_is_no_finite_number_is_left_out(tmp_path: Path) -> None:
    trainer = made(tmp_path, trained=False)
    odd = {"eval_a": float("nan"), "eval_b": np.array([1.0, 2.0]), "eval_c": "words", "eval_d": torch.tensor(0.5), "eval_e": True}
    trainer.log({"eval_loss": np.array([1.5]), **odd, "eval_runtime": 3.0, "eval_f": np.int64(2)})
    assert last_evaluation(trainer)[0] == {"loss": 1.5, "d": 0.5, "f": 2.0}


def test_hand_written_cards_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = made(tmp_path)
    path = tmp_path / "README.md"
    path.write_text("# Mine\n")
    trainer.create_model_card()
    assert path.read_text() == "# Mine\n" and "written by hand" in caplog.text
    tf.Trainer.create_model_card(trainer)  # the stock one is nobody's handiwork
    assert "# Mine" not in path.read_text()
    trainer.create_model_card()
    assert MARKER in path.read_text()


def test_a_report_of_other_weights_is_not_used(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    make_report(training=TrainingFacts(seeds=[1], steps=1)).save(tmp_path / REPORT)
    assert "null ece" in card_of(trainer).text
    trainer.args.max_steps = 2
    trainer.train()
    assert "null ece" not in card_of(trainer).text
    (tmp_path / REPORT).write_text("{}")
    assert "The Trainer has not evaluated this model." in card_of(trainer).text


def test_the_report_keeps_licence_language_and_tags_of_the_caller(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    make_report(training=TrainingFacts(seeds=[1], steps=1)).save(tmp_path / REPORT)
    card = card_of(trainer, license="mit", language="en", tags=["mine", "calibration"])
    assert card.data.license == "mit" and card.data.language == ["en"]
    assert card.data.tags == ["label-smoothing", "calibration", "text-classification", "mine"]


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_names_are_shown_and_not_obeyed(hostile: str, tmp_path: Path) -> None:
    trainer = made(tmp_path, trained=False)
    trainer.log({"eval_loss": 1.0, f"eval_{hostile}": 0.5})
    trainer.model.config._name_or_path = hostile
    given = dict(model_name=hostile, dataset=hostile, dataset_tags="owner/data", dataset_args=hostile, license=hostile)
    card = card_of(trainer, **given, language=hostile, tags=[hostile], tasks=hostile, finetuned_from=hostile)
    header = yaml.safe_load((tmp_path / "README.md").read_text().split("\n---\n")[0].removeprefix("---"))
    assert header["license"] == one_line(hostile) and header["tags"][-1] == one_line(hostile) and "Owned" not in header
    assert set(header) <= {"license", "language", "tags", "library_name", "pipeline_tag", "datasets", "model-index"}
    assert card.data.eval_results is not None and card.data.eval_results[0].metric_value == 0.5
    shown = headings(card.text)
    assert [tag for tag, _ in shown] == ["h1", *["h2"] * len(SECTIONS)] and shown[0][1] == one_line(hostile)
    tokens = rendered(card.text)
    inline = [child for token in tokens for child in token.children or []]
    assert [t.content.strip() for t in tokens if t.type == "html_block"] == [MARKER]
    assert not [child for child in inline if child.type in ("html_inline", "strong_open", "image", "em_open")]
    links = {child.attrs["href"] for child in inline if child.type == "link_open"}
    assert links <= {"https://huggingface.co/datasets/owner/data"}  # of the id which the caller gave
    assert not [t for t in tokens if t.type in ("fence", "code_block", "ordered_list_open", "blockquote_open", "hr")]


def test_adapters_are_named(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    tiny_bert().save_pretrained(base)
    model = tf.AutoModelForSequenceClassification.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS))
    card = card_of(made(tmp_path / "out", model=model, label_smoothing_factor=0.1))
    assert card.data.library_name == "peft" and card.data.base_model is None  # a folder here is no id
    assert "base model: base" in card.text and str(tmp_path) not in card.text
    assert card.data.pipeline_tag == "text-classification"


def test_what_softens_the_targets_together_is_named(tmp_path: Path) -> None:
    kwargs = dict(label_smoothing_factor=0.1, mixup_alpha=0.2, allow_combined_softening=True)
    text = section(card_of(made(tmp_path, **kwargs)), "Label smoothing")
    assert "label smoothing (ε = 0.1), embedding mixup (α = 0.2" in text


def test_trl_writes_the_same_card_with_every_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from small_tokenizer import save_tokenizer, texts

    from hf_ls.trainer.sft import LabelSmoothingSFTConfig, LabelSmoothingSFTTrainer

    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "tokenizer", eos_token="[SEP]")
    config = LabelSmoothingSFTConfig(
        output_dir=str(tmp_path / "out"), label_smoothing_factor=0.1, max_steps=1, save_steps=1, use_cpu=True, report_to="none", bf16=False,
    )  # fmt: skip
    data = Dataset.from_dict({"text": texts(8, 0)})
    LabelSmoothingSFTTrainer(model=tiny_llama(), args=config, train_dataset=data, processing_class=tokenizer).train()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "effective epsilon: 0.1" in card.text and {"trl", "sft", "label-smoothing"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text-generation" and card.data.eval_results is None


def test_a_text_which_is_uploaded_with_a_path_of_this_machine_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    base = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    trainer = made(tmp_path / "out", model=model)
    trainer.save_model()
    trainer._finish_current_push()  # a training without a push
    assert caplog.text == ""
    trainer.push_in_progress = None
    trainer._finish_current_push()
    trainer._finish_current_push()
    assert caplog.text.count("adapter_config.json is uploaded with a path of this machine") == 1
