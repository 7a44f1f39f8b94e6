"""What only its user knows of a model and its data, for the header of the model card: licence, languages, names on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from hf_ls.common.text import hub_id
from hf_ls.report.facts import HubFacts

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,8}(-[A-Za-z0-9]{2,8})*")

_COUNTED = ("text-classification", "multiple-choice")  # their accuracy is over examples, as that of a leaderboard


def _about(text: str) -> dict[str, Any]:
    return {"help": text}


@dataclass(kw_only=True)
class CardArguments:
    """What the model card says beside what was measured.

    Raises: ValueError for a licence, a language or an id which the Hub would refuse.
    """

    license: str | None = field(default=None, metadata=_about("Licence of the model as the Hub names it, e.g. apache-2.0."))
    language: list[str] = field(default_factory=list, metadata=_about("Codes of the model's languages, e.g. en de."))
    dataset_id: str | None = field(default=None, metadata=_about("Id on the Hub of data which is read from local files."))
    dataset_title: str | None = field(
        default=None,
        metadata=_about("Name of the data for readers; with it the card has results for the Hub also of local data."),
    )
    benchmark_task: str | None = field(
        default=None,
        metadata=_about(
            "Id of the task in the benchmark dataset_id (its eval.yaml): the card's folder gets .eval_results for it."
        ),
    )

    def __post_init__(self) -> None:
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise ValueError(
                f"expected license as the Hub names it, such as apache-2.0 or other, got {self.license!r}; use its identifier"
            )
        if odd := [code for code in self.language if not _LANGUAGE.fullmatch(code)]:
            raise ValueError(f"expected language as codes such as en or pt-BR, got {odd[0]!r}; use the code of ISO 639")
        if self.dataset_id is not None and not hub_id(self.dataset_id):
            raise ValueError(f"expected dataset_id as owner/name, an id on the Hub, got {self.dataset_id!r}; use dataset_title")
        if self.dataset_title is not None and not self.dataset_title.strip():
            raise ValueError("expected dataset_title as words, got blanks; leave it out")

    @property
    def hub(self) -> HubFacts:
        """For the header of a card."""
        return HubFacts(self.license, list(self.language), benchmark_task=self.benchmark_task)

    def check_benchmark(self, task: str | None, dataset_name: str | None) -> None:
        """Refuse results for a leaderboard of data which is on no Hub, or which counts no examples.

        Raises: ValueError.
        """
        if self.benchmark_task is None:
            return
        if not (self.dataset_id or hub_id(dataset_name)):
            raise ValueError(
                f"expected dataset_id, the benchmark's id on the Hub, with benchmark_task, got {dataset_name}; set it"
            )
        if task not in _COUNTED:
            raise ValueError(f"expected benchmark_task only with task {' or '.join(_COUNTED)}, got task {task}; drop it")
