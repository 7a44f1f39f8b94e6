"""Probabilities from the answers of a transformers `pipeline`, in the order which the metrics expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hf_ls.metrics.validation import Floats, check_probabilities


def probabilities(answers: Sequence[Sequence[Mapping[str, object]]], label2id: Mapping[str, int]) -> Floats:
    """Probabilities float64 [n, K] by class id from `pipe(texts, top_k=None)`, whose answers are sorted by score.

    >>> answers = [[{"label": "bad", "score": 0.75}, {"label": "good", "score": 0.25}]]  # of pipe(["no"], top_k=None)
    >>> probabilities(answers, {"good": 0, "bad": 1})  # pipe.model.config.label2id
    array([[0.25, 0.75]])

    They are the predictions which `evaluate.load(hf_ls.metrics.path("ece"))` wants. (`evaluate.evaluator` takes only the label of
    an answer, and no pipeline of transformers 5.)

    Raises: ValueError for answers without every label (top_k=None was forgotten), labels which `label2id` does not have, ids
        other than 0…K−1, or scores which are no distribution (a multi-label or regression model); TypeError for other shapes.
    """
    if not isinstance(label2id, Mapping) or sorted(label2id.values()) != list(range(len(label2id))):
        raise ValueError(f"expected label2id with the ids 0 to K−1, got {label2id!r:.80}; pass pipe.model.config.label2id")
    if isinstance(answers, Mapping) or any(isinstance(answer, Mapping | str) for answer in answers):
        raise TypeError(
            "expected a list of {'label', 'score'} for each text, got one answer for each, or those of a single text; call "
            "pipe(list_of_texts, top_k=None)"
        )
    rows = np.full((len(answers), len(label2id)), np.nan)
    for row, answer in zip(rows, answers, strict=True):
        for item in answer:
            if item.get("label") not in label2id:
                raise ValueError(
                    f"expected labels among {sorted(label2id)}, got {item.get('label')!r}; pass the model's own label2id"
                )
            row[label2id[str(item["label"])]] = item["score"]
    incomplete = np.flatnonzero(np.isnan(rows).any(axis=1))
    if incomplete.size:
        raise ValueError(
            f"expected {len(label2id)} labels for each text, got fewer in row {incomplete[0]}; call pipe(texts, top_k=None)"
        )
    return check_probabilities(rows).astype(np.float64)
