"""What the numbers of a report show, in plain sentences.

Owns: the wording of regime and verdict, and what may be claimed: only what the intervals support.
Does not own: any number (`report`, `metrics`) or which way a metric is better (`metrics.direction`).
"""

from __future__ import annotations

from typing import Literal

from hf_ls.common.text import one_line
from hf_ls.metrics.ceiling import ceiling_warning
from hf_ls.metrics.direction import is_lower_better
from hf_ls.metrics.intervals import wilson_interval
from hf_ls.report.calibration_report import CalibrationReport, CalibrationRow

Finding = Literal["better", "worse", "overlap", "unknown"]

_WORDING: dict[Finding, str] = {
    "better": "{who} is better (the intervals are disjoint)",
    "worse": "{who} is worse (the intervals are disjoint)",
    "overlap": "no difference shown (the intervals overlap)",
    "unknown": "not decided (no interval)",
}
_TITLES = {"nll": "NLL", "ece": "ECE", "bleu": "BLEU", "chrf": "chrF", "accuracy": "token accuracy"}


def regime(report: CalibrationReport) -> str:
    """Plain sentences: is the baseline (else the first row) under- or over-confident at this n?

    Read from the interval of the signed gap, confidence − accuracy: all above 0 is over-confident, all
    below 0 under-confident. A mean of 0 can hide errors which cancel, so the ECE is set beside its null.
    """
    row = report.baseline or report.rows[0]
    interval, confidence = _gap_interval(report, row), row.value("accuracy") + row.value("signed_gap")
    who = f"The model of row '{one_line(row.name)}' (epsilon {report.epsilon_text(row)})"
    facts = (
        f"mean confidence {confidence:.3f}, accuracy {row.show('accuracy')}, signed gap {row.show('signed_gap')}, {report.size}"
    )
    if interval is None:
        return f"{who} has no interval for its signed gap, so its regime is not known: {facts}."
    if interval[0] > 0:
        advice = " Smoothing lowers confidence, so it may help here." if row.epsilon == 0 else ""
        return f"{who} is over-confident: {facts}.{advice}"
    if interval[1] < 0:
        advice = " Smoothing lowers confidence further: it may hurt here." if row.epsilon == 0 else ""
        if row.epsilon:
            advice = " Its targets ask for less confidence than it is right: try a smaller epsilon, or temperature scaling."
        return f"{who} is under-confident: {facts}.{advice}"
    sentence = f"{who} is, on average, not distinguishable from calibrated at this n: {facts}."
    null_q95 = row.metrics["ece"].get("null_q95")
    if isinstance(null_q95, float) and row.value("ece") > null_q95:
        sentence += (
            f" Its ECE of {row.value('ece'):.3f} is still above {null_q95:.3f}, which a calibrated model"
            " would exceed in 5 % of samples: some confidences are too high and others too low."
        )
    return sentence


def verdict(report: CalibrationReport) -> str:
    """Plain sentences: the smoothed run (or that of another objective or technique) against the baseline.

    One label per example: NLL and ECE against baseline + temperature, if there is such a row. Token tasks: task
    quality, NLL and ECE side by side without temperature, since they can move apart, then NLL and ECE with one each.

    A metric differs only if the two intervals are disjoint. They share their examples, so this is
    stricter than a paired test: overlap says that none is shown here, not that there is none.
    """
    baseline, smoothed = report.baseline, report.smoothed
    if baseline is None or smoothed is None:
        return "Nothing to compare: a verdict needs a baseline row (epsilon = 0) and another one."
    tempered = report.tempered(baseline), report.tempered(smoothed)
    if report.is_token_task:
        quality = [metric for metric in smoothed.quality if metric in baseline.metrics] or ["accuracy"]
        rival, metrics = baseline, [*quality, "nll", "ece"]
    else:
        rival, metrics = tempered[0] or baseline, ["nll", "ece"]
    label = "the baseline" if rival is baseline else "temperature scaling of the baseline"
    who = f"Smoothing (epsilon {smoothed.epsilon:g})" if smoothed.epsilon else f"Training with {one_line(smoothed.name)}"
    found = [
        f"{who} against {label}, {one_line(report.dataset.split or '')} split, {report.size}",
        *(_clause(smoothed, rival, metric) for metric in metrics),
    ]
    if report.is_token_task:
        found += _apart(smoothed, rival, metrics)
        if tempered[0] and tempered[1]:
            both = [_clause(tempered[1], tempered[0], metric) for metric in ("nll", "ece")]
            each = f"With a temperature each (T = {tempered[1].temperature:.2f} against {tempered[0].temperature:.2f})"
            found.append(f"{each}: {'; '.join(both)}")
    unit = "sequences" if report.is_token_task else "examples"
    return f"{'. '.join(found)}. {seeds(report)}; the intervals cover the choice of test {unit}, not the seed."


def warnings(report: CalibrationReport) -> list[str]:
    """Sentences on smoothed rows: ε above its ceiling (by the baseline's error, where there is one; only where the classes have
    names), and under-confidence which `regime` does not speak of."""
    found, convention = [], report.smoothing.convention
    judged = report.baseline or report.rows[0]
    for row in report.rows:
        if not row.epsilon or row.tempered:
            continue
        if (
            convention
            and report.smoothing.prior == "uniform"
            and report.smoothing.schedule is None
            and row.epsilon == report.smoothing.epsilon
        ):
            size = report.dataset.n_sequences or judged.n
            classes, who = len(report.label_names), f"row '{one_line(judged.name)}'"
            warning = ceiling_warning(row.epsilon, convention, judged.value("accuracy"), size, classes, who)
            found += [warning] if warning else []
        interval = _gap_interval(report, row)
        if row is not judged and interval is not None and interval[1] < 0:
            found.append(
                f"the model of row '{one_line(row.name)}' (epsilon {report.epsilon_text(row)}) is under-confident: signed gap "
                f"{row.show('signed_gap')}, {report.size}; use a smaller epsilon, or temperature scaling"
            )
    return found


def seeds(report: CalibrationReport) -> str:
    """How many seeds stand behind the numbers, in words."""
    known = report.training.seeds if report.training else None
    if not known:
        return "The number of seeds is not recorded"
    return "One seed" if len(known) == 1 else f"{len(known)} seeds"


def _gap_interval(report: CalibrationReport, row: CalibrationRow) -> tuple[float, float] | None:
    """The interval of the signed gap; where all are right or all wrong, from the Wilson interval of the accuracy.

    There a bootstrap never draws the other outcome, and its interval is too short. Tokens of a sequence depend on
    each other, so that for them only the sequences count.
    """
    accuracy, interval = row.value("accuracy"), row.interval("signed_gap")
    if accuracy not in (0, 1):
        return interval
    size = report.dataset.n_sequences or row.n
    low, high = (float(end) for end in wilson_interval(accuracy * size, size))
    confidence = accuracy + row.value("signed_gap")
    return confidence - high, confidence - low


def _clause(smoothed: CalibrationRow, rival: CalibrationRow, metric: str) -> str:
    who = "smoothing" if smoothed.epsilon else one_line(smoothed.run)
    wording = _WORDING[_finding(smoothed, rival, metric)].format(who=who)
    title = _title(metric)
    title = title[0].upper() + title[1:] if title.islower() else title
    return f"{title} {smoothed.show(metric)} against {rival.show(metric)} – {wording}"


def _finding(smoothed: CalibrationRow, rival: CalibrationRow, metric: str) -> Finding:
    ours, theirs = smoothed.interval(metric), rival.interval(metric)
    if ours is None or theirs is None:
        return "unknown"
    if ours[0] <= theirs[1] and theirs[0] <= ours[1]:
        return "overlap"
    return "better" if (ours[1] < theirs[0]) == is_lower_better(metric) else "worse"


def _apart(smoothed: CalibrationRow, rival: CalibrationRow, metrics: list[str]) -> list[str]:
    """The sentence which says that some metrics are better and others worse, if so."""
    findings = {_title(metric): _finding(smoothed, rival, metric) for metric in metrics}
    better, worse = ([name for name, finding in findings.items() if finding == which] for which in ("better", "worse"))
    if not better or not worse:
        return []
    return [f"They move apart: {' and '.join(better)} better, {' and '.join(worse)} worse; none speaks for the others"]


def _title(metric: str) -> str:
    return _TITLES.get(metric, one_line(metric).replace("_", " "))
