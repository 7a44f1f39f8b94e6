"""What a run pushes: its own files which are for others, and nothing of the runs in the same folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_ls.common.files import write_atomically
from hf_ls.run import publish
from hf_ls.run.config import parse_config
from hf_ls.run.finetune import _planned
from hf_ls.run.manifest import Manifest
from hf_ls.run.publish import folder_of, push

PUBLIC = ["README.md", "calibration.json", "config.json", "model.safetensors", "plots/reliability.png"]
PRIVATE = ["outcome.json", "settings.json", "draws.npz", "training_args.bin", "checkpoint-3/model.safetensors"]


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        (["--label_smoothing_factor", "0.1", "--with_baseline", "true"], {"baseline"}),
        (["--label_smoothing_factor", "0.1"], set()),
        (
            ["--label_smoothing_factor", "0.1", "--with_baseline", "true", "--soft_label_columns", "rater_counts"],
            {"baseline", "smoothed"},
        ),
    ],
)
def test_the_other_runs_stay_here(settings: list[str], others: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, sent = tmp_path / "mine", []
    config = parse_config(["--dataset_name", "snippets", "--use_cpu", "true", "--output_dir", str(folder), *settings])
    planned = list(_planned(config))
    assert {folder_of(one).name for one in planned} == {"mine"} | others
    folder.mkdir()
    manifest = Manifest(folder)
    with manifest.recording():
        for one in planned:
            for name in [*PUBLIC, *PRIVATE]:
                (folder_of(one) / name).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(folder_of(one) / name, "{}")

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, name: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=f"me/{name}")

        def create_commit(self, repo: str, operations: list[Any], **_: Any) -> None:
            sent.extend((repo, operation.path_in_repo) for operation in operations)

    monkeypatch.setattr(publish, "HfApi", Api)
    push(config, manifest.files(), [folder_of(one) for one in planned])
    assert sent == [("me/mine", name) for name in sorted(PUBLIC)]
