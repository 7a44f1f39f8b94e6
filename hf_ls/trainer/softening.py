"""Which techniques make the training target softer, and that they do not meet by accident.

Owns: their names, for the card, and the refusal of two at once.
Does not own: any of them (`smoothing`, `objectives`, `adaptive`, `distillation`, `mixup`).

Label smoothing, its adaptive forms, the objectives which press confidence down, distillation and mixup all do the same thing
to the target: together they overshoot, and no result can be credited to one of them.
"""

from __future__ import annotations

from hf_ls.losses.smoothing import Smoothing
from hf_ls.trainer.criterion import ADAPTIVE, Criterion
from hf_ls.trainer.distillation import Distillation
from hf_ls.trainer.mixup import Mixup

_SMOOTHED = ("smoothed_ce", "generalised_smoothing")  # objectives which are label smoothing, no second technique


def techniques(
    smoothing: Smoothing,
    criterion: Criterion,
    distillation: Distillation | None = None,
    mixup: Mixup | None = None,
) -> list[str]:
    """The target-softening techniques in effect, each in a few words; empty for the plain cross entropy.

    >>> techniques(Smoothing(0.1), Criterion(Smoothing(0.1)), mixup=Mixup(0.2))
    ['label smoothing (ε = 0.1)', 'embedding mixup (α = 0.2, one λ per batch)']
    """
    found = []
    final = smoothing.schedule.final_epsilon if smoothing.schedule else 0.0
    if smoothing.epsilon or final:
        schedule = f", {smoothing.schedule.kind} schedule" if smoothing.schedule else ""
        found.append(f"label smoothing (ε = {smoothing.epsilon:g}{schedule})")
    if criterion.name in ADAPTIVE:
        found.append(f"{criterion.name} label smoothing")
    elif criterion.name not in _SMOOTHED:
        found.append(criterion.name)
    if distillation is not None:
        found.append(f"distillation (α = {distillation.alpha:g}, T = {distillation.temperature:g})")
    if mixup is not None:
        found.append(f"embedding mixup (α = {mixup.alpha:g}, one λ per {mixup.per})")
    return found


def check_combined(found: list[str], allowed: bool) -> None:
    """Refuse two target-softening techniques at once.

    Raises: ValueError naming them and the switch.
    """
    if len(found) > 1 and not allowed:
        raise ValueError(
            f"expected one target-softening technique, got {' and '.join(found)}: each of them makes the model less confident; "
            "drop all but one, or set allow_combined_softening=True to train with both"
        )
