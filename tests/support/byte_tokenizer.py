"""A tokenizer of bytes with a few merges, as GPT-2's: a blank belongs to the word behind it."""

from __future__ import annotations

import transformers as tf
from tokenizers import Tokenizer, processors
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ["<pad>", "<s>", "</s>"]
MERGES = [("Ġ", "y"), ("Ġ", "n"), ("e", "s"), ("Ġy", "es"), ("Ġ", "A"), ("Ġ", "B"), ("Ġ", "C")]


def byte_tokenizer(
    *, bos: bool = True, merges: list[tuple[str, str]] = MERGES, over_blanks: bool = False, **options: object
) -> tf.PreTrainedTokenizerFast:
    """over_blanks: merges may join what stands before a blank with what stands behind it."""
    pieces = [*SPECIAL, *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=not over_blanks)
    tokenizer.decoder = Decoder()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)
