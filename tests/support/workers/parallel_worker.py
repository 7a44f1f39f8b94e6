"""What each process of a vocabulary-parallel test does; rank 0 writes losses and gradients.

python -m torch.distributed.run --nproc_per_node 4 tests/support/workers/parallel_worker.py out.pt
The four share one head, and then two pairs of them have a head each.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from linear_reference import K, N, prior_of, problem, terms_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hf_ls import linear_smoothed_cross_entropy
from hf_ls.losses.smoothing import Smoothing

SIZES = {2: (17, 14), 4: (11, 0, 19, 1)}  # rows of each process, one of them without any


def _weights() -> Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# name -> (Smoothing arguments, options of the loss, how the problem is made)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    f"{prior} {convention}": (dict(epsilon=0.1, convention=convention, prior=prior_of(prior)), {}, {})
    for prior in ("uniform", "explicit", "support", "rows")
    for convention in ("all", "wrong")
} | {
    "no smoothing": (dict(epsilon=0.0), {}, {}),
    "negative": (dict(epsilon=-0.2, allow_negative=True), {}, {}),
    "no bias": (dict(), {}, dict(bias=False)),
    "sum": (dict(), dict(reduction="sum"), {}),
    "none": (dict(), dict(reduction="none"), {}),
    "none weighted": (dict(), dict(reduction="none", token_weight=_weights()), {}),
    "count": (dict(), dict(num_items_in_batch=7.0), {}),
    "token weight": (dict(), dict(token_weight=_weights()), {}),
    "z-loss": (dict(), dict(z_loss=0.01), {}),
    "scale": (dict(prior=prior_of("explicit")), dict(logit_scale=0.3), {}),
    "softcap": (dict(convention="wrong"), dict(softcap=2.0, logit_scale=1.7), {}),
    "rows, softcap": (dict(prior=prior_of("rows")), dict(softcap=2.0), {}),
    "chunks of 5": (dict(prior=prior_of("explicit")), dict(chunk_rows=5, token_weight=_weights()), {}),
    "minus infinity": (dict(prior=prior_of("support")), {}, dict(masked=True)),
    "ignored": (dict(), {}, dict(ignored=True)),
    "half": (dict(prior=prior_of("explicit")), {}, dict(dtype=torch.bfloat16)),
    "single": (dict(prior=prior_of("explicit")), {}, dict(dtype=torch.float32)),
    "frozen head": (dict(), dict(reduction="none"), dict(frozen=("weight", "bias"))),
    "frozen hidden": (dict(), {}, dict(frozen=("hidden",))),
}  # fmt: skip


def made(case: str) -> tuple[dict[str, Any], Smoothing, dict[str, Any]]:
    """The whole problem of a case, its smoothing, and its options."""
    smoothing, options, how = CASES[case]
    inputs = problem(how.get("dtype", torch.float64), how.get("bias", True))
    if how.get("ignored"):
        inputs["labels"].fill_(-100)
    if how.get("masked"):  # classes 0 and 1 can never be predicted; the prior has no mass there
        inputs["labels"][(inputs["labels"] >= 0) & (inputs["labels"] < 2)] = K - 1
        inputs["bias"] = inputs["bias"].detach().index_fill(0, torch.tensor([0, 1]), -torch.inf).requires_grad_()
    for name in how.get("frozen", ()):
        inputs[name] = inputs[name].detach()
    return inputs, Smoothing(**(dict(epsilon=0.1) | smoothing)), options


def upstream(loss: Tensor) -> Tensor:
    """The same gradient of the loss on every process, not all ones."""
    return torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)


def shard(tensor: Tensor, rank: int, sizes: tuple[int, ...]) -> Tensor:
    return tensor.detach().split(sizes)[rank].clone().requires_grad_(tensor.requires_grad)


def solve(case: str, rank: int, sizes: tuple[int, ...], group: Any = None) -> dict[str, Any]:
    """Loss and gradients of one case, as every process has them; those of the shards put together."""
    inputs, smoothing, options = made(case)
    mine = {k: shard(v, rank, sizes) if k in ("weight", "bias") else v for k, v in inputs.items()}
    found = terms_of(**mine, smoothing=smoothing, group=group or dist.group.WORLD, **options)
    found.loss.backward(upstream(found.loss), retain_graph=True)
    first = {k: None if v.grad is None else v.grad.clone() for k, v in mine.items()}
    found.loss.backward(upstream(found.loss))  # a second backward computes again
    for name, gradient in first.items():
        if gradient is not None:
            torch.testing.assert_close(
                mine[name].grad, 2 * gradient, rtol=1e-2 if gradient.dtype == torch.bfloat16 else 1e-5, atol=1e-6
            )
    return whole({"loss": found.loss, "nll": found.nll, "smoothing_term": found.smoothing_term}, first, group)


def whole(terms: dict[str, Tensor], gradients: dict[str, Tensor | None], group: Any) -> dict[str, Any]:
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, {"terms": {k: v.detach() for k, v in terms.items()}, **gradients}, group=group)
    result: dict[str, Any] = {"terms": [one["terms"] for one in every], "hidden": [one["hidden"] for one in every]}
    for name in ("weight", "bias"):
        result[name] = None if every[0].get(name) is None else torch.cat([one[name] for one in every])
    return result


def as_dtensor(rank: int, world: int) -> dict[str, Any]:
    """The head as DTensors, divided as torch divides: the same numbers, and gradients which are DTensors."""
    inputs, smoothing, _ = made("explicit all")
    mesh = init_device_mesh("cpu", (world,))
    head = {k: distribute_tensor(inputs[k].detach(), mesh, [Shard(0)]).requires_grad_() for k in ("weight", "bias")}
    loss = linear_smoothed_cross_entropy(inputs["hidden"], labels=inputs["labels"], smoothing=smoothing, **head)
    loss.backward(upstream(loss))
    refused = []
    for wrong in (
        dict(weight=distribute_tensor(inputs["weight"].detach(), mesh, [Shard(1)])),
        dict(weight=distribute_tensor(inputs["weight"].detach(), mesh, [Replicate()])),
        dict(bias=distribute_tensor(inputs["bias"].detach(), mesh, [Replicate()])),
        dict(hidden=distribute_tensor(inputs["hidden"].detach(), mesh, [Replicate()])),
    ):
        try:
            linear_smoothed_cross_entropy(
                **({"hidden": inputs["hidden"], **head} | wrong), labels=inputs["labels"], smoothing=0.1
            )
        except ValueError as error:
            refused.append(str(error))
    return {
        "loss": loss.detach(), "hidden": inputs["hidden"].grad, "refused": refused,
        **{k: v.grad.full_tensor() for k, v in head.items()},
    }  # fmt: skip


def megatron(rank: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """The smoothed loss of Megatron's vocab_parallel_cross_entropy from its formula: the mean over the own shard only."""
    inputs, _, _ = made("uniform wrong")
    kept = inputs["labels"] >= 0
    y, z = inputs["labels"][kept], (inputs["hidden"][kept] @ inputs["weight"].T + inputs["bias"]).detach()
    p = z.softmax(1)
    here, s = torch.tensor(range(sum(sizes))).split(sizes)[rank], 0.1 * sizes[rank] / (sizes[rank] - 1)
    loss = ((1 - s) * -p.gather(1, y[:, None]).log().squeeze(1) - s * p[:, here].log().mean(1)).mean()
    own = torch.nn.functional.one_hot(y, sum(sizes))[:, here].to(z)
    gradient = p[:, here] - (1 - s) * own - s / sizes[rank]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (loss, gradient))
    return {"losses": torch.stack([one[0] for one in every]), "gradient": torch.cat([one[1] for one in every], 1)}


def needing_all_logits(rank: int, sizes: tuple[int, ...]) -> dict[str, str]:
    inputs, smoothing, _ = made("uniform all")
    mine = {k: shard(v, rank, sizes) if k in ("weight", "bias") else v for k, v in inputs.items()}
    found = {}
    for name in ("objective", "observer"):
        try:
            terms_of(**mine, smoothing=smoothing, group=dist.group.WORLD, **{name: lambda z, y: z.sum(1)})
        except ValueError as error:
            found[name] = str(error)
    return found


def main(path: str) -> None:
    """Run every case and save the results of rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results: dict[str, Any] = {}
    for case in CASES:
        results[case, 4] = solve(case, rank, SIZES[4])
        results[case, 2] = solve(case, rank % 2, SIZES[2], pairs[rank // 2])
    results["alone"] = linear_smoothed_cross_entropy(**problem(), smoothing=0.1).detach()
    results["needs all logits"] = needing_all_logits(rank, SIZES[4])
    results["dtensor"] = as_dtensor(rank, world)
    results["megatron"] = megatron(rank, (8, 8, 8, 7))
    dist.barrier()
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1])
