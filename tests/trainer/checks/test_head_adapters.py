"""The logits-free forward under PEFT: adapters of the body, of the head, prefixes and prompts."""

from __future__ import annotations

import logging
import math
from typing import Any

import peft
import pytest
import torch
from head_models import (
    BATCH,
    EPSILON,
    Largest,
    assert_same_gradients,
    batch,
    build,
    dense_loss,
    gradients,
    prepared,
    reasons,
    trained,
)
from helpers import Rows

from hf_ls import Smoothing
from hf_ls.trainer.logits_free import LogitsFreeHead


def lora(model: Any, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.0, **kwargs))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


@pytest.mark.parametrize(
    "kwargs", [dict(target_modules=["lm_head", "q_proj"]), dict(target_modules=["q_proj"], modules_to_save=["lm_head"])]
)
def test_an_adapter_on_the_head_falls_back_with_one_reason(tmp_path, caplog, kwargs):
    with caplog.at_level(logging.WARNING):
        auto, ours, trainer = trained(tmp_path, lora(build("llama")[0], **kwargs), "causal", "auto", max_steps=2)
    assert trainer._head is None
    assert len(reasons(caplog)) == 1
    assert "plain nn.Linear" in reasons(caplog)[0]
    off, dense, _ = trained(tmp_path, lora(build("llama")[0], **kwargs), "causal", "off", max_steps=2)
    assert auto == off
    assert all(torch.equal(ours[name], dense[name]) for name in ours)


def test_lora_on_the_body_is_exact_and_makes_no_gradient_of_the_frozen_head():
    model = lora(build("llama")[0], target_modules=["q_proj", "v_proj"]).double().train()
    inputs, labels = prepared(model, "causal")
    dense_loss(model, inputs, labels).backward()
    expected = gradients(model)
    head = LogitsFreeHead(model)
    head.probe(model, inputs, labels)
    with Largest() as made:
        head(model, inputs, labels, Smoothing(EPSILON)).loss.backward()
    found = gradients(model)
    assert found
    assert all("lora" in name for name in found)
    assert_same_gradients(found, expected, 1e-10)
    assert tuple(model.get_output_embeddings().weight.shape) not in made.shapes


def prefixed(model: Any) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


@pytest.mark.parametrize("adapted", [lambda model: lora(model, target_modules=["q_proj"]), prefixed], ids=["lora", "prefix"])
def test_adapters_of_the_body_train_alike(tmp_path, adapted):
    (on, ours, trainer), (off, dense, _) = (
        trained(tmp_path, adapted(build("llama")[0]), "causal", mode, learning_rate=0.1) for mode in ("on", "off")
    )
    assert trainer._head is not None
    assert on[0] == pytest.approx(off[0], rel=1e-5)
    assert all(torch.allclose(ours[name], dense[name], atol=1e-6) for name in ours)


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
def test_prompt_tuning_counts_the_label_which_the_last_virtual_token_predicts(tmp_path, epsilon):
    def prompted() -> Any:
        torch.manual_seed(3)
        return peft.get_peft_model(build("llama")[0], peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))

    inputs = batch("causal")
    inputs["labels"][:, 0] = inputs["input_ids"][:, 0]
    whole = Rows([{name: value[i] for name, value in inputs.items()} for i in range(BATCH)])
    (on, ours, trainer), (off, dense, _) = (
        trained(tmp_path, prompted(), "causal", mode, trainer_kwargs=dict(train_dataset=whole), label_smoothing_factor=epsilon)
        for mode in ("on", "off")
    )
    assert on[0] == pytest.approx(off[0], rel=1e-5)
    assert all(torch.allclose(ours[name], dense[name], atol=1e-6) for name in ours)
    assert on[0]["nll"] == pytest.approx(prompted()(**inputs).loss.item(), rel=1e-5)
    assert math.isfinite(trainer.evaluate()["eval_nll"])
