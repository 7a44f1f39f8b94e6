"""What `--help` says: a line a setting, label smoothing first, the Trainer's usual ones last; `--help_all` says all of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields
from textwrap import wrap
from typing import Any

from transformers import TrainingArguments

WIDTH = 118
# Of the many settings of transformers' TrainingArguments those which most runs set.
_USUAL = (
    "output_dir", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "bf16", "use_cpu", "eval_strategy", "eval_steps",
    "load_best_model_at_end", "metric_for_best_model", "predict_with_generate", "resume_from_checkpoint", "report_to",
    "push_to_hub",
)  # fmt: skip
_TITLES = {
    "ModelArguments": "Model", "DataArguments": "Data", "RunArguments": "What to run", "CardArguments": "Model card",
    "TrainingQuestions": "Questions to a language model (--help_all: how they are read)",
}  # fmt: skip
_FEW = ("TrainingQuestions",)  # of which the short help shows what the class adds to its parent


def show_help(parser: Any, *, everything: bool) -> str:
    """The help of a parser of dataclasses; everything: with whole sentences and the settings which few runs set."""
    known = {_name(action): action for action in parser._actions if action.option_strings}
    lines = [f"usage: {parser.prog} [--config file.yaml] [--setting value ...]" if "config" in known else _usage(parser, known)]
    for title, names in _sections(parser, everything):
        shown = [name for name in names if name in known]
        if shown:
            lines += [f"{title}:", *(line for name in shown for line in _lines(known[name], everything))]
    rest = [name for name in ("config", "help", "help_all", "version") if name in known]
    lines += ["Help:", *(line for name in rest for line in _lines(known[name], everything))]
    if not everything and any(issubclass(kind, TrainingArguments) for kind in parser.dataclass_types):
        lines.append("--help_all shows every setting of transformers.TrainingArguments too; all can stand in the YAML file.")
    if parser.epilog:
        lines += wrap(parser.epilog, WIDTH)
    return "\n".join(lines) + "\n"


def _usage(parser: Any, known: dict[str, argparse.Action]) -> str:
    needed = [f"--{name} ..." for name, action in known.items() if action.required]
    return " ".join([f"usage: {parser.prog}", *needed, "[--setting value ...]"])


def _sections(parser: Any, everything: bool) -> Iterator[tuple[str, list[str]]]:
    """Title and settings of each group, in order."""
    training = [kind for kind in parser.dataclass_types if issubclass(kind, TrainingArguments)]
    for kind in training:
        theirs = {setting.name for base in kind.__mro__[1:] for setting in _plain_fields(base)}
        own = [setting.name for setting in fields(kind) if setting.name not in theirs]
        yield "Label smoothing, and what else softens targets", ["label_smoothing_factor", *own]
    for kind in parser.dataclass_types:
        if kind not in training:
            names = sorted((setting.name for setting in fields(kind)), key=lambda name: name not in kind.__annotations__)
            if kind.__name__ in _FEW and not everything:
                names = [name for name in names if name in kind.__annotations__]
            yield _TITLES.get(kind.__name__, "Settings"), names
    for kind in training:
        yield "Training (of transformers)", list(_USUAL)
        if everything:
            said = {name for _, names in _sections(parser, False) for name in names}
            yield "Training, the rest", [setting.name for setting in fields(kind) if setting.name not in said]


def _plain_fields(kind: type) -> tuple[Any, ...]:
    """The fields of a class of transformers; none of one of ours."""
    return fields(kind) if kind.__module__.startswith("transformers.") and issubclass(kind, TrainingArguments) else ()


def _name(action: argparse.Action) -> str:
    """The long name of a setting, not an alias of it."""
    names = [option.lstrip("-") for option in action.option_strings]
    return action.dest if action.dest in names else names[-1]


def _lines(action: argparse.Action, everything: bool) -> list[str]:
    default = action.default
    shown = "" if default in (None, False, "", argparse.SUPPRESS) or default == [] or default == {} else _word(default)
    name = f"  --{_name(action)}{f' [{shown}]' if shown else ''}"
    text = " ".join(str(action.help or "").replace("%%", "%").split())
    if everything:
        return [name, *wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    line = f"{name:<38} {text}"
    return [line if len(line) <= WIDTH else line[: WIDTH - 1].rstrip() + "…"]


def _word(value: Any) -> str:
    """A default as it would be given."""
    if isinstance(value, list | tuple):
        return " ".join(map(_word, value))
    return str(getattr(value, "value", value))


class ShowAll(argparse.Action):
    """`--help_all`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print everything and end."""
        print(show_help(parser, everything=True), end="")
        parser.exit()
