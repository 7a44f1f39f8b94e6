"""Random settings and random files: whatever goes wrong is one sentence of ours, never the traceback of somebody else.

By hand: `pytest -m sweep tests/house/test_fuzz.py`. A failure names its number, which makes the same input again.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import os
import random
import string
import traceback

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset

from hf_ls.common.errors import _MEANT, one_sentence
from hf_ls.compare.experiment import CompareArguments, parse_compare
from hf_ls.data.classification import load_classification
from hf_ls.data.sequences import check_sequence_overlap, load_sequences
from hf_ls.data.splitting import check_overlap
from hf_ls.run.arguments import DataArguments, ModelArguments, RunArguments
from hf_ls.run.config import Parser, parse_config
from hf_ls.run.evaluate import EvaluateArguments, parse_evaluation
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


def settings(*classes: type) -> dict[str, list[str]]:
    """The settings and their choices, without what prints a text and ends."""
    parser = Parser(classes, allow_abbrev=False)
    known = {a.option_strings[0].lstrip("-"): [str(c) for c in a.choices or []] for a in parser._actions}
    return {name: choices for name, choices in known.items() if name not in ("h", "help_all", "version")}


def odd_name(draw: random.Random, name: str) -> str:
    """As somebody who types, or who comes from another program, writes it."""
    i = draw.randrange(len(name))
    return draw.choice(
        [
            "".join(draw.sample(name, len(name))), name[:i] + name[i + 1 :], name[:i] + name[i:][1::-1] + name[i + 2 :], name.upper(),
            name.replace("_", "-"), name + "s", name.split("_")[-1], f"training.{name}", "--" + name, draw.choice(sorted(_MEANT)),
        ]
    )  # fmt: skip


def damaged_yaml(draw: random.Random, text: str) -> bytes:
    line = draw.choice(
        ["seed: 1\nseed: 2", "\tseed: 1", "seed : [1", "seed: !!python/name:os.system", "a: &x [*x]", "<<: {seed: 1}", "? [a]\n: 1",
         "seed: 2020-01-01", "seed: 0x1F", "seed: 1_000", "seed: 1:30", "- seed", "---\nseed: 1\n---\nseed: 2", "seed: |\n  a\n  b", "1: 2",
         "null: 1", "seed: ~", "'': 1", "output_dir: 'a\\0b'", "seed: \"\\uD800\"", "seed: .inf", "seed: .nan", "config: c.yaml", "help: true"]
    )  # fmt: skip
    data = draw.choice([text + line, line + "\n" + text, line]).encode("utf-8", "surrogatepass")
    at = draw.randrange(len(data))
    odd = [
        data,
        data,
        data,
        b"\xef\xbb\xbf" + data,
        data.decode("utf-8", "replace").encode("utf-16"),
        data[:at],
        data[:at] + draw.randbytes(2) + data[at:],
    ]
    return draw.choice(odd)


def test_random_settings(tmp_path, monkeypatch):
    """Of scripts/finetune.py, and of the two which read further ones beside them."""
    monkeypatch.chdir(tmp_path)
    finetune = settings(RunArguments, ModelArguments, DataArguments, LabelSmoothingSeq2SeqArguments)
    run = ["--dataset_name", "snippets", "--use_cpu", "true", "--report_to", "none"]
    scripts = [(parse_config, finetune, run)] * 8
    scripts += [(parse_compare, finetune | settings(CompareArguments), run)]
    scripts += [(parse_evaluation, settings(EvaluateArguments), ["--test_file", "a.csv", "--model_name_or_path", "a"])]
    found = {}
    for number in range(CONFIGS):
        draw = random.Random(number)
        argv, file = [], {}
        parse, known, base = draw.choice(scripts)
        for name in draw.sample(sorted(known), draw.randint(1, 5)):
            value = draw.choice([*known[name], *known[name], *WORDS, str(draw.randint(-3, 300)), f"{draw.uniform(-1, 2):.3g}"])
            name = odd_name(draw, name) if draw.random() < 0.08 else name
            if draw.random() < 0.4:
                file[name] = draw.choice(
                    [
                        value,
                        [value],
                        {"a": value},
                        None,
                        draw.random(),
                        draw.randint(-2, 5),
                        draw.random() < 0.5,
                        [],
                        {},
                        [[value]],
                        {"a": {"b": [value]}},
                        [value, None, 1.5],
                        {1: value},
                        datetime.date(2020, 1, 1),
                        2**70,
                        -0.0,
                        value.encode(),
                    ]
                )
            else:
                argv += draw.choice([[f"--{name}", value], [f"--{name}={value}"], [f"--{name}"], [f"--{name}", value, value]])
        if file:
            text = yaml.safe_dump(file, allow_unicode=True)
            (tmp_path / "c.yaml").write_bytes(damaged_yaml(draw, text) if draw.random() < 0.1 else text.encode())
            argv += ["--config", "c.yaml"]
        base = [] if draw.random() < 0.1 else base
        if text := unexplained(lambda p=parse, a=[*base, *argv]: p(a)):
            found[number] = f"{parse.__name__} {argv} {file}\n{text}"
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
        [
            *[["pos", "neg"], ["a", "b", "c"]] * 8,
            [0, 1],
            ["1", "1.0"],
            [0.5, 1.5],
            draw.sample(WORDS, 3),
            [True, False],
            [[0.5, 0.5]],
            [None, "a"],
            [-1, 0, 1],
            [2**63 - 1, 2**63],
            [10**30, 0],
            [1e20, 2e20],
            [float("nan"), 1.0],
            [float("inf"), 0.0],
            [b"a", b"b"],
            [{"name": "pos"}, {"name": "neg"}],
            [["pos"], ["neg"]],
            ["pos", ["neg"]],
            [f"c{i}" for i in range(30)],
            ["x" * 9000, "y"],
            [datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)],
            [decimal.Decimal("1.0"), decimal.Decimal("2.5")],
            [0, "pos", 1.0],
            [""],
        ]
    )
    tags = draw.choice([["O", "PER"], [0, 1], [-100, 3], draw.sample(WORDS, 2), [None, "O"], [[1]]])
    rows = []
    for i in range(draw.choice([0, 1, 2, 3, 20, 20, 40, 40])):
        words = [f"w{i}", draw.choice(WORDS)]
        rows.append({"text": f"s {i}", "label": draw.choice(labels), "source": f"a {i}", "target": f"b {i}",
                     "tokens": words, "ner_tags": [draw.choice(tags) for _ in words]})  # fmt: skip
    odd = draw.choice([0.0, 0.0, 0.0, 0.0, 0.02, 0.3])
    for row in rows:
        for name in list(row):
            if draw.random() < odd:
                if draw.random() < 0.2:
                    del row[name]
                else:
                    row[draw.choice([name, name, draw.choice(COLUMNS)])] = value_of(draw)
    return rows


def csv_of(draw: random.Random, rows: list[dict], sep: str) -> bytes:
    names = list({name: 0 for row in rows for name in row}) or ["text", "label"]
    if draw.random() < 0.15:
        names = draw.choices([*COLUMNS, *names, "Unnamed: 0", "text.1", "text"], k=draw.choice([1, len(names), len(names) + 1]))
    quoted = draw.random() < 0.7
    cells = [[str(row.get(name, "")) for name in names] for row in rows]
    for line in cells if draw.random() < 0.1 else []:  # ragged
        line += ["more"] * draw.choice([0, 0, 1, 3])
        del line[draw.choice([len(line), len(line), 1, 0]) :]
    lines = [['"' + c.replace('"', '""') + '"' if quoted else c for c in line] for line in cells]
    head = draw.choice([[names]] * 8 + [[], [names, names]])
    text = draw.choice(["\n"] * 6 + ["\r\n", "\r", "\n\n"]).join(
        draw.choice([sep] * 8 + [";", "|"]).join(line) for line in [*head, *lines]
    )
    data = text.encode("utf-8", "surrogatepass")
    return draw.choice(
        [data] * 9
        + [
            text.encode("utf-16", "surrogatepass"),
            text.encode("latin-1", "replace"),
            data.replace(b"a", b"\0"),
            gzip.compress(data),
        ]
    )


def parquet_of(draw: random.Random, rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    try:
        table = Dataset.from_list(rows).data.table
        if draw.random() < 0.3 and table.num_rows:  # types which no JSON has
            i, n = draw.randrange(table.num_columns), table.num_rows
            column = draw.choice(
                [
                    pa.nulls(n), pa.array([b"\xff"] * n), pa.array([i % 2 for i in range(n)], pa.uint64()), pa.array([1] * n, pa.duration("s")),
                    pa.array([{"a": 1}] * n), pa.array([float(i % 2) for i in range(n)], pa.float16()), pa.array(["a", None] * n)[:n],
                    table.column(i).combine_chunks().dictionary_encode(), pa.array([datetime.time(1)] * n), pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int8())),
                    pa.array([f"s{i}" for i in range(n)], pa.large_string()), pa.array([[0, 1]] * n, pa.list_(pa.int8(), 2)),
                ]
            )  # fmt: skip
            table = table.set_column(i, table.column_names[i], column)
        if draw.random() < 0.1 and table.num_columns:  # a name twice
            table = table.append_column(table.column_names[0], table.column(0))
        pq.write_table(table.replace_schema_metadata(None) if draw.random() < 0.5 else table, buffer)
    except Exception:  # these rows are of no one type
        return b"PAR1"
    return buffer.getvalue()


def json_of(draw: random.Random, rows: list[dict], lines: bool) -> bytes:
    if lines:
        written = [json.dumps(row, default=str) for row in rows]
        if draw.random() < 0.1 and written:
            written[draw.randrange(len(written))] = draw.choice(
                [
                    "",
                    "[]",
                    "1",
                    "{}",
                    '{"text": "a", "text": "b", "label": 1}',
                    "{'text': 1}",
                    '{"text": NaN}',
                    "// a",
                    '{"text": "\\ud800"}',
                    "[" * 200,
                ]
            )
        return "\n".join(written).encode()
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    content = draw.choice(
        [
            rows,
            rows,
            {"data": rows},
            {"train": rows, "version": 1},
            columns,
            value_of(draw),
            {str(i): row for i, row in enumerate(rows)},
        ]
    )
    return json.dumps(content, default=str).encode(draw.choice(["utf-8"] * 9 + ["utf-16"]))


def file_of(draw: random.Random, path) -> None:
    rows = rows_of(draw)
    if draw.random() < 0.05:
        rows = rows * 3  # each three times
    if path.suffix in (".csv", ".tsv"):
        data = csv_of(draw, rows, "," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".parquet":
        data = parquet_of(draw, rows)
    else:
        data = json_of(draw, rows, lines=path.suffix == ".jsonl" or draw.random() < 0.3)
    if draw.random() < 0.1 and data:  # damaged
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
