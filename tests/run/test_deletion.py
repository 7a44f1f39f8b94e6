"""A run deletes what its own manifest names, and nothing else: leftovers, old checkpoints, earlier runs, cells."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_checkpoint import names, train
from tiny_run import arguments

import hf_ls.run.manifest
from hf_ls.common.files import TEMPORARY, TEMPORARY_FOLDER, tell, write_atomically
from hf_ls.compare.cells import LOG, SPEC, Cell, Spec, _start
from hf_ls.report.calibration_report import SETTINGS
from hf_ls.run.config import parse_config
from hf_ls.run.finetune import finetune
from hf_ls.run.manifest import CHECKPOINT, LOCK, MANIFEST, Manifest
from hf_ls.run.output import check_deletable

SHORT = ["--do_train", "--max_train_samples", "32", "--max_eval_samples", "20", "--max_steps", "2"]
SAVING = ["--save_strategy", "steps", "--save_steps", "1", "--label_smoothing_factor", "0.1"]
FOREIGN = ["notes.txt", "checkpoint-notes.txt", ".sync.data.csv.tmp", "_unfinished chapters/3.tex", "other/_unfinished/model.bin",
           "checkpoint-1/notes.txt", "plots/mine.png"]  # fmt: skip


def write(folder: Path, *paths: str) -> None:
    for name in paths:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("a month of work")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def begun(folder: Path) -> Manifest:
    """What a run has left which was killed while it wrote, trained and saved."""
    with Manifest(folder).recording() as manifest:
        for name in (SETTINGS, "plots/a.png"):
            write_atomically(folder / name, "whole")
        tell(folder / ".b.json.00000000.tmp", TEMPORARY)
        write(folder, ".b.json.00000000.tmp")
        tell(folder / "_unfinished-0", TEMPORARY_FOLDER)
        write(folder, "_unfinished-0/deep/model.bin")
        for step in (1, 2):
            manifest.add(folder / f"checkpoint-{step}", CHECKPOINT)
            write(folder, f"checkpoint-{step}/optimizer.pt", f"checkpoint-{step}/shards/0.pt")
        manifest.finish(folder / "checkpoint-1")
    return Manifest(folder)


# Leftovers


def test_a_start_deletes_its_own_leftovers_and_no_others(tmp_path):
    write(tmp_path, *FOREIGN[:5])
    before = snapshot(tmp_path)
    begun(tmp_path)
    with Manifest(tmp_path).recording():
        found = snapshot(tmp_path)
    assert found.items() >= before.items()
    assert ".b.json.00000000.tmp" not in found and "_unfinished-0" not in found and "checkpoint-2/optimizer.pt" in found


def test_a_run_beside_other_peoples_files_leaves_them(tiny, tmp_path):
    write(tmp_path, *FOREIGN[:5])
    before = snapshot(tmp_path)
    finetune(parse_config(arguments(tiny, tmp_path, *SHORT, *SAVING)))
    found = snapshot(tmp_path)
    assert found.items() >= before.items() and "model.safetensors" in found
    assert Manifest(tmp_path).foreign() == [
        ".sync.data.csv.tmp",
        "_unfinished chapters/",
        "checkpoint-notes.txt",
        "notes.txt",
        "other/",
    ]


def test_a_torn_or_hostile_line_names_nothing(tmp_path):
    begun(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.write_text("mine")
    with open(tmp_path / MANIFEST, "a") as file:
        file.write(
            f'\n{{"name": "../{outside.name}", "kind": "file"}}\n{{"name": "{outside}", "kind": "file"}}\n[1]\n{{"name": "hal'
        )
    manifest = Manifest(tmp_path)
    manifest.delete(first=SETTINGS)
    assert outside.read_text() == "mine" and list(snapshot(tmp_path)) == [LOCK, MANIFEST]


def test_two_runs_do_not_work_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_ls.run.manifest, "_PATIENCE", 0.1)
    late = Manifest(tmp_path)
    with Manifest(tmp_path).recording():
        with pytest.raises(ValueError, match="held by another process; wait for the run"), Manifest(tmp_path).recording():
            pass
        write_atomically(tmp_path / SETTINGS, "{}")
    with pytest.raises(ValueError, match="another run has begun"), late.recording():
        pass


# Earlier runs


@pytest.mark.parametrize("name", FOREIGN)
def test_an_earlier_run_is_not_deleted_with_a_foreign_file_in_it(name, tmp_path):
    begun(tmp_path)
    write(tmp_path, name)
    before = snapshot(tmp_path)
    shown = name.split("/")[0] + "/" if name.startswith(("_", "other")) else name
    with pytest.raises(
        ValueError, match=f"^expected a folder of one run alone to delete, got .* did not write: {shown}; move it away"
    ):
        Manifest(tmp_path).delete(first=SETTINGS)
    assert snapshot(tmp_path) == before


def test_what_became_a_link_is_not_followed(tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    begun(folder)
    write(outside, "a.png")
    (folder / "plots" / "a.png").unlink()
    (folder / "plots").rmdir()
    (folder / "plots").symlink_to(outside)
    with pytest.raises(ValueError, match="did not write: plots"):
        Manifest(folder).delete(first=SETTINGS)
    Manifest(folder).remove(["plots/a.png", "plots"])
    assert (outside / "a.png").exists() and (folder / "plots").is_symlink()


def test_places_which_are_never_deleted_in(tiny, tmp_path, monkeypatch):
    """Only the check is called: nothing here could delete."""
    home, work = tmp_path / "home", tmp_path / "projects" / "work"
    home.mkdir()
    work.mkdir(parents=True)
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    config = parse_config(arguments(tiny, "out", *SHORT))
    for place in ("/", str(home), "~", ".", "..", str(work), str(work.parent), str(tmp_path)):
        with pytest.raises(ValueError, match=r"expected a folder of a run alone to delete, got .* give another output_dir"):
            check_deletable(config, Path(place).expanduser())
    with pytest.raises(ValueError, match="got the link"):
        check_deletable(config, tmp_path / "link")
    check_deletable(config, work / "out")


def test_overwriting_deletes_one_run_or_nothing(tiny, tmp_path):
    folder = tmp_path / "out"
    argv = arguments(tiny, folder, *SHORT, *SAVING)
    finetune(parse_config(argv))
    write(folder, "checkpoint-notes.txt")
    before = snapshot(tmp_path)
    again = [*arguments(tiny, folder, *SHORT), "--overwrite_output_dir", "--save_strategy", "no"]
    with pytest.raises(ValueError, match=r"did not write: checkpoint-notes\.txt"):
        finetune(parse_config(again))
    with pytest.raises(ValueError, match=rf"^expected {MANIFEST}, .* got none beside out/; delete that folder by hand"):
        finetune(parse_config([*again, "--output_dir", str(tmp_path)]))  # the folder above: another run lies in it
    assert snapshot(tmp_path) == before
    (folder / "checkpoint-notes.txt").unlink()
    finetune(parse_config(again))
    assert not names(folder) and (folder / "model.safetensors").is_file() and not Manifest(folder).foreign()


def test_an_older_run_without_a_manifest_is_left_to_its_owner(tiny, tmp_path):
    write(tmp_path / "out", SETTINGS, "checkpoint-5/optimizer.pt")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"expected {MANIFEST}, .* delete that folder by hand, or give another output_dir"):
        finetune(parse_config([*arguments(tiny, tmp_path / "out", *SHORT), "--overwrite_output_dir"]))
    assert snapshot(tmp_path) == before


# Checkpoints


def test_only_checkpoints_of_this_run_make_room(tmp_path):
    write(tmp_path, "checkpoint-1/mine.txt", "checkpoint-notes/a.txt")
    train(tmp_path, max_steps=2)
    write(tmp_path, "checkpoint-2/mine.txt")
    train(tmp_path, limit=1, max_steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-notes"]
    assert os.listdir(tmp_path / "checkpoint-2") == ["mine.txt"]
    assert (tmp_path / "checkpoint-1" / "mine.txt").exists()


# Cells


def test_a_cell_starts_again_only_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ls.compare.cells.subprocess.Popen", lambda *args, **kwargs: None)
    spec = Spec(Cell("baseline", "smoothed_ce", None, 0.0, 0), [], {}, {}, {})
    cell = tmp_path / spec.cell.name
    with Manifest(tmp_path).recording() as manifest:
        _start(spec, manifest, 1, 0)
        begun(cell)
        _start(spec, manifest, 1, 0)
        assert sorted(snapshot(cell)) == sorted([LOCK, MANIFEST, LOG, SPEC])
        write(cell, "notes.txt")
        before = snapshot(cell)
        with pytest.raises(ValueError, match=r"did not write: notes\.txt"):
            _start(spec, manifest, 1, 0)
        assert snapshot(cell) == before
    other = Spec(Cell("smoothed", "smoothed_ce", None, 0.1, 0), [], {}, {}, {})
    write(tmp_path / other.cell.name, SPEC, LOG)  # somebody's folder of that name
    with Manifest(tmp_path).recording() as manifest, pytest.raises(ValueError, match=f"got none beside {LOG}, {SPEC}"):
        _start(other, manifest, 1, 0)
