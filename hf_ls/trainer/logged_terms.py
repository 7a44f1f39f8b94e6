"""The parts of the training loss as the log shows them.

Owns: their names, their means since the last log and over a whole training. Does not own: the parts (`criterion`), when there
is a log (`trainer`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_NAMES = ("nll", "smoothing_term", "distillation_term")  # the last only with a teacher


class LoggedTerms:
    """Sums of the terms of one training, nats; every process adds the same steps."""

    def __init__(self) -> None:
        self._since: Tensor | None = None
        self._first_step = 0
        self._nll, self._steps = 0.0, 0

    def add(self, terms: Tensor, step: int) -> None:
        """Count a micro-batch, whose terms have their share of the step `step`."""
        if self._since is None:  # the first since the last log
            self._since, self._first_step = torch.zeros_like(terms), step
        self._since += terms.detach()

    def take(self, step: int, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over the steps since the last call, by name; empty if there was none. All processes together."""
        if self._since is None:
            return {}
        steps = max(1, step - self._first_step)
        means = (gather(self._since[None]).mean(0) / steps).tolist()
        self._nll, self._steps, self._since = self._nll + means[0] * steps, self._steps + steps, None
        return dict(zip(_NAMES, means, strict=False))

    @property
    def nll(self) -> float | None:
        """The mean NLL over all steps taken so far; None without any."""
        return self._nll / self._steps if self._steps else None
