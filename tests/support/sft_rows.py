"""A tokenizer of numbered words with a chat template, and conversations in it."""

from __future__ import annotations

import tokenizers
import torch
import transformers as tf
from datasets import Dataset
from head_models import VOCAB, build

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w3 {% generation %}{{ m.content }} </s>{% endgeneration %} "
    "{% else %}w4 {{ m.content }} {% endif %}{% endfor %}"
)


def tokenizer():
    words = {"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", chat_template=TEMPLATE)


def words(length, seed):
    g = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(5, VOCAB, (length,), generator=g))


def conversations(n=8):
    def talk(i):
        return [{"role": role, "content": words(3 + i % 4, 10 * i + j)} for j, role in enumerate(("user", "assistant") * 2)]

    return Dataset.from_dict({"messages": [talk(i) for i in range(n)]})


def preferences(n=8):
    sides = {side: [words(3 + i % 4, 10 * i + j) for i in range(n)] for j, side in enumerate(("chosen", "rejected"))}
    return Dataset.from_dict(sides)


def reward_model(**settings):
    torch.manual_seed(1)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = tf.LlamaConfig(**{"num_labels": 1, "vocab_size": VOCAB, "pad_token_id": 0, **sizes, **settings})
    return tf.LlamaForSequenceClassification(config)


def save_chat_model(folder):
    """A Llama of 32 dimensions with that tokenizer."""
    build("llama")[0].save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
