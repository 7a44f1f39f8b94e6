"""A table of tiny random language models, one per way of making logits, their batches, and steps of both loss paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from helpers import Rows, arguments, collate
from largest import Largest as Largest
from transformers.trainer_callback import PrinterCallback

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer, Smoothing
from hf_ls.losses._checks import next_labels
from hf_ls.trainer.logits_free import HeadLoss, LogitsFreeHead
from hf_ls.trainer.shift import decoder_inputs

EPSILON = 0.1

# Rows of logits would be 6 · 100 · 499 numbers: more than any weight, attention map or chunk of these models.
VOCAB, BATCH, LENGTH = 499, 6, 100
KEPT = 25  # labels a row, so that the kept rows (150) are fewer than a chunk

_LLAMA = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, attention_dropout=0.0,
)  # fmt: skip
_T5 = dict(
    vocab_size=VOCAB,
    d_model=32,
    d_kv=16,
    d_ff=48,
    num_layers=2,
    num_heads=2,
    dropout_rate=0.0,
    pad_token_id=0,
    decoder_start_token_id=0,
)
_BART = dict(
    vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
)  # fmt: skip
_BERT = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
)  # fmt: skip
_GPT2 = dict(
    vocab_size=VOCAB,
    n_embd=32,
    n_layer=2,
    n_head=2,
    n_positions=128,
    bos_token_id=1,
    eos_token_id=2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
_NEOX = {name: value for name, value in _LLAMA.items() if name not in ("num_key_value_heads", "head_dim")}
_OPT = dict(
    vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128, dropout=0.0,
    word_embed_proj_dim=32,
)  # fmt: skip
_EXPERTS = dict(
    num_local_experts=4,
    num_experts_per_tok=2,
    output_router_logits=True,
    router_aux_loss_coef=0.5,
    experts_implementation="eager",
)
_GEMMA = dict(sliding_window=64, query_pre_attn_scalar=16)


def _final_bias(model: Any) -> Any:
    model.final_logits_bias.copy_(torch.linspace(-2, 2, VOCAB)[None])
    return model


# name -> (task, constructor); the hard cases are set so that they matter: a small soft-cap, a scale far from 1, a bias not 0.
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "t5": ("seq2seq", lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5))),
    # T5 scales its hidden states before the head, T5 v1.1 does not.
    "t5_v1_1": ("seq2seq", lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5, tie_word_embeddings=False))),
    "mt5": ("seq2seq", lambda: tf.MT5ForConditionalGeneration(tf.MT5Config(**_T5))),
    "bart": ("seq2seq", lambda: _final_bias(tf.BartForConditionalGeneration(tf.BartConfig(**_BART)))),
    "mbart": ("seq2seq", lambda: _final_bias(tf.MBartForConditionalGeneration(tf.MBartConfig(**_BART)))),
    "marian": ("seq2seq", lambda: _final_bias(tf.MarianMTModel(tf.MarianConfig(**_BART, decoder_vocab_size=VOCAB)))),
    "pegasus": ("seq2seq", lambda: _final_bias(tf.PegasusForConditionalGeneration(tf.PegasusConfig(**_BART)))),
    "llama": ("causal", lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA))),
    "qwen2": ("causal", lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_LLAMA, tie_word_embeddings=True))),
    "gemma2": ("causal", lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_LLAMA, **_GEMMA, final_logit_softcapping=1.5))),
    "gemma3": ("causal", lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_LLAMA, **_GEMMA, final_logit_softcapping=2.0))),
    "gpt2": ("causal", lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2))),
    "mixtral": ("causal", lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_LLAMA, **_EXPERTS))),
    "granite": ("causal", lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**_LLAMA, logits_scaling=8.0))),
    "cohere": ("causal", lambda: tf.CohereForCausalLM(tf.CohereConfig(**_LLAMA, logit_scale=0.0625))),
    "gpt_neox": ("causal", lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_NEOX, hidden_dropout=0.0))),
    "opt": ("causal", lambda: tf.OPTForCausalLM(tf.OPTConfig(**_OPT))),
    "phi3": ("causal", lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_LLAMA, resid_pdrop=0.0, embd_pdrop=0.0))),
    "bert": ("masked", lambda: tf.BertForMaskedLM(tf.BertConfig(**_BERT))),
    "distilbert": (
        "masked",
        lambda: tf.DistilBertForMaskedLM(
            tf.DistilBertConfig(
                vocab_size=VOCAB, dim=32, n_layers=2, n_heads=2, hidden_dim=48, dropout=0.0, attention_dropout=0.0
            )
        ),
    ),
    "roberta": ("masked", lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_BERT))),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, str]:
    """The model in training mode, with every weight moved off its initial value, and its task."""
    task, make = MODELS[name]
    torch.manual_seed(0)
    model = make()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).train(), task


def batch(task: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Six rows of 100 tokens of which 25 labels are kept, at other places in each row; sources of 9 tokens."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (BATCH, LENGTH), generator=g)
    labels = torch.full_like(ids, -100)
    for row in range(BATCH):
        labels[row, 7 * row : 7 * row + KEPT] = ids[row, 7 * row : 7 * row + KEPT]
    if task == "seq2seq":
        source = torch.randint(5, VOCAB, (BATCH, 9), generator=g)
        return dict(input_ids=source, attention_mask=torch.ones_like(source), labels=labels)
    if task == "masked":
        ids = torch.where(labels != -100, 3, ids)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)


def prepared(model: Any, task: str, seed: int = 0) -> tuple[dict[str, Any], torch.Tensor]:
    """Inputs without labels, and labels aligned with the logits."""
    inputs = batch(task, seed)
    labels = inputs.pop("labels")
    return decoder_inputs(model, inputs, labels), next_labels(labels) if task == "causal" else labels


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def dense_loss(model: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten(), label_smoothing=EPSILON)


def logits_free(model: Any, inputs: dict[str, Any], labels: torch.Tensor) -> HeadLoss:
    head = LogitsFreeHead(model)
    head.probe(model, inputs, labels)
    return head(model, inputs, labels, Smoothing(EPSILON))


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(g.norm()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= tolerance * max(float(gradient.norm()), 1e-3 * scale), name


def rows(task: str) -> Rows:
    whole = batch(task)
    return Rows([{name: value[i] for name, value in whole.items()} for i in range(BATCH)])


def trainer_of(folder, model, task: str, logits_free: str = "auto", trainer_kwargs: dict[str, Any] | None = None, **kwargs):
    fixed = dict(label_smoothing_factor=EPSILON, per_device_train_batch_size=BATCH, label_smoothing_logits_free=logits_free)
    data = dict(train_dataset=rows(task), eval_dataset=rows(task)) | (trainer_kwargs or {})
    args = arguments(folder, LabelSmoothingArguments, **(fixed | kwargs))
    trainer = LabelSmoothingTrainer(model=model, args=args, data_collator=collate, **data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(folder, model, task: str, mode: str, **kwargs) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], Any]:
    trainer = trainer_of(folder, model, task, mode, **kwargs)
    trainer.train()
    terms = [{k: r[k] for k in ("loss", "nll", "smoothing_term")} for r in trainer.state.log_history if "loss" in r]
    return terms, {name: p.detach().clone() for name, p in model.named_parameters()}, trainer


def reasons(caplog) -> list[str]:
    """What the trainer gave as reasons for the dense path."""
    return [record.getMessage() for record in caplog.records if record.name == "hf_ls.trainer.mixin"]
