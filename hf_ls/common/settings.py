"""Which settings two starts of the same run must share: all but a short list of harmless ones.

A run which is resumed and a comparison which goes on in its folder both ask here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

# What decides neither the weights nor a number in the report. A setting which is not named here, such as one which a later
# transformers brings, must stay as it was.
HARMLESS = frozenset(
    {
        # where files are, and where they are sent
        *("output_dir", "save_on_each_node", "run_name", "project"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        # what is printed and logged
        *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node", "log_level"),
        *("log_level_replica", "disable_tqdm", "report_to", "skip_memory_metrics"),
        # how this start goes about it
        *("resume_from_checkpoint", "overwrite_output_dir", "dry_run", "local_rank", "ddp_timeout"),
        # when checkpoints go, and what else than the planned steps makes one; the baseline is a run beside this one
        *("save_total_limit", "enable_jit_checkpoint", "with_baseline"),
        # how batches are fetched, and how many rows an evaluation takes at once: their order and sums stay
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
        *("per_device_eval_batch_size", "eval_accumulation_steps"),
        # of a comparison: how many runs there are at a time, and where
        *("jobs", "print_cells"),
    }
)
_SHOWN = 5


def settings_of(*parts: Any, **facts: Any) -> dict[str, Any]:
    """The settings of these dataclasses which must stay as they are, and further facts, as JSON holds them."""
    found = {
        setting.name: getattr(part, setting.name)
        for part in parts
        for setting in fields(part)
        if setting.init and setting.name not in HARMLESS
    }
    return json.loads(json.dumps(found | facts, default=_plain))


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], what: str, remedy: str) -> None:
    """Refuse other settings than those which were saved.

    Raises: ValueError which names the first few that differ, with both values.
    """
    names = sorted(saved.keys() | now.keys())
    different = [
        f"{name}: {saved.get(name, 'not noted')} then, {now.get(name, 'not there')} now"
        for name in names
        if name not in saved or name not in now or saved[name] != now[name]
    ]
    if different:
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise ValueError(f"expected the settings of {what}, got {'; '.join(different[:_SHOWN])}{more}; {remedy}")


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value) if isinstance(value, Path) or not hasattr(value, "to_dict") else value.to_dict()
