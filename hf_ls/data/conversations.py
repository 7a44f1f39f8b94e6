"""Conversations: lists of messages in the usual shapes, and their tokens and labels as a chat template writes them.

A row has `messages`, or `prompt` and `completion`, which are lists of messages too; beside them may stand `tools` (a list, or
JSON) and `chat_template_kwargs`, which the template reads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict

from hf_ls.common.errors import extra
from hf_ls.common.models import IGNORE_INDEX
from hf_ls.data.reading import is_conversation
from hf_ls.data.truncation import warn_of, with_labels, without_lost

logger = logging.getLogger(__name__)

FOR_TEMPLATE = ("tools", "chat_template_kwargs")  # columns beside the messages
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names, for which templates write nothing


def messages_of(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int | None]:
    """The messages of a row, with `role` and `content`, and how many of them are its prompt; None where the data does not say."""
    if "messages" in row:
        return [_message(message) for message in row["messages"]], None
    return [_message(message) for message in [*row["prompt"], *row["completion"]]], len(row["prompt"])


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message under the names of chat templates, without the fields which `datasets` has filled in as None."""
    known = {name: value for name, value in message.items() if value is not None}
    role = known.pop("role", None) or known.pop("from", None)
    content = known.pop("content", known.pop("value", ""))
    return {"role": _ROLES.get(str(role), role), "content": content, **known}


def prompt_text(row: Mapping[str, Any]) -> str:
    """What a row asks, as one text: its prompt, else all but the last message, or the only one."""
    messages, given = messages_of(row)
    asked = messages[: -1 if given is None else given] or messages
    return "\n".join(f"{message['role']}: {message['content']}" for message in asked)


def pairs_as_conversations(splits: DatasetDict) -> DatasetDict:
    """Pairs of `source` and `target` as what a user says and an assistant answers."""

    made = {}
    for split, part in splits.items():
        texts = [text for pair in zip(part["source"][:], part["target"][:], strict=True) for text in pair]
        roles = ["user", "assistant"] * len(part)
        messages = pa.StructArray.from_arrays([pa.array(roles), pa.array(texts)], ["role", "content"])
        rows = pa.ListArray.from_arrays(pa.array(range(0, 2 * len(part) + 1, 2), pa.int32()), messages)
        made[split] = Dataset(pa.table({"messages": rows}))
    return DatasetDict(made)


def check_conversations(splits: DatasetDict, theirs: Mapping[str, str]) -> None:
    """Refuse rows which are no conversations; theirs: how the user calls the columns of messages.

    Raises: ValueError for a column of something else, and for the first row without a message, or of which a message is without a
    role or holds no text.
    """
    for split, part in splits.items():
        for column, name in theirs.items():
            if not is_conversation(part, column):
                raise ValueError(
                    f"expected conversations in column {name!r} of {split}, lists of messages with role and content, got "
                    f"{part.features[column]}; name the right column, or write them so"
                )
        for i, row in enumerate(part):
            empty = next((name for column, name in theirs.items() if not row[column]), None)
            wrong = None if empty else next((message for message in messages_of(row)[0] if not _is_message(message)), None)
            if empty is not None or wrong is not None:
                got = f"an empty {empty}" if empty else f"{wrong!s:.80}"
                raise ValueError(
                    f"expected messages with a role and a text as content in every row of {split}, got {got} in row {i}; fix or "
                    "drop that row"
                )


def _is_message(message: Mapping[str, Any]) -> bool:
    content = message["content"]
    parts = content if isinstance(content, list) else []
    text = isinstance(content, str) or (bool(parts) and all(isinstance(p, dict) and p.get("type") == "text" for p in parts))
    return isinstance(message["role"], str) and text


def set_chat_template(tokenizer: Any, path: str, **options: Any) -> None:
    """Give a tokenizer the chat template of a `.jinja` file, or that of another tokenizer, in a folder or on the Hub.

    options: for loading the other tokenizer.

    Raises: ValueError for a file which is not there, a tokenizer without a template, and one of whose template `tokenizer` does
    not know a special token: in code, TRL adds it to the model.
    """
    if path.endswith((".jinja", ".j2")):
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"expected a chat template in {path}, got: {error}; check chat_template_path") from error
        return
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(path, **options)
    if not other.chat_template:
        raise ValueError(f"expected a tokenizer with a chat template as chat_template_path, got {path} without one; name another")
    new = sorted(token for token in {*other.get_added_vocab()} - {*tokenizer.get_vocab()} if token in str(other.chat_template))
    if new:
        raise ValueError(
            f"expected a chat template of tokens which the tokenizer has, got {', '.join(new)} in that of {path}; write one with "
            "its own tokens as a .jinja file, or use LabelSmoothingSFTTrainer(chat_template_path=...), which adds tokens"
        )
    tokenizer.chat_template = other.chat_template


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become tokens, and which of these are learnt.

    Args:
        template: None for the tokenizer's own.
        assistant_only: what the template marks as said by the assistant; completion_only: of rows with a prompt, what follows it.
    """

    tokenizer: Any
    template: str | None
    assistant_only: bool
    completion_only: bool

    @classmethod
    def of(cls, tokenizer: Any, part: Dataset, assistant_only: bool | None, completion_only: bool | None) -> ChatFormat:
        """The format of a split: as the settings say, else completions, else the assistant where the template marks it.

        A template of which TRL knows a variant with marks is replaced by that, in training alone.

        Raises: ValueError for a tokenizer without a chat template, one without marks where `assistant_only` is asked for, and
        `completion_only` without completions; ImportError without TRL.
        """
        with extra("trl", "conversations"):
            from trl.chat_template_utils import is_chat_template_stop_token_trained

        if not tokenizer.chat_template:
            raise ValueError(
                f"expected a tokenizer with a chat template, got {type(tokenizer).__name__} without one; set "
                "model_name_or_path to a chat model, or give a template with --chat_template_path (a .jinja file, or a tokenizer "
                "which has one)"
            )
        pairs = "completion" in part.column_names
        if completion_only and not pairs:
            raise ValueError(
                "expected columns prompt and completion with completion_only_loss, got messages; use assistant_only_loss"
            )
        completion_only = pairs and completion_only is not False
        template = _marked_template(tokenizer) if assistant_only or (assistant_only is None and not pairs) else None
        if assistant_only and template is None:
            raise ValueError(
                "expected {% generation %} ... {% endgeneration %} around what the assistant says in the chat template, got one "
                "without; give such a template with --chat_template_path, or learn every token: --assistant_only_loss false"
            )
        if template is not None and not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
            logger.warning(
                "The chat template leaves the token which ends the assistant's turn out of what is learnt: the model may not "
                "learn to stop; put it before {% endgeneration %}, and give the template with --chat_template_path"
            )
        own = template is None or template == tokenizer.chat_template
        return cls(tokenizer, None if own else template, template is not None, completion_only)

    @property
    def counted(self) -> str:
        """Whose tokens are learnt and measured, in words."""
        parts = ["what the assistant says"] * self.assistant_only + ["completions"] * self.completion_only
        return " in ".join(parts) or "every token, of users and systems too"

    @property
    def learnt(self) -> str:
        """The same as a sentence for the log, with how to change it."""
        if self.template is not None:
            return f"Learnt: {self.counted}, marked by TRL's variant of the chat template"
        all_of_it = not (self.assistant_only or self.completion_only)
        remedy = "; --assistant_only_loss true leaves these out, with a chat template which has {% generation %}"
        return f"Learnt: {self.counted}{remedy if all_of_it else ''}"

    def encode(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """The token ids of a row, and their labels, −100 for what is not learnt.

        A completion starts where the tokens of the whole differ from those of the prompt alone, as in TRL.

        Raises: ValueError for a conversation which the template refuses.
        """
        from jinja2 import TemplateError

        messages, given = messages_of(row)
        tools, more = row.get("tools"), row.get("chat_template_kwargs") or {}
        options = {
            "tokenize": True,
            "return_dict": True,
            "chat_template": self.template,
            "tools": (json.loads(tools) if isinstance(tools, str) else tools) or None,
            **{name: value for name, value in more.items() if value is not None},
        }
        render = self.tokenizer.apply_chat_template
        start = 0
        try:
            whole = render(messages, return_assistant_tokens_mask=self.assistant_only, **options)
            if self.completion_only and given is not None:
                prompt = render(messages[:given], add_generation_prompt=True, **options)["input_ids"]
                same = [one == other for one, other in zip(prompt, whole["input_ids"], strict=False)]
                start = same.index(False) if False in same else len(same)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages[:6])
            raise ValueError(
                f"expected conversations which the chat template takes, got one of {roles} and the answer: {error}; change "
                "the data, or the template with --chat_template_path"
            ) from error
        ids = whole["input_ids"]
        marks = whole["assistant_masks"] if self.assistant_only else [1] * len(ids)
        return ids, [
            token if mark and i >= start else IGNORE_INDEX for i, (token, mark) in enumerate(zip(ids, marks, strict=True))
        ]


def _marked_template(tokenizer: Any) -> str | None:
    """The tokenizer's template if it marks what the assistant says, else TRL's variant of it which does; None without one."""
    with extra("trl", "conversations"):
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return tokenizer.chat_template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # none which TRL knows
        return None


def tokenise_conversations(splits: DatasetDict, form: ChatFormat, max_length: int) -> DatasetDict:
    """Token rows of at most `max_length`, one for each conversation; cut ones are counted in a warning.

    Conversations of whose first `max_length` tokens none is learnt are left out, with a warning.

    Raises: ValueError for a split of which nothing is left, and as `ChatFormat.encode`.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ids, labels = form.encode(row)
        kept = labels[:max_length]
        return {
            "input_ids": ids[:max_length],
            "attention_mask": [1] * len(kept),
            "labels": kept,
            "cut": int(len(ids) > max_length),
            "lost": int(all(label == IGNORE_INDEX for label in kept[1:])),  # nothing predicts the first token
        }

    tokens = splits.map(encode, remove_columns=splits["train"].column_names, desc="tokenising")
    tokens = warn_of(tokens, "cut", f"conversations lose what is beyond {max_length} tokens; raise max_length")
    tokens = without_lost(tokens, f"conversations are left out, because none of their first {max_length} tokens is learnt")
    what = "the assistant's turns or completions" if form.assistant_only or form.completion_only else "conversations"
    return with_labels(tokens, f"{what} within max_length={max_length}", "none; raise max_length, and check the roles")
