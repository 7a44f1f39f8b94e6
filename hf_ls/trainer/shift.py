"""What a model's own loss says: which label a logit predicts, and what there is beside the cross entropy.

The rule of the shift is explicit. A batch with `shift_labels` is aligned already. Else labels are shifted if the model's own loss
is the cross entropy with a shift, and not if it is the one without; a model whose loss is neither is refused.

A mixture of experts adds the balance of its routers, AdaLoRA an orthogonality, SHADOW the loss of a second head, each under
another name and coefficient. No name is read here. The model computes its own loss in its own forward, in which those calls of
`torch.nn.functional.cross_entropy` which get the labels are answered by 0. What is left is what it adds: exact in every
precision, with its gradient.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import unwrap_model

from hf_ls.common.models import IGNORE_INDEX, base_model, chooses, in_eval_mode, output_embedding
from hf_ls.losses._checks import next_labels
from hf_ls.losses.cross_entropy import check_no_probabilities, logits_of, smoothed_terms
from hf_ls.losses.smoothing import Smoothing

if TYPE_CHECKING:
    from hf_ls.trainer.batch import Batch

# Losses over all alignments of labels to audio frames; the ends of the names of the classes.
_ALIGNING = ("ForCTC", "ForRNNT", "ForTDT")


class LossGap(NamedTuple):
    """The model's own loss beside the plain NLL without and with the causal shift, nats; None where it cannot be had."""

    own: float | None  # without what it adds to the cross entropy
    unshifted: float
    shifted: float | None
    tolerance: float
    added: float = 0.0
    calls: tuple[int, ...] = ()  # see `OwnLoss`
    others: int | None = None  # see `OwnLoss`

    def agrees(self, nll: float | None) -> bool:
        """Whether the model's own loss is this NLL, up to rounding."""
        if self.own is None or nll is None:
            return False
        return abs(self.own - nll) <= self.tolerance * max(1.0, abs(self.own))

    @property
    def ambiguous(self) -> bool:
        """Whether both alignments give the model's own loss, as with a head of zeros, all of whose logits are alike."""
        return self.agrees(self.unshifted) and self.agrees(self.shifted)


def label_inputs(found: list[str], given: list[str] | None) -> list[str]:
    """The label names to train on: `labels` alone where the Trainer found several and the user named none.

    The others (GraniteDocling's `router_labels`) stay inputs of the model, and what its own loss makes of them is kept.
    """
    return ["labels"] if given is None and "labels" in found else found


def check_supported(model: nn.Module, label_names: list[str], class_weight: Tensor | None = None, *, spans: bool = False) -> None:
    """Refuse tasks in which label smoothing over one softmax has no meaning; `spans`: two positions are the labels.

    Raises: ValueError for multi-label and regression heads, for losses over alignments (CTC, transducers), for models with
    no or several label inputs, and for class weights of another K.
    """
    inner = base_model(model)
    name, config = type(inner).__name__, getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        raise ValueError(
            f"expected one class per example, got problem_type={problem!r}: its classes are separate yes/no decisions, no "
            "distribution whose mass could be spread; use transformers.Trainer, or set "
            "config.problem_type='single_label_classification' if each example has exactly one class"
        )
    if problem == "regression":
        raise ValueError(
            f"expected classes, got problem_type={problem!r}: a number has no distribution to smooth; use transformers.Trainer, "
            "or load the model with num_labels=2 or more and problem_type='single_label_classification'"
        )
    pairs = chooses(model)
    if "Classification" in name and not pairs and getattr(config, "num_labels", 2) < 2:
        raise ValueError(
            f"expected num_labels >= 2, got {config.num_labels} in {name}, which is a regression head; use transformers.Trainer, "  # type: ignore[union-attr]
            "or load the model with num_labels=2 or more; a reward model over pairs is for hf_ls.compare_pairs"
        )
    if any(kind.__name__.endswith(_ALIGNING) for kind in type(inner).__mro__):
        raise ValueError(
            f"expected one label per logit, got {name}, whose loss sums over alignments of the labels to audio frames; use "
            "transformers.Trainer, or an encoder-decoder speech model such as Whisper"
        )
    if not label_names:
        parameters = inspect.signature(inner.forward).parameters
        usual = [key for key in ("labels", "start_positions", "end_positions") if key in parameters] or ["labels"]
        raise ValueError(
            f"expected a label input, got none which the Trainer knows of {name}; set TrainingArguments(label_names={usual})"
        )
    if len(label_names) != 1 and not spans:
        raise ValueError(f"expected one label input, got {label_names}; {name} is not supported, use transformers.Trainer")
    # Of other models only the logits tell: the classes of multiple choice are the choices, not `num_labels`.
    classes = getattr(config, "num_labels", None) if "Classification" in name and not pairs else None
    if class_weight is not None and classes is not None and class_weight.shape != (classes,):
        raise ValueError(f"expected class_weight [{classes}], got {tuple(class_weight.shape)}; one weight per class of the model")


def decoder_inputs(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """The inputs with `decoder_input_ids` made from the labels if an encoder-decoder language model lacks them.

    Without labels in its inputs T5 fails misleadingly and BART feeds its source to the decoder in silence. A model which makes
    them in its forward alone (Whisper, M2M100) is watched once while it does so for labels of ours.

    Raises: ValueError when the model makes them otherwise than by moving the labels to the right.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or labels.dim() != 2:
        return inputs
    if "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
        return inputs
    inner = unwrap_model(model)
    prepare = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    # A classifier of tokens inherits it (T5Gemma2), and makes its decoder inputs of something else.
    if prepare is not None and output_embedding(model) is not None:
        return {**inputs, "decoder_input_ids": prepare(labels=labels)}
    if inner not in _STARTS:
        _STARTS[inner] = _watched_start(model, inputs, labels)
    found = _STARTS[inner]
    return inputs if found is None else {**inputs, "decoder_input_ids": _moved_right(labels, *found)}


# What a model puts before the first label, and what in the place of ignored ones; None where it reads no labels for them.
_STARTS: weakref.WeakKeyDictionary[nn.Module, tuple[int, int] | None] = weakref.WeakKeyDictionary()


def _moved_right(labels: Tensor, start: int, pad: int) -> Tensor:
    moved = nn.functional.pad(labels, (1, 0), value=start)[:, :-1]
    return moved.masked_fill(moved == IGNORE_INDEX, pad)


@torch.no_grad()
def _watched_start(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> tuple[int, int] | None:
    """The first decoder input which the model itself makes of labels, and its input for an ignored label; one forward.

    None where no part of the model is given ids made of the labels (PP-FormulaNet makes them of its `input_ids`).

    Raises: ValueError where they are other than the labels moved to the right.
    """
    lengths = {value.shape[-1] for value in inputs.values() if isinstance(value, Tensor)}
    length = next(n for n in range(4, 4 + len(lengths) + 1) if n not in lengths)  # of no other input
    token = labels[labels != IGNORE_INDEX][:1]
    known = (token if len(token) else labels.new_zeros(1)).repeat(len(labels), length)
    known[:, 1] = IGNORE_INDEX
    seen: list[Tensor] = []

    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *(v for name, v in kwargs.items() if name != "labels")):
            if isinstance(value, Tensor) and value.shape == known.shape and value.dtype == known.dtype:
                seen.append(value.clone())

    inner = unwrap_model(model)
    handles = [m.register_forward_pre_hook(watch, with_kwargs=True) for m in inner.modules() if m is not inner]
    rest = {name: value for name, value in inputs.items() if name != "decoder_attention_mask"}
    given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in rest.items()}
    try:
        with in_eval_mode(model), torch.compiler.set_stance("force_eager"), without_any_cross_entropy():
            model(**given, labels=known.clone())
    finally:
        for handle in handles:
            handle.remove()
    found = next((ids for ids in seen if not torch.equal(ids, known)), None)
    if found is None:
        return None
    start, pad = int(found[0, 0]), int(found[0, 2])
    if not torch.equal(found, _moved_right(known, start, pad)):
        raise ValueError(
            f"expected {type(inner).__name__} to move its labels one to the right for its decoder, got {found[0].tolist()} for "
            f"{known[0].tolist()}; use a collator which gives decoder_input_ids"
        )
    return start, pad


@torch.no_grad()
def model_loss_gap(model: nn.Module, batch: Batch, prompt: int = 0) -> LossGap:
    """Compare the model's own loss on one batch with some label, what it adds taken off, with the NLL of its logits.

    Three forwards in evaluation mode: no dropout, no random numbers drawn. A batch which has only `shift_labels` is compared
    with the NLL without a further shift.

    Args:
        prompt: how many virtual tokens stand before the first, in the logits only.

    Raises: ValueError/TypeError as `smoothed_terms`, and when the model returns no logits, probabilities instead, or rows before
    those of the labels.
    """
    labels = nn.functional.pad(batch.given, (prompt, 0), value=IGNORE_INDEX) if prompt else batch.given
    with in_eval_mode(model):
        logits = logits_of(model(**batch.for_model(model)))
        check_no_probabilities(logits)
        if labels.dim() == 2 and logits.dim() == 3 and logits.shape[1] > labels.shape[1]:
            raise ValueError(
                f"expected one row of logits per label from {type(base_model(model)).__name__}, got {logits.shape[1]} for "
                f"{labels.shape[1]} labels: it puts rows of its own, such as those of an image, before the text; use "
                "transformers.Trainer"
            )
        # Before the model sees the labels: wrong ones end in an index error there, or in a crashed GPU.
        unshifted, shifted = _mean_nll(logits, labels), None
        alignments = [labels[labels != IGNORE_INDEX]]
        if labels.dim() == 2 and not batch.aligned:
            moved = next_labels(labels)
            shifted = _mean_nll(logits, moved)
            alignments.append(moved[moved != IGNORE_INDEX])
        means = [mean for mean in (unshifted, shifted) if mean is not None]
        own = own_loss(model, lambda: batch.with_labels(model), [tuple(alignments)], means)
    return loss_gap(own, unshifted, shifted, loss_tolerance(model, logits))


def loss_gap(own: OwnLoss, unshifted: float, shifted: float | None, tolerance: float) -> LossGap:
    """The gap of a model's own loss; where no cross entropy was heard a whole term could hide in a wide tolerance."""
    value = None if own.value is None else own.value - own.added
    tolerance = tolerance if own.calls else min(tolerance, 4e-3)
    return LossGap(value, unshifted, shifted, tolerance, own.added, own.calls, own.others)


@torch.no_grad()
def counts_first_label(model: nn.Module, batch: Batch) -> bool:
    """Whether the model's own loss counts labels at the first position, which no logit predicts where labels are shifted.

    One forward in evaluation mode. It tells the alignments apart when their losses are the same.
    """
    labels = batch.given
    first = torch.full_like(labels, IGNORE_INDEX)
    first[:, 0] = labels[labels != IGNORE_INDEX][0]
    with in_eval_mode(model):
        own = loss_in(model(**batch.for_model(model) | {batch.names[0]: first}))
    return own is not None and math.isfinite(own) and bool(own > 1e-3)  # else NaN or 0: a mean over nothing


def resolve_shift(model: nn.Module, gap: LossGap, first_counts: bool = False) -> bool:
    """Whether the labels are shifted, by which NLL agrees with the model's own loss; where both do, by `first_counts`.

    Raises: ValueError when neither agrees, or when there is no own loss to ask and the labels are sequences.
    """
    name = type(unwrap_model(model)).__name__
    if gap.own is None:
        if gap.shifted is None:
            return False
        raise ValueError(
            f"expected {name} to return a loss to find its label shift, got none; pass shift_labels=True (decoder-only) or False"
        )
    if gap.others is not None:
        raise ValueError(
            f"expected the own loss of {name} to be the cross entropy of the labels in the batch, got one over {gap.others} "
            "labels, others than those or weighted: context tokens, several tokens per position, or class weights of its own; "
            "use transformers.Trainer for that loss, or pass shift_labels=True/False to train on the labels alone"
        )
    if gap.ambiguous:
        return not first_counts
    distances = {False: abs(gap.own - gap.unshifted)}
    if gap.shifted is not None:
        distances[True] = abs(gap.own - gap.shifted)
    shift = min(distances, key=lambda key: distances[key])
    if not gap.agrees(gap.shifted if shift else gap.unshifted):
        shifted = "" if gap.shifted is None else f" ({gap.shifted:.6g} with labels shifted)"
        raise ValueError(
            f"expected the loss of {name} to be the cross entropy of its logits, got {gap.own:.6g} against {gap.unshifted:.6g}"
            f"{shifted}; use transformers.Trainer for another loss, or pass shift_labels=True/False to train with cross entropy"
        )
    return shift


def loss_tolerance(model: nn.Module, logits: Tensor) -> float:
    """How far two ways to compute a loss may be apart, relative: half precision or better."""
    low = torch.finfo(logits.dtype).eps > 1e-6 or any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return 2e-2 if low else 1e-4


def _mean_nll(logits: Tensor, labels: Tensor) -> float:
    kept = labels != IGNORE_INDEX
    return float(smoothed_terms(logits, labels, Smoothing(0.0)).nll.sum() / kept.sum().clamp_min(1))


class CrossEntropyCall(NamedTuple):
    """One call of cross entropy in a forward: its kept labels in their order, and its mean, nats; None for no class labels."""

    labels: Tensor | None
    mean: float


class OwnLoss(NamedTuple):
    """A model's own loss on one batch."""

    value: float | None  # nats; None where the model returns no loss
    added: float  # what of it is no cross entropy of the labels, nats
    calls: tuple[int, ...]  # which calls of cross entropy in the forward are that of the labels; () for none of them
    others: int | None  # how many labels the cross entropy counts where they are not those of the batch; None: they are


class _CrossEntropies(TorchFunctionMode):
    """Listens to cross entropies: keeps what each is of, and answers those at `silenced` by 0 (None: all)."""

    def __init__(self, silenced: tuple[int, ...] | None = (), listen: bool = False) -> None:
        super().__init__()
        self.silenced, self.listen, self.count = silenced, listen, 0
        self.calls: list[CrossEntropyCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (F.cross_entropy, F.nll_loss):
            return func(*args, **kwargs)
        here, self.count = self.count, self.count + 1
        if self.silenced is None or here in self.silenced:
            return _nothing(*args, **kwargs)
        found = func(*args, **kwargs)
        if self.listen:
            self.calls.append(_call(found, *args, **kwargs))
        return found


# In both functions of torch these arguments come in this order.
def _nothing(
    input: Tensor, target: Tensor, weight: Any = None, size_average: Any = None, ignore_index: int = IGNORE_INDEX,
    reduce: Any = None, reduction: str = "mean", **kwargs: Any,
) -> Tensor:  # fmt: skip
    return input.new_zeros(target.shape if reduction == "none" else ())


def _call(
    found: Tensor, input: Tensor, target: Tensor, weight: Any = None, size_average: Any = None,
    ignore_index: int = IGNORE_INDEX, reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> CrossEntropyCall:  # fmt: skip
    if target.is_floating_point() or weight is not None or label_smoothing:
        return CrossEntropyCall(None, float("nan"))
    kept = target != ignore_index
    mean = found.detach().double() if reduction == "mean" else found.detach().double().sum() / kept.sum()
    return CrossEntropyCall(target[kept], float(mean))


def loss_in(outputs: Any) -> Tensor | None:
    """The loss in the outputs of a forward with labels: by name, or the scalar which a tuple begins with; None without one."""
    if isinstance(outputs, dict):
        return outputs.get("loss")
    first = outputs[0] if isinstance(outputs, tuple | list) and outputs else None
    return first if isinstance(first, Tensor) and first.dim() == 0 and first.is_floating_point() else None


@contextmanager
def without_cross_entropy(calls: tuple[int, ...]) -> Iterator[None]:
    """In this block, for one forward, the calls of cross entropy of these numbers are answered by 0.

    Raises: ValueError when they were not made: what the forward then returns as its loss is unknown.
    """
    if not calls:
        yield
        return
    with _CrossEntropies(calls) as heard:
        yield
    if heard.count <= max(calls):
        raise ValueError(
            f"expected {max(calls) + 1} calls of cross_entropy in the model's own loss, as in its first batch, got "
            f"{heard.count}: what it adds to them cannot be told; launch with torchrun instead of nn.DataParallel, switch off "
            "use_liger_kernel and torch_compile, or use transformers.Trainer"
        )


def without_any_cross_entropy() -> TorchFunctionMode:
    """In this block every cross entropy is 0: for a forward with labels of which only its inputs matter."""
    return _CrossEntropies(None)


def added_loss(outputs: Any, logits: Tensor, labels: Tensor, *, whole: bool) -> Tensor:
    """What the model's own loss adds, with its graph, from a forward with labels; nats.

    Args:
        whole: its cross entropy was not silenced (a compiled model's is not): take off that of its logits. Shapes as in
            `smoothed_terms`.
    """
    found = loss_in(outputs)
    if found is None:
        raise ValueError("expected a loss from the model's own forward with labels, as in its first batch, got none")
    if not whole:
        return found
    kept = labels != IGNORE_INDEX
    if not bool(kept.any()):
        return found.new_zeros(())
    nll = smoothed_terms(logits, labels, Smoothing(0.0)).nll
    # The mean over starts and that over ends count alike.
    return found - (nll.sum(0) / kept.sum(0)).mean() if "start_logits" in outputs else found - nll.sum() / kept.sum()


@torch.no_grad()
def own_loss(
    model: nn.Module, inputs: Callable[[], dict[str, Any]], labels: Sequence[tuple[Tensor, ...]], means: list[float]
) -> OwnLoss:
    """A model's own loss on a batch with labels, and what it adds to their cross entropy. Two forwards, never compiled.

    Args:
        inputs: makes the batch with its labels afresh for each forward.
        labels: for each cross entropy the kept labels [n], in the alignments which may be; two of them for starts and ends.
        means: the mean NLL which the model's logits have in these alignments, nats, to tell the heads of one model apart.
    """
    batch, parameters = inputs(), inspect.signature(base_model(model).forward).parameters
    if not (set(batch) <= set(parameters) or any(p.kind is p.VAR_KEYWORD for p in parameters.values())):
        return OwnLoss(None, 0.0, (), None)  # it takes no labels
    with torch.compiler.set_stance("force_eager"), _CrossEntropies(listen=True) as heard:
        found = loss_in(model(**batch))
    calls: list[int] = []
    for alignments in labels:
        same = [
            i
            for i, call in enumerate(heard.calls)
            if i not in calls and call.labels is not None and any(_equal(call.labels, kept) for kept in alignments)
        ]
        if same:
            calls.append(min(same, key=lambda i: min(abs(heard.calls[i].mean - mean) for mean in means)))
    if len(calls) < len(labels):
        counted = [len(call.labels) for call in heard.calls if call.labels is not None]
        return OwnLoss(None if found is None else float(found), 0.0, (), max(counted, default=None))
    with torch.compiler.set_stance("force_eager"), without_cross_entropy(tuple(sorted(calls))):
        added = loss_in(model(**inputs()))
    return OwnLoss(None if found is None else float(found), 0.0 if added is None else float(added), tuple(sorted(calls)), None)


def _equal(found: Tensor, kept: Tensor) -> bool:
    return found.shape == kept.shape and bool((found.to(kept.device) == kept).all())
