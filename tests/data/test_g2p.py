"""The embedded dictionary: what is kept, splits which never move and do not leak, one vocabulary for both sides."""

from __future__ import annotations

import gzip
import re
from collections import Counter

import pytest
import torch
from places import ROOT
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, DataCollatorForSeq2Seq

from hf_ls.data.g2p import CONSONANTS, LETTERS, VOWELS, g2p_tokenizer, load_g2p, read_dictionary, word_family

EMBEDDED = ROOT / "hf_ls" / "data" / "embedded"


@pytest.fixture(scope="module")
def splits():
    return load_g2p().splits


@pytest.fixture(scope="module")
def tokenizer():
    return g2p_tokenizer()


def test_the_dictionary_is_the_published_one_with_first_pronunciations():
    lines = gzip.decompress((EMBEDDED / "cmudict.dict.gz").read_bytes()).decode().splitlines()
    words = [line.split()[0] for line in lines]
    variants = {word for word in words if re.search(r"\(\d+\)$", word)}
    spelt_otherwise = {word for word in words if word not in variants and not re.fullmatch("[a-z']+", word)}
    dictionary = read_dictionary()
    assert (len(lines), len(variants), len(spelt_otherwise), len(dictionary)) == (135166, 9114, 1126, 124926)
    assert dictionary["abandon"] == "AH0 B AE1 N D AH0 N"
    assert dictionary["aalborg"] == "AO1 L B AO0 R G"  # neither the comment nor the second pronunciation
    assert "a.m." not in dictionary
    assert list(dictionary) == [word for word in words if word not in variants and word not in spelt_otherwise]


def test_the_licence_lies_beside_the_data():
    assert "Carnegie Mellon University" in (EMBEDDED / "cmudict.LICENSE.txt").read_text()
    assert "Carnegie Mellon" in str(load_g2p().licence)


def test_every_phoneme_is_in_the_vocabulary_and_used():
    used = {phoneme for phonemes in read_dictionary().values() for phoneme in phonemes.split()}
    assert used == {*CONSONANTS, *(vowel + stress for vowel in VOWELS for stress in "012")}


def test_splits_are_fixed(splits):
    assert {split: len(part) for split, part in splits.items()} == {"train": 99858, "validation": 12485, "test": 12583}
    assert splits["train"][0] == {"source": "draftsman", "target": "D R AE1 F T S M AH0 N"}
    assert splits["test"]["source"][:3] == ["musky", "handsaw", "rhapsodize"]


def test_no_word_plural_or_possessive_crosses_the_splits(splits):
    owner: dict[str, str] = {}
    for split, part in splits.items():
        for word in part["source"]:
            # Independent of word_family: the singular spelt out by the usual endings, where it is a word itself.
            for ending in ("'s", "s'", "s", "es", "'"):
                owner.setdefault(word, split)
                stem = word.removesuffix(ending)
                if stem != word and stem:
                    assert owner.setdefault(stem, split) == split, (word, stem)
    assert set(owner) >= set(read_dictionary())


@pytest.mark.parametrize(
    ("word", "family"),
    [("party", "parti"), ("parties", "parti"), ("party's", "parti"), ("boxes", "box"), ("ass", "a"), ("'s", "")],
)
def test_families(word, family):
    assert word_family(word) == family


def test_a_prefix_of_train_is_a_fair_sample(splits):
    first, whole = (Counter(word[0] for word in words) for words in (splits["train"]["source"][:5000], splits["train"]["source"]))
    for letter, count in whole.items():
        assert first[letter] / 5000 == pytest.approx(count / len(splits["train"]), abs=0.02)


def test_tokens_are_letters_and_phonemes_and_end_once(tokenizer):
    encoded = tokenizer(["can't", "a"], text_target=["K AE1 N T", "AH0"])
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in encoded["input_ids"]] == [
        ["c", "a", "n", "'", "t", "</s>"],
        ["a", "</s>"],
    ]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in encoded["labels"]] == [
        ["K", "AE1", "N", "T", "</s>"],
        ["AH0", "</s>"],
    ]
    assert len(tokenizer) == 4 + len(LETTERS) + 24 + 45 == 100
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2, 3)
    assert tokenizer.convert_ids_to_tokens(tokenizer("é B!")["input_ids"]) == ["<unk>", "B", "<unk>", "</s>"]


def test_the_whole_test_split_round_trips_without_unknown_tokens(splits, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = splits["test"].to_dict()
    for one in (tokenizer, loaded):
        encoded = one(texts["source"], text_target=texts["target"])
        assert not any(3 in ids for ids in (*encoded["input_ids"], *encoded["labels"]))
        assert one.batch_decode(encoded["input_ids"], skip_special_tokens=True) == texts["source"]
        assert one.batch_decode(encoded["labels"], skip_special_tokens=True) == texts["target"]
        assert max(map(len, (*encoded["input_ids"], *encoded["labels"]))) <= 32
    assert loaded("ab", text_target="AE1 B").data == tokenizer("ab", text_target="AE1 B").data
    assert set(loaded("ab")) == {"input_ids", "attention_mask"}


def test_a_bart_learns_from_these_rows_and_its_generations_decode(splits, tokenizer):
    torch.manual_seed(0)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=2)
    sizes = dict(d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2)
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=len(tokenizer), encoder_layers=1, decoder_layers=1, max_position_embeddings=64, dropout=0.0, init_std=0.1, **sizes, **ids)
    )  # fmt: skip
    rows = [tokenizer(row["source"], text_target=row["target"]) for row in splits["train"].select(range(4))]
    batch = DataCollatorForSeq2Seq(tokenizer, model=model)([dict(row) for row in rows])
    assert batch["decoder_input_ids"][:, 0].tolist() == [1] * 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    written = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_length=32, num_beams=1)
    assert tokenizer.batch_decode(written, skip_special_tokens=True) == splits["train"]["target"][:4]
