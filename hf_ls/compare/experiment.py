"""The comparison from the command line to its files: baseline, smoothing and temperature, everything else held fixed.

`run_comparison` is the order of its steps: data, cells, the check that they differ in their loss alone, statistics, page.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hf_ls.common.errors import read_json
from hf_ls.common.files import locked, write_atomically
from hf_ls.common.privacy import token_in_environment, without_secrets, yaml_without_secrets
from hf_ls.common.settings import check_same, settings_of
from hf_ls.compare.cells import Cell, Spec, cell_config, commands, run_cells
from hf_ls.compare.comparison import TEST, Comparison
from hf_ls.compare.data import CompareData, prepare_data
from hf_ls.compare.page import Facts, print_comparison, write_report
from hf_ls.compare.results import Answers, Predictions, Sequences, clearly_worse
from hf_ls.compare.statistics import compare
from hf_ls.losses.smoothing import Smoothing
from hf_ls.metrics.ceiling import ceiling_warning, last_epsilon
from hf_ls.report.calibration_report import BASELINE, REPORT, CalibrationReport
from hf_ls.report.plots import write_plots
from hf_ls.run.arguments import about
from hf_ls.run.config import Config, Parser, parse_config
from hf_ls.run.loading import load
from hf_ls.run.outcome import ANSWERS
from hf_ls.run.publish import folder_of, pictures_of
from hf_ls.run.tasks import TASKS
from hf_ls.run.training import rehearse
from hf_ls.trainer.arguments import smoothing_of
from hf_ls.trainer.criterion import Criterion, parse_params

_SETTINGS_FILE = "compare.json"
_GRID = (0.0, 0.05, 0.1, 0.2)
_SEARCH_GRID = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)


@dataclass
class CompareArguments:
    """What is compared; every setting of finetune.py can stand beside these and holds for all runs."""

    epsilons: list[float] = field(default_factory=list, metadata=about("The grid of epsilon; 0, the baseline, is always there."))
    epsilon: Literal["grid", "auto"] = field(
        default="grid", metadata=about("auto: drop what is clearly worse on validation after each seed.")
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata=about("Each is one run of every variant."))
    objectives: list[str] = field(
        default_factory=list, metadata=about("Further objectives, e.g. maxsup focal 'focal={\"gamma\": 3}'.")
    )
    flip_labels: float = field(default=0.0, metadata=about("Share of training labels moved to another class, of texts."))
    ood_sources: list[str] = field(default_factory=list, metadata=about("Embedded data: keep these from training, test on them."))
    ood_file: list[str] = field(default_factory=list, metadata=about("Further test sets, as name=path.csv."))
    ood_samples: int = field(default=1000, metadata=about("Examples kept of each out-of-domain set."))
    jobs: int | None = field(
        default=None, metadata=about("Runs at the same time; one a GPU, or one for two cores, if not given.")
    )
    repetitions: int = field(default=1000, metadata=about("Bootstrap repetitions, of texts and of answers."))
    print_cells: bool = field(
        default=False, metadata=about("Train nothing here: print a command for each run, for any machine which sees output_dir.")
    )

    def __post_init__(self) -> None:
        grid = self.epsilons or (_SEARCH_GRID if self.epsilon == "auto" else _GRID)
        if self.print_cells and self.epsilon == "auto":
            raise ValueError("expected --epsilon grid with --print_cells, got auto, where a seed decides the next ones; drop one")
        self.grid = sorted({0.0, *grid})
        if any(not 0 <= epsilon < 1 for epsilon in grid) or len(set(grid)) != len(grid):
            raise ValueError(f"expected different epsilons in [0, 1), got {self.epsilons}; 0 0.05 0.1 0.2 is a usual grid")
        if len(self.grid) == 1 and not self.objectives:
            raise ValueError("expected an epsilon above 0 or objectives, got the baseline alone; add --epsilons 0.1")
        if not self.seeds or any(seed < 0 for seed in self.seeds) or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"expected different seeds of 0 or more, got {self.seeds}; 0 1 2 is a usual choice")
        if not 0 <= self.flip_labels < 1:
            raise ValueError(f"expected 0 <= flip_labels < 1, got {self.flip_labels}; 0.2 flips one label in five")
        for name in ("jobs", "ood_samples", "repetitions"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}; leave it out for the default")
        pairs = [tuple(text.split("=", 1)) for text in self.ood_file]
        self.ood = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
        names = [*self.ood, *self.ood_sources]
        if len(self.ood) != len(self.ood_file) or any(not name.isidentifier() for name in names) or len(set(names)) < len(names):
            raise ValueError(f"expected different names as in name=path.csv, got {[*self.ood_file, *self.ood_sources]}; rename")
        if {"test", "validation", "train"} & set(names):
            raise ValueError(f"expected other names than those of the splits, got {names}; rename")


def comparison_parser() -> Parser:
    """Of what is compared; the settings which the runs share have a parser of their own."""
    return Parser(
        [CompareArguments],
        allow_abbrev=False,
        epilog="Every setting of finetune.py can be given too (see its --help), also from --config file.yaml.",
    )


def parse_compare(argv: Sequence[str]) -> tuple[CompareArguments, Config, list[str]]:
    """What is compared, the settings shared by all runs, and the arguments these came from.

    Raises: ValueError as `parse_config`, and for settings which would make the comparison unfair.
    """
    options, rest = comparison_parser().parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    config = parse_config(rest)
    if config.run.task != "text-classification":
        for name, default in (("flip_labels", 0.0), ("ood_sources", []), ("repetitions", 1000)):
            if name == "repetitions" and config.asks:  # answers are drawn as texts are
                continue
            if (value := getattr(options, name)) != default:
                raise ValueError(
                    f"expected {name} only with task text-classification, got {value} with {config.run.task}; drop it"
                )
    if config.run.early_stopping_patience is not None:
        raise ValueError(
            "expected no early_stopping_patience, got one: runs would differ in their steps; set num_train_epochs and, to keep "
            "the best epoch of each, load_best_model_at_end with metric_for_best_model: nll"
        )
    if config.training.label_smoothing_objective != "smoothed_ce" or config.training.label_smoothing_objective_params:
        raise ValueError("expected objectives in --objectives, got label_smoothing_objective; drop it")
    if config.trains_on_soft_labels:
        raise ValueError(
            f"expected labels to learn, got soft_label_columns {config.data.soft_label_columns}, on which no cell would train; "
            "add --soft_labels evaluate to learn their most frequent class, or use hf-ls finetune, which has a row of each"
        )
    if config.training.distillation_teacher or config.training.mixup_alpha:
        raise ValueError(
            "expected no distillation_teacher or mixup_alpha, got one: the baseline would be trained with it too; use "
            "scripts/finetune.py --with_baseline"
        )
    if config.training.resume_from_checkpoint or config.run.overwrite_output_dir:
        raise ValueError(
            "expected no resume_from_checkpoint or overwrite_output_dir, got one: finished runs in output_dir are always kept; "
            "give another output_dir to start afresh"
        )
    for cell in plan(options, options.seeds[0]):  # before anything is written
        Criterion(Smoothing(cell.epsilon), cell.objective, parse_params(cell.params))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("expected one process, got several; start it with python, it starts its own: --jobs")
    return options, config, rest


def plan(options: CompareArguments, seed: int) -> list[Cell]:
    """The cells of one seed, baseline first."""
    smoothed = [Cell("smoothed" if e else BASELINE, "smoothed_ce", None, e, seed) for e in options.grid]
    others = []
    for text in options.objectives:
        name, _, params = text.partition("=")
        named = "".join(f" {key}={value}" for key, value in parse_params(params).items())
        others.append(Cell(f"{name}{named}", name, params or None, 0.0, seed))
    cells = [*smoothed, *others]
    if len({cell.name for cell in cells}) < len(cells):
        raise ValueError(f"expected different objectives, got {options.objectives}; drop the repeated ones")
    return cells


def run_comparison(options: CompareArguments, config: Config, argv: Sequence[str]) -> Comparison | None:
    """Run every cell, compare, and leave `report.json` and `report.html` in output_dir; None after a dry run.

    With `print_cells` it only prepares what the cells read, and prints a command for each which is not finished; None.

    Raises: ValueError for settings other than those of the folder, for cells which differ in more than their loss, and while
    another comparison works in the folder; CellFailed for a cell which did not finish.
    """
    folder = folder_of(config).absolute()
    with token_in_environment(config.training):  # where the cells find it: what they are told lies in files
        if config.run.dry_run:
            _rehearse(options, config, argv, folder)
            return None
        if options.print_cells:
            _print_cells(options, config, argv, folder)
            return None
        with locked(folder / ".lock", "wait for the other comparison, or give another output_dir"):
            return _run(options, config, argv, folder)


def _print_cells(options: CompareArguments, config: Config, argv: Sequence[str], folder: Path) -> None:
    """A command a line on the standard output, and nothing else there."""
    with locked(folder / ".lock", "wait for the other comparison, or give another output_dir"):
        with redirect_stdout(sys.stderr):
            data, _, specs = _prepare(options, config, argv, folder)
            threads = _keep_settings(folder, _settings(options, config, data), _share(options.jobs)[1])
            for spec in specs.values():
                cell_config(config, spec, folder)
            lines = commands(list(specs.values()), folder / "cells", threads)
            _announce(
                f"{len(specs) - len(lines)} of {len(specs)} cells are finished or at work; once all are finished, the same line "
                "without --print_cells compares them"
            )
        for line in lines:
            _announce(line)


def _rehearse(options: CompareArguments, config: Config, argv: Sequence[str], folder: Path) -> None:
    """All that comes before the first step of the first cells, in another folder: nothing is left of it.

    One cell of each objective is rehearsed as `finetune` rehearses a run; others differ from it in numbers which are checked.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        data, cells, specs = _prepare(options, config, argv, Path(elsewhere))
        _saved_settings(folder, _settings(options, config, data))
        configs = {cell: cell_config(config, spec, Path(elsewhere)) for cell, spec in specs.items()}
        objectives = {cell.objective: configs[cell] for cell in reversed(cells[options.seeds[0]])}
        loaded = load(next(iter(objectives.values())))  # the files are those of the seed
        model = [rehearse(one, loaded) for one in objectives.values()][-1]
    what = f"{loaded.sizes}; {type(model).__name__}, {model.num_parameters():,} weights"
    _announce(f"dry run: {len(specs)} runs; {what}; settings are sound")


def _prepare(
    options: CompareArguments, config: Config, argv: Sequence[str], folder: Path
) -> tuple[CompareData, dict[int, list[Cell]], dict[Cell, Spec]]:
    """The data, written to `folder`; the cells of each seed; what the process of each is told."""
    data = prepare_data(
        config, folder / "data", options.seeds,
        flip_labels=options.flip_labels, ood_sources=options.ood_sources, ood_files=options.ood,
        ood_samples=options.ood_samples,
    )  # fmt: skip
    cells = {seed: plan(options, seed) for seed in options.seeds}
    return data, cells, {cell: _spec(cell, argv, config.run.task, folder, data) for row in cells.values() for cell in row}


def _run(options: CompareArguments, config: Config, argv: Sequence[str], folder: Path) -> Comparison:
    data, cells, specs = _prepare(options, config, argv, folder)
    jobs, threads = _share(options.jobs)
    threads = _keep_settings(folder, _settings(options, config, data), threads)
    for spec in specs.values():
        cell_config(config, spec, folder)  # every refusal before the first step
    dropped: dict[float, str] = {}
    kind = Sequences if TASKS[config.run.task].per_token else Predictions
    predictions: dict[Cell, Predictions | Sequences] = {}
    judged: dict[Cell, Predictions | Sequences] = {}  # of the same cells, by their answers where there are questions
    left: dict[Cell, dict[str, Any]] = {}
    # All seeds at once, or one after the other where the earlier ones decide what is worth another run.
    for batch in [[seed] for seed in options.seeds] if options.epsilon == "auto" else [options.seeds]:
        wanted = [cell for seed in batch for cell in cells[seed] if cell.epsilon not in dropped]
        left |= run_cells([specs[cell] for cell in wanted], folder / "cells", jobs=jobs, threads=threads, announce=_announce)
        check_fingerprints(left)
        places = {cell: folder / "cells" / cell.name for cell in wanted}
        predictions |= {cell: kind.load(cell, place) for cell, place in places.items()}
        if data.questions:
            judged |= {cell: Answers.load(cell, place / ANSWERS, tokens=predictions[cell]) for cell, place in places.items()}
        else:
            judged = predictions
        if options.epsilon == "auto" and batch[-1] != options.seeds[-1]:
            dropped |= _drop(judged, dropped, batch[-1])
    kept = [cell for cell in predictions if cell.epsilon not in dropped]
    compared = [predictions[cell] for cell in kept]
    made = {cell: judged[cell].results() for cell in kept}
    results = [result for of_cell in made.values() for result in of_cell]
    more: dict[str, Any] = {"quality": judged[kept[0]].quality, "repetitions": options.repetitions}
    if data.questions:
        of_tokens = {cell: predictions[cell].results() for cell in kept}
        tokens = compare([result for of_cell in of_tokens.values() for result in of_cell], quality=compared[0].quality)
        more |= {"what": "questions", "guessing": data.guessing, "tokens": tokens}
    comparison = compare(results, **more)
    unfitted = [cell.name for cell, rs in made.items() if any(r.variant.tempered and r.temperature == 1.0 for r in rs)]
    noted = [*dropped.values(), *_blocks(comparison.tokens or comparison, data)]
    if data.questions and "validation" not in data.questions:
        noted.append(
            "There are no questions of validation: no temperature of the answers was fitted, and the NLL of the tokens picked "
            "the variant; give validation_question_file."
        )
    facts = _facts(options, config, data, compared, noted, unfitted, left)
    pictures = _pictures(cells[options.seeds[0]], comparison, folder)
    write_report(comparison, results, facts, folder, pictures)
    print_comparison(comparison, facts)
    print(f"Report: {folder / 'report.html'}", flush=True)
    return comparison


def check_fingerprints(left: Mapping[Cell, Mapping[str, Any]]) -> None:
    """Assert that all cells of a seed started from the same weights, saw the same batches and took as many steps.

    Raises: ValueError which names the first two cells that differ, and in what.
    """
    first: dict[int, tuple[Cell, Mapping[str, Any]]] = {}
    remedies = {
        "weights": "the model must start from a fixed seed or checkpoint",
        "inputs": "data order or tokenisation must not depend on the loss",
        "batches": "give all runs the same length",
        "steps": "set num_train_epochs or max_steps and no early stopping",
    }
    for cell, found in left.items():
        fingerprint = found["fingerprint"] | {name: found.get(name) for name in ("device", "threads", "processes")}
        reference, expected = first.setdefault(cell.seed, (cell, fingerprint))
        for name, value in expected.items():
            if fingerprint[name] != value:
                raise ValueError(
                    f"expected the same {name} in {reference.name} and {cell.name}, got {value} and {fingerprint[name]}: they "
                    f"differ in more than their loss; {remedies.get(name, 'run all cells of a seed on machines which are alike')}"
                )


def _spec(cell: Cell, argv: Sequence[str], task: str, folder: Path, data: CompareData) -> Spec:
    files = {"train": str(data.train[cell.seed]), **{split: str(path) for split, path in data.others.items()}}
    frozen = [*_with_frozen_config(argv, folder), f"--task={task}"]  # which may have been guessed from a file that is not there
    ood, questions = ({name: str(path) for name, path in of.items()} for of in (data.ood, data.questions))
    return Spec(cell, frozen, files, data.columns, ood, questions)


def _with_frozen_config(argv: Sequence[str], folder: Path) -> list[str]:
    """The arguments without secrets, the YAML file replaced by a copy, so that nobody can edit it between two cells."""
    out = without_secrets(argv)
    for i, word in enumerate(out):
        path = word.removeprefix("--config=") if word.startswith("--config=") else out[i + 1] if word == "--config" else None
        if path is None:
            continue
        copy = folder / "config.yaml"
        text = yaml_without_secrets(Path(path).read_text(encoding="utf-8"))
        if not copy.is_file() or copy.read_bytes() != text.encode():
            write_atomically(copy, text)
        out[i : i + (1 if "=" in word else 2)] = [f"--config={copy}"]
        break
    return out


def _settings(options: CompareArguments, config: Config, data: CompareData) -> dict[str, Any]:
    """What decides the result, as JSON holds it."""
    return settings_of(options, *config.parts, data=data.hashes)


def _saved_settings(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier start noted in this folder, None in a fresh one.

    Raises: ValueError for other settings than those of the comparison in the folder, and for another run in it.
    """
    path = folder / _SETTINGS_FILE
    if path.is_file():
        saved = read_json(path, "give another output_dir")
        if not isinstance(saved.get("settings"), dict) or not isinstance(saved.get("threads"), int):
            raise ValueError(f"expected the settings and threads of a comparison in {path}, got others; give another output_dir")
        check_same(saved["settings"], settings, f"the comparison in {folder}", "restore them or give another output_dir")
        return saved
    if (folder / REPORT).exists() or any(folder.glob("checkpoint-*")):
        raise ValueError(f"expected an output_dir without another run, got {folder}; give another output_dir")
    return None


def _keep_settings(folder: Path, settings: dict[str, Any], threads: int) -> int:
    """Note the settings of this folder, or check them; the threads of a cell stay those of the first start.

    Raises: ValueError as `_saved_settings`.
    """
    if (saved := _saved_settings(folder, settings)) is not None:
        return int(saved["threads"])
    write_atomically(folder / _SETTINGS_FILE, json.dumps({"settings": settings, "threads": threads}, indent=1) + "\n")
    return threads


def _share(jobs: int | None) -> tuple[int, int]:
    """Runs at the same time, and the threads of each."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or torch.cuda.device_count() or max(1, cores // 2)
    return jobs, max(1, cores // jobs)


def _drop(predictions: Mapping[Cell, Predictions | Sequences], dropped: Mapping[float, str], seed: int) -> dict[float, str]:
    grid: dict[float, list[Predictions | Sequences]] = {}
    for cell, found in predictions.items():
        if cell.objective == "smoothed_ce" and cell.epsilon not in dropped:
            grid.setdefault(cell.epsilon, []).append(found)
    reasons = {
        epsilon: f"ε={epsilon:g} was dropped after seed {seed}: its validation NLL is {difference:.3f} nats above the best "
        f"(at least {low:.3f} with 99 % confidence)."
        for epsilon, (difference, low) in clearly_worse(grid).items()
    }
    for reason in reasons.values():
        _announce(reason)
    return reasons


def _facts(
    options: CompareArguments,
    config: Config,
    data: CompareData,
    compared: Sequence[Predictions | Sequences],
    noted: list[str],
    unfitted: list[str],
    left: Mapping[Cell, Mapping[str, Any]],
) -> Facts:
    """What the report says beside the numbers."""
    smoothing = smoothing_of(config.training)
    baselines = [found for found in compared if found.cell.variant == BASELINE]
    accuracy = 1 - sum(found.validation_error for found in baselines) / len(baselines)
    grid = {found.cell.epsilon for found in compared if found.cell.epsilon}
    asked = [last_epsilon(epsilon, smoothing.schedule) for epsilon in grid]
    n, who = int((baselines[0].count > 0).sum()), "the baseline on validation"
    warning = ceiling_warning(asked, smoothing.convention, accuracy, n, baselines[0].num_classes, who)
    warnings = [*noted, *([f"{warning[0].upper()}{warning[1:]}."] if warning else [])]
    if unfitted:
        warnings.append(f"No finite temperature could be fitted on validation for {', '.join(unfitted)}; 1 was used.")
    first = next(iter(left.values()))
    return Facts(
        title=folder_of(config).name,
        model=config.model.model_type or config.model.model_name_or_path,
        data=data.name,
        sizes=data.sizes,
        label_names=list(data.label_names),
        flip_labels=options.flip_labels,
        convention=smoothing.convention,
        steps=int(first["fingerprint"]["steps"]),
        warnings=warnings,
        runs=len(left),
        seconds=sum(float(found["seconds"]) for found in left.values()),
        settings={
            "epochs": config.training.num_train_epochs,
            "learning rate": config.training.learning_rate,
            "batch": config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps,
            "device": first["device"],
        },
    )


def _blocks(comparison: Comparison, data: CompareData) -> list[str]:
    """A warning where there are more rows of tokens than examples."""
    units, n = comparison.clusters.get(TEST, 0), data.sizes[TEST]
    if units <= n:
        return []
    return [
        f"The {n:,} documents of {TEST} are {units:,} rows of tokens, which count as independent: the intervals are too narrow; "
        "a larger max_length helps."
    ]


def _pictures(cells: Sequence[Cell], comparison: Comparison, folder: Path) -> list[Path]:
    """Of the baseline and ε = 0.1 (Müller's own), else the ε which validation picked, in one seed; none without such a cell."""
    wanted = [0.1, *([comparison.picked.epsilon] if comparison.picked else [])]
    smoothed = next((cell for e in wanted for cell in cells if cell.epsilon == e > 0), None)
    if smoothed is None:
        return []
    folders = [folder / "cells" / cell.name for cell in (cells[0], smoothed)]
    first, second = (CalibrationReport.load(path / REPORT) for path in folders)
    both = replace(second, rows=[*first.rows, *second.rows], history=first.history | second.history)
    names = [BASELINE, smoothed.variant]
    while_training = write_plots(both, folder / "pictures", only=["calibration_steps.png"])
    return [*while_training, *pictures_of(both, dict(zip(names, folders, strict=True)), folder / "pictures")]


def _announce(text: str) -> None:
    print(text, flush=True)
