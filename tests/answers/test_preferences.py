"""Pairs of texts: the tokens and the loss of TRL's RewardTrainer, the honest numbers of two choices, and the files left behind."""

from __future__ import annotations

import numpy as np
import pytest
import sft_rows
import torch
import transformers as tf
from datasets import Dataset
from transformers import DataCollatorForMultipleChoice
from trl import RewardConfig, RewardTrainer

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer
from hf_ls.answers.preferences import compare_pairs, preference_pairs
from hf_ls.data.classification import EMBEDDED_MODEL, model_path
from hf_ls.metrics.core import PredictionStatistics, ece

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    found = tf.AutoTokenizer.from_pretrained(model_path(EMBEDDED_MODEL))
    found.eos_token, found.chat_template = "[SEP]", TEMPLATE
    return found


def reward_model(tokenizer, **settings):
    return sft_rows.reward_model(**{"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **settings})


def texts(n=12):
    words = ["good", "bad", "fine", "poor", "a long and winding answer"]
    rows = [(f"question {i} ", f"{words[i % 5]} {i}", f"{words[(i + 2) % 5]} {i}") for i in range(n)]
    return Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows, strict=True)), strict=True)))


def messages(n=12):
    def row(example):
        said = {side: [{"role": "assistant", "content": example[side]}] for side in ("chosen", "rejected")}
        return {"prompt": [{"role": "user", "content": example["prompt"]}]} | said

    return Dataset.from_list([row(example) for example in texts(n)])


def trainer_of(tokenizer, folder, data, **settings):
    arguments = LabelSmoothingArguments(folder, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **settings)
    return LabelSmoothingTrainer(
        model=compare_pairs(reward_model(tokenizer)), args=arguments, train_dataset=data, eval_dataset=data,
        data_collator=DataCollatorForMultipleChoice(tokenizer), processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("data", [texts, messages])
def test_tokens_and_loss_are_those_of_trl(tokenizer, tmp_path, data):
    arguments = RewardConfig(
        str(tmp_path), use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False, max_length=64,
        per_device_train_batch_size=12, disable_dropout=False,
    )  # fmt: skip
    theirs = RewardTrainer(model=reward_model(tokenizer), args=arguments, train_dataset=data(), processing_class=tokenizer)
    rows = preference_pairs(data(), tokenizer, max_length=64)
    assert [row["input_ids"] for row in rows] == [[row["chosen_ids"], row["rejected_ids"]] for row in theirs.train_dataset]
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(12)])
    expected = theirs.compute_loss(theirs.model, dict(batch))
    ours = trainer_of(tokenizer, tmp_path / "ours", rows)
    found = ours.compute_loss(ours.model.train(), DataCollatorForMultipleChoice(tokenizer)(list(rows)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_the_loss_is_a_smoothed_bradley_terry_and_the_numbers_are_of_the_pairs(tokenizer, tmp_path, epsilon):
    rows = preference_pairs(texts(), tokenizer)
    trainer = trainer_of(
        tokenizer, tmp_path, rows, label_smoothing_factor=epsilon, label_smoothing_convention="wrong", max_steps=3,
        per_device_train_batch_size=4, gradient_accumulation_steps=3, per_device_eval_batch_size=5, learning_rate=0.0, logging_steps=1,
    )  # fmt: skip
    plain = reward_model(tokenizer).double().eval()
    with torch.no_grad():
        rewards = np.array([[plain(torch.tensor([ids])).logits.item() for ids in row["input_ids"]] for row in rows])
    margin = rewards[:, 0] - rewards[:, 1]
    right, wrong = np.log1p(np.exp(-margin)), np.log1p(np.exp(margin))
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(((1 - epsilon) * right + epsilon * wrong).mean(), abs=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_nll"] == metrics["eval_loss"] == pytest.approx(right.mean(), abs=1e-6)
    assert metrics["eval_accuracy"] == pytest.approx((margin > 0).mean())
    stats = PredictionStatistics.from_logits(rewards, np.zeros(len(rows), int))
    assert metrics["eval_ece"] == pytest.approx(ece(stats.confidence, stats.correct), abs=1e-6)
    assert "eval_f1_macro" not in metrics  # 0 and 1 are places, no classes


def test_what_is_saved_is_the_reward_model(tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, tmp_path, preference_pairs(texts(), tokenizer), max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is tf.LlamaForSequenceClassification and again.config.num_labels == 1
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, trainer.model.state_dict()[name], rtol=0, atol=0)


def test_what_is_no_pair_or_no_reward_model_is_refused(tokenizer, tmp_path, caplog):
    with pytest.raises(ValueError, match="columns chosen and rejected"):
        preference_pairs(texts().rename_column("chosen", "better"), tokenizer)
    same = texts().map(lambda row: {"rejected": row["chosen"]})
    with pytest.raises(ValueError, match="two different texts"):
        preference_pairs(same, tokenizer)
    with pytest.raises(ValueError, match="max_length=2"):
        preference_pairs(texts(), tokenizer, max_length=2)
    assert len(preference_pairs(texts(), tokenizer, max_length=8)) < 12 and "are longer than max_length=8" in caplog.text
    with pytest.raises(ValueError, match="num_labels=1"):
        compare_pairs(reward_model(tokenizer, num_labels=2))
    model = reward_model(tokenizer)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="padding token"):
        compare_pairs(model)
