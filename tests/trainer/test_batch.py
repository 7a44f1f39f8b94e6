"""A micro-batch: read once, never changed, by whatever model; and the way from it to the loss and back is short."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers as tf
from helpers import (
    VOCAB,
    Rows,
    answers,
    classification_rows,
    collate,
    ours,
    seq2seq_rows,
    tiny_bart,
    tiny_bert,
    tiny_fsmt,
    tiny_llama,
    tiny_reader,
    tiny_t5,
    token_rows,
)
from torch import nn

from hf_ls import LabelSmoothingArguments, LabelSmoothingSeq2SeqArguments, LabelSmoothingSeq2SeqTrainer
from hf_ls.trainer.batch import Batch


class Mutating(nn.Module):
    """Writes into every tensor which it is given, nested ones too; its loss is a cross entropy all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, 5)

    def forward(self, input_ids, labels=None, attention_mask=None, extra=None):
        logits = self.head(self.embed(input_ids.clone()).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels.clone())
        for tensor in (input_ids, labels, attention_mask, *([] if extra is None else extra)):
            if tensor is not None:
                tensor.zero_()
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


def with_more(batch):
    return batch | {"extra": [torch.arange(3.0), torch.ones(2, 2)]}


def every_tensor(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for part in parts for tensor in every_tensor(part)]


MODELS = {
    "bert": (tiny_bert, classification_rows, {}),
    "llama": (tiny_llama, token_rows, {}),
    "llama dense": (tiny_llama, token_rows, {"label_smoothing_logits_free": "off"}),
    "t5": (tiny_t5, seq2seq_rows, {}),
    "bart": (tiny_bart, seq2seq_rows, {}),
    "fsmt": (tiny_fsmt, seq2seq_rows, {}),
    "reader": (tiny_reader, lambda: answers(8), {"label_names": ["start_positions", "end_positions"]}),
    "mutating": (Mutating, classification_rows, {"label_names": ["labels"]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_tensor_of_the_users_batch_is_changed(tmp_path, name):
    make, rows, kwargs = MODELS[name]
    model = make()
    batch = collate(rows().rows)
    batch = with_more(batch) if name == "mutating" else batch
    before = [tensor.clone() for tensor in every_tensor(batch)]
    trainer = ours(tmp_path, model, rows(), label_smoothing_factor=0.1, **kwargs)
    for mode in (True, False):
        model.train(mode)
        trainer.compute_loss(model, batch, num_items_in_batch=trainer._get_num_items_in_batch([batch], torch.device("cpu")))
        trainer.compute_loss(model, batch, return_outputs=True)
    given = trainer.data_collator = lambda rows: batch
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    bare = {key: value for key, value in batch.items() if key not in trainer.label_names}
    if name not in ("t5", "bart", "fsmt"):  # those need labels to decode
        trainer.data_collator = lambda rows: bare
        trainer.predict(trainer.eval_dataset)
    assert given is not None
    assert all(torch.equal(old, new) for old, new in zip(before, every_tensor(batch), strict=True))


@pytest.mark.parametrize("given", ["labels", "decoder_input_ids"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_model_which_writes_into_its_labels_is_trained_on_the_right_ones(tmp_path, use_cache, given):
    model, rows = tiny_fsmt().eval(), seq2seq_rows()
    batch = collate(rows.rows)
    labels = batch.pop("labels")
    batch |= {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels.clone()), "use_cache": False}
    logits = model(**batch).logits.double()  # with a cache, the default without labels, FSMT sees the words to come
    kept = labels != -100
    log_p = logits[kept].log_softmax(-1)
    nll = -log_p.gather(1, labels[kept][:, None]).squeeze(1)
    expected = (0.9 * nll - 0.1 * log_p.mean(1)).mean().item()
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, label_smoothing_factor=0.1, learning_rate=0.0)
    trainer = ours(tmp_path, model, rows, use_cache=use_cache, **settings)
    assert model.config.use_cache is use_cache
    if given == "decoder_input_ids":  # as transformers' collator makes them

        def with_decoder_inputs(rows):
            made = collate(rows)
            return made | {given: model.prepare_decoder_input_ids_from_labels(labels=made["labels"].clone())}

        trainer.data_collator = with_decoder_inputs
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=2e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nll.mean().item(), rel=2e-6)
    assert (trainer.predict(rows).label_ids == -100).sum() == (~kept).sum()


def test_a_generating_evaluation_changes_no_tensor_either(tmp_path):
    batch = collate(seq2seq_rows().rows)
    before = {key: value.clone() for key, value in batch.items()}
    args = LabelSmoothingSeq2SeqArguments(
        str(tmp_path), predict_with_generate=True, generation_max_length=6, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = LabelSmoothingSeq2SeqTrainer(
        model=tiny_fsmt(), args=args, eval_dataset=seq2seq_rows(), data_collator=lambda rows: batch
    )
    trainer.evaluate()
    assert all(torch.equal(before[key], batch[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("classes", [100, 256, 300])
def test_labels_of_every_integer_type_are_the_same_labels(tmp_path, dtype, classes):
    """8-bit labels wrap around where they are compared: uint8 156 is −100, and 300 classes are 44."""
    largest = min(torch.iinfo(dtype).max, classes - 1)
    ids = torch.tensor([0, 1, largest, min(156, largest)])
    batch = Batch.read({"labels": ids.to(dtype)}, ["labels"])
    assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == ids.tolist()
    assert batch.count.item() == 4
    rows = [dict(input_ids=torch.arange(5, 9), labels=label) for label in ids.to(dtype)]
    wide = [dict(input_ids=torch.arange(5, 9), labels=label) for label in ids]
    model = tiny_bert(classes)
    losses = [
        ours(tmp_path, model, Rows(data), label_smoothing_factor=0.1).compute_loss(model.train(), collate(data)).item()
        for data in (rows, wide)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("labels", [torch.ones(4), torch.ones(4, dtype=torch.bool), torch.ones(4, 5)])
def test_labels_which_are_no_class_ids_are_refused(labels):
    with pytest.raises(TypeError, match="expected integer labels"):
        Batch.read({"labels": labels}, ["labels"])


def test_class_weights_have_the_number_of_the_logits_not_of_the_config(tmp_path):
    """Multiple choice: `num_labels` is 2, the choices are 4."""
    model = tf.BertForMultipleChoice(tiny_bert(num_labels=2).config)
    batch = dict(input_ids=torch.randint(5, VOCAB, (3, 4, 6)), labels=torch.tensor([0, 3, 2]))
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    losses = nn.functional.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"], reduction="none")
    expected = ((losses * weight[batch["labels"]]).sum() / weight[batch["labels"]].sum()).item()
    trainer = ours(tmp_path, model)
    trainer.class_weight = weight
    assert trainer.compute_loss(model.train(), batch).item() == pytest.approx(expected, rel=1e-5)
    trainer.class_weight = torch.ones(5)
    with pytest.raises(ValueError, match=r"expected class_weight \[4\]"):
        trainer.compute_loss(model.train(), batch)


@pytest.mark.parametrize(
    ("make", "rows", "logits_free", "most"),
    [
        (tiny_bert, classification_rows, "auto", 6),  # which has no head to go without
        (tiny_llama, token_rows, "off", 6),
        (tiny_t5, seq2seq_rows, "off", 6),
        (tiny_llama, token_rows, "on", 9),  # the matmuls, their chunks and the rows of a chunk are three more
        (tiny_t5, seq2seq_rows, "on", 9),
    ],
)
def test_the_way_of_a_batch_to_its_loss_and_back_is_short(tmp_path, make, rows, logits_free, most):
    """Modules of hf_ls which one training batch visits, after the checks of the first."""
    model, batch = make().train(), collate(rows().rows)
    if model.config.is_encoder_decoder:  # as transformers' collator gives them
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    trainer = ours(tmp_path, model, rows(), label_smoothing_factor=0.1, label_smoothing_logits_free=logits_free)
    trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(8.0)).backward()
    visited = set()

    def note(frame, event, argument):
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("hf_ls"):
            visited.add(name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(8.0)).backward()
    finally:
        sys.setprofile(before)
    assert "hf_ls.trainer.mixin" in visited and len(visited) <= most, sorted(visited)


def test_two_objectives_are_one_too_many(tmp_path):
    from hf_ls import LabelSmoothingTrainer, Objective

    model = tiny_bert()
    for settings in ({"label_smoothing_objective": "maxsup"}, {"label_smoothing_objective_params": '{"gamma": 2}'}):
        args = LabelSmoothingArguments(str(tmp_path))
        for name, value in settings.items():
            setattr(args, name, value)
        with pytest.raises((ValueError, TypeError)):
            LabelSmoothingTrainer(model=model, args=args, objective=Objective("focal"))
