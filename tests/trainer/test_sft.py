"""TRL's trainer with one forward a step and no logits: the loss, the metrics and the masks are TRL's own."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from datasets import Dataset
from head_models import MODELS, VOCAB, Largest, build
from helpers import arguments
from sft_rows import conversations, tokenizer, words
from transformers.trainer_callback import PrinterCallback

trl = pytest.importorskip("trl")

from hf_ls import LabelSmoothingArguments, LabelSmoothingSFTConfig, LabelSmoothingSFTTrainer  # noqa: E402

EPSILON = 0.1
LENGTHS = (30, 4, 17, 9, 25, 6, 12, 3)
METRICS = ("entropy", "mean_token_accuracy", "num_tokens")


def texts(lengths=LENGTHS):
    return Dataset.from_dict({"text": [words(n, seed) for seed, n in enumerate(lengths)]})


def trainer_of(folder, trainer_class, model=None, rows=None, eval_rows=None, peft_config=None, **kwargs):
    ours = issubclass(trainer_class, LabelSmoothingSFTTrainer)
    fixed = dict(bf16=False, gradient_checkpointing=False, label_smoothing_factor=EPSILON, per_device_train_batch_size=8,
                 learning_rate=0.01, remove_unused_columns=True)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = arguments(folder, LabelSmoothingSFTConfig if ours else trl.SFTConfig, **(fixed | kwargs))
        trainer = trainer_class(
            model=model or build("llama")[0], args=args, train_dataset=rows or texts(), eval_dataset=eval_rows,
            processing_class=tokenizer(), peft_config=peft_config,
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def records(trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


def both(folder, make=lambda: None, rows=None, names=("loss", "grad_norm", *METRICS), **kwargs):
    """The training records of TRL and of ours from the same weights and rows."""
    for trainer_class in (trl.SFTTrainer, LabelSmoothingSFTTrainer):
        found = records(trainer_of(folder, trainer_class, make(), rows, **kwargs))
        yield [{name: record[name] for name in names} for record in found]


def assert_close(ours, stock, rel=1e-4):
    assert len(ours) == len(stock) > 0
    for one, other in zip(ours, stock, strict=True):
        assert one == pytest.approx(other, rel=rel)


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
def test_loss_gradient_and_metrics_are_those_of_trl(tmp_path, epsilon):
    stock, ours = both(tmp_path, label_smoothing_factor=epsilon, per_device_train_batch_size=4, max_steps=2)
    assert_close(ours, stock)
    assert ours[0]["mean_token_accuracy"] < 1
    assert ours[0]["entropy"] > 0.1


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_dft_is_that_of_trl_without_logits(tmp_path, loss):
    """Losses, gradients and the weights after them; the evaluation is the NLL, which TRL's is not."""
    fixed = dict(label_smoothing_factor=0.0, per_device_train_batch_size=4, max_steps=3, eval_rows=texts((5, 11)))
    objective = {} if loss == "nll" else {"label_smoothing_objective": loss}
    stock = trainer_of(tmp_path, trl.SFTTrainer, loss_type=loss, **fixed)
    ours = trainer_of(tmp_path, LabelSmoothingSFTTrainer, label_smoothing_logits_free="on", **objective, **fixed)
    names = ("loss", "grad_norm", *METRICS)
    found = [[{name: record[name] for name in names} for record in records(trainer)] for trainer in (ours, stock)]
    assert_close(*found)
    for mine, theirs in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    evaluated = ours.evaluate()
    assert evaluated["eval_loss"] == evaluated["eval_nll"]
    assert (evaluated["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-4)) == (loss == "nll")


@pytest.mark.parametrize("name", ["dft", "eaft", "brier"])
def test_packed_and_masked_objectives_are_those_of_their_formula(tmp_path, name):
    """Completion-only labels in packed rows: the mean over the labels which count, and no others."""
    rows = Dataset.from_list([{"prompt": words(n, 2 * n), "completion": words(5 + n % 3, n)} for n in LENGTHS])
    trainer = trainer_of(
        tmp_path, LabelSmoothingSFTTrainer, rows=rows, packing=True, max_length=24, max_steps=1, learning_rate=0.0,
        label_smoothing_factor=0.0, label_smoothing_objective=name, label_smoothing_logits_free="on",
    )  # fmt: skip
    (record,) = records(trainer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    with torch.no_grad():
        logits = trainer.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    labels = batch["labels"][..., 1:]
    kept = labels != -100
    p, y = logits[:, :-1][kept].double().softmax(-1), labels[kept]
    p_y = p[torch.arange(len(y)), y]
    top = p.sort(-1, descending=True).values[:, :20]
    top = top / top.sum(-1, keepdim=True)
    expected = {
        "dft": -p_y * p_y.log(),
        "eaft": torch.special.entr(top).sum(-1) / math.log(20) * -p_y.log(),
        "brier": p.square().sum(-1) - 2 * p_y + 1,
    }[name]
    assert 0 < int(kept.sum()) < labels.numel()
    assert record["loss"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert record["nll"] == pytest.approx(float(-p_y.log().mean()), rel=1e-4)


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
def test_accumulation_changes_nothing(tmp_path, epsilon):
    (whole,), (parts,) = (
        records(
            trainer_of(
                tmp_path,
                LabelSmoothingSFTTrainer,
                label_smoothing_factor=epsilon,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
            )
        )
        for size in (8, 2)
    )
    for name in ("loss", "grad_norm", "nll", "num_tokens"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def forwards_per_step(folder, trainer_class):
    trainer = trainer_of(folder, trainer_class, per_device_train_batch_size=2, max_steps=4)
    seen = []
    trainer.model.model.register_forward_hook(lambda *_: seen.append(trainer.state.global_step))
    records(trainer)
    return [seen.count(step) for step in range(1, 4)]  # the first step also probes the model


def test_there_is_one_forward_a_step_where_trl_needs_two(tmp_path):
    assert forwards_per_step(tmp_path, LabelSmoothingSFTTrainer) == [1, 1, 1]
    if forwards_per_step(tmp_path, trl.SFTTrainer) == [1, 1, 1]:
        pytest.skip("this version of TRL smooths in one forward")


def test_no_logits_are_made_in_training_or_evaluation(tmp_path):
    rows = texts((100,) * 8)
    trainer = trainer_of(tmp_path, LabelSmoothingSFTTrainer, rows=rows, eval_rows=rows, per_device_eval_batch_size=8, max_steps=2)
    records(trainer)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    logits = inputs["labels"].numel() * VOCAB
    with Largest() as training:
        trainer.compute_loss(trainer.model.train(), inputs).backward()
    with Largest() as evaluating:
        trainer.evaluate()
    with Largest() as dense:
        trainer.compute_loss(trainer.model.train(), inputs, return_outputs=True)
    assert training.elements < logits <= dense.elements
    assert evaluating.elements < logits


@pytest.mark.parametrize("logits_free", ["auto", "off"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])
def test_metrics_do_not_depend_on_the_path_of_the_loss(tmp_path, name, logits_free):
    (stock,) = records(trainer_of(tmp_path, trl.SFTTrainer, build(name)[0]))
    trainer = trainer_of(tmp_path, LabelSmoothingSFTTrainer, build(name)[0], label_smoothing_logits_free=logits_free)
    (ours,) = records(trainer)
    assert (trainer._head is None) == (logits_free == "off")
    for metric in ("loss", *METRICS):
        assert ours[metric] == pytest.approx(stock[metric], rel=1e-4)


def prompts():
    return Dataset.from_dict(
        {"prompt": [words(n, n) for n in LENGTHS], "completion": [" " + words(4 + n % 3, 99 + n) for n in LENGTHS]}
    )


@pytest.mark.parametrize(
    ("rows", "kwargs", "kept"),
    [
        (prompts, dict(), sum(4 + n % 3 + 1 for n in LENGTHS)),
        (prompts, dict(completion_only_loss=False), sum(n + 4 + n % 3 for n in LENGTHS)),
        (conversations, dict(assistant_only_loss=True), sum(2 * (3 + i % 4 + 1) for i in range(8))),
    ],
    ids=["completions", "whole", "assistant"],
)
def test_masks_of_prompts_and_users_are_respected(tmp_path, rows, kwargs, kept):
    stock, ours = both(tmp_path, rows=rows(), **kwargs)
    assert_close(ours, stock)
    trainer = trainer_of(tmp_path, LabelSmoothingSFTTrainer, rows=rows(), **kwargs)
    records(trainer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert int(trainer._get_num_items_in_batch([batch], torch.device("cpu"))) == kept


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(padding_free=True, max_length=None),
        dict(packing=True, max_length=32),
        dict(packing=True, max_length=16, packing_strategy="bfd_split"),
    ],
    ids=["padding_free", "bfd", "bfd_split"],
)
def test_packed_sequences_train_as_single_ones(tmp_path, kwargs):
    """The label of each first token is ignored, so that no sequence predicts the next one's start."""
    stock, ours = both(tmp_path, **kwargs)
    assert_close(ours, stock)
    trainer = trainer_of(tmp_path, LabelSmoothingSFTTrainer, **kwargs)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    assert batch["input_ids"].shape[0] == 1
    starts = (batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
    total = count = 0
    model = build("llama")[0].eval()
    for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
        ids = batch["input_ids"][:, start:end]
        if ids.shape[1] > 1:
            total += float(model(input_ids=ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    (record,) = records(trainer)
    assert record["nll"] == pytest.approx(total / count, rel=1e-5)


def test_wrapped_packing_crosses_sequences_as_in_trl(tmp_path):
    stock, ours = both(tmp_path, packing=True, packing_strategy="wrapped", max_length=16)
    assert_close(ours, stock)


@pytest.mark.parametrize("tuning", ["lora", "prompt", "prefix"])
def test_peft_trains_as_in_trl(tmp_path, tuning):
    config = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[tuning]
    found = []
    for trainer_class in (trl.SFTTrainer, LabelSmoothingSFTTrainer):
        torch.manual_seed(5)
        trainer = trainer_of(tmp_path, trainer_class, peft_config=config(), label_smoothing_factor=0.0, max_steps=2)
        found.append([{name: record[name] for name in ("loss", "grad_norm", *METRICS)} for record in records(trainer)])
    if tuning == "lora":
        assert trainer._head is not None
    if tuning == "prompt":  # TRL sums the loss of every token and divides by their number without the first of each row
        tokens = sum(LENGTHS) + len(LENGTHS)
        for record in found[0]:
            record["loss"] *= (tokens - len(LENGTHS)) / tokens
            record["grad_norm"] *= (tokens - len(LENGTHS)) / tokens
        found = [rows[:1] for rows in found]  # the second step starts from other weights
    assert_close(*found)


def test_router_loss_is_kept_and_logged(tmp_path):
    stock, ours = both(tmp_path, lambda: build("mixtral")[0], names=("loss", "aux_loss", *METRICS), label_smoothing_factor=0.0)
    assert ours[0]["aux_loss"] > 1
    assert_close(ours, stock)


def test_evaluation_reports_both_kinds_of_metrics(tmp_path):
    rows = texts()
    results = {}
    for trainer_class in (trl.SFTTrainer, LabelSmoothingSFTTrainer):
        trainer = trainer_of(
            tmp_path, trainer_class, build("llama", torch.float64)[0], eval_rows=rows, label_smoothing_factor=0.0,
            per_device_eval_batch_size=8,
        )  # fmt: skip
        results[trainer_class] = trainer.evaluate() | trainer.state.log_history[-1]
    stock, ours = results.values()
    for name in ("loss", "entropy", "mean_token_accuracy"):
        assert ours[f"eval_{name}"] == pytest.approx(stock[f"eval_{name}"], rel=1e-4)
    assert ours["eval_accuracy"] == pytest.approx(stock["eval_mean_token_accuracy"])
    assert ours["eval_nll"] == ours["eval_loss"]
    for size in (1, 3):
        trainer.args.per_device_eval_batch_size = size
        again = trainer.evaluate()
        for name in ("nll", "brier", "ece", "accuracy", "signed_gap", "perplexity", "eos_nll", "eos_ece"):
            assert again[f"eval_{name}"] == pytest.approx(ours[f"eval_{name}"], abs=1e-9)
    assert trainer.token_calibration.sequences == len(LENGTHS)


def test_logits_asked_for_by_metrics_are_real(tmp_path):
    rows, seen = texts(), {}
    trainer = trainer_of(tmp_path, LabelSmoothingSFTTrainer, eval_rows=rows, per_device_eval_batch_size=8)
    trainer.compute_metrics = lambda p: seen.update(shape=p.predictions.shape) or {}
    metrics = trainer.evaluate()
    trainer.compute_metrics = None
    assert seen["shape"] == (8, max(LENGTHS) + 1, VOCAB)
    assert trainer.evaluate()["eval_nll"] == pytest.approx(metrics["eval_nll"], rel=1e-6)


def test_a_temperature_is_fitted_without_logits(tmp_path):
    rows = texts()
    trainer = trainer_of(tmp_path, LabelSmoothingSFTTrainer, eval_rows=rows, max_steps=30, num_train_epochs=30, learning_rate=0.5)
    records(trainer)
    free = trainer.fit_temperature(trainer.eval_dataset)
    trainer._head, trainer._logits_free = None, "off"
    assert free == pytest.approx(trainer.fit_temperature(trainer.eval_dataset), rel=1e-4)


def test_trls_defaults_are_kept(tmp_path):
    ours, stock = (cls(str(tmp_path), use_cpu=True) for cls in (LabelSmoothingSFTConfig, trl.SFTConfig))
    for name in ("learning_rate", "logging_steps", "gradient_checkpointing", "bf16", "max_length"):
        assert getattr(ours, name) == getattr(stock, name)
    assert isinstance(ours, LabelSmoothingArguments)
    with pytest.raises(ValueError, match="greater_is_better=False"):
        LabelSmoothingSFTConfig(str(tmp_path), use_cpu=True, metric_for_best_model="ece", greater_is_better=True)


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
def test_other_losses_of_trl_are_refused(tmp_path, epsilon):
    for loss, remedy in (("dft", "set label_smoothing_objective='dft'"), ("sigmoid", "leave it out")):
        with pytest.raises(ValueError, match=f"loss_type='nll', got '{loss}'; {remedy}"):
            trainer_of(tmp_path, LabelSmoothingSFTTrainer, loss_type=loss, label_smoothing_factor=epsilon)


def test_plain_arguments_are_refused_and_trls_own_are_taken(tmp_path):
    with pytest.raises(TypeError, match="LabelSmoothingSFTConfig"):
        LabelSmoothingSFTTrainer(
            model=build("llama")[0], args=arguments(tmp_path, LabelSmoothingArguments), train_dataset=texts()
        )
    args = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], label_smoothing_factor=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # TRL's that smoothing is deprecated
        trainer = LabelSmoothingSFTTrainer(
            model=build("llama")[0], args=args, train_dataset=texts(), processing_class=tokenizer()
        )
    assert (trainer.smoothing.epsilon, trainer.args.label_smoothing_factor) == (0.2, 0.2)


def test_without_trl_the_error_says_what_to_install():
    code = "import sys; sys.modules['trl'] = None; from hf_ls import LabelSmoothingSFTTrainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install 'hf_ls[trl]'" in done.stderr.splitlines()[-1]


def test_every_model_here_is_known():
    assert {"llama", "gemma2", "granite", "cohere", "mixtral"} <= MODELS.keys()


def test_examples_which_max_length_drops_are_counted_and_not_all_of_them(tmp_path, caplog):
    """TRL cuts prompts and completions to `max_length` and drops what has no label left, without a word."""

    def rows(*prompts):
        return Dataset.from_dict({"prompt": [words(n, n) for n in prompts], "completion": [f" {words(2, 1)}"] * len(prompts)})

    given = rows(10, 2, 11, 2, 12, 2, 13, 2)
    trainer = trainer_of(tmp_path, LabelSmoothingSFTTrainer, rows=given, eval_rows=given, max_length=8)
    said = [record.getMessage() for record in caplog.records if "are dropped" in record.getMessage()]
    assert len(trainer.train_dataset) == 4
    assert [text.split(" are dropped")[0] for text in said] == ["train: 4 of 8 examples", "eval: 4 of 8 examples"]
    with pytest.raises(ValueError, match="a token to learn within max_length=8, got none of 3"):
        trainer_of(tmp_path, LabelSmoothingSFTTrainer, rows=rows(10, 11, 12), max_length=8)
