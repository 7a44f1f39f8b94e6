"""What is cut from train where a split is missing: stratified, by the seed, without leaks; and texts which two splits share."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ls.data.splitting import Rows, check_overlap, held_out, longest_first, sample, with_held_out


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 90), min_size=2, max_size=40),
    fraction=st.sampled_from([0.05, 0.1, 0.2, 0.5]),
    seed=st.integers(0, 5),
)
def test_every_stratum_gives_its_share_and_keeps_a_row(counts, fraction, seed):
    strata = [f"class {k}" for k, count in enumerate(counts) for _ in range(count)]  # sorted, as files are
    rows = Rows(strata, [f"text {i}" for i in range(len(strata))])
    if max(counts) < 2:
        with pytest.raises(ValueError, match="two rows of some class"):
            held_out(rows, fraction, seed, "test")
        return
    taken = held_out(rows, fraction, seed, "test")
    found = Counter(strata[i] for i in taken)
    assert len(set(taken)) == len(taken) <= max(1, round(fraction * len(strata)))
    assert all(found[f"class {k}"] < count for k, count in enumerate(counts))
    # One height h for all, so that each gives round(h·count), but for its last row.
    each = [(found[f"class {k}"], count) for k, count in enumerate(counts)]
    highest = max((n - 0.5) / count for n, count in each if n)
    assert highest <= min(((n + 0.5) / count for n, count in each if n < count - 1), default=1) + 1e-9
    np.testing.assert_array_equal(taken, held_out(rows, fraction, seed, "test"))


def test_equal_texts_are_on_one_side_and_another_seed_takes_others():
    texts = [f"text {i // 3}" for i in range(600)]
    rows = Rows([f"class {i % 2}" for i in range(600)], texts)
    first, second = (set(held_out(rows, 0.1, seed, "test")) for seed in (0, 1))
    assert first != second and 55 <= len(first) <= 60
    assert not {texts[i] for i in first} & {texts[i] for i in set(range(600)) - first}


def test_where_a_few_texts_are_most_of_the_data_rows_are_taken_and_the_overlap_is_told(caplog):
    whole = DatasetDict(train=Dataset.from_list([{"text": ("yes", "no")[i % 2], "label": i % 2} for i in range(100)]))
    rows = lambda part: Rows([str(k) for k in part["label"]], part["text"][:])  # noqa: E731
    made, (said,) = with_held_out(whole, {"test": 0.1}, 0, rows, "label")
    assert {split: len(part) for split, part in made.items()} == {"train": 90, "test": 10}
    assert "stratified by label" in said and "together" not in said
    check_overlap(made)
    assert "10 of 10 test examples are also in train" in caplog.text


def test_splits_which_are_there_stay_and_a_fraction_of_0_cuts_none():
    part = Dataset.from_list([{"text": f"text {i}", "label": i % 2} for i in range(40)])
    rows = lambda part: Rows([str(k) for k in part["label"]], part["text"][:])  # noqa: E731
    given = DatasetDict(train=part, validation=part.select(range(4)))
    made, said = with_held_out(given, {"test": 0.0, "validation": 0.1}, 0, rows, "label")
    assert not said and {split: len(p) for split, p in made.items()} == {"train": 40, "validation": 4}


def test_a_sample_is_of_the_whole_in_order():
    part = Dataset.from_dict({"i": list(range(1000))})
    chosen = sample(part, 100, 3)["i"][:]
    assert chosen == sorted(set(chosen)) and len(chosen) == 100 and max(chosen) > 800
    assert sample(part, 100, None)["i"][:] == list(range(100))
    assert sample(part, None, 3) is part and sample(part, 1000, 3) is part


def test_longest_first_is_by_the_rows_of_a_selection_and_equals_keep_their_order():
    part = Dataset.from_dict({"input_ids": [[1], [1, 2, 3], [1, 2], [], [4, 5], [6] * 9]}).select([4, 3, 2, 1, 0])
    assert longest_first(part).tolist() == [3, 0, 2, 4, 1]


@pytest.mark.parametrize(
    ("split", "other", "consequence"),
    [("test", "train", "too good"), ("validation", "train", "what training has seen"), ("test", "validation", "fitted on them")],
)
def test_texts_which_two_splits_share_are_counted_case_and_blanks_aside(caplog, split, other, consequence):
    parts = {name: Dataset.from_list([{"text": f"{name} {i}"} for i in range(20)]) for name in ("train", "validation", "test")}
    check_overlap(DatasetDict(parts))
    assert not caplog.records
    parts[split] = Dataset.from_list([{"text": text} for text in (f"  {other.upper()}  3", *parts[split]["text"][:19])])
    check_overlap(DatasetDict(parts))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"1 of 20 {split} examples are also in {other}") and consequence in record.getMessage()
