"""The logits-free forward against the model's own logits, on one tiny model per way of making logits."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from head_models import (
    BATCH,
    EPSILON,
    LENGTH,
    MODELS,
    VOCAB,
    Largest,
    assert_same_gradients,
    batch,
    build,
    dense_loss,
    gradients,
    logits_free,
    prepared,
    reasons,
    trained,
    trainer_of,
)
from helpers import arguments, classification_rows, collate, tiny_bert

from hf_ls import LabelSmoothingArguments, LabelSmoothingMixin, LabelSmoothingTrainer, Smoothing
from hf_ls.trainer.batch import Batch
from hf_ls.trainer.logits_free import LogitsFreeHead

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_all_gradients_are_those_of_the_logits(name, dtype):
    model, task = build(name, dtype)
    inputs, labels = prepared(model, task)
    dense = dense_loss(model, inputs, labels)
    dense.backward()
    expected = gradients(model)
    found = logits_free(model, inputs, labels)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(dense.item(), rel=TOLERANCE[dtype])
    assert found.outputs.logits.numel() == 0
    assert found.outputs.loss is found.loss
    assert ((found.nll + found.smoothing_term).sum() / (labels != -100).sum()).item() == pytest.approx(dense.item(), rel=1e-5)
    assert_same_gradients(gradients(model), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", MODELS)
def test_no_tensor_of_the_size_of_the_logits_is_made(name):
    model, task = build(name)
    inputs, labels = prepared(model, task)
    head = LogitsFreeHead(model)
    with Largest() as ours:
        head(model, inputs, labels, Smoothing(EPSILON)).loss.backward()
    assert ours.elements < BATCH * LENGTH * VOCAB
    with Largest() as dense:
        dense_loss(model, inputs, labels).backward()
    assert dense.elements >= BATCH * LENGTH * VOCAB


@pytest.mark.parametrize("name", MODELS)
def test_the_trainer_takes_the_same_step_without_logits(tmp_path, name):
    (on, ours, trainer), (off, dense, _) = (
        trained(tmp_path, *build(name), mode, learning_rate=100.0, gradient_accumulation_steps=2, per_device_train_batch_size=3)
        for mode in ("on", "off")
    )
    assert trainer._head is not None
    assert on[0] == pytest.approx(off[0], rel=1e-5)
    before = build(name)[0].state_dict()
    step, expected = (torch.cat([(weights[key] - before[key]).flatten() for key in ours]) for weights in (ours, dense))
    assert float((step - expected).norm() / expected.norm()) < 1e-5


def test_router_loss_is_kept_with_its_gradient(tmp_path):
    (on, ours, _), (off, dense, _) = (trained(tmp_path, *build("mixtral"), mode, learning_rate=0.1) for mode in ("on", "off"))
    assert on[0]["loss"] - on[0]["nll"] - on[0]["smoothing_term"] > 0.5
    assert on[0] == pytest.approx(off[0], rel=1e-5)
    gate = next(name for name in ours if "gate.weight" in name and "mlp" in name)
    before = dict(build("mixtral")[0].named_parameters())[gate]
    assert torch.allclose(ours[gate] - before, dense[gate] - before, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("smoothing", "class_weight"),
    [
        (Smoothing(0.2, "wrong"), None),
        (Smoothing(0.1, prior=torch.arange(1.0, VOCAB + 1) / (VOCAB * (VOCAB + 1) / 2)), None),
        (Smoothing(0.0), None),
        (Smoothing(0.1), torch.linspace(0.1, 3, VOCAB)),
    ],
    ids=["wrong", "prior", "zero", "class_weight"],
)
def test_every_smoothing_and_class_weights_train_alike(tmp_path, smoothing, class_weight):
    kwargs = dict(smoothing=smoothing, class_weight=class_weight)
    (on, ours, _), (off, dense, _) = (
        trained(tmp_path, *build("llama"), mode, trainer_kwargs=kwargs, label_smoothing_factor=0.0, learning_rate=0.1)
        for mode in ("on", "off")
    )
    assert on[0] == pytest.approx(off[0], rel=1e-5)
    assert all(torch.allclose(ours[name], dense[name], atol=1e-6) for name in ours)


class Odd(tf.LlamaForCausalLM):
    """Does something to its logits which no config names."""

    how = "scale"

    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, **kwargs)
        if self.how == "scale":
            out.logits = out.logits * 1.01
        elif self.how == "mask":
            out.logits = out.logits.masked_fill(torch.arange(VOCAB) == 4, float("-inf"))
        elif self.how == "view":
            out.logits = out.logits.view(*kwargs["input_ids"].shape, VOCAB)
        elif self.how == "cut":
            out.logits = out.logits[..., : VOCAB - 1]
        if labels is not None:
            out.loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return out


def odd(how: str) -> Any:
    model = Odd(build("llama")[0].config)
    model.load_state_dict(build("llama")[0].state_dict())
    model.how = how
    return model


@pytest.mark.parametrize(
    ("how", "word"),
    [("scale", "does something"), ("mask", "does something"), ("view", "empty logits"), ("cut", "as the head makes")],
)
def test_unknown_post_processing_falls_back_with_one_reason(tmp_path, caplog, how, word):
    # The masked class gets no label and, at epsilon 0, no mass.
    kwargs = dict(label_smoothing_factor=0.0, max_steps=3, num_train_epochs=3, learning_rate=0.1)
    with caplog.at_level(logging.WARNING):
        auto, ours, trainer = trained(tmp_path, odd(how), "causal", "auto", **kwargs)
    assert trainer._head is None
    assert len(reasons(caplog)) == 1
    assert word in reasons(caplog)[0]
    off, dense, _ = trained(tmp_path, odd(how), "causal", "off", **kwargs)
    assert auto == off
    assert all(torch.equal(ours[name], dense[name]) for name in ours)
    with pytest.raises(ValueError, match=word):
        trained(tmp_path, odd(how), "causal", "on", **kwargs)


def test_a_factor_is_noticed_on_a_new_head_whose_logits_are_all_zero(tmp_path, caplog):
    model = odd("scale")
    torch.nn.init.zeros_(model.lm_head.weight)
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, model, "causal", "auto")
    assert len(reasons(caplog)) == 1


def test_the_sft_trainer_of_trl_takes_the_mixin(tmp_path):
    trl = pytest.importorskip("trl")
    tokenizers = pytest.importorskip("tokenizers")

    class Mine(LabelSmoothingMixin, trl.SFTTrainer):
        pass

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    records = {}
    for trainer_class in (trl.SFTTrainer, Mine):
        args = trl.SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to=[], save_strategy="no", max_steps=1, logging_steps=1, disable_tqdm=True,
            label_smoothing_factor=EPSILON, per_device_train_batch_size=2, gradient_accumulation_steps=3, gradient_checkpointing=False,
        )  # fmt: skip
        rows = datasets.Dataset.from_dict({"input_ids": [row.tolist() for row in batch("causal")["input_ids"]]})
        trainer = trainer_class(model=build("llama")[0], args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        records[trainer_class] = trainer.state.log_history[0]
    assert trainer._head is not None
    assert records[Mine]["loss"] == pytest.approx(records[trl.SFTTrainer]["loss"], rel=1e-5)
    assert records[Mine]["grad_norm"] == pytest.approx(records[trl.SFTTrainer]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", ["bart", "llama", "t5"])
def test_outside_of_training_the_model_is_untouched(tmp_path, name):
    model, task = build(name)
    twin = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, model, task, "on", learning_rate=0.0)
    trainer.train()
    assert "forward" not in model.__dict__
    assert "forward" not in model.get_output_embeddings().__dict__
    assert list(model.state_dict()) == list(twin.state_dict())
    inputs = {k: v for k, v in batch(task).items() if k != "labels"}
    generate = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(other.eval().generate(**inputs, **generate), twin.eval().generate(**inputs, **generate))
    numbers = [{k: v for k, v in t.evaluate().items() if k in ("eval_nll", "eval_ece", "eval_accuracy")}
               for t in (trainer, trainer_of(tmp_path, twin, task, "off"))]  # fmt: skip
    assert numbers[0] == numbers[1]
    model.save_pretrained(tmp_path / "saved")
    assert type(model).from_pretrained(tmp_path / "saved").num_parameters() == twin.num_parameters()


def test_an_error_in_the_forward_leaves_the_model_untouched():
    model, task = build("llama")
    inputs, labels = prepared(model, task)
    with pytest.raises(ValueError, match="logits_to_keep"):
        LogitsFreeHead(model)(model, {**inputs, "logits_to_keep": 5}, labels, Smoothing(EPSILON))
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__
    assert model(**inputs).logits.shape == (BATCH, LENGTH, VOCAB)


def test_hooks_on_the_output_of_the_head_see_the_backward():
    """FSDP and ZeRO fetch the weights of a module again in such hooks."""
    model, task = build("llama")
    inputs, labels = prepared(model, task)
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: output.register_hook(seen.append) and None)
    LogitsFreeHead(model)(model, inputs, labels, Smoothing(EPSILON)).loss.backward()
    assert [gradient.numel() for gradient in seen] == [0]


def test_the_probe_draws_no_random_numbers_and_keeps_the_mode():
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    ).train()
    assert model.config.resid_pdrop > 0
    inputs, labels = prepared(model, "causal")
    before = torch.get_rng_state()
    LogitsFreeHead(model).probe(model, inputs, labels)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_gradient_checkpointing_is_exact(tmp_path, name, reentrant):
    (on, ours, _), (off, dense, _) = (
        trained(
            tmp_path, *build(name), mode, learning_rate=0.1, gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
        )
        for mode, checkpointing in (("on", True), ("off", False))
    )  # fmt: skip
    assert on[0] == pytest.approx(off[0], rel=1e-5)
    assert all(torch.allclose(ours[key], dense[key], atol=1e-6) for key in ours)


@pytest.mark.parametrize("name", ["t5", "llama", "gemma2", "bart"])
def test_bfloat16_autocast_is_as_close_as_the_logits_path(tmp_path, name):
    exact, _, _ = trained(tmp_path, *build(name), "off")
    runs = {mode: trained(tmp_path, *build(name), mode, bf16=True, learning_rate=0.1) for mode in ("on", "off")}
    before = dict(build(name)[0].named_parameters())
    for term in ("loss", "nll"):
        assert runs["on"][0][0][term] == pytest.approx(exact[0][term], rel=1e-2)
    steps = {mode: torch.cat([(run[1][k] - before[k]).flatten() for k in before]) for mode, run in runs.items()}
    assert float((steps["on"] - steps["off"]).detach().norm() / steps["off"].detach().norm()) < 0.05


def test_compiled_models_fall_back_with_one_reason(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        auto, _, trainer = trained(
            tmp_path, build("llama")[0], "causal", "auto", torch_compile=True, torch_compile_backend="eager"
        )
    assert trainer._head is None
    assert [reason for reason in reasons(caplog) if "torch.compile" in reason] == reasons(caplog)
    assert len(reasons(caplog)) == 1
    off, _, _ = trained(tmp_path, build("llama")[0], "causal", "off")
    assert auto[0] == pytest.approx(off[0], rel=1e-5)


def test_classifiers_keep_their_logits_without_a_word(tmp_path, caplog):
    def step(mode: str) -> LabelSmoothingTrainer:
        args = arguments(tmp_path, LabelSmoothingArguments, label_smoothing_factor=0.1, label_smoothing_logits_free=mode)
        trainer = LabelSmoothingTrainer(model=tiny_bert(), args=args, train_dataset=classification_rows(), data_collator=collate)
        trainer.train()
        return trainer

    with caplog.at_level(logging.WARNING):
        assert step("auto")._head is None
    assert not reasons(caplog)
    with pytest.raises(ValueError, match="language-model head, got none in BertForSequenceClassification"):
        step("on")


def test_outputs_asked_for_in_training_hold_real_logits(tmp_path):
    model, task = build("llama")
    trainer = trainer_of(tmp_path, model, task, "on")
    inputs = batch(task)
    loss = trainer.compute_loss(model, inputs)
    dense, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
    assert trainer._head is not None
    assert outputs.logits.shape == (BATCH, LENGTH, VOCAB)
    assert loss.item() == pytest.approx(dense.item(), rel=1e-5)


def test_unknown_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_logits_free in"):
        LabelSmoothingArguments(str(tmp_path), label_smoothing_logits_free="yes")


def test_the_probe_batch_is_small_and_holds_labels():
    labels = torch.full((3, 200), -100)
    labels[0, 190:] = 5
    labels[1, 20:180] = 5
    labels[2, 100:180] = 5
    inputs = dict(
        input_ids=torch.zeros(3, 200),
        token_type_ids=torch.zeros(3, 200),
        source=torch.arange(3)[:, None],
        labels=labels,
        flag=True,
    )
    small = Batch.read(inputs, ["labels"]).small()
    assert {k: tuple(v.shape) for k, v in small.others.items() if k != "flag"} == {
        "input_ids": (1, 128), "token_type_ids": (1, 128), "source": (1, 1)
    }  # fmt: skip
    assert small.labels.shape == small.given.shape == small.weight.shape == (1, 128)
    assert int(small.kept.sum()) >= 64
    assert small.others["source"].item() == 1
    assert small.others["flag"] is True
    few = Batch.read(dict(labels=labels[:1]), ["labels"]).small()
    assert few.labels.shape == (1, 200)
    images = dict(labels=labels, pixel_values=torch.zeros(3, 3, 8, 8))
    assert Batch.read(images, ["labels"]).small().labels.shape == (3, 200)
    prompted = Batch.read(inputs, ["labels"], shift=True, prompt=3).small()
    assert prompted.labels.shape == (1, 131) and prompted.given.shape == (1, 128)
