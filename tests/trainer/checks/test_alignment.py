"""Which label a logit predicts: the model's own loss decides, whatever the model is called and wrapped in (trap 6)."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import (
    CLASSES,
    VOCAB,
    Rows,
    arguments,
    collate,
    one_step,
    seq2seq_rows,
    tiny_bart,
    tiny_bert,
    tiny_llama,
    tiny_t5,
    token_rows,
)
from transformers.trainer_callback import PrinterCallback

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer
from hf_ls.trainer.batch import Batch
from hf_ls.trainer.shift import (
    LossGap,
    counts_first_label,
    decoder_inputs,
    model_loss_gap,
    resolve_shift,
)

LENGTHS = (12, 9, 10, 12)
SMALL = dict(
    vocab_size=VOCAB, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64, dropout=0, pad_token_id=0
)


class Renamed(tf.LlamaForCausalLM):
    """A subclass, as research code has it."""


def sharp(model, factor=30.0):
    """Logits far apart, so that another alignment is another loss."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model


def seeded(make, *args, **kwargs):
    torch.manual_seed(0)
    return make(*args, **kwargs)


def tuned(config, **kwargs):
    torch.manual_seed(1)
    model = sharp(tiny_llama())
    torch.manual_seed(2)
    return peft.get_peft_model(model, config(task_type="CAUSAL_LM", **kwargs))


def gpt2():
    off = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    sizes = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return sharp(seeded(tf.GPT2LMHeadModel, tf.GPT2Config(**sizes, **off, bos_token_id=1, eos_token_id=2, pad_token_id=0)))


def bert_decoder():
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    off = dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    return sharp(seeded(tf.BertLMHeadModel, tf.BertConfig(**sizes, **off, is_decoder=True)))


def llava():
    vision = tf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
    )
    config = tf.LlavaConfig(text_config=tiny_llama().config, vision_config=vision, image_token_index=3)
    return sharp(seeded(tf.LlavaForConditionalGeneration, config))


def gemma3():
    text = tf.Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, pad_token_id=0,
    )  # fmt: skip
    vision = tf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return sharp(seeded(tf.Gemma3ForConditionalGeneration, config))


def renamed():
    model = Renamed(tiny_llama().config)
    model.load_state_dict(tiny_llama().state_dict())
    return sharp(model)


def bart_decoder():
    return sharp(seeded(tf.BartForCausalLM, tf.BartConfig(**SMALL, is_decoder=True, is_encoder_decoder=False)))


def trocr_decoder():
    return sharp(seeded(tf.TrOCRForCausalLM, tf.TrOCRConfig(**SMALL)))


# name -> model, and whether its own loss shifts the labels
CAUSAL = {
    "llama": (lambda: sharp(tiny_llama()), True),
    "gpt2": (gpt2, True),
    "subclass": (renamed, True),
    "bert decoder": (bert_decoder, True),
    "llava": (llava, True),
    "gemma3": (gemma3, True),
    "bart decoder": (bart_decoder, False),
    "trocr decoder": (trocr_decoder, False),
    "lora": (lambda: tuned(peft.LoraConfig, r=2, target_modules=["q_proj"]), True),
    "prompt tuning": (lambda: tuned(peft.PromptTuningConfig, num_virtual_tokens=4), True),
    "p-tuning": (lambda: tuned(peft.PromptEncoderConfig, num_virtual_tokens=4, encoder_hidden_size=16), True),
    "prefix tuning": (lambda: tuned(peft.PrefixTuningConfig, num_virtual_tokens=4), True),
}
# Where the stock smoother takes another alignment than the model, or fails (transformers 5.23).
WRONG = ("subclass", "llava", "bart decoder", "trocr decoder", "prompt tuning", "p-tuning")


def rows_for(name):
    rows = token_rows(LENGTHS, seed=4)
    if name == "gemma3":
        for row in rows.rows:
            row["token_type_ids"] = torch.zeros_like(row["input_ids"])
    return rows


def trainer_of(folder, model, rows, trainer_class=LabelSmoothingTrainer, **kwargs):
    args_class = LabelSmoothingArguments if trainer_class is LabelSmoothingTrainer else tf.TrainingArguments
    args = arguments(folder, args_class, per_device_train_batch_size=len(rows), **kwargs)
    trainer = trainer_class(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    return trainer


def own_loss(model, rows):
    model.eval()
    with torch.no_grad():
        return float(model(**collate(rows.rows)).loss)


@pytest.mark.parametrize("logits_free", ["auto", "off"])
@pytest.mark.parametrize("name", CAUSAL)
def test_trap_06_epsilon_to_zero_is_the_models_own_loss(tmp_path, name, logits_free):
    """In training, where labels are counted by the same rule, and in evaluation."""
    make, shifts = CAUSAL[name]
    model, rows = make(), rows_for(name)
    trainer = trainer_of(tmp_path, model, rows, label_smoothing_logits_free=logits_free, label_smoothing_factor=1e-9)
    batch = collate(rows.rows)
    count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    assert trainer._shift is shifts
    first = shifts and name not in ("prompt tuning", "p-tuning")  # the last virtual token predicts the first label
    assert int(count) == sum(LENGTHS) - (len(LENGTHS) if first else 0)
    expected = own_loss(model, rows)
    loss = trainer.compute_loss(model.train(), batch, num_items_in_batch=count)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert trainer.evaluate()["eval_nll"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.stock
def test_trap_06_stock_shift_goes_by_the_class_name(tmp_path, name):
    model, rows = CAUSAL[name][0](), rows_for(name)
    expected = own_loss(model, rows)
    trainer = trainer_of(tmp_path, model, rows, tf.Trainer, label_smoothing_factor=1e-9)
    try:
        loss = trainer.compute_loss(model, collate(rows.rows)).item()
    except (RuntimeError, IndexError):
        return  # logits and labels of different lengths
    if loss == pytest.approx(expected, rel=1e-4, abs=1e-5):
        pytest.skip(f"this version of transformers smooths {type(model).__name__} with the model's own shift")


@pytest.mark.parametrize("trainer_class", [LabelSmoothingTrainer, tf.Trainer])
def test_trap_06_a_compiled_model_keeps_its_shift_stock_loses_it(tmp_path, trainer_class):
    """`_orig_mod`: the class which the trainer sees is torch's wrapper."""
    rows = token_rows(LENGTHS, seed=4)
    expected = own_loss(sharp(tiny_llama()), rows)
    kwargs = dict(label_smoothing_factor=1e-9, learning_rate=0.0, per_device_train_batch_size=len(LENGTHS))
    record, _ = one_step(
        trainer_class, sharp(tiny_llama()), rows, tmp_path, torch_compile=True, torch_compile_backend="eager", **kwargs
    )
    if trainer_class is LabelSmoothingTrainer:
        assert record["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    elif record["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-5):
        pytest.skip("this version of transformers shifts the labels of compiled models")


@pytest.mark.parametrize("make", [tiny_t5, tiny_bart], ids=lambda f: f.__name__)
def test_encoder_decoders_are_not_shifted(tmp_path, make):
    model, rows = make(), seq2seq_rows((7, 5, 6))
    trainer = trainer_of(tmp_path, model, rows)
    assert trainer.evaluate()["eval_nll"] == pytest.approx(own_loss(model, rows), rel=1e-5)
    assert trainer._shift is False


def test_token_classification_is_not_shifted(tmp_path):
    model = seeded(tf.BertForTokenClassification, tiny_bert().config)
    rows = token_rows(LENGTHS)
    for row in rows.rows:
        row["labels"] %= CLASSES
    trainer = trainer_of(tmp_path, model, rows)
    assert trainer.evaluate()["eval_nll"] == pytest.approx(own_loss(model, rows), rel=1e-5)
    assert trainer._shift is False


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart decoder", "trocr decoder"])
def test_a_head_of_zeros_does_not_hide_the_shift(tmp_path, name):
    """Every alignment has the same loss then; the label of the first position tells them apart."""
    make, shifts = CAUSAL[name]
    model = make()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    rows = token_rows(LENGTHS)
    batch = Batch.read(collate(rows.rows), ["labels"])
    assert model_loss_gap(model, batch).ambiguous
    assert counts_first_label(model, batch) is not shifts
    trainer = trainer_of(tmp_path, model, rows)
    trainer.evaluate()
    assert trainer._shift is shifts


def with_shift_labels(rows, keep_labels):
    for row in rows.rows:
        row["shift_labels"] = F.pad(row["labels"], (0, 1), value=-100)[1:]
        if not keep_labels:
            del row["labels"]
    return rows


def collate_shifted(rows):
    batch = collate(rows)
    columns = torch.arange(batch["shift_labels"].shape[1])[None]
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])[:, None]
    batch["shift_labels"] = batch["shift_labels"].masked_fill(columns >= lengths, -100)
    return batch


@pytest.mark.parametrize("keep_labels", [True, False])
def test_shift_labels_of_a_batch_are_taken_as_they_are(tmp_path, keep_labels):
    """As context parallelism and padding-free collators give them."""
    model, plain = sharp(tiny_llama()), token_rows(LENGTHS, seed=4)
    expected = own_loss(model, plain)
    rows = with_shift_labels(token_rows(LENGTHS, seed=4), keep_labels)
    trainer = trainer_of(tmp_path, model, rows, learning_rate=0.0)
    trainer.data_collator = collate_shifted
    trainer.train()
    assert next(r for r in trainer.state.log_history if "loss" in r)["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert trainer.evaluate()["eval_nll"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_users_word_goes_over_the_models(tmp_path):
    model, rows = sharp(tiny_llama()), token_rows(LENGTHS)
    args = arguments(tmp_path, LabelSmoothingArguments)
    trainer = LabelSmoothingTrainer(model=model, args=args, eval_dataset=rows, data_collator=collate, shift_labels=False)
    batch = collate(rows.rows)
    logits = model(**batch).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()
    assert trainer.evaluate()["eval_nll"] == pytest.approx(wanted, rel=1e-5)


def test_a_loss_which_is_neither_alignment_is_refused_with_all_three_numbers():
    gap = LossGap(own=3.0, unshifted=2.0, shifted=2.5, tolerance=1e-4)
    with pytest.raises(ValueError, match=r"got 3 against 2 \(2.5 with labels shifted\)"):
        resolve_shift(tiny_llama(), gap)


def test_without_an_own_loss_sequences_need_the_users_word_and_classes_do_not():
    model = tiny_llama()
    assert resolve_shift(model, LossGap(None, 2.0, None, 1e-4)) is False
    with pytest.raises(ValueError, match="pass shift_labels=True"):
        resolve_shift(model, LossGap(None, 2.0, 2.5, 1e-4))


def test_a_batch_without_labels_gets_made_up_ones_only_for_the_forward():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.full((2, 3), -100)}
    read = Batch.read(batch, ["labels"])
    assert not read.tells and read.with_some_label().tells
    assert bool((batch["labels"] == -100).all())


def test_an_encoder_decoder_which_cannot_make_decoder_inputs_names_the_collator(monkeypatch):
    model = tiny_t5()
    monkeypatch.setattr(type(model), "prepare_decoder_input_ids_from_labels", None)
    with pytest.raises(ValueError, match="DataCollatorForSeq2Seq"):
        decoder_inputs(model, {"input_ids": torch.ones(1, 3)}, torch.ones(1, 2, dtype=torch.long))


def test_the_check_draws_no_random_numbers_and_keeps_the_mode(tmp_path):
    model = tiny_bert(hidden_dropout_prob=0.5).train()
    rows = Rows([{"input_ids": torch.arange(5, 9), "labels": torch.tensor(1)}])
    state = torch.get_rng_state()
    first, second = (model_loss_gap(model, Batch.read(collate(rows.rows), ["labels"])) for _ in range(2))
    assert model.training and first == second
    assert torch.equal(state, torch.get_rng_state())
