"""The report of a comparison: what it says, where its marks lie, that nothing breaks out of it and that it loads nothing."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from hf_ls.compare.cells import Cell
from hf_ls.compare.comparison import Comparison, Variant
from hf_ls.compare.page import (
    COLUMNS,
    Facts,
    _panel,
    _ticks,
    diagrams,
    forests,
    headline,
    html,
    print_comparison,
    rows,
    write_report,
)
from hf_ls.compare.results import Predictions
from hf_ls.compare.statistics import compare
from hf_ls.metrics.core import ece

HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}&amp;"


def results(names=("baseline", "smoothed"), seeds=(0, 1, 2), sets=("test", "tweets"), n=300):
    """A baseline three times too confident, and others nearer to the truth, on shared examples."""
    out = []
    for seed in seeds:
        for k, name in enumerate(names):
            logits, labels = {}, {}
            for i, split in enumerate(("validation", *sets)):
                shared, own = np.random.default_rng(i), np.random.default_rng([seed, k, i])
                z = 2 * shared.normal(size=(n, 3))
                p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
                labels[split] = np.array([shared.choice(3, p=row) for row in p])
                logits[split] = (3 - 2 * min(k, 1)) * (z + 0.2 * own.normal(size=z.shape))
            cell = Cell(name, "smoothed_ce", None, 0.1 if name == "smoothed" else 0.0, seed)
            out += Predictions(cell, logits, labels).results()
    return out


def facts(**changes):
    values = dict(
        title="a title", model="a/model", data="some data", sizes={"train": 96, "test": 300}, label_names=["no", "yes"], flip_labels=0.2,
        convention="all", steps=6, warnings=["beware"], runs=6, seconds=120.0, settings={"epochs": 1.0},
    )  # fmt: skip
    return Facts(**values | changes)


@pytest.fixture(scope="module")
def made():
    found = results()
    return compare(found, repetitions=60), found


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_the_page_is_well_formed_and_every_figure_is_valid_xml(made):
    text = html(*made, facts())
    page = Page(text)
    assert page.open == [] and "svg" in {tag for tag, _ in page.tags}
    figures = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(figures) == 6 + 2 + 4  # three metrics and one of the other set against two references, and four diagrams
    for figure in figures:
        ElementTree.fromstring(figure)
    assert "nan" not in " ".join(figures).lower()


def test_the_page_loads_nothing_and_runs_nothing(made):
    page = Page(html(*made, facts()))
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    attributes = [(name, value or "") for _, attrs in page.tags for name, value in attrs.items()]
    assert not [
        name for name, _ in attributes if name in ("src", "href", "xlink:href", "action", "srcset") or name.startswith("on")
    ]
    assert not [value for _, value in attributes if "url(" in value or "://" in value]
    assert not re.search(r"@import|url\(", html(*made, facts()))
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_pictures_are_part_of_the_page(made, tmp_path):
    import base64

    path = tmp_path / "logit_gap.png"
    path.write_bytes(b"\x89PNG of a histogram")
    page = Page(html(*made, facts(), [path]))
    (image,) = [attrs for tag, attrs in page.tags if tag == "img"]
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == path.read_bytes()
    assert "smoothed loss is least" in image["alt"]
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "img-src data:" in policy
    assert "What smoothing does to the model" not in Page(html(*made, facts())).text


def test_the_verdict_comes_first_and_in_words(made):
    comparison, found = made
    page = Page(html(comparison, found, facts()))
    head, rest = headline(comparison)
    assert comparison.verdict.sentence.lower() == f"{head}: {rest}".lower()
    positions = [
        page.text.index(part) for part in (head, rest, comparison.verdict.evidence[0], "Results", "Paired differences", "Method")
    ]
    # The title of the page also has the headline, before everything.
    assert positions == sorted(positions)
    compared = comparison.verdict.compared
    sentences = [comparison.verdict.evidence[0], *comparison.verdict.evidence[1 + len(compared) :], *comparison.verdict.caveats]
    for sentence in (*sentences, "beware"):
        assert " ".join(sentence.split()) in page.text
    assert len(compared) >= 3  # a table of them, not as many like sentences
    for sentence, (row, against, metric) in zip(comparison.verdict.evidence[1:], compared, strict=False):
        found = next(c for c in comparison.contrasts if (c.set, c.row, c.against, c.metric) == ("test", row, against, metric))
        assert (
            f"{row} {dict(COLUMNS)[metric]}" in page.text
            and f"{found.value:+.4f}" in page.text
            and f"{found.value:+.4f}" in sentence
        )
        assert f"{found.low:+.4f} to {found.high:+.4f}" in page.text


@pytest.mark.parametrize(("seeds", "shown"), [(1, False), (2, False), (3, True)])
def test_no_interval_over_fewer_than_three_seeds(made, seeds, shown):
    comparison, found = made
    fewer = replace(comparison, seeds=comparison.seeds[:seeds])
    assert any(cell["interval"] for row in rows(fewer, "test") for cell in row["cells"]) == shown
    assert ("t interval over seeds" in Page(html(fewer, found, facts())).text) == shown


def test_the_page_says_how_it_was_made(made):
    text = Page(html(*made, facts())).text
    for part in ("6 runs of 6 steps", "seeds 0, 1, 2", "2 minutes", "20 % of the training labels", "some data", "a/model", "all classes",
                 "60 paired bootstrap samples", "train 96, test 300"):  # fmt: skip
        assert part in text, part
    assert "of the training labels" not in Page(html(*made, facts(flip_labels=0.0))).text


@pytest.mark.parametrize("field", ["title", "model", "data", "label_names", "warnings", "settings", "sizes"])
def test_names_cannot_break_out_of_the_page(made, field):
    plain = facts()
    kind = type(getattr(plain, field))
    hostile = {str: HOSTILE, list: [HOSTILE], dict: {HOSTILE: 7}}[kind]
    clean, dirty = Page(html(*made, plain)), Page(html(*made, facts(**{field: hostile})))
    assert [tag for tag, _ in dirty.tags] == [tag for tag, _ in clean.tags]
    assert " ".join(HOSTILE.split()) in dirty.text
    assert "49" not in set(dirty.text.split()) - set(clean.text.split())


def test_names_of_variants_and_sets_cannot_break_out_of_the_page():
    clean, dirty = (
        results(("baseline", name), (0, 1), ("test", other), 60) for name, other in (("maxsup", "x"), (HOSTILE, HOSTILE))
    )
    pages = [Page(html(compare(found, repetitions=10), found, facts())) for found in (clean, dirty)]
    assert [tag for tag, _ in pages[0].tags] == [tag for tag, _ in pages[1].tags]
    assert not [attrs for _, attrs in pages[1].tags if any(name.startswith("on") or name == "src" for name in attrs)]


def test_the_table_holds_the_numbers_of_the_comparison(made):
    comparison, _ = made
    for name in ("test", "tweets"):
        for row, variant in zip(rows(comparison, name), comparison.variants, strict=True):
            cells = {cell["heading"]: cell for cell in row["cells"]}
            nll = comparison.measurement(variant, "nll", name)
            assert row["label"] == variant.label
            assert cells["NLL"]["value"] == f"{nll.mean:.3f}"
            assert cells["NLL"]["interval"] == f"[{max(0.0, nll.low):.3f}, {nll.high:.3f}]"
            assert cells["ECE"]["note"] == f"calibrated: {comparison.measurement(variant, 'null_ece', name).mean:.3f}"
            assert row["temperature"] == (f"{np.mean(comparison.temperatures[variant.label]):.2f}" if variant.tempered else "")
    assert [row["label"] for row in rows(comparison, "test") if row["picked"]] == [comparison.picked.label]


def test_every_seed_is_a_mark_at_its_place(made):
    """Places are linear in the values: read the scale off the ticks and give every mark its value back."""
    comparison, _ = made
    for panel in forests(comparison, "test"):
        ticks = [(tick["x"], float(tick["text"])) for tick in panel["ticks"]]
        slope, offset = np.polyfit(*zip(*ticks, strict=True), 1)
        metric = {"NLL, nats": "nll", "accuracy": "accuracy", "ECE": "ece"}[panel["title"].split(": less ")[0]]
        reference = next(v for v in comparison.variants if v.label == panel["title"].split(": less ")[1])
        assert slope * panel["zero"] + offset == pytest.approx(0, abs=1e-4)
        assert panel["better"] == ("right" if metric == "accuracy" else "left")
        assert len(panel["lines"]) == 3
        for line in panel["lines"]:
            variant = next(v for v in comparison.variants if v.label == line["label"])
            contrast = comparison.contrast(variant, reference, metric)
            shown = [slope * seed["x"] + offset for seed in line["seeds"]]
            assert shown == pytest.approx(contrast.per_seed, abs=2e-4)
            assert slope * line["mean"] + offset == pytest.approx(contrast.value, abs=2e-4)
            assert [slope * x + offset for x in line["whole"]] == pytest.approx([contrast.low, contrast.high], abs=2e-4)
            assert line["class"] == contrast.corrected(comparison.level)
            assert all(0 <= x <= 340 for seed in line["seeds"] for x in (seed["x"], *seed["interval"]))


def test_rows_of_a_forest_do_not_overlap_and_long_names_get_a_line(made):
    comparison, _ = made
    contrasts = [c for c in comparison.contrasts if c.metric == "nll" and c.set == "test"][:2]
    long = [contrasts[0].__class__(**vars(c) | {"row": "margin_smoothing alpha=0.2 margin=5 + temperature"}) for c in contrasts]
    for panel, apart in ((_panel(contrasts, "t", 0.95), 0), (_panel(long, "t", 0.95), 13)):
        first, second = panel["lines"]
        assert first["value_y"] - first["name_y"] == apart
        heights = [
            first["value_y"],
            *(seed["y"] for seed in first["seeds"]),
            first["bottom"],
            second["name_y"],
            second["bottom"],
            panel["height"],
        ]
        assert all(b - a >= 5 for a, b in itertools.pairwise(heights))


def test_the_diagram_pools_the_seeds(made):
    comparison, found = made
    shown = diagrams(comparison, found)
    assert [diagram["label"] for diagram in shown] == [variant.label for variant in comparison.variants]
    parts = [result.statistics["test"] for result in found if result.variant == Variant("baseline", 0.0, False)]
    confidence, correct = (np.concatenate([getattr(part, name) for part in parts]) for name in ("confidence", "correct"))
    dots = shown[0]["dots"]
    assert sum(dot["n"] for dot in dots) == 3 * 300
    gaps = [dot["n"] / 900 * abs((dot["x"] - 22) / 124 - (134 - dot["y"]) / 124) for dot in dots]
    assert sum(gaps) == pytest.approx(ece(confidence, correct, 10))
    assert shown[0]["ece"] == f"{np.mean([ece(part.confidence, part.correct) for part in parts]):.3f}"


@pytest.mark.parametrize(("low", "high"), [(-0.31, 0.02), (-1e-4, 3e-4), (0, 12.0), (-2e-9, 1e-9)])
def test_ticks_are_few_round_and_hold_0(low, high):
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 7 and 0 in ticks and all(low <= tick <= high for tick in ticks)


def test_one_seed_has_no_interval_over_seeds():
    found = results(seeds=(4,), sets=("test",), n=80)
    comparison = compare(found, repetitions=20)
    text = Page(html(comparison, found, facts())).text
    assert "t interval over seeds" not in text and "seeds 4" in text
    assert all(cell["interval"] == "" for row in rows(comparison, "test") for cell in row["cells"])


def test_equal_predictions_still_make_a_page():
    """All differences are 0: no axis may be divided by its own length of 0."""
    baseline = results(("baseline",), (0, 1), ("test",), 60)
    same = [r.__class__(**vars(r) | {"variant": Variant("smoothed", 0.1, r.variant.tempered)}) for r in baseline]
    comparison = compare([*baseline, *same], repetitions=20)
    assert comparison.verdict.kind != "smooth"
    assert "NaN" not in html(comparison, [*baseline, *same], facts())


def test_the_files_are_written_whole_and_read_back(made, tmp_path, capsys, monkeypatch):
    comparison, found = made
    write_report(comparison, found, facts(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html"}
    assert Comparison.from_json((tmp_path / "report.json").read_text()) == comparison
    assert len((tmp_path / "report.html").read_bytes()) < 200_000
    monkeypatch.setenv("COLUMNS", "100")
    print_comparison(comparison, facts(warnings=["[bold]beware[/bold]"]))
    shown = " ".join(capsys.readouterr().out.split())
    assert " ".join(comparison.verdict.sentence.split()) in shown and "Note: [bold]beware[/bold]" in shown
    for variant in comparison.variants:
        assert f"{comparison.measurement(variant, 'nll').mean:.3f}" in shown


def test_intervals_stay_within_the_bounds_of_their_metric(made):
    comparison, _ = made
    wide = [m.__class__(**vars(m) | {"low": -3.0, "high": 4.0}) for m in comparison.measurements]
    cells = {
        cell["heading"]: cell["interval"]
        for cell in rows(Comparison(**vars(comparison) | {"measurements": wide}), "test")[0]["cells"]
    }
    assert cells["accuracy"] == cells["ECE"] == "[0.000, 1.000]"
    assert cells["NLL"] == "[0.000, 4.000]" and cells["signed gap"] == "[-3.000, +4.000]"
