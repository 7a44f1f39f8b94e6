"""Embedding mixup: train classifiers between pairs of examples.

How: for the time of one forward the output e of the input embedding layer becomes λ·e + (1−λ)·e[partner]. The layer is still
called inside the model's forward, where DDP, FSDP and ZeRO have its weights, and the model still sees token ids: RoBERTa finds
its positions in them, decoder-only classifiers their last token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers.modeling_utils import unwrap_model

from hf_ls.common.models import IGNORE_INDEX, output_embedding

Per = Literal["batch", "example"]
_KNOWN = {"input_ids", "attention_mask", "token_type_ids"}


class MixedBatch(NamedTuple):
    """Example i is mixed from a share λ_i of itself and 1 − λ_i of its partner."""

    share: Tensor  # [B], 0 to 1
    partner: Tensor  # [B], a permutation

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as the mixed forward needs it: what either text has is there.

        Attention: every position where an example with a share above 0 has a token. Token and segment ids: of the example
        itself or, where only the partner has a token, of the partner; segments which differ: of the larger share.

        Raises: ValueError for inputs which cannot be mixed.
        """
        unknown = sorted(set(batch) - _KNOWN)
        if not isinstance(batch.get("input_ids"), Tensor):
            raise ValueError(f"expected input_ids with mixup, got {sorted(batch)}; give token ids, or set mixup_alpha=0")
        if unknown:
            raise ValueError(
                f"expected only {sorted(_KNOWN)} with mixup, got {unknown}: other inputs cannot be mixed; drop "
                "them from the batch, or set mixup_alpha=0"
            )
        present = self._present(batch)
        own, other = present & (self._column() > 0), present[self.partner] & (self._column() < 1)
        mixed = dict(batch)
        ids = batch["input_ids"]
        # An example without any share leaves not even its ids: some models look for padding there.
        theirs = (other & ~own) | (self._column() <= 0)
        mixed["input_ids"] = torch.where(theirs, ids[self.partner], ids)
        if batch.get("attention_mask") is not None:
            mixed["attention_mask"] = (own | other).to(batch["attention_mask"].dtype)
        segments = batch.get("token_type_ids")
        if segments is not None:
            mixed["token_type_ids"] = torch.where(other & (~own | (self._column() < 0.5)), segments[self.partner], segments)
        return mixed

    def forward(self, model: nn.Module, batch: Mapping[str, Any], **labels: Any) -> Any:
        """The outputs of one forward of `model`, wrapped or not, on the mixed embeddings of a batch.

        labels: given to the model as they are, for what its own loss adds.

        Raises: ValueError as `inputs`, and for a model which does not look its tokens up exactly once in one layer.
        """
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "expected one device per process with mixup, got nn.DataParallel; launch with torchrun or accelerate"
            )
        inputs, ids = self.inputs(batch), batch["input_ids"]
        present = self._present(batch).unsqueeze(-1)
        calls = []

        def own_ids(_: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Tensor], dict[str, Any]]:
            return (ids,), {}

        def mix(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            calls.append(output.shape)
            if output.shape[:-1] != ids.shape:
                raise ValueError(f"expected embeddings [{', '.join(map(str, ids.shape))}, d] to mix, got {tuple(output.shape)}")
            # Beyond its end a text is 0 there, as in Guo 2019: the embedding of padding is nobody's word.
            embedded = output * present.to(output.dtype)
            share = self._column().unsqueeze(-1).to(output.dtype)
            return share * embedded + (1 - share) * embedded[self.partner]

        layer = _input_embedding(model)
        handles = [layer.register_forward_pre_hook(own_ids, with_kwargs=True), layer.register_forward_hook(mix)]
        try:
            outputs = model(**inputs, **labels)
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != 1:
            raise ValueError(
                f"expected one call of the input embedding in a forward, got {len(calls)}: a compiled model, or one which "
                "uses it elsewhere; set mixup_alpha=0"
            )
        return outputs

    def _column(self) -> Tensor:
        return self.share.unsqueeze(1)

    @staticmethod
    def _present(batch: Mapping[str, Any]) -> Tensor:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if mask is None:
            return torch.ones_like(ids, dtype=torch.bool)
        if mask.shape != ids.shape:
            raise ValueError(f"expected attention_mask {tuple(ids.shape)} with mixup, got {tuple(mask.shape)}; set mixup_alpha=0")
        return mask.bool()


@dataclass(frozen=True)
class Mixup:
    """Embedding mixup: input λ·e_a + (1−λ)·e_b, loss λ·loss(y_a) + (1−λ)·loss(y_b), λ ~ Beta(α, α).

    Partners are drawn within a micro-batch, so its size matters, and a batch of one is not mixed. All draws come from torch's
    global generator on the CPU: the seed decides them, and a resumed run goes on with them.

    Args:
        alpha: α > 0; small values mix little, 1 draws λ uniformly.
        per: one λ per "batch" or per "example".

    Raises: ValueError for values out of range.
    Source: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization"; for text Guo, Mao & Zhang 2019, "Augmenting Data
    with Mixup for Sentence Classification" (wordMixup).
    """

    alpha: float = 0.2
    per: Per = "batch"

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"expected mixup_alpha > 0, got {self.alpha}; 0.2 is a usual value, 0 in the arguments means none")
        if self.per not in get_args(Per):
            raise ValueError(f"expected mixup_per in {get_args(Per)}, got {self.per!r}; choose one of them")

    def draw(self, labels: Tensor) -> MixedBatch:
        """Partners and shares for a batch with labels [B]; an example whose label is ignored stays alone.

        Raises: ValueError for labels which are not one per example.
        """
        if labels.dim() != 1:
            raise ValueError(
                f"expected one label per example with mixup, got labels {tuple(labels.shape)}: tokens of two texts have no "
                "common label; set mixup_alpha=0"
            )
        kept = (labels != IGNORE_INDEX).nonzero().squeeze(1).cpu()
        partner = torch.arange(len(labels))
        partner[kept] = kept[torch.randperm(len(kept))]
        alpha = torch.tensor(self.alpha, dtype=torch.float64)
        size = () if self.per == "batch" else (len(labels),)
        share = torch.distributions.Beta(alpha, alpha).sample(torch.Size(size)).expand(len(labels))
        return MixedBatch(share.float().to(labels.device), partner.to(labels.device))


def check_mixable(model: nn.Module) -> None:
    """Refuse models whose inputs cannot be mixed, before training.

    Raises: ValueError for language models, encoder-decoders, token classifiers, and models without one input embedding.
    """
    name = type(unwrap_model(model)).__name__
    config = getattr(unwrap_model(model), "config", None)
    generates = output_embedding(model) is not None or getattr(config, "is_encoder_decoder", False)
    if generates or name.endswith("ForTokenClassification"):
        raise ValueError(f"expected a classifier of whole texts with mixup, got {name}; set mixup_alpha=0")
    _input_embedding(model)


def _input_embedding(model: nn.Module) -> nn.Module:
    find = getattr(unwrap_model(model), "get_input_embeddings", None)
    try:
        layer = find() if callable(find) else None
    except (NotImplementedError, AttributeError):
        layer = None
    if not isinstance(layer, nn.Module):
        raise ValueError(
            f"expected a model with get_input_embeddings() for mixup, got {type(unwrap_model(model)).__name__}; set mixup_alpha=0"
        )
    return layer
