"""Whole trainings through the Trainer, in every layout of processes which runs on a CPU; rank 0 writes the results.

python -m torch.distributed.run --nproc_per_node 4 tests/support/workers/processes_worker.py out.pt
The tests run `trained` in one process with the same global batch and compare. Models are float64, so that differences mean
another computation. 21 examples in global batches of 8 leave a last batch which fills neither 2 nor 4 processes.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from typing import Any

import accelerate.parallelism_config
import torch
import torch.distributed as dist
import transformers as tf
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from helpers import Rows, arguments, classification_rows, collate, seq2seq_rows, tiny_bert, tiny_llama, tiny_t5, token_rows
from launching import start_group
from torch import Tensor
from transformers.distributed import DistributedConfig
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer
from hf_ls.run.launch import end_processes

LENGTHS = (40, 3, 12, 5, 8, 4, 17) * 3
UNEVEN = (40, 3, 4, 30, 5, 6, 2)


def with_ignored_start(rows: Rows, n: int) -> Rows:
    """The first n rows without any label: the whole first batch of some processes."""
    for row in rows.rows[:n]:
        row["labels"][:] = -100
    return rows


MODELS: dict[str, tuple[Any, Any, Any]] = {
    "bert": (tiny_bert, classification_rows(21), classification_rows(23, seed=3)),
    "t5": (tiny_t5, seq2seq_rows(LENGTHS), seq2seq_rows(UNEVEN, seed=3)),
    "llama": (tiny_llama, token_rows(LENGTHS), token_rows(UNEVEN, seed=3)),
    "llama late": (tiny_llama, with_ignored_start(token_rows(LENGTHS), 4), with_ignored_start(token_rows(UNEVEN, seed=3), 1)),
}
GLOBAL_BATCH, STEPS, LEARNING_RATE = 8, 4, 0.1
METRICS = ("loss", "nll", "brier", "ece", "accuracy", "signed_gap")


class ShardedByAccelerate(LabelSmoothingTrainer):
    """FSDP2 as `accelerate launch --use_fsdp --fsdp_version 2` has it on a GPU.

    AcceleratorState takes the plugin only for the MULTI_<device> types, among which MULTI_CPU is missing (accelerate 1.15);
    declared afterwards, its whole FSDP2 path runs on a CPU. The layers are named, since the default for BERT wraps the
    embeddings and then their word embeddings once more, which torch refuses.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        layers = sorted({type(m).__name__ for m in self.model.modules()} & {"BertLayer", "LlamaDecoderLayer"})
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=layers
        )
        self.accelerator.state.fsdp_plugin = plugin
        self.accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True


class Recorder(TrainerCallback):
    """Keeps the gradient of the first step."""

    def __init__(self, before: dict[str, Tensor]) -> None:
        self.before, self.gradient = before, {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.gradient = {name: (self.before[name] - value) / LEARNING_RATE for name, value in whole(model).items()}


def whole(model: Any) -> dict[str, Tensor]:
    """The weights, put together from their shards."""
    model = model.module if hasattr(model, "module") else model
    with gathered(model):
        return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in model.named_parameters()}


def gathered(model: Any) -> Any:
    """The weights which ZeRO-3 has divided, whole."""
    divided = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not divided:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(divided)


def zero_settings(layout: str) -> dict[str, Any]:
    """The arguments of "zero 1", "zero 2" and "zero 3", in which all weights are divided, however small."""
    if not layout.startswith("zero"):
        return {}
    stage = dict(stage=int(layout[-1]), stage3_param_persistence_threshold=0)
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict(deepspeed=dict.fromkeys(batch, "auto") | dict(zero_optimization=stage, zero_allow_untested_optimizer=True))


def shared_folder(world: int) -> str:
    """A new folder, the same on all processes."""
    folder = [tempfile.mkdtemp()]
    if world > 1:
        dist.broadcast_object_list(folder)
    return folder[0]


def build(name: str, layout: str, world: int) -> Any:
    """The model, sharded at load time by transformers in the layouts "fsdp", "tp" and "tp x fsdp"."""
    model = MODELS[name][0]().double()
    if layout not in ("fsdp", "tp", "tp x fsdp"):
        return model
    folder = shared_folder(world)  # save_pretrained writes on rank 0 only
    model.save_pretrained(folder)
    dist.barrier()
    sizes = {"fsdp": dict(fsdp_size=world), "tp": dict(tp_size=world), "tp x fsdp": dict(tp_size=2, fsdp_size=world // 2)}
    return type(model).from_pretrained(folder, dtype=torch.float64, distributed_config=DistributedConfig(**sizes[layout]))


def trained(
    name: str,
    layout: str = "ddp",
    world: int = 1,
    *,
    trainer_class: Any = LabelSmoothingTrainer,
    accumulation: int = 1,
    logits_free: str = "auto",
    evaluate_first: bool = False,
    eval_batch: int = 4,
    resumed: bool = False,
) -> dict[str, Any]:
    """Four steps over 21 rows, the third with 5 of them, however they are shared out, and the evaluations around them.

    resumed: in the middle of the first epoch, after two steps, by another Trainer with a fresh model.
    """
    parallel = {"tp": 1, "tp x fsdp": world // 2}.get(layout, world)
    ours = issubclass(trainer_class, LabelSmoothingTrainer)
    folder = shared_folder(world)
    settings = dict(
        label_smoothing_factor=0.1, max_steps=STEPS, num_train_epochs=2, learning_rate=LEARNING_RATE,
        per_device_train_batch_size=GLOBAL_BATCH // parallel // accumulation, gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=eval_batch,
        **(dict(save_strategy="steps", save_steps=2) if resumed else {}),
        **(dict(label_smoothing_logits_free=logits_free) if ours else {}),
    )  # fmt: skip
    model = build(name, layout, world)
    recorder = Recorder(whole(model))

    def new_trainer(model: Any) -> Any:
        arguments_class = LabelSmoothingArguments if ours else tf.TrainingArguments
        args = arguments(folder, arguments_class, **settings, **zero_settings(layout))  # anew: accelerate takes each plugin once
        trainer = (ShardedByAccelerate if layout == "accelerate fsdp" else trainer_class)(
            model=model, args=args, train_dataset=MODELS[name][1], eval_dataset=MODELS[name][2], data_collator=collate,
            callbacks=[recorder],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        return trainer

    trainer = new_trainer(model)
    before = evaluated(trainer) if evaluate_first else None
    trainer.train()
    if resumed:
        trainer = new_trainer(build(name, layout, world))
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    records = [{k: r.get(k, 0.0) for k in ("loss", "nll", "smoothing_term")} for r in trainer.state.log_history if "loss" in r]
    after = evaluated(trainer)
    weights = whole(trainer.model)
    return {
        "records": records, "gradient": recorder.gradient, "weights": weights, "before": before, "after": after,
        "apart": apart(weights, world), "logits_free": getattr(trainer, "_head", None) is not None,
    }  # fmt: skip


def evaluated(trainer: Any) -> dict[str, float]:
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in METRICS if f"eval_{name}" in metrics}


def apart(weights: dict[str, Tensor], world: int) -> float:
    """The largest difference of weights between the processes."""
    mine = torch.cat([value.flatten() for value in weights.values()])
    every = [torch.empty_like(mine) for _ in range(world)]
    if world > 1:
        dist.all_gather(every, mine)
    return float(max((other - mine).abs().max() for other in every)) if world > 1 else 0.0


def evaluation_refused() -> str:
    """What `evaluate()` before `train()` says under accelerate's FSDP2."""
    try:
        trained("bert", "accelerate fsdp", dist.get_world_size(), evaluate_first=True)
    except ValueError as error:
        return str(error)
    return ""


# layout, model, options; the comparison is always with one process and accumulation 1
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("ddp", "bert", dict(evaluate_first=True, eval_batch=1)),
    ("ddp", "bert", dict(accumulation=2, eval_batch=32)),
    ("ddp", "t5", dict(evaluate_first=True, eval_batch=7)),
    ("ddp", "bert", dict(resumed=True)),
    ("ddp", "llama", dict(resumed=True, accumulation=2)),
    ("accelerate fsdp", "llama", dict(resumed=True)),
    ("ddp", "llama", dict(accumulation=2, logits_free="off", eval_batch=1)),
    ("ddp", "llama", dict(evaluate_first=True, logits_free="on", eval_batch=32)),
    ("accelerate fsdp", "bert", dict(eval_batch=7)),
    ("accelerate fsdp", "llama", dict(logits_free="off", eval_batch=1)),
    ("accelerate fsdp", "llama", dict(accumulation=2, logits_free="on")),
    ("fsdp", "llama", dict(evaluate_first=True, logits_free="on", eval_batch=1)),
    ("fsdp", "llama", dict(evaluate_first=True, accumulation=2, logits_free="off")),
    ("ddp", "llama late", dict(logits_free="on", eval_batch=1)),
    ("accelerate fsdp", "llama late", dict(logits_free="on", eval_batch=1)),
    ("fsdp", "llama late", dict(evaluate_first=True, logits_free="on", eval_batch=1)),
    ("fsdp", "llama late", dict(accumulation=2, logits_free="off", eval_batch=1)),
    ("tp", "llama", dict(evaluate_first=True, accumulation=4, eval_batch=4)),
]
FOUR_ONLY: list[tuple[str, str, dict[str, Any]]] = [
    ("tp x fsdp", "llama", dict(evaluate_first=True, accumulation=2, eval_batch=1))
]


def main(path: str) -> None:
    """Run every case and save the results of rank 0."""
    rank, world = start_group()
    tf.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    # It refuses MULTI_CPU (accelerate 1.15); what it guards runs there.
    accelerate.parallelism_config.ParallelismConfig._validate_accelerator = lambda self, accelerator: None  # type: ignore[method-assign]
    results: dict[str, Any] = {"runs": []}
    for layout, name, options in RUNS + (FOUR_ONLY if world == 4 else []):
        results["runs"].append(trained(name, layout, world, **options))
    results["refused"] = evaluation_refused()
    results["stock"] = {
        "ddp": trained("bert", "ddp", world, trainer_class=tf.Trainer),
        "fsdp": trained("llama", "fsdp", world, trainer_class=tf.Trainer, evaluate_first=True),
        "fsdp never evaluated": trained("llama", "fsdp", world, trainer_class=tf.Trainer),
    }
    if rank == 0:
        torch.save(results, path)
    end_processes()


if __name__ == "__main__":
    main(sys.argv[1])
