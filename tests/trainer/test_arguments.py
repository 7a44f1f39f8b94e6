"""The settings beside the Trainer's own: what is refused when they are made, and the way back to no smoothing."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import pytest
from transformers import TrainingArguments

from hf_ls import LabelSmoothingArguments
from hf_ls.trainer.arguments import smoothing_of, techniques_of, without_smoothing

PREFIXES = ("label_smoothing_", "distillation_", "mixup_")


@dataclass
class WithOneMore(LabelSmoothingArguments):
    """As if a field were added later."""

    label_smoothing_later: float = field(default=0.0)


def test_without_smoothing_resets_every_field_also_one_which_is_added_later(tmp_path):
    args = WithOneMore(str(tmp_path), allow_combined_softening=True, learning_rate=3e-4)
    settings = [f for f in fields(args) if f.name.startswith(PREFIXES)]
    for setting in settings:  # whatever they mean: none may survive
        setattr(args, setting.name, "another value")
    plain = without_smoothing(args)
    assert len(settings) > 10
    assert [f.name for f in settings if getattr(plain, f.name) != f.default] == ["label_smoothing_logits_free"]
    assert plain.label_smoothing_logits_free == "another value"  # the way of computing is no smoothing
    assert plain.learning_rate == 3e-4
    assert args.label_smoothing_factor == "another value"  # the caller's are not changed


@pytest.mark.parametrize(
    "softened",
    [
        {"label_smoothing_factor": 0.1, "label_smoothing_convention": "wrong"},
        {"label_smoothing_schedule": "linear", "label_smoothing_final_factor": 0.4},
        {"label_smoothing_schedule": "cosine", "label_smoothing_factor": 0.2, "label_smoothing_warmup_steps": 3},
        {"label_smoothing_objective": "focal", "label_smoothing_objective_params": '{"gamma": 3}'},
        {"label_smoothing_objective": "online"},
        {"distillation_teacher": "somewhere"},
        {"mixup_alpha": 0.2},
    ],
    ids=lambda softened: "-".join(softened),
)
def test_without_smoothing_leaves_the_plain_cross_entropy(tmp_path, softened):
    args = LabelSmoothingArguments(str(tmp_path), **softened)
    assert techniques_of(args)
    plain = without_smoothing(args)
    assert techniques_of(plain) == []
    smoothing = smoothing_of(plain)
    assert [smoothing.at(step, 10).epsilon for step in range(10)] == [0.0] * 10


def test_without_smoothing_takes_plain_arguments_of_transformers(tmp_path):
    assert without_smoothing(TrainingArguments(str(tmp_path), label_smoothing_factor=0.1)).label_smoothing_factor == 0


def test_a_final_factor_needs_a_schedule(tmp_path):
    for warmup in (0, 5):
        with pytest.raises(ValueError, match=r"final_factor=0\.4, got 'constant'"):
            LabelSmoothingArguments(str(tmp_path), label_smoothing_final_factor=0.4, label_smoothing_warmup_steps=warmup)


@pytest.mark.parametrize(
    ("objective", "params"),
    [
        ("online", '{"alpah": 0.3}'),
        ("online", '{"alpha": 1.5}'),
        ("instance", '{"maximun": 0.3}'),
        ("graduated", '{"thresholds": [0.7, 0.3]}'),
        ("graduated", '{"values": [0.1]}'),
        ("focal", '{"gamma": "three"}'),
        ("smoothed_ce", '{"gamma": 3}'),
        ("focl", None),
    ],
)
def test_an_objective_is_settled_when_the_arguments_are_made(tmp_path, objective, params):
    with pytest.raises((ValueError, TypeError), match="expected"):
        LabelSmoothingArguments(str(tmp_path), label_smoothing_objective=objective, label_smoothing_objective_params=params)
