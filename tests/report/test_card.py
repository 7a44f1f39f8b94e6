"""Facts about the card: its numbers are the report's, huggingface_hub reads it back, no name can break it."""

from __future__ import annotations

import ast
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from card_reading import HOSTILE, ORDER, body, cells, headings, on_the_hub, rendered
from helpers import tiny_bert
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from reports import make_report, make_token_report
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    modelcard,
)

from hf_ls.common.text import one_line
from hf_ls.report.calibration_report import CLASS_METRICS, CalibrationReport
from hf_ls.report.card import _TRAINER_COMMENT, MARKER, model_card, write_card
from hf_ls.report.card_metadata import eval_results
from hf_ls.report.facts import SmoothingFacts, TrainingFacts
from hf_ls.report.plots import plots_of
from hf_ls.report.sentences import regime, verdict
from hf_ls.report.table import cells as table_cells
from hf_ls.report.table import error_cells


def test_sections_stand_in_their_order() -> None:
    assert headings(body(make_report())) == [("h1", "toy-model"), *(("h2", name) for name in ORDER)]


def test_table_holds_the_numbers_of_the_report() -> None:
    report = make_report()
    head, *lines = cells(body(report))
    assert head == table_cells(report)[0]
    lines, others = lines[: len(report.rows)], lines[len(report.rows) :]
    assert others == error_cells(report) and len(others) == 1 + len(report.rows)
    assert all("[" in cell for line in others[1:] for cell in line[1:-1]) and not any("[" in line[-1] for line in others)
    for line, row in zip(lines, report.rows, strict=True):
        found = dict(zip(head, line, strict=True))
        assert found["run"] == row.name and float(found["epsilon"]) == row.epsilon
        assert found["T"] == ("–" if row.temperature == 1 else f"{row.temperature:.2f}")
        assert float(found["null ece"]) == pytest.approx(row.metrics["ece"]["null"], abs=5e-4)
        for metric in CLASS_METRICS:
            cell = found[metric.replace("_", " ")]
            value, *ends = (float(x) for x in re.findall(r"[-+]?\d+\.\d+", cell))
            assert value == pytest.approx(row.value(metric), abs=5e-4)
            assert ends == pytest.approx(row.interval(metric), abs=5e-4)


def test_card_repeats_the_findings_of_the_report() -> None:
    report, text = make_report(), body(make_report())
    assert regime(report) in text and verdict(report) in text
    assert "![Reliability diagram" in text and "](plots/reliability.png)" in text


def test_metadata_without_a_dataset_id_claims_no_results(tmp_path: Path) -> None:
    path = write_card(make_report(), tmp_path)
    assert metadata_load(path) == {
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "library_name": "transformers",
        "metrics": ["accuracy", "nll", "brier_score", "expected_calibration_error"],
        "pipeline_tag": "text-classification",
        "tags": ["label-smoothing", "calibration", "text-classification"],
    }
    assert eval_results(make_report()) == []


def test_results_survive_huggingface_hub(tmp_path: Path) -> None:
    report = on_the_hub()
    card = ModelCard.load(write_card(report, tmp_path))
    assert card.data.eval_results == eval_results(report) and len(card.data.eval_results) == 4
    assert card.data.datasets == ["owner/snippets"] and card.data.model_name == "toy-model"
    card.save(tmp_path / "again.md")
    assert ModelCard.load(tmp_path / "again.md").data.eval_results == eval_results(report)

    row = report.published_row
    assert row is not None
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    names = {
        "accuracy": "accuracy",
        "nll": "nll",
        "brier_score": "brier",
        "expected_calibration_error": "ece",
    }
    assert values == {hub: row.value(ours) for hub, ours in names.items()}
    assert all(type(value) is float for value in values.values())
    for result in card.data.eval_results:
        assert result.verified is None and result.verify_token is None
        assert (result.dataset_split, result.dataset_revision) == ("test", "1e5")
        ece = result.metric_type == "expected_calibration_error"
        assert result.metric_args == ({"n_bins": 15, "norm": "l1", "binning": "equal_width"} if ece else None)
    assert "verif" not in (tmp_path / "README.md").read_text().split("---")[1]


def test_results_need_to_know_which_row_is_published() -> None:
    assert eval_results(on_the_hub(published=None)) == []
    assert eval_results(on_the_hub(published="baseline"))[0].metric_value == make_report().rows[0].value("accuracy")
    undefined = on_the_hub()
    rows = [replace(row, metrics={**row.metrics, "nll": {"value": float("inf")}}) for row in undefined.rows]
    types = [result.metric_type for result in eval_results(replace(undefined, rows=rows))]
    assert types == ["accuracy", "brier_score", "expected_calibration_error"]


@pytest.mark.parametrize("name", [None, "/data/someone/secret/model", "./model", "a/b/c", "x--y", "x y", "out.git"])
def test_what_is_no_hub_id_stays_out_of_the_metadata(name: str | None) -> None:
    dataset = replace(make_report(rows=1).dataset, hub_id=name)
    report = make_report(base_model=name, dataset=dataset)
    data = ModelCard(model_card(report)).data
    assert data.base_model is None and data.datasets is None and data.eval_results is None
    assert "secret/" not in model_card(report)


def test_a_local_folder_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ModelCard(model_card(make_report(base_model="runs/first"))).data.base_model == "runs/first"
    os.makedirs("runs/first")
    assert ModelCard(model_card(make_report(base_model="runs/first"))).data.base_model is None


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_names_are_shown_and_not_obeyed(hostile: str, tmp_path: Path) -> None:
    plain = on_the_hub()
    rows = [replace(row, run=f"{hostile}{i}") for i, row in enumerate(plain.rows)]
    report = replace(
        plain,
        rows=rows,
        history={},
        published=rows[-1].name,
        model_name=hostile,
        label_names=[hostile, "b", "c"],
        dataset=replace(plain.dataset, name=hostile, licence=hostile, config=hostile),
        smoothing=replace(plain.smoothing, prior=hostile, schedule=hostile, final_epsilon=0.2, excluded=hostile),
        training=replace(plain.training, optim=hostile, model_config_overrides={hostile: 3}, techniques=[hostile, hostile]),
        versions={hostile: hostile},
    )
    path = write_card(report, tmp_path)
    assert CalibrationReport.from_json(report.to_json()) == report

    metadata = metadata_load(path)
    assert metadata is not None and set(metadata) == {
        "base_model", "datasets", "library_name", "metrics", "model-index", "pipeline_tag", "tags",
    }  # fmt: skip
    assert ModelCard.load(path).data.eval_results == eval_results(report)

    text = ModelCard.load(path).text
    shown = headings(text)
    assert [tag for tag, _ in shown] == ["h1", *["h2"] * len(ORDER)] and [t for _, t in shown][1:] == ORDER
    table = cells(text)
    assert [len(line) for line in table] == [10] * (1 + len(rows)) + [6] * (1 + len(rows))
    tokens = rendered(text)
    inline = [child for token in tokens for child in token.children or []]
    assert [t.content.strip() for t in tokens if t.type == "html_block"] == [MARKER]
    assert not [t for t in tokens if t.type in ("ordered_list_open", "blockquote_open", "hr")]
    assert len([t for t in tokens if t.type == "bullet_list_open"]) == 4
    assert not [child for child in inline if child.type in ("html_inline", "strong_open", "s_open", "em_open")]
    assert {child.attrs["href"] for child in inline if child.type == "link_open"} == {
        "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        "https://huggingface.co/datasets/owner/snippets",
    }
    assert [child.attrs["src"] for child in inline if child.type == "image"] == [
        f"plots/{plot.file}" for plot in plots_of(report)
    ]
    fences = [token for token in tokens if token.type == "fence"]
    assert len(fences) == 1
    assert shown[0][1] == one_line(hostile)
    names = [one_line(row.name) for row in rows]
    assert [line[0] for line in table] == ["run", *names] * 2
    ast.parse(fences[0].content)


def test_ordinary_names_read_as_they_are() -> None:
    name = "Stanford_NLI (v1.0), 100 % – Ünïcödé [x]: 50 < 60 & more"
    report = make_report(model_name=name)
    assert headings(body(report))[0] == ("h1", name)


class TestUsage:
    """The code in the card, run."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace

        words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "A", "text", "to", "classify", "."])}
        tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path)
        return tmp_path

    def run(self, report: CalibrationReport) -> dict[str, Any]:
        (code,) = (token.content for token in rendered(body(report)) if token.type == "fence")
        scope: dict[str, Any] = {}
        exec(code, scope)
        return scope

    def test_plain(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = tiny_bert(3, id2label={0: "bad", 1: "so-so", 2: "good"})
        model.save_pretrained(folder)
        scope = self.run(make_report(model_name=str(folder)))
        expected = model.eval()(input_ids=torch.tensor([[2, 3, 4, 5, 6]])).logits.softmax(-1)
        torch.testing.assert_close(scope["probabilities"], expected)
        assert capsys.readouterr().out.split()[0] == model.config.id2label[int(expected.argmax())]

    def test_adapter(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from peft import LoraConfig, TaskType, get_peft_model

        base = tmp_path / "base"
        tiny_bert(3).save_pretrained(base)
        model = get_peft_model(tiny_bert(3).from_pretrained(base, num_labels=3), LoraConfig(task_type=TaskType.SEQ_CLS))
        model.save_pretrained(folder)
        report = make_report(model_name=str(folder), training=TrainingFacts(peft="lora", seeds=[0]), label_names=["x", "y", "z"])
        scope = self.run(report)
        expected = model.eval()(input_ids=torch.tensor([[2, 3, 4, 5, 6]])).logits.softmax(-1)
        torch.testing.assert_close(scope["probabilities"], expected)
        assert capsys.readouterr().out.split()[0] in ("x", "y", "z")
        assert ModelCard(model_card(report)).data.library_name == "peft"

        stock = (folder / "README.md").read_text()  # peft wrote one of its own
        assert "Model Card for Model ID" in stock
        write_card(report, folder)
        assert MARKER in (folder / "README.md").read_text()
        (folder / "README.md").write_text(stock.replace("[More Information Needed]", "I know more.", 1))
        with pytest.raises(ValueError, match="written by hand"):
            write_card(report, folder)


class TestTokenUsage:
    """The code in the card of a token task, run on a tiny model."""

    folder = TestUsage.folder
    run = TestUsage.run

    def example(self, task: str, folder: Path, **changes: Any) -> CalibrationReport:
        report = make_token_report(task, model_name=str(folder), **changes)
        return replace(report, dataset=replace(report.dataset, example="A text"))

    def test_seq2seq(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        torch.manual_seed(0)
        sizes = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "encoder_layers": 1, "decoder_layers": 1}
        heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "max_position_embeddings": 80}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
        model = BartForConditionalGeneration(BartConfig(vocab_size=7, **sizes, **heads, **ids)).eval()
        model.save_pretrained(folder)
        scope = self.run(self.example("text2text-generation", folder))
        decoder_input = scope["output"].sequences[:, :-1]
        assert decoder_input[0, 0] == 2 and scope["tokens"].shape == scope["probabilities"].shape
        forced = model(input_ids=torch.tensor([[2, 3]]), decoder_input_ids=decoder_input).logits.softmax(-1)
        expected = forced.gather(-1, scope["tokens"][..., None]).squeeze(-1)
        torch.testing.assert_close(scope["probabilities"], expected, rtol=1e-4, atol=1e-5)
        assert capsys.readouterr().out.rstrip().endswith("]")

    def test_causal(self, folder: Path) -> None:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=7, n_embd=8, n_layer=1, n_head=1, n_positions=80, eos_token_id=0)).eval()
        model.save_pretrained(folder)
        scope = self.run(self.example("text-generation", folder))
        assert scope["output"].sequences[0, :2].tolist() == [2, 3]
        forced = model(input_ids=scope["output"].sequences[:, :-1]).logits[:, 1:].softmax(-1)
        expected = forced.gather(-1, scope["tokens"][..., None]).squeeze(-1)
        torch.testing.assert_close(scope["probabilities"], expected, rtol=1e-4, atol=1e-5)

    def test_causal_adapter(self, folder: Path, tmp_path: Path) -> None:
        from peft import LoraConfig, TaskType, get_peft_model

        base = tmp_path / "base"
        GPT2LMHeadModel(GPT2Config(vocab_size=7, n_embd=8, n_layer=1, n_head=1, n_positions=80)).save_pretrained(base)
        settings = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["c_attn"], fan_in_fan_out=True)
        get_peft_model(GPT2LMHeadModel.from_pretrained(base), settings).save_pretrained(folder)
        scope = self.run(self.example("text-generation", folder, training=TrainingFacts(peft="lora", seeds=[0])))
        assert hasattr(scope["model"], "peft_config")
        assert 0 < scope["probabilities"].min() <= scope["probabilities"].max() <= 1

    def test_token_classification(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        torch.manual_seed(0)
        names = {0: "O", 1: "B"}
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        model = BertForTokenClassification(BertConfig(vocab_size=7, id2label=names, **sizes)).eval()
        model.save_pretrained(folder)
        scope = self.run(self.example("token-classification", folder))
        expected = model(input_ids=torch.tensor([[2, 3]])).logits.softmax(-1)
        torch.testing.assert_close(scope["probabilities"], expected)
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [line[:2] for line in lines] == [
            ["A", names[int(expected[0, 0].argmax())]],
            ["text", names[int(expected[0, 1].argmax())]],
        ]


def test_temperature_is_explained_for_what_is_published() -> None:
    baked = body(make_report(published="smoothed + temperature"))
    assert "T = 0.7, fitted on the validation split, is already in the weights" in baked
    assert "divide the logits by" not in baked
    plain = body(make_report(published="baseline"))
    assert 'row "baseline"' in plain and "divide the logits by T = 1.6 before" in plain
    for silent in (make_report(published=None), make_report(rows=1)):
        assert "T =" not in body(silent).split("## How to use")[1].split("## Label")[0]


def test_smoothing_is_stated_truthfully() -> None:
    facts = make_report(rows=1).smoothing

    def section(**changes: Any) -> str:
        return body(make_report(smoothing=replace(facts, **changes))).split("## Label smoothing")[1].split("## Training")[0]

    assert "effective epsilon: 0.1" in section() and "all 3 classes" in section()
    assert "3.332 nats" in section() and "0.933" in section() and "schedule: constant" in section()
    wrong = section(convention="wrong")
    assert "2 other classes only" in wrong and "the same as 0.15 in the convention `all`" in wrong
    assert "the same as" not in section(convention="wrong", prior="unigram")
    ramp = section(epsilon=0.0, schedule="linear", final_epsilon=0.4, warmup_steps=5)
    assert "schedule: linear, from 0 to 0.4, 0 in the first 5 steps" in ramp and "No label smoothing" not in ramp
    assert "excluded from the loss: padding" in section(excluded="padding")
    none = section(epsilon=0.0, optimal_logit_gap=None, max_confidence=1.0)
    assert "No label smoothing was used" in none and "nats" not in none


@pytest.mark.parametrize("over", ["classes", "vocabulary", "text"])
@pytest.mark.parametrize("known", [{}, {"prior": "uniform"}, {"schedule": "linear", "final_epsilon": 0.2}, {"num_classes": 3}])
@pytest.mark.parametrize("epsilon", [None, 0.0, 0.1, 0.6])
def test_a_convention_which_nobody_stated_is_in_no_card(epsilon: float | None, known: dict[str, Any], over: Any) -> None:
    """Nor is what follows from one: a confidence ceiling, a logit gap, an equal epsilon."""
    row = replace(make_report(rows=1).rows[0], run="evaluated", epsilon=epsilon)
    stated = {"rows": [row], "history": {}, "published": None, "differences": [], "training": None}
    text = body(replace(make_report(rows=1), **stated, smoothing=SmoothingFacts(epsilon, over=over, **known)))
    section = text.split("## Label smoothing")[1].split("## Training")[0]
    assert not any(said in text for said in ("`all`", "`wrong`", "ceiling", "logit gap", "the same as"))
    if "final_epsilon" not in known and not epsilon:
        assert ("No label smoothing was used" if epsilon == 0 else "not known: this model was not trained here") in section
    elif epsilon is not None:
        assert f"effective epsilon: {epsilon:g}" in section and "convention not known" in section
        assert known.get("prior") or "prior: not known" in section
        assert known.get("schedule") or "schedule: not known" in section
    stated_one = body(replace(make_report(rows=1), **stated, smoothing=SmoothingFacts(0.1, "wrong", over=over, **known)))
    assert "`wrong`" in stated_one


def test_limitations_follow_the_report() -> None:
    def limits(**changes: Any) -> str:
        return body(make_report(**changes)).split("## Limitations")[1].split("## Versions")[0]

    report = make_report()
    assert "One seed." in limits() and f"{report.rows[3].metrics['ece']['null']:.3f} (null ece)" in limits()
    assert "out of domain" in limits() and "no free win" in limits()
    assert "no free win" not in limits(published="baseline")
    assert "no test split" in limits(dataset=replace(report.dataset, split="validation"))
    low = replace(report.smoothing, max_confidence=0.5)
    assert "above its confidence ceiling 0.500" in limits(published="smoothed", smoothing=low)
    assert "ceiling" not in limits(published="smoothed + temperature", smoothing=low)


def test_hand_written_card_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Mine\n")
    with pytest.raises(ValueError, match="overwrite=True"):
        write_card(make_report(), tmp_path)
    assert path.read_text() == "# Mine\n"
    write_card(make_report(), tmp_path, overwrite=True)
    edited = path.read_text().replace(MARKER, "") + "My own words.\n"
    path.write_text(edited)
    with pytest.raises(ValueError, match="written by hand"):
        write_card(make_report(), tmp_path)
    assert path.read_text() == edited


def test_generated_cards_are_replaced(tmp_path: Path) -> None:
    path = write_card(make_report(), tmp_path)
    write_card(make_report(rows=1), tmp_path)
    assert path.read_text() == model_card(make_report(rows=1))
    assert _TRAINER_COMMENT in modelcard.AUTOGENERATED_TRAINER_COMMENT
    path.write_text(f"---\ntags: [x]\n---\n{modelcard.AUTOGENERATED_TRAINER_COMMENT}\n# stock\n")
    write_card(make_report(), tmp_path)
    assert path.read_text() == model_card(make_report())
    assert os.listdir(tmp_path) == ["README.md"]


def test_card_comes_from_the_file_alone(tmp_path: Path) -> None:
    report = on_the_hub()
    loaded = CalibrationReport.load(report.save(tmp_path / "calibration.json"))
    assert model_card(loaded) == model_card(report)


def test_other_tasks_are_refused() -> None:
    for report in (make_report(task="translation"), make_report(task="text-generation"), make_token_report("text-generation")):
        wrong = replace(report, task="text-classification") if report.is_token_task else report
        with pytest.raises(ValueError, match=r"expected a task of .*text-classification.*; set the Hub's name"):
            model_card(wrong)


def test_pictures_which_were_drawn_are_linked_with_a_sentence_each():
    plain = body(make_report())
    assert "penultimate.png" not in plain
    shown = body(make_report(pictures=["logit_gap.png", "penultimate.png"]))
    for name in ("reliability", "confidence", "loss_curve", "calibration_steps", "logit_gap", "penultimate"):
        after = shown.split(f"](plots/{name}.png)\n\n")[1].split("\n")[0]
        assert len(after.split()) > 10 and after.endswith("."), name


def test_the_time_of_this_run_is_not_that_of_all():
    report = make_report()
    history = {
        run: [*records, {"step": 50, "train_runtime": 60.5 + i}] for i, (run, records) in enumerate(report.history.items())
    }
    training = replace(report.training, train_runtime_s=122.0)
    text = body(replace(report, history=history, training=training))
    assert (
        "- training time of this run since its last start, seconds: 61.5" in text
        and "each since its last start, seconds: 122" in text
    )
    assert "of this run" not in body(report)
