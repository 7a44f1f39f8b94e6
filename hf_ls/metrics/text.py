"""Quality of generated text against one reference each: exact match, error rate, BLEU and chrF with bootstrap intervals.

BLEU and chrF are those of sacrebleu, the edit distance that of rapidfuzz; both come with `hf_ls[scripts]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_ls.common.errors import extra
from hf_ls.metrics.core import row_chunks
from hf_ls.metrics.intervals import wilson_interval
from hf_ls.metrics.paired import Draws, fingerprint

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU, CHRF

TEXT_METRICS = ("exact_match", "word_error_rate", "phoneme_error_rate", "bleu", "chrf")


def text_metrics(
    predictions: Sequence[str],
    references: Sequence[str],
    metrics: Iterable[str] = ("exact_match", "word_error_rate", "bleu", "chrf"),
    *,
    repetitions: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Return {name: {"value", "low", "high"}} for some of `TEXT_METRICS`, over sentences [n].

    exact_match: share of predictions equal to their reference but for blanks (0 to 1, higher is better).
    word_error_rate: Σ Levenshtein distance / Σ reference words, words separated by blanks (0 is best; above 1 when far too much
    is generated). phoneme_error_rate: the same number for phonemes separated by blanks.
    bleu, chrf: sacrebleu's corpus scores with its defaults (0 to 100, higher is better; Papineni et al. 2002, Popović 2015);
    `signature` says which defaults.
    Intervals: Wilson for exact_match, else the percentile bootstrap over sentences; one seed draws the same sentences for every
    metric and for every model on the same references.

    Raises:
        ValueError: other lengths, no sentences, references without a word, an unknown metric.
        TypeError: predictions or references which are not strings.
    """
    if repetitions < 1 or not 0 < level < 1:
        raise ValueError(f"expected repetitions >= 1 and 0 < level < 1, got {repetitions} and {level}; 1000 and 0.95 are usual")
    found = {}
    for name, (value, scores) in _measured(predictions, references, metrics, repetitions, seed).items():
        low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
        if name == "exact_match":  # keeps its width at 0 and 100 %, where a bootstrap has none
            low, high = wilson_interval(value * len(references), len(references), level)
        found[name] = {"value": value, "low": float(low), "high": float(high)}
    return found


def draws_of_texts(
    predictions: Sequence[str], references: Sequence[str], metrics: Iterable[str], *, repetitions: int = 1000, seed: int = 0
) -> Draws:
    """The draws of some of `TEXT_METRICS`, each sentence a unit: those of two models on the same references are paired.

    Raises: as `text_metrics`.
    """
    measured = _measured(predictions, references, metrics, repetitions, seed)
    values, draws = ({name: pair[i] for name, pair in measured.items()} for i in (0, 1))
    return Draws(fingerprint(references, repetitions, seed), len(references), values, draws)  # type: ignore[arg-type]


def _measured(
    predictions: Sequence[str], references: Sequence[str], metrics: Iterable[str], repetitions: int, seed: int
) -> dict[str, tuple[float, np.ndarray]]:
    """Each metric, and what it becomes [R] when the sentences are drawn anew."""
    check_sentences(predictions, references)
    found = {}
    for name in metrics:
        if name not in TEXT_METRICS:
            raise ValueError(f"expected metrics among {TEXT_METRICS}, got {name!r}; leave it out")
        score: Callable[[np.ndarray], float] = _rate
        if name == "exact_match":
            hits = [p.split() == r.split() for p, r in zip(predictions, references, strict=True)]
            statistics = np.stack([np.array(hits, dtype=np.int64), np.ones(len(hits), dtype=np.int64)], axis=1)
        elif name in ("bleu", "chrf"):
            scorer = _scorer(name)
            statistics = np.array(scorer._extract_corpus_statistics(predictions, [references]), dtype=np.int64)
            score = _corpus_score(scorer)
        else:
            statistics = edit_statistics(predictions, references)
        found[name] = (float(score(statistics.sum(axis=0))), _resampled(statistics, score, repetitions, seed))
    return found


def edit_statistics(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return (Levenshtein distance over blank-separated tokens, number of reference tokens) per sentence, int64 [n, 2]."""
    pairs = [(prediction.split(), reference.split()) for prediction, reference in zip(predictions, references, strict=True)]
    with extra("scripts", "error rates of text"):
        from rapidfuzz.distance import Levenshtein
    return np.array([(Levenshtein.distance(*pair), len(pair[1])) for pair in pairs], dtype=np.int64)


def signature(metric: str) -> str:
    """Return sacrebleu's signature of "bleu" or "chrf", without which a score cannot be compared: version and settings.

    Raises:
        ValueError: another metric.
    """
    if metric not in ("bleu", "chrf"):
        raise ValueError(f"expected 'bleu' or 'chrf', got {metric!r}; the other metrics have no settings")
    scorer = _scorer(metric)
    scorer.corpus_score(["a"], [["a"]])  # sacrebleu knows the number of references only afterwards
    return str(scorer.get_signature())


def check_sentences(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Refuse what no metric here is defined for.

    Raises:
        ValueError: other lengths, no sentences, references without a word.
        TypeError: predictions or references which are not strings.
    """
    if isinstance(predictions, str) or isinstance(references, str) or len(predictions) != len(references) or not len(references):
        sizes = [1 if isinstance(texts, str) else len(texts) for texts in (predictions, references)]
        raise ValueError(f"expected as many predictions as references, got {sizes[0]} and {sizes[1]}; pass two lists of strings")
    for name, texts in (("predictions", predictions), ("references", references)):
        other = next((text for text in texts if not isinstance(text, str)), None)
        if other is not None or None in texts:
            raise TypeError(f"expected strings in {name}, got {type(other).__name__}; decode token ids, one reference each")
    blank = sum(not reference.strip() for reference in references)
    if blank:
        raise ValueError(f"expected a word in every reference, got {blank} of {len(references)} blank; drop those rows")


def _rate(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1])


def _corpus_score(scorer: BLEU | CHRF) -> Callable[[np.ndarray], float]:
    return lambda sums: scorer._compute_score_from_stats(sums.tolist()).score


def _scorer(metric: str) -> BLEU | CHRF:
    # force: generated text may end in " ." without sacrebleu taking it for tokenised.
    with extra("scripts", "BLEU and chrF"):
        from sacrebleu.metrics import BLEU, CHRF
    return BLEU(force=True) if metric == "bleu" else CHRF()


def _resampled(statistics: np.ndarray, score: Callable[[np.ndarray], float], repetitions: int, seed: int) -> np.ndarray:
    """A score of column sums [R], drawing the n rows of statistics [n, m] with replacement."""
    n, rng, scores = len(statistics), np.random.default_rng(seed), []
    for rows in row_chunks(repetitions, n):
        draws = rng.integers(n, size=(rows.stop - rows.start, n))
        counts = np.stack([np.bincount(draw, minlength=n) for draw in draws])
        scores += [score(sums) for sums in counts @ statistics]
    return np.array(scores)
