"""Constructed comparisons whose truth is known from how they are made, not from the verdict.

An example has true logits s and a label ~ softmax(s). A model sees z = sharpness·(s + noise·ξ), ξ ~ N(0, 1) per example, class
and run, and is led astray on a share of examples, where a random class gains `astray_by`. Sharpness is what a temperature can
undo; noise and straying are what it cannot. Every run also has its own sharpness and class offsets, by `run_spread`.
"""

from dataclasses import dataclass

import numpy as np

from hf_ls.calibration.temperature import fit_temperature
from hf_ls.compare.comparison import Result, Variant
from hf_ls.metrics import PredictionStatistics


@dataclass(frozen=True)
class Model:
    sharpness: float = 1.0
    noise: float = 0.1
    astray: float = 0.0
    astray_by: float = 6.0


@dataclass(frozen=True)
class Case:
    truth: str
    baseline: Model
    smoothed: dict
    n: int = 2000
    seeds: int = 3
    classes: int = 5
    run_spread: float = 0.03
    run_noise: float = 0.0
    cluster: int = 1
    cluster_noise: float = 0.0


GOOD = Model()
GRID = (0.05, 0.1, 0.2)


def softer(model, *sharpness, **changes):
    values = vars(model) | changes
    return {e: Model(**values | {"sharpness": s}) for e, s in zip(GRID, sharpness, strict=True)}


CASES = {
    "well fit, smoothing only softens": Case("no_difference", GOOD, softer(GOOD, 0.95, 0.9, 0.8)),
    "well fit, smoothing does nothing": Case("no_difference", GOOD, softer(GOOD, 1.0, 1.0, 1.0), n=5000),
    "overfit, smoothing is only a temperature": Case("temperature", Model(2.5), softer(GOOD, 1.6, 1.2, 0.9)),
    "overfit, smoothing adds noise": Case("temperature", Model(4.0), softer(GOOD, 2.0, 1.5, 1.0, noise=0.5)),
    "overfit with two classes": Case("temperature", Model(3.0), softer(GOOD, 1.8, 1.3, 1.0), classes=2),
    "noisy labels, smoothing takes noise away": Case("smooth", Model(2.0, 1.5), softer(GOOD, 1.4, 1.2, 1.0, noise=0.7)),
    "noisy labels, smoothing strays less": Case("smooth", Model(1.5, astray=0.15), softer(GOOD, 1.2, 1.1, 1.0, astray=0.08), n=2000),
    "noisy labels with ten classes": Case("smooth", Model(1.8, 1.2), softer(GOOD, 1.3, 1.1, 0.8, noise=0.8), n=1000, classes=10),
    "noisy labels, one ε helps": Case("smooth", Model(1.5, 1.2), {0.05: Model(1.4, 1.1), 0.1: Model(1.1, 0.4), 0.4: Model(0.5, 1.2)}),
    "under-confident": Case("temperature", Model(0.5), softer(GOOD, 0.45, 0.4, 0.3)),
    "hardly under-confident": Case("no_difference", Model(0.97), softer(GOOD, 0.9, 0.8, 0.6), n=500),
    "tiny n, nothing to find": Case("no_difference", GOOD, softer(GOOD, 0.95, 0.9, 0.8), n=40),
    "tiny n, a huge temperature": Case("temperature", Model(6.0), softer(GOOD, 2.0, 1.5, 1.0, noise=0.3), n=80),
    "tiny n, a gain too small to see": Case("no_difference", Model(1.0, 0.35), softer(GOOD, 1.0, 1.0, 0.9, noise=0.3), n=50),
    "one seed, nothing to find": Case("no_difference", GOOD, softer(GOOD, 1.0, 0.95, 0.9), seeds=1, run_spread=0.0),
    "one seed, overfit": Case("temperature", Model(3.0), softer(GOOD, 2.0, 1.5, 1.1, noise=0.2), seeds=1),
    "one seed, noisy labels": Case("smooth", Model(2.0, 1.5), softer(GOOD, 1.4, 1.2, 1.0, noise=0.6), seeds=1),
    "harmful large ε": Case("no_difference", GOOD, {0.5: Model(0.4, 0.6), 0.7: Model(0.2, 1.0)}),
    "seeds differ more than variants": Case("no_difference", Model(0.78, 0.6), softer(GOOD, 0.78, 0.78, 0.7, noise=0.6), run_noise=0.2, n=500),
    "tokens of a sentence err together": Case(
        "no_difference", Model(0.8), {0.1: Model(0.8)}, n=3000, cluster=60, cluster_noise=0.6, run_spread=0.0
    ),
}  # fmt: skip


def draw_run(case, model, true_logits, cluster, rng):
    """The logits of one run on these examples."""
    k = case.classes
    noise = abs(model.noise + case.run_noise * rng.normal())
    sharpness = model.sharpness * np.exp(case.run_spread * rng.normal())
    z = true_logits + noise * rng.normal(size=true_logits.shape) + case.run_spread * rng.normal(size=k)
    if case.cluster_noise:
        z = z + case.cluster_noise * rng.normal(size=(cluster.max() + 1, k))[cluster]
    astray = np.flatnonzero(rng.random(len(z)) < model.astray)
    z[astray, rng.integers(0, k, astray.size)] += model.astray_by
    return sharpness * z


def examples(case, n, rng):
    true_logits = rng.normal(size=(n, case.classes)) * 1.5
    labels = (true_logits + rng.gumbel(size=true_logits.shape)).argmax(1)
    return true_logits, labels, np.arange(n) // case.cluster


def mean_nll(logits, labels, temperature=1.0):
    return float(PredictionStatistics.from_logits(logits / temperature, labels).nll.mean())


def results_of(case, draw):
    """Results as training would give them: validation of 1000 examples, temperature fitted there, cross-fitted NLL."""
    rng = np.random.default_rng((draw, 7))
    true_validation, validation_labels, _ = examples(case, 1000, rng)
    true_test, test_labels, cluster = examples(case, case.n, rng)
    both, where = np.concatenate([true_validation, true_test]), np.concatenate([np.arange(1000) // case.cluster, cluster + 1000])
    results = []
    for number, (epsilon, model) in enumerate([(0.0, case.baseline), *case.smoothed.items()]):
        for seed in range(case.seeds):
            logits = draw_run(case, model, both, where, np.random.default_rng((draw, number, seed)))
            validation, test = logits[:1000], logits[1000:]
            halves = [(slice(0, 500), slice(500, 1000)), (slice(500, 1000), slice(0, 500))]
            crossed = [
                mean_nll(validation[other], validation_labels[other], fit_temperature(validation[own], validation_labels[own]))
                for own, other in halves
            ]
            fitted = fit_temperature(validation, validation_labels)
            name = "smoothed" if epsilon else "baseline"
            for tempered, t, nll in ((False, 1.0, mean_nll(validation, validation_labels)), (True, fitted, np.mean(crossed))):
                stats = PredictionStatistics.from_logits(test / t, test_labels)
                results.append(
                    Result(
                        variant=Variant(name, epsilon, tempered),
                        seed=seed,
                        temperature=t,
                        validation_nll=float(nll),
                        statistics={"test": stats},
                        cluster={"test": cluster} if case.cluster > 1 else None,
                        labels={"test": test_labels},
                    )
                )
    return results


def log_softmax(z):
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def population(case, runs=24, n=6000):
    """What is true of a case, from its process alone: two dicts of (gain in nats, its standard error in a test of this size).

    The first: each smoothed variant (ε, tempered) against the better of the baseline with and without temperature. The second:
    the baseline's temperature against none. A gain is the mean over runs of the expected NLL under softmax(s), with temperatures
    fitted on the run's own 6000 examples; the standard error takes labels and examples as drawn, and runs as they vary.
    """
    expected, drawn = ({(e, t): [] for e in (0.0, *case.smoothed) for t in (False, True)} for _ in range(2))
    for run in range(runs):
        true_logits, labels, cluster = examples(case, n, np.random.default_rng((99, run)))
        p = np.exp(log_softmax(true_logits))
        for number, (epsilon, model) in enumerate([(0.0, case.baseline), *case.smoothed.items()]):
            z = draw_run(case, model, true_logits, cluster, np.random.default_rng((1234, number, run)))
            for tempered, t in ((False, 1.0), (True, fit_temperature(z, labels))):
                log_q = log_softmax(z / t)
                expected[epsilon, tempered].append(-(p * log_q).sum(1).mean())
                drawn[epsilon, tempered].append(-log_q[np.arange(n), labels])

    def gain(variant, reference):
        by_run = np.array(expected[reference]) - np.array(expected[variant])
        units = (np.array(drawn[reference]) - np.array(drawn[variant])).reshape(runs, -1, case.cluster).mean(2)
        # Runs on shared examples: the part of an example is taken whole, though seeds average some of it out.
        error = units.var(1).mean() / (case.n / case.cluster) + by_run.var(ddof=1) / case.seeds
        return float(by_run.mean()), float(np.sqrt(error))

    rival = min([(0.0, False), (0.0, True)], key=lambda variant: np.mean(expected[variant]))
    return {v: gain(v, rival) for v in expected if v[0]}, gain((0.0, True), (0.0, False))


def truth_of(case):
    """ "smooth", "temperature", "no_difference", or "unclear" for a gain which a test of this size finds only now and then."""
    smoothed, temperature = population(case)
    best = max(gain / error for gain, error in smoothed.values())
    tempered = temperature[0] / temperature[1]
    if best > 4:
        return "smooth"
    if best < 1 and tempered > 4:
        return "temperature"
    return "no_difference" if best < 1 and tempered < 1 else "unclear"
