"""What one finished run shows: its evaluation on validation and test, the rows made of it, and the files which keep it.

`outcome.json` is written last and says that the run is complete.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_utils import PredictionOutput

from hf_ls.answers.reading import QuestionArguments, QuestionData
from hf_ls.answers.scoring import option_scores
from hf_ls.calibration.temperature import NoFiniteTemperature
from hf_ls.common.errors import read_json
from hf_ls.common.files import write_arrays, write_atomically
from hf_ls.data.predictions import read_predictions, splits_in
from hf_ls.data.soft_labels import SOFT
from hf_ls.data.splitting import longest_first
from hf_ls.metrics.classes import CLASS_SCORES
from hf_ls.metrics.paired import Draws, draws_as_arrays, draws_from_arrays, draws_of_tokens
from hf_ls.metrics.text import draws_of_texts, signature, text_metrics
from hf_ls.report.build import Scored, measure
from hf_ls.report.calibration_report import CalibrationRow
from hf_ls.report.facts import AnswerFacts
from hf_ls.run.launch import announce
from hf_ls.trainer.arguments import LabelSmoothingArguments, smoothing_of

OUTCOME = "outcome.json"  # written last: a run with it is complete
PREDICTIONS = "predictions.npz"
DRAWS = "draws.npz"
GENERATIONS = "generations.jsonl"
ANSWERS = "answers"  # the folder in that of a run with what it shows on questions


@dataclass(frozen=True)
class Outcome:
    """Rows of the reported split, without and with temperature, and what they were counted on.

    Args:
        split: "test", or "validation" where there was no test; None if nothing was evaluated.
        n: predictions (tokens for sequences); n_sequences: None for one label per example.
        num_classes: of the softmax, the vocabulary for language models.
        class_counts: of the labels, None for language models. label_counts: of those which occur, in no order, for all tokens.
        answers: how the questions were asked whose answers these are.
        draws: name of a row -> what its metrics become when the examples are drawn anew, so that runs can be paired.
    """

    split: str | None
    n: int
    n_sequences: int | None
    num_classes: int
    class_counts: list[int] | None
    rows: list[CalibrationRow]
    history: list[dict[str, Any]]
    draws: dict[str, list[Draws]] = field(default_factory=dict)
    label_counts: list[int] | None = None
    answers: AnswerFacts | None = None

    def save(self, folder: Path) -> None:
        """Write `draws.npz` and `outcome.json`, each whole or not at all."""
        write_arrays(folder / DRAWS, **draws_as_arrays(self.draws))
        fields = dataclasses.asdict(dataclasses.replace(self, draws={}))
        del fields["draws"]
        write_atomically(folder / OUTCOME, json.dumps(fields, allow_nan=False))

    @classmethod
    def load(cls, folder: Path) -> Outcome:
        """Read what `save` wrote."""
        remedy = f"delete {OUTCOME}, and the run is evaluated again from its last checkpoint"
        fields = read_json(folder / OUTCOME, remedy)
        try:
            draws: dict[str, list[Draws]] = {}
            if (folder / DRAWS).is_file():  # runs of an older hf_ls left none
                with np.load(folder / DRAWS, allow_pickle=False) as arrays:
                    draws = draws_from_arrays(arrays)
            asked = None if fields.get("answers") is None else AnswerFacts(**fields["answers"])
            return cls(**fields | {"answers": asked, "rows": [CalibrationRow(**row) for row in fields["rows"]], "draws": draws})
        except (TypeError, KeyError, ValueError, BadZipFile) as error:
            raise ValueError(f"expected the outcome of a run in {folder / OUTCOME}, got: {error}; {remedy}") from error


def run_name(training: LabelSmoothingArguments) -> str:
    """The name of a run's row: what it trains on, "baseline" being the plain cross entropy in every step."""
    if training.label_smoothing_soft_labels:
        return "soft labels"
    if training.label_smoothing_objective != "smoothed_ce":
        return training.label_smoothing_objective
    smoothing = smoothing_of(training)
    if smoothing.epsilon or (smoothing.schedule is not None and smoothing.schedule.final_epsilon):
        return "smoothed"
    return "distilled" if training.distillation_teacher else "mixup" if training.mixup_alpha else "baseline"


def _epsilon(training: LabelSmoothingArguments) -> float | None:
    """Of the training; not known where there was none."""
    return training.label_smoothing_factor if training.do_train else None


class LastEvaluation(TrainerCallback):
    """The last evaluation in training, both callback and `compute_metrics`: the trained weights need no second one."""

    def __init__(self) -> None:
        self._predicted: EvalPrediction | None = None
        self._metrics: dict[str, float] = {}
        self._step = -1

    def __call__(self, predicted: EvalPrediction) -> dict[str, float]:
        """Take the predictions of all processes, and add no metric."""
        self._predicted = predicted
        return {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Note whose weights they are of."""
        self._metrics, self._step = metrics or {}, state.global_step

    def of_trained(self, trainer: Any) -> PredictionOutput | None:
        """What `trainer.predict` would give on its evaluation data; None where those weights were not the last, or in another
        precision."""
        args, predicted = trainer.args, self._predicted
        other = args.load_best_model_at_end or args.fp16_full_eval or args.bf16_full_eval
        if other or predicted is None or self._step != trainer.state.global_step:
            return None
        return PredictionOutput(predicted.predictions, predicted.label_ids, self._metrics)


def evaluate_classes(trainer: Any, tokens: DatasetDict) -> Outcome:
    """One label per example: logits of both splits, kept in `predictions.npz`; T fitted on validation, rows on test."""
    training, num_classes, last = trainer.args, trainer.model.config.num_labels, trainer.compute_metrics
    logits, labels, soft = {}, {}, {}
    for split, prefix in _wanted(training, tokens):
        known = last.of_trained(trainer) if split == "validation" and isinstance(last, LastEvaluation) else None
        output = predict(trainer, tokens[split], prefix, known=known)
        write_metrics(trainer, prefix, output.metrics)
        logits[split], labels[split] = np.asarray(output.predictions, np.float64), np.asarray(output.label_ids)
        soft[split] = np.asarray(tokens[split][SOFT]) if SOFT in tokens[split].column_names else None
    if training.should_save:
        save_predictions(Path(training.output_dir), logits, labels)
    if not logits:
        return Outcome(None, 0, None, num_classes, None, [], trainer.state.log_history)
    split, name = list(logits)[-1], run_name(training)
    predictions = {s: Scored.of(labels[s], logits=logits[s], soft=soft[s]) for s in logits}
    # A temperature is never judged on the data it was fitted on.
    measured = measure(name, _epsilon(training), predictions[split], predictions.get("validation") if split == "test" else None)
    if measured.untempered:
        announce(f"{name}: no row with temperature, {measured.untempered}")
    history = trainer.state.log_history
    return Outcome(split, len(labels[split]), None, num_classes, measured.class_counts, measured.rows, history, measured.draws)


def evaluate_tokens(trainer: Any, tokens: DatasetDict, texts: DatasetDict, metrics: list[str], *, has_classes: bool) -> Outcome:
    """One label per token: teacher-forced sums in constant memory, a second pass at the fitted T, quality of what was generated.

    Args:
        texts: the splits with `source` and `target`, read where the model generated; metrics: names for `text_metrics`.
        has_classes: labels are classes with names, as in token classification, not a vocabulary.
    """
    training, outcome, temperature = trainer.args, None, None
    for split, prefix in _wanted(training, tokens):
        outcome, found = measure_tokens(
            trainer, split, tokens[split], texts[split], metrics, temperature=temperature, prefix=prefix, has_classes=has_classes
        )
        write_metrics(trainer, prefix, found)
        if split == "validation":
            try:
                temperature = trainer.fit_temperature(tokens[split])
            except NoFiniteTemperature as error:
                announce(f"{run_name(training)}: no row with temperature, {error}")
    history = trainer.state.log_history
    if outcome is None:
        return Outcome(None, 0, None, _num_classes(trainer, has_classes=has_classes), None, [], history)
    return dataclasses.replace(outcome, history=history)


def measure_tokens(
    trainer: Any,
    split: str,
    tokens: Dataset,
    texts: Dataset,
    metrics: list[str],
    *,
    temperature: float | None,
    prefix: str,
    has_classes: bool,
) -> tuple[Outcome, dict[str, float]]:
    """The row of one set, and a second one at a temperature if there is one, see `evaluate_tokens`; and the Trainer's metrics."""
    training = trainer.args
    name, epsilon = run_name(training), _epsilon(training)
    generating = bool(getattr(training, "predict_with_generate", False))
    output = predict(trainer, tokens, prefix, loss_only=not generating)
    reported, of_texts = trainer.token_calibration, []
    extra = _token_scores(trainer)
    if generating:
        generated, references = _decode(trainer, output.predictions), texts["target"]
        extra.update(text_metrics(generated, references, metrics))
        extra.update({name: extra[name] | {"signature": signature(name)} for name in ("bleu", "chrf") if name in extra})
        of_texts = [draws_of_texts(generated, references, metrics)]
        extra["sequence_ece"] = {"value": trainer.sequence_calibration.compute()["ece"]}
        output.metrics.update({f"{prefix}_{metric}": found["value"] for metric, found in extra.items()})
        if training.should_save:
            _save_generations(Path(training.output_dir), split, texts["source"], references, generated)
    rows = [CalibrationRow.from_tokens(name, epsilon, None, reported, extra)]
    draws = {name: [draws_of_tokens(reported), *of_texts]}
    if temperature is not None:
        trainer.temperature = temperature
        predict(trainer, tokens, prefix, loss_only=True)
        trainer.temperature = 1.0
        extra |= _token_scores(trainer)
        extra.pop("sequence_ece", None)  # of untempered probabilities; what greedy search writes is the same at every T
        rows.append(CalibrationRow.from_tokens(name, epsilon, temperature, trainer.token_calibration, extra))
        draws[rows[-1].name] = [draws_of_tokens(trainer.token_calibration), *of_texts]
    counts = reported.label_counts
    num_classes = _num_classes(trainer, has_classes=has_classes)
    outcome = Outcome(
        split, len(reported), reported.sequences, num_classes,
        np.pad(counts, (0, num_classes - len(counts))).tolist() if has_classes else None,
        rows, [], draws, counts[counts > 0].tolist(),
    )  # fmt: skip
    return outcome, output.metrics


def _num_classes(trainer: Any, *, has_classes: bool) -> int:
    config = trainer.model.config.get_text_config()
    return config.num_labels if has_classes else config.vocab_size


def _token_scores(trainer: Any) -> dict[str, Any]:
    """Scores beside the calibration of tokens, of token classification; none for language models."""
    entities, counts = trainer.token_calibration.entity_f1(), trainer.class_counts
    found: dict[str, Any] = {} if entities is None else {"entity_f1": entities}
    return found | ({} if counts is None else {name: {"value": float(score(counts))} for name, score in CLASS_SCORES.items()})


def predict(trainer: Any, tokens: Dataset, prefix: str, *, loss_only: bool = False, known: PredictionOutput | None = None) -> Any:
    """As `trainer.predict`, in the order of the rows; `loss_only` keeps the logits of every token from being gathered.

    Rows of a length are evaluated together, since every token of padding costs as much as one of a text.
    known: of the rows in that order, where the Trainer has just evaluated them.
    """
    before, order = trainer.args.prediction_loss_only, longest_first(tokens)
    trainer.args.prediction_loss_only = loss_only
    try:
        output: Any = known or trainer.predict(tokens.select(order), metric_key_prefix=prefix)
    finally:
        trainer.args.prediction_loss_only = before
    if loss_only:
        return output
    back = np.argsort(order)
    return output._replace(predictions=output.predictions[back], label_ids=output.label_ids[back])


def _wanted(training: LabelSmoothingArguments, tokens: DatasetDict) -> list[tuple[str, str]]:
    """The splits to evaluate with the prefix of their metrics, test last."""
    asked = (("validation", "eval", training.do_eval), ("test", "test", training.do_predict))
    return [(split, prefix) for split, prefix, wanted in asked if wanted and split in tokens]


def write_metrics(trainer: Any, prefix: str, metrics: dict[str, float]) -> None:
    """As `Trainer.log_metrics` and `save_metrics`, but whole files: a resumed run reads `all_results.json` to add to it."""
    trainer.log_metrics(prefix, metrics)
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    everything = folder / "all_results.json"
    known = read_json(everything, "delete it: it only repeats the other results") if everything.is_file() else {}
    for path, numbers in ((folder / f"{prefix}_results.json", metrics), (everything, known | metrics)):
        write_atomically(path, json.dumps(numbers, indent=4, sort_keys=True))


def save_predictions(folder: Path, logits: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> None:
    """Keep logits and labels of each split in `predictions.npz`."""
    arrays = {f"logits_{split}": value for split, value in logits.items()}
    arrays |= {f"labels_{split}": value for split, value in labels.items()}
    write_arrays(folder / PREDICTIONS, **arrays)


def kept_predictions(folder: Path) -> dict[str, Scored]:
    """What `save_predictions` has left, by split; none where there was nothing to keep, as of tokens."""
    path = str(folder / PREDICTIONS)
    files = {split: read_predictions(path, split) for split in splits_in(path)} if Path(path).is_file() else {}
    return {split: Scored.of(found.labels, logits=found.scores) for split, found in files.items()}


def _decode(trainer: Any, predictions: Any) -> list[str]:
    tokenizer = trainer.processing_class
    ids = np.where(predictions < 0, tokenizer.pad_token_id, predictions)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def _save_generations(folder: Path, split: str, sources: list[str], references: list[str], generated: list[str]) -> None:
    rows = zip(sources, references, generated, strict=True)
    lines = (json.dumps({"source": s, "reference": r, "generated": g}, ensure_ascii=False) for s, r, g in rows)
    write_atomically(folder / f"{split}_{GENERATIONS}", "\n".join(lines) + "\n")


def answer(
    model: Any,
    tokenizer: Any,
    data: QuestionData,
    settings: QuestionArguments,
    folder: Path | None,
    *,
    run: str,
    epsilon: float | None,
    **asked: Any,
) -> Outcome:
    """Rows of the answers to the test questions, with a temperature fitted on those of validation; logits into `folder`.

    asked: batch_size and max_length of `option_scores`. folder: None on a process which writes nothing.

    Raises: ValueError as `option_scores`.
    """
    scored, mass = {}, 0.0
    for split in sorted(data.splits, key=("validation", "test").index):
        questions = data.splits[split]
        scores = option_scores(model, tokenizer, questions, option_prefix=settings.option_prefix, **asked)
        logits = np.full((len(questions), len(data.label_names)), -np.inf)
        logits[:, : scores.log_p.shape[1]] = scores.logits(settings.length_normalisation)
        scored[split], mass = Scored.of([q.answer for q in questions], logits=logits), scores.mass
    if folder is not None:
        save_predictions(
            folder, {s: found.logits for s, found in scored.items()}, {s: found.labels for s, found in scored.items()}
        )
    measured = measure(run, epsilon, scored["test"], scored.get("validation"))
    if "validation" not in scored:
        announce("No row with temperature for the answers: there are no questions of validation to fit it on")
    elif measured.untempered:
        announce(f"No row with temperature for the answers, {measured.untempered}")
    facts = AnswerFacts(
        data.template,
        settings.score,
        settings.option_prefix,
        settings.length_normalisation,
        settings.instruction,
        data.few_shot,
        mass,
    )
    names = len(data.label_names)
    return Outcome(
        "test", len(scored["test"].labels), None, names, measured.class_counts, measured.rows, [], measured.draws, answers=facts
    )
