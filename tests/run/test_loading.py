"""What a run is made of, from its settings: caps are fair samples, and classes without a row are named."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from hf_ls.data.classification import load_snippets
from hf_ls.data.g2p import load_g2p
from hf_ls.run.config import parse_config
from hf_ls.run.loading import capped, load_data

CAPS = {"train": 60, "validation": 12, "test": 12}
CAPPED = ["--max_train_samples", "60", "--max_eval_samples", "12", "--max_predict_samples", "12"]
COLUMNS = {
    "text-classification": lambda i, k: {"text": f"text {i}", "label": f"class {k}"},
    "token-classification": lambda i, k: {"tokens": [f"word{i}", "end"], "ner_tags": [f"tag {k}", "O"]},
    "seq2seq": lambda i, k: {"source": f"source {i}", "target": f"target {k}"},
    "causal-lm": lambda i, k: {"text": f"document {i} of author {k}"},
}


def sorted_files(folder: Path, task: str, classes: int = 6, rows: int = 50) -> list[str]:
    """A file for each split whose rows are sorted by class."""
    arguments = ["--task", task, "--output_dir", str(folder / "out"), "--do_train", "--use_cpu", "true", "--report_to", "none"]
    for start, split in enumerate(CAPS):
        made = [COLUMNS[task](1000 * start + rows * k + i, k) for k in range(classes) for i in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, made)))
        arguments += [f"--{split}_file", str(folder / f"{split}.jsonl")]
    return arguments


def load(config):
    return capped(config, load_data(config))


def rows(data) -> dict[str, list]:
    return {split: part.to_list() for split, part in data.splits.items()}


@pytest.mark.parametrize("task", COLUMNS)
def test_a_cap_is_a_sample_of_the_whole_file_by_the_seed(tmp_path, task, caplog):
    argv = sorted_files(tmp_path, task)
    whole, capped = rows(load(parse_config(argv))), rows(load(parse_config([*argv, *CAPPED])))
    again = rows(load(parse_config([*argv, *CAPPED, "--seed", "7", "--data_seed", "42"])))
    other = rows(load(parse_config([*argv, *CAPPED, "--data_seed", "0"])))
    said = [record.getMessage() for record in caplog.records if "random sample" in record.getMessage()][:3]
    assert sorted(said) == [
        "test: 12 of 300 rows are used, a random sample, because of max_predict_samples",
        "train: 60 of 300 rows are used, a random sample, because of max_train_samples",
        "validation: 12 of 300 rows are used, a random sample, because of max_eval_samples",
    ]
    assert capped == again, "data_seed wins over seed, and 42 is the default of seed"
    for split, size in CAPS.items():
        places = [whole[split].index(row) for row in capped[split]]
        assert len(set(places)) == size and places == sorted(places)
        assert min(places) < 75 and max(places) >= 225, "rows of the first and of the last quarter"
        assert capped[split] != other[split], "data_seed 0 is a seed"


@pytest.mark.parametrize(
    ("name", "task", "embedded"), [("snippets", "text-classification", load_snippets), ("cmudict", "seq2seq", load_g2p)]
)
def test_the_embedded_data_is_capped_to_its_first_rows(tmp_path, name, task, embedded):
    scratch = ["--model_type", "bart"] if name == "cmudict" else []
    argv = ["--task", task, "--dataset_name", name, "--output_dir", str(tmp_path), *scratch, *CAPPED, "--seed", "5"]
    whole = embedded().splits
    for split, part in load(parse_config(argv)).splits.items():
        assert part.to_list() == whole[split].select(range(CAPS[split])).to_list()


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_without_a_row_are_named(tmp_path, caplog, task, split):
    argv = sorted_files(tmp_path, task, classes=8, rows=4)
    cap = {"train": "--max_train_samples", "test": "--max_predict_samples"}[split]
    with caplog.at_level(logging.WARNING, logger="hf_ls"):
        load(parse_config(argv))
        assert "without a row" not in caplog.text
        load(parse_config([*argv, cap, "1"]))
    (said,) = [record.getMessage() for record in caplog.records if "without a row" in record.getMessage()]
    assert said.startswith(f"{split} is without a row of 7 of the {8 + (task != 'text-classification')} classes")
    assert "and 2 more" in said
