"""Distillation: a teacher's soft targets beside the labels.

Here are the divergence from a teacher per item, its share of the loss, running the teacher, and whether the teacher can teach
this student: label space, and what its files say of smoothing.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.modeling_utils import unwrap_model
from transformers.utils import cached_file

from hf_ls.common.models import IGNORE_INDEX, load_weights, no_cache, output_embedding
from hf_ls.losses.cross_entropy import SmoothedTerms, logits_of

logger = logging.getLogger(__name__)

# How the runs of hf_ls, and BART's and fairseq's old configs, call it.
_EPSILON_KEYS = ("label_smoothing_factor", "label_smoothing")


class DistilledTerms(NamedTuple):
    """Per-item parts of the loss, 0 where ignored; loss = nll + smoothing_term + distillation_term."""

    nll: Tensor
    smoothing_term: Tensor
    distillation_term: Tensor

    @property
    def loss(self) -> Tensor:
        """The whole per-item loss, nats."""
        return self.nll + self.smoothing_term + self.distillation_term


def divergence(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """KL(softmax(z_teacher / T) ‖ softmax(z / T)) per item, in nats, at least 0, exactly 0 where the label is ignored.

    Shapes: both logits [..., K], labels [...] (read for `ignore_index` only). Computed in float32, float64 stays float64. A
    class which the teacher gives no mass (−inf) has no influence. The teacher gets no gradient.

    Raises: ValueError for shapes which differ, and where it is not finite: NaN, or −inf where the teacher has mass.
    """
    if logits.shape != teacher_logits.shape or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"expected the teacher's logits as the student's, {tuple(logits.shape)}, one row per label, got "
            f"{tuple(teacher_logits.shape)} and labels {tuple(labels.shape)}; use a teacher with the same classes or vocabulary "
            "and the same positions (no prompt tuning)"
        )
    kept = labels != ignore_index
    exact = torch.promote_types(logits.dtype, torch.float32)
    log_p = (logits[kept].to(exact) / temperature).log_softmax(-1)
    log_q = (teacher_logits[kept].detach().to(exact) / temperature).log_softmax(-1)
    q = log_q.exp()
    # 0·(−inf) is NaN, but a class without mass must add exactly 0.
    found = (q * (log_q.masked_fill(q == 0, 0) - log_p.masked_fill(q == 0, 0))).sum(-1)
    if not bool(torch.isfinite(found.detach().sum())):
        raise ValueError(
            "expected finite logits wherever the teacher has mass, got NaN or -inf; mask the same classes in teacher and student "
            "(NaN: lower the learning rate)"
        )
    return found.new_zeros(labels.shape).masked_scatter(kept, found)


@dataclass(frozen=True)
class Distillation:
    """How much a teacher counts: loss = (1−α)·(nll + smoothing_term) + α·T²·KL(softmax(z_teacher/T) ‖ softmax(z/T)).

    T² keeps the size of its gradient when T changes.

    Args:
        alpha: 0 < α ≤ 1; at 1 the labels do not count.
        temperature: T > 0.

    Raises: ValueError for values out of range.
    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """

    alpha: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"expected 0 < distillation_alpha <= 1, got {self.alpha}; drop the teacher for none")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"expected distillation_temperature > 0, got {self.temperature}; 1 to 4 are usual values")

    def terms(self, terms: SmoothedTerms, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> DistilledTerms:
        """The plain nll, (1−α)·smoothing_term and α·(T²·KL − nll), shaped as the labels, nats.

        The NLL stays whole, so that it compares between runs; the last part is what the teacher changes, and may be negative.

        Raises: as `divergence`.
        """
        found = divergence(logits, teacher_logits, labels, self.temperature).to(terms.nll.dtype)
        change = self.alpha * (self.temperature**2 * found - terms.nll)
        return DistilledTerms(terms.nll, (1 - self.alpha) * terms.smoothing_term, change)


class Teacher:
    """A teacher for one student: in evaluation mode, without gradients, on the device of the batch.

    It reads the student's own batches, so both need the same token ids (`load_teacher` compares the tokenizers).

    Raises: ValueError for the student itself and for another label space. Warns of a teacher trained with label smoothing.
    """

    def __init__(self, model: nn.Module, student: nn.Module) -> None:
        if unwrap_model(model) is unwrap_model(student):
            raise ValueError("expected a teacher apart from the student, got the same model; pass copy.deepcopy(model)")
        check_label_space(model, student)
        self.model = model.eval()
        # The names it takes; None for any, as a PEFT model.
        parameters = inspect.signature(unwrap_model(model).forward).parameters
        self._settings = no_cache(model)
        anything = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values())
        self._names = None if anything else set(parameters)
        name = getattr(getattr(model, "config", None), "name_or_path", None)
        evidence = smoothing_evidence(name, local_files_only=True) if name else None
        if evidence is not None:
            logger.warning(
                "The teacher was trained with label smoothing (%s). Smoothed teachers usually teach worse: smoothing erases "
                "what the wrong classes have in common (Müller et al. 2019); train the teacher with epsilon = 0.",
                evidence,
            )

    @torch.no_grad()
    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """The teacher's logits [..., K] for a batch of the student without labels; names it does not know are left out."""
        device = next((value.device for value in inputs.values() if isinstance(value, Tensor)), None)
        self.model.to(device).eval()
        known = {key: value for key, value in inputs.items() if self._names is None or key in self._names}
        return logits_of(self.model(**known | self._settings))


def teacher_for(student: nn.Module, teacher: nn.Module, logits_free: str) -> Teacher:
    """The teacher of a student, whose loss then needs logits.

    Raises: as `Teacher`; ValueError for a language model whose logits are ruled out.
    """
    if output_embedding(student) is not None:
        if logits_free == "on":
            raise ValueError(
                "expected label_smoothing_logits_free 'auto' or 'off' with a teacher, got 'on': distillation compares whole "
                "distributions; set 'auto'"
            )
        if logits_free == "auto":
            logger.warning(
                "The training loss is taken from the logits of %s: distillation compares whole distributions",
                type(student).__name__,
            )
    return Teacher(teacher, student)


def load_teacher(name_or_path: str, auto_model: Any, tokenizer: Any = None, **kwargs: Any) -> nn.Module:
    """The teacher from a folder or the Hub, its tokenizer compared with the student's.

    Args:
        auto_model: e.g. `AutoModelForSequenceClassification`.
        tokenizer: of the student; None leaves the comparison out.
        kwargs: for both `from_pretrained`, e.g. revision.

    Raises: ValueError when the same text gives other token ids, or for pickled weights; OSError when there is no such model.
    """
    if tokenizer is not None:
        own = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
        if own.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"expected the teacher {name_or_path} to have the student's vocabulary, got {len(own)} against {len(tokenizer)} "
                "tokens, or other ids: it would read other words; use a teacher and a student with one tokenizer"
            )
    return load_weights(auto_model, name_or_path, **kwargs)


def check_label_space(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse a teacher whose classes or vocabulary are not the student's; models without a config are compared by shape later.

    Raises: ValueError for another kind of model, number of classes, order or names of the labels, or size of vocabulary.
    """
    configs: list[Any] = [getattr(unwrap_model(model), "config", None) for model in (teacher, student)]
    if None in configs:
        return
    sides = [bool(getattr(config, "is_encoder_decoder", False)) for config in configs]
    heads = [output_embedding(model) for model in (teacher, student)]
    if sides[0] != sides[1] or (heads[0] is None) != (heads[1] is None):
        raise ValueError(
            f"expected a teacher for the task of {type(unwrap_model(student)).__name__}, got "
            f"{type(unwrap_model(teacher)).__name__}; use the same kind of model"
        )
    vocabularies = [getattr(config.get_text_config(), "vocab_size", None) for config in configs]
    if heads[0] is not None:
        if vocabularies[0] != vocabularies[1]:
            raise ValueError(
                f"expected a teacher with the student's {vocabularies[1]} tokens, got {vocabularies[0]}; use one tokenizer and "
                "the same padding of the vocabulary (resize_token_embeddings)"
            )
        return
    if vocabularies[0] != vocabularies[1]:
        logger.warning(
            "The teacher's vocabulary has %d tokens, the student's %d: make sure that both read the same token ids.",
            *vocabularies,
        )
    names = [_label_names(config) for config in configs]
    given = [any(name != f"LABEL_{i}" for i, name in enumerate(side)) for side in names]
    if len(names[0]) != len(names[1]) or (all(given) and names[0] != names[1]):
        raise ValueError(
            f"expected a teacher with the student's labels {names[1]}, got {names[0]}; train one with the same id2label, in the "
            "same order"
        )


def smoothing_evidence(name_or_path: str | os.PathLike[str], *, local_files_only: bool = False) -> str | None:
    """What says that a model was trained with label smoothing, in a few words; None where nothing does.

    Asked in order: `calibration.json` (the row whose weights were published) and `settings.json` of a run, then `config.json`.
    The first which states an epsilon decides. A folder, or a repository on the Hub (with `local_files_only` what
    is in the cache).
    """
    for file, read in (
        ("calibration.json", _in_report),
        ("settings.json", _in_json),
        ("config.json", _in_json),
    ):
        text = _file_text(str(name_or_path), file, local_files_only)
        found = None if text is None else read(text)
        if found is not None:
            return f"{found} in {file}" if found else None
    return None


def _label_names(config: Any) -> list[str]:
    names = getattr(config, "id2label", None) or {}
    return [str(names[key]) for key in sorted(names, key=int)]


def _file_text(name_or_path: str, file: str, local_files_only: bool) -> str | None:
    if os.path.isdir(name_or_path):
        path: str | None = os.path.join(name_or_path, file)
    else:
        quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
        try:
            path = cached_file(name_or_path, file, local_files_only=local_files_only, **quiet)
        except (OSError, ValueError):  # no such repository, or no name for one
            path = None
    if path is None or not os.path.isfile(path):
        return None
    return Path(path).read_text(encoding="utf-8", errors="replace")


# Each of these gives words for a smoothed model, "" for one which was not, None where the file does not say.
def _in_report(text: str) -> str | None:
    report = _json(text)
    rows = [row for row in report.get("rows") or [] if isinstance(row, dict)]
    names = [f"{row.get('run')}{' + temperature' if row.get('tempered') else ''}" for row in rows]
    named = [row for row, name in zip(rows, names, strict=True) if name == report.get("published")]
    row = next(iter(named or (rows if len(rows) == 1 else [])), {})
    epsilon = row.get("epsilon", (report.get("smoothing") or {}).get("epsilon"))
    if not isinstance(epsilon, int | float):
        return None
    return f"epsilon = {epsilon:g}" if epsilon else ""


def _in_json(text: str) -> str | None:
    values = [_json(text).get(key) for key in _EPSILON_KEYS]
    epsilon = next((value for value in values if isinstance(value, int | float) and not isinstance(value, bool)), None)
    return None if epsilon is None else f"epsilon = {epsilon:g}" if epsilon else ""


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
