"""Reward models: a pair of texts, one of which was preferred, is an example of two choices whose logits are the two rewards.

The loss of Bradley and Terry, −log σ(r_chosen − r_rejected), is the cross entropy of those logits, so that the Trainers smooth
and measure it as that of any classifier: `ece` is that of P(chosen is preferred), and ε with convention "wrong" is the chance
that a pair was labelled the wrong way round (Mitchell 2023, conservative DPO).
"""

from __future__ import annotations

import logging
from typing import Any

import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_ls.common.models import COMPARES_PAIRS, no_cache

logger = logging.getLogger(__name__)


def compare_pairs(model: PreTrainedModel) -> PreTrainedModel:
    """The same reward model with a forward over pairs: input_ids [B, 2, T], the chosen text first, to logits [B, 2].

    loss = −log σ(r_0 − r_1) for label 0, in nats, with r the reward of each text. Its weights, config and saved files stay those
    of the reward model (`AutoModelForSequenceClassification` with `num_labels=1`).

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForSequenceClassification
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> config = LlamaConfig(vocab_size=9, pad_token_id=0, num_labels=1, **sizes)
    >>> model = compare_pairs(LlamaForSequenceClassification(config))
    >>> model(input_ids=torch.tensor([[[1, 2, 3], [1, 4, 0]]])).logits.shape
    torch.Size([1, 2])

    Raises: ValueError for a model with another number of labels than one, or without a padding token where it needs one.
    """
    labels, kind = getattr(model.config, "num_labels", None), type(model).__name__
    if labels != 1 or "SequenceClassification" not in kind:
        raise ValueError(
            f"expected a reward model, got {kind} with num_labels={labels}; load it with "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)"
        )
    if getattr(model.config.get_text_config(), "pad_token_id", None) is None:
        raise ValueError(
            "expected a padding token, got config.pad_token_id=None: the reward is read at the last token which is none; set "
            "model.config.pad_token_id = tokenizer.pad_token_id"
        )
    rewards_of, without_cache = model.forward, no_cache(model)

    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        rewards = rewards_of(input_ids=input_ids.flatten(0, 1), attention_mask=mask, **without_cache).logits
        logits = rewards.view(input_ids.shape[:2])
        return SequenceClassifierOutput(loss=None if labels is None else F.cross_entropy(logits.float(), labels), logits=logits)

    model.forward = forward
    setattr(model, COMPARES_PAIRS, True)
    return model


def preference_pairs(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = 1024) -> Dataset:
    """Rows for `DataCollatorForMultipleChoice`: input_ids and attention_mask [2][T], the chosen text first, and label 0.

    Args:
        dataset: columns `chosen` and `rejected`, perhaps `prompt` before both: texts, or lists of messages, as TRL takes them.
        max_length: longer pairs are dropped with a warning, since the end of a text is what the reward is for. None: no limit.

    Raises: ValueError for other columns, for pairs of two equal texts (one of them cannot be preferred), and where none is left.
    """
    if missing := {"chosen", "rejected"} - set(dataset.column_names):
        raise ValueError(f"expected columns chosen and rejected, got {dataset.column_names}; rename or make {sorted(missing)}")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        both = [_ids(row.get("prompt"), row[side], tokenizer) for side in ("chosen", "rejected")]
        return {"input_ids": both, "attention_mask": [[1] * len(ids) for ids in both], "labels": 0}

    found = dataset.map(encode, remove_columns=dataset.column_names)
    equal = next((i for i, both in enumerate(found["input_ids"]) if both[0] == both[1]), None)
    if equal is not None:
        raise ValueError(f"expected two different texts, got the same tokens twice in row {equal}; drop such pairs")
    if max_length is None:
        return found
    kept = found.filter(lambda row: max(len(ids) for ids in row["input_ids"]) <= max_length)
    if not len(kept):
        raise ValueError(f"expected pairs within max_length={max_length}, got none of {len(found)}; raise max_length")
    if len(kept) < len(found):
        logger.warning("%d of %d pairs are longer than max_length=%d and dropped", len(found) - len(kept), len(found), max_length)
    return kept


def _ids(prompt: Any, answer: Any, tokenizer: Any) -> list[int]:
    """The tokens of a prompt with an answer: of messages by the chat template, of texts with the end of sequence."""
    whole = answer if prompt is None else prompt + answer
    if isinstance(whole, str):
        end = tokenizer.eos_token or ""
        return tokenizer(whole if whole.endswith(end) else whole + end)["input_ids"]
    return tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"]
