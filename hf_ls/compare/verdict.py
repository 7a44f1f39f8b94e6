"""What to do, judged from a comparison: smooth, use temperature scaling instead, or neither; with the evidence in sentences."""

from __future__ import annotations

import numpy as np

from hf_ls.compare.comparison import TEST, Comparison, Kind, Variant, Verdict
from hf_ls.metrics.ceiling import constant_scores
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
    kind: Kind = "no_difference"
    if not any(comparison.learnt(variant) for variant in judged):
        kind = "not_learnt"
    elif picked is not None and _beats(comparison, picked, rivals):
        kind = "smooth"
    elif len(rivals) == 2 and _finding(comparison, _TEMPERED, _BASELINE, "nll") == "better":
        kind = "temperature"
    pairs = [
        (variant, reference, metric)
        for variant, references in ((picked, rivals), (_TEMPERED if len(rivals) == 2 else None, rivals[:1]))
        if variant is not None
        for reference in references
        for metric in (("nll", "accuracy") if variant == picked else ("nll",))
    ]
    evidence = _picking(comparison, picked)
    evidence += [_difference(comparison, *pair) for pair in pairs]
    evidence += _calibration(comparison, judged)
    compared = [[variant.label, reference.label, metric] for variant, reference, metric in pairs]
    if kind == "not_learnt":
        return Verdict(kind, _BASELINE, None, _unlearnt(comparison), evidence, _caveats(comparison), compared)
    if kind == "smooth" and picked is not None:
        return Verdict(
            kind, picked, picked.epsilon, _smooth_sentence(comparison, picked), evidence, _caveats(comparison), compared
        )
    if kind == "temperature":
        against = "" if picked is None else f"; smoothing, at best {picked.label}, is not measurably better than that"
        sentence = f"Use temperature scaling instead: it improves the baseline's NLL measurably{against}."
        return Verdict(kind, _TEMPERED, None, sentence, evidence, _caveats(comparison), compared)
    sentence = "No measurable difference in favour of smoothing or temperature scaling: keep the baseline."
    return Verdict(kind, _BASELINE, None, sentence, evidence, _caveats(comparison), compared)


def _unlearnt(comparison: Comparison) -> str:
    accuracy, nll = constant_scores(comparison.class_counts or [1])
    return (
        f"No verdict, the models have not learnt: no accuracy is measurably above {accuracy:.3f}, the share of the most frequent "
        f"class of {TEST}, and no NLL below {nll:.3f}, that of the class shares alone. Check labels and learning rate, or train "
        "longer."
    )


def _finding(c: Comparison, variant: Variant, reference: Variant, metric: str) -> Finding:
    return c.contrast(variant, reference, metric).finding


def _beats(comparison: Comparison, picked: Variant, rivals: list[Variant]) -> bool:
    """Whether the picked variant beats every rival in NLL, or every one in accuracy without a worse NLL."""
    nll, accuracy = ([_finding(comparison, picked, rival, metric) for rival in rivals] for metric in ("nll", "accuracy"))
    return set(nll) == {"better"} or (set(accuracy) == {"better"} and "worse" not in nll)


def _smooth_sentence(comparison: Comparison, picked: Variant) -> str:
    rivals = [v for v in (_BASELINE, _TEMPERED) if v in comparison.variants]
    won = [
        name
        for name, metric in (("NLL", "nll"), ("accuracy", "accuracy"))
        if all(_finding(comparison, picked, rival, metric) == "better" for rival in rivals)
    ]
    how = f"smooth with ε={picked.epsilon:g}" if picked.epsilon else f"train with {picked.name}"
    with_temperature = " and fit a temperature afterwards" if picked.tempered else ""
    named = "" if picked.name == "smoothed" or not picked.epsilon else f" ({picked.name})"
    against = " and ".join(f"the {rival.label}" for rival in rivals)
    advice = f"{how[0].upper()}{how[1:]}{named}{with_temperature}"
    return f"{advice}: its {' and '.join(won)} is measurably better than that of {against}."


def _picking(comparison: Comparison, picked: Variant | None) -> list[str]:
    if picked is None:
        return ["No smoothed variant was compared."]
    means = {label: float(np.mean(values)) for label, values in comparison.validation_nll.items()}
    others = [f"{means[v.label]:.4f} for the {v.label}" for v in (_BASELINE, _TEMPERED) if v in comparison.variants]
    tried = sum(v.name != BASELINE for v in comparison.variants)
    among = f"of {tried} smoothed variants" if tried > 1 else "the only smoothed variant"
    return [f"Validation picked {picked.label}, {among}: validation NLL {means[picked.label]:.4f}, against {', '.join(others)}."]


def _difference(comparison: Comparison, variant: Variant, reference: Variant, metric: str) -> str:
    """One contrast on the test set, with its interval and every seed."""
    contrast = comparison.contrast(variant, reference, metric)
    title, unit = _TITLES.get(metric, metric), " nats" if metric == "nll" else ""
    value, other = (comparison.measurement(v, metric).mean for v in (variant, reference))
    text = (
        f"{title[0].upper()}{title[1:]} on {TEST} (n = {comparison.sets[TEST]:,}): {value:.4f} with {variant.label}, "
        f"{other:.4f} with {reference.label}; difference {contrast.value:+.4f}{unit}"
    )
    if contrast.low is not None and contrast.high is not None and contrast.p is not None:
        p = "p < 0.001" if contrast.p < 0.001 else f"p = {contrast.p:.3f}"
        text += f" ({comparison.level:.0%} interval {contrast.low:+.4f} to {contrast.high:+.4f}, {p})".replace("%", " %", 1)
    if len(contrast.per_seed) > 1:
        text += f", by seed {', '.join(f'{value:+.4f}' for value in contrast.per_seed)}"
    return f"{text}: {_FINDINGS[contrast.finding]}."


def _calibration(comparison: Comparison, variants: list[Variant]) -> list[str]:
    """ECE beside what a calibrated model shows at this n, and the consistency test."""
    found = []
    for variant in variants:
        passed = comparison.consistent(variant)
        value, null = (comparison.measurement(variant, metric).mean for metric in ("ece", "null_ece"))
        verdict = f"consistent with calibration in {sum(passed)} of {len(passed)} seeds"
        found.append(f"{variant.label} {value:.4f} (a calibrated model: {null:.4f}; {verdict})")
    return [f"ECE on {TEST}: {'; '.join(found)}."]


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
        what = "sequences" if TEST in comparison.clusters else "examples"
        caveats.append(f"Only {units} {what} were tested: small differences cannot be measured.")
    return caveats
