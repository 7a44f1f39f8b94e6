"""Fingerprints: what makes them differ, what does not, and that a killed run keeps its own."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
import transformers as tf
from datasets import Dataset

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer
from hf_ls.compare.fingerprint import FINGERPRINT, Fingerprint, hash_tensors, hash_weights


def model(seed=0):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3)
    return tf.BertForSequenceClassification(tf.BertConfig(**sizes))


def rows(n=24):
    torch.manual_seed(5)
    ids = torch.randint(5, 40, (n, 6)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": [i % 3 for i in range(n)]})


def run(folder, *, epsilon=0.0, seed=0, data=None, resume=None, stop=None, weights=0, **more):
    args = LabelSmoothingArguments(
        output_dir=str(folder), label_smoothing_factor=epsilon, seed=seed, report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=4, num_train_epochs=2, dataloader_pin_memory=False, eval_strategy="epoch",
        **{"save_strategy": "no"} | more,
    )  # fmt: skip
    fingerprint = Fingerprint()
    callbacks = [fingerprint, *([Stop(stop)] if stop else [])]
    data = data or rows()
    tf.set_seed(seed)
    trainer = LabelSmoothingTrainer(model=model(weights), args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return json.loads((folder / FINGERPRINT).read_text())


class Stop(tf.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_epsilon_changes_nothing_and_evaluation_does_not_count(tmp_path):
    one, two = run(tmp_path / "a"), run(tmp_path / "b", epsilon=0.2)
    assert one == two
    assert one["steps"] == one["batches"] == 12
    assert one["weights"] == hash_weights(model())


def test_the_chain_is_the_one_documented(tmp_path):
    """One batch of one row, hashed here with hashlib alone."""
    args = {"per_device_train_batch_size": 1, "max_steps": 1, "eval_strategy": "no"}
    found = run_with(tmp_path, rows(1), args)
    ids = torch.tensor(rows(1)["input_ids"])
    batch = hashlib.sha256(b"input_ids\0torch.int64\0(1, 6)\0" + ids.numpy().tobytes()).digest()
    assert found["inputs"] == hashlib.sha256(hashlib.sha256().digest() + batch).hexdigest()


def run_with(folder, data, more):
    args = LabelSmoothingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", **more
    )
    LabelSmoothingTrainer(model=model(), args=args, train_dataset=data, callbacks=[Fingerprint()]).train()
    return json.loads((folder / FINGERPRINT).read_text())


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"seed": 1}, {"inputs"}),
        ({"weights": 1}, {"weights"}),
        ({"max_steps": 5}, {"inputs", "batches", "steps"}),
        ({"gradient_accumulation_steps": 2}, {"steps"}),
    ],
)
def test_each_part_sees_its_own_difference(tmp_path, change, differs):
    one, two = run(tmp_path / "a"), run(tmp_path / "b", **change)
    assert {name for name in one if one[name] != two[name]} == differs


def test_one_changed_token_is_seen(tmp_path):
    data = rows()
    ids = data["input_ids"][:]
    ids[17][2] = 5 if ids[17][2] != 5 else 6
    changed = data.remove_columns("input_ids").add_column("input_ids", ids)
    assert run(tmp_path / "a")["inputs"] != run(tmp_path / "b", data=changed)["inputs"]


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_has_the_fingerprint_of_a_whole_one(tmp_path, restore):
    saving = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": restore}
    whole = run(tmp_path / "whole")
    run(tmp_path / "part", stop=5, **saving)
    assert run(tmp_path / "part", resume=str(tmp_path / "part" / "checkpoint-4"), **saving) == whole


def test_resuming_without_one_is_refused(tmp_path):
    run(tmp_path, stop=5, save_strategy="steps", save_steps=4)
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["Fingerprint"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="expected a fingerprint in the checkpoint"):
        run(tmp_path, resume=str(path.parent))


def test_the_hash_reads_names_types_shapes_and_bits():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}
    assert hash_tensors(base) == hash_tensors({"b": torch.tensor(3), "a": torch.tensor([1.0, 2.0]), "flag": True})
    for other in ({"c": base["a"]}, {"a": base["a"].double()}, {"a": base["a"][None]}, {"a": -base["a"]}):
        assert hash_tensors(base | other) != hash_tensors(base)
    assert hash_tensors({"a": torch.tensor(0.0)}) != hash_tensors({"a": torch.tensor(-0.0)})
    assert hash_tensors({"a": torch.ones(2, dtype=torch.bfloat16)}) == hash_tensors(
        {"a": torch.ones(4, dtype=torch.bfloat16)[::2]}
    )
