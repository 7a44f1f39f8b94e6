"""Does label smoothing help a language model, and does its effect vanish for a small d and a large V? (docs/study.md)

    OMP_NUM_THREADS=1 python scripts/study.py --output_dir outputs/study --json docs/study/grid.json
    python scripts/study.py --json docs/study/grid.json --tables_only      # the same tables from the file alone
    python scripts/study.py --reports outputs/compare-smollm2              # a table of any comparison

A cell of the grid is one `hf-ls compare` of tiny Llamas from random weights: hidden size d, vocabulary V, four ε, three seeds.
Its command is printed, and gives the same numbers alone; here its runs are forked from one process, which has imported
everything, since a start takes as long as the training. A finished run is read and not trained again.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_ls.common.files import write_atomically
from hf_ls.compare.cells import CELL
from hf_ls.compare.comparison import Comparison, Variant
from hf_ls.compare.experiment import parse_compare, run_comparison
from hf_ls.compare.worker import run_cell
from hf_ls.data.classification import load_snippets
from hf_ls.metrics.ceiling import constant_scores
from hf_ls.metrics.paired import seed_difference

Record = dict[str, Any]
HIDDEN, VOCABULARIES = (32, 128), (512, 4096, 16384)
PADDED = (4096, 16384)  # tokens of the first, and rows for as many as the second which no text ever has
# Name -> training sentences: seen about once, or again and again until the model is over-confident.
REGIMES = {"fresh": 9600, "repeated": 960}
STEPS, BATCH = 300, 32
COMMON = f"""
    --task causal-lm --model_type llama --max_length 128 --epsilons 0.05 0.1 0.2 --seeds 0 1 2 --max_steps {STEPS}
    --per_device_train_batch_size {BATCH} --per_device_eval_batch_size {BATCH} --learning_rate 3e-3 --warmup_steps 0.1
    --weight_decay 0.01 --train_sampling_strategy group_by_length --eval_strategy no --save_strategy no --report_to none
    --disable_tqdm true --logging_steps 100 --jobs 1
"""
MODEL = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
    "tie_word_embeddings": True, "initializer_range": 0.06,
}  # fmt: skip
BASELINE, TEMPERED = "baseline", "baseline + temperature"
EFFECTS = ("nll", "ece", "accuracy")


@dataclass(frozen=True)
class GridCell:
    """One comparison. tokens: how many the tokenizer knows; vocabulary: V, the rows of the embedding, which is also the head."""

    regime: str
    hidden: int
    tokens: int
    vocabulary: int

    @property
    def name(self) -> str:
        """fresh-d32-v4096, or fresh-d32-v4096of16384 with rows which no text has."""
        return f"{self.regime}-d{self.hidden}-v{self.tokens}" + (f"of{self.vocabulary}" if self.padded else "")

    @property
    def padded(self) -> bool:
        """Whether some rows of the head belong to no token of the tokenizer."""
        return self.vocabulary > self.tokens

    def arguments(self, folder: Path) -> list[str]:
        """Those of `hf-ls compare`."""
        model = MODEL | {"vocab_size": self.vocabulary, "hidden_size": self.hidden, "intermediate_size": 3 * self.hidden}
        data, of_split = folder / "data", {"train": self.regime, "validation": "validation", "test": "test"}
        words = [*COMMON.split(), f"--tokenizer_name={data / f'bpe-{self.tokens}'}", f"--output_dir={folder / self.name}"]
        words += [f"--{split}_file={data / name}.jsonl" for split, name in of_split.items()]
        return [*words, f"--model_config_overrides={json.dumps(model)}"]


def grid(regimes: list[str]) -> list[GridCell]:
    """All cells, the smallest first."""
    sizes = [(v, v) for v in VOCABULARIES] + [PADDED]
    return [GridCell(regime, d, tokens, v) for regime in regimes for d in HIDDEN for tokens, v in sizes]


def write_data(folder: Path) -> None:
    """The embedded sentences as files, and BPE tokenizers of their training split; both are the same every time."""
    if (folder / f"bpe-{VOCABULARIES[-1]}").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts = {split: list(part["text"]) for split, part in load_snippets().splits.items()}
    parts = {name: texts["train"][:n] for name, n in REGIMES.items()}
    for name, rows in (parts | {"validation": texts["validation"][:400], "test": texts["test"][:800]}).items():
        write_atomically(folder / f"{name}.jsonl", "".join(json.dumps({"text": row}) + "\n" for row in rows))
    for size in VOCABULARIES:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special, alphabet = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts["train"], trainer)
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / f"bpe-{size}")


def run(cell: GridCell, folder: Path) -> Record:
    """Train what is missing of a cell and compare."""
    arguments = cell.arguments(folder)
    print(f"hf-ls compare {shlex.join(arguments)}", flush=True)
    with redirect_stdout(io.StringIO()):
        run_comparison(*parse_compare([*arguments, "--print_cells"]))
    log = folder / "cpu_seconds.json"
    spent = json.loads(log.read_text()) if log.exists() else {}
    for spec in sorted((folder / cell.name / "cells").glob("*/spec.json")):
        if not (spec.parent / CELL).exists():
            start, process = _cpu_seconds(), multiprocessing.get_context("fork").Process(target=_quietly, args=(spec.parent,))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{spec.parent.name} failed, see {spec.parent / 'log.txt'}")
            spent.setdefault(cell.name, {})[spec.parent.name] = round(_cpu_seconds() - start, 1)
            write_atomically(log, json.dumps(spent, indent=1))
    with redirect_stdout(io.StringIO()):
        comparison = run_comparison(*parse_compare(arguments))
    if comparison is None:
        raise RuntimeError("expected a comparison, got a dry run")
    return asdict(cell) | {"cpu_seconds": round(sum(spent[cell.name].values()))} | summary(comparison)


def _quietly(folder: Path) -> None:
    with open(folder / "log.txt", "w", encoding="utf-8") as log, redirect_stdout(log):
        run_cell(folder)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summary(comparison: Comparison) -> Record:
    """What the tables show of a comparison: values and differences on test as [value, low, high], with four digits."""
    share, entropy = constant_scores(comparison.class_counts or [1])
    rows, effects = {}, {}
    wanted = {"accuracy", "nll", "ece", "signed_gap", comparison.quality}
    shown = [metric for metric in comparison.metrics() if metric in wanted or "answer" in metric]
    for variant in comparison.variants:
        row: Record = {"T": _mean(comparison.temperatures[variant.label])}
        for metric in shown:
            found = comparison.measurement(variant, metric)
            row[metric] = _rounded(found.mean, _mean(found.per_seed_low), _mean(found.per_seed_high))
        rows[variant.label] = row
        rival = Variant(BASELINE, 0.0, variant.tempered and variant.name != BASELINE)
        if variant != rival:
            told = {c.metric for c in comparison.contrasts if (c.row, c.against) == (variant.label, rival.label)}
            found_effects = {m: comparison.contrast(variant, rival, m) for m in shown if m in told}
            effects[variant.label] = {m: _rounded(c.value, c.low, c.high) for m, c in found_effects.items()}
            ours, theirs = (comparison.measurement(v, "signed_gap").per_seed for v in (variant, rival))
            moved = seed_difference("signed_gap", ours, theirs, comparison.level)
            effects[variant.label]["signed_gap"] = _rounded(moved.value, moved.low, moved.high)
    return {
        "size": comparison.size(), "seeds": len(comparison.seeds), "most_frequent": round(share, 4), "entropy": round(entropy, 4),
        "quality": comparison.quality, "verdict": comparison.verdict.sentence, "rows": rows, "effects": effects,
    }  # fmt: skip


def _mean(values: list[float] | None) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _rounded(*values: float | None) -> list[float | None]:
    return [None if value is None else round(float(value), 4) for value in values]


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
    yield "| d | V | accuracy, share of the most frequent | NLL, entropy of the shares | signed gap | ECE | T | ECE at T |"
    yield "|--:|--:|--:|--:|--:|--:|--:|--:|"
    for record in records:
        row, tempered = record["rows"][BASELINE], record["rows"][TEMPERED]
        learnt = f"{row['accuracy'][0]:.3f}, {record['most_frequent']:.3f} | {row['nll'][0]:.3f}, {record['entropy']:.3f}"
        calibration = (
            f"{_cell(row['signed_gap'], sign=True)} | {_cell(row['ece'])} | {tempered['T']:.2f} | {_cell(tempered['ece'])}"
        )
        yield f"| {_sizes(record)} | {learnt} | {calibration} |"


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
    for regime in REGIMES:
        found = [record for record in records if record["regime"] == regime]
        if found:
            minutes = sum(record["cpu_seconds"] for record in found) / 60
            yield f"\n{regime}, {REGIMES[regime]:,} training sentences, {STEPS} steps of {BATCH}: {minutes:.0f} CPU minutes\n"
            yield from baseline_table(found)
            yield ""
            yield from effect_table(found)


def command_line() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=[*REGIMES])
    parser.add_argument("--json", type=Path, help="keep what the tables show here")
    parser.add_argument("--tables_only", action="store_true", help="train nothing: the tables of what --json holds")
    parser.add_argument("--reports", nargs="+", type=Path, default=[], help="folders of other comparisons: a table of each")
    return parser


def main() -> None:
    """Run the grid, or read what is there, and print the tables."""
    args = command_line().parse_args()
    for folder in args.reports:
        record = summary(Comparison.from_json((folder / "report.json").read_text(encoding="utf-8")))
        print(f"\n{record['size']}, {record['seeds']} seeds\n", *comparison_table(record), "", record["verdict"], sep="\n")
    if args.reports:
        return
    if args.tables_only:
        print(*tables(json.loads(args.json.read_text(encoding="utf-8"))), sep="\n")
        return
    folder, records = args.output_dir, []
    write_data(folder / "data")
    for cell in grid(args.regimes):
        records.append(run(cell, folder))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
            write_atomically(args.json, f"[\n{lines}\n]\n")
    print(*tables(records), sep="\n")


if __name__ == "__main__":
    main()
