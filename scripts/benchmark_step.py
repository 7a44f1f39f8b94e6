"""Throughput and peak memory of whole training steps: forward, backward and the AdamW which is the Trainers' default.

    OMP_NUM_THREADS=2 python scripts/benchmark_step.py
    OMP_NUM_THREADS=2 python scripts/benchmark_step.py --settings seq2seq-32k --rounds 5 --json out.json
    python scripts/benchmark_step.py --settings sft-32k --scale 0.1 --rounds 1      # a small trial

Each run is a process of its own, and the methods take turns, so that a busy machine slows all of them. `stock` is
transformers.Trainer with label_smoothing_factor, `trl` is SFTTrainer with it, `trl-plain` is SFTTrainer at epsilon 0, whose
loss is made without logits too (the honest rival), `hf_ls` is LabelSmoothingTrainer or LabelSmoothingSFTTrainer. A step lasts
from on_step_begin to on_step_end of the Trainer; throughput compares the fastest steps and, in brackets, the medians.
Memory is
 - live: the largest growth of live allocations within one step, from torch's profiler (the counterpart of
   torch.cuda.max_memory_allocated): activations, the loss, and the gradients there are by then;
 - resident: the largest resident set of the process (ru_maxrss), less the libraries, weights, gradients and optimizer
   states; this one has the holes in the heap of the C library in it.
The first step, with the checks of hf_ls on the first batch, counts for the resident memory and not for the time; the last,
under the profiler, for the live memory alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
EPSILON = 0.1


@dataclass(frozen=True)
class Setting:
    """A model shape and a batch; `scale` on the command line shortens the sequences."""

    task: str  # seq2seq or sft
    vocabulary: int
    batch: int
    source: int  # tokens of a source, 0 for sft
    target: int
    padding: float  # share of the target positions without a label
    methods: tuple[str, ...]
    smollm2: bool = False  # the shape of SmolLM2-135M, not of a small Llama


SETTINGS = {
    "seq2seq-32k": Setting("seq2seq", 32128, 128, 32, 64, 0.4, ("stock", "hf_ls")),
    "seq2seq-32k-small-batch": Setting("seq2seq", 32128, 32, 32, 64, 0.4, ("stock", "hf_ls")),
    "seq2seq-128k": Setting("seq2seq", 128256, 16, 32, 64, 0.4, ("stock", "hf_ls")),
    "sft-32k": Setting("sft", 32000, 4, 0, 512, 0.0, ("stock", "trl", "trl-plain", "hf_ls")),
    "sft-128k": Setting("sft", 128256, 2, 0, 512, 0.0, ("stock", "trl", "trl-plain", "hf_ls")),
    "sft-smollm2": Setting("sft", 49152, 2, 0, 512, 0.0, ("trl-plain", "hf_ls"), smollm2=True),
}


@dataclass(frozen=True)
class Run:
    """One process."""

    setting: str
    method: str
    seconds: list[float]  # of each measured step
    live: float  # MiB
    resident: float  # MiB
    loss: float  # mean over the steps


def resident_now() -> float:
    """Resident memory of this process now, MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def model_of(setting: Setting) -> Any:
    """T5-small with another vocabulary, a Llama of width 512 with 4 layers, or SmolLM2-135M; random weights, no dropout."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    if setting.task == "seq2seq":
        config = tf.T5Config(
            vocab_size=setting.vocabulary, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, dropout_rate=0.0,
            pad_token_id=0,
        )  # fmt: skip
        return tf.T5ForConditionalGeneration(config)
    shape: dict[str, Any] = {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8,
    }  # fmt: skip
    if setting.smollm2:
        shape = {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "tie_word_embeddings": True,
        }  # fmt: skip
    llama = tf.LlamaConfig(
        vocab_size=setting.vocabulary, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=1, **shape
    )
    return tf.LlamaForCausalLM(llama)


def rows_of(setting: Setting, steps: int) -> list[dict[str, list[int]]]:
    """Token ids for all steps; labels are padded at their end, each row to another length around the wanted share."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(2, setting.vocabulary, (n,), generator=generator).tolist()

    rows = []
    for i in range(steps * setting.batch):
        if setting.task == "sft":
            rows.append({"input_ids": ids(setting.target)})
            continue
        # One row of each batch is full, as a collator which pads to the longest leaves it.
        spread = 0.0 if i % setting.batch == 0 else setting.padding * setting.batch / (setting.batch - 1)
        labels = ids(setting.target)
        kept = round(setting.target * (1 - spread))
        labels[kept:] = [-100] * (setting.target - kept)
        decoder = [0, *(max(label, 0) for label in labels[:-1])]
        rows.append(
            {
                "input_ids": ids(setting.source),
                "attention_mask": [1] * setting.source,
                "labels": labels,
                "decoder_input_ids": decoder,
            }
        )
    return rows


def trainer_of(setting: Setting, method: str, model: Any, steps: int, dtype: str, folder: str) -> Any:
    """The Trainer of a method over the same rows in the same order."""
    import transformers as tf
    from datasets import Dataset

    from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer

    settings: dict[str, Any] = {
        "output_dir": folder, "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "max_steps": steps, "per_device_train_batch_size": setting.batch, "learning_rate": 1e-4,
        "label_smoothing_factor": EPSILON, "bf16": dtype == "bfloat16", "dataloader_pin_memory": False,
    }  # fmt: skip
    rows = Dataset.from_list(rows_of(setting, steps))
    if setting.task == "seq2seq" or method == "stock":
        if setting.task == "sft":
            rows = rows.map(lambda row: {"labels": row["input_ids"]})
        arguments = (LabelSmoothingArguments if method == "hf_ls" else tf.TrainingArguments)(**settings)
        trainer_class: Any = LabelSmoothingTrainer if method == "hf_ls" else tf.Trainer
        return trainer_class(model=model, args=arguments, train_dataset=rows, data_collator=tf.default_data_collator)

    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer

    from hf_ls import LabelSmoothingSFTConfig, LabelSmoothingSFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    settings["label_smoothing_factor"] = 0.0 if method == "trl-plain" else EPSILON
    sft_arguments = (LabelSmoothingSFTConfig if method == "hf_ls" else SFTConfig)(
        **settings, max_length=setting.target, gradient_checkpointing=False
    )
    sft_class: Any = LabelSmoothingSFTTrainer if method == "hf_ls" else SFTTrainer
    return sft_class(model=model, args=sft_arguments, train_dataset=rows, processing_class=tokenizer)


def measure(
    name: str,
    setting: Setting,
    method: str,
    steps: int,
    dtype: str,
    threads: int,
    clock: Callable[[], float],
    checkpointing: bool,
) -> Run:
    """Train in this process: a step to warm up, `steps` timed ones and one whose allocations are profiled."""
    import torch
    import transformers as tf

    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    # By all methods and before the first reading, so that libraries are no difference between them.
    import datasets  # noqa: F401
    from benchmark_loss import allocation_profile, peak_of

    import hf_ls.trainer.mixin  # noqa: F401

    if setting.task == "sft":
        import trl.trainer.sft_trainer  # noqa: F401

    class Meter(tf.TrainerCallback):
        """Times each step, and profiles the allocations of the last."""

        def __init__(self) -> None:
            self.taken: list[float] = []
            self.started = 0.0
            self.resident = 0.0
            self.profile = allocation_profile()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == args.max_steps - 1:
                # Read before the profiler takes memory of its own.
                self.resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                self.profile.start()
            self.started = clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.taken.append(clock() - self.started)

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.profile.stop()

    # What the first backward and the first optimizer load and start, at a size which leaves no trace.
    warm = torch.nn.Linear(8, 8)
    warm(torch.ones(2, 8)).sum().backward()
    torch.optim.AdamW(warm.parameters()).step()
    libraries = resident_now()
    model = model_of(setting)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(setting, method, model, steps + 2, dtype, folder)
        trainer.add_callback(meter)
        result = trainer.train()
    if method == "hf_ls" and trainer._head is None:
        raise RuntimeError(f"expected the logits-free path for {name}, got the dense one; see the reason in the log")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states = sum(
        t.numel() * t.element_size() for s in trainer.optimizer.state.values() for t in s.values() if hasattr(t, "numel")
    )
    resident = meter.resident - libraries - (2 * weights + states) / MIB
    return Run(name, method, meter.taken[1:-1], peak_of(meter.profile) / MIB, resident, result.training_loss)


def in_own_process(name: str, method: str, args: argparse.Namespace) -> Run:
    """`measure` in a new interpreter."""
    command = [sys.executable, __file__, "--child", name, method, "--steps", str(args.steps), "--dtype", args.dtype]
    command += ["--threads", str(args.threads), "--scale", str(args.scale), "--clock", args.clock]
    command += ["--gradient-checkpointing"] if args.gradient_checkpointing else []
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} {method} failed:\n{done.stderr[-3000:]}")
    return Run(**json.loads(done.stdout.strip().splitlines()[-1]))


def table(runs: list[Run], sizes: dict[str, Setting]) -> str:
    """One row per setting and method; × are hf_ls's throughput over, and its memory as a share of, that method's."""
    lines = [
        "| setting | method | s/step | hf_ls × | MiB live | hf_ls × | MiB resident | hf_ls × |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def summary(name: str, method: str) -> tuple[float, float, float, float]:
        mine = [run for run in runs if (run.setting, run.method) == (name, method)]
        taken = [t for run in mine for t in run.seconds]
        live, resident = (statistics.median(values) for values in zip(*((r.live, r.resident) for r in mine), strict=True))
        return min(taken), statistics.median(taken), live, resident

    for name in dict.fromkeys(run.setting for run in runs):
        ours = summary(name, "hf_ls")
        for method in sizes[name].methods:
            fastest, median, live, resident = summary(name, method)
            cells = ["", "", ""]
            if method != "hf_ls":
                cells = [
                    f"{fastest / ours[0]:.2f} ({median / ours[1]:.2f})",
                    f"{ours[2] / live:.2f}",
                    f"{ours[3] / resident:.2f}",
                ]
            time_cell = f"{fastest:.2f} ({median:.2f}) | {cells[0]}"
            lines.append(f"| {name} | {method} | {time_cell} | {live:.0f} | {cells[1]} | {resident:.0f} | {cells[2]} |")
    return "\n".join(lines)


def scaled(setting: Setting, scale: float) -> Setting:
    """The setting with shorter sequences."""
    lengths = {
        "source": max(4, round(setting.source * scale)) if setting.source else 0,
        "target": max(8, round(setting.target * scale)),
    }
    return Setting(**{**asdict(setting), **lengths})


def command_line() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=2, help="processes per method, in turn")
    parser.add_argument("--steps", type=int, default=2, help="timed steps, between one to warm up and one profiled")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 is autocast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: CPU seconds, steady beside other work")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the sequence lengths; 0.1 for a small trial")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="activations are made again in the backward")
    parser.add_argument("--json", type=Path, help="also write the runs here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = command_line().parse_args()
    sizes = {name: scaled(setting, args.scale) for name, setting in SETTINGS.items()}
    if args.child:
        name, method = args.child
        clock = time.perf_counter if args.clock == "wall" else time.process_time
        print(
            json.dumps(
                asdict(
                    measure(name, sizes[name], method, args.steps, args.dtype, args.threads, clock, args.gradient_checkpointing)
                )
            )
        )
        return
    from benchmark_loss import processor

    print(f"{processor('cpu')}, {args.threads} threads, {args.dtype}, {args.clock} clock\n", flush=True)
    runs: list[Run] = []
    for name in args.settings:
        for round_number in range(args.rounds):
            for method in sizes[name].methods:
                run = in_own_process(name, method, args)
                runs.append(run)
                print(f"{name} {method} round {round_number + 1}: {min(run.seconds):.2f} s/step, loss {run.loss:.4f}", flush=True)
    for name in args.settings:
        size = sizes[name]
        tokens = size.batch * size.target
        batch = f"{size.batch} × {size.target} target tokens ({size.padding:.0%} padding), V = {size.vocabulary}"
        print(f"\n{name}: {batch}, logits {tokens * size.vocabulary * 4 / MIB:.0f} MiB")
    print("\n" + table(runs, sizes))
    if args.json:
        args.json.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


if __name__ == "__main__":
    main()
