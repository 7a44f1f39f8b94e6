"""The log-probability of each option after its prompt, in one teacher-forced pass, without logits beyond those of its tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_ls.answers.questions import Question, continuation
from hf_ls.common.models import IGNORE_INDEX, base_model, in_eval_mode, no_cache, output_embedding
from hf_ls.losses._rows import observe
from hf_ls.losses.cross_entropy import logits_of
from hf_ls.losses.smoothing import Smoothing
from hf_ls.metrics.validation import Floats
from hf_ls.trainer.batch import PROBE_LABELS, Batch
from hf_ls.trainer.logits_free import LogitsFreeHead, head_for

logger = logging.getLogger(__name__)

Normalisation = Literal["none", "tokens", "characters"]
_NO_LIMIT = 10**9  # tokenizers without one name a number beyond


@dataclass(frozen=True)
class OptionScores:
    """What the options [n, K] of questions score; K is the most options of any, and where a row has fewer stands −inf, 0 and 0.

    log_p: Σ log p over the tokens of an option after the prompt, in nats. tokens, characters: how many it has, the blank before
    it not counted among the characters.
    """

    log_p: Floats
    tokens: np.ndarray
    characters: np.ndarray

    def logits(self, normalisation: Normalisation = "none") -> Floats:
        """The logits [n, K] whose softmax are the probabilities of the options: log_p as it is, or its mean.

        "none": p(option) / Σ p(options), what the model itself says of the options alone. "tokens": log_p over the tokens of the
        option. "characters": over its characters, which is how `acc_norm` of lm-evaluation-harness ranks. A mean is no
        log-probability: it does not favour short options, but it is far less sure, and needs a temperature.
        """
        if normalisation == "none":
            return self.log_p
        sizes = {"tokens": self.tokens, "characters": self.characters}
        if normalisation not in sizes:
            raise ValueError(f"expected length_normalisation none, tokens or characters, got {normalisation!r}; use one of them")
        return np.divide(self.log_p, sizes[normalisation], out=self.log_p.copy(), where=sizes[normalisation] > 0)

    @property
    def mass(self) -> float:
        """The mean over questions of Σ p(options), 0 to 1: what is left goes to texts which are no option."""
        return float(np.exp(self.log_p).sum(axis=1).mean())


class _Row(NamedTuple):
    """Token ids which the model reads, and what is wanted of them: (position, next token, place in the table) in order."""

    ids: tuple[int, ...]
    wanted: list[tuple[int, int, tuple[int, int]]]


def answer_logits(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Any],
    *,
    length_normalisation: Normalisation = "none",
    option_prefix: str = " ",
    max_length: int | None = None,
    batch_size: int = 8,
) -> Floats:
    """Logits float64 [n, K] of the options of n questions under a causal language model, for every function which takes logits.

    Their softmax over a row is the probability of each option, given that one of them is the answer. Rows with fewer options than
    K end in −inf. An option is tokenised together with its prompt, `option_prefix` between them where no blank is.

    questions: mappings {"prompt", "options"} or `Question`s. length_normalisation: as `OptionScores.logits`.
    max_length: tokens which the model reads, its own limit if None; a longer prompt loses its beginning, with a warning.

    Raises: TypeError, ValueError for rows which are no questions, a model which is no causal language model, an option whose
        tokens cannot be told from those of its prompt, and options longer than max_length.
    """
    asked = {"option_prefix": option_prefix, "max_length": max_length, "batch_size": batch_size}
    return option_scores(model, tokenizer, questions, **asked).logits(length_normalisation)  # type: ignore[arg-type]


def option_scores(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Any],
    *,
    option_prefix: str = " ",
    max_length: int | None = None,
    batch_size: int = 8,
) -> OptionScores:
    """As `answer_logits`, before any normalisation."""
    asked = [Question.of(question) for question in questions]
    if not asked:
        raise ValueError("expected questions, got none; check the file")
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}; leave it out")
    _check_causal(model)
    limit = max_length or _limit(model, tokenizer)
    shape = len(asked), max(len(question.options) for question in asked)
    scores = OptionScores(np.full(shape, -np.inf), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64))
    rows = _rows(asked, tokenizer, option_prefix, limit, scores)
    rows.sort(key=lambda row: -len(row.ids))  # so that rows of a batch need little padding
    for i, question in enumerate(asked):
        scores.log_p[i, : len(question.options)] = 0.0
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # never attended to
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    with torch.no_grad(), in_eval_mode(model):
        head = _head(model, _inputs(parts[0], pad))
        for part in tqdm(parts, desc="answers", disable=None):
            for place, log_p in _log_probabilities(model, head, _inputs(part, pad), part):
                scores.log_p[place] += log_p
    return scores


def check_scorable(questions: Sequence[Question], tokenizer: Any, option_prefix: str = " ") -> None:
    """Refuse, before any model is trained, questions whose options cannot be scored.

    Raises: ValueError for an option whose tokens cannot be told from those of its prompt or of another option.
    """
    for i, question in enumerate(questions):
        _tokens(question, tokenizer, option_prefix, f"question {i}")


def _check_causal(model: Any) -> None:
    inner: Any = base_model(model)
    config = getattr(inner, "config", None)
    generates = getattr(inner, "can_generate", None)
    if (
        output_embedding(model) is None
        or getattr(config, "is_encoder_decoder", False)
        or not (callable(generates) and generates())
    ):
        raise ValueError(
            f"expected a causal language model, got {type(inner).__name__}; load it with AutoModelForCausalLM, or give the "
            "logits of other models to calibration_report"
        )


def _limit(model: Any, tokenizer: Any) -> int:
    config: Any = getattr(base_model(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = (getattr(text, "max_position_embeddings", None), tokenizer.model_max_length)
    return min((size for size in known if isinstance(size, int) and size > 0), default=_NO_LIMIT)


def _rows(questions: Sequence[Question], tokenizer: Any, prefix: str, limit: int, scores: OptionScores) -> list[_Row]:
    """What the model has to read, each sequence of ids once: options of one token share the pass of their prompt."""
    found: dict[tuple[int, ...], _Row] = {}
    cut = 0
    for i, question in enumerate(questions):
        prompt, tails = _tokens(question, tokenizer, prefix, f"question {i}")
        longest = max(map(len, tails))
        room = limit + 1 - longest  # the last token is predicted, never read
        if room < 1:
            raise ValueError(
                f"expected options within max_length={limit}, got one of {longest} tokens in question {i}; raise max_length, "
                "or drop that row"
            )
        if len(prompt) > room:
            cut += 1
            begin = prompt[:1] if prompt[0] == tokenizer.bos_token_id and room > 1 else []
            prompt = [*begin, *prompt[len(prompt) - room + len(begin) :]]
        for k, tail in enumerate(tails):
            read = (*prompt, *tail[:-1])
            row = found.setdefault(read, _Row(read, []))
            row.wanted.extend((len(prompt) - 1 + t, token, (i, k)) for t, token in enumerate(tail))
            scores.tokens[i, k], scores.characters[i, k] = len(tail), len(question.options[k].strip())
    if cut:
        logger.warning(
            "%d of %d prompts lose their beginning, since they have more than %d tokens with their options; raise max_length, or "
            "use fewer few-shot examples",
            cut, len(questions), limit,
        )  # fmt: skip
    for row in found.values():
        row.wanted.sort(key=lambda wish: wish[0])
    return list(found.values())


def _tokens(question: Question, tokenizer: Any, prefix: str, where: str) -> tuple[list[int], list[list[int]]]:
    """The token ids of the prompt, and those of each option behind it.

    Raises: ValueError where the tokens of the prompt are not the beginning of those of both, or two options have the same ones.
    """
    joined = [continuation(question.prompt, option, prefix) for option in question.options]
    texts = [joined[0][0], *("".join(pair) for pair in joined)]
    prompt, *whole = (_without_end(ids, tokenizer) for ids in tokenizer(texts, verbose=False)["input_ids"])
    for option, ids in zip(joined, whole, strict=True):
        if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
            raise ValueError(
                f"expected the tokens of the prompt to begin those of prompt and option, got others where {option[0][-20:]!r} "
                f"meets {option[1][:20]!r} ({where}); end the prompt with a sign such as ':', or change option_prefix"
            )
    if not prompt:
        raise ValueError(
            f"expected a prompt with a token, got none for {question.prompt[:40]!r} ({where}); use the model's tokenizer"
        )
    if len({tuple(ids) for ids in whole}) < len(whole):
        raise ValueError(
            f"expected options with different tokens, got the same for two of {list(question.options)} ({where}); use the "
            "model's own tokenizer, or other words"
        )
    return prompt, [ids[len(prompt) :] for ids in whole]


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Some tokenizers end every text with a token, which would stand between prompt and option."""
    end = tokenizer.eos_token_id
    return ids[:-1] if len(ids) > 1 and end is not None and ids[-1] == end else ids


def _inputs(rows: Sequence[_Row], pad: int) -> dict[str, Tensor]:
    """Padded on the right, where padding changes nothing of a causal model; labels, aligned, only where something is wanted."""
    width = max(len(row.ids) for row in rows)
    ids, labels = torch.full((len(rows), width), pad), torch.full((len(rows), width), IGNORE_INDEX)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], mask[i, : len(row.ids)] = torch.tensor(row.ids), 1
        for position, token, _ in row.wanted:
            labels[i, position] = token
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _head(model: nn.Module, inputs: dict[str, Tensor]) -> LogitsFreeHead | None:
    """The head which gives no more logits than are wanted, if the beginning of a prompt shows that it is exact."""
    ids = inputs["input_ids"][:1, :PROBE_LABELS]
    begin = {"input_ids": ids, "attention_mask": inputs["attention_mask"][:1, :PROBE_LABELS], "labels": ids}
    return head_for(model, model, Batch.read(_on(model, begin), ["labels"]))[0]


def _on(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


def _log_probabilities(
    model: nn.Module, head: LogitsFreeHead | None, inputs: dict[str, Tensor], rows: Sequence[_Row]
) -> Iterator[tuple[tuple[int, int], float]]:
    """log p of each wanted token, float64, with its place in the table."""
    batch = Batch.read(_on(model, inputs), ["labels"])
    # One number for each position of which something is wanted, in the order in which an observer sees them.
    wanted = [(i, *wish) for i, row in enumerate(rows) for wish in row.wanted]
    positions = {place: number for number, place in enumerate(dict.fromkeys((i, position) for i, position, *_ in wanted))}
    number = torch.tensor([positions[i, position] for i, position, *_ in wanted])
    token = torch.tensor([wish[2] for wish in wanted])
    found = torch.empty(len(wanted), dtype=torch.float64)
    seen = 0

    def pick(logits: Tensor, labels: Tensor) -> None:
        nonlocal seen
        here = ((number >= seen) & (number < seen + len(labels))).nonzero().squeeze(1)
        exact = logits.dtype if logits.device.type == "mps" else torch.float64
        normaliser = torch.cat([part.to(exact).logsumexp(-1) for part in logits.split(32)])
        row, column = (number[here] - seen).to(logits.device), token[here].to(logits.device)
        found[here] = (logits[row, column].to(exact) - normaliser[row]).cpu().double()
        seen += len(labels)

    given = batch.for_model(model) | no_cache(model)
    if head is not None:
        head(model, given, batch.labels, Smoothing(0.0), observer=pick)
    else:
        logits = logits_of(model(**given))
        observe(pick, logits[batch.kept], batch.labels[batch.kept])
    return zip((wish[3] for wish in wanted), found.tolist(), strict=True)
