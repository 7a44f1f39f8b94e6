"""The script cut by real signals at random moments, and on a disk which is really full, on one process and on two; then resumed.

By hand: `pytest -m slow tests/run/test_interrupted.py`, as root or below `unshare -rm` (a small disk is mounted).
FAULT_MOMENTS is how many moments of each kind.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers as tf
from forked_script import end, family, seconds, start
from small_tokenizer import WORDS, save_tokenizer
from test_deletion import write
from test_faults import RESUME, check_same_result, check_whole_files

from hf_ls.report.calibration_report import REPORT, SETTINGS
from hf_ls.run.checkpoint import last_complete_checkpoint
from hf_ls.run.manifest import Manifest
from hf_ls.run.outcome import OUTCOME

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MOMENTS = range(int(os.environ.get("FAULT_MOMENTS", "20")))
RUN = [
    *("--do_train", "--do_eval", "--do_predict", "--with_baseline", "--bake_temperature", "--label_smoothing_factor", "0.1"),
    *("--eval_strategy", "steps", "--load_best_model_at_end", "--metric_for_best_model", "nll", "--save_strategy", "steps"),
    *("--save_total_limit", "1", "--max_steps", "9", "--save_steps", "3", "--eval_steps", "3", "--logging_steps", "1"),
    *("--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true", "--learning_rate", "1e-2", "--seed", "3"),
    *("--per_device_eval_batch_size", "64", "--max_length", "16"),
]
# What is not the run's: in its folder, in folders which it makes, and beside it, by names like its own.
INSIDE = ["notes.txt", "checkpoint-notes.txt", ".sync.data.csv.tmp", "_unfinished chapters/3.tex", "other/_unfinished/model.bin",
          "plots/mine.svg", "baseline/mine.txt", "checkpoint-12a/optimizer.pt"]  # fmt: skip
BESIDE = ["out.bak/model.safetensors", "checkpoint-3/model.safetensors", "baseline/outcome.json", "_unfinished-0/a.bin", ".a.tmp"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model of 6,000 weights, a tokenizer of ninety words, and three classes which mostly show."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tokenizer(folder / "model")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16)
    config = tf.BertConfig(vocab_size=len(WORDS), num_labels=3, pad_token_id=0, **sizes)
    tf.BertForSequenceClassification(config).save_pretrained(folder / "model")
    argv = ["--model_name_or_path", str(folder / "model")]
    for i, (split, n) in enumerate((("train", 96), ("validation", 60), ("test", 70))):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            draw = random.Random(i)
            for _ in range(n):
                label, told = draw.randrange(3), draw.random() < 0.8
                words = [f"w{30 * label * told + draw.randrange(30 if told else 90)}" for _ in range(draw.randint(3, 9))]
                rows.writerow([" ".join(words), "abc"[label]])
        argv += [f"--{split}_file", str(folder / f"{split}.csv")]
    return argv


def command(inputs, folder, processes, *extra):
    return [*inputs, *RUN, "--per_device_train_batch_size", str(16 // processes), "--output_dir", str(folder), *extra]


@pytest.fixture(scope="module", params=[1, 2])
def whole(request, inputs, tmp_path_factory):
    """The undisturbed run with all of its checkpoints, the seconds of the CPU which it takes, and its size."""
    folder, spent, processes = tmp_path_factory.mktemp("whole") / "out", 0.0, request.param
    first = folder.with_name("first")  # it fills the cache of the data
    assert end(start(command(inputs, first, processes), first.with_suffix(".log"), processes), 300) == 0
    process = start(command(inputs, folder, processes, "--save_total_limit", "9"), folder.with_suffix(".log"), processes)
    while process.poll() is None:
        spent = max(spent, seconds(process))
        time.sleep(0.005)
    assert end(process, 60) == 0, folder.with_suffix(".log").read_text()
    check_whole_files(folder)
    return SimpleNamespace(folder=folder, processes=processes, seconds=spent, size=blocks(first))


def plant(folder: Path) -> None:
    write(folder, *INSIDE)
    write(folder.parent, *BESIDE)


def check_foreign(folder: Path) -> None:
    """What was planted is as it was, and nothing has come beside the folder."""
    for place, names in ((folder, INSIDE), (folder.parent, BESIDE)):
        for name in names:
            assert (place / name).read_text() == "a month of work", name
    known = {Path(name).parts[0] for name in BESIDE} | {folder.name, "log", "log.launcher", "again", "again.launcher"}
    assert set(os.listdir(folder.parent)) <= known
    found = {name.rstrip("/").split("/")[0] for name in Manifest(folder).foreign()}
    assert found <= {Path(name).parts[0] for name in INSIDE} | {"settings.json"}


def check_nothing_half(folder: Path, whole: Path) -> str:
    """Marks of completion, results and a card are there only for what is done, and whole; in words, how far the run is."""
    check_whole_files(folder)
    phase = "nothing written" if not (folder / SETTINGS).is_file() else "before the first checkpoint"
    for name in ("baseline", "."):
        run, done = folder / name, whole / name
        chosen = last_complete_checkpoint(run)
        if chosen is not None:
            phase = f"{name} {Path(chosen).name}"
            expected = done / Path(chosen).name
            if expected.exists():  # one which a signal asked for, between two planned ones, has no twin
                for path in [path for path in expected.iterdir() if path.suffix in (".safetensors", ".pt", ".pth")]:
                    assert (Path(chosen) / path.name).read_bytes() == path.read_bytes(), path
        results = [file for file in (OUTCOME, "train_results.json", "eval_results.json") if (run / file).is_file()]
        if results:
            assert json.loads((Path(chosen or "") / "trainer_state.json").read_text())["global_step"] == 9
            phase = f"{name} trained"
        if (run / OUTCOME).is_file():
            assert json.loads((run / OUTCOME).read_text())["rows"] == json.loads((done / OUTCOME).read_text())["rows"]
            phase = f"{name} complete"
    if (folder / REPORT).is_file():
        assert (folder / OUTCOME).is_file() and (folder / "baseline" / OUTCOME).is_file()
        assert bits(folder / REPORT) == bits(whole / REPORT)
        phase = "report written"
    if (folder / "README.md").is_file():
        assert (folder / REPORT).is_file() and (folder / "model.safetensors").read_bytes() == (
            whole / "model.safetensors"
        ).read_bytes()
        phase = "card written"
    return phase


def bits(report: Path) -> object:
    """All of calibration.json but times and the name of the folder."""

    def timeless(value):
        if isinstance(value, dict):
            timed = ("_runtime", "_runtime_s", "_per_second")
            return {name: timeless(found) for name, found in value.items() if not name.endswith(timed)}
        return [timeless(found) for found in value] if isinstance(value, list) else value

    found = timeless(json.loads(report.read_text()))
    # The last record of a resumed training has the mean of the loss over its own steps, and its own counts of work.
    found["history"] = {
        name: [record for record in records if "train_loss" not in record] for name, records in found["history"].items()
    }
    return found


def check_resumed(folder: Path, whole: SimpleNamespace, inputs: list[str]) -> None:
    """The same command goes on and ends with the bits of the undisturbed run."""
    log = folder.parent / "again"
    code = end(start(command(inputs, folder, whole.processes, *RESUME), log, whole.processes), 300)
    assert code == 0, log.read_text()
    for name in INSIDE:  # so that what is left can be compared with a run which had the folder to itself
        path = folder / name
        assert path.read_text() == "a month of work"
        path.unlink()
        for parent in path.relative_to(folder).parents:
            if parent != Path() and not os.listdir(folder / parent):
                (folder / parent).rmdir()
    check_same_result(folder, whole.folder)
    assert bits(folder / REPORT) == bits(whole.folder / REPORT)


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", SIGNALS, ids=[found.name for found in SIGNALS])
def test_cut_by_a_signal(inputs, whole, tmp_path, number, moment):
    """From its start to its end. SIGKILL to all of the run; the others to its first process alone or, as Ctrl-C does, to all."""
    draw = random.Random(f"{number} {moment} {whole.processes}")
    folder, log = tmp_path / "out", tmp_path / "log"
    at = (moment + draw.random()) / len(MOMENTS) * whole.seconds * 1.03
    plant(folder)
    process = start(command(inputs, folder, whole.processes), log, whole.processes)
    while seconds(process) < at and process.poll() is None:
        time.sleep(0.005)
    for member in family(process) if number == signal.SIGKILL or moment % 2 else [process]:
        try:
            member.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    code, output = end(process, 120), log.read_text() if log.exists() else ""
    check_foreign(folder)
    phase = check_nothing_half(folder, whole.folder)
    print(f"MOMENT {number.name} {whole.processes} process(es), {at:.2f} of {whole.seconds:.2f} s: {phase}, exit code {code}")
    assert code is not None, f"hangs: {output}"
    if number != signal.SIGKILL and code != 0:
        assert code in (128 + number, -number) if whole.processes == 1 else code in (1, -number), output
        assert "Traceback" not in output, output
        assert len(re.findall(rf"^stopped by {number.name} .*--resume_from_checkpoint last$", output, re.M)) <= 1, output
    check_resumed(folder, whole, inputs)
    check_foreign_beside(folder)


def check_foreign_beside(folder: Path) -> None:
    assert all((folder.parent / name).read_text() == "a month of work" for name in BESIDE)


# A full disk


@pytest.fixture
def disk(tmp_path):
    """Mounts a disk of so many bytes at tmp_path/disk, or gives the mounted one that size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int) -> Path:
        again = "remount," if os.path.ismount(place) else ""
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"{again}size={size}", "tmpfs", str(place)], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"no right to mount a disk: {made.stderr.strip()}; run below `unshare -rm`")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def blocks(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("moment", MOMENTS)
def test_on_a_full_disk(inputs, whole, tmp_path, disk, moment):
    """From a disk which takes the first file or two to one on which a part of the last ones finds no room."""
    draw = random.Random(f"disk {moment} {whole.processes}")
    folder, log = tmp_path / "disk" / "out", tmp_path / "log"
    size = max(4096, int((moment + draw.random()) / len(MOMENTS) * whole.size))
    disk(blocks_of_planted() + size)
    plant(folder)
    code = end(start(command(inputs, folder, whole.processes), log, whole.processes), 300)
    output = log.read_text()
    check_foreign(folder)
    phase = check_nothing_half(folder, whole.folder)
    print(
        f"MOMENT disk of {size / 1024:.0f} KiB of {whole.size / 1024:.0f}, {whole.processes} process(es): {phase}, exit code {code}"
    )
    assert code is not None, f"hangs: {output}"
    if code:
        assert code == 1 and "Traceback" not in output, output
        said = re.findall(
            r"^error: expected to write .*, got: (?:No space left on device|a file cut short, as on a full disk); "
            r"free some space or give another output_dir\. What was finished before is kept$",
            output, re.M,
        )  # fmt: skip
        assert 1 <= len(said) <= whole.processes, output  # each process writes its own part of a checkpoint
    disk(64 << 20)
    check_resumed(folder, whole, inputs)
    check_foreign_beside(folder)


def blocks_of_planted() -> int:
    return 4096 * (len(INSIDE) + len(BESIDE))
