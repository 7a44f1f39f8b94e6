"""Is the loss right on this GPU, and how fast is it? One command, under six minutes on one H100.

    python scripts/gpu_check.py
    python scripts/gpu_check.py --device cpu --quick     # the same script at toy sizes, to try it out

First the numbers: loss, dH, dW and db of small problems against float64, with the host forbidden to wait for the device inside
the loss; a wrong one ends the script with exit code 1. Then a table, each row printed when it is measured: three bare matmuls
(the floor), this package with several rows per chunk, logits and `F.cross_entropy`, the same compiled, and Liger, QuACK and
torch's `linear_cross_entropy` where they are installed. Times are medians of device events after a warm-up, memory is
`torch.cuda.max_memory_allocated` less what was there before, dH and dW included. Last, steps of SFT on the shapes of
SmolLM2-135M: TRL's SFTTrainer with its own loss at ε = 0 beside this package's at ε = 0.1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ls import Smoothing, linear_smoothed_cross_entropy

EPSILON = 0.1
GIB = 2**30
# Largest error of loss and of gradients, ‖x − ref‖/‖ref‖; plain bfloat16 arithmetic has 0.01 to 0.02 in the gradients.
TOLERANCE = {torch.float32: (1e-6, 2e-5), torch.bfloat16: (2e-3, 2.5e-2), torch.float16: (1e-3, 4e-3)}
SHAPES = {False: ["2048,1024,32768", "8192,2048,49152", "8192,4096,128256"], True: ["256,64,1000"]}  # N,d,V; the largest last
ROWS_PER_CHUNK = {False: [512, 1024, 2048, 4096, 8192], True: [64, 256]}

Run = Callable[[], object]


# --- correct?


def cases() -> dict[str, dict[str, Any]]:
    """Options of the loss by name; `prior`, `ignored`, `frozen` and `autocast` say how the problem is made."""
    return {
        "plain": {},
        "no smoothing": {"epsilon": 0.0},
        "all kept": {"ignored": 0.0},
        "most ignored": {"ignored": 0.9},
        "all ignored": {"ignored": 1.0},
        "prior": {"prior": "vector"},
        "prior with zeros": {"prior": "support"},
        "prior, wrong": {"prior": "vector", "convention": "wrong"},
        "bias": {"bias": True},
        "bias, weights": {"bias": True, "weighted": True},
        "weights": {"weighted": True},
        "soft-cap": {"softcap": 5.0, "logit_scale": 0.5},
        "z-loss": {"z_loss": 0.01},
        "sum": {"reduction": "sum"},
        "none": {"reduction": "none"},
        "count": {"count": 777.0},
        "frozen head": {"frozen": True},
        "chunks": {"chunk_rows": 256},
        "one chunk": {"chunk_rows": 100_000},
        "autocast": {"autocast": True},
    }


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Forbid the host to wait for the device."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def errors(device: str, dtype: torch.dtype, case: dict[str, Any], size: tuple[int, int, int]) -> dict[str, float]:
    """‖x − ref‖/‖ref‖ of loss and gradients, the reference in float64 on the CPU."""
    n, d, k = size
    case = dict(case)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(k, (n,), generator=generator)
    ignored = torch.rand(n, generator=generator) < case.pop("ignored", 0.3)
    labels[ignored] = -100
    made: dict[str, Any] = {
        "hidden": torch.randn(n, d, generator=generator) * 2,
        "weight": torch.randn(k, d, generator=generator) * d**-0.5,
        "bias": torch.randn(k, generator=generator) if case.pop("bias", False) else None,
    }
    autocast, kind = case.pop("autocast", False), case.pop("prior", None)
    stored = torch.float32 if autocast else dtype
    exact: dict[str, Any] = {name: None if t is None else t.to(dtype).double().requires_grad_() for name, t in made.items()}
    mine: dict[str, Any] = {name: None if t is None else t.to(device, dtype).to(stored) for name, t in made.items()}
    frozen, count = case.pop("frozen", False), case.pop("count", None)
    with torch.no_grad():
        mine["hidden"][ignored.to(device)] = torch.nan  # nothing of them may reach a sum
    leaves = [name for name, t in mine.items() if t is not None and not (frozen and name != "hidden")]
    for name in leaves:
        mine[name].requires_grad_()
    prior = None
    if kind is not None:
        prior = torch.rand(k, generator=generator)
        prior[: k // 2 if kind == "support" else 0] = 0
        prior /= prior.sum()
    epsilon, convention = case.pop("epsilon", EPSILON), case.pop("convention", "all")
    token_weight = torch.rand(n, generator=generator) if case.pop("weighted", False) else None

    want = reference(exact, labels, epsilon, convention, prior, token_weight, count, case)
    upstream = torch.rand(want.shape, generator=generator) + 0.5
    wanted = torch.autograd.grad(want, [exact[name] for name in leaves], upstream.double())

    smoothing = Smoothing(epsilon, convention, prior=None if prior is None else prior.to(device))
    given: dict[str, Any] = {
        "labels": labels.to(device),
        "token_weight": None if token_weight is None else token_weight.to(device),
        "num_items_in_batch": None if count is None else torch.tensor(count, device=device),
    }
    upstream = upstream.to(device)
    with no_waiting(device):
        with torch.autocast(device, dtype=dtype, enabled=autocast):
            got = linear_smoothed_cross_entropy(**mine, **given, smoothing=smoothing, **case)
        found = torch.autograd.grad(got, [mine[name] for name in leaves], upstream)

    def error(x: Tensor, ref: Tensor) -> float:
        return float((x.double().cpu() - ref).norm() / ref.norm().clamp_min(1e-12 if ref.any() else 1.0))

    return {"loss": error(got.detach(), want.detach())} | {
        f"d{name}": error(x, ref) for name, x, ref in zip(leaves, found, wanted, strict=True)
    }


def reference(
    exact: dict[str, Any], labels: Tensor, epsilon: float, convention: str, prior: Tensor | None, token_weight: Tensor | None,
    count: float | None, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The loss written from its target over dense float64 logits."""
    k, softcap = len(exact["weight"]), options.get("softcap")
    z = exact["hidden"] @ exact["weight"].T
    z = (z if exact["bias"] is None else z + exact["bias"]) * options.get("logit_scale", 1.0)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    kept = labels >= 0
    hot = F.one_hot(labels.clamp_min(0), k).double()
    u = torch.full((k,), 1 / k, dtype=torch.float64) if prior is None else prior.double()
    spread = u.expand(len(hot), k)
    if convention == "wrong":
        spread = spread * (1 - hot)
        spread = spread / spread.sum(1, keepdim=True)
    losses = -(((1 - epsilon) * hot + epsilon * spread) * z.log_softmax(1)).sum(1)
    losses = losses + options.get("z_loss", 0.0) * z.logsumexp(1).square()
    weight = kept.double() if token_weight is None else kept * token_weight.double()
    losses = losses * weight
    if options.get("reduction") == "none":
        return losses
    if options.get("reduction") == "sum":
        return losses.sum()
    return losses.sum() / (count or max(float(weight.sum()), 1e-300))


def check(device: str, quick: bool) -> bool:
    """Print the largest errors of every case; whether all are within the tolerance."""
    size = (60, 16, 70) if quick else (1500, 96, 2003)
    right = True
    for dtype, (of_loss, of_gradient) in TOLERANCE.items():
        for name, case in cases().items():
            if case.get("autocast") and dtype == torch.float32:
                continue
            if quick and "chunk_rows" in case:
                case = {"chunk_rows": 16}
            try:
                found = errors(device, dtype, case, size)
            except RuntimeError as error:
                inner = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(inner.filename).name}:{inner.lineno} {inner.line}"
                print(f"WRONG {str(dtype)[6:]:9} {name}: {error} at {where}", flush=True)
                right = False
                continue
            # A few rows average out less: in half precision toy sizes get twice the room.
            room = 2 if quick else 1
            fine = all(e <= room * (of_loss if what == "loss" else of_gradient) for what, e in found.items())
            right &= fine
            text = "  ".join(f"{what} {e:.1e}" for what, e in found.items())
            print(f"{'right' if fine else 'WRONG'} {str(dtype)[6:]:9} {name:17} {text}", flush=True)
    return right


# --- fast?


def methods(hidden: Tensor, weight: Tensor, labels: Tensor, rows: list[int]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The losses to compare, each over the same tensors; those of libraries only where they can be imported."""
    for chunk_rows in rows:
        ours = partial(linear_smoothed_cross_entropy, hidden, weight, labels, EPSILON, chunk_rows=chunk_rows)
        yield f"hf_ls, {chunk_rows} rows per chunk", ours
    yield "hf_ls", lambda: linear_smoothed_cross_entropy(hidden, weight, labels, EPSILON)
    yield "hf_ls, ε = 0", lambda: linear_smoothed_cross_entropy(hidden, weight, labels, 0.0)

    def dense() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), labels, label_smoothing=EPSILON)

    def dense_in_float32() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, label_smoothing=EPSILON)

    yield "logits, cross_entropy in their dtype", dense
    yield "logits, cross_entropy in float32", dense_in_float32
    yield "logits, cross_entropy in float32, compiled", torch.compile(dense_in_float32)
    if hasattr(F, "linear_cross_entropy"):
        yield "torch linear_cross_entropy, ε = 0", lambda: F.linear_cross_entropy(hidden, weight, labels)
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        yield "Liger", lambda: liger_fused_linear_cross_entropy(hidden, weight, labels, label_smoothing=EPSILON)
    with contextlib.suppress(ImportError):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        yield "QuACK, ε = 0", lambda: chunked_linear_cross_entropy(hidden, weight, labels)


def milliseconds(run: Run, device: str, budget: float) -> tuple[float, float]:
    """Median of a few runs after two to warm up, and the spread between the quarters of the runs, in milliseconds."""
    taken: list[float] = []
    for _ in range(2):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    while len(taken) < 5 or (len(taken) < 30 and time.perf_counter() - begin < budget):
        if device == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            taken.append(start.elapsed_time(stop))
        else:
            started = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - started))
    quarters = statistics.quantiles(taken, n=4)
    return statistics.median(taken), quarters[2] - quarters[0]


def peak_gib(run: Run, device: str) -> float:
    """The largest growth of allocated memory in a run; nan on a CPU."""
    if device != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def table(device: str, quick: bool, budget: float) -> list[dict[str, Any]]:
    """Measure and print every method at every shape."""
    from benchmark_loss import floor

    found: list[dict[str, Any]] = []
    for shape in SHAPES[quick]:
        n, d, v = (int(part) for part in shape.split(","))
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(n, d, generator=generator, device=device).bfloat16().requires_grad_()
        weight = (torch.randn(v, d, generator=generator, device=device) * d**-0.5).bfloat16().requires_grad_()
        labels = torch.randint(v, (n,), generator=generator, device=device)
        labels[:: n // 8] = -100  # the last position of each of eight sequences has no label
        print(
            f"\n| N {n}, d {d}, V {v}, bfloat16 | ms (quartiles apart) | × floor | peak GiB | loss |\n|---|---|---|---|---|",
            flush=True,
        )

        matmuls = floor(hidden, weight)

        def row(name: str, run: Run, value: float, floor_ms: float | None, shape: str = shape) -> float:
            ms, spread = milliseconds(run, device, budget)
            peak = peak_gib(run, device)
            ratio = ms / (floor_ms or ms)
            print(f"| {name} | {ms:.2f} ({spread:.2f}) | {ratio:.2f} | {peak:.2f} | {value:.4f} |", flush=True)
            found.append(
                {"shape": shape, "method": name, "ms": ms, "spread": spread, "ratio": ratio, "peak_gib": peak, "loss": value}
            )
            return ms

        floor_ms = row("three matmuls", matmuls, float("nan"), None)
        for name, loss in methods(hidden, weight, labels, ROWS_PER_CHUNK[quick]):

            def run(loss: Callable[[], Tensor] = loss, leaves: tuple[Tensor, ...] = (hidden, weight)) -> None:
                for leaf in leaves:
                    leaf.grad = None
                loss().backward()

            try:
                value = float(loss().detach())
                row(name, run, value, floor_ms)
            except Exception as error:  # another library's failure must not hide the rest of the table
                print(f"| {name} | failed: {type(error).__name__} {str(error).splitlines()[0][:160]} | | | |", flush=True)
            hidden.grad = weight.grad = None
            if device == "cuda":
                torch.cuda.empty_cache()
        row("three matmuls, again", matmuls, float("nan"), floor_ms)
    if device == "cuda":
        profile(hidden, weight, labels)
    return found


def profile(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Where the time of one call goes, by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        linear_smoothed_cross_entropy(hidden, weight, labels, EPSILON).backward()
        torch.cuda.synchronize()
    print("\n" + seen.key_averages().table(sort_by="self_device_time_total", row_limit=14, max_name_column_width=60), flush=True)


# --- a whole step


def sft_step(device: str, quick: bool) -> None:
    """Median step of SFT with TRL's own loss at ε = 0 and with this package's at ε = 0.1, in turn."""
    try:
        import transformers as tf
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from trl import SFTConfig, SFTTrainer

        from hf_ls import LabelSmoothingSFTConfig, LabelSmoothingSFTTrainer
    except ImportError as error:
        print(f"\nno SFT step: {error}")
        return
    vocabulary, batch, length = (1000, 2, 32) if quick else (49152, 8, 1024)
    config = tf.LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=2 if quick else 30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    steps, warm_up = (3, 1) if quick else (16, 4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocabulary, (steps * batch, length), generator=generator).tolist()
    rows = Dataset.from_dict({"input_ids": ids})
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")

    class Clock(tf.TrainerCallback):
        """Seconds of each step, the device idle at both ends."""

        def __init__(self) -> None:
            self.taken: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.taken.append(time.perf_counter() - self.started)

    shapes = f"{batch} x {length} tokens, bf16 autocast"
    print(f"\n| SFT, SmolLM2-135M shapes, {shapes} | ms per step | tokens/s | peak GiB |\n|---|---|---|---|")
    for name, arguments_of, trainer_of, epsilon in (
        ("TRL nll, ε = 0", SFTConfig, SFTTrainer, 0.0),
        ("hf_ls, ε = 0.1", LabelSmoothingSFTConfig, LabelSmoothingSFTTrainer, EPSILON),
        ("TRL nll, ε = 0, again", SFTConfig, SFTTrainer, 0.0),
        ("hf_ls, ε = 0.1, again", LabelSmoothingSFTConfig, LabelSmoothingSFTTrainer, EPSILON),
    ):
        torch.manual_seed(0)
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = arguments_of(
                folder, max_steps=steps, per_device_train_batch_size=batch, label_smoothing_factor=epsilon, learning_rate=1e-4,
                bf16=device == "cuda", use_cpu=device == "cpu", max_length=length, gradient_checkpointing=False, report_to=[],
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            trainer = trainer_of(
                model=tf.LlamaForCausalLM(config),
                args=arguments,
                train_dataset=rows,
                processing_class=tokenizer,
                callbacks=[clock],
            )
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trainer.train()
        peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else float("nan")
        seconds = statistics.median(clock.taken[warm_up:])
        print(f"| {name} | {1e3 * seconds:.1f} | {batch * length / seconds:.0f} | {peak:.2f} |", flush=True)
        del trainer
        if device == "cuda":
            torch.cuda.empty_cache()


def describe(device: str) -> str:
    """The card, its driver's CUDA and torch."""
    if device != "cuda":
        return f"CPU, torch {torch.__version__}"
    card = torch.cuda.get_device_properties(0)
    return (
        f"{card.name}, {card.total_memory / GIB:.0f} GiB, {card.multi_processor_count} multiprocessors, "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    )


def command_line() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--parts", nargs="+", default=["check", "table", "sft"], choices=["check", "table", "sft"])
    parser.add_argument("--seconds", type=float, default=1.5, help="time for the runs of one row of the table")
    parser.add_argument("--json", type=Path, help="also write the rows of the table here")
    return parser


def main() -> None:
    """Check, then measure."""
    args = command_line().parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: expected a CUDA device, got none; try the script out with --device cpu --quick")
    began = time.perf_counter()
    print(describe(args.device), flush=True)
    if "check" in args.parts and not check(args.device, args.quick):
        sys.exit("error: expected the numbers of float64, got those marked WRONG; nothing was timed")
    if "table" in args.parts:
        found = table(args.device, args.quick, min(args.seconds, 0.2) if args.quick else args.seconds)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    if "sft" in args.parts:
        sft_step(args.device, args.quick)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
