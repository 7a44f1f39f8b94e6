"""The bad-input matrix: wrong input of every kind, the sentence the user sees, and that nothing was written or lost."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import bad_input_core
import bad_input_files
import bad_input_outside
import pytest
import torch
from bad_input import CSV, Place, Row, finetune
from helpers import tiny_bert
from safetensors import SafetensorError
from small_tokenizer import save_tokenizer

from hf_ls import Smoothing
from hf_ls.common.errors import one_sentence
from hf_ls.run.manifest import LOCK, MANIFEST

ROWS: list[Row] = [*bad_input_core.ROWS, *bad_input_files.ROWS, *bad_input_outside.ROWS]
NAMES = {0: "bad", 1: "good"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved models by kind."""
    labels = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    made = {
        "good": tiny_bert(2, **labels),
        "five": tiny_bert(5),
        "headless": tiny_bert(2).bert,
        "wide": tiny_bert(2, hidden_size=48, **labels),
    }
    folders = {}
    for name, model in made.items():
        folder = tmp_path_factory.mktemp(name)
        save_tokenizer(folder)
        model.save_pretrained(folder)
        folders[name] = str(folder)
    for name, model in (("run", "good"), ("other run", "wide")):
        folders[name] = str(_earlier_run(folders[model], tmp_path_factory.mktemp("earlier")))
    return folders


def _earlier_run(model: str, folder: Path) -> Path:
    """What `finetune` of bad_input leaves after its first step, but for outcome and report."""
    (folder / "train.csv").write_text(CSV)
    with pytest.MonkeyPatch.context() as patch:
        argv = ["--model_name_or_path", model, "--label_smoothing_factor", "0.1", "--max_steps", "2", "--save_steps", "1"]
        finetune(*argv)(Place(folder, {"good": model}, patch))
    out = folder / "out"
    for path in (out / "checkpoint-2", *out.iterdir()):
        if path.name not in ("checkpoint-1", "settings.json", MANIFEST, LOCK):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    # The rows resume without --save_steps, which is none of the harmless settings.
    (out / "settings.json").write_text((out / "settings.json").read_text().replace('"save_steps": 1.0', '"save_steps": 500'))
    return out


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_bad_input(row: Row, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, models, monkeypatch)
    try:
        check(row, place)
    finally:
        for undo in place.undo:
            undo()


def check(row: Row, place: Place) -> None:
    """The error, its sentence, and the folder as it was."""
    row.given(place)
    before = place.snapshot()
    if row.error is None:
        loss = row.call(place)
        loss.backward()
        assert isinstance(loss, torch.Tensor) and loss.requires_grad and float(loss.detach()) == 0
    else:
        with pytest.raises((row.error, SystemExit)) as caught:
            row.call(place)
        error: BaseException | None = caught.value
        text = str(error)
        if isinstance(error, SystemExit):  # the script has turned it into one sentence
            text, error = text.removeprefix("error: "), error.__context__
        assert type(error) is row.error, repr(error)
        assert re.search(row.sentence, text, re.DOTALL), text
        assert re.match(r"(\[Errno \d+\] )?expected .+, got.+; .+", text, re.DOTALL), text
    after = {path: content for path, content in place.snapshot().items() if path in before or not path.endswith(LOCK)}
    for path in [path for path in after if path.endswith(MANIFEST)]:  # names which a run lists before it writes
        after.pop(path), before.pop(path, None)
    if row.may_add is not None:
        after = {path: content for path, content in after.items() if path in before or not re.match(row.may_add, path)}
    assert after == before


def test_the_matrix_is_as_large_as_promised() -> None:
    assert len(ROWS) >= 80 and max(Counter(row.id for row in ROWS).values()) == 1


def _started(place: Place, *argv: str) -> None:
    place.write(train_csv=CSV)
    finetune(*argv)(place)


@pytest.mark.parametrize("error", [RuntimeError("broken"), ValueError("of another library"), KeyError("expected a")])
def test_what_is_not_the_users_keeps_its_traceback(
    error: Exception, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("transformers.Trainer.train", fail)
    with pytest.raises(type(error)) as caught:
        _started(Place(tmp_path, models, monkeypatch))
    assert caught.value is error


def test_debug_keeps_every_traceback(models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected columns"):
        _started(Place(tmp_path, models, monkeypatch), "--text_column", "words", "--log_level", "debug")


def test_the_sentence_of_another_library_is_not_ours() -> None:
    """torch has errors which begin with "expected" too."""
    with pytest.raises(TypeError, match=r"^expected Tensor") as caught:
        torch.stack(["a"])  # type: ignore[list-item]
    assert one_sentence(caught.value) is None
    with pytest.raises(ValueError, match=r"^expected 0 <= epsilon") as ours:
        Smoothing(2)
    assert one_sentence(ours.value) == str(ours.value)


def test_a_run_which_was_refused_can_start_without_more_ado(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal which had left settings.json behind would itself be taken for an earlier run."""
    place = Place(tmp_path, models, monkeypatch)
    with pytest.raises(SystemExit, match="weights of other sizes"):
        _started(place, "--model_name_or_path", models["five"])
    _started(place)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_full_disk_is_told_whoever_notices_it() -> None:
    found = one_sentence(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert found is not None and found.startswith(
        "expected to write in output_dir, got: No space left on device; free some space"
    )
    assert one_sentence(SafetensorError("header too large")) is None
    for said in (
        "[enforce fail] . unexpected pos 64 vs 0",
        "PytorchStreamWriter failed writing file",
        "basic_ios::clear: iostream error",
    ):
        assert "got: a file cut short, as on a full disk; free some" in (one_sentence(RuntimeError(said)) or "")  # torch.save
