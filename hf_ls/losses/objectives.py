"""Objectives beside the smoothed cross entropy: what one prediction costs, per row.

One function per objective, all f(logits [n, K], labels [n], smoothing, **own) -> losses [n]; their names in `OBJECTIVES`; and
`settle`, the one place where the name and the parameters which a user gives are checked.

Every function computes in float32 (float64 stays float64), takes valid labels only (`masked_objective` drops
the ignored rows first), and gives a −inf class without prior mass exactly no influence. Losses are in nats.
Notation: z logits, p = softmax(z), nll = −log p_y, u the prior of `smoothing` (1/K if it has none).

With ε > 0: smoothed_ce, confidence_penalty, brier and generalised_smoothing use it; the others have a strength or an
epsilon of their own, or weigh each NLL by the prediction, and refuse it (`check_smoothing`). ε < 0 is for
generalised_smoothing alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_ls.common.errors import did_you_mean
from hf_ls.losses._checks import class_ids, refuse
from hf_ls.losses.adaptive import (
    OnlineLabelSmoothing,
    OnlineSettings,
    adaptive_smoothed_terms,
    entropy,
    graduated_epsilon,
    instance_epsilon,
    normalised_entropy,
)
from hf_ls.losses.cross_entropy import SmoothedTerms, smoothed_terms
from hf_ls.losses.smoothing import Smoothing

ObjectiveFunction = Callable[..., Tensor]


def smoothed_ce(logits: Tensor, labels: Tensor, smoothing: Smoothing) -> Tensor:
    """The smoothed cross entropy: nll + e·(z_y − ⟨u, z⟩); ε = 0 is the plain nll.

    At least the entropy of its target; e = ε, or ε/(1−u_y) for convention "wrong".

    Raises: as `check_smoothing` and `losses.smoothed_terms`. Source: Szegedy et al. 2016.
    """
    return _terms("smoothed_ce", logits, labels, smoothing).loss


def confidence_penalty(logits: Tensor, labels: Tensor, smoothing: Smoothing, *, beta: float = 0.1) -> Tensor:
    """The (smoothed) cross entropy minus β times the entropy of the prediction.

    nll + e·(z_y − ⟨u, z⟩) − β·H(p), H(p) = −Σ p_k log p_k. At least −β·log K; β ≥ 0. The best β differs
    widely between tasks; 0.1 is the paper's value for image classification.

    Raises: as `smoothed_ce`; ValueError for β < 0.
    Source: Pereyra et al. 2017, "Regularizing Neural Networks by Penalizing Confident Output Distributions".
    """
    _require("beta", beta, 0, math.inf)
    z = _float(logits)
    loss = _terms("confidence_penalty", z, labels, smoothing).loss
    return loss - beta * entropy(z.log_softmax(-1))


def maxsup(logits: Tensor, labels: Tensor, smoothing: Smoothing, *, alpha: float = 0.1) -> Tensor:
    """Max suppression: label smoothing which presses down the top logit, right or wrong.

    nll + α·(max_k z_k − ⟨u, z⟩). At least 0; α ≥ 0. Equal to smoothed_ce at ε = α wherever the label has the
    top logit. Tied top logits share the gradient. The authors' code raises α linearly from 0.1 to 0.2.

    Raises: as `check_smoothing` (ε must be 0) and `losses.smoothed_terms`; ValueError for α < 0.
    Source: Zhou et al. 2025, "MaxSup: Overcoming Representation Collapse in Label Smoothing".
    """
    _require("alpha", alpha, 0, math.inf)
    z = _float(logits)
    nll = _terms("maxsup", z, labels, smoothing).nll
    prior = smoothing.prior_for(class_ids(labels), z.shape[-1], z.dtype)
    return _finite(nll + alpha * (z.amax(-1) - (z.masked_fill(prior == 0, 0) * prior).sum(-1)))


def label_relaxation(logits: Tensor, labels: Tensor, smoothing: Smoothing, *, alpha: float = 0.1) -> Tensor:
    """Label relaxation: 0 where p_y ≥ 1−α, else the KL divergence to the nearest distribution with p_y = 1−α.

    loss = (1−α)·log((1−α)/p_y) + α·log(α/(1−p_y)) for p_y < 1−α: the nearest distribution spreads α over the
    wrong classes in the model's own proportions, so only p_y is left in the formula. At least 0.
    0 ≤ α < 1; α = 0 is the nll. The paper tunes α; 0.1 is the default of its code.

    Raises: as `check_smoothing` (ε must be 0) and `losses.smoothed_terms`; ValueError for α outside [0, 1).
    Source: Lienen & Hüllermeier 2021, "From Label Smoothing to Label Relaxation".
    """
    _require("alpha", alpha, 0, 1)
    nll = _terms("label_relaxation", logits, labels, smoothing).nll
    if alpha == 0:
        return nll
    p_wrong = -torch.expm1(-nll)
    outside = p_wrong > alpha
    # Inside the credal set 1−p_y may be 0: a constant keeps log and its gradient finite there.
    log_wrong = p_wrong.where(outside, alpha).log()
    divergence = (1 - alpha) * (math.log1p(-alpha) + nll) + alpha * (math.log(alpha) - log_wrong)
    return divergence.where(outside, 0)


def margin_smoothing(logits: Tensor, labels: Tensor, smoothing: Smoothing, *, margin: float = 10.0, alpha: float = 0.1) -> Tensor:
    """Margin-based label smoothing (MbLS): nll + α·Σ_k u_k·max(0, max_j z_j − z_k − margin).

    At least 0; α, margin ≥ 0 (margin in nats). The mean over classes and both defaults are those of the
    authors' code; the paper writes a sum and also uses margin 6. margin = 0 is `maxsup`, inf is the nll.

    Raises: as `check_smoothing` (ε must be 0) and `losses.smoothed_terms`; ValueError for α or margin < 0.
    Source: Liu et al. 2022, "The Devil is in the Margin: Margin-based Label Smoothing …".
    """
    _require("alpha", alpha, 0, math.inf)
    _require("margin", margin, 0, math.inf, inclusive=True)
    z = _float(logits)
    nll = _terms("margin_smoothing", z, labels, smoothing).nll
    prior = smoothing.prior_for(class_ids(labels), z.shape[-1], z.dtype)
    excess = (z.amax(-1, keepdim=True) - z - margin).masked_fill(prior == 0, 0).relu()
    return _finite(nll + alpha * (prior * excess).sum(-1))


def focal(logits: Tensor, labels: Tensor, smoothing: Smoothing, *, gamma: float = 2.0) -> Tensor:
    """The focal loss: (1−p_y)^γ·nll, at least 0; γ ≥ 0, γ = 0 is the nll.

    Raises: as `check_smoothing` (ε must be 0) and `losses.smoothed_terms`; ValueError for γ < 0.
    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection" (without its class weight α).
    """
    _require("gamma", gamma, 0, math.inf)
    nll = _terms("focal", logits, labels, smoothing).nll
    return _p_wrong(nll).pow(gamma) * nll


def flsd(
    logits: Tensor,
    labels: Tensor,
    smoothing: Smoothing,
    *,
    gamma_low: float = 5.0,
    gamma_high: float = 3.0,
    threshold: float = 0.2,
) -> Tensor:
    """The sample-dependent focal loss FLSD-53: (1−p_y)^γ·nll with a γ for unlikely labels and one for others.

    γ = gamma_low where p_y < threshold, else gamma_high. At least 0; γ ≥ 0, threshold in [0, 1]. The choice
    of γ has no gradient; the loss jumps at the threshold.

    Raises: as `focal`; ValueError for a threshold outside [0, 1].
    Source: Mukhoti et al. 2020, "Calibrating Deep Neural Networks using Focal Loss".
    """
    _require("gamma_low", gamma_low, 0, math.inf)
    _require("gamma_high", gamma_high, 0, math.inf)
    _require("threshold", threshold, 0, 1, inclusive=True)
    nll = _terms("flsd", logits, labels, smoothing).nll
    gamma = torch.where(torch.exp(-nll.detach()) < threshold, gamma_low, gamma_high).to(nll.dtype)
    return _p_wrong(nll).pow(gamma) * nll


def generalised_smoothing(logits: Tensor, labels: Tensor, smoothing: Smoothing, *, floor: float = math.inf) -> Tensor:
    """Smoothing with ε of either sign, ε < 0 for noisy labels: nll + max(e·(z_y − ⟨u, z⟩), −floor).

    With ε < 0 the target is (1+|ε|)·e_y − |ε|·u and the loss falls without bound as z_y grows. Two guards:
    `Smoothing` takes ε < 0 only with allow_negative=True, and a finite `floor` (> 0, nats) keeps every loss
    above −floor, where a row has the gradient of its nll. The paper has no floor, tries ε from 0.8 down to −8
    (here −1 < ε < 1), and warms up with the cross entropy: Schedule("constant", warmup_steps=...).

    Raises: as `losses.smoothed_terms`; ValueError for floor ≤ 0.
    Source: Wei et al. 2022, "To Smooth or Not? When Label Smoothing Meets Noisy Labels".
    """
    if not floor > 0:
        raise ValueError(f"expected floor > 0, got {floor}; math.inf switches it off")
    terms = _terms("generalised_smoothing", logits, labels, smoothing)
    return terms.nll + terms.smoothing_term.clamp_min(-floor)


def graduated(
    logits: Tensor,
    labels: Tensor,
    smoothing: Smoothing,
    *,
    thresholds: Sequence[float] = (0.3, 0.7),
    values: Sequence[float] = (0.0, 0.1, 0.3),
) -> Tensor:
    """Smoothed cross entropy with an ε for each bucket of the label's probability: `adaptive.graduated_epsilon`.

    Raises: as `check_smoothing` (ε must be 0) and `adaptive.adaptive_smoothed_terms`; ValueError for thresholds which do not
    increase inside (0, 1), values outside [0, 1), or another number of values than buckets.
    Source: Wang et al. 2020, "On the Inference Calibration of Neural Machine Translation", section 5.
    """
    _check_rows("graduated", logits, labels, smoothing)
    epsilon = partial(graduated_epsilon, thresholds=thresholds, values=values)
    return adaptive_smoothed_terms(logits, labels, smoothing, epsilon).loss


def instance(logits: Tensor, labels: Tensor, smoothing: Smoothing, *, maximum: float = 0.2) -> Tensor:
    """Smoothed cross entropy with ε = maximum·(1 − H(p)/log K) for each row: `adaptive.instance_epsilon`.

    Raises: as `check_smoothing` (ε must be 0) and `adaptive.adaptive_smoothed_terms`; ValueError for maximum outside [0, 1].
    Source: Lee, Cheung & Zhang 2022, "Adaptive Label Smoothing with Self-Knowledge in Natural Language Generation".
    """
    _check_rows("instance", logits, labels, smoothing)
    return adaptive_smoothed_terms(
        logits, labels, smoothing, partial(instance_epsilon, maximum=maximum), confidence="entropy"
    ).loss


def dft(logits: Tensor, labels: Tensor, smoothing: Smoothing) -> Tensor:
    """Dynamic fine-tuning: the NLL of each label weighted with its own probability, sg(p_y)·nll.

    sg: no gradient goes through the weight, so that the gradient is p_y·(p − e_y), that of −p_y: labels which the model holds
    for unlikely hardly pull. 0 to 1/e, and 0 again at p_y = 0. No proper score: on labels with noise it is content only with all
    probability on one class. The same as `loss_type="dft"` of trl.SFTConfig.

    Raises: as `check_smoothing` (ε must be 0) and `losses.smoothed_terms`.
    Source: Wu et al. 2025, "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification".
    """
    nll = _terms("dft", logits, labels, smoothing).nll
    return torch.exp(-nll.detach()) * nll


def eaft(logits: Tensor, labels: Tensor, smoothing: Smoothing, *, alpha: float = 1.0, top_k: float = 20) -> Tensor:
    """Entropy-adaptive fine-tuning: the NLL weighted with the uncertainty of the prediction, sg(H/log k)^α·nll.

    H: the entropy of the k = `top_k` largest probabilities, made to sum to 1; sg: no gradient goes through the weight, which is
    0 (a sure prediction, right or wrong) to 1. At least 0; α ≥ 0, α = 0 is the nll; top_k ≥ 2, inf for all classes. With fewer
    classes k is their number. Both defaults are the paper's, whose code has 3.0 for log 20 = 2.996.

    Raises: as `check_smoothing` (ε must be 0) and `losses.smoothed_terms`; ValueError for α < 0 and a top_k below 2 or with a
    fraction.
    Source: Diao et al. 2026, "Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting".
    """
    _require("alpha", alpha, 0, math.inf)
    _require("top_k", top_k, 2, math.inf, inclusive=True)
    if top_k % 1 and top_k != math.inf:
        raise ValueError(f"expected top_k as a whole number, got {top_k}; 20 is the paper's")
    z = _float(logits)
    nll = _terms("eaft", z, labels, smoothing).nll
    with torch.no_grad():
        largest = z if top_k >= z.shape[-1] else z.topk(int(top_k), sorted=False).values
        weight = normalised_entropy(largest).pow(alpha)
    return weight * nll


def brier_loss(logits: Tensor, labels: Tensor, smoothing: Smoothing) -> Tensor:
    """The Brier score of the whole distribution, Σ_k (p_k − t_k)² with the (smoothed) target t.

    0 to 2, no nats; least at p = t, a proper score as the cross entropy, but bounded: a label of probability near 0 hardly
    pulls, so that it is for models which know something already. With ε > 0 its gradient is that of the score expected under t,
    Σ_j t_j·Σ_k (p_k − [k = j])², which is larger by the constant 1 − Σ_k t_k²; Shao et al. smooth that and add a logarithm of the
    probabilities below ε/K, which is left out here.

    Raises: as `check_smoothing` and `losses.smoothed_terms`.
    Source: Brier 1950; for each token of a language model Shao et al. 2024, "Language Generation with Strictly Proper Scoring
    Rules".
    """
    z = _float(logits)
    _terms("brier", z, labels, smoothing)
    ids = class_ids(labels)
    return (z.softmax(-1) - smoothing.target(ids, z.shape[-1], z.dtype)).square().sum(-1)


def z_loss(logits: Tensor) -> Tensor:
    """The squared log normaliser of each row, lse(z)², to be added with a small weight to any objective.

    logits [n, K] -> [n], ≥ 0, in nats². It keeps the logits from drifting, which half precision needs, and
    does not depend on the labels. 1e-4 is the usual weight.

    Source: Mesh TensorFlow (Shazeer et al. 2018); weight 1e-4 in Chowdhery et al. 2022, "PaLM".
    """
    return _float(logits).logsumexp(-1).square()


OBJECTIVES: dict[str, ObjectiveFunction] = {
    "smoothed_ce": smoothed_ce,
    "confidence_penalty": confidence_penalty,
    "maxsup": maxsup,
    "label_relaxation": label_relaxation,
    "margin_smoothing": margin_smoothing,
    "focal": focal,
    "flsd": flsd,
    "generalised_smoothing": generalised_smoothing,
    "graduated": graduated,
    "instance": instance,
    "dft": dft,
    "eaft": eaft,
    "brier": brier_loss,
}
NAMES = (*OBJECTIVES, "online")
COMBINES_WITH_EPSILON = frozenset({"smoothed_ce", "confidence_penalty", "generalised_smoothing", "brier"})


@dataclass(frozen=True, init=False, repr=False)
class Objective:
    """An objective by name with its parameters: a value which can be pickled, compared, printed and called.

    `objective(logits [n, K], labels [n], smoothing) -> losses [n]`.

    Args:
        name: a key of `OBJECTIVES`.
        z_loss: weight ≥ 0 of the z-loss added to it.
        params: the function's own parameters; the paper's defaults where left out.

    >>> Objective("focal", gamma=3)
    Objective('focal', gamma=3)

    Raises: ValueError for an unknown name or parameter (with the nearest known one) and for values out of
    range; TypeError for values of another type.
    """

    name: str
    params: tuple[tuple[str, Any], ...]
    z_loss: float

    def __init__(self, name: str, *, z_loss: float = 0.0, **params: Any) -> None:
        """Check the name, the parameters and their ranges."""
        _check_name(name, OBJECTIVES)
        signature = inspect.signature(OBJECTIVES[name]).parameters.values()
        defaults = {p.name: p.default for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY}
        checked = _checked_params(name, {**params, "z_loss": z_loss}, {**defaults, "z_loss": 0.0})
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "z_loss", checked.pop("z_loss"))
        object.__setattr__(self, "params", tuple({**defaults, **checked}.items()))
        _require("z_loss", self.z_loss, 0, math.inf)
        # The function knows its ranges: let it complain now, not in the first training step.
        self(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), Smoothing(0.0))

    def __call__(self, logits: Tensor, labels: Tensor, smoothing: Smoothing) -> Tensor:
        """The loss of each row: logits [n, K], labels [n] -> [n], in nats."""
        z = _float(logits)
        losses = OBJECTIVES[self.name](z, class_ids(labels), smoothing, **dict(self.params))
        return losses + self.z_loss * z_loss(z) if self.z_loss else losses

    @property
    def plain(self) -> bool:
        """Whether this is the smoothed cross entropy and nothing else, which has faster ways than one objective per row."""
        return self.name == "smoothed_ce" and not self.z_loss

    def terms(self, logits: Tensor, labels: Tensor, smoothing: Smoothing, *, ignore_index: int = -100) -> SmoothedTerms:
        """The NLL of each label and the rest of its loss, in nats: logits [..., K], labels [...], 0 where ignored.

        Raises: as `masked_objective`.
        """
        if self.plain:
            return smoothed_terms(logits, labels, smoothing, ignore_index=ignore_index)
        nll = smoothed_terms(logits, labels, Smoothing(0.0), ignore_index=ignore_index).nll
        losses = masked_objective(self, logits, labels, smoothing, ignore_index=ignore_index)
        return SmoothedTerms(nll, losses - nll)

    def __repr__(self) -> str:
        """The call which makes this objective, every parameter spelled out."""
        values = [*self.params, ("z_loss", self.z_loss)] if self.z_loss else list(self.params)
        return f"Objective({', '.join([repr(self.name), *(f'{key}={value!r}' for key, value in values)])})"


def settle(
    objective: str | Objective | OnlineLabelSmoothing, params: Mapping[str, Any] | None = None
) -> Objective | OnlineSettings | OnlineLabelSmoothing:
    """What a user's choice of objective means, checked before the first batch.

    Args:
        objective: a name in `NAMES`, or an objective which is made already.
        params: parameters of a named objective, e.g. {"gamma": 3}; the paper's defaults where left out.

    Returns: an `Objective` for a name in `OBJECTIVES`; `adaptive.OnlineSettings` for "online", whose state needs the number of
    classes (`.build(num_classes)`); what is made already, as it is.

    >>> settle("flsd", {"threshold": 0.3})
    Objective('flsd', gamma_low=5.0, gamma_high=3.0, threshold=0.3)

    Raises: ValueError for an unknown name or parameter (with the nearest known one), for values out of range, and for
    parameters beside an objective which has its own; TypeError for values of another type. Whether ε is allowed beside the
    objective: `check_smoothing`.
    """
    if params is not None and not isinstance(params, Mapping):
        raise TypeError(f"expected parameters as a mapping, got {type(params).__name__} {params!r}; write {{'gamma': 3}}")
    if isinstance(objective, Objective | OnlineLabelSmoothing):
        if params:
            raise ValueError(
                f"expected no parameters beside {type(objective).__name__}, which has its own, got {dict(params)}; "
                "give the name and the parameters, or the object alone"
            )
        return objective
    _check_name(objective, NAMES)
    if objective == "online":
        return OnlineSettings(**_checked_params("online", params or {}, {"alpha": OnlineSettings.alpha}))
    return Objective(objective, **(params or {}))


def masked_objective(
    objective: Objective | ObjectiveFunction,
    logits: Tensor,
    labels: Tensor,
    smoothing: Smoothing,
    *,
    ignore_index: int = -100,
) -> Tensor:
    """An objective over labels which may be ignored: losses of the labels' shape, exactly 0 where ignored.

    logits [..., K], labels [...]. Ignored rows are dropped before anything is computed, so nothing in them
    (NaN, inf) reaches a value or a gradient. The caller reduces, by the count of kept labels.

    Raises: ValueError for shapes which do not match; as the objective.
    """
    labels = class_ids(labels)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"expected labels {tuple(logits.shape[:-1])} for logits {tuple(logits.shape)}, got "
            f"{tuple(labels.shape)}; one label per row of logits (language models: shift the labels)"
        )
    kept = labels != ignore_index
    losses = objective(logits[kept], labels[kept], smoothing)
    return losses.new_zeros(labels.shape).masked_scatter(kept, losses)


def check_smoothing(name: str, smoothing: Smoothing) -> None:
    """Refuse a smoothing (or the end of its schedule) which the objective of this name in `NAMES` does not use.

    Every objective calls it; call it before training to hear of it early.

    Raises: ValueError naming the remedy.
    """
    epsilons = [smoothing.epsilon, *([smoothing.schedule.final_epsilon] if smoothing.schedule else [])]
    if name not in COMBINES_WITH_EPSILON and any(epsilons):
        raise ValueError(
            f"expected epsilon = 0 with {name}, got {max(epsilons, key=abs)}: it takes the place of label smoothing; "
            f"pass Smoothing(0.0) and its own parameters, or use one of {sorted(COMBINES_WITH_EPSILON)}"
        )
    if name != "generalised_smoothing" and min(epsilons) < 0:
        raise ValueError(f"expected epsilon >= 0 with {name}, got {min(epsilons)}; use 'generalised_smoothing' for ε < 0")


def _terms(name: str, logits: Tensor, labels: Tensor, smoothing: Smoothing) -> SmoothedTerms:
    _check_rows(name, logits, labels, smoothing)
    return smoothed_terms(logits, labels, smoothing)


def _check_rows(name: str, logits: Tensor, labels: Tensor, smoothing: Smoothing) -> None:
    check_smoothing(name, smoothing)
    if logits.dim() != 2:
        raise ValueError(f"expected logits [n, K], got {tuple(logits.shape)}; use masked_objective for other shapes")
    ids = class_ids(labels)
    refuse(ids < 0, "labels >= 0", lambda: int(ids.min()), "use masked_objective to drop ignored rows")


def _float(logits: Tensor) -> Tensor:
    # Cast once and use the result throughout: each cast from half precision rounds its own gradient back.
    return logits if logits.dtype == torch.float64 else logits.float()


def _p_wrong(nll: Tensor) -> Tensor:
    # 1−p_y without cancellation; never below the smallest float, where a power < 1 has an infinite gradient.
    return (-torch.expm1(-nll)).clamp_min(torch.finfo(nll.dtype).tiny)


def _finite(losses: Tensor) -> Tensor:
    bad = ~torch.isfinite(losses.detach())
    refuse(
        bad,
        "finite logits wherever the prior has mass",
        lambda: f"NaN or inf in {int(bad.sum())} of {bad.numel()} rows",
        "give masked classes no mass with Smoothing(0.0, prior=support_prior(...))",
    )
    return losses


def _require(name: str, value: float, low: float, high: float, *, inclusive: bool = False) -> None:
    if not (low <= value < high or (inclusive and value == high)):
        end = "]" if inclusive else ")"
        raise ValueError(f"expected {name} in [{low}, {high}{end}, got {value}; see the objective's docstring")


def _check_name(name: str, known: Iterable[str]) -> None:
    if not isinstance(name, str):
        raise TypeError(f"expected the name of an objective, got {type(name).__name__} {name!r}; choose one of {sorted(known)}")
    if name not in known:
        hint = did_you_mean(name, known, "choose one of them")
        raise ValueError(f"expected an objective in {sorted(known)}, got {name!r}; {hint}")


def _checked_params(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The given parameters, each known and of the type of its default: a number, or a tuple of numbers."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        if key not in defaults:
            hint = did_you_mean(str(key), defaults, "choose one of them")
            raise ValueError(f"expected parameters of {name!r} in {list(defaults)}, got {key!r}; {hint}")
        if not isinstance(defaults[key], tuple):
            if not _is_number(value):
                raise TypeError(f"expected {key} as a number, got {type(value).__name__} {value!r}; pass e.g. {defaults[key]}")
            found[key] = value
        else:
            if not isinstance(value, list | tuple) or not all(_is_number(part) for part in value):
                raise TypeError(f"expected {key} as a list of numbers, got {value!r}; pass e.g. {list(defaults[key])}")
            found[key] = tuple(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
