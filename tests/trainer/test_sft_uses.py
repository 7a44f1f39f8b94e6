"""The documented uses of TRL's SFTTrainer: no warning of TRL that something will go, and the loss is an independent one.

What we rely on of TRL beside its documented arguments stands in `RELIED_ON`.
"""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import logging
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from datasets import Dataset
from head_models import VOCAB, build
from helpers import arguments
from sft_rows import conversations, save_chat_model, tokenizer, words

trl = pytest.importorskip("trl")

from hf_ls import LabelSmoothingSFTConfig, LabelSmoothingSFTTrainer  # noqa: E402
from hf_ls.data import conversations as our_conversations  # noqa: E402
from hf_ls.trainer import sft as our_trainer  # noqa: E402
from hf_ls.trainer.mixin import LabelSmoothingMixin  # noqa: E402

N = 8
LENGTHS = (30, 4, 17, 9, 25, 6, 12, 3)


def texts() -> Dataset:
    return Dataset.from_dict({"text": [words(n, seed) for seed, n in enumerate(LENGTHS)]})


def pairs() -> Dataset:
    return Dataset.from_dict({"prompt": [words(n, n) for n in LENGTHS], "completion": [f" {words(4, 90 + n)}" for n in LENGTHS]})


def chat_pairs() -> Dataset:
    return Dataset.from_list([{"prompt": row["messages"][:3], "completion": row["messages"][3:]} for row in conversations(N)])


def share_gpt() -> Dataset:
    rows = [[{"from": m["role"], "value": m["content"]} for m in row["messages"]] for row in conversations(N)]
    return Dataset.from_dict({"conversations": rows})


def tokenised() -> Dataset:
    ids = [tokenizer()(text)["input_ids"] for text in texts()["text"]]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})


def lora() -> dict[str, Any]:
    return {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)}


# use -> rows, settings of the config, arguments of the trainer
USES: dict[str, tuple[Callable[[], Any], dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "texts": (texts, {}, dict),
    "truncated": (texts, {"max_length": 10}, dict),
    "formatted": (pairs, {"completion_only_loss": False}, lambda: {"formatting_func": lambda row: row["prompt"] + row["completion"]}),
    "tokenised": (tokenised, {}, dict),
    "streamed": (lambda: texts().to_iterable_dataset(), {}, dict),
    "prompts": (pairs, {}, dict),
    "prompts whole": (pairs, {"completion_only_loss": False}, dict),
    "conversations": (lambda: conversations(N), {}, dict),
    "assistant": (lambda: conversations(N), {"assistant_only_loss": True}, dict),
    "ShareGPT": (share_gpt, {}, dict),
    "chats with prompts": (chat_pairs, {}, dict),
    "packing": (texts, {"packing": True, "max_length": 32}, dict),
    "packing, split": (texts, {"packing": True, "max_length": 16, "packing_strategy": "bfd_split"}, dict),
    "packing, wrapped": (texts, {"packing": True, "max_length": 16, "packing_strategy": "wrapped"}, dict),
    "packing, assistant": (lambda: conversations(N), {"packing": True, "max_length": 64, "assistant_only_loss": True}, dict),
    "padding-free": (texts, {"padding_free": True, "max_length": None}, dict),
    "checkpointing": (texts, {"activation_checkpointing": True}, dict),
    "LoRA": (texts, {}, lora),
    "metrics": (texts, {}, lambda: {"compute_metrics": lambda seen: {"width": float(seen.predictions.shape[-1])}}),
}  # fmt: skip


def reference(model: Any, batch: dict[str, torch.Tensor], epsilon: float) -> float:
    """Σ (1 − ε)·(−log p_y) + ε·mean_k(−log p_k) over all labels, divided by their number: one sequence at a time, in float64."""
    total, count = 0.0, 0
    for ids, labels in sequences(batch):
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        log_p = logits.double().log_softmax(-1)
        for row, label in zip(log_p, labels[1:].tolist(), strict=True):
            if label != -100:
                total -= (1 - epsilon) * float(row[label]) + epsilon * float(row.mean())
                count += 1
    return total / count


def sequences(batch: dict[str, torch.Tensor]):
    if "position_ids" in batch:
        cuts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
        for start, end in itertools.pairwise(cuts):
            yield batch["input_ids"][0, start:end], batch["labels"][0, start:end]
    else:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            yield ids[mask.bool()], labels[mask.bool()]


def of_trl(found: list[warnings.WarningMessage], records: list[logging.LogRecord]) -> list[str]:
    """What says, by TRL or about TRL, that something will be removed."""
    about = [w for w in found if issubclass(w.category, FutureWarning | DeprecationWarning | PendingDeprecationWarning)]
    said = [str(w.message) for w in about if f"{Path(trl.__file__).parent}/" in w.filename or "v2.0" in str(w.message)]
    logged = [r.getMessage() for r in records]
    return said + [text for text in logged if "deprecated" in text or "will be removed" in text]


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("use", USES)
def test_a_documented_use_of_trl(tmp_path, caplog, use, epsilon):
    rows, settings, more = USES[use]
    caplog.set_level(logging.INFO)
    fixed = dict(bf16=False, activation_checkpointing=False, learning_rate=0.0, weight_decay=0.0, per_device_train_batch_size=N,
                 per_device_eval_batch_size=N, max_steps=1, label_smoothing_factor=epsilon, remove_unused_columns=True)  # fmt: skip
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        args = arguments(tmp_path, LabelSmoothingSFTConfig, **(fixed | settings))
        trainer = LabelSmoothingSFTTrainer(
            model=build("llama")[0], args=args, train_dataset=rows(), eval_dataset=rows(), processing_class=tokenizer(), **more()
        )
        trainer.train()
        evaluated = trainer.evaluate()
    assert not of_trl(found, caplog.records)
    model = build("llama", torch.float64)[0]
    if "peft_config" in more():
        model = peft.get_peft_model(model, more()["peft_config"])
        model.load_state_dict(trainer.model.state_dict())
    batch = trainer.data_collator(list(trainer.train_dataset))
    (record,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert record["loss"] == pytest.approx(reference(model.eval(), batch, epsilon), rel=1e-5)
    batch = trainer.data_collator(list(trainer.eval_dataset))
    assert evaluated["eval_loss"] == pytest.approx(reference(model, batch, 0.0), rel=1e-5)
    if use == "metrics":
        assert evaluated["eval_width"] == VOCAB


def test_a_model_by_its_folder_and_plain_defaults(tmp_path):
    """As in TRL's first example: a name, a data set, nothing else."""
    folder = save_chat_model(tmp_path / "chat")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        args = LabelSmoothingSFTConfig(str(tmp_path / "out"), use_cpu=True, max_steps=1, label_smoothing_factor=0.1, report_to=[])
        trainer = LabelSmoothingSFTTrainer(model=folder, args=args, train_dataset=texts())
        trainer.train()
    assert not of_trl(found, [])
    assert args.gradient_checkpointing and args.bf16  # TRL's defaults
    assert not [w for w in found if "gradient_checkpointing` is deprecated" in str(w.message)]


# Pictures


IMAGE_TOKEN = "<image>"
LLAVA_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w3 {% generation %}{% for c in m.content %}{{ c.text }} {% endfor %}</s>"
    "{% endgeneration %} {% else %}w4 {% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def llava() -> tuple[Any, Any]:
    """A Llava of two tiny towers, and its processor of pictures of 8 x 8."""
    words_of = tokenizer()
    words_of.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image = words_of.convert_tokens_to_ids(IMAGE_TOKEN)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision = tf.CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=16, **sizes)
    text = tf.LlamaConfig(
        vocab_size=len(words_of), num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, **sizes
    )
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, image_seq_length=4)
    )
    small = {"height": 8, "width": 8}
    pictures = tf.CLIPImageProcessorPil(size=small, crop_size=small, do_center_crop=False)
    processor = tf.LlavaProcessor(
        pictures,
        words_of,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    )
    return model, processor


def picture_rows(kind: str) -> Dataset:
    from PIL import Image

    pictures = [[Image.fromarray(np.full((8, 8, 3), 20 * i, dtype=np.uint8))] for i in range(4)]
    talks = [row["messages"][:2] for row in conversations(4)]
    if kind == "prompts":
        return Dataset.from_dict({"images": pictures, "prompt": [t[:1] for t in talks], "completion": [t[1:] for t in talks]})
    return Dataset.from_dict({"images": pictures, "messages": talks})


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("messages", {}), ("messages", {"assistant_only_loss": True}), ("prompts", {})],
    ids=["whole", "assistant", "completions"],
)
def test_pictures_in_conversations(tmp_path, caplog, kind, settings, epsilon):
    """Vision-language SFT: the collator of TRL makes the batches, the loss is ours."""
    caplog.set_level(logging.INFO)
    model, processor = llava()
    exact = copy.deepcopy(model).double().eval()
    fixed = dict(bf16=False, activation_checkpointing=False, learning_rate=0.0, weight_decay=0.0, max_steps=1, max_length=None,
                 per_device_train_batch_size=4, per_device_eval_batch_size=4, label_smoothing_factor=epsilon,
                 remove_unused_columns=True)  # fmt: skip
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        args = arguments(tmp_path, LabelSmoothingSFTConfig, **fixed, **settings)
        trainer = LabelSmoothingSFTTrainer(
            model=model, args=args, train_dataset=picture_rows(kind), eval_dataset=picture_rows(kind), processing_class=processor
        )
        trainer.train()
        evaluated = trainer.evaluate()
    assert not of_trl(found, caplog.records)
    batch = dict(trainer.data_collator(list(picture_rows(kind))))
    labels = batch.pop("labels")[:, 1:]
    assert (labels != -100).any() and ((labels == -100).any() or (kind == "messages" and not settings))
    batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad():
        log_p = exact(**batch).logits[:, :-1].log_softmax(-1)[labels != -100]
    nll = -log_p.gather(-1, labels[labels != -100][:, None]).mean()
    (record,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert record["loss"] == pytest.approx(float((1 - epsilon) * nll - epsilon * log_p.mean()), rel=1e-5)
    assert evaluated["eval_loss"] == pytest.approx(float(nll), rel=1e-5)


# The canary


# What we use of TRL that its documentation does not promise: where it stands -> names.
RELIED_ON = {
    "attributes which SFTTrainer.__init__ sets": ["_metrics", "_total_train_tokens", "_tp_size", "aux_loss_enabled"],
    "methods of SFTTrainer": ["_prepare_dataset"],
    "fields of DataCollatorForLanguageModeling": ["padding_free"],
    "functions of trl.chat_template_utils": [
        "get_training_chat_template",
        "has_generation_markers",
        "is_chat_template_stop_token_trained",
    ],
}
PREPARE = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]


def test_trl_still_has_the_names_which_we_rely_on():
    import trl.chat_template_utils
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tree = ast.parse(textwrap.dedent(inspect.getsource(trl.SFTTrainer.__init__)))
    there = {
        "attributes which SFTTrainer.__init__ sets": {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        },
        "methods of SFTTrainer": vars(trl.SFTTrainer).keys(),
        "fields of DataCollatorForLanguageModeling": DataCollatorForLanguageModeling.__dataclass_fields__.keys(),
        "functions of trl.chat_template_utils": vars(trl.chat_template_utils).keys(),
    }
    gone = [f"{name} ({place})" for place, names in RELIED_ON.items() for name in names if name not in there[place]]
    assert not gone, (
        f"TRL {trl.__version__} has no longer {', '.join(gone)}: see hf_ls/trainer/sft.py and hf_ls/data/conversations.py"
    )
    found = list(inspect.signature(trl.SFTTrainer._prepare_dataset).parameters)
    assert found == PREPARE, f"TRL {trl.__version__} calls SFTTrainer._prepare_dataset with {found}: see hf_ls/trainer/sft.py"


def test_the_list_of_names_is_complete():
    """Every name of `self` in the trainer which neither we, nor transformers, define is TRL's; so is what is imported from it."""
    (ours,) = (
        c for c in ast.walk(ast.parse(inspect.getsource(our_trainer))) if getattr(c, "name", "") == "LabelSmoothingSFTTrainer"
    )
    used = {n.attr for n in ast.walk(ours) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in ("self", "super()")}
    known = vars(LabelSmoothingMixin).keys() | vars(LabelSmoothingSFTTrainer).keys() - {"_prepare_dataset"}
    source = inspect.getsource(tf.Trainer)
    theirs = {name for name in used - known if not hasattr(tf.Trainer, name) and f"self.{name}" not in source}
    listed = RELIED_ON["attributes which SFTTrainer.__init__ sets"] + RELIED_ON["methods of SFTTrainer"]
    assert theirs == {*listed}
    imported = {
        alias.name
        for node in ast.walk(ast.parse(inspect.getsource(our_conversations)))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("trl")
        for alias in node.names
    }
    assert imported == {*RELIED_ON["functions of trl.chat_template_utils"]}
