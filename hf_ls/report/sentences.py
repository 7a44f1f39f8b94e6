"""What the numbers of a report show, in plain sentences: only what the intervals support.

Two rows are compared by the paired differences of the report alone (`metrics.paired.Difference.finding`); two overlapping
intervals of the same examples decide nothing.
"""

from __future__ import annotations

from hf_ls.common.text import one_line
from hf_ls.metrics.ceiling import ceiling_warning, constant_scores, has_learnt
from hf_ls.metrics.intervals import wilson_interval
from hf_ls.metrics.paired import Finding
from hf_ls.report.calibration_report import CalibrationReport, CalibrationRow

_WORDING: dict[Finding, str] = {"better": "{who} is better", "worse": "{who} is worse", "none": "no difference shown"}
_TITLES = {
    "nll": "NLL", "ece": "ECE", "bleu": "BLEU", "chrf": "chrF", "accuracy": "token accuracy",
    "soft_nll": "NLL against the soft labels",
}  # fmt: skip

_TOO_SHORT = -0.1  # signed gap below which a model trained on plain labels has hardly begun to fit them


def regime(report: CalibrationReport) -> str:
    """Plain sentences: is the baseline (else the first row) under- or over-confident at this n?

    Read from the interval of the signed gap, confidence − accuracy: all above 0 is over-confident, all
    below 0 under-confident. A mean of 0 can hide errors which cancel, so the ECE is set beside its null. A model which has not
    learnt gets no advice.
    """
    row = report.baseline or report.rows[0]
    interval, confidence = _gap_interval(report, row), row.value("accuracy") + row.value("signed_gap")
    epsilon = "" if row.epsilon is None else f" (epsilon {report.epsilon_text(row)})"
    who = f"The model of row '{one_line(row.name)}'{epsilon}"
    facts = (
        f"mean confidence {confidence:.3f}, accuracy {row.show('accuracy')}, signed gap {row.show('signed_gap')}, {report.size}"
    )
    if not learnt(report, row):
        return f"{who} {_unlearnt(report, row)}, so that its calibration says nothing about smoothing: {facts}."
    if interval is None:
        return f"{who} has no interval for its signed gap, so its regime is not known: {facts}."
    if interval[0] > 0:
        advice = " Smoothing lowers confidence, so it may help here." if row.epsilon == 0 else ""
        return f"{who} is over-confident: {facts}.{advice}"
    if interval[1] < 0:
        advice = " Smoothing lowers confidence further: it may hurt here." if row.epsilon == 0 else ""
        if row is report.baseline and report.training is not None and interval[1] < _TOO_SHORT:
            advice += " So far below, plain training was most likely too short: more epochs or a higher learning rate come first."
        if row.epsilon:
            advice = " Its targets ask for less confidence than it is right: try a smaller epsilon, or temperature scaling."
        if "soft_nll" in row.metrics:
            advice += (
                " That is against the one label: a model which gives the shares of the raters is under-confident too. soft nll "
                "and soft brier say how near it is to them."
            )
        return f"{who} is under-confident: {facts}.{advice}"
    sentence = f"{who} is, on average, not distinguishable from calibrated at this n: {facts}."
    null_q95 = row.metrics["ece"].get("null_q95")
    if isinstance(null_q95, float) and row.value("ece") > null_q95:
        sentence += (
            f" Its ECE of {row.value('ece'):.3f} is still above {null_q95:.3f}, which a calibrated model"
            " would exceed in 5 % of samples: some confidences are too high and others too low."
        )
    return sentence


def asking(report: CalibrationReport) -> str | None:
    """How a language model was asked and its options scored, and how much of its probability they have; None for other models."""
    facts = report.answers
    if facts is None:
        return None
    what = "letter" if facts.score == "letter" else "text"
    over = {"none": "", "tokens": ", divided by its tokens", "characters": ", divided by its characters"}[
        facts.length_normalisation
    ]
    shots = f", after {facts.few_shot} solved examples" if facts.few_shot else ""
    said = (
        f"The logit of an option is the log-probability of its {what}{over}, after the prompt {facts.template!r}"
        f"{shots}; the probabilities are those of the options of a question alone."
    )
    if facts.mass is None:
        return said
    rest = "; the rest goes to texts which are no option, and is not judged" if facts.mass < 0.995 else ""
    return f"{said} Together the model gives them {facts.mass:.3f} on average{rest}."


def verdict(report: CalibrationReport) -> str:
    """Plain sentences, a paragraph for each run (of smoothing, another objective or technique) against the baseline.

    One label per example: NLL and ECE against baseline + temperature, if there is such a row. Token tasks: task
    quality, NLL and ECE side by side without temperature, since they can move apart, then NLL and ECE with one each.

    A metric differs only if the interval of the paired difference over the same examples leaves 0 out.
    """
    baseline = report.baseline
    if baseline is None or not report.challengers:
        alone = "no run without label smoothing was trained beside it" if baseline is None else "this table has one run only"
        return f"Whether label smoothing helped cannot be said: {alone}."
    return "\n\n".join(_verdict(report, baseline, row) for row in report.challengers)


def _verdict(report: CalibrationReport, baseline: CalibrationRow, smoothed: CalibrationRow) -> str:
    unlearnt = [row for row in (baseline, smoothed) if not learnt(report, row)]
    if len(unlearnt) == 2:
        rows = f"rows '{one_line(baseline.name)}' and '{one_line(smoothed.name)}'"
        return f"No verdict: the models of {rows} have both not learnt. Check labels and learning rate, or train longer."
    tempered = report.tempered(baseline), report.tempered(smoothed)
    if report.is_token_task:
        quality = [metric for metric in smoothed.quality if metric in baseline.metrics] or ["accuracy"]
        rival, metrics = baseline, [*quality, "nll", "ece"]
    else:
        rival = tempered[0] or baseline
        metrics = ["nll", "ece", *(["soft_nll"] if "soft_nll" in smoothed.metrics and "soft_nll" in rival.metrics else [])]
    label = "the baseline" if rival is baseline else "temperature scaling of the baseline"
    who = f"Smoothing (epsilon {smoothed.epsilon:g})" if smoothed.epsilon else f"Training with {one_line(smoothed.name)}"
    unit = "sequences" if report.is_token_task else "examples"
    size = report.dataset.n_sequences or baseline.n
    pairs = [(smoothed, rival, metric) for metric in metrics]
    each = (
        []
        if not (report.is_token_task and tempered[0] and tempered[1])
        else [(tempered[1], tempered[0], m) for m in ("nll", "ece")]
    )
    paired = any(report.difference(metric, row, against) for row, against, metric in [*pairs, *each])
    how = f"differences are paired over the same {size:,} {unit}" if paired else "only the interval of each row is known"
    found = [
        f"{who} against {label}, {one_line(report.dataset.split or '')} split, {report.size}; {how}",
        *(_clause(report, *pair) for pair in pairs),
    ]
    if report.is_token_task:
        found += _apart(report, smoothed, rival, metrics)
        if each and tempered[0] and tempered[1]:
            start = f"With a temperature each (T = {tempered[1].temperature:.2f} against {tempered[0].temperature:.2f})"
            found.append(f"{start}: {'; '.join(_clause(report, *pair) for pair in each)}")
    found += [f"But the model of row '{one_line(row.name)}' {_unlearnt(report, row)}" for row in unlearnt]
    return f"{'. '.join(found)}. {seeds(report)}; the intervals cover the choice of test {unit}, not the seed."


def tempering(report: CalibrationReport) -> str | None:
    """What the temperature does to the first run, NLL and ECE paired over the same examples; None without a row with one."""
    row = report.rows[0]
    tempered = report.tempered(row)
    if tempered is None:
        return None
    unit = "sequences" if report.is_token_task else "examples"
    clauses = [_clause(report, tempered, row, metric, "the temperature") for metric in ("nll", "ece")]
    start = f"With the temperature T = {tempered.temperature:.2f} against row '{one_line(row.name)}', {report.size}"
    return f"{start}; differences are paired over the same {report.dataset.n_sequences or row.n:,} {unit}. {'. '.join(clauses)}."


def infinite(report: CalibrationReport) -> list[str]:
    """Sentences on rows whose NLL is infinite, because some labels had probability 0."""
    found = []
    for row in report.rows:
        nll = row.metrics["nll"]
        count, clipped = nll.get("impossible"), nll.get("clipped")
        if isinstance(count, float | int) and isinstance(clipped, float | int) and count:
            who = f"{count:,.0f} of {row.n:,} examples have a label to which the model gives probability 0"
            found.append(
                f"The NLL of row '{one_line(row.name)}' is infinite: {who}. Clipped at the machine epsilon, as log_loss of "
                f"scikit-learn does, it would be {clipped:.3f}, which depends on that constant; Brier score and ECE do not"
            )
    return found


def learnt(report: CalibrationReport, row: CalibrationRow) -> bool:
    """Whether a row, without or with its temperature, is measurably better than knowing only the frequencies of the classes.

    True where that is not known: of a vocabulary the labels are not counted, and a single sequence has no interval.
    """
    counts = report.dataset.class_counts
    judged = [(r.interval("accuracy"), r.interval("nll")) for r in (row, report.tempered(row)) if r is not None]
    known = [(accuracy[0], nll[1]) for accuracy, nll in judged if accuracy and nll]
    return counts is None or not known or any(has_learnt(low, high, constant_scores(counts)) for low, high in known)


def _unlearnt(report: CalibrationReport, row: CalibrationRow) -> str:
    accuracy, nll = constant_scores(report.dataset.class_counts or [])
    return (
        f"has not learnt: its accuracy {row.show('accuracy')} is not measurably above {accuracy:.3f}, the share of the most "
        f"frequent class, nor its NLL {row.show('nll')} below {nll:.3f}, that of the class shares alone"
    )


def warnings(report: CalibrationReport) -> list[str]:
    """Sentences on smoothed rows: ε above its ceiling (by the baseline's error, where there is one; only where the classes have
    names), and under-confidence which `regime` does not speak of."""
    found, known = infinite(report), report.smoothing
    judged = report.baseline or report.rows[0]
    for row in report.rows:
        if row.tempered or not report.smoothing_of(row).is_used:
            continue
        last = known.epsilon if known.final_epsilon is None else known.final_epsilon
        if known.prior == "uniform" and known.convention and last and row.epsilon == known.epsilon and not known.item_by_item:
            size = report.dataset.n_sequences or judged.n
            classes, who = len(report.label_names), f"row '{one_line(judged.name)}'"
            warning = ceiling_warning(last, known.convention, judged.value("accuracy"), size, classes, who)
            found += [warning] if warning else []
        interval = _gap_interval(report, row)
        if row is not judged and interval is not None and interval[1] < 0 and learnt(report, row):
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


def _clause(report: CalibrationReport, row: CalibrationRow, rival: CalibrationRow, metric: str, who: str | None = None) -> str:
    who = who or ("smoothing" if row.epsilon else f"training with {one_line(row.run)}")
    title = _title(metric)
    title = title[0].upper() + title[1:] if title.islower() else title
    text = f"{title} {row.show(metric)} against {rival.show(metric)}"
    found = report.difference(metric, row, rival)
    if found is None or found.low is None or found.high is None:
        return f"{text} – not decided (no paired difference)"
    style = "+.4f" if abs(found.value) < 1 else "+.2f"
    interval = f"{found.value:{style}} [{found.low:{style}}, {found.high:{style}}]"
    return f"{text}, difference {interval} – {_WORDING[found.finding].format(who=who)}"


def _apart(report: CalibrationReport, smoothed: CalibrationRow, rival: CalibrationRow, metrics: list[str]) -> list[str]:
    """The sentence which says that some metrics are better and others worse, if so."""
    known = {_title(metric): report.difference(metric, smoothed, rival) for metric in metrics}
    better, worse = ([name for name, d in known.items() if d and d.finding == which] for which in ("better", "worse"))
    if not better or not worse:
        return []
    return [f"They move apart: {' and '.join(better)} better, {' and '.join(worse)} worse; none speaks for the others"]


def _title(metric: str) -> str:
    return _TITLES.get(metric, one_line(metric).replace("_", " "))
