"""What a model's own loss adds to the cross entropy of its logits is trained on, once and with its gradient, or refused."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from head_models import batch, build
from helpers import VOCAB, arguments, collate, token_rows
from model_sweep import examine
from tiny_models import tiny_model
from torch import Tensor, nn

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer
from hf_ls.trainer.shift import own_loss, without_cross_entropy


def llama(dtype: torch.dtype = torch.float32) -> Any:
    model = build("llama")[0].to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    return model


def adalora(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], orth_reg_weight=0.5
    )
    return peft.get_peft_model(llama(dtype), config)


def shadow(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(llama(dtype), peft.ShadowConfig(task_type="CAUSAL_LM", shadow_dropout=0.0))


def mixture(dtype: torch.dtype = torch.float32) -> Any:
    return build("mixtral")[0].to(dtype)


def jetmoe(dtype: torch.dtype = torch.float32) -> Any:
    """Its coefficient has another name."""
    return tiny_model("jetmoe", "JetMoeForCausalLM", output_router_logits=True, aux_loss_coef=0.3).to(dtype)


def vision_mixture(dtype: torch.dtype = torch.float32) -> Any:
    """Its coefficient stands in the config of its text model."""
    model = tiny_model("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration").to(dtype)
    model.config.text_config.output_router_logits = True
    model.config.text_config.router_aux_loss_coef = 0.3
    return model


ADDING = {"adalora": adalora, "shadow": shadow, "mixtral": mixture, "jetmoe": jetmoe, "qwen3_vl_moe": vision_mixture}


def inputs_for(model: Any, seed: int = 0) -> dict[str, Tensor]:
    found = batch("causal", seed)
    top = model.get_input_embeddings().num_embeddings
    return {n: torch.where(v == -100, v, 90 + v % (top - 90)) if n != "attention_mask" else v for n, v in found.items()}


def trainer_of(folder: Any, model: Any, **kwargs: Any) -> LabelSmoothingTrainer:
    shift = {"shift_labels": kwargs.pop("shift_labels")} if "shift_labels" in kwargs else {}
    trainer = LabelSmoothingTrainer(model=model, args=arguments(folder, LabelSmoothingArguments, **kwargs), **shift)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def gradient(model: nn.Module) -> Tensor:
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in model.parameters()]
    model.zero_grad()
    return torch.cat(parts)


@pytest.mark.parametrize("shift", [None, True])
@pytest.mark.parametrize("logits_free", ["auto", "off"])
@pytest.mark.parametrize("name", ADDING)
def test_at_epsilon_zero_the_loss_and_its_gradient_are_the_models_own(tmp_path, name, logits_free, shift):
    model = ADDING[name]().train()
    inputs = inputs_for(model)
    own = model(**inputs).loss
    own.backward()
    expected = gradient(model)
    trainer = trainer_of(tmp_path, model, label_smoothing_logits_free=logits_free, label_smoothing_factor=0.0, shift_labels=shift)
    count = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
    loss = trainer.compute_loss(model.train(), inputs, num_items_in_batch=count)
    loss.backward()
    assert trainer._added
    # SHADOW calls the head twice.
    assert (trainer._head is not None) == (logits_free == "auto" and name != "shadow")
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    assert float((gradient(model) - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("name", ADDING)
def test_half_precision_hides_no_term(tmp_path, name):
    model = ADDING[name](torch.bfloat16).train()
    inputs = inputs_for(model)
    trainer = trainer_of(tmp_path, model, label_smoothing_factor=0.0)
    count = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
    loss = trainer.compute_loss(model.train(), inputs, num_items_in_batch=count)
    with torch.no_grad():
        outputs = model(**inputs)
    kept = inputs["labels"][:, 1:] != -100
    nll = F.cross_entropy(outputs.logits[:, :-1][kept].float(), inputs["labels"][:, 1:][kept])
    added = float(outputs.loss - nll)
    assert added > 1e-2
    assert float(loss.detach() - nll) == pytest.approx(added, rel=0.05)


def test_accumulated_batches_share_the_added_term_and_epsilon_leaves_it_alone(tmp_path):
    model = adalora().train()
    inputs = inputs_for(model)
    trainer = trainer_of(tmp_path, model, label_smoothing_factor=0.0)
    count = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
    losses = {}
    for steps in (1, 4):
        trainer.current_gradient_accumulation_steps = steps
        losses[steps] = trainer.compute_loss(model, inputs, num_items_in_batch=count).item()
    with torch.no_grad():
        own = model(**inputs)
    nll = F.cross_entropy(own.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    added = float(own.loss - nll)
    assert losses[1] - losses[4] == pytest.approx(added * 3 / 4, rel=1e-3)
    smoothed = trainer_of(tmp_path, model, label_smoothing_factor=0.1)
    count = smoothed._get_num_items_in_batch([inputs], torch.device("cpu"))
    wanted = F.cross_entropy(own.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), label_smoothing=0.1)
    assert smoothed.compute_loss(model, inputs, num_items_in_batch=count).item() == pytest.approx(float(wanted) + added, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_over_other_labels_is_refused_with_the_reason(tmp_path, dtype):
    """CPT counts its context tokens too, 0.4 % of the loss here."""
    torch.manual_seed(1)
    config = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1, 1, 1, 1], cpt_tokens_type_mask=[1, 2, 3, 4]
    )
    model = peft.get_peft_model(llama(dtype), config)
    with pytest.raises(ValueError, match=r"got one over \d+ labels, others than those or weighted"):
        trainer_of(tmp_path, model).compute_loss(model.train(), inputs_for(model))


class Pair(nn.Module):
    """(loss, logits) with labels and (logits,) without, as many tutorials write it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return (out.logits,) if labels is None else (out.loss, out.logits)


def test_a_loss_in_a_tuple_is_found(tmp_path):
    torch.manual_seed(0)
    model = Pair()
    inputs = inputs_for(model.inner)
    trainer = trainer_of(tmp_path, model, label_smoothing_factor=0.0)
    with torch.no_grad():
        own = model(**inputs)[0].item()
    assert trainer.compute_loss(model.train(), inputs).item() == pytest.approx(own, rel=1e-5)
    assert trainer._shift is True


class TwoLabels(tf.LlamaForCausalLM):
    """A second label input, for a second task (GraniteDocling)."""

    def forward(self, *args: Any, labels: Tensor | None = None, router_labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = super().forward(*args, labels=labels, **kwargs)
        if router_labels is not None:
            score = out.logits[..., 0].mean(-1) if out.logits.numel() else self.model.norm.weight.sum().expand(len(router_labels))
            second = F.binary_cross_entropy_with_logits(score, router_labels)
            out.loss = second if out.loss is None else out.loss + second
        return out


def test_a_second_label_input_stays_an_input_and_its_loss_is_kept(tmp_path):
    model = TwoLabels(llama().config)
    model.load_state_dict(llama().state_dict())
    inputs = inputs_for(model) | {"router_labels": torch.tensor([0.0, 1, 1, 0, 1, 0])}
    trainer = trainer_of(tmp_path, model, label_smoothing_factor=0.0, label_smoothing_logits_free="off")
    assert trainer.label_names == ["labels"]
    with torch.no_grad():
        own = model(**inputs).loss.item()
    assert trainer.compute_loss(model.train(), inputs).item() == pytest.approx(own, rel=1e-5)


def test_only_the_named_calls_of_cross_entropy_are_silenced():
    logits, labels = torch.randn(4, 7), torch.tensor([1, 2, 3, -100])
    with without_cross_entropy((1,)):
        found = [F.cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none"), nn.NLLLoss()(logits, labels)]
    assert [f.abs().sum().item() > 0 for f in found] == [True, False, True]
    assert found[1].shape == labels.shape
    with pytest.raises(ValueError, match="got 0"), without_cross_entropy((0,)):
        pass


def test_a_model_without_labels_has_no_own_loss():
    assert own_loss(nn.Linear(2, 2), lambda: {"input": torch.ones(1, 2), "labels": torch.ones(1)}, [()], []).value is None


@pytest.mark.parametrize(
    ("mapping", "kind", "name"),
    [
        ("SPEECH_SEQ_2_SEQ", "whisper", "WhisperForConditionalGeneration"),
        ("SEQ_TO_SEQ_CAUSAL_LM", "m2m_100", "M2M100ForConditionalGeneration"),
        ("SEQ_TO_SEQ_CAUSAL_LM", "blenderbot", "BlenderbotForConditionalGeneration"),
        ("CAUSAL_LM", "hyperclovax", "HyperCLOVAXForCausalLM"),
        ("CAUSAL_LM", "mpt", "MptForCausalLM"),
        ("CAUSAL_LM", "minicpm3", "MiniCPM3ForCausalLM"),
        ("CAUSAL_LM", "dbrx", "DbrxForCausalLM"),
        ("IMAGE_TEXT_TO_TEXT", "aya_vision", "AyaVisionForConditionalGeneration"),
        ("IMAGE_TEXT_TO_TEXT", "blip", "BlipForConditionalGeneration"),
        ("IMAGE_TEXT_TO_TEXT", "idefics", "IdeficsForVisionText2Text"),
    ],
)
def test_classes_of_transformers_are_exact_without_logits(mapping, kind, name):
    """A few of the sweep: decoder inputs made in the forward alone; heads whose factor no config names as others do."""
    outcome = examine(mapping, kind, name)
    assert (outcome.state, outcome.reason, outcome.logits_free) == ("exact", "", "yes")


def test_a_classifier_which_could_make_decoder_inputs_of_labels_does_not():
    """T5Gemma2 inherits the method, and makes them of its `input_ids`."""
    assert examine("TOKEN_CLASSIFICATION", "t5gemma2", "T5Gemma2ForTokenClassification").state == "exact"


def test_rows_of_an_image_before_the_text_are_refused_with_the_reason(tmp_path):
    """GIT has as many logits as patches and tokens together, and labels for the tokens."""
    model, ids = tiny_model("git", "GitForCausalLM"), torch.randint(90, 97, (2, 6))
    inputs = {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(2, 3, 28, 28)}
    with pytest.raises(ValueError, match="one row of logits per label from GitForCausalLM, got 11 for 6 labels: it puts rows"):
        trainer_of(tmp_path, model).compute_loss(model.train(), inputs)


def test_evaluation_and_the_users_batch_stay_as_they_are(tmp_path):
    model, rows = mixture(), token_rows()
    trainer = trainer_of(tmp_path, model, label_smoothing_factor=0.1)
    inputs = collate(rows.rows)
    before = copy.deepcopy(inputs)
    loss = trainer.compute_loss(model.eval(), inputs).item()
    assert all(torch.equal(inputs[name], before[name]) for name in before)
    logits = model(**inputs).logits
    assert loss == pytest.approx(
        F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()).item(), rel=1e-5
    )
    assert logits.shape[-1] > VOCAB
