"""Calibration of next-token predictions: constant memory at any number of tokens, intervals over sequences.

Tokens of one sequence resemble each other, so that an interval which counts them as independent is too narrow. Here
whole sequences are resampled, by the online bootstrap: in replicate r, sequence s counts Poisson(1) times.
Source: Hanley and MacGibbon 2006; Oza and Russell 2001; Cameron, Gelbach and Miller 2008 for clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_ls.metrics.core import N_BINS, ReliabilityBins, bin_index
from hf_ls.metrics.intervals import calibrated_hits, ece_interval, wilson_interval
from hf_ls.metrics.streaming import StreamingCalibration, check_bins
from hf_ls.metrics.ties import aurc_from_groups
from hf_ls.metrics.validation import Floats, Integers, as_array, check_count

# What is added up per group, per sequence and per replicate: n, correct, nll, brier, and confidence − correct per bin.
# Float64 holds counts exactly up to 2**53.
_COUNT, _CORRECT, _NLL, _BRIER, _GAP = 0, 1, 2, 3, slice(4, 4 + N_BINS)
_WIDTH = 4 + N_BINS
_ENTITIES = 3  # right, there, predicted: behind the others per sequence and replicate
_BLOCK = 256  # sequences that share one matrix product and one generator
_TAILS = [0.025, 0.975]

_DECADES = 10 ** np.arange(19, dtype=np.int64)  # int64 ends below 10**19
_FREQUENCIES = ["0", *(f"{low}-{10 * low - 1}" for low in map(int, _DECADES))]
_POSITIONS = ["1", *(f"{2**k}-{2 ** (k + 1) - 1}" for k in range(1, 32))]
_WORDS = ("labelled O", "labelled otherwise", "predicted other than O")
_GROUPS = (
    [("word", name) for name in _WORDS]
    + [("end_of_sequence", name) for name in ("end of sequence", "other tokens")]
    + [("frequency", name) for name in _FREQUENCIES]
    + [("position", name) for name in _POSITIONS]
)
_FIRST_EOS = len(_WORDS)
_FIRST_FREQUENCY, _FIRST_POSITION = _FIRST_EOS + 2, _FIRST_EOS + 2 + len(_FREQUENCIES)


class TokenCalibration:
    """Sums of any number of tokens, as a whole, per group and per bootstrap replicate: below 1 MB, and a count per label.

    eos_token_id: the end-of-sequence token, reported apart; None for no such groups.
    token_counts: occurrences [V] of each token id as a training label, for the frequency groups; None for none.
    outside_id: the class `O` of words which are part of no entity; entities: (labels [t], predictions [t]) of one sequence ->
    how many entities are found right, are there, and are predicted; both for token classification, whose `update` is then told
    the predictions.
    repetitions: bootstrap replicates. seed: of their weights.

    label_counts (attribute): how often each label occurred among the tokens, int64 [largest label + 1].

    The weights of the n-th sequence depend on n and `seed` alone, so that neither the split into batches nor the padding
    changes an interval. Several processes gather their items, and each adds them all.

    Raises:
        TypeError: not whole numbers.
        ValueError: token_counts not [V] or below 0, repetitions < 1, seed or eos_token_id below 0.
    """

    def __init__(
        self,
        *,
        eos_token_id: int | None = None,
        token_counts: ArrayLike | None = None,
        outside_id: int | None = None,
        entities: Callable[[Integers, Integers], tuple[int, int, int]] | None = None,
        repetitions: int = 1000,
        seed: int = 0,
    ) -> None:
        """Start with no tokens."""
        self.eos_token_id = None if eos_token_id is None else check_count(eos_token_id, "eos_token_id", least=0)
        self.token_counts = None if token_counts is None else _check_token_counts(token_counts)
        self.outside_id, self._entities = outside_id, entities
        self.repetitions = check_count(repetitions, "repetitions")
        self.seed = check_count(seed, "seed", least=0)
        self._frequency = None if self.token_counts is None else np.searchsorted(_DECADES, self.token_counts, side="right")
        self._cells = StreamingCalibration()
        self.label_counts = np.zeros(0, dtype=np.int64)
        self._groups = np.zeros((2, len(_GROUPS), _WIDTH))  # sums, and what their rounding lost
        self._entity_sums = np.zeros(_ENTITIES)
        self._full: Floats | None = None  # Σ (p − outcome) of all probabilities in each bin but the first
        self._width = _WIDTH + (0 if entities is None else _ENTITIES)
        self._replicates = np.zeros((self.repetitions, self._width))  # of whole blocks
        self._pending = np.zeros((0, self._width))  # sequences of the block which is not full yet
        self._sequences = self._blocks = 0

    def __len__(self) -> int:
        """Return the number of tokens added so far."""
        return len(self._cells)

    @property
    def sequences(self) -> int:
        """The number of sequences with at least one token."""
        return self._sequences

    def update(
        self, items: ArrayLike, labels: ArrayLike, predictions: ArrayLike | None = None, gaps: ArrayLike | None = None
    ) -> None:
        """Add S sequences: items float64 [S, T, 4] of `statistics.item_statistics`, labels [S, T] (token ids).

        An item is confidence (0 to 1), correct (0 or 1), nll (nats) and brier (0 to 2), or NaN four times where it is
        ignored; labels there may hold anything. predictions [S, T]: the predicted classes. gaps [S, T, 14]: for each bin but the
        first, the probabilities of the vocabulary in it less 1 for that of the label; the first follows, since all of them sum to
        0. Sequences without a token count for nothing.

        Raises:
            TypeError: not numeric, or labels not integers.
            ValueError: shapes which differ, an item that is partly NaN, out of range or infinite, or a label of a kept
            item below 0 or outside token_counts; nothing is then added.
        """
        values, tokens, sequence, rank = self._kept(items, labels)
        if not len(values):
            return
        confidence, correct, nll, brier = values.T
        full = None if gaps is None else as_array(gaps)[~np.isnan(as_array(items)).all(axis=2)].astype(np.float64).sum(axis=0)
        if full is not None and full.shape != (N_BINS - 1,):
            raise ValueError(f"expected gaps [S, T, {N_BINS - 1}], got {list(as_array(gaps).shape)}; use item_statistics")
        self._cells.update(confidence, correct, nll, brier)  # checks all four before it adds
        if full is not None:
            self._full = full if self._full is None else self._full + full
        counts = np.bincount(tokens, minlength=self.label_counts.size)
        counts[: self.label_counts.size] += self.label_counts
        self.label_counts = counts

        numbers = (bin_index(confidence, N_BINS), correct, nll, brier, confidence - correct)
        position = _FIRST_POSITION + np.frexp(rank)[1] - 1  # frexp is an exact floor(log2) + 1
        groups = _sums(position, len(_GROUPS), *numbers)
        if self.eos_token_id is not None:
            groups += _sums(_FIRST_EOS + np.where(tokens == self.eos_token_id, 0, 1), len(_GROUPS), *numbers)
        if self._frequency is not None:
            groups += _sums(_FIRST_FREQUENCY + self._frequency[tokens], len(_GROUPS), *numbers)
        predicted = (
            None if predictions is None else as_array(predictions)[~np.isnan(as_array(items)).all(axis=2)].astype(np.int64)
        )
        if self.outside_id is not None and predicted is not None:
            groups += _sums(np.where(tokens == self.outside_id, 0, 1), len(_GROUPS), *numbers)
            chosen = predicted != self.outside_id
            groups += _sums(np.full(chosen.sum(), 2), len(_GROUPS), *(part[chosen] for part in numbers))
        _add(self._groups, groups)

        count = int(sequence[-1]) + 1
        rows = _sums(sequence, count, *numbers)
        if self._entities is not None:
            rows = np.concatenate([rows, self._entity_counts(sequence, tokens, predicted, count)], axis=1)
        pending = np.concatenate([self._pending, rows])
        for block in range(len(pending) // _BLOCK):
            self._replicates += self._weighted(self._blocks, pending[block * _BLOCK : (block + 1) * _BLOCK])
            self._blocks += 1
        self._pending = pending[len(pending) // _BLOCK * _BLOCK :].copy()
        self._sequences += count

    def _entity_counts(self, sequence: Integers, tokens: Integers, predicted: Integers | None, count: int) -> Floats:
        """How many entities of each sequence [count, 3] are right, there and predicted, added to the whole too."""
        found = np.zeros((count, _ENTITIES))
        if self._entities is not None and predicted is not None:
            ends = np.searchsorted(sequence, np.arange(count + 1))
            found[:] = [self._entities(tokens[a:b], predicted[a:b]) for a, b in pairwise(ends)]
        self._entity_sums += found.sum(axis=0)
        return found

    def _kept(self, items: ArrayLike, labels: ArrayLike) -> tuple[Floats, Integers, Integers, Integers]:
        """Return of the n kept tokens: items [n, 4], label, sequence among those with tokens, rank from 1 within it."""
        values, tokens = as_array(items), as_array(labels)
        if values.dtype.kind != "f" or tokens.dtype.kind not in "iu":
            raise TypeError(
                f"expected float items and integer labels, got dtypes {values.dtype} and {tokens.dtype}; "
                "give what item_statistics returned and the labels it was given"
            )
        if values.ndim != 3 or values.shape[2] != 4 or tokens.shape != values.shape[:2]:
            raise ValueError(
                f"expected items [S, T, 4] and labels [S, T], got {list(values.shape)} and {list(tokens.shape)}; "
                "keep one row per sequence, and shift and pad the labels as the items"
            )
        kept = ~np.isnan(values).all(axis=2)
        sequence, rank = np.nonzero(kept)[0], np.cumsum(kept, axis=1)[kept]
        values, tokens = values[kept].astype(np.float64), tokens[kept].astype(np.int64)
        if np.isnan(values).any():
            raise ValueError("expected each item whole or NaN four times, got some which are partly NaN; use item_statistics")
        size = np.inf if self.token_counts is None else self.token_counts.size
        bad = tokens[(tokens < 0) | (tokens >= size)]
        if bad.size:
            raise ValueError(
                f"expected labels in [0, {size}) where items are kept, got {bad[0]}; "
                "shift the labels as the items were, and count training tokens over the whole vocabulary"
            )
        return values, tokens, np.cumsum(np.diff(sequence, prepend=sequence[:1]) != 0), rank

    def _weighted(self, block: int, sums: Floats) -> Floats:
        """Return Σ_s w_rs · sums_s [R, width] over the first sequences of a block, w_rs ~ Poisson(1)."""
        weights = np.random.default_rng((self.seed, block)).poisson(1.0, size=(len(sums), self.repetitions))
        return weights.T.astype(np.float64) @ sums

    def _all_replicates(self) -> Floats:
        return self._replicates + self._weighted(self._blocks, self._pending)

    def metrics(self) -> dict[str, dict[str, float]]:
        """Return {name: {"value", and where sound "low", "high"}} as `metrics.summarise`, 95 % intervals over sequences.

        accuracy, nll (nats a token), perplexity = exp(nll), brier (0 to 2), ece and ece_equal_mass (0 to 1),
        signed_gap, mce, aurc, and with gaps full_ece (`core.full_ece`, 0 to 2); every token has the same weight. Percentile
        intervals; of perplexity, exp of those of nll; of an accuracy of 0 or 1, Wilson's with sequences for trials. None for
        ece_equal_mass, full_ece, mce and aurc, whose resamples are no sums or not kept, and none at all from a single sequence.
        With fewer than some thirty sequences every interval is too narrow.

        ece: the interval of `intervals.ece_interval` for the true error over these bins, with the error of the replicates;
        low = 0 if the value is consistent with calibration, that is, not above the 95 % quantile of "null_q95" or, where
        they spread wider, of the replicates about their own mean gaps, which allows for whole sequences that are over- or
        under-confident.
        "null" and "null_q95" take tokens as independent, correct ~ Bernoulli(confidence). In a teacher-forced pass
        that is right for a model which is calibrated given each prefix, since its gaps are then uncorrelated; gaps
        which are 0 only on average over sequences spread wider.

        ece_equal_mass and aurc treat confidences within one cell (1/15360 wide) as equal.

        Raises:
            ValueError: no tokens yet.
        """
        cells, total = self._cells.compute(N_BINS), self._total()
        nll, brier = total[_NLL] / total[_COUNT], total[_BRIER] / total[_COUNT]
        bins, used = self._cells.reliability_bins(N_BINS), self._cells.count > 0
        count, correct = self._cells.count[used][::-1], self._cells.correct[used][::-1]
        values = {
            "accuracy": cells["accuracy"],
            "nll": float(nll),
            "perplexity": _exp(nll),
            "brier": float(brier),
            "ece": cells["ece"],
            "ece_equal_mass": cells["ece_equal_mass"],
            "signed_gap": cells["signed_gap"],
            "mce": float(np.nanmax(np.abs(bins.accuracy - bins.confidence))),
            "aurc": float(aurc_from_groups(count, count - correct)),
        }
        if (full := self.full_ece()) is not None:
            values["full_ece"] = full
        table = {name: {"value": value} for name, value in values.items()}
        null_gaps = (bins.count * np.nan_to_num(bins.confidence) - self._null_hits(N_BINS)) / len(self)
        null = np.abs(null_gaps).sum(axis=1)
        table["ece"] |= {"null": float(null.mean()), "null_q95": float(np.quantile(null, 0.95))}
        if self._sequences > 1:
            for name, (low, high) in self._intervals(bins, null_gaps).items():
                table[name] |= {"low": float(low), "high": float(high)}
        return table

    def full_ece(self) -> float | None:
        """The calibration error of all probabilities of the vocabulary, 0 to 2, as `core.full_ece`; None without gaps."""
        return None if self._full is None else float((np.abs(self._full).sum() + abs(self._full.sum())) / len(self))

    def _total(self) -> Floats:
        return (self._groups[0] + self._groups[1])[_FIRST_POSITION:].sum(axis=0)  # each token has one position

    def _intervals(self, bins: ReliabilityBins, null_gaps: Floats) -> dict[str, Any]:
        """Return (low, high) by name from the replicates which hold a token."""
        sums, total = self._all_replicates(), self._total()
        sums = sums[sums[:, _COUNT] > 0]
        means = sums / sums[:, :1]
        gap = means[:, _GAP]
        ends = {
            "accuracy": np.quantile(means[:, _CORRECT], _TAILS),
            "nll": np.quantile(means[:, _NLL], _TAILS),
            "brier": np.quantile(means[:, _BRIER], _TAILS),
            "signed_gap": np.quantile(gap.sum(axis=1), _TAILS),
        }
        ends["perplexity"] = np.array([_exp(end) for end in ends["nll"]])
        if total[_CORRECT] in (0.0, total[_COUNT]):  # every resample is alike there
            hits = self._sequences if total[_CORRECT] else 0
            ends["accuracy"] = np.array(wilson_interval(hits, self._sequences))
        share = bins.count / len(self)
        own = share * np.nan_to_num(bins.confidence - bins.accuracy)
        noise = (gap - own) * np.sqrt(self._sequences / (self._sequences - 1))
        wider = np.abs(noise).sum(axis=1).mean() > np.abs(null_gaps).sum(axis=1).mean()
        null = noise if wider else null_gaps[: len(noise)]
        ends["ece"] = np.array(ece_interval(own, share, noise, null, seed=self.seed))
        return ends

    def entity_f1(self) -> dict[str, float] | None:
        """2·right / (there + predicted), 0 to 1, higher is better, with its 95 % interval over sequences (none where every
        draw is the same); None without entities.

        An entity is right where its words and its type are.
        """
        right, there, predicted = self._entity_sums
        if not there + predicted:
            return None
        found = {"value": float(2 * right / (there + predicted))}
        drawn = self._entity_draws()
        if self._sequences > 1 and len(drawn):
            low, high = np.quantile(drawn, _TAILS)
            found |= {"low": float(low), "high": float(high)} if high > low else {}
        return found

    def _entity_draws(self) -> Floats:
        sums = self._all_replicates()
        right, both = sums[:, _WIDTH], sums[:, _WIDTH + 1] + sums[:, _WIDTH + 2]
        return 2 * right[both > 0] / both[both > 0]

    def draws(self) -> tuple[Floats, dict[str, float], dict[str, Floats]]:
        """Return the number of tokens [R] in each replicate which holds one, and accuracy, nll, brier and ece: values, and [R].

        The weights depend on the rank of a sequence and the seed alone: two models which were given the same sequences in one
        order have the same numbers of tokens, and the difference of their replicates is a paired one.

        Raises:
            ValueError: no tokens yet.
        """
        known, total = self._cells.compute(N_BINS), self._total()
        sums = self._all_replicates()
        sums = sums[sums[:, _COUNT] > 0]
        values, draws = {"accuracy": known["accuracy"]}, {"accuracy": sums[:, _CORRECT] / sums[:, _COUNT]}
        for name, column in (("nll", _NLL), ("brier", _BRIER)):
            values[name], draws[name] = float(total[column] / total[_COUNT]), sums[:, column] / sums[:, _COUNT]
        if (entities := self.entity_f1()) is not None and len(drawn := self._entity_draws()) == len(sums):
            values["entity_f1"], draws["entity_f1"] = entities["value"], drawn
        values["ece"], draws["ece"] = known["ece"], np.abs(sums[:, _GAP]).sum(axis=1) / sums[:, _COUNT]
        return sums[:, _COUNT], values, draws

    def groups(self) -> list[dict[str, Any]]:
        """Return {"kind", "name", "n", "accuracy", "nll", "perplexity", "brier", "ece", "signed_gap"} of each group.

        Kinds: "word" (of token classification: labelled O or otherwise, or predicted other than O), "end_of_sequence" (the label
        is that token, or another), "frequency" (how often the label was a training label, by decades) and "position" (rank among
        the tokens of its sequence, from 1, by powers of two). Groups without tokens are left out. The ece of a small group is
        biased upward more than that of the whole.
        """
        table = []
        for (kind, name), sums in zip(_GROUPS, self._groups[0] + self._groups[1], strict=True):
            n = sums[_COUNT]
            if n == 0:
                continue
            row = {"kind": kind, "name": name, "n": int(n), "accuracy": float(sums[_CORRECT] / n)}
            row |= {"nll": float(sums[_NLL] / n), "perplexity": _exp(sums[_NLL] / n), "brier": float(sums[_BRIER] / n)}
            gap = sums[_GAP] / n
            table.append(row | {"ece": float(np.abs(gap).sum()), "signed_gap": float(gap.sum())})
        return table

    def reliability(self, n_bins: int = N_BINS) -> dict[str, list[float]]:
        """Return edges [B+1] and per bin [B] count, confidence, accuracy, band_low and band_high; NaN in an empty bin.

        The band holds the accuracy of a calibrated model at 95 %, tokens taken as independent (see `metrics`).

        Raises:
            ValueError: no tokens yet, or n_bins does not divide 15360.
        """
        bins = self._cells.reliability_bins(n_bins)
        with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin is the documented NaN
            low, high = np.quantile(self._null_hits(n_bins), _TAILS, axis=0) / bins.count
        columns = {"edges": bins.edges, "count": bins.count, "confidence": bins.confidence, "accuracy": bins.accuracy}
        return {name: column.tolist() for name, column in (columns | {"band_low": low, "band_high": high}).items()}

    def histogram(self, bins: int = 20) -> tuple[list[int], list[int]]:
        """Return how many correct and how many incorrect tokens have a confidence in each of `bins` bins (a, b].

        Raises:
            ValueError: bins does not divide 15360.
        """
        shape = (check_bins(bins), -1)
        correct = self._cells.correct.reshape(shape).sum(axis=1)
        return correct.tolist(), (self._cells.count.reshape(shape).sum(axis=1) - correct).tolist()

    def _null_hits(self, n_bins: int) -> Integers:
        """Draw hits per bin [R, B] of a calibrated model with independent tokens."""
        used = np.flatnonzero(self._cells.count)
        if not used.size:
            raise ValueError("expected at least one token, got none; call update() first")
        index = used // (self._cells.count.size // check_bins(n_bins))
        count = self._cells.count[used]
        p = np.minimum(self._cells.confidence[used] / count, 1.0)
        return calibrated_hits(count, p, index, n_bins, self.repetitions, self.seed)


def _sums(group: Integers, size: int, index: Integers, correct: Floats, nll: Floats, brier: Floats, gap: Floats) -> Floats:
    """Add up tokens per group: group [n] < size, bin index [n] and numbers [n] -> [size, width]."""
    sums = np.empty((size, _WIDTH))
    sums[:, _COUNT] = np.bincount(group, minlength=size)
    for column, numbers in ((_CORRECT, correct), (_NLL, nll), (_BRIER, brier)):
        sums[:, column] = np.bincount(group, weights=numbers, minlength=size)
    sums[:, _GAP] = np.bincount(group * N_BINS + index, weights=gap, minlength=size * N_BINS).reshape(size, N_BINS)
    return sums


def _add(sums: Floats, values: Floats) -> None:
    """Add `values` to sums[0] in place, and what rounding loses to sums[1] (Møller 1965, Knuth's two-sum)."""
    total = sums[0] + values
    part = total - sums[0]
    sums[1] += (sums[0] - (total - part)) + (values - part)
    sums[0] = total


def _exp(nats: Any) -> float:
    with np.errstate(over="ignore"):  # inf is the value beyond 709 nats
        return float(np.exp(nats))


def _check_token_counts(token_counts: Any) -> Integers:
    counts = as_array(token_counts)
    if counts.dtype.kind not in "iu":
        raise TypeError(f"expected integer token_counts, got dtype {counts.dtype}; count labels with numpy.bincount")
    if counts.ndim != 1 or not counts.size or (counts < 0).any():
        raise ValueError(
            f"expected token_counts [V] of at least 0, got shape {list(counts.shape)}; "
            "count the training labels with numpy.bincount(labels, minlength=V)"
        )
    return counts.astype(np.int64)  # a copy
