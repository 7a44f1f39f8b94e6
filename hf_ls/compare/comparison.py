"""A comparison and what it is made of: variants, their results, measurements, contrasts and the verdict; to JSON and back.

The numbers come from `statistics`, the verdict from `verdict`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from hf_ls.metrics.ceiling import constant_scores, has_learnt
from hf_ls.metrics.core import PredictionStatistics
from hf_ls.metrics.paired import Contrast, Draws
from hf_ls.report.calibration_report import BASELINE, CalibrationRow

Kind = Literal["smooth", "trade_off", "temperature", "no_difference", "not_learnt"]

TEST = "test"
# Of every variant and set, in this order; task metrics of `Result.extra` follow. "null_ece" and "null_ece_q95" are the
# mean and 95 % quantile of the ECE which a calibrated model with the same confidences shows at this n.
METRICS = (
    "accuracy", "nll", "brier", "ece", "null_ece", "null_ece_q95", "smooth_ece", "rmsce_debiased", "aurc", "e_aurc", "signed_gap",
)  # fmt: skip


@dataclass(frozen=True, order=True)
class Variant:
    """One way to train and to post-process: a column of the comparison.

    name: "baseline" (hard labels), "smoothed", or the name of an objective, such as "online" or "max_sup".
    epsilon: ε of its convention; 0 for the baseline and for objectives without one.
    tempered: whether a temperature was fitted on validation and divides the logits.

    Raises:
        ValueError: an empty name, an ε that is not finite, or a baseline with ε ≠ 0.
    """

    name: str
    epsilon: float
    tempered: bool

    def __post_init__(self) -> None:
        """Check the fields, and make the numbers what JSON gives back."""
        if not self.name or not np.isfinite(self.epsilon) or (self.name == BASELINE and self.epsilon != 0):
            raise ValueError(
                f"expected a name and a finite epsilon, 0 for the baseline, got {self.name!r} and {self.epsilon}; "
                "call a smoothed variant 'smoothed'"
            )
        object.__setattr__(self, "epsilon", float(self.epsilon))
        object.__setattr__(self, "tempered", bool(self.tempered))

    @property
    def label(self) -> str:
        """The variant in words: "baseline", "smoothed ε=0.1 + temperature"."""
        epsilon = f" ε={self.epsilon:g}" if self.epsilon else ""
        return f"{self.name}{epsilon}{' + temperature' if self.tempered else ''}"


@dataclass(frozen=True)
class TokenStatistics:
    """What is known of the tokens of one set: none of them, only sums, and what these become when sequences are drawn anew.

    row: the metrics with their 95 % intervals over sequences, and the bins of the reliability diagram. draws: of some of these
    metrics, paired with those of other models on the same sequences. sequences: how many. label_counts: how often each label
    which occurs is one, in no order.
    """

    row: CalibrationRow
    draws: Sequence[Draws]
    sequences: int
    label_counts: Sequence[int]

    def __len__(self) -> int:
        """The number of tokens."""
        return self.row.n


@dataclass(frozen=True)
class Result:
    """One variant trained with one seed, measured on every set.

    variant, seed: the cell. temperature: what divided the logits, 1.0 for a variant which is not tempered.
    validation_nll: nats against hard labels, with that temperature; of a tempered variant from cross-fitting (the
        temperature of one half measured on the other), so that fitting one is no advantage.
    statistics: set name -> per-prediction statistics in the order of that set, or the sums over its tokens. "test" is judged,
        others are columns.
    cluster: set name -> the sentence (integer) of each token [n], resampled together; None: each prediction its own.
    extra: set name -> {task metric: value}, e.g. {"test": {"exact_match": 0.8}}.
    labels: set name -> labels [n], so that a set in another order is refused, and a model which has not learnt is seen; None:
        neither is checked.
    """

    variant: Variant
    seed: int
    temperature: float
    validation_nll: float
    statistics: Mapping[str, PredictionStatistics] | Mapping[str, TokenStatistics]
    cluster: Mapping[str, NDArray[Any]] | None = None
    extra: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    labels: Mapping[str, NDArray[Any]] | None = None


@dataclass(frozen=True)
class Measurement:
    """One metric of one variant on one set.

    per_seed: its value for each of `Comparison.seeds`. mean: over seeds.
    low, high: t interval of the mean over seeds; None with one seed.
    per_seed_low, per_seed_high: for each seed, the interval over examples; None for metrics without a sound one.
    """

    variant: Variant
    set: str
    metric: str
    per_seed: list[float]
    mean: float
    low: float | None
    high: float | None
    per_seed_low: list[float] | None = None
    per_seed_high: list[float] | None = None


@dataclass(frozen=True)
class Verdict:
    """What to do, and why.

    kind: "smooth", "trade_off" (smoothing makes one of NLL and quality better and the other worse), "temperature" (use
        temperature scaling instead), "no_difference", or "not_learnt" (no advice).
    variant: what to use: the picked smoothed variant, the baseline with temperature, or the baseline.
    epsilon: of the picked variant if kind is "smooth", else None.
    sentence: the verdict in one plain sentence. evidence: sentences with the numbers behind it: how validation picked, one for
        each of `compared`, and calibration.
    compared: [row, reference, metric] of the contrasts on test which were judged.
    caveats: sentences on what the numbers do not cover, possibly none.
    """

    kind: Kind
    variant: Variant
    epsilon: float | None
    sentence: str
    evidence: list[str]
    caveats: list[str]
    compared: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Everything a comparison has to show; equal to itself after `from_json(to_json())`.

    seeds: in the order of every per_seed list. variants: in the order of the table. sets: set name -> n.
    clusters: set name -> number of clusters which were resampled, for sets with clusters.
    level, repetitions: of all intervals. temperatures, validation_nll: variant label -> value per seed.
    picked: the smoothed variant with the lowest mean validation NLL; None if none was compared.
    class_counts: of the labels of "test"; None where they are not known. quality: the metric which says how good the predictions
        are, and is judged beside the NLL.
    what: one prediction of "test", in the plural. guessing: `guessing_scores` where these are answers to questions whose options
        differ; else None, and the class_counts say what a model which knows nothing shows. tokens: the same runs compared by the
        tokens which they learnt, where "test" are answers; else None.
    """

    seeds: list[int]
    variants: list[Variant]
    sets: dict[str, int]
    clusters: dict[str, int]
    level: float
    repetitions: int
    temperatures: dict[str, list[float]]
    validation_nll: dict[str, list[float]]
    picked: Variant | None
    measurements: list[Measurement]
    contrasts: list[Contrast]
    verdict: Verdict
    class_counts: list[int] | None = None
    quality: str = "accuracy"
    what: str = "examples"
    guessing: list[float] | None = None
    tokens: Comparison | None = None

    def measurement(self, variant: Variant, metric: str, set: str = TEST) -> Measurement:
        """The measurement of a metric. Raises: ValueError if there is none."""
        found = [m for m in self.measurements if (m.variant, m.metric, m.set) == (variant, metric, set)]
        if not found:
            raise ValueError(f"expected a measured metric, got {metric!r} of {variant.label!r} on {set!r}; see metrics()")
        return found[0]

    def contrast(self, variant: Variant, reference: Variant, metric: str, set: str = TEST) -> Contrast:
        """The contrast of a metric. Raises: ValueError if there is none."""
        wanted = (variant.label, reference.label, metric, set)
        found = [c for c in self.contrasts if (c.row, c.against, c.metric, c.set) == wanted]
        if not found:
            pair = f"{variant.label!r} less {reference.label!r}"
            raise ValueError(
                f"expected a contrast that was measured, got {metric!r} of {pair} on {set!r}; "
                "the references are baseline and baseline + temperature"
            )
        return found[0]

    def size(self, set: str = TEST) -> str:
        """How much a set holds, in words: "300 examples", "14,683 tokens in 2,000 sequences"."""
        n, units = self.sets[set], self.clusters.get(set)
        return f"{n:,} {self.what}" if units is None else f"{n:,} tokens in {units:,} sequences"

    def metrics(self, set: str = TEST) -> list[str]:
        """The names of the metrics measured on a set, in order."""
        return list(dict.fromkeys(m.metric for m in self.measurements if m.set == set))

    def consistent(self, variant: Variant, set: str = TEST) -> list[bool]:
        """For each seed: is the ECE no larger than 95 % of those of a calibrated model (the consistency test)?"""
        value, limit = (self.measurement(variant, metric, set).per_seed for metric in ("ece", "null_ece_q95"))
        return [bool(v <= q) for v, q in zip(value, limit, strict=True)]

    @property
    def uninformed(self) -> Sequence[float] | None:
        """(accuracy, NLL) on "test" of knowing only how frequent each class is, or which options there are; None if not known."""
        return self.guessing or (None if self.class_counts is None else constant_scores(self.class_counts))

    def learnt(self, variant: Variant) -> bool:
        """Whether a variant is measurably better on "test" than a model which knows nothing; True if not known."""
        if self.uninformed is None:
            return True
        accuracy, nll = (self.measurement(variant, metric) for metric in ("accuracy", "nll"))
        if accuracy.per_seed_low is None or nll.per_seed_high is None:
            return True
        return has_learnt(float(np.mean(accuracy.per_seed_low)), float(np.mean(nll.per_seed_high)), self.uninformed)

    def to_json(self) -> str:
        """The comparison as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: text which is not JSON, or unknown or missing keys.
        """
        return cls._from_fields(json.loads(text))

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Self:
        try:
            fields["variants"] = [Variant(**v) for v in fields["variants"]]
            fields["picked"] = Variant(**fields["picked"]) if fields["picked"] else None
            fields["measurements"] = [Measurement(**m | {"variant": Variant(**m["variant"])}) for m in fields["measurements"]]
            fields["contrasts"] = [Contrast(**c) for c in fields["contrasts"]]
            fields["verdict"] = Verdict(**fields["verdict"] | {"variant": Variant(**fields["verdict"]["variant"])})
            fields["tokens"] = cls._from_fields(fields["tokens"]) if fields.get("tokens") else None
            return cls(**fields)
        except (TypeError, KeyError) as error:
            raise ValueError(f"expected a comparison written by to_json, got {error}; was it by another version?") from error
