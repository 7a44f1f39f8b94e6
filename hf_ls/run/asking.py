"""Questions of a run: read with the settings of their prompts, learnt as completions, and answered by a model, split by split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from hf_ls.answers.questions import continuation
from hf_ls.answers.reading import FEW_SHOT, QuestionArguments, QuestionData, read_questions
from hf_ls.answers.scoring import option_scores
from hf_ls.data.classification import ClassificationData
from hf_ls.data.reading import read_files
from hf_ls.data.sequences import SequenceData
from hf_ls.data.splitting import check_overlap
from hf_ls.report.build import Scored, measure
from hf_ls.report.facts import AnswerFacts
from hf_ls.run.launch import announce
from hf_ls.run.outcome import Outcome, save_predictions

ANSWERS = "answers"  # the folder in that of a run with what it shows on questions


def read_asked(splits: Mapping[str, Dataset], settings: QuestionArguments) -> QuestionData:
    """The questions of some splits as the settings say, after the examples of their few-shot file.

    Raises: ValueError as `read_questions`, and where most questions of test are in validation.
    """
    examples = read_files({FEW_SHOT: settings.few_shot_file})[FEW_SHOT] if settings.few_shot_file else None
    data = read_questions(splits, settings, examples)
    prompts = {split: [f"{q.prompt} {q.options}" for q in questions] for split, questions in data.splits.items()}
    check_overlap({split: Dataset.from_dict({"text": texts}) for split, texts in prompts.items()})
    return data


def first_prompt(data: QuestionData, settings: QuestionArguments) -> str:
    """The first question of the reported split as the model reads it, each line behind a bar."""
    question = data.splits["test"][0]
    text = "".join(continuation(question.prompt, question.options[question.answer or 0], settings.option_prefix))
    return "\n".join(f"  | {line}" for line in text.split("\n"))


def as_completions(data: ClassificationData, settings: QuestionArguments) -> SequenceData:
    """Texts and their classes as what a language model learns: `source`, the prompt of the question, and `target`, its answer.

    Both are the text on which the answers are scored, the blanks at the end of the prompt with the target.
    """
    asked = read_asked(data.splits, settings)
    made = {}
    for split, questions in asked.splits.items():
        pairs = [continuation(q.prompt, q.options[q.answer or 0], settings.option_prefix) for q in questions]
        made[split] = Dataset.from_dict({"source": [prompt for prompt, _ in pairs], "target": [answer for _, answer in pairs]})
    return SequenceData(DatasetDict(made), (), data.name, data.hub_id, data.licence, made["test"][0]["source"])


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
