"""Conversations: every usual shape of rows, the labels which TRL would give them, and what is refused."""

from __future__ import annotations

import json
import logging
import warnings

import pytest
from datasets import Dataset, DatasetDict
from helpers import arguments
from sft_rows import TEMPLATE, conversations, tokenizer, words

from hf_ls.data.conversations import ChatFormat, set_chat_template, tokenise_conversations
from hf_ls.data.sequences import check_sequence_overlap, load_sequences

trl = pytest.importorskip("trl")

ROLES = ("system", "user", "assistant", "user", "assistant")


def talk(i: int) -> list[dict[str, str]]:
    return [{"role": role, "content": words(2 + (i + j) % 4, 10 * i + j)} for j, role in enumerate(ROLES)]


def messages() -> Dataset:
    return Dataset.from_list([{"messages": talk(i)} for i in range(12)])


def pairs() -> Dataset:
    return Dataset.from_list([{"prompt": talk(i)[:4], "completion": talk(i)[4:]} for i in range(12)])


def form(part: Dataset, words=None, assistant_only=None, completion_only=None) -> ChatFormat:
    return ChatFormat.of(words or tokenizer(), part, assistant_only, completion_only)


def of_trl(folder, part: Dataset, max_length: int, **settings) -> list[tuple[list[int], list[int]]]:
    """The ids and labels which TRL's own trainer prepares."""
    from head_models import build

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fixed = dict(bf16=False, gradient_checkpointing=False, max_length=max_length)
        args = arguments(folder, trl.SFTConfig, **fixed, **settings)
        trainer = trl.SFTTrainer(model=build("llama")[0], args=args, train_dataset=part, processing_class=tokenizer())
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


@pytest.mark.parametrize("max_length", [200, 22])
@pytest.mark.parametrize(
    ("rows", "asked", "theirs"),
    [
        (messages, {}, dict(assistant_only_loss=True)),
        (messages, dict(assistant_only=False), {}),
        (pairs, {}, {}),
        (pairs, dict(completion_only=False), dict(completion_only_loss=False)),
        (pairs, dict(assistant_only=True), dict(assistant_only_loss=True)),
        (pairs, dict(assistant_only=True, completion_only=False), dict(assistant_only_loss=True, completion_only_loss=False)),
    ],
    ids=["assistant", "everything", "completions", "pairs whole", "both", "assistant of pairs"],
)
def test_ids_and_labels_are_those_of_trl(tmp_path, rows, asked, theirs, max_length):
    part = rows()
    found = tokenise_conversations(DatasetDict(train=part), form(part, **asked), max_length)["train"]
    ours = [(row["input_ids"], row["labels"]) for row in found]
    assert ours == of_trl(tmp_path, part, max_length, **theirs)
    assert max(len(ids) for ids, _ in ours) <= max_length


def as_written(i: int, shape: str) -> dict:
    chat = talk(i)[1:3]
    if shape == "ShareGPT":
        who = {"user": "human", "assistant": "gpt"}
        return {"conversations": [{"from": who[m["role"]], "value": m["content"]} for m in chat]}
    if shape == "pairs":
        return {"prompt": chat[:1], "completion": chat[1:], "id": i}
    if shape == "parts":
        return {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} if i % 2 else m for m in chat]}
    if shape == "fields":  # which are not in every row
        chat = [chat[0] | ({"name": "x"} if i % 3 == 0 else {}), chat[1] | ({"weight": 1} if i % 5 == 0 else {})]
    return {"chat" if shape == "named" else "messages": chat}


# A template which reads texts and lists of parts alike.
PARTS = TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.content is string else m.content[0].text }}")


@pytest.mark.parametrize("shape", ["messages", "ShareGPT", "pairs", "parts", "fields", "named"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_every_shape_is_read_as_the_same_conversation(tmp_path, name, shape):
    rows, path = [as_written(i, shape) for i in range(20)], tmp_path / name
    if name.endswith("parquet"):
        if shape in ("parts", "fields"):
            pytest.skip("Parquet has one type for all rows")
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)))
    data = load_sequences("sft", None, files={"train": str(path)}, validation_fraction=0.1, test_fraction=0.1)
    assert data.conversational
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 16, "validation": 2, "test": 2}
    reader = tokenizer()
    reader.chat_template = PARTS
    tokens = tokenise_conversations(data.splits, form(data.splits["train"], reader), 100)
    found = sorted(reader.decode(row["input_ids"]) for part in tokens.values() for row in part)
    assert found == sorted(f"w4 {talk(i)[1]['content']} w3 {talk(i)[2]['content']} </s>" for i in range(20))


def test_texts_are_read_as_language_modelling(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": f"w{i} w6", "completion": "w7"}) for i in range(10, 30)))
    data = load_sequences("sft", None, files={"train": str(tmp_path / "a.jsonl")})
    assert not data.conversational and data.splits["train"].column_names == ["source", "target"]


def test_a_template_which_trl_knows_is_marked_in_training_alone():
    from trl.chat_template_utils import has_generation_markers, qwen3_chat_template

    reader = tokenizer()
    reader.chat_template = qwen3_chat_template
    found = form(messages(), reader)
    assert found.assistant_only and has_generation_markers(found.template) and reader.chat_template == qwen3_chat_template
    assert "TRL's variant" in found.learnt


def test_without_marks_everything_is_learnt_and_said(caplog):
    reader = tokenizer()
    reader.chat_template = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    found = form(messages(), reader)
    ids, labels = found.encode(messages()[0])
    assert ids == labels and "every token" in found.learnt
    with pytest.raises(ValueError, match=r"expected \{% generation %\} .* got one without; give such a template"):
        form(messages(), reader, assistant_only=True)


def test_a_template_which_leaves_the_end_out_is_warned_of(caplog):
    reader = tokenizer()
    reader.chat_template = TEMPLATE.replace("{{ m.content }} </s>{% endgeneration %}", "w7{% endgeneration %} </s>")
    form(messages(), reader)
    assert "may not learn to stop" in caplog.text and "%%" not in caplog.text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "got an empty messages in row 15"),
        ({"messages": None}, "got an empty messages in row 15"),
        ({"messages": [{"role": None, "content": "w5"}]}, "'role': None.* in row 15"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'type': 'image'.* in row 15"),
        ({"messages": [{"role": "user", "content": 3}]}, "'content': 3.* in row 15"),
    ],
)
def test_rows_which_are_no_conversations_are_refused(tmp_path, row, said):
    rows = [{"messages": talk(i)} for i in range(15)] + [row] + [{"messages": talk(i)} for i in range(20, 24)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=f"expected messages with a role and a text .*{said}"):
        load_sequences("sft", None, files={"train": str(tmp_path / "a.jsonl")})


def test_what_no_template_can_write_is_refused():
    reader = tokenizer()
    reader.chat_template = None
    with pytest.raises(ValueError, match=r"expected a tokenizer with a chat template, got .* without one; .*chat_template_path"):
        form(messages(), reader)
    with pytest.raises(ValueError, match="prompt and completion with completion_only_loss, got messages"):
        form(messages(), completion_only=True)
    reader.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"one of system, user, .*roles must alternate; change the data"):
        form(messages(), reader, assistant_only=False).encode(messages()[0])


def test_nothing_to_learn_is_counted_or_refused(caplog):
    caplog.set_level(logging.WARNING)
    rows = [{"messages": talk(i) if i % 3 else talk(i)[:2]} for i in range(12)]
    part = Dataset.from_list(rows)
    tokens = tokenise_conversations(DatasetDict(train=part), form(part), 100)
    assert len(tokens["train"]) == 8 and "train: 4 conversations are left out" in caplog.text
    with pytest.raises(ValueError, match="within max_length=4 in train, got none; raise max_length"):
        tokenise_conversations(DatasetDict(train=part), form(part), 4)


def test_a_template_of_elsewhere(tmp_path):
    reader, other = tokenizer(), tokenizer()
    other.chat_template = "w9" + TEMPLATE
    other.save_pretrained(tmp_path / "other")
    set_chat_template(reader, str(tmp_path / "other"))
    assert reader.chat_template == "w9" + TEMPLATE
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    set_chat_template(reader, str(tmp_path / "chat.jinja"))
    assert reader.chat_template == TEMPLATE
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.chat_template = "<|turn|>" + TEMPLATE
    other.save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match=r"expected a chat template of tokens which the tokenizer has, got <\|turn\|>"):
        set_chat_template(reader, str(tmp_path / "new"))
    with pytest.raises(ValueError, match=r"expected a chat template in .*none\.jinja"):
        set_chat_template(reader, str(tmp_path / "none.jinja"))


def test_a_prompt_in_two_splits_is_seen(caplog):
    rows, again = [{"messages": talk(i)} for i in range(10)], [{"messages": [*talk(3)[:4], talk(8)[4]]}]
    check_sequence_overlap(DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(again)))
    assert "1 of 1 test examples are also in train" in caplog.text
    alone = [{"messages": talk(i)[1:2]} for i in range(6)]
    splits = {"train": alone[:4], "validation": alone[4:5], "test": alone[5:]}
    check_sequence_overlap(DatasetDict({split: Dataset.from_list(part) for split, part in splits.items()}))


def test_the_rows_of_the_tests_of_the_trainer_are_known():
    assert form(conversations()).assistant_only
