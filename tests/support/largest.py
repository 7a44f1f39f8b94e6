"""Memory as a test sees it: the tensors which operations make."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor which any operation makes, of one dtype or any, and every shape made."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype, self.elements = dtype, 0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and self.dtype in (None, tensor.dtype):
                self.elements = max(self.elements, tensor.numel())
                self.shapes.add(tuple(tensor.shape))
        return out
