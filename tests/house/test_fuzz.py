"""Random settings and random files: whatever goes wrong is one sentence of ours, never the traceback of somebody else.

By hand: `pytest -m sweep tests/house/test_fuzz.py`. A failure names its number, which makes the same input again.
"""

from __future__ import annotations

import json
import os
import random
import string
import traceback

import datasets
import pytest
import yaml
from datasets import Dataset

from hf_ls.common.errors import one_sentence
from hf_ls.data.classification import load_classification
from hf_ls.data.sequences import check_sequence_overlap, load_sequences
from hf_ls.data.splitting import check_overlap
from hf_ls.run.config import DataArguments, ModelArguments, Parser, RunArguments, parse_config
from hf_ls.trainer.arguments import LabelSmoothingSeq2SeqArguments

pytestmark = pytest.mark.sweep

CONFIGS, FILES = int(os.environ.get("FUZZ_CONFIGS", "1500")), int(os.environ.get("FUZZ_FILES", "800"))
WORDS = [
    "", " ", "a", "None", "NA", "null", "nan", "NaN", "inf", "-inf", "0", "1", "-1", "1.0", "01", "1e3", "1e400", "0.5", "9" * 25,
    "True", "true", "no", "pos", "pos ", "Neg", "neg", "é", "é", "ß", "日本", "\u202e", "\ufeff", "a\tb", "a,b", 'a"b', "a\nb", "a\r\nb",
    "=cmd", "{}", "[]", '{"a": 1}', "[1, 2]", "x" * 3000, "--", "-", "~", "*", "!a", "&b", "@", "%s", "{0}", "../x", "nofile.json",
]  # fmt: skip
COLUMNS = ["text", "label", "source", "target", "tokens", "ner_tags", "", " text", "Text", "text.a", "é", "1"]


def unexplained(call) -> str | None:
    """The traceback of an error for which there is no sentence."""
    try:
        call()
    except SystemExit:
        return "SystemExit"
    except Exception as error:
        if one_sentence(error) is None:
            return "".join(traceback.format_exception(error)[-6:])
    return None


def settings() -> dict[str, list[str]]:
    parser = Parser([RunArguments, ModelArguments, DataArguments, LabelSmoothingSeq2SeqArguments], allow_abbrev=False)
    return {a.option_strings[0].lstrip("-"): [str(c) for c in a.choices or []] for a in parser._actions if a.dest != "help"}


def test_random_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known, found = settings(), {}
    for number in range(CONFIGS):
        draw = random.Random(number)
        argv, file = [], {}
        for name in draw.sample(sorted(known), draw.randint(1, 5)):
            value = draw.choice([*known[name], *known[name], *WORDS, str(draw.randint(-3, 300)), f"{draw.uniform(-1, 2):.3g}"])
            name = "".join(draw.sample(name, len(name))) if draw.random() < 0.05 else name
            if draw.random() < 0.4:
                file[name] = draw.choice(
                    [value, [value], {"a": value}, None, draw.random(), draw.randint(-2, 5), draw.random() < 0.5]
                )
            else:
                argv += draw.choice([[f"--{name}", value], [f"--{name}={value}"], [f"--{name}"], [f"--{name}", value, value]])
        if file:
            (tmp_path / "c.yaml").write_text(yaml.safe_dump(file, allow_unicode=True), encoding="utf-8")
            argv += ["--config", "c.yaml"]
        base = [] if draw.random() < 0.1 else ["--dataset_name", "snippets", "--use_cpu", "true", "--report_to", "none"]
        if text := unexplained(lambda argv=[*base, *argv]: parse_config(argv)):
            found[number] = f"{argv} {file}\n{text}"
    assert not found, f"{len(found)} of {CONFIGS}\n" + "\n".join(f"{number}: {text}" for number, text in list(found.items())[:8])


def value_of(draw: random.Random, depth: int = 0):
    kind = draw.randrange(9 if depth < 2 else 6)
    if kind < 3:
        return draw.choice(WORDS)
    if kind == 3:
        return draw.choice([None, True, False, 0, 1, 2, -1, 2**70, 1.0, 0.5])
    if kind < 6:
        return "".join(draw.choices(string.printable, k=draw.randrange(12)))
    if kind == 6:
        return {draw.choice(["a", "role", "content", "en"]): value_of(draw, depth + 1) for _ in range(draw.randrange(3))}
    return [value_of(draw, depth + 1) for _ in range(draw.randrange(4))]


def rows_of(draw: random.Random) -> list[dict]:
    """Mostly rows which make sense, with something odd in some of them."""
    labels = draw.choice(
        [["pos", "neg"], [0, 1], ["1", "1.0"], [0.5, 1.5], draw.sample(WORDS, 3), [True, False], [[0.5, 0.5]], [None, "a"]]
    )
    tags = draw.choice([["O", "PER"], [0, 1], [-100, 3], draw.sample(WORDS, 2), [None, "O"], [[1]]])
    rows = []
    for i in range(draw.choice([0, 1, 2, 3, 20, 40])):
        words = [f"w{i}", draw.choice(WORDS)]
        rows.append({"text": f"s {i}", "label": draw.choice(labels), "source": f"a {i}", "target": f"b {i}",
                     "tokens": words, "ner_tags": [draw.choice(tags) for _ in words]})  # fmt: skip
    odd = draw.choice([0.0, 0.0, 0.02, 0.3])
    for row in rows:
        for name in list(row):
            if draw.random() < odd:
                if draw.random() < 0.2:
                    del row[name]
                else:
                    row[draw.choice([name, name, draw.choice(COLUMNS)])] = value_of(draw)
    return rows


def file_of(draw: random.Random, path) -> None:
    rows = rows_of(draw)
    if path.suffix in (".csv", ".tsv"):
        sep = "," if path.suffix == ".csv" else "\t"
        names = list({name: 0 for row in rows for name in row}) or ["text", "label"]
        if draw.random() < 0.1:
            names = draw.choices(COLUMNS, k=len(names))
        quoted = draw.random() < 0.7
        cells = [[str(row.get(name, "")) for name in names] for row in rows]
        lines = [[f'"{c}"'.replace('"', '""')[1:-1] if quoted else c for c in line] for line in cells]
        data = "\n".join(sep.join(line) for line in [names, *lines]).encode("utf-8", "surrogatepass")
    elif path.suffix == ".parquet":
        try:
            Dataset.from_list(rows).to_parquet(path)
            data = path.read_bytes()
        except Exception:  # these rows are of no one type
            data = b"PAR1"
    elif path.suffix == ".jsonl" or draw.random() < 0.3:
        data = "\n".join(json.dumps(row) for row in rows).encode()
    else:
        data = json.dumps(draw.choice([rows, {"data": rows}, value_of(draw)])).encode()
    if draw.random() < 0.2 and data:  # damaged
        at = draw.randrange(len(data))
        data = draw.choice(
            [data[:at], data[:at] + draw.randbytes(3) + data[at:], data[at:], data + b"\n\n", b"\xef\xbb\xbf" + data]
        )
    path.write_bytes(data)


def load(draw: random.Random, files: dict[str, str]) -> None:
    task = draw.choice(["text-classification", "text-classification", "seq2seq", "causal-lm", "token-classification"])

    def name(usual):
        return usual if draw.random() < 0.9 else draw.choice([*COLUMNS, "text.a"])

    if task == "text-classification":
        pair = draw.choice([None, None, name("source")])
        data = load_classification(None, files=files, text_column=name("text"), label_column=name("label"), text_pair_column=pair)
        check_overlap(data.splits)
        assert all(0 <= label < len(data.label_names) for part in data.splits.values() for label in part["label"])
        return
    pair = task == "seq2seq" or draw.random() < 0.5
    columns = {"source_column": name("source"), "target_column": name("target")} if pair else {}
    data = load_sequences(
        task, None, files=files, text_column=name("text"), tokens_column=name("tokens"), tags_column=name("ner_tags"), **columns
    )
    check_sequence_overlap(data.splits)


def test_random_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    found, loaded = {}, 0
    for number in range(FILES):
        draw = random.Random(number)
        folder = tmp_path / str(number)
        folder.mkdir()
        suffix = draw.choice([".csv", ".csv", ".tsv", ".json", ".jsonl", ".jsonl", ".parquet"])
        files = {split: folder / f"{split}{suffix}" for split in draw.choice([["train"], ["train"], ["train", "test"]])}
        for path in files.values():
            file_of(draw, path)
        finished = []
        text = unexplained(lambda d=draw, f=files, e=finished: e.append(load(d, {split: str(path) for split, path in f.items()})))
        loaded += len(finished)
        if text:
            found[number] = f"{[str(path) for path in files.values()]}\n{text}"
    datasets.enable_progress_bars()
    assert not found, f"{len(found)} of {FILES}\n" + "\n".join(f"{number}: {text}" for number, text in list(found.items())[:8])
    assert loaded > FILES / 10  # the rows make sense often enough to reach the end
