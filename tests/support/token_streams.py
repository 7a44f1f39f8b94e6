"""Streams of tokens for the tests of token calibration: random sequences with padding, fed in batches."""

import numpy as np
import torch

from hf_ls.metrics import (
    PredictionStatistics,
    TokenCalibration,
)
from hf_ls.trainer.evaluation import item_statistics

V, EOS = 40, 2
COUNTS = np.concatenate([[0, 5, 10**6], np.random.default_rng(0).integers(0, 3000, V - 3)])


def sequences(n=30, length=12, seed=0, sharpness=2.0):
    """Items [n, T, 4] and labels [n, T] of random logits, with padding on the right and a few sequences without tokens."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, V, (n, length))
    labels[np.arange(length) >= rng.integers(1, length + 1, n)[:, None]] = -100
    labels[::7] = -100
    logits = rng.normal(size=(n, length, V)) * sharpness
    logits[np.arange(n)[:, None], np.arange(length), labels % V] += sharpness
    return item_statistics(torch.tensor(logits), torch.tensor(labels)).numpy(), labels


def filled(items, labels, cuts=(), **settings):
    state = TokenCalibration(**({"eos_token_id": EOS, "token_counts": COUNTS, "repetitions": 50} | settings))
    for rows in np.split(np.arange(len(items)), sorted(cuts)):
        state.update(items[rows], labels[rows])
    return state


def flat(items):
    confidence, correct, nll, brier = items[~np.isnan(items).any(-1)].T
    return PredictionStatistics(confidence, correct.astype(bool), nll, brier)


def simulated(n_sequences, gap, cluster, seed, length=15):
    """Tokens whose probability of being right is confidence − gap, shifted together by up to ± cluster per sequence."""
    rng = np.random.default_rng(seed)
    shift = rng.uniform(-cluster, cluster, (n_sequences, 1))
    confidence = rng.uniform(0.6, 0.9, (n_sequences, length))
    correct = rng.random(confidence.shape) < confidence - gap - shift
    nll = 1 + 5 * shift + rng.uniform(-0.1, 0.1, confidence.shape)
    items = np.stack([confidence, correct, nll, nll / 2], -1)
    items[np.arange(length) >= rng.integers(length // 2, length + 1, n_sequences)[:, None]] = np.nan
    return items, np.zeros(confidence.shape, dtype=np.int64)
