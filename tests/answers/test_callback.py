"""Answers in the evaluations of Trainers: their numbers, the log, and the best model by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from datasets import Dataset
from helpers import tiny_llama

import hf_ls
from hf_ls.trainer.sft import LabelSmoothingSFTConfig, LabelSmoothingSFTTrainer

QUESTIONS = [
    {"prompt": "Is water wet?\nAnswer:", "options": ["yes", "no"], "answer": 0},
    {"prompt": "Is fire cold?\nAnswer:", "options": ["yes", "no", "perhaps"], "answer": 1},
]


def sft(tmp_path: Any, **settings: Any) -> LabelSmoothingSFTTrainer:
    rows = [{"prompt": q["prompt"], "completion": f" {q['options'][q['answer']]}"} for q in QUESTIONS] * 4
    args = LabelSmoothingSFTConfig(
        str(tmp_path), eval_strategy="epoch", save_strategy="epoch", num_train_epochs=3, learning_rate=1e-2, report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True, **settings,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    return LabelSmoothingSFTTrainer(
        model=tiny_llama(vocab_size=280), args=args, train_dataset=data, eval_dataset=data, processing_class=byte_tokenizer()
    )


def test_each_evaluation_of_an_sft_has_the_answers_and_the_best_is_chosen_by_them(tmp_path):
    trainer = sft(tmp_path, load_best_model_at_end=True, metric_for_best_model="answer_nll")
    trainer.add_callback(hf_ls.AnswerCallback(trainer, QUESTIONS, batch_size=1))
    trainer.train()
    logged = [record["eval_answer_nll"] for record in trainer.state.log_history if "eval_answer_nll" in record]
    assert len(logged) == 3 and trainer.state.best_metric == min(logged) == logged[-1]
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(0.5)  # other weights at the same step
    found = trainer.evaluate()
    logits = hf_ls.answer_logits(trainer.model, byte_tokenizer(), QUESTIONS)
    assert found["eval_answer_nll"] == pytest.approx(hf_ls.metrics.nll(logits, [0, 1]), rel=1e-5)
    assert found["eval_answer_accuracy"] == np.mean(logits.argmax(1) == [0, 1])
    assert {"eval_answer_brier", "eval_answer_ece", "eval_answer_signed_gap", "eval_answer_aurc", "eval_nll"} <= found.keys()


def test_questions_without_answers_and_trainers_without_a_tokenizer_are_refused(tmp_path):
    trainer = sft(tmp_path)
    for questions, got in (([], "no question"), ([QUESTIONS[0], {"prompt": "Q:", "options": ["a", "b"]}], "none for question 1")):
        with pytest.raises(ValueError, match=f"expected questions with an answer, got {got}"):
            hf_ls.AnswerCallback(trainer, questions)
    trainer.processing_class = None
    with pytest.raises(ValueError, match="expected a Trainer with a tokenizer"):
        hf_ls.AnswerCallback(trainer, QUESTIONS)
