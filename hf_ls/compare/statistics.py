"""From results to a comparison: the same examples and seeds, every metric, paired differences, and a verdict.

Pure functions of arrays, without torch and without files. How a difference and its interval come about is in
`metrics.paired`, the rule of the verdict in `verdict`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_ls.compare.comparison import TEST, Comparison, Measurement, Result, TokenStatistics, Variant, Verdict
from hf_ls.compare.measured import Examples, Tokens
from hf_ls.compare.verdict import judge
from hf_ls.metrics.core import PredictionStatistics
from hf_ls.metrics.paired import Contrast, holm, seed_difference, seed_interval
from hf_ls.metrics.validation import check_count
from hf_ls.report.calibration_report import BASELINE


def compare(
    results: Sequence[Result],
    *,
    quality: str = "accuracy",
    level: float = 0.95,
    repetitions: int = 1000,
    seed: int = 0,
    what: str = "examples",
    guessing: Sequence[float] | None = None,
    tokens: Comparison | None = None,
) -> Comparison:
    """Compare variants on shared examples within each seed, and judge.

    Validation picks the smoothed variant (lowest mean NLL, with or without temperature); "test" reports. The verdict is
    "smooth" if the picked one is measurably better than the baseline and than the baseline + temperature in NLL or in quality,
    and measurably worse than neither in the other; "trade_off" if it is so in one and worse than one of them in the other; else
    "temperature" if baseline + temperature is measurably better than the baseline in NLL; else "no_difference". "Measurably"
    means that the two-sided p-value of the contrast, over examples (or whole sequences) and seeds, is at most 1 − level, which is
    to say that its interval leaves 0 out. It is not corrected there: one variant is tested, picked on other data, and two ways to
    be better with half of 1 − level each make a wrong "smooth" no likelier than 1 − level. The table of all ε is corrected
    (`Contrast.p_holm`). "not_learnt" where neither the baseline nor the picked variant has learnt (`metrics.ceiling.has_learnt`),
    which needs the labels.

    quality: the metric which is judged beside the NLL, of the predictions or in `Result.extra`. level: of all intervals.
    repetitions: bootstrap replicates. seed: of their weights. Sums over tokens bring replicates and 95 % intervals of their own.
    what, guessing, tokens: as in `Comparison`.

    >>> from hf_ls.metrics import PredictionStatistics
    >>> labels = np.arange(300) % 3
    >>> right = np.eye(3)[(labels + (np.arange(300) % 10 == 0)) % 3]  # 9 of 10
    >>> def measured(name, epsilon, logits):
    ...     test = PredictionStatistics.from_logits(logits, labels)
    ...     return Result(Variant(name, epsilon, tempered=False), 0, 1.0, float(test.nll.mean()), {"test": test})
    >>> found = compare([measured("baseline", 0.0, 9 * right), measured("smoothed", 0.1, 3 * right)], repetitions=100)
    >>> found.verdict.kind
    'smooth'

    Raises:
        TypeError: results which are not `Result`.
        ValueError: no results, no baseline, a variant without one of the seeds or twice with one, no set "test", sets which
            differ in n, labels or clusters, infinite nll, or a temperature ≤ 0 or other than 1 on an untempered variant.
    """
    cells, variants, seeds = _checked(results)
    if not 0.0 < level < 1.0:
        raise ValueError(f"expected level between 0 and 1, got {level}; 0.95 is usual")
    check_count(repetitions, "repetitions")
    first = cells[variants[0], seeds[0]]
    if level != 0.95 and isinstance(first.statistics[TEST], TokenStatistics):
        raise ValueError(f"expected level 0.95 with sums over tokens, whose intervals have it, got {level}; leave it out")
    measurements: list[Measurement] = []
    contrasts: list[Contrast] = []
    clusters: dict[str, int] = {}
    drawn = repetitions
    for name in first.statistics:
        ordered = [cells[variant, s] for variant in variants for s in seeds]
        models: Any = [r.statistics[name] for r in ordered]
        measured: Examples | Tokens
        if isinstance(models[0], TokenStatistics):
            measured = Tokens(models)
        else:
            measured = Examples(models, (first.cluster or {}).get(name), repetitions=repetitions, seed=seed)
        drawn = measured.repetitions
        if measured.clustered:
            clusters[name] = measured.units
        rows = {v: list(range(i * len(seeds), (i + 1) * len(seeds))) for i, v in enumerate(variants)}
        for variant in variants:
            own = [cells[variant, s] for s in seeds]
            measurements += _measure(variant, own, name, rows[variant], measured, level)
        extra = list((first.extra.get(name) or {}).keys())
        for reference in (Variant(BASELINE, 0.0, False), Variant(BASELINE, 0.0, True)):
            if reference not in variants:
                continue
            for metric in (*measured.compared, *extra):
                values = {m.variant: m.per_seed for m in measurements if (m.set, m.metric) == (name, metric)}
                found = {}
                for v in (v for v in variants if v != reference):
                    names = {"row": v.label, "against": reference.label, "set": name}
                    if metric in extra:
                        found[v] = seed_difference(metric, values[v], values[reference], level, **names)
                    else:
                        found[v] = measured.difference(rows[v], rows[reference], metric, level, **names)
                contrasts += _corrected(found)
    by_label = {v.label: [cells[v, s] for s in seeds] for v in variants}
    validation = {label: [float(r.validation_nll) for r in own] for label, own in by_label.items()}
    smoothed = [v for v in variants if v.name != BASELINE]
    if not any(c.metric == quality for c in contrasts) and len(variants) > 1:
        raise ValueError(f"expected a quality which every run measured, got {quality!r}; name one of its metrics")
    comparison = Comparison(
        seeds=seeds,
        variants=variants,
        sets={name: len(stats) for name, stats in first.statistics.items()},
        clusters=clusters,
        level=float(level),
        repetitions=int(drawn),
        temperatures={label: [float(r.temperature) for r in own] for label, own in by_label.items()},
        validation_nll=validation,
        picked=min(smoothed, key=lambda v: float(np.mean(validation[v.label])), default=None),
        measurements=measurements,
        contrasts=contrasts,
        verdict=Verdict("no_difference", Variant(BASELINE, 0.0, False), None, "", [], []),
        class_counts=_label_counts(first),
        quality=quality,
        what=what,
        guessing=None if guessing is None else [float(score) for score in guessing],
        tokens=tokens,
    )
    return dataclasses.replace(comparison, verdict=judge(comparison))


def _checked(results: Sequence[Result]) -> tuple[dict[tuple[Variant, int], Result], list[Variant], list[int]]:
    """Return the results by (variant, seed), the variants in the order of the table, and the seeds, ascending."""
    if not results or not all(isinstance(result, Result) for result in results):
        raise TypeError(f"expected a list of Result, got {type(results[0]).__name__ if results else 'none'}; give one per run")
    cells = {(result.variant, int(result.seed)): result for result in results}
    if len(cells) != len(results):
        raise ValueError(f"expected each variant once per seed, got {len(results) - len(cells)} repeated; drop the older ones")
    variants = sorted({v for v, _ in cells}, key=lambda v: (v.name != BASELINE, v.name != "smoothed", v))
    seeds = sorted({s for _, s in cells})
    missing = [f"{v.label} with seed {s}" for v in variants for s in seeds if (v, s) not in cells]
    if missing:
        raise ValueError(f"expected every variant with every seed, got none of {', '.join(missing)}; run these, or drop the seed")
    if len({v.label for v in variants}) < len(variants):
        raise ValueError(f"expected variants with labels of their own, got {[v.label for v in variants]}; rename the alike")
    if variants[0] != Variant(BASELINE, 0.0, False):
        raise ValueError(f"expected Variant('baseline', 0, False), got only {[v.label for v in variants]}; run the baseline too")
    first = cells[variants[0], seeds[0]]
    if TEST not in first.statistics:
        raise ValueError(f"expected a set named 'test', got {list(first.statistics)}; it is the one which is judged")
    for (variant, s), result in cells.items():
        _check_result(result, first, f"of {variant.label} with seed {s}")
        if variant.tempered and (dataclasses.replace(variant, tempered=False), s) in cells:
            plain = cells[dataclasses.replace(variant, tempered=False), s]
            for name, stats in result.statistics.items():
                # Dividing may round two classes to a tie; more than a few changes are another run or another order.
                if _changed(stats, plain.statistics[name]) > 0.001:
                    raise ValueError(
                        f"expected the same predictions of {variant.label} with and without temperature on {name!r} "
                        f"with seed {s}, got others; divide the logits of one run, in one order, by the temperature"
                    )
    return cells, variants, seeds


def _check_result(result: Result, first: Result, who: str) -> None:
    temperature = result.temperature
    if not (np.isfinite(temperature) and temperature > 0) or (not result.variant.tempered and temperature != 1.0):
        wanted = "above 0" if result.variant.tempered else "1.0 without tempering"
        raise ValueError(f"expected a temperature {wanted} {who}, got {temperature}; check Variant.tempered")
    if not np.isfinite(result.validation_nll):
        raise ValueError(f"expected a finite validation_nll {who}, got {result.validation_nll}; leave out a diverged variant")
    if list(result.statistics) != list(first.statistics):
        wanted = f"{list(first.statistics)}, got {list(result.statistics)}"
        raise ValueError(f"expected the sets {wanted} {who}; evaluate every run on the same sets, in one order")
    for name, stats in result.statistics.items():
        theirs = first.statistics[name]
        if len(stats) != len(theirs):
            wanted = f"{len(theirs)} predictions, got {len(stats)}"
            raise ValueError(f"expected {wanted} on {name!r} {who}; evaluate every run on the same examples")
        if not np.isfinite(_nll(stats)).all():
            raise ValueError(f"expected finite nll on {name!r} {who}, got inf; build the statistics from logits")
        if _drawn_from(stats) != _drawn_from(theirs):
            raise ValueError(
                f"expected the same sequences on {name!r} {who} as elsewhere, got others; keep one order of examples, and their "
                "draws by one seed"
            )
        for what, own, other in (("labels", result.labels, first.labels), ("cluster", result.cluster, first.cluster)):
            mine, others = (own or {}).get(name), (other or {}).get(name)
            if (mine is None) != (others is None) or (mine is not None and not np.array_equal(mine, others)):  # type: ignore[arg-type]
                raise ValueError(
                    f"expected the same {what} on {name!r} {who} as elsewhere, got others; keep one order of examples"
                )
            if mine is not None and np.shape(mine) != (len(stats),):
                raise ValueError(
                    f"expected {what} [{len(stats)}] on {name!r} {who}, got {np.shape(mine)}; give one per prediction"
                )
    if {n: sorted(e) for n, e in result.extra.items()} != {n: sorted(e) for n, e in first.extra.items()}:
        raise ValueError(f"expected the task metrics of {dict(first.extra)} {who}, got {dict(result.extra)}; measure the same")


def _nll(stats: PredictionStatistics | TokenStatistics) -> Any:
    return stats.row.value("nll") if isinstance(stats, TokenStatistics) else stats.nll


def _drawn_from(stats: PredictionStatistics | TokenStatistics) -> list[tuple[str, int]] | None:
    """What the draws of tokens were made from; None for predictions, which are drawn here."""
    return [(draws.examples, draws.units) for draws in stats.draws] if isinstance(stats, TokenStatistics) else None


def _changed(stats: Any, plain: Any) -> float:
    """The share of predictions which are right in one and wrong in the other, of tokens as far as it shows in their sum."""
    if isinstance(stats, TokenStatistics):
        return abs(stats.row.value("accuracy") - plain.row.value("accuracy"))
    return float(np.mean(stats.correct != plain.correct))


def _label_counts(result: Result) -> list[int] | None:
    stats, labels = result.statistics[TEST], (result.labels or {}).get(TEST)
    if isinstance(stats, TokenStatistics):
        return [int(count) for count in stats.label_counts]
    return None if labels is None else np.bincount(np.unique(labels, return_inverse=True)[1].ravel()).tolist()


def _measure(
    variant: Variant, results: list[Result], name: str, rows: list[int], measured: Examples | Tokens, level: float
) -> list[Measurement]:
    """Return every metric of one variant on one set."""
    values = [
        measured.values(row) | {metric: float(value) for metric, value in result.extra.get(name, {}).items()}
        for result, row in zip(results, rows, strict=True)
    ]
    measurements = []
    for metric in (metric for metric in values[0] if all(metric in found for found in values)):
        numbers = [found[metric] for found in values]
        low, high = seed_interval(numbers, level)
        over_units = [measured.interval(row, metric, level) for row in rows]
        ends: list[list[float] | None] = [None, None]
        if None not in over_units:
            ends = [list(side) for side in zip(*over_units, strict=True)]
        measurements.append(Measurement(variant, name, metric, numbers, float(np.mean(numbers)), low, high, *ends))
    return measurements


def _corrected(contrasts: dict[Variant, Contrast]) -> list[Contrast]:
    """Return the contrasts with one reference; the smoothed variants are one family for Holm's correction."""
    family = [v for v in contrasts if v.name != BASELINE]
    p_holm = dict(zip(family, holm([contrasts[v].p for v in family]), strict=True))
    return [dataclasses.replace(contrast, p_holm=p_holm.get(v, contrast.p)) for v, contrast in contrasts.items()]
