"""Per-item evaluation statistics on torch tensors, before anything is gathered.

Owns: the reduction of logits to four numbers per item.
Does not own: the sums and metrics made of them (`metrics`).
"""

from __future__ import annotations

import torch
from torch import Tensor

# At a vocabulary of 128k this is 32 rows in float64: 32 MiB however long the batch is.
_CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def item_statistics(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, temperature: float = 1.0) -> Tensor:
    """Confidence, correctness, NLL and Brier score of each prediction, float64 [..., 4]; NaN rows where ignored.

    With z = logits / temperature and p = softmax z: confidence = max p (0 to 1); correct = 1 if arg max p = y (the first of
    equals); nll = lse(z) − z_y in nats; brier = 1 − 2·p_y + Σ p² (0 to 2, lower is better).
    Shapes: logits [..., K], labels [...].
    Rows are reduced in chunks, so memory does not grow with the number of tokens.

    Raises: ValueError for labels outside [0, K) other than `ignore_index`, and for NaN logits.
    """
    num_classes = logits.shape[-1]
    flat, y = logits.reshape(-1, num_classes), labels.reshape(-1)
    kept = y != ignore_index
    if bool((kept & ((y < 0) | (y >= num_classes))).any()):
        raise ValueError(f"expected labels in [0, {num_classes}) or {ignore_index}, got others; map class names to ids 0..K-1")
    dtype = torch.float64 if logits.device.type != "mps" else torch.float32
    out = torch.full((y.numel(), 4), float("nan"), dtype=dtype, device=logits.device)
    rows = kept.nonzero().squeeze(1)
    for chunk in rows.split(max(1, _CHUNK_ELEMENTS // num_classes)):
        z = flat[chunk].to(dtype) / temperature
        log_normaliser = z.logsumexp(-1)
        if bool(log_normaliser.isnan().any()):
            raise ValueError("expected finite logits, got NaN; the model diverged: lower the learning rate")
        top, prediction = z.max(-1)
        nll = log_normaliser - z.gather(-1, y[chunk].unsqueeze(-1)).squeeze(-1)
        squares = ((2 * z).logsumexp(-1) - 2 * log_normaliser).exp()
        confidence = (top - log_normaliser).exp()
        out[chunk] = torch.stack([confidence, (prediction == y[chunk]).to(dtype), nll, 1 - 2 * (-nll).exp() + squares], -1)
    return out.reshape(*labels.shape, 4)
