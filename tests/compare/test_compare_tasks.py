"""The comparison of every task of tokens, end to end on tiny models: cells which a shell runs, and what is made of them."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers as tf
from datasets import DatasetDict, load_dataset
from forked import Forked, all_ended, ranks, run_file
from places import ROOT
from tiny_run import save_tiny_model

from hf_ls.compare.cells import CELL, cell_lock
from hf_ls.compare.comparison import Comparison, Variant
from hf_ls.compare.experiment import parse_compare, run_comparison
from hf_ls.compare.results import VALIDATION
from hf_ls.compare.worker import run_cell
from hf_ls.data.g2p import load_g2p
from hf_ls.run.outcome import Outcome

BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "init_std": 0.06}  # fmt: skip
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "tie_word_embeddings": True, "initializer_range": 0.06}  # fmt: skip
TASKS = {
    "seq2seq": ["--model_type", "bart", "--model_config_overrides", json.dumps(BART), "--predict_with_generate",
                "--generation_max_length", "12", "--text_metrics", "phoneme_error_rate", "exact_match"],
    "causal-lm": ["--model_type", "llama", "--model_config_overrides", json.dumps(LLAMA), "--source_suffix", "<s>"],
    "sft": ["--model_type", "llama", "--model_config_overrides", json.dumps(LLAMA)],
    "token-classification": [],
}  # fmt: skip
QUALITY = {"seq2seq": "phoneme_error_rate", "causal-lm": "accuracy", "sft": "accuracy", "token-classification": "entity_f1"}
SEEDS = {"seq2seq": ["0", "1"]}
BASE, TEMPERED = Variant("baseline", 0.0, False), Variant("baseline", 0.0, True)
NAMES = ["O", "B-PLACE", "I-PLACE"]


def sentences(path, n, start=0):
    """Words with tags, some of which the words do not tell."""
    words = {"O": ["lies", "in", "the", "cold"], "B-PLACE": ["berlin", "paris"], "I-PLACE": ["city", "area"]}
    rng = np.random.default_rng(start)
    rows = []
    for i in range(n):
        tags = ["O", "B-PLACE", "I-PLACE", "O"] if rng.random() < 0.6 else ["B-PLACE", "O", "O"]
        tokens = [str(rng.choice(words[tag if rng.random() < 0.9 else "O"])) for tag in tags]
        rows.append({"tokens": [*tokens, f"x{start + i}"], "ner_tags": [*tags, "O"]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def arguments(task, folder, *extra):
    root = folder.parent
    other = root / "other.csv"
    other.write_text("source,target\nxyzzy,Z IH1 Z IY0\nplugh,P L AH1 G\nfoobarish,F UW1 B AA2 R IH0 SH\n")
    data = ["--dataset_name", "cmudict"]
    if task == "token-classification":
        other = root / "other.jsonl"
        sentences(other, 3, 900)
        kind = tf.BertForTokenClassification
        data = ["--model_name_or_path", save_tiny_model(root / "model", kind, id2label=dict(enumerate(NAMES)))]
        files = zip(("train", "validation", "test"), (64, 30, 40), (0, 100, 200), strict=True)
        data += [word for s, n, at in files for word in (f"--{s}_file", sentences(root / f"{s}.jsonl", n, at))]
    return [
        *("--task", task, *data, *TASKS[task], "--output_dir", str(folder), "--max_length", "32", "--max_train_samples", "64"),
        *("--max_eval_samples", "30", "--max_predict_samples", "40", "--per_device_train_batch_size", "16", "--max_steps", "6"),
        *("--per_device_eval_batch_size", "32", "--learning_rate", "1e-2", "--report_to", "none", "--use_cpu", "true"),
        *("--disable_tqdm", "true", "--epsilons", "0.2", "--seeds", *SEEDS.get(task, ["0"]), "--jobs", "1"),
        *("--ood_file", f"other={other}", *extra),
    ]  # fmt: skip


def compared(argv):
    return run_comparison(*parse_compare(argv))


@pytest.fixture(scope="module")
def cheap():
    """A small part of the dictionary, and no plot of a run: neither is what is tested here."""
    whole = load_g2p()
    small = replace(whole, splits=DatasetDict({split: part.select(range(80)) for split, part in whole.splits.items()}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_ls.run.loading.load_g2p", lambda: small)
        patch.setattr("hf_ls.report.build.write_plots", lambda *args, **options: [])
        patch.setattr("hf_ls.compare.experiment.write_plots", lambda *args, **options: [])
        yield


def printed_cells(argv):
    """The lines which `--print_cells` prints, without that which it says beside them."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_ls.compare.experiment._announce", said.append)
        assert compared([*argv, "--print_cells"]) is None
    return said[1:]


@pytest.fixture(scope="module", params=list(TASKS))
def done(request, cheap, tmp_path_factory):
    """A comparison whose cells were run one by one, from the lines of `--print_cells`."""
    task, folder = request.param, tmp_path_factory.mktemp("compare") / "out"
    argv = arguments(task, folder)
    lines = printed_cells(argv)
    assert [Path(shlex.split(line)[-1]).name for line in lines] == [
        f"{name}-seed{seed}" for seed in SEEDS.get(task, ["0"]) for name in ("baseline", "smoothed-0.2")
    ]
    for line in lines:
        run_cell(Path(shlex.split(line)[-1]))
    times = {path: path.stat().st_mtime_ns for path in folder.glob(f"cells/*/{CELL}")}
    comparison = compared(argv)
    assert {path: path.stat().st_mtime_ns for path in folder.glob(f"cells/*/{CELL}")} == times and len(times) == len(lines)
    return task, folder, argv, comparison


def test_the_comparison_holds_the_quality_beside_nll_and_ece_on_every_set(done):
    task, folder, _, comparison = done
    assert comparison == Comparison.from_json((folder / "report.json").read_text())
    assert comparison.quality == QUALITY[task] and comparison.clusters["test"] == 40 and comparison.clusters["other"] == 3
    assert comparison.sets["test"] > 40 and list(comparison.sets) == ["test", "other"]
    judged = {metric for _, _, metric in comparison.verdict.compared}
    assert judged == {"nll", "ece", QUALITY[task]}
    for row, against, metric in comparison.verdict.compared:
        contrast = next(c for c in comparison.contrasts if (c.row, c.against, c.metric, c.set) == (row, against, metric, "test"))
        assert contrast.low <= contrast.high and contrast.p is not None
    page = (folder / "report.html").read_text()
    assert f"tokens in {comparison.clusters['test']} sequences" in page and f">{QUALITY[task]}<" in page
    figures = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(figures) == 6 + 2 + 4 and "nan" not in " ".join(figures).lower()
    assert ("classes B-PLACE, I-PLACE, O" in page) == (task == "token-classification")


def test_the_numbers_are_those_of_the_cells(done):
    task, folder, _, comparison = done
    for variant in comparison.variants:
        for i, seed in enumerate(comparison.seeds):
            name = f"{variant.name}{f'-{variant.epsilon:g}' if variant.epsilon else ''}-seed{seed}"
            cell = folder / "cells" / name
            metrics = json.loads((cell / "all_results.json").read_text())
            row = Outcome.load(cell).rows[int(variant.tempered)]
            assert comparison.temperatures[variant.label][i] == row.temperature
            assert comparison.measurement(variant, QUALITY[task]).per_seed[i] == row.value(QUALITY[task])
            with np.load(cell / VALIDATION) as saved:
                count, nll, crossed = (saved[key] for key in ("count", "nll", "crossed"))
            assert nll.sum() / count.sum() == pytest.approx(metrics["eval_nll"], rel=1e-9)
            assert comparison.validation_nll[variant.label][i] == pytest.approx(
                (crossed if variant.tempered else nll).sum() / count.sum()
            )
            if not variant.tempered:
                for metric in ("nll", "ece", "accuracy", "brier"):
                    found = comparison.measurement(variant, metric).per_seed[i]
                    assert found == pytest.approx(metrics[f"test_{metric}"], abs=1e-9), metric
    first = folder / "cells" / "baseline-seed0"
    prints = [
        json.loads((folder / "cells" / name / "fingerprint.json").read_text())
        for name in ("baseline-seed0", "smoothed-0.2-seed0")
    ]
    assert prints[0] == prints[1] and prints[0]["batches"] == 6  # the model was heard, with a head without logits too
    assert sum(Outcome.load(first).label_counts) == comparison.sets["test"] == sum(comparison.class_counts)


def test_the_files_of_the_cells_hold_what_a_run_without_a_comparison_reads(done):
    task, folder, _, _ = done
    told = json.loads((folder / "cells" / "baseline-seed0" / "spec.json").read_text())
    assert told["argv"][-1] == f"--task={task}"  # another machine may not have the file by which a task is guessed
    columns = {"sft": ["messages"], "token-classification": ["tokens", "tags"]}.get(task, ["source", "target"])
    for split, n in (("train", 64), ("validation", 30), ("test", 40), ("ood-other", 3)):
        rows = load_dataset("parquet", data_files=str(folder / "data" / f"{split}.parquet"), split="train")
        assert rows.column_names == columns and len(rows) == n
    if task == "token-classification":
        assert rows.features["tags"].feature.names == ["B-PLACE", "I-PLACE", "O"]


@pytest.fixture
def unfinished(done):
    """The folder and the line of a cell which must run again, in a comparison whose other one is finished."""
    task, folder, argv, _ = done
    if task != "causal-lm":
        pytest.skip("a cell is started alike for every task")
    (folder / "cells" / "smoothed-0.2-seed0" / CELL).unlink(missing_ok=True)
    (line,) = printed_cells(argv)
    return folder / "cells" / "smoothed-0.2-seed0", argv, line


def test_a_line_is_a_command_of_a_shell_for_what_is_neither_finished_nor_at_work(unfinished):
    cell, argv, line = unfinished
    *place, threads, _, python, option, module, named = shlex.split(line)
    assert place == ["cd", os.getcwd(), "&&"]
    assert (python, option, module, named) == (sys.executable, "-m", "hf_ls.compare.worker", str(cell))
    assert re.fullmatch(r"OMP_NUM_THREADS=\d+", threads)
    assert {path.name for path in cell.iterdir() if path.name[0] != "."} == {"hf_ls_manifest.jsonl", "spec.json"}
    with cell_lock(cell):
        assert printed_cells(argv) == []
    with pytest.raises(ValueError, match="expected the settings of the comparison"):
        compared([*argv, "--weight_decay", "0.1", "--print_cells"])
    run_cell(cell)
    (cell / CELL).unlink()
    run_cell(cell)  # what a process which died has left is no hindrance
    assert printed_cells(argv) == []
    before = (cell / CELL).stat().st_mtime_ns
    run_cell(cell)
    assert (cell / CELL).stat().st_mtime_ns == before


@pytest.mark.slow
def test_two_processes_of_torchrun_are_one_cell(unfinished):
    cell, argv, _ = unfinished
    file, environment = ROOT / "hf_ls" / "compare" / "worker.py", os.environ | {"OMP_NUM_THREADS": "1"}
    code, said = all_ended(ranks(2, file, [str(cell)], environment), 250)
    assert code == 0, said
    assert json.loads((cell / CELL).read_text())["processes"] == 2
    code, said = all_ended([Forked(run_file, str(file), [str(cell)], environment=environment)], 250)
    assert (code, said) == (0, "smoothed-0.2-seed0 is finished already\n")
    with pytest.raises(ValueError, match=r"expected the same .* in baseline-seed0 and smoothed-0\.2-seed0, got"):
        compared(argv)
