"""Only complete checkpoints of the same settings are resumed."""

from __future__ import annotations

import json

import pytest
from helpers import arguments, classification_rows, collate, tiny_bert

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer, Smoothing
from hf_ls.run.checkpoint import MARK, CheckpointMark, check_resumable, last_complete_checkpoint


def train(folder, limit=None, resume=None, **kwargs):
    settings = dict(max_steps=6, save_strategy="steps", save_steps=1, per_device_train_batch_size=2, num_train_epochs=2) | kwargs
    args = arguments(folder, LabelSmoothingArguments, label_smoothing_factor=0.1, **settings)
    trainer = LabelSmoothingTrainer(
        model=tiny_bert(), args=args, train_dataset=classification_rows(), eval_dataset=classification_rows(5), data_collator=collate,
        callbacks=[CheckpointMark(Smoothing(0.1), limit)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_the_last_marked_checkpoint_is_chosen(tmp_path):
    train(tmp_path, max_steps=4)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / MARK).unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-12").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tmp_path):
    train(tmp_path, limit=2, max_steps=5)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]
    assert all((tmp_path / name / MARK).is_file() for name in names(tmp_path))


def test_the_best_checkpoint_is_kept(tmp_path):
    best = dict(load_best_model_at_end=True, metric_for_best_model="nll", eval_strategy="steps", eval_steps=1, learning_rate=0.3)
    trainer = train(tmp_path, limit=1, **best)
    assert trainer.state.best_global_step < 6
    assert names(tmp_path) == sorted({f"checkpoint-{trainer.state.best_global_step}", "checkpoint-6"})


def test_only_the_same_settings_are_resumed(tmp_path):
    train(tmp_path, max_steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    check_resumable(checkpoint, Smoothing(0.1))
    with pytest.raises(ValueError, match=r"epsilon 0.1 there and 0.2 here"):
        check_resumable(checkpoint, Smoothing(0.2))
    saved = json.loads((checkpoint / MARK).read_text())
    (checkpoint / MARK).write_text(json.dumps(saved | {"num_processes": 2}))
    with pytest.raises(ValueError, match="num_processes 2 there and 1 here"):
        check_resumable(checkpoint, Smoothing(0.1))
    (checkpoint / MARK).unlink()
    with pytest.raises(ValueError, match="complete checkpoint"):
        check_resumable(checkpoint, Smoothing(0.1))


def test_terms_logged_after_a_resume_belong_to_the_steps_since(tmp_path):
    """Logged every 3 steps, resumed after 4 of 6: the second record still adds up."""
    train(tmp_path, max_steps=4, logging_steps=3)
    trainer = train(tmp_path, max_steps=6, logging_steps=3, resume=str(tmp_path / "checkpoint-4"))
    record = [r for r in trainer.state.log_history if "loss" in r][-1]
    assert record["step"] == 6
    assert record["nll"] + record["smoothing_term"] == pytest.approx(record["loss"], rel=1e-5)


def test_a_checkpoint_that_is_written_anew_is_not_complete_meanwhile(tmp_path):
    """Training goes back to step 2: what a kill in the middle of writing 3 and 4 again would leave must not be chosen."""
    train(tmp_path, max_steps=4)
    train(tmp_path, max_steps=2, resume=str(tmp_path / "checkpoint-2"))  # already there: writes nothing
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()


def test_half_a_checkpoint_of_a_later_step_pushes_out_no_whole_one(tmp_path):
    """Killed in writing checkpoint-9; the resumed run saves more often, and keeps one checkpoint."""
    train(tmp_path, max_steps=2)
    (tmp_path / "checkpoint-9").mkdir()
    train(tmp_path, limit=1, max_steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-9"]


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_noticed(tmp_path):
    """Of the same size, as a bad disk or copy leaves it; in the mark itself too."""
    train(tmp_path, max_steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MARK} <= {path.name for path in files}
    check_resumable(checkpoint, Smoothing(0.1))
    for path in files:
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            with pytest.raises(ValueError, match=r"^expected "):
                check_resumable(checkpoint, Smoothing(0.1))
        path.write_bytes(whole)
    check_resumable(checkpoint, Smoothing(0.1))
    (checkpoint / MARK).write_text(
        json.dumps({k: v for k, v in json.loads((checkpoint / MARK).read_text()).items() if k != "files"})
    )
    with pytest.raises(ValueError, match="names no files"):
        check_resumable(checkpoint, Smoothing(0.1))
