"""Constructed comparisons of sequences whose truth is known from how they are made, not from the verdict.

The tokens are those of `constructed`: runs of one sequence are led astray together by `cluster_noise`. Beside them each sequence
is answered right or wrong; a model is right on `gain` more of those sequences on which the baseline is wrong (fewer, below 0).
"""

from dataclasses import dataclass, replace

import numpy as np
from constructed import GOOD, Case, Model, results_of

from hf_ls.compare.comparison import TokenStatistics
from hf_ls.metrics import PredictionStatistics, TokenCalibration
from hf_ls.metrics.paired import draws_of_tokens
from hf_ls.metrics.text import draws_of_texts, text_metrics
from hf_ls.report.calibration_report import CalibrationRow

REPETITIONS = 300


@dataclass(frozen=True)
class Sequences:
    """kind: the right verdict; tokens: as in `constructed`, whose truth is that of the NLL alone; gain: in exact matches."""

    kind: str
    tokens: Case
    gain: float = 0.0


def of(truth, baseline, smoothed, **settings):
    """One ε of 0.1; 500 sequences of 12 tokens unless the settings say otherwise."""
    return Case(truth, baseline, {0.1: smoothed}, **{"n": 6000, "cluster": 12, "cluster_noise": 0.5} | settings)


# Sharpness at which a model that errs with its sequences is calibrated, by the size of that error.
FIT, FIT_WHERE_MUCH_ERRS = Model(0.845), Model(0.64)
MUCH = {"cluster_noise": 0.9}
SOFTER, NOISY, CLEANER = Model(0.8), Model(2.0, 1.5), Model(1.2, 0.7)
CASES = {
    "smoothing does nothing": Sequences("no_difference", of("no_difference", FIT, FIT)),
    "smoothing only softens": Sequences("no_difference", of("no_difference", FIT, SOFTER)),
    "few long sequences": Sequences("no_difference", of("no_difference", FIT, FIT, n=3000, cluster=100)),
    "few long sequences, which err together": Sequences(
        "no_difference", of("no_difference", FIT_WHERE_MUCH_ERRS, FIT_WHERE_MUCH_ERRS, n=4000, cluster=100, **MUCH)
    ),
    "one seed, sequences err together": Sequences(
        "no_difference", of("no_difference", FIT_WHERE_MUCH_ERRS, FIT_WHERE_MUCH_ERRS, seeds=1, run_spread=0.0, cluster=60, **MUCH)
    ),
    "one seed, short sequences": Sequences("no_difference", of("no_difference", FIT, FIT, seeds=1, run_spread=0.0, cluster=4)),
    "a large ε harms": Sequences("no_difference", of("no_difference", FIT, Model(0.4, 0.6))),
    "quality falls, and the NLL stays": Sequences("no_difference", of("no_difference", FIT, SOFTER), -0.15),
    "quality and NLL fall": Sequences("no_difference", of("no_difference", FIT, Model(0.5, 0.8)), -0.15),
    "overfit": Sequences("temperature", of("temperature", Model(2.5), Model(1.2))),
    "overfit, smoothing adds noise": Sequences("temperature", of("temperature", Model(4.0), Model(1.5, 0.5))),
    "overfit, and quality falls": Sequences("temperature", of("temperature", Model(2.5), Model(1.2)), -0.15),
    "under-confident": Sequences("temperature", of("temperature", Model(0.5), Model(0.4))),
    "smoothing takes noise away": Sequences("smooth", of("smooth", NOISY, CLEANER)),
    "smoothing strays less": Sequences("smooth", of("smooth", Model(1.5, astray=0.2), Model(1.1, astray=0.08))),
    "one seed, smoothing takes noise away": Sequences("smooth", of("smooth", NOISY, CLEANER, seeds=1)),
    "noise falls and quality rises": Sequences("smooth", of("smooth", NOISY, CLEANER), 0.15),
    "quality rises, and the NLL stays": Sequences("smooth", of("no_difference", FIT, SOFTER), 0.15),
    "quality rises, and the NLL is worse": Sequences("trade_off", of("no_difference", FIT, Model(0.55, 1.0)), 0.15),
    "noise falls, and quality too": Sequences("trade_off", of("smooth", NOISY, CLEANER), -0.15),
}  # fmt: skip


def sequence_results(case, draw):
    """Results as the cells of a comparison leave them: sums of tokens, texts right or wrong, and the draws of both."""
    made, n = [], case.tokens.n // case.tokens.cluster
    hard = np.random.default_rng((draw, 8)).random(n) < 0.5
    for result in results_of(case.tokens, draw):
        rng = np.random.default_rng((draw, 9, result.seed, round(100 * result.variant.epsilon)))
        gain = case.gain if result.variant.epsilon else 0.0
        right = (~hard | (rng.random(n) < max(gain, 0.0) * 2)) & (rng.random(n) >= -min(gain, 0.0) * 2)
        right ^= rng.random(n) < 0.05  # a run has errors of its own
        texts = ["right" if one else "wrong" for one in right]
        made.append(with_sequences(result, texts))
    return made


def with_sequences(result, texts):
    """The result with the sums of its tokens, and texts of which "right" is the reference."""
    stats, labels = result.statistics["test"], result.labels["test"]
    shape = len(texts), len(labels) // len(texts)
    kept = shape[0] * shape[1]
    items = np.stack([np.asarray(c, float)[:kept] for c in (stats.confidence, stats.correct, stats.nll, stats.brier)], -1)
    tokens = TokenCalibration(repetitions=REPETITIONS)
    tokens.update(items.reshape(*shape, 4), labels[:kept].reshape(shape))
    references = ["right"] * len(texts)
    quality = text_metrics(texts, references, ["exact_match"], repetitions=REPETITIONS)
    draws = [draws_of_tokens(tokens), draws_of_texts(texts, references, ["exact_match"], repetitions=REPETITIONS)]
    temperature = result.temperature if result.variant.tempered else None
    row = CalibrationRow.from_tokens(result.variant.name, result.variant.epsilon, temperature, tokens, quality)
    counts = tokens.label_counts.tolist()
    return replace(result, statistics={"test": TokenStatistics(row, draws, tokens.sequences, counts)}, cluster=None, labels=None)


def at_chance(draw, n=400, length=6):
    """Results of two sure models whose logits know nothing of the labels."""
    rng = np.random.default_rng((draw, 11))
    labels, logits = rng.integers(0, 3, n * length), 4 * rng.normal(size=(n * length, 3))
    results = []
    for result in results_of(of("no_difference", GOOD, GOOD, n=n * length, cluster=length, seeds=1, classes=3), draw):
        scale = 0.5 if result.variant.epsilon else 1.0
        temperature = 40.0 * scale if result.variant.tempered else 1.0
        stats = PredictionStatistics.from_logits(scale * logits / temperature, labels)
        test = {"statistics": {"test": stats}, "labels": {"test": labels}, "temperature": temperature}
        results.append(with_sequences(replace(result, **test), ["wrong"] * n))
    return results
