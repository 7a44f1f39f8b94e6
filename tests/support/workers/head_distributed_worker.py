"""What each process of a logits-free test run does; rank 0 writes terms, weights and gradients.

python -m torch.distributed.run --nproc_per_node 2 tests/support/workers/head_distributed_worker.py out.pt
The tests run the same functions in one process and compare. accelerate does not shard on a CPU, so FSDP2 is applied here
as accelerate does it: layer by layer, then the last norm and the head as one group, then the root.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import transformers as tf
from head_models import BATCH, batch, build
from helpers import Rows, arguments, collate
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer, Smoothing
from hf_ls.losses._checks import next_labels
from hf_ls.run.launch import end_processes
from hf_ls.trainer.logits_free import LogitsFreeHead
from hf_ls.trainer.shift import decoder_inputs

DDP = ("llama", "t5", "bart", "gemma2", "mixtral")
# name -> layers which FSDP shards one by one, and what shares a group with the head; T5's tied head stays in the root
FSDP: dict[str, tuple[str, list[str]]] = {
    "llama": ("LlamaDecoderLayer", ["model.norm", "lm_head"]),
    "gemma2": ("Gemma2DecoderLayer", ["model.norm", "model.embed_tokens", "lm_head"]),
    "t5": ("T5Block", []),
}
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)


def trained(name: str, world: int) -> dict[str, Any]:
    """Two optimizer steps of the Trainer over the same six rows, however they are shared out."""
    model, task = build(name)
    whole = batch(task)
    rows = Rows([{key: value[i] for key, value in whole.items()} for i in range(BATCH)])
    args = arguments(
        tempfile.mkdtemp(), LabelSmoothingArguments, per_device_train_batch_size=BATCH // world, label_smoothing_logits_free="on",
        label_smoothing_factor=0.1, max_steps=2, num_train_epochs=2,
    )  # fmt: skip
    trainer = LabelSmoothingTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)
    trainer.train()
    terms = [{k: r[k] for k in ("loss", "nll", "smoothing_term")} for r in trainer.state.log_history if "loss" in r]
    return {"terms": terms, "weights": {key: value.clone() for key, value in model.state_dict().items()}}


def sharded(name: str, half: bool = False) -> nn.Module:
    """The model under FSDP2 over all processes."""
    model, _ = build(name)
    layer, tail = FSDP[name]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = {"mesh": mesh, "mp_policy": HALF if half else MixedPrecisionPolicy()}
    for module in [m for m in model.modules() if type(m).__name__ == layer]:
        fully_shard(module, **policy)
    if tail:
        fully_shard([model.get_submodule(part) for part in tail], **policy, reshard_after_forward=False)
    return fully_shard(model, **policy)


def first_gradient(
    name: str, model: nn.Module, world: int, rank: int, half: bool = False, logits_free: bool = True
) -> dict[str, Any]:
    """Loss and gradient of six rows at epsilon 0.1, twice, so that sharded weights come and go; autocast as accelerate does."""
    inputs = batch(build(name)[1])
    labels = inputs.pop("labels")
    inputs = decoder_inputs(model, inputs, labels)
    labels = next_labels(labels) if build(name)[1] == "causal" else labels
    count = float((labels != -100).sum()) / world
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    inputs, labels = {key: value[mine] for key, value in inputs.items()}, labels[mine]
    head, loss = LogitsFreeHead(model), torch.zeros(())
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        head.probe(model, inputs, labels)
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            if logits_free:
                loss = head(model, inputs, labels, Smoothing(0.1), num_items_in_batch=count).loss
            else:
                logits = model(**inputs).logits.flatten(0, 1).float()
                loss = nn.functional.cross_entropy(logits, labels.flatten(), label_smoothing=0.1, reduction="sum") / count
        loss.backward()
    total = loss.detach() / world
    if world > 1:
        dist.all_reduce(total)
    return {"loss": float(total), "gradients": {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}}


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def main(path: str) -> None:
    """Run every case and save the results of rank 0."""
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    results: dict[str, Any] = {"ddp": {name: trained(name, 2) for name in DDP}, "fsdp": {}}
    rank = int(os.environ["RANK"])
    for name in FSDP:
        for half in (False, True):
            model = sharded(name, half)
            assert isinstance(model, FSDPModule)
            results["fsdp"][name, half] = first_gradient(name, model, 2, rank, half)
        results["fsdp"][name, "dense half"] = first_gradient(name, sharded(name, True), 2, rank, True, False)
    if rank == 0:
        torch.save(results, path)
    end_processes()


if __name__ == "__main__":
    main(sys.argv[1])
