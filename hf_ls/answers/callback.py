"""Answers to questions in every evaluation of a Trainer, so that an SFT can be followed, and chosen, by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Trainer, TrainerCallback

from hf_ls.answers.questions import Question
from hf_ls.answers.scoring import answer_logits
from hf_ls.metrics.core import PredictionStatistics, aurc, ece, signed_gap


class AnswerCallback(TrainerCallback):
    """Adds `eval_answer_accuracy`, `…_nll`, `…_brier`, `…_ece`, `…_signed_gap` and `…_aurc` of some questions to each evaluation.

    `trainer.add_callback(AnswerCallback(trainer, questions))`; `metric_for_best_model="answer_nll"` then chooses by them. The
    numbers are those of `answer_logits` with the options given; every process computes them all.

    trainer: of a causal language model, with its tokenizer as `processing_class`. questions: as in `answer_logits`, each with its
    `answer`.

    Raises: ValueError for a question without its answer, and for a Trainer without a tokenizer.
    """

    def __init__(self, trainer: Trainer, questions: Sequence[Any], **options: Any) -> None:
        """options: those of `answer_logits`."""
        self._trainer, self._options = trainer, options
        self._questions = [Question.of(question) for question in questions]
        places = [question.answer for question in self._questions]
        if not places or None in places:
            got = f"none for question {places.index(None)}" if places else "no question"
            raise ValueError(f"expected questions with an answer, got {got}; give its place among the options")
        if getattr(trainer, "processing_class", None) is None:
            raise ValueError("expected a Trainer with a tokenizer, got none; pass processing_class=tokenizer to it")
        self._answers: list[int] = [place or 0 for place in places]
        self._known: tuple[int, dict[str, float]] | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Add the metrics to those of the evaluation, and log them."""
        trainer = self._trainer
        # Once for several sets of evaluation data in a training; after it other weights may be there at the same step.
        if not trainer.is_in_train or self._known is None or self._known[0] != state.global_step:
            tokenizer: Any = trainer.processing_class
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor for images and text
            with trainer.compute_loss_context_manager():
                logits = answer_logits(trainer.model, tokenizer, self._questions, **self._options)
            stats = PredictionStatistics.from_logits(logits, self._answers)
            pair = stats.confidence, stats.correct
            values = {"accuracy": stats.correct.mean(), "nll": stats.nll.mean(), "brier": stats.brier.mean()}
            values |= {"ece": ece(*pair), "signed_gap": signed_gap(*pair), "aurc": aurc(*pair)}
            found = {f"eval_answer_{name}": float(value) for name, value in values.items()}
            self._known = state.global_step, found
            trainer.log(found)
        if metrics is not None:
            metrics.update(self._known[1])
