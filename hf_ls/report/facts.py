"""What is known of data, smoothing and training of a measured model: plain records which a file gives back as they were.

A field which is None is not known or has no value; nothing is filled in for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

if TYPE_CHECKING:
    from hf_ls.losses.smoothing import Convention, Smoothing

Record = TypeVar("Record")


@dataclass(frozen=True)
class DatasetFacts:
    """The evaluated data.

    Args:
        name: for readers. split: the evaluated one. n: predictions, that is examples or, with rows of tokens, tokens.
        hub_id, config, revision: on the Hub; hub_id None when the data is on no Hub.
        named: the name was chosen for readers, and is not only that of a file: results may be published under it.
        class_counts: labels per class in the order of the report's `label_names`; None for a language model.
        n_train, n_validation: examples of the other splits. n_sequences: which the tokens are of.
        example: an input for the code in the card.
        counted: of conversations, which a chat template writes: whose tokens are learnt and measured; None for other data.
    """

    name: str
    split: str | None = None
    n: int | None = None
    hub_id: str | None = None
    config: str | None = None
    revision: str | None = None
    class_counts: list[int] | None = None
    licence: str | None = None
    n_train: int | None = None
    n_validation: int | None = None
    n_sequences: int | None = None
    example: str | None = None
    named: bool = False
    counted: str | None = None

    def __post_init__(self) -> None:
        """Make every value what JSON gives back."""
        make_plain(self)


@dataclass(frozen=True)
class AnswerFacts:
    """How a language model was asked, and what its probabilities of options are.

    Args:
        template: of the prompts. instruction: text before everything. few_shot: examples before each prompt.
        score: "text" or "letter" of an option; option_prefix: what stood before it. length_normalisation: "none", "tokens" or
            "characters".
        mass: mean probability of all options of a question together, before they were made to sum to 1.
    """

    template: str
    score: str = "text"
    option_prefix: str = " "
    length_normalisation: str = "none"
    instruction: str = ""
    few_shot: int = 0
    mass: float | None = None

    def __post_init__(self) -> None:
        """Make every value what JSON gives back."""
        make_plain(self)


@dataclass(frozen=True)
class HubFacts:
    """What only its user can say of a model on the Hub: licence and languages of the model, tags beside ours, its library.

    library: as the Hub calls it, None where it is not known. benchmark_task: of the data, where it is a benchmark of the Hub.
    """

    license: str | None = None
    language: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    library: str | None = "transformers"
    benchmark_task: str | None = None

    def __post_init__(self) -> None:
        """Make every value what JSON gives back."""
        make_plain(self)


@dataclass(frozen=True)
class SmoothingFacts:
    """How the targets of the published run were smoothed; `SmoothingFacts(None)` says that it is not known.

    Args:
        epsilon: the setting, that is the value at the start of a schedule; 0 for none. final_epsilon: where a schedule ends.
        convention: "all" or "wrong". prior: "uniform", or another one in words. excluded: labels without a loss, in words.
        schedule: "constant" (with warm-up), "linear" or "cosine"; None without. warmup_steps: ε is 0 in them.
        epsilon_at: what the first, the middle and the last step of a schedule trained with.
        num_classes: of the logits. over: what they are the logits of: "classes", the tokens of a "vocabulary", or of one "text".
        optimal_logit_gap (nats), max_confidence (0 to 1): of a model which meets its targets exactly, where these have one ε.
        item_by_item: the objective makes an ε for each item, and `epsilon` says nothing.

    Raises: ValueError for another convention or `over`.
    """

    epsilon: float | None
    convention: Convention | None = None
    prior: str | None = None
    schedule: str | None = None
    final_epsilon: float | None = None
    warmup_steps: int | None = None
    epsilon_at: list[float] | None = None
    num_classes: int | None = None
    over: Literal["classes", "vocabulary", "text"] = "classes"
    optimal_logit_gap: float | None = None
    max_confidence: float | None = None
    excluded: str | None = None
    item_by_item: bool = False

    def __post_init__(self) -> None:
        """Make every value what JSON gives back."""
        make_plain(self)
        for name, known in (("convention", ("all", "wrong", None)), ("over", ("classes", "vocabulary", "text"))):
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} in {known}, got {getattr(self, name)!r}; use one of them")

    @classmethod
    def of(
        cls,
        smoothing: Smoothing,
        num_classes: int | None,
        *,
        plain: bool = True,
        steps: tuple[int, int] | None = None,
        **more: Any,
    ) -> SmoothingFacts:
        """The facts of a `Smoothing` over `num_classes` logits.

        Args:
            plain: the loss is the smoothed cross entropy and nothing more, whose optimum is known in closed form.
            steps: optimizer steps done, and those planned which a schedule spans.
            more: other fields, e.g. excluded, or a prior in words.
        """
        schedule, fixed = smoothing.schedule, smoothing.schedule is None and smoothing.prior is None and plain
        at = None
        if schedule is not None and steps is not None and steps[0]:
            moments = sorted({0, (steps[0] - 1) // 2, steps[0] - 1})
            at = [round(smoothing.at(step, steps[1]).epsilon, 6) for step in moments]
        closed = fixed and num_classes is not None and num_classes > 1
        gap = smoothing.optimal_logit_gap(num_classes) if closed and smoothing.epsilon > 0 else None  # type: ignore[arg-type]
        fields = {
            "epsilon": smoothing.epsilon,
            "convention": smoothing.convention,
            "prior": "uniform" if smoothing.prior is None else "given by the user",
            "schedule": None if schedule is None else schedule.kind,
            "final_epsilon": None if schedule is None or schedule.kind == "constant" else schedule.final_epsilon,
            "warmup_steps": None if schedule is None else schedule.warmup_steps,
            "epsilon_at": at,
            "num_classes": num_classes,
            "optimal_logit_gap": gap,
            "max_confidence": smoothing.max_confidence(num_classes) if closed else None,  # type: ignore[arg-type]
        }
        return cls(**fields | more)

    @property
    def is_used(self) -> bool | None:
        """Whether any step smoothed; None where it is not known."""
        if self.item_by_item:
            return True
        values = [self.epsilon, self.final_epsilon] if self.epsilon_at is None else self.epsilon_at
        return None if self.epsilon is None else any(values)

    @property
    def epsilon_text(self) -> str:
        """Epsilon for tables and labels: "0.1", "0 → 0.4" with a schedule, "?" where it is not known."""
        if self.epsilon is None:
            return "?"
        end = "" if self.final_epsilon is None else f" → {self.final_epsilon:g}"
        return f"{self.epsilon:g}{end}"


@dataclass(frozen=True)
class TrainingFacts:
    """How the published run was trained.

    Args:
        seeds: one for each run behind the numbers. steps: optimizer steps done. global_batch: examples of one step.
        objective: by the names of `hf_ls.Objective`, with objective_params. techniques: all that changes the loss, in words.
        gradient_tolerance: the relative error which the gradients of the head were allowed, None for exact ones.
        teacher: name of a distillation teacher. class_weight: in words. peft: kind of adapters, None or "none" without.
        train_runtime_s: seconds, of all runs together.
    """

    seeds: list[int] | None = None
    steps: int | None = None
    epochs: float | None = None
    global_batch: int | None = None
    learning_rate: float | None = None
    lr_scheduler_type: str | None = None
    weight_decay: float | None = None
    optim: str | None = None
    mixed_precision: str | None = None
    gradient_tolerance: float | str | None = None
    objective: str | None = None
    objective_params: dict[str, Any] = field(default_factory=dict)
    techniques: list[str] = field(default_factory=list)
    teacher: str | None = None
    class_weight: str | None = None
    max_length: int | None = None
    model_config_overrides: dict[str, Any] = field(default_factory=dict)
    peft: str | None = None
    num_processes: int | None = None
    train_runtime_s: float | None = None

    def __post_init__(self) -> None:
        """Make every value what JSON gives back."""
        make_plain(self)

    @property
    def is_adapter(self) -> bool:
        """Whether adapters are saved rather than a whole model."""
        return self.peft not in (None, "none")


def make_plain(instance: Any) -> None:
    """Turn every field into what JSON gives back, so that a record equals itself after a round trip."""
    for name in (f.name for f in dataclasses.fields(instance)):
        object.__setattr__(instance, name, plain_value(getattr(instance, name), name))


def plain_value(value: Any, where: str) -> Any:
    """The value as JSON gives it back; NaN and infinity become None, records stay.

    Raises: TypeError for what JSON cannot hold, saying where it stands.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int) or dataclasses.is_dataclass(value):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        bad = [key for key in value if not isinstance(key, str)]
        if bad:
            raise TypeError(f"expected text as keys in {where}, got {bad[0]!r}; JSON has no other keys")
        return {str(key): plain_value(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"expected numbers, text or lists in {where}, got {type(value).__name__}; convert it")


def record(kind: type[Record], fields: Any, what: str) -> Record:
    """The record of JSON's fields.

    Raises: ValueError for a missing or unknown field.
    """
    known = dataclasses.fields(kind)  # type: ignore[arg-type]
    needed = [f.name for f in known if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    check_keys(fields, needed, what, tuple(f.name for f in known if f.name not in needed))
    return kind(**fields)


def check_keys(fields: Any, required: Any, what: str, optional: tuple[str, ...] = ()) -> None:
    """Refuse a mapping without some of the required keys or with others than the known ones.

    Raises: ValueError.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"expected {what} with keys {list(required)}, got {fields!r:.40}; pass a dict")
    missing = [key for key in required if key not in fields]
    unknown = [key for key in fields if key not in required and key not in optional]
    if missing or unknown:
        raise ValueError(
            f"expected {what} with keys {list(required)}, got missing {missing}, unknown {unknown}; "
            "was it written by another version of hf_ls?"
        )
