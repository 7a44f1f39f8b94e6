"""Splits of a data set: their usual names, parts cut from train where there are none, samples, and texts which two share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_ALIASES = {"train": ("train",), "validation": ("validation", "valid", "dev", "val"), "test": ("test",)}


class Rows(NamedTuple):
    """What a cut goes by: the stratum of each row (its class), and its text as `same_text` makes it."""

    strata: Sequence[str]
    texts: Sequence[str]


def same_text(*texts: str) -> str:
    """What is compared in place of the texts of a row: neither case nor blanks count.

    >>> same_text("To be ", "OR  not") == same_text("to be", "or not")
    True
    """
    return "\n".join(" ".join(text.split()).casefold() for text in texts)


def named_splits(loaded: Mapping[str, Dataset]) -> DatasetDict:
    """The splits by the names train, validation and test, as far as they are there.

    Raises: ValueError without a train split.
    """
    found = {split: next((name for name in names if name in loaded), None) for split, names in _ALIASES.items()}
    if found["train"] is None:
        raise ValueError(f"expected a train split, got {sorted(loaded)}; name it 'train' or pass --train_file")
    return DatasetDict({split: loaded[name] for split, name in found.items() if name})


def with_held_out(
    splits: DatasetDict, fractions: Mapping[str, float], seed: int, rows_of: Callable[[Dataset], Rows], strata: str | None
) -> tuple[DatasetDict, tuple[str, ...]]:
    """The splits, with those of `fractions` cut from train which are not there, and a sentence for each.

    A cut is random by the seed and has the same share of every stratum; equal texts stay in one split. A fraction of 0 cuts none.

    Args:
        fractions: split -> share of train, in the order in which they are cut.
        strata: what the strata are, in words: "label"; None where there is one for all.

    Raises: ValueError as `held_out`.
    """
    made, said = dict(splits), []
    for split, fraction in fractions.items():
        if split in made or not fraction:
            continue
        train = made["train"]
        rows = rows_of(train)
        taken = held_out(rows, fraction, seed, split)
        kept = np.setdiff1d(np.arange(len(train)), taken)
        made |= {split: train.select(taken), "train": train.select(kept)}
        how = f"stratified by {strata}" if strata else "at random"
        shared = {rows.texts[i] for i in taken} & {rows.texts[i] for i in kept}
        together = "" if shared else ", equal texts together"
        said.append(
            f"No {split} split was given: {len(taken):,} of {len(train):,} rows of train are held out for it, {how}{together}, "
            f"seed {seed}"
        )
    return DatasetDict({split: made[split] for split in _ALIASES if split in made}), tuple(said)


def held_out(rows: Rows, fraction: float, seed: int, split: str) -> NDArray[np.int64]:
    """The places of about fraction·n rows, the same share of every stratum; equal texts are taken together, or stay together.

    One text of every stratum always stays behind, so that no class is without a row of train. In a stratum of c texts the one of
    random rank r stands at (r + ½)/c, and the texts which stand lowest are taken: round(fraction·c) of each, as nearly as whole
    texts allow. Where a few texts are most of the data, rows are taken instead of texts.

    Raises: ValueError where no stratum has two rows.
    """
    stratum = np.unique(np.asarray(rows.strata, dtype=np.str_), return_inverse=True)[1]
    wanted = max(1, round(fraction * len(stratum)))
    groups: dict[str, int] = {}
    for group in (np.array([groups.setdefault(text, len(groups)) for text in rows.texts]), np.arange(len(stratum))):
        lowest, size = _lowest_first(stratum, group, seed), np.bincount(group)
        lowest = lowest[size[lowest] <= wanted]
        taken = lowest[: np.searchsorted(np.cumsum(size[lowest]), wanted, side="right")]
        if 2 * size[taken].sum() >= wanted:
            return np.flatnonzero(np.isin(group, taken))
    raise ValueError(
        f"expected two rows of some class to cut a {split} split from, got {len(stratum)} rows in train, no two of one class; "
        f"add some, or give a file for {split}"
    )


def _lowest_first(stratum: NDArray[np.int64], group: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The groups which may be taken, all but one of each stratum, by their height in it; ties at random.

    stratum, group [n]: of each row, integers from 0. The stratum of a group is the rarest one among its rows.
    """
    rarity = np.empty(stratum.max() + 1, dtype=np.int64)
    rarity[np.argsort(np.bincount(stratum), kind="stable")] = np.arange(len(rarity))
    of_group = np.full(group.max() + 1, len(rarity))
    np.minimum.at(of_group, group, rarity[stratum])
    order = np.random.default_rng(seed).permutation(len(of_group))
    count = np.bincount(of_group, minlength=len(rarity))
    by_stratum = order[np.argsort(of_group[order], kind="stable")]
    rank = np.empty_like(of_group)
    rank[by_stratum] = np.arange(len(of_group)) - (np.cumsum(count) - count)[of_group[by_stratum]]
    lowest = order[np.argsort(((rank + 0.5) / count[of_group])[order], kind="stable")]
    return lowest[rank[lowest] < count[of_group[lowest]] - 1]


def sample(part: Dataset, limit: int | None, seed: int | None) -> Dataset:
    """At most `limit` rows in the order of the data: a random sample by `seed`, or the first without one."""
    if limit is None or limit >= len(part):
        return part
    chosen = np.arange(limit) if seed is None else np.sort(np.random.default_rng(seed).permutation(len(part))[:limit])
    return part.select(chosen)


def longest_first(tokens: Dataset) -> NDArray[np.int64]:
    """The order [n] of tokenised rows by length, the longest first and equals as they are, so that batches need little padding.

    `predictions[np.argsort(order)]` are in the order of the rows again.
    """
    rows = tokens.select_columns(["input_ids"]).with_format("arrow")["input_ids"]
    return np.argsort(-pc.list_value_length(rows).to_numpy(), kind="stable")


def check_overlap(splits: Mapping[str, Dataset]) -> None:
    """Refuse to select on the test data, and warn about texts which two splits share, case and blanks aside.

    Raises: ValueError when more than half of the test examples are in validation.
    """
    columns = [column for column in ("text", "text_pair") if column in next(iter(splits.values())).column_names]
    texts = {split: [same_text(*row) for row in zip(*(part[c] for c in columns), strict=True)] for split, part in splits.items()}
    known = {split: set(rows) for split, rows in texts.items()}

    def shared(split: str, other: str) -> int:
        return sum(text in known[other] for text in texts[split]) if split in texts and other in texts else 0

    if (n := shared("test", "validation")) > len(texts.get("test", ())) / 2:
        raise ValueError(
            f"expected a validation split apart from test, got {n} of {len(texts['test'])} test examples in it; "
            "selecting on test makes the reported numbers worthless: give another validation_file or none"
        )
    for split, other, consequence in (
        ("test", "train", "the reported numbers are too good"),
        ("validation", "train", "the best checkpoint and the temperature are chosen on what training has seen"),
        ("test", "validation", "the temperature was fitted on them"),
    ):
        if n := shared(split, other):
            logger.warning("%d of %d %s examples are also in %s; %s", n, len(texts[split]), split, other, consequence)
