"""What a second start of the same run may change: every setting is either in the list of harmless ones or refused."""

from __future__ import annotations

from dataclasses import MISSING, fields
from enum import Enum

import pytest

from hf_ls import LabelSmoothingArguments
from hf_ls.common.settings import HARMLESS, check_same, settings_of
from hf_ls.compare.experiment import CompareArguments
from hf_ls.run.arguments import DataArguments, ModelArguments, RunArguments
from hf_ls.trainer.arguments import LabelSmoothingSeq2SeqArguments

PARTS = (RunArguments, ModelArguments, DataArguments, LabelSmoothingSeq2SeqArguments, CompareArguments)
SETTINGS = [(part, setting.name) for part in PARTS for setting in fields(part) if setting.init]


def unchecked(part, **changes):
    """The defaults, without the checks which would ask for other settings beside a changed one."""
    made = object.__new__(part)
    for setting in fields(part):
        default = setting.default_factory() if setting.default_factory is not MISSING else setting.default
        object.__setattr__(made, setting.name, changes.get(setting.name, default))
    return made


def another(value):
    """A value of the same type, or a text where the default says nothing of the type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, Enum):
        return next(other for other in type(value) if other is not value)
    if isinstance(value, int | float):
        return value + 1
    return [*value, "more"] if isinstance(value, list) else f"{value} changed"


@pytest.mark.parametrize(("part", "name"), SETTINGS, ids=[f"{part.__name__}-{name}" for part, name in SETTINGS])
def test_every_setting_is_harmless_or_refused(part, name):
    before = unchecked(part)
    after = unchecked(part, **{name: another(getattr(before, name))})
    saved, now = settings_of(before), settings_of(after)
    if name in HARMLESS:
        check_same(saved, now, "the run", "restore them")
        return
    with pytest.raises(ValueError, match=rf"^expected the settings of the run, got {name}: .* then, .* now; restore them$"):
        check_same(saved, now, "the run", "restore them")


def test_the_harmless_ones_are_settings():
    assert {name for _, name in SETTINGS} >= HARMLESS


def test_what_is_noted_is_read_back_as_the_same(tmp_path):
    """Of two starts of the same command: enums, plugins and lists are plain, and no object's address is among them."""

    def start(**more):
        given = dict(lr_scheduler_type="cosine", optim="adamw_torch", accelerator_config={"split_batches": False}, use_cpu=True,
                     hub_token="hf_secret", label_smoothing_factor=0.1)  # fmt: skip
        return settings_of(LabelSmoothingArguments(**dict(output_dir=str(tmp_path)) | given | more), num_processes=2)

    first = start()
    assert first == start(output_dir=str(tmp_path / "other"), logging_steps=7) and first["lr_scheduler_type"] == "cosine"
    assert " at 0x" not in str(first) and "hf_secret" not in str(first)


def test_settings_which_were_not_noted_or_are_no_more_are_refused():
    with pytest.raises(ValueError, match="new: not noted then, 1 now; old: 2 then, not there now"):
        check_same({"old": 2}, {"new": 1}, "the run", "start afresh")
    with pytest.raises(ValueError, match="and 4 more"):
        check_same({}, dict.fromkeys("abcdefghi"), "the run", "start afresh")
