"""Text metrics equal the libraries' corpus scores; intervals hold their level; what has no metric is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text import bleu_score, chrf_score, word_error_rate

from hf_ls.metrics.text import TEXT_METRICS, edit_statistics, signature, text_metrics

PHRASES = st.lists(st.sampled_from(["AH0", "B", "K", "T", "S"]), max_size=7).map(" ".join)


def corpus(n: int = 120, seed: int = 0) -> tuple[list[str], list[str]]:
    """References of 4 to 15 words; predictions with some words replaced, dropped or added."""
    rng = random.Random(seed)
    words = ["the", "a", "cat", "dog", "sat", "on", "under", "mat", "tree", "and", "it", "ran", ",", "far", "away", "."]
    references = [" ".join(rng.choices(words, k=rng.randint(4, 15))) for _ in range(n)]

    def spoilt(text: str) -> str:
        out = [rng.choice(words) if rng.random() < 0.1 else word for word in text.split() if rng.random() > 0.05]
        return " ".join([*out, *rng.choices(words, k=rng.random() < 0.2)])

    return [text if rng.random() < 0.3 else spoilt(text) for text in references], references


def brute_force_distance(a: list[str], b: list[str]) -> int:
    """The recursive definition, without a table."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return brute_force_distance(a[1:], b[1:])
    return 1 + min(brute_force_distance(a[1:], b), brute_force_distance(a, b[1:]), brute_force_distance(a[1:], b[1:]))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(PHRASES, PHRASES), min_size=1, max_size=4))
def test_edit_distances_equal_the_brute_force_definition(pairs):
    found = edit_statistics([p for p, _ in pairs], [r for _, r in pairs])
    assert found.tolist() == [[brute_force_distance(p.split(), r.split()), len(r.split())] for p, r in pairs]


def test_error_rate_equals_torchmetrics():
    predictions, references = corpus()
    found = text_metrics(predictions, references, ["word_error_rate", "phoneme_error_rate"])
    assert found["word_error_rate"]["value"] == pytest.approx(word_error_rate(predictions, references).item(), abs=1e-6)
    assert found["phoneme_error_rate"] == found["word_error_rate"]


def test_bleu_and_chrf_equal_sacrebleu_and_torchmetrics():
    predictions, references = corpus()
    found = text_metrics(predictions, references, ["bleu", "chrf"])
    assert found["bleu"]["value"] == sacrebleu.corpus_bleu(predictions, [references], force=True).score
    assert found["chrf"]["value"] == sacrebleu.corpus_chrf(predictions, [references]).score
    assert found["bleu"]["value"] == pytest.approx(100 * bleu_score(predictions, [[r] for r in references]).item(), abs=1e-3)
    assert found["chrf"]["value"] == pytest.approx(100 * chrf_score(predictions, references, n_word_order=0).item(), abs=1e-3)


def test_scales():
    same = text_metrics(["a b c d e"] * 3, ["a b c d e"] * 3, TEXT_METRICS)
    assert {name: found["value"] for name, found in same.items()} == pytest.approx(
        {"exact_match": 1, "word_error_rate": 0, "phoneme_error_rate": 0, "bleu": 100, "chrf": 100}
    )
    far = text_metrics(["x y z"], ["a"], TEXT_METRICS)
    assert far["word_error_rate"]["value"] == 3.0
    assert far["bleu"]["value"] == far["chrf"]["value"] == far["exact_match"]["value"] == 0
    assert text_metrics([""], ["a b"], ["word_error_rate"])["word_error_rate"]["value"] == 1.0


def test_exact_match_forgives_blanks_only():
    found = text_metrics([" a  b ", "A b", "a"], ["a b", "a b", "a b"], ["exact_match"])["exact_match"]
    assert found["value"] == 1 / 3
    assert 0 < found["low"] < 1 / 3 < found["high"] < 1
    assert text_metrics(["x"] * 50, ["a"] * 50, ["exact_match"])["exact_match"]["high"] > 0.05  # a bootstrap would say 0


@pytest.mark.parametrize(("name", "library"), [("bleu", sacrebleu.BLEU(force=True)), ("chrf", sacrebleu.CHRF())])
def test_intervals_are_quantiles_of_the_corpus_score_of_drawn_sentences(name, library):
    predictions, references = corpus(60)
    found = text_metrics(predictions, references, [name], repetitions=200)[name]
    rng = np.random.default_rng(1)
    draws = rng.integers(60, size=(200, 60))
    scores = [library.corpus_score([predictions[i] for i in d], [[references[i] for i in d]]).score for d in draws]
    low, high = np.quantile(scores, [0.025, 0.975])
    width = high - low
    assert found["low"] == pytest.approx(low, abs=width / 4) and found["high"] == pytest.approx(high, abs=width / 4)
    assert found["low"] < found["value"] < found["high"]


def test_error_rate_intervals_cover_the_truth_about_as_often_as_they_say():
    predictions, references = corpus(4000, seed=3)
    truth = text_metrics(predictions, references, ["word_error_rate"], repetitions=1)["word_error_rate"]["value"]
    rng, hits = np.random.default_rng(0), 0
    for _ in range(100):
        rows = rng.integers(4000, size=150)
        found = text_metrics([predictions[i] for i in rows], [references[i] for i in rows], ["word_error_rate"], repetitions=200)
        hits += found["word_error_rate"]["low"] <= truth <= found["word_error_rate"]["high"]
    assert 85 <= hits <= 100


def test_results_are_plain_floats_which_a_seed_repeats():
    predictions, references = corpus(40)
    first, second = (text_metrics(predictions, references, TEXT_METRICS, repetitions=50, seed=7) for _ in range(2))
    assert first == second
    assert first != text_metrics(predictions, references, TEXT_METRICS, repetitions=50, seed=8)
    assert {type(number) for found in first.values() for number in found.values()} == {float}
    assert set(first) == set(TEXT_METRICS)


def test_signatures_name_version_and_settings():
    assert signature("bleu") == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert signature("chrf").startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0")
    with pytest.raises(ValueError, match="'bleu' or 'chrf'"):
        signature("exact_match")


@pytest.mark.parametrize(
    ("predictions", "references", "error", "match"),
    [
        ([], [], ValueError, "got 0 and 0"),
        (["a"], ["a", "b"], ValueError, "got 1 and 2"),
        ("ab", "ab", ValueError, "two lists"),
        (["a"], [" "], ValueError, "1 of 1 blank"),
        ([None], ["a"], TypeError, "strings in predictions, got NoneType"),
        ([[1, 2]], ["a"], TypeError, "strings in predictions, got list"),
        (["a"], [["a"]], TypeError, "strings in references, got list"),
    ],
)
def test_wrong_texts_are_refused(predictions, references, error, match):
    with pytest.raises(error, match=match):
        text_metrics(predictions, references)


@pytest.mark.parametrize(
    ("settings", "match"), [({"metrics": ["rouge"]}, "rouge"), ({"level": 1.0}, "level"), ({"repetitions": 0}, "repetitions")]
)
def test_wrong_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        text_metrics(["a"], ["a"], **({"metrics": ["word_error_rate"]} | settings))
