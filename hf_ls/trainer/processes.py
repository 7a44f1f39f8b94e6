"""What several processes do to the batches and the model of a Trainer, and how it is undone.

accelerate repeats rows to fill the last batch of every process; FSDP2 leaves weights gathered after an evaluation; DeepSpeed
needs its engine for one. `copies` is how many processes in a row see the same batch: the tensor-parallel size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.utils.data import BatchSampler


def without_repeats(accelerator: Accelerator, labels: Tensor, copies: int = 1, *, ignore_index: int = -100) -> Tensor:
    """The labels [B, ...] of this process's current batch, all ignored in repeated rows, so that each example counts once.

    accelerate starts again from the first examples until the last batch of every process is full. A stock Trainer trains on
    them, and so its last step depends on the number of processes. Where the length of the data is not known, nor are repeats.
    """
    remainder = _remainder(accelerator)
    if remainder is None:
        return labels
    real = max(0, remainder - accelerator.process_index // copies * len(labels))
    if real >= len(labels):
        return labels
    labels = labels.clone()
    labels[real:] = ignore_index
    return labels


def gather_once(accelerator: Accelerator, items: Any, copies: int = 1) -> Any:
    """The items [B, ...] of all processes in the order of the data, those of repeated rows and of copied batches once.

    Takes a tensor, or tensors in tuples, lists and dicts. `Accelerator.gather_for_metrics` takes copies for other examples,
    and so counts all but the last batch twice.
    """
    remainder = _remainder(accelerator)

    def once(every: Tensor) -> Tensor:
        if copies > 1:
            rows = len(every) // accelerator.num_processes
            every = every.unflatten(0, (-1, copies, rows))[:, 0].flatten(0, 1)
        return every if remainder is None else every[:remainder]

    return recursively_apply(once, accelerator.gather(items))


def check_parallelism(sequence: int, context: int) -> None:
    """Refuse to cut sequences among processes.

    Raises: ValueError for sequence parallelism, and for context parallelism, in which an evaluation would gather only the tokens
    of the first of every group. Its ring attention (torch 2.13) has operators for GPUs alone: no test could show it right.
    """
    if sequence > 1:
        raise ValueError(
            f"expected no sequence parallelism, got sp_size = {sequence}: there the Trainer reduces the model's own loss; set 1"
        )
    if context > 1:
        raise ValueError(
            f"expected no context parallelism, got cp_size = {context}: each process has other tokens of one sequence, which is "
            "not shown to be counted right; set 1 (shorter sequences, gradient checkpointing or FSDP spread the memory)"
        )


def forget_preparation(accelerator: Any, model: Any) -> None:
    """Let a later training wrap a model which was prepared for evaluation.

    accelerate >= 1.14 takes it as prepared for good and leaves it out of DDP, so that the processes drift apart in silence.
    """
    accelerator._models = [prepared for prepared in accelerator._models if prepared is not model]
    if getattr(model, "_is_accelerate_prepared", False):
        model._is_accelerate_prepared = False


@contextmanager
def evaluation_before_deepspeed(trainer: Any) -> Iterator[None]:
    """Evaluate a model which DeepSpeed has not seen yet, and let a later training make its own engine.

    Below stage 3 each process has all weights, so that no engine is needed (a Trainer refuses). In stage 3 a Trainer
    (transformers 5.24) keeps its engine for the evaluation, which has no optimizer, and deletes optimizer and schedule from the
    configuration: the first backward of a training is an AttributeError. The weights stay divided.
    """
    accelerator, config = trainer.accelerator, trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    before = copy.deepcopy(config.config)
    trainer.is_deepspeed_enabled = config.is_zero3()
    try:
        yield
    finally:
        trainer.is_deepspeed_enabled = True
        engine, trainer.deepspeed, trainer.model_wrapped = trainer.deepspeed, None, trainer.model
        if engine is not None:
            engine.destroy()
        forget_preparation(accelerator, trainer.model if engine is None else engine)
        config.config.clear()
        config.config.update(before)


def reshard(model: nn.Module) -> None:
    """Give back the weights which FSDP2 keeps gathered after a forward (head, last norm, root).

    An optimizer which is made while they are gathered holds tensors that no forward reads again: they are never trained.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _remainder(accelerator: Accelerator) -> int | None:
    """How many examples there are in the last batches of all processes; None before those, or without repeats."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader:
        return None
    remainder = state.remainder if state.remainder >= 0 else _remainder_after_skipping(state.active_dataloader)
    return remainder if remainder > 0 else None


def _remainder_after_skipping(loader: Any) -> int:
    """The remainder of the loader of a training resumed in mid-epoch, 0 where nothing is repeated.

    `skip_first_batches` wraps the sampler which knows the batch size, and then accelerate (1.15) finds no remainder.
    """
    sampler = loader.sampler if isinstance(loader.sampler, BatchSampler) else loader.batch_sampler
    whole = sampler.batch_sampler if isinstance(sampler, SkipBatchSampler) else None
    if not isinstance(whole, BatchSamplerShard) or whole.drop_last or whole.batch_size is None:
        return 0
    return len(loader.dataset) % (whole.batch_size * (1 if whole.split_batches else whole.num_processes))
