"""Does label smoothing help a language model, and does its effect vanish for a small d and a large V? (docs/study.md)

    OMP_NUM_THREADS=1 python scripts/study.py --json outputs/grid.json     # train what the file lacks, print the tables
    OMP_NUM_THREADS=1 python scripts/study.py --json outputs/one.json --only d16-v512 --regimes repeated
    python scripts/study.py --json docs/study/grid.json --tables_only      # the tables of docs/study.md
    python scripts/study.py --reports outputs/compare-answers              # tables of any `hf-ls compare`

A cell of the grid is a comparison of tiny Llamas from random weights: hidden size d, vocabulary V, four ε, three seeds; the runs
of a seed have the same initial weights and batches. It is `hf-ls compare` in one process: the same Trainer, temperature, draws
and verdict, without the reports of each run, since starting and writing these takes longer than such a training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_ls.calibration.temperature import apply_temperature
from hf_ls.calibration.token_temperature import CrossFittedTemperature, TokenTemperature, temperature_curves
from hf_ls.common.files import write_atomically
from hf_ls.compare.comparison import TEST, Comparison, Result, Variant
from hf_ls.compare.statistics import compare
from hf_ls.data.classification import load_snippets
from hf_ls.metrics.core import PredictionStatistics
from hf_ls.metrics.paired import seed_difference
from hf_ls.report.calibration_report import BASELINE
from hf_ls.trainer.arguments import LabelSmoothingArguments
from hf_ls.trainer.mixin import LabelSmoothingTrainer

Record = dict[str, Any]
LEARNING_RATES = {16: 1e-2, 64: 5e-3}  # by hidden size d
# Tokens of the tokenizer, rows of the embedding, which is also the head; where there are more, no text has the others.
SIZES = ((512, 512), (2048, 2048), (2048, 8192), (8192, 8192))
# Name -> training sentences, steps: a few, again and again until the model is over-confident; or each of many once.
REGIMES = {"repeated": (192, 120), "fresh": (1920, 120)}
EPSILONS, SEEDS, BATCH, LENGTH = (0.0, 0.05, 0.1, 0.2), (0, 1, 2), 16, 128
HELD_OUT = {"validation": 80, "test": 160}  # sentences
TEMPERED = f"{BASELINE} + temperature"


@dataclass(frozen=True)
class GridCell:
    """One comparison. tokens: how many the tokenizer knows; vocabulary: V, the rows of the embedding, which is also the head."""

    regime: str
    hidden: int
    tokens: int
    vocabulary: int

    @property
    def name(self) -> str:
        """d16-v2048, or d16-v2048of8192 with rows which no text has."""
        return f"d{self.hidden}-v{self.tokens}" + (f"of{self.vocabulary}" if self.vocabulary > self.tokens else "")

    def model(self) -> LlamaForCausalLM:
        """With random weights."""
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=3 * self.hidden, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=True,
            initializer_range=0.06, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return LlamaForCausalLM(config)


def grid(regimes: list[str]) -> list[GridCell]:
    """All cells."""
    return [GridCell(regime, d, *size) for regime in regimes for size in SIZES for d in LEARNING_RATES]


@cache
def texts() -> dict[str, list[str]]:
    """The embedded sentences of each split, in their fixed shuffled order."""
    return {split: list(part["text"]) for split, part in load_snippets().splits.items()}


@cache
def bpe(size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with so many tokens, made from the whole training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts()["train"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def rows(split: str, size: int, count: int) -> Dataset:
    """The first sentences of a split as tokens."""
    ids = bpe(size)(texts()[split][:count], truncation=True, max_length=LENGTH)["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": ids})


def train(cell: GridCell, epsilon: float, seed: int) -> LlamaForCausalLM:
    """One run."""
    set_seed(seed)
    sentences, steps = REGIMES[cell.regime]
    with tempfile.TemporaryDirectory() as folder:
        arguments = LabelSmoothingArguments(
            folder, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no", seed=seed,
            max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATES[cell.hidden], warmup_steps=0.1,
            weight_decay=0.01, train_sampling_strategy="group_by_length", label_smoothing_factor=epsilon,
            dataloader_pin_memory=False,
        )  # fmt: skip
        model, data = cell.model(), rows("train", cell.tokens, sentences)
        collator = DataCollatorForSeq2Seq(bpe(cell.tokens))
        LabelSmoothingTrainer(model=model, args=arguments, train_dataset=data, data_collator=collator).train()
    return model.eval()


@torch.no_grad()
def predictions(model: LlamaForCausalLM, data: Dataset) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each sentence the logits [T, V] and the tokens [T] which they predict."""
    for ids in data.with_format("torch")["input_ids"]:
        yield model(input_ids=ids[None]).logits[0, :-1], ids[1:]


def measure(model: LlamaForCausalLM, cell: GridCell, epsilon: float, seed: int) -> list[Result]:
    """The run without and with a temperature fitted on validation, as a comparison reads them."""
    validation, test = (list(predictions(model, rows(split, cell.tokens, n))) for split, n in HELD_OUT.items())
    curves = np.stack([temperature_curves(logits, ids).sum(0).numpy() for logits, ids in validation])
    fitted, crossed = TokenTemperature(), CrossFittedTemperature()
    fitted.sums = torch.from_numpy(curves.sum(0))
    crossed.update(curves)
    logits, labels = torch.cat([z for z, _ in test]).numpy(), torch.cat([ids for _, ids in test]).numpy()
    cluster = np.repeat(np.arange(len(test)), [len(ids) for _, ids in test])
    nll = {False: fitted.nll(1.0), True: crossed.nll() or float("nan")}
    made = []
    for tempered, temperature in ((False, 1.0), (True, fitted.fit())):
        variant = Variant("smoothed" if epsilon else BASELINE, epsilon, tempered)
        statistics = {TEST: PredictionStatistics.from_logits(apply_temperature(logits, temperature), labels)}
        made.append(Result(variant, seed, temperature, nll[tempered], statistics, cluster={TEST: cluster}, labels={TEST: labels}))
    return made


def run(cell: GridCell) -> Record:
    """All runs of a cell, compared."""
    start, results = time.process_time(), []
    for seed in SEEDS:
        for epsilon in EPSILONS:
            results += measure(train(cell, epsilon, seed), cell, epsilon, seed)
    return asdict(cell) | {"cpu_seconds": round(time.process_time() - start)} | summary(compare(results))


def summary(comparison: Comparison) -> Record:
    """What the tables show of a comparison: values and differences on test as [value, low, high], rounded."""
    share, entropy = comparison.uninformed or (float("nan"), float("nan"))
    measured, effects = {}, {}
    wanted = {"accuracy", "nll", "ece", "signed_gap", comparison.quality}
    shown = [metric for metric in comparison.metrics() if metric in wanted]
    for variant in comparison.variants:
        row: Record = {"T": _mean(comparison.temperatures[variant.label])}
        for metric in shown:
            found = comparison.measurement(variant, metric)
            row[metric] = _rounded(found.mean, _mean(found.per_seed_low), _mean(found.per_seed_high))
        measured[variant.label] = row
        rival = Variant(BASELINE, 0.0, variant.tempered and variant.name != BASELINE)
        if variant != rival:
            told = {c.metric for c in comparison.contrasts if (c.row, c.against) == (variant.label, rival.label)}
            found_effects = {m: comparison.contrast(variant, rival, m) for m in shown if m in told}
            effects[variant.label] = {m: _rounded(c.value, c.low, c.high) for m, c in found_effects.items()}
            ours, theirs = (comparison.measurement(v, "signed_gap").per_seed for v in (variant, rival))
            moved = seed_difference("signed_gap", ours, theirs, comparison.level)
            effects[variant.label]["signed_gap"] = _rounded(moved.value, moved.low, moved.high)
    return {
        "size": comparison.size(), "seeds": len(comparison.seeds), "most_frequent": round(share, 6), "entropy": round(entropy, 6),
        "quality": comparison.quality, "verdict": comparison.verdict.sentence, "rows": measured, "effects": effects,
    }  # fmt: skip


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _rounded(*values: float | None) -> list[float | None]:
    return [None if value is None else round(float(value), 6) for value in values]


def _cell(values: list[float | None] | None, *, sign: bool = False) -> str:
    """0.123 [0.120, 0.126]; a dash where there is none."""
    if not values or values[0] is None:
        return "–"
    text = [format(value + 0.0, "+.3f" if sign else ".3f") for value in values if value is not None]
    return text[0] + (f" [{text[1]}, {text[2]}]" if len(text) == 3 else "")


def comparison_table(record: Record) -> Iterator[str]:
    """One comparison: each run without and with temperature, and what it changed against the baseline of its kind."""
    metrics = [metric for metric in next(iter(record["rows"].values())) if metric != "T"]
    changed = [metric for metric in metrics if any(metric in effect for effect in record["effects"].values())]
    changed = [metric for metric in changed if metric != "signed_gap"]
    yield f"| run | T | {' | '.join([*metrics, *(f'Δ {metric}' for metric in changed)])} |"
    yield f"|---|{'--:|' * (1 + len(metrics) + len(changed))}"
    for label, row in record["rows"].items():
        effect = record["effects"].get(label, {})
        numbers = [_cell(row[metric], sign=metric == "signed_gap") for metric in metrics]
        numbers += [_cell(effect.get(metric), sign=True) for metric in changed]
        temperature = format(row["T"], ".2f") if label.endswith("temperature") else "–"
        yield f"| {label} | {temperature} | {' | '.join(numbers)} |"


def _sizes(record: Record) -> str:
    used = f" ({record['tokens']:,} used)" if record["tokens"] < record["vocabulary"] else ""
    return f"{record['hidden']} | {record['vocabulary']:,}{used}"


def baseline_table(records: list[Record]) -> Iterator[str]:
    """Whether each baseline has learnt, how over-confident it is, and what the temperature alone does."""
    heads = "accuracy, share of the most frequent | NLL, entropy of the shares | signed gap | ECE | T | ECE at T | NLL at T"
    yield f"| d | V | {heads} |"
    yield "|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for record in records:
        row, tempered = record["rows"][BASELINE], record["rows"][TEMPERED]
        learnt = f"{row['accuracy'][0]:.3f}, {record['most_frequent']:.3f} | {row['nll'][0]:.3f}, {record['entropy']:.3f}"
        calibration = (
            f"{_cell(row['signed_gap'], sign=True)} | {_cell(row['ece'])} | {tempered['T']:.2f} | {_cell(tempered['ece'])}"
        )
        yield f"| {_sizes(record)} | {learnt} | {calibration} | {tempered['nll'][0]:.3f} |"


def effect_table(records: list[Record]) -> Iterator[str]:
    """What each ε changed against the baseline, before a temperature, and after one fitted to both."""
    yield "| d | V | ε | signed gap | Δ gap | of the ideal | Δ ECE | Δ NLL | Δ accuracy | T | Δ ECE at T | Δ NLL at T |"
    yield "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for record in records:
        for label, effect in record["effects"].items():
            if label.endswith("temperature"):
                continue
            after, at = record["effects"][f"{label} + temperature"], record["rows"][f"{label} + temperature"]["T"]
            moved = [_cell(effect[metric], sign=True) for metric in ("signed_gap", "ece", "nll", "accuracy")]
            late = [_cell(after[metric], sign=True) for metric in ("ece", "nll")]
            epsilon = label.partition("ε=")[2]
            share = format(effect["signed_gap"][0] / ideal_shift(record, float(epsilon)), ".2f")
            numbers = [f"{record['rows'][label]['signed_gap'][0]:+.3f}", moved[0], share, *moved[1:], f"{at:.2f}", *late]
            yield f"| {_sizes(record)} | {epsilon} | {' | '.join(numbers)} |"


def ideal_shift(record: Record, epsilon: float) -> float:
    """How far smoothing would move the mean confidence c of the baseline, were it able to learn its targets: −ε(c − 1/V)."""
    row = record["rows"][BASELINE]
    confidence = row["accuracy"][0] + row["signed_gap"][0]
    return -epsilon * (float(confidence) - 1.0 / record["vocabulary"])


def tables(records: list[Record]) -> Iterator[str]:
    """All tables of the grid, as they stand in docs/study.md."""
    for regime, (sentences, steps) in REGIMES.items():
        found = [record for record in records if record["regime"] == regime]
        if found:
            minutes = sum(record["cpu_seconds"] for record in found) / 60
            yield f"\n{regime}, {sentences:,} training sentences, {steps} steps of {BATCH}: {minutes:.0f} CPU minutes\n"
            yield from baseline_table(found)
            yield ""
            yield from effect_table(found)


def command_line() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, help="keep what the tables show here, and train only what it lacks")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=[*REGIMES])
    parser.add_argument("--only", nargs="+", help="names of cells, such as d16-v512 and d16-v2048of8192; all if not given")
    parser.add_argument("--tables_only", action="store_true", help="train nothing: the tables of what --json holds")
    parser.add_argument("--reports", nargs="+", type=Path, default=[], help="folders of other comparisons: their tables")
    return parser


def main() -> None:
    """Run the grid, or read what is there, and print the tables."""
    args = command_line().parse_args()
    for folder in args.reports:
        comparison = Comparison.from_json((folder / "report.json").read_text(encoding="utf-8"))
        for record in [summary(one) for one in (comparison, comparison.tokens) if one is not None]:
            print(
                f"\n{record['size']}, {record['seeds']} seeds\n",
                *comparison_table(record),
                "",
                f"> {record['verdict']}",
                sep="\n",
            )
    if args.reports:
        return
    records: list[Record] = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.exists() else []
    known = {tuple(record[name] for name in asdict(GridCell("", 0, 0, 0))) for record in records}
    for cell in grid(args.regimes):
        if args.tables_only or tuple(asdict(cell).values()) in known or (args.only and cell.name not in args.only):
            continue
        records.append(run(cell))
        print(f"{cell.regime} {cell.name}: {records[-1]['cpu_seconds']} CPU seconds; {records[-1]['verdict']}", flush=True)
        if args.json:
            lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
            write_atomically(args.json, f"[\n{lines}\n]\n")
    order = [asdict(cell) for cell in grid([*REGIMES])]
    print(*tables(sorted(records, key=lambda record: order.index({name: record[name] for name in order[0]}))), sep="\n")


if __name__ == "__main__":
    main()
