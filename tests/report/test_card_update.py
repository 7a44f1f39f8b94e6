"""Results written into a card which is there: that card is somebody's, and everything else in it stays."""

from __future__ import annotations

import datetime
import random
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult
from huggingface_hub.utils import yaml_dump

from hf_ls.report.card_metadata import with_results

TASK = "text-classification"


def results(value: float = 0.5) -> list[EvalResult]:
    given = {"task_type": TASK, "dataset_type": "acme/third", "dataset_name": "third", "dataset_split": "test"}
    return [
        EvalResult(**given, metric_type="nll", metric_name="NLL", metric_value=value),
        EvalResult(**given, metric_type="accuracy", metric_value=0.75, metric_args={"n": 3}),
    ]


def split(card: str) -> tuple[dict[str, Any], str]:
    _, header, text = card.split("---\n", 2)
    return yaml.safe_load(header), text


def made_up(seed: int) -> tuple[str, str, str]:
    """A card in three parts, the second its model-index, with some of what cards have: results of many shapes, keys before and behind, comments, dates, odd scalars."""
    draw = random.Random(seed)
    scalars = ["mit", "on", "1e5", 0.1, 1e-7, 12, True, None, datetime.date(2024, 5, 1), "a: b # c", "é – 漢", "line\nline\n", ""]

    def metric() -> dict[str, Any]:
        found: dict[str, Any] = {
            "type": draw.choice(["accuracy", "nll", "f1"]),
            "value": draw.choice([0.5, "n/a", 88, float("nan")]),
        }
        more = {"name": draw.choice(["NLL", "Accuracy"]), "args": {"n": 3}, "verified": True, "verifyToken": "x", "config": None}
        return found | {key: more[key] for key in draw.sample(sorted(more), draw.randint(0, 3))}

    def result() -> dict[str, Any]:
        data = {"type": draw.choice(["acme/third", "unknown"]), "name": draw.choice(["third", "dev of shop A", "dev of shop B"])}
        more = {"split": "test", "config": "en", "revision": "1e5", "args": {"a": [1, 2]}}
        data |= {key: more[key] for key in draw.sample(sorted(more), draw.randint(0, 3))}
        task = {"type": TASK} | ({"name": draw.choice(["Reviews", "Tweets"])} if draw.random() < 0.5 else {})
        found = {"task": task, "dataset": data, "metrics": [metric() for _ in range(draw.randint(0, 3))]}
        return found | ({"source": {"name": "board", "url": "https://x.test"}} if draw.random() < 0.3 else {})

    models = [{"name": name, "results": [result() for _ in range(draw.randint(0, 4))]} for name in ("mine", "other", "third")]
    index = models[: draw.randint(0, 3)]
    others: list[tuple[str, Any]] = [(key, draw.choice(scalars)) for key in ("license", "extra", "note")]
    others += [("tags", ["x", "y"]), ("widget", [{"text": "a: 'b'"}])]
    lines = [str(yaml_dump({key: value}, sort_keys=False)) + draw.choice(["", "# a comment\n"]) for key, value in others]
    place = draw.randint(0, len(lines)) if index else len(lines)
    written = str(yaml_dump({"model-index": index}, sort_keys=False)) if index or draw.random() < 0.5 else ""
    before, after = "".join(lines[:place]), "".join(lines[place:]) + "---\n# mine\n\nWords --- & <b>markup</b>.\n"
    return f"---\n{before}", written, after


def without(index: list[dict[str, Any]] | None) -> list[Any]:
    """A model-index as a list of (model, task and data, metric), without the results of `results()`."""
    ours = [("acme/third", "nll", None), ("acme/third", "accuracy", {"n": 3})]
    flat = []
    for model in index or []:
        for result in model["results"]:
            beside = {key: value for key, value in result.items() if key != "metrics"}
            plain = beside == {"task": {"type": TASK}, "dataset": {"type": "acme/third", "name": "third", "split": "test"}}
            for metric in result["metrics"]:
                which = (result["dataset"]["type"], metric["type"], metric.get("args"))
                named = metric.get("name") == ("NLL" if metric["type"] == "nll" else None)
                new = plain and which in ours and named and not {"verified", "verifyToken"} & {*metric}
                flat += [] if new else [repr((model["name"], beside, metric))]
    return flat


@pytest.mark.parametrize("seed", range(60))
def test_everything_but_the_results_written_stays(seed: int) -> None:
    start, index, end = made_up(seed)
    card = start + index + end
    before, text = split(card)
    made = with_results(card, "mine", results())
    after, text_after = split(made)
    assert text_after == text and list(after)[: len(before)] == list(before)
    assert all(repr(after[key]) == repr(value) for key, value in before.items() if key != "model-index")
    assert without(after["model-index"]) == without(before.get("model-index"))
    assert [model["name"] for model in after["model-index"]] == [
        model["name"] for model in before.get("model-index") or [{"name": "mine"}]
    ]
    mine = [metric for result in after["model-index"][0]["results"] for metric in result["metrics"]]
    assert {"type": "nll", "name": "NLL", "value": 0.5} in mine and {"type": "accuracy", "args": {"n": 3}, "value": 0.75} in mine
    assert made.startswith(start) and made.endswith(end)  # comments, quotes and all
    again = with_results(made, "mine", results(0.25))
    assert with_results(again, "mine", results()) == made  # the same results again are no new ones


def test_two_results_of_one_type_and_two_models_keep_their_names() -> None:
    """huggingface_hub groups by type, configuration, split and revision, and keeps the first name of each."""
    header = """model-index:
- name: mine
  results:
  - task: {type: text-classification, name: Reviews}
    dataset: {type: unknown, name: dev of shop A, split: test}
    metrics: [{type: accuracy, value: 0.91}]
  - task: {type: text-classification, name: Tweets}
    dataset: {type: unknown, name: dev of shop B, split: test}
    metrics: [{type: accuracy, value: 0.42}]
- name: other
  results: [] # none yet
license: mit # mine
"""
    after, _ = split(with_results(f"---\n{header}---\n# mine\n", "mine", results()))
    mine, other = after["model-index"]
    assert [(r["dataset"]["name"], r["task"].get("name")) for r in mine["results"]] == [
        ("dev of shop A", "Reviews"), ("dev of shop B", "Tweets"), ("third", None),
    ]  # fmt: skip
    assert other == {"name": "other", "results": []} and after["license"] == "mit"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_mark_stay(end: str, mark: str) -> None:
    card = mark + end.join(["---", "license: mit", "---", "# mine", ""])
    made = with_results(card, "mine", results())
    assert made.startswith(f"{mark}---{end}license: mit{end}model-index:{end}") and made.endswith(f"{end}---{end}# mine{end}")
    assert made.replace(end, "") == made.replace("\r", "").replace("\n", "")
    bare = with_results("# no header\n", "mine", results())
    assert split(bare)[0]["model-index"][0]["name"] == "mine" and bare.endswith("# no header\n")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("model-index: {a: 1}\n", "another shape"),
        ("model-index: [3]\n", "another shape"),
        ("- a\n- b\n", "a mapping, got a list"),
        ("a: [\n", "valid YAML header"),
        ("a: !!python/object/apply:os.system ['true']\n", "valid YAML header"),
        ("model-index: []\nmodel-index: []\n", "one model-index"),
        ("model-index:\n- {name: a, results: []}\n- {name: b, results: []}\n", r"one named 'mine' .*\['a', 'b'\]"),
        ("{license: mit}\n", "lines of its own"),
        ("model-index: &x\n- {name: mine, results: []}\ncopy: *x\n", "lines of its own"),
    ],
)
def test_what_cannot_be_kept_is_refused(header: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_results(f"---\n{header}---\n# mine\n", "mine", results())
