"""What each process of a test run does; prints nothing, rank 0 writes one file of numbers and gradients.

python -m torch.distributed.run --nproc_per_node 2 tests/support/workers/distributed_worker.py out.pt
The tests run the same functions in one process and compare.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import transformers as tf
from accelerate import ParallelismConfig
from accelerate.utils import gather_object
from helpers import (
    answers,
    arguments,
    classification_rows,
    collate,
    one_step,
    seq2seq_rows,
    tiny_bert,
    tiny_llama,
    tiny_modernbert,
    tiny_reader,
    tiny_t5,
    token_rows,
    weights,
)

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer
from hf_ls.run.launch import end_processes

UNEVEN = (40, 3, 4, 30, 5, 6, 2)
STEPS: dict[str, tuple[Any, Any]] = {
    "bert": (tiny_bert, classification_rows),
    "modernbert": (tiny_modernbert, classification_rows),
    "llama": (tiny_llama, token_rows),
    "t5": (tiny_t5, seq2seq_rows),
    "reader": (tiny_reader, lambda: answers(7)),  # two processes repeat a row
}


def first_step(name: str, trainer_class: type, epsilon: float, accumulation: int, world: int, **kwargs: Any) -> dict[str, Any]:
    """One optimizer step over the same rows, 8 or 7, however they are shared out."""
    make, rows = STEPS[name]
    args_class = LabelSmoothingArguments if trainer_class is LabelSmoothingTrainer else tf.TrainingArguments
    record, gradient = one_step(
        trainer_class, make(), rows(), tempfile.mkdtemp(), args_class, label_smoothing_factor=epsilon,
        per_device_train_batch_size=8 // world // accumulation, gradient_accumulation_steps=accumulation, **kwargs,
    )  # fmt: skip
    return {"record": record, "gradient": gradient}


def evaluation(name: str, world: int, batch_size: int, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Metrics of 23 examples or 7 sequences, neither of which fills the last batch."""
    make, _ = STEPS[name]
    rows = {"llama": token_rows(UNEVEN), "t5": seq2seq_rows(UNEVEN), "reader": answers(23)}.get(name, classification_rows(23))
    args = arguments(
        tempfile.mkdtemp(), LabelSmoothingArguments, per_device_eval_batch_size=batch_size, label_smoothing_factor=0.1
    )
    trainer = LabelSmoothingTrainer(model=make().to(dtype), args=args, eval_dataset=rows, data_collator=collate)
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in ("loss", "nll", "brier", "ece", "accuracy", "signed_gap")}


def drift(trainer_class: type, evaluate_first: bool) -> float:
    """Largest difference of weights between the processes after 3 steps."""
    model = tiny_llama()
    args = arguments(tempfile.mkdtemp(), per_device_train_batch_size=4, learning_rate=0.1, max_steps=3, num_train_epochs=3)
    trainer = trainer_class(
        model=model, args=args, train_dataset=token_rows(), eval_dataset=token_rows(seed=3), data_collator=collate
    )
    if evaluate_first:
        trainer.evaluate()
    trainer.train()
    mine = weights(model)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return float(max((other - mine).abs().max() for other in every))


def cut_sequences() -> list[str]:
    """What each process says to context parallelism, with accelerate's own words against a CPU left out."""
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    args = arguments(tempfile.mkdtemp(), LabelSmoothingArguments, parallelism_config=ParallelismConfig(cp_size=2))
    said = ""
    try:
        LabelSmoothingTrainer(model=tiny_llama(), args=args, train_dataset=token_rows(), data_collator=collate)
    except ValueError as error:
        said = str(error)
    return gather_object([said])


def main(path: str) -> None:
    """Run every case and save the results of rank 0."""
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    world = int(os.environ["WORLD_SIZE"])
    results: dict[str, Any] = {"step": {}, "stock": {}, "evaluation": {}, "drift": {}}
    for name in STEPS:
        for epsilon in (0.0, 0.1):
            for accumulation in (1, 2):
                results["step"][name, epsilon, accumulation] = first_step(
                    name, LabelSmoothingTrainer, epsilon, accumulation, world
                )
        for batch_size in (1, 4, 7):
            results["evaluation"][name, batch_size] = evaluation(name, world, batch_size)
    results["alone"] = first_step("llama", LabelSmoothingTrainer, 0.1, 2, world, average_tokens_across_devices=False)
    for accumulation in (1, 2):
        results["stock"]["bert", accumulation] = first_step("bert", tf.Trainer, 0.0, accumulation, world)
    for trainer_class in (LabelSmoothingTrainer, tf.Trainer):
        for evaluate_first in (False, True):
            results["drift"][trainer_class.__name__, evaluate_first] = drift(trainer_class, evaluate_first)
    results["cut"] = cut_sequences()  # the last: accelerate keeps the layout
    if int(os.environ["RANK"]) == 0:
        torch.save(results, path)
    end_processes()


if __name__ == "__main__":
    main(sys.argv[1])
