"""The tasks: which model class, trainer, collator and Hub name belong to each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from hf_ls.run.arguments import DataArguments
from hf_ls.trainer.arguments import LabelSmoothingSeq2SeqArguments
from hf_ls.trainer.mixin import LabelSmoothingTrainer
from hf_ls.trainer.seq2seq import LabelSmoothingSeq2SeqTrainer


@dataclass(frozen=True)
class Task:
    """What a task is made of.

    Args:
        hub_task: the pipeline tag on the Hub.
        trainer: (model=..., args=..., ...) -> the Trainer, as its class. arguments: (training, data) -> what its args are.
        collator: (tokenizer, model) -> data collator, None for that of the Trainer.
        has_classes: labels are named classes, not a vocabulary; per_token: one label per token, not per example.
        peft_task: name of peft's TaskType.
    """

    hub_task: str
    auto_model: Any
    trainer: Callable[..., Any]
    collator: Callable[[Any, Any], Any]
    has_classes: bool
    per_token: bool
    peft_task: str
    arguments: Callable[[LabelSmoothingSeq2SeqArguments, DataArguments], Any] = lambda training, data: training


def _token_collator(tokenizer: Any, model: Any) -> DataCollatorForTokenClassification:
    return DataCollatorForTokenClassification(tokenizer)  # pads inputs and labels alike, which language models need too


def _sft_trainer(**settings: Any) -> Any:
    from hf_ls.trainer.sft import LabelSmoothingSFTTrainer  # TRL comes with an extra

    return LabelSmoothingSFTTrainer(**settings)


def _sft_arguments(training: LabelSmoothingSeq2SeqArguments, data: DataArguments) -> Any:
    from hf_ls.trainer.sft import LabelSmoothingSFTConfig

    # The rows are tokenised and cut already: TRL packs those of train, where that is asked for.
    return LabelSmoothingSFTConfig.of(
        training, packing=data.packing, eval_packing=False, max_length=data.max_length if data.packing else None
    )


TASKS = {
    "text-classification": Task(
        "text-classification", AutoModelForSequenceClassification, LabelSmoothingTrainer,
        lambda tokenizer, model: DataCollatorWithPadding(tokenizer), True, False, "SEQ_CLS",
    ),
    "token-classification": Task(
        "token-classification", AutoModelForTokenClassification, LabelSmoothingTrainer, _token_collator, True, True, "TOKEN_CLS",
    ),
    "seq2seq": Task(
        "text2text-generation", AutoModelForSeq2SeqLM, LabelSmoothingSeq2SeqTrainer,
        lambda tokenizer, model: DataCollatorForSeq2Seq(tokenizer, model=model), False, True, "SEQ_2_SEQ_LM",
    ),
    "causal-lm": Task(
        "text-generation", AutoModelForCausalLM, LabelSmoothingTrainer, _token_collator, False, True, "CAUSAL_LM",
    ),
    "sft": Task(
        "text-generation", AutoModelForCausalLM, _sft_trainer, lambda tokenizer, model: None, False, True, "CAUSAL_LM",
        _sft_arguments,
    ),
}  # fmt: skip
