"""English spelling to phonemes: the embedded data of the sequence tasks with its fixed split, and its character tokenizer."""

from __future__ import annotations

import gzip
import hashlib
import re
from pathlib import Path

from datasets import Dataset, DatasetDict
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_ls.data.sequences import SequenceData

EMBEDDED_G2P = "cmudict"
LETTERS = "'abcdefghijklmnopqrstuvwxyz"
CONSONANTS = (
    *("B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N"),
    *("NG", "P", "R", "S", "SH", "T", "TH", "V", "W", "Y", "Z", "ZH"),
)
VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
# What a user writes is a spelling, what the assistant answers its phonemes: <s> ends the one, </s> the other.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<s>{% generation %}{{ message['content'] }}</s>"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)
_DICTIONARY = Path(__file__).parent / "embedded" / "cmudict.dict.gz"
_VARIANT = re.compile(r"\(\d+\)$")


def load_g2p() -> SequenceData:
    """The CMU Pronouncing Dictionary as pairs of spelling and phonemes: 124,926 words (Carnegie Mellon University 2015).

    Columns: `source`, a word in lower case ("abandon"); `target`, its phonemes with stress digits, separated by blanks
    ("AH0 B AE1 N D AH0 N"). Of words with several pronunciations the first one is kept (9,114 further ones are dropped), and
    words with other characters than a–z and the apostrophe are left out (1,126, such as "a.m." and "air-force").

    80/10/10 splits by a BLAKE2 hash of `word_family`, so they never change and a word, its plural and its possessive are in
    one split; other derived forms ("abandoned", "abandonment") may be in another. Inside a split the words are in the order of
    their own hash, so that a prefix (`max_train_samples`) is a fair sample.
    """
    parts: dict[str, list[tuple[bytes, str, str]]] = {"train": [], "validation": [], "test": []}
    for word, phonemes in read_dictionary().items():
        share = int.from_bytes(_digest(word_family(word)), "big") / 2**64
        split = "train" if share < 0.8 else "validation" if share < 0.9 else "test"
        parts[split].append((_digest(word + "/order"), word, phonemes))
    splits = {}
    for split, rows in parts.items():
        _, source, target = zip(*sorted(rows), strict=True)
        splits[split] = Dataset.from_dict({"source": source, "target": target})
    name, licence = "CMU Pronouncing Dictionary", "BSD-2-Clause, Carnegie Mellon University 1993-2015"
    return SequenceData(DatasetDict(splits), (), name, None, licence, splits["test"][0]["source"])


def read_dictionary() -> dict[str, str]:
    """Word → phonemes of its first pronunciation, for the words spelt with `LETTERS` only, in the order of the file."""
    words: dict[str, str] = {}
    with gzip.open(_DICTIONARY, "rt", encoding="utf-8") as file:
        for line in file:
            word, _, phonemes = line.partition("#")[0].strip().partition(" ")
            if not _VARIANT.search(word) and set(word) <= set(LETTERS):
                words[word] = phonemes
    return words


def word_family(word: str) -> str:
    """What a word shares with its plural and its possessive; they must not be in different splits.

    Apostrophes and every final s and e go, then a final y is an i. That is coarser than grammar ("bees" and "be" are one
    family), which costs nothing here.

    >>> {word_family(word) for word in ("abandon", "abandon's", "abandons", "abandons'")}
    {'abandon'}
    >>> word_family("parties") == word_family("party"), word_family("horses") == word_family("horse's")
    (True, True)
    """
    stem = word.replace("'", "").rstrip("es")
    return stem[:-1] + "i" if stem.endswith("y") else stem


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def g2p_tokenizer() -> PreTrainedTokenizerFast:
    """Letters of a spelling and phonemes of a pronunciation as single tokens of one vocabulary of 100.

    Ids: 0–3 `<pad>`, `<s>`, `</s>`, `<unk>`, then the 27 letters and the 69 phonemes, vowels with stress 0, 1 or 2. Lower case
    is spelling and upper case phonemes, so `text` and `text_target` need no different rules. `</s>` ends both; `<s>` is never
    added: it is what the decoder starts with. Decoding gives the text back: letters joined, phonemes separated by blanks.
    """
    phonemes = sorted([*CONSONANTS, *(vowel + stress for vowel in VOWELS for stress in "012")])
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *LETTERS, *phonemes])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[A-Z]+[0-9]?|."), "isolated")]
    )
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    # A blank after each phoneme, all tokens joined, the last blank taken off.
    core.decoder = decoders.Sequence([decoders.Replace(Regex("(?<=[A-Z0-9])$"), " "), decoders.Fuse(), decoders.Strip(" ", 0, 1)])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
