"""Techniques beside the plain cross entropy: their names, and that two of them never meet by accident."""

from __future__ import annotations

import pytest
import torch
from helpers import arguments, classification_rows, collate, tiny_bert
from transformers import HfArgumentParser

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer, Objective, OnlineLabelSmoothing, Smoothing
from hf_ls.trainer.arguments import techniques_of

TECHNIQUES = {
    "label smoothing (ε = 0.1)": {"label_smoothing_factor": 0.1},
    "confidence_penalty": {"label_smoothing_objective": "confidence_penalty"},
    "focal": {"label_smoothing_objective": "focal"},
    "dft": {"label_smoothing_objective": "dft"},
    "online label smoothing": {"label_smoothing_objective": "online"},
    "distillation (α = 0.5, T = 2)": {"distillation_teacher": "some/model"},
    "embedding mixup (α = 0.2, one λ per batch)": {"mixup_alpha": 0.2},
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_one_technique_is_named(tmp_path, name):
    assert techniques_of(LabelSmoothingArguments(str(tmp_path), **TECHNIQUES[name])) == [name]


def test_the_plain_cross_entropy_has_none_and_a_schedule_is_named(tmp_path):
    assert techniques_of(LabelSmoothingArguments(str(tmp_path))) == []
    args = LabelSmoothingArguments(str(tmp_path), label_smoothing_schedule="linear", label_smoothing_final_factor=0.2)
    assert techniques_of(args) == ["label smoothing (ε = 0, linear schedule)"]
    args = LabelSmoothingArguments(str(tmp_path), label_smoothing_factor=0.1, label_smoothing_objective="generalised_smoothing")
    assert techniques_of(args) == ["label smoothing (ε = 0.1)"]


PAIRS = [
    (a, b)
    for a in TECHNIQUES
    for b in TECHNIQUES
    # One run has one objective, and only the confidence penalty takes an ε.
    if a < b
    and len(TECHNIQUES[a] | TECHNIQUES[b]) == 2
    and not {a, b} & {"focal", "online label smoothing"}
    and {a, b} != {"dft", "label smoothing (ε = 0.1)"}
]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_any_two_together_need_the_switch(tmp_path, pair):
    both = TECHNIQUES[pair[0]] | TECHNIQUES[pair[1]]
    with pytest.raises(ValueError, match="allow_combined_softening=True") as error:
        LabelSmoothingArguments(str(tmp_path), **both)
    assert all(name in str(error.value) for name in pair)
    assert set(techniques_of(LabelSmoothingArguments(str(tmp_path), **both, allow_combined_softening=True))) == set(pair)


def test_all_pairs_are_tried():
    assert len(PAIRS) == 8


GIVEN = {
    "smoothing": lambda: {"smoothing": Smoothing(0.1)},
    "objective": lambda: {"objective": Objective("confidence_penalty")},
    "online": lambda: {"objective": OnlineLabelSmoothing(5)},
    "teacher": lambda: {"teacher": tiny_bert(seed=1)},
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_given_to_the_trainer_counts_too(tmp_path, name):
    def make(**kwargs):
        args = arguments(tmp_path, LabelSmoothingArguments, mixup_alpha=0.2, **kwargs)
        return LabelSmoothingTrainer(
            model=tiny_bert(), args=args, train_dataset=classification_rows(), data_collator=collate, **GIVEN[name]()
        )

    with pytest.raises(ValueError, match=r"mixup.*allow_combined_softening"):
        make()
    trainer = make(allow_combined_softening=True)
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))


def test_the_teacher_has_a_short_name_on_the_command_line(tmp_path):
    parser = HfArgumentParser([LabelSmoothingArguments])
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--teacher", "some/model"])
    assert args.distillation_teacher == "some/model"
