"""`scripts/evaluate.py --predictions`: files of probabilities and logits become the report which the arrays themselves give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from reports import toy_logits
from scipy.special import softmax

import hf_ls
from hf_ls.data.predictions import read_predictions
from hf_ls.run.evaluate import EvaluateArguments, evaluate, parse_evaluation

LOGITS, LABELS = toy_logits(120)
P = softmax(LOGITS, axis=1)
NAMES = ["a", "b", "c"]
WORDS = [NAMES[i] for i in LABELS]


def table(rows: slice, prefix: str = "", scores: Any = P) -> pd.DataFrame:
    return pd.DataFrame({"label": WORDS[rows], **{f"{prefix}{name}": scores[rows, k] for k, name in enumerate(NAMES)}})


def write(kind: str, folder: Path, split: str, rows: slice) -> str:
    path = folder / f"{split}.{kind.split('-')[0]}"
    if kind == "npz":
        np.savez(path, probabilities=P[rows], labels=LABELS[rows])
    elif kind == "csv":
        table(rows).to_csv(path, index=False)
    elif kind == "csv-logits":
        frame = table(rows, "logit_", LOGITS)
        frame.insert(0, "text", "not read")
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        table(rows, "probability_").to_parquet(path)
    elif kind == "parquet-lists":
        pd.DataFrame({"label": LABELS[rows], "logits": list(LOGITS[rows])}).to_parquet(path)
    elif kind == "jsonl":
        lines = ({"label": WORDS[i], "probabilities": P[i].tolist()} for i in range(120)[rows])
        path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.mark.parametrize("kind", ["npz", "csv", "csv-logits", "parquet", "parquet-lists", "jsonl"])
def test_every_kind_of_file_is_read_as_its_arrays(kind: str, tmp_path: Path) -> None:
    found = read_predictions(write(kind, tmp_path, "test", slice(0, 80)), "test")
    assert found.names == (NAMES if kind in ("csv", "csv-logits", "parquet") else None)
    np.testing.assert_allclose(found.scores, (P if found.kind == "probabilities" else LOGITS)[:80], rtol=1e-12)
    assert found.kind == ("logits" if kind in ("csv-logits", "parquet-lists") else "probabilities")
    assert [NAMES[label] if isinstance(label, int) else str(label) for label in np.asarray(found.labels).tolist()] == WORDS[:80]


@pytest.mark.parametrize("prefix", ["prob_", "p(", "proba "])
def test_what_all_headings_begin_with_is_no_part_of_a_class(prefix: str, tmp_path: Path) -> None:
    table(slice(0, 80), prefix).to_csv(tmp_path / "p.csv", index=False)
    assert read_predictions(str(tmp_path / "p.csv"), "test").names == NAMES
    words = {f"{prefix}digit {name}": P[:80, k] for k, name in enumerate(NAMES)}  # they share more than the prefix
    pd.DataFrame({"label": [f"digit {word}" for word in WORDS[:80]], **words}).to_csv(tmp_path / "r.csv", index=False)
    assert read_predictions(str(tmp_path / "r.csv"), "test").names == [f"digit {name}" for name in NAMES]
    frame = table(slice(0, 80), "class ").assign(label=[f"class {word}" for word in WORDS[:80]])
    frame.to_csv(tmp_path / "q.csv", index=False)
    assert read_predictions(str(tmp_path / "q.csv"), "test").names == [f"class {name}" for name in NAMES]


def test_two_files_give_the_report_of_their_arrays(tmp_path: Path) -> None:
    paths = [write("csv", tmp_path, split, rows) for split, rows in (("test", slice(0, 80)), ("dev", slice(80, 120)))]
    report = evaluate(
        EvaluateArguments(str(tmp_path / "out"), predictions=paths[0], validation_predictions=paths[1], write_card=True)
    )
    wanted = hf_ls.calibration_report(logits=LOGITS[:80], labels=LABELS[:80], validation=(LOGITS[80:], LABELS[80:]))
    assert report is not None and report.label_names == NAMES
    for ours, theirs in zip(report.rows, wanted.rows, strict=True):
        for metric in ("accuracy", "nll", "brier", "ece"):
            assert ours.value(metric) == pytest.approx(theirs.value(metric), rel=1e-6), metric
    assert (tmp_path / "out" / "README.md").is_file() and (tmp_path / "out" / "plots" / "reliability.png").is_file()


def test_the_predictions_which_a_run_leaves_have_both_splits(tmp_path: Path) -> None:
    arrays = {
        "logits_test": LOGITS[:80],
        "labels_test": LABELS[:80],
        "logits_validation": LOGITS[80:],
        "labels_validation": LABELS[80:],
    }
    np.savez(tmp_path / "predictions.npz", **arrays)
    report = evaluate(EvaluateArguments(str(tmp_path / "out"), predictions=str(tmp_path / "predictions.npz")))
    assert report is not None and report.rows[0].n == 80 and len(report.rows) == 2 and report.dataset.n_validation == 40


def test_files_which_could_mean_something_else_are_refused(tmp_path: Path) -> None:
    def refused(message: str, **columns: Any) -> None:
        pd.DataFrame(columns).to_csv(tmp_path / "test.csv", index=False)
        with pytest.raises(ValueError, match=message):
            evaluate(EvaluateArguments(str(tmp_path / "out"), predictions=str(tmp_path / "test.csv")))

    refused("labels in a column 'label'", target=[0, 1], a=[0.5, 0.5], b=[0.5, 0.5])
    refused("got 'text' of string; drop it", label=["a", "b"], text=["x", "y"], a=[0.5, 0.5], b=[0.5, 0.5])
    refused("sum to 1", label=["a", "b"], row=[1, 0], a=[0.5, 0.5], b=[0.5, 0.5])  # a column of ids is no class
    refused("got both", label=["a", "b"], logit_a=[0.5, 0.5], probability_a=[0.5, 0.5])
    np.savez(tmp_path / "test.npz", scores=P)
    with pytest.raises(ValueError, match=r"labels and either probabilities or logits.*got \['scores'\]"):
        evaluate(EvaluateArguments(str(tmp_path / "out"), predictions=str(tmp_path / "test.npz")))
    np.savez(tmp_path / "objects.npz", labels=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="expected plain arrays"):
        evaluate(EvaluateArguments(str(tmp_path / "out"), predictions=str(tmp_path / "objects.npz")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "got neither"),
        ("--predictions p.npz --model_name_or_path m", "got both"),
        ("--predictions p.npz --dataset_name snippets", "no dataset_name with predictions"),
        ("--predictions p.npz --task token-classification", "one label per row"),
        ("--model_name_or_path m --test_file t.csv --label_names a b", "predictions with label_names"),
    ],
)
def test_settings_which_contradict_each_other_are_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_evaluation(["--output_dir", "out", *line.split()])
