"""Where the probability mass of a smoothed target goes: epsilon, its convention, the prior, the schedule, and closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_ls.losses._checks import class_ids, refuse

Convention = Literal["all", "wrong"]
# What ε means in other systems, read in their sources in 2026. Those in _WITHOUT_PAD give no mass to the padding token either.
_CONVENTION_OF: dict[str, Convention] = {
    **dict.fromkeys(("torch", "transformers", "liger", "timm", "keras", "optax"), "all"),
    **dict.fromkeys(("megatron", "nemo", "fairseq", "espnet", "t5x", "tensor2tensor", "opennmt"), "wrong"),
}
_WITHOUT_PAD = ("opennmt",)
ScheduleKind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """How epsilon moves with the training step: hold 0 for `warmup_steps`, then go from epsilon to `final_epsilon`.

    With progress t in [0, 1] after the warm-up: constant ε; linear ε + (ε_final − ε)·t;
    cosine ε_final + (ε − ε_final)·(1 + cos πt)/2. It depends on the step alone, so a resumed run continues exactly.

    >>> [round(Schedule("linear", warmup_steps=2).epsilon_at(0.1, step, max_steps=7), 3) for step in range(7)]
    [0.0, 0.0, 0.1, 0.075, 0.05, 0.025, 0.0]

    Raises: ValueError for an unknown kind or a warm-up below 0.
    """

    kind: ScheduleKind = "constant"
    final_epsilon: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise ValueError(f"expected schedule kind in {get_args(ScheduleKind)}, got {self.kind!r}; choose one of them")
        if self.warmup_steps < 0:
            raise ValueError(f"expected warmup_steps >= 0, got {self.warmup_steps}; use 0 for no warm-up")

    def epsilon_at(self, epsilon: float, step: int, max_steps: int) -> float:
        """Epsilon at 0-based optimizer step `step` of `max_steps`."""
        if step < self.warmup_steps:
            return 0.0
        if self.kind == "constant":
            return epsilon
        # The last step trains with exactly final_epsilon, whatever the warm-up.
        length = max(1, max_steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / length)
        weight = progress if self.kind == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return epsilon + (self.final_epsilon - epsilon) * weight


@dataclass(frozen=True, eq=False)
class Smoothing:
    """A smoothed target: keep 1 − ε on the label, spread ε by a prior u over the classes.

    `convention="all"`:   t = (1−ε)·e_y + ε·u            (PyTorch, Hugging Face, Liger; Szegedy 2016)
    `convention="wrong"`: t = (1−ε)·e_y + ε·u₋y/(1−u_y)  (mass on the wrong classes only; Megatron, ESPnet, T5X)
    Both are t = (1−e)·e_y + e·u with e = ε or e = ε/(1−u_y), which is how every loss here computes them.

    Args:
        epsilon: 0 ≤ ε < 1; 0 is the plain cross entropy.
        convention: "all" or "wrong".
        prior: None (uniform), or non-negative tensor [K] summing to 1, or [K, K] with row y for label y.
        schedule: None (constant ε) or a `Schedule`.
        allow_negative: permit −1 < ε < 0 (generalised smoothing, Wei 2022; its loss has no lower bound).

    >>> Smoothing(0.1, "wrong", prior=torch.tensor([0.5, 0.5, 0.0])).target(torch.tensor(2), 3)
    tensor([0.0500, 0.0500, 0.9000])

    Raises: ValueError for ε out of range or a prior which is no distribution; TypeError for wrong types.
    Source: Szegedy et al. 2016; Müller et al. 2019.
    """

    epsilon: float = 0.1
    convention: Convention = "all"
    prior: Tensor | None = None
    schedule: Schedule | None = None
    allow_negative: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, int | float):
            raise TypeError(f"expected epsilon as a number, got {type(self.epsilon).__name__}; pass e.g. 0.1")
        _check_epsilon(self.epsilon, self.allow_negative)
        if self.convention not in get_args(Convention):
            raise ValueError(f"expected convention 'all' or 'wrong', got {self.convention!r}; 'all' is Hugging Face's")
        if self.schedule is not None:
            if not isinstance(self.schedule, Schedule):
                raise TypeError(f"expected a hf_ls.Schedule, got {type(self.schedule).__name__}; pass Schedule('linear')")
            _check_epsilon(self.schedule.final_epsilon, self.allow_negative)
        if self.prior is not None:
            _check_prior(self.prior)

    @classmethod
    def from_system(
        cls, system: str, epsilon: float, *, num_classes: int | None = None, pad_token_id: int | None = None
    ) -> Smoothing:
        """The same target as `label_smoothing=epsilon` of another system, whose ε may mean something else.

        "all" in torch, transformers, liger, timm, keras, optax; "wrong" in megatron, nemo, fairseq, espnet, t5x and
        tensor2tensor; "wrong" without the padding token, ε/(K−2), in opennmt (OpenNMT-py before 3). Megatron's own loss has that
        target on one tensor-parallel rank only. T5X and tensor2tensor subtract the entropy of the target: same gradient.

        >>> Smoothing.from_system("megatron", 0.1).convention
        'wrong'

        Args: num_classes, pad_token_id: only for opennmt, the size of the vocabulary and the padding id.

        Raises: ValueError for an unknown system, or arguments which the system needs or has no use for.
        """
        if system not in _CONVENTION_OF:
            raise ValueError(f"expected a system among {sorted(_CONVENTION_OF)}, got {system!r}; say the convention yourself")
        given = num_classes is not None and pad_token_id is not None
        if given != (system in _WITHOUT_PAD) or (num_classes is None) != (pad_token_id is None):
            wanted = "num_classes and pad_token_id" if system in _WITHOUT_PAD else "no num_classes or pad_token_id"
            raise ValueError(f"expected {wanted} with {system}, got {num_classes} and {pad_token_id}; its target needs them so")
        if num_classes is None or pad_token_id is None:
            return cls(epsilon, _CONVENTION_OF[system])
        if not 0 <= pad_token_id < num_classes or num_classes < 3:
            raise ValueError(
                f"expected 0 <= pad_token_id < num_classes, got {pad_token_id} and {num_classes}; check the tokenizer"
            )
        prior = torch.full((num_classes,), 1 / (num_classes - 1))
        prior[pad_token_id] = 0
        return cls(epsilon, _CONVENTION_OF[system], prior)

    def at(self, step: int, max_steps: int) -> Smoothing:
        """This smoothing with the constant epsilon which its schedule gives at optimizer step `step` of `max_steps`."""
        if self.schedule is None:
            return self
        return replace(self, epsilon=self.schedule.epsilon_at(self.epsilon, step, max_steps), schedule=None)

    def prior_for(self, labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The prior u as [K], or as rows [..., K] when it depends on the label.

        Raises: ValueError when the prior was made for another number of classes.
        """
        if self.prior is None:
            return torch.full((num_classes,), 1.0 / num_classes, dtype=dtype, device=labels.device)
        if self.prior.shape[-1] != num_classes:
            raise ValueError(
                f"expected a prior over {num_classes} classes, got {self.prior.shape[-1]}; build it with the model's "
                "number of labels (or its vocabulary size including padding rows)"
            )
        rows = self.prior if self.prior.dim() == 1 else self.prior[labels.to(self.prior.device)]
        return rows.to(labels.device, dtype, non_blocking=labels.is_cuda)

    def mixing(self, labels: Tensor, prior: Tensor) -> Tensor:
        """The weight e of the prior per label, shape [...]: ε, or ε/(1−u_y) for `convention="wrong"`.

        Raises: ValueError when a label holds all prior mass, so that no wrong class is left to smooth over.
        """
        if self.convention == "all":
            return torch.full(labels.shape, float(self.epsilon), dtype=prior.dtype, device=labels.device)
        at_label = prior[labels] if prior.dim() == 1 else prior.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        if self.epsilon:
            alone = at_label >= 1
            refuse(
                alone,
                "prior mass on a wrong class",
                lambda: f"a prior all on the label {int(labels[alone][0])}",
                "use convention='all'",
            )
        return self.epsilon / (1 - at_label)

    def target(self, labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The smoothed target distribution t [..., K] for integer labels [...].

        t = (1−e)·e_y + e·u. Rows sum to 1.

        >>> Smoothing(0.1).target(torch.tensor([1]), 5)
        tensor([[0.0200, 0.9200, 0.0200, 0.0200, 0.0200]])

        Raises: ValueError for labels outside [0, K).
        """
        labels = class_ids(labels)
        refuse(
            (labels < 0) | (labels >= num_classes),
            f"labels in [0, {num_classes})",
            lambda: f"{int(labels.min())}..{int(labels.max())}",
            "drop ignored positions before asking for their targets",
        )
        prior = self.prior_for(labels, num_classes, dtype)
        mixing = self.mixing(labels, prior).unsqueeze(-1)
        return (mixing * prior).scatter_add_(-1, labels.unsqueeze(-1), 1 - mixing)

    def optimal_logit_gap(self, num_classes: int) -> float:
        """The gap z_y − z_k (k ≠ y) at which the loss is least, in nats; infinite at ε = 0.

        log((1−ε+ε/K)/(ε/K)) for "all", log((1−ε)(K−1)/ε) for "wrong".

        >>> round(Smoothing(0.1).optimal_logit_gap(10), 3)
        4.511

        Raises: ValueError for a non-uniform prior or K < 2. Source: Müller et al. 2019.
        """
        confidence = self.max_confidence(num_classes)
        if self.epsilon <= 0:
            return math.inf
        return math.log(confidence * (num_classes - 1) / (1 - confidence))

    def max_confidence(self, num_classes: int) -> float:
        """The confidence p_y of a model which meets its smoothed target exactly, 0 to 1.

        1−ε+ε/K for "all", 1−ε for "wrong". A more accurate model is then forced to be under-confident.

        Raises: ValueError for a non-uniform prior (no single value: read `target`) or K < 2.
        """
        self._require_uniform("max_confidence", num_classes)
        kept = 1 - self.epsilon
        return kept + self.epsilon / num_classes if self.convention == "all" else kept

    def translate(self, to: Convention, num_classes: int) -> Smoothing:
        """The same target written in the other convention: ε_all = ε_wrong·K/(K−1).

        >>> round(Smoothing(0.1, "wrong").translate(to="all", num_classes=5).epsilon, 4)
        0.125

        Raises: ValueError for a non-uniform prior, an unknown convention, or an ε which the other cannot express.
        """
        if to not in get_args(Convention):
            raise ValueError(f"expected to='all' or to='wrong', got {to!r}; name the convention to translate into")
        self._require_uniform("translate", num_classes)
        if to == self.convention:
            return self
        ratio = num_classes / (num_classes - 1)
        factor = ratio if to == "all" else 1 / ratio
        schedule = self.schedule and replace(self.schedule, final_epsilon=self.schedule.final_epsilon * factor)
        return replace(self, epsilon=self.epsilon * factor, convention=to, schedule=schedule)

    def _require_uniform(self, what: str, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(f"expected num_classes >= 2, got {num_classes}; smoothing moves mass to another class")
        if self.prior is not None:
            raise ValueError(
                f"expected a uniform prior, got {tuple(self.prior.shape)}; {what} has no single value then: use target()"
            )


def _check_epsilon(epsilon: float, allow_negative: bool) -> None:
    if 0 <= epsilon < 1 or (allow_negative and -1 < epsilon < 0):
        return
    remedy = "pass allow_negative=True for generalised smoothing" if -1 < epsilon < 0 else "0.1 is a usual value"
    raise ValueError(f"expected 0 <= epsilon < 1, got {epsilon}; {remedy}")


def _check_prior(prior: Tensor) -> None:
    if not isinstance(prior, Tensor) or not prior.is_floating_point():
        raise TypeError(f"expected the prior as a float tensor [K] or [K, K], got {type(prior).__name__}; use torch.tensor(...)")
    if prior.dim() not in (1, 2) or (prior.dim() == 2 and prior.shape[0] != prior.shape[1]) or not prior.numel():
        raise ValueError(f"expected a prior of shape [K] or [K, K], got {tuple(prior.shape)}; one row per label if 2-d")
    total = prior.double().sum(-1)
    rows = prior.reshape(-1, prior.shape[-1])
    wrong = ~((rows >= 0).all(-1) & ((total.reshape(-1) - 1).abs() <= 1e-4))
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        where = "one" if prior.dim() == 1 else f"row {first}"
        raise ValueError(
            f"expected a non-negative prior summing to 1, got {where} with sum {float(total.reshape(-1)[first]):g} and minimum "
            f"{float(rows[first].min()):g}; divide it by its sum"
        )
