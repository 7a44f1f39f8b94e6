"""What to do, judged from a comparison: smooth, use temperature scaling instead, or neither; with the evidence in sentences.

Two things are judged, the NLL and the quality of the predictions, because one may move without the other.
"""

from __future__ import annotations

import numpy as np

from hf_ls.compare.comparison import TEST, Comparison, Kind, Variant, Verdict
from hf_ls.metrics.paired import Finding
from hf_ls.report.calibration_report import BASELINE

_BASELINE, _TEMPERED = Variant(BASELINE, 0.0, False), Variant(BASELINE, 0.0, True)
_TITLES = {"nll": "NLL", "ece": "ECE", "aurc": "AURC", "e_aurc": "E-AURC", "brier": "Brier score"}
_FINDINGS = {"better": "measurably better", "worse": "measurably worse", "none": "no measurable difference"}


def judge(comparison: Comparison) -> Verdict:
    """Return the verdict on a comparison; `statistics.compare` states the rule."""
    rivals = [v for v in (_BASELINE, _TEMPERED) if v in comparison.variants]
    picked = comparison.picked
    judged = [*rivals, *([picked] if picked else [])]
    found = {} if picked is None else {m: _standing(comparison, picked, rivals, m) for m in ("nll", comparison.quality)}
    kind: Kind = "no_difference"
    if not any(comparison.learnt(variant) for variant in judged):
        kind = "not_learnt"
    elif "better" in found.values():
        kind = "trade_off" if "worse" in found.values() else "smooth"
    elif len(rivals) == 2 and _finding(comparison, _TEMPERED, _BASELINE, "nll") == "better":
        kind = "temperature"
    pairs = [
        (variant, reference, metric)
        for variant, references in ((picked, rivals), (_TEMPERED if len(rivals) == 2 else None, rivals[:1]))
        if variant is not None
        for reference in references
        for metric in (("nll", comparison.quality, "ece") if variant == picked else ("nll", "ece"))
    ]
    evidence = [_picking(comparison, picked), *(_difference(comparison, *pair) for pair in pairs)]
    evidence += [_calibration(comparison, judged), *_others(comparison, rivals)]
    if comparison.tokens is not None:
        evidence.append(f"Judged are the answers. By the tokens which were learnt: {comparison.tokens.verdict.sentence}")
    variant, epsilon = (picked, picked.epsilon) if picked and kind in ("smooth", "trade_off") else (_BASELINE, None)
    return Verdict(
        kind,
        _TEMPERED if kind == "temperature" else variant,
        epsilon,
        _sentence(comparison, kind, rivals, found),
        evidence,
        [*_of_ece(comparison, kind, rivals), *_caveats(comparison)],
        [[variant.label, reference.label, metric] for variant, reference, metric in pairs],
    )


def _finding(c: Comparison, variant: Variant, reference: Variant, metric: str) -> Finding:
    return c.contrast(variant, reference, metric).finding


def _standing(comparison: Comparison, variant: Variant, rivals: list[Variant], metric: str) -> Finding:
    """Better than every rival, or worse than one of them."""
    found = {_finding(comparison, variant, rival, metric) for rival in rivals}
    return "better" if found == {"better"} else "worse" if "worse" in found else "none"


def _sentence(comparison: Comparison, kind: Kind, rivals: list[Variant], found: dict[str, Finding]) -> str:
    """The verdict; found: how the picked variant stands in each metric which is judged."""
    picked, against = comparison.picked, " and ".join(f"the {rival.label}" for rival in rivals)
    by = {finding: [_title(metric) for metric, own in found.items() if own == finding] for finding in ("better", "worse", "none")}
    if kind == "not_learnt":
        return _unlearnt(comparison)
    if picked is not None and kind == "smooth":
        same = f"; its {by['none'][0]} shows no such difference" if by["none"] else ""
        return f"{_advice(picked)}: its {_are(by['better'])} measurably better than that of {against}{same}."
    if picked is not None and kind == "trade_off":
        lost, won = by["worse"][0], by["better"][0]
        return (
            f"Smoothing trades {lost} for {won}: with {picked.label} the {won} is measurably better than that of {against}, the "
            f"{lost} measurably worse; choose by what the predictions are for."
        )
    if kind == "temperature":
        others = "" if picked is None else f"; smoothing, at best {picked.label}, is not measurably better than that"
        worse = f", and its {_are(by['worse'])} measurably worse" if by["worse"] else ""
        gain = "it improves the baseline's NLL measurably and changes no prediction"
        return f"Use temperature scaling instead: {gain}{others}{worse}."
    worse = f"; with {picked.label} its {_are(by['worse'])} measurably worse" if picked is not None and by["worse"] else ""
    return f"No measurable difference in favour of smoothing or temperature scaling: keep the baseline{worse}."


def _are(titles: list[str]) -> str:
    return f"{' and '.join(titles)} {'is' if len(titles) == 1 else 'are'}"


def _unlearnt(comparison: Comparison) -> str:
    accuracy, nll = comparison.uninformed or (1.0, 0.0)
    label = "token" if TEST in comparison.clusters else "answer" if comparison.what == "questions" else "class"
    of, alone = f"the share of the most frequent {label} of {TEST}", "that of the shares alone"
    if comparison.guessing:
        of, alone = "that of guessing among the options", "that of guessing"
    return (
        f"No verdict, the models have not learnt: no accuracy is measurably above {accuracy:.3f}, {of}, and no NLL below "
        f"{nll:.3f}, {alone}. Check labels and learning rate, or train longer."
    )


def _advice(picked: Variant) -> str:
    how = f"Smooth with ε={picked.epsilon:g}" if picked.epsilon else f"Train with {picked.name}"
    with_temperature = " and fit a temperature afterwards" if picked.tempered else ""
    return f"{how}{'' if picked.name == 'smoothed' or not picked.epsilon else f' ({picked.name})'}{with_temperature}"


def _title(metric: str) -> str:
    return _TITLES.get(metric, metric)


def _others(comparison: Comparison, rivals: list[Variant]) -> list[str]:
    """The variants which validation did not pick, where their quality remains another after the correction for their number."""
    smoothed, picked = [v for v in comparison.variants if v.name != BASELINE], comparison.picked
    found = []
    for variant in smoothed:
        if picked is None or (variant.name, variant.epsilon) == (picked.name, picked.epsilon):
            continue  # with a temperature or without, the predictions are the same
        contrast = comparison.contrast(variant, rivals[0], comparison.quality)
        if (finding := contrast.corrected(comparison.level)) != "none":
            found.append(f"{variant.label} {contrast.value:+.4f}, {_FINDINGS[finding]}")
    if not found:
        return []
    return [
        f"Not picked, but of another {_title(comparison.quality)} than the {rivals[0].label} on {TEST}, corrected for "
        f"{len(smoothed)} variants: {'; '.join(found)}."
    ]


def _of_ece(comparison: Comparison, kind: Kind, rivals: list[Variant]) -> list[str]:
    """An ECE which is worse where smoothing is advised: a better NLL does not exclude it."""
    picked = comparison.picked
    if kind not in ("smooth", "trade_off") or picked is None:
        return []
    worse = [f"the {rival.label}" for rival in rivals if _finding(comparison, picked, rival, "ece") == "worse"]
    return [f"The ECE of {picked.label} is measurably worse than that of {' and '.join(worse)}."] if worse else []


def _picking(comparison: Comparison, picked: Variant | None) -> str:
    if picked is None:
        return "No smoothed variant was compared."
    means = {label: float(np.mean(values)) for label, values in comparison.validation_nll.items()}
    others = [f"{means[v.label]:.4f} for the {v.label}" for v in (_BASELINE, _TEMPERED) if v in comparison.variants]
    tried = sum(v.name != BASELINE for v in comparison.variants)
    among = f"of {tried} smoothed variants" if tried > 1 else "the only smoothed variant"
    return f"Validation picked {picked.label}, {among}: validation NLL {means[picked.label]:.4f}, against {', '.join(others)}."


def _difference(comparison: Comparison, variant: Variant, reference: Variant, metric: str) -> str:
    """One contrast on the test set, with its interval and every seed."""
    contrast = comparison.contrast(variant, reference, metric)
    title, unit = _title(metric), " nats" if metric == "nll" else ""
    title = title if metric not in (*_TITLES, "accuracy") else title[0].upper() + title[1:]  # others are names of fields
    value, other = (comparison.measurement(v, metric).mean for v in (variant, reference))
    text = (
        f"{title} on {TEST} (n = {comparison.size().removesuffix(' examples')}): {value:.4f} with {variant.label}, "
        f"{other:.4f} with {reference.label}; difference {contrast.value:+.4f}{unit}"
    )
    if contrast.low is not None and contrast.high is not None and contrast.p is not None:
        p = "p < 0.001" if contrast.p < 0.001 else f"p = {contrast.p:.3f}"
        text += f" ({comparison.level:.0%} interval {contrast.low:+.4f} to {contrast.high:+.4f}, {p})".replace("%", " %", 1)
    if len(contrast.per_seed) > 1:
        text += f", by seed {', '.join(f'{value:+.4f}' for value in contrast.per_seed)}"
    return f"{text}: {_FINDINGS[contrast.finding]}."


def _calibration(comparison: Comparison, variants: list[Variant]) -> str:
    """ECE beside what a calibrated model shows at this n, and the consistency test."""
    found = []
    for variant in variants:
        passed = comparison.consistent(variant)
        value, null = (comparison.measurement(variant, metric).mean for metric in ("ece", "null_ece"))
        verdict = f"consistent with calibration in {sum(passed)} of {len(passed)} seeds"
        found.append(f"{variant.label} {value:.4f} (a calibrated model: {null:.4f}; {verdict})")
    return f"ECE on {TEST}: {'; '.join(found)}."


def _caveats(comparison: Comparison) -> list[str]:
    caveats = []
    if len(comparison.seeds) == 1:
        caveats.append(
            "One seed: the intervals cover only which examples were drawn, not the training run; "
            "another seed may change the verdict."
        )
    elif len(comparison.seeds) == 2:
        caveats.append("Two seeds: the variance over seeds is hardly known, so that only large differences can be measured.")
    if _TEMPERED not in comparison.variants:
        caveats.append(
            "No baseline + temperature was compared: a gain may be one that temperature scaling gives without training."
        )
    units = comparison.clusters.get(TEST, comparison.sets[TEST])
    if units < 100:
        what = "sequences" if TEST in comparison.clusters else comparison.what
        caveats.append(f"Only {units} {what} were tested: small differences cannot be measured.")
    return caveats
