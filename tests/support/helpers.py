"""Tiny models and batches shared by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch.utils.data import Dataset
from transformers.trainer_callback import PrinterCallback

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer

VOCAB, CLASSES = 97, 5
LENGTHS = (40, 38, 6, 5, 20, 3, 9, 4)


class Rows(Dataset):
    def __init__(self, rows: list[dict[str, torch.Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.rows[i]


def _base(**kwargs: Any) -> dict[str, Any]:
    common = dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, pad_token_id=0
    )
    return common | kwargs


def tiny_bert(num_labels: int = CLASSES, seed: int = 0, **kwargs: Any) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return tf.BertForSequenceClassification(tf.BertConfig(**_base(num_labels=num_labels, **(off | kwargs))))


def tiny_reader(seed: int = 0) -> tf.PreTrainedModel:
    """Answers questions, with logits far enough apart for its mistakes to be seen."""
    torch.manual_seed(seed)
    model = tf.BertForQuestionAnswering(tiny_bert(num_labels=2).config)
    with torch.no_grad():
        model.qa_outputs.weight.mul_(20)
    return model


def tiny_distilbert() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, dim=32, n_layers=1, n_heads=4, hidden_dim=64, num_labels=CLASSES)
    return tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(**sizes, dropout=0, attention_dropout=0, seq_classif_dropout=0)
    )


def tiny_modernbert() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    ids = dict(cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
    return tf.ModernBertForSequenceClassification(
        tf.ModernBertConfig(**_base(num_labels=CLASSES), **ids, global_attn_every_n_layers=1)
    )


def tiny_llama(seed: int = 0, sharpness: float = 1.0, **kwargs: Any) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    ids = dict(bos_token_id=1, eos_token_id=2, num_key_value_heads=4, max_position_embeddings=512)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**_base(**(ids | kwargs))))
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def tiny_t5() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def tiny_fsmt() -> tf.PreTrainedModel:
    """Turns ignored labels into padding, in place, when it makes decoder inputs of them; not causal with use_cache."""
    torch.manual_seed(0)
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    sizes = dict(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, src_vocab_size=VOCAB, tgt_vocab_size=VOCAB)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, langs=["en", "de"])
    off = dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, max_position_embeddings=64)
    return tf.FSMTForConditionalGeneration(tf.FSMTConfig(**layers, **sizes, **ids, **off))


def tiny_bart() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    sizes = dict(vocab_size=VOCAB, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128)
    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)
    return tf.BartForConditionalGeneration(
        tf.BartConfig(**layers, **sizes, **ids, dropout=0, attention_dropout=0, activation_dropout=0)
    )


def classification_rows(n: int = 8, seed: int = 0, classes: int = CLASSES) -> Rows:
    g = torch.Generator().manual_seed(seed)

    def row(i: int) -> dict[str, torch.Tensor]:
        length = 4 + i % 9
        ids = torch.randint(5, VOCAB, (length,), generator=g)
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.randint(0, classes, (), generator=g))

    return Rows([row(i) for i in range(n)])


def token_rows(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Rows:
    """Language modelling rows of very different lengths, so that means of means are visibly wrong."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, VOCAB, (n,), generator=g) for n in lengths]
    return Rows([dict(input_ids=x, attention_mask=torch.ones_like(x), labels=x.clone()) for x in ids])


def seq2seq_rows(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Rows:
    g = torch.Generator().manual_seed(seed)
    rows = []
    for n in lengths:
        labels, ids = torch.randint(5, VOCAB, (n,), generator=g), torch.randint(5, VOCAB, (7,), generator=g)
        rows.append(dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels))
    return Rows(rows)


def span_rows(starts: tuple[int, ...], ends: tuple[int, ...], lengths: tuple[int, ...], width: int | None = None) -> Rows:
    """Features <s> question </s> context </s>: 4 is the question's mask (Splinter), 3 ends the question (BigBird)."""
    g = torch.Generator().manual_seed(0)
    found = []
    for start, end, length in zip(starts, ends, lengths, strict=True):
        ids = torch.randint(5, VOCAB, (length,), generator=g)
        ids[0], ids[1], ids[2], ids[-1] = 1, 4, 3, 2
        padding = (0, (width or length) - length)
        ids, mask = (torch.nn.functional.pad(values, padding) for values in (ids, torch.ones_like(ids)))
        positions = dict(start_positions=torch.tensor(start), end_positions=torch.tensor(end))
        found.append(dict(input_ids=ids, attention_mask=mask) | positions)
    return Rows(found)


def answers(n: int) -> Rows:
    """Features of 12 tokens; every third answer ends, and every sixth begins, beyond the text."""
    starts, ends = (tuple(40 if i % step == 2 else i % length for i in range(n)) for step, length in ((6, 5), (3, 7)))
    return span_rows(starts, ends, tuple(5 + i % 8 for i in range(n)), 12)


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    out = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        if values[0].dim() == 0:
            out[name] = torch.stack(values)
        else:
            fill = -100 if name == "labels" else 0
            out[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
    return out


def arguments(folder: Path | str, cls: type = tf.TrainingArguments, **kwargs: Any) -> Any:
    """One SGD step of size 1 in file order: the change of the weights is the gradient."""
    fixed = dict(
        output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, max_steps=1, learning_rate=1.0,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, disable_tqdm=True, seed=1, remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    return cls(**(fixed | kwargs))


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])


def one_step(trainer_class: type, model: Any, rows: Rows, folder: Path, args_class: type = tf.TrainingArguments, **kwargs: Any):
    """First logged record and the gradient of one optimizer step."""
    before = weights(model)
    trainer = trainer_class(model=model, args=arguments(folder, args_class, **kwargs), train_dataset=rows, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    record = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return record, before - weights(model)


def ours(folder: Path | str, model: Any, rows: Rows | None = None, **kwargs: Any) -> LabelSmoothingTrainer:
    """Our Trainer with `arguments`, silent."""
    trainer = LabelSmoothingTrainer(
        model=model,
        args=arguments(folder, LabelSmoothingArguments, **kwargs),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
