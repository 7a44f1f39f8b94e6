"""One class of transformers after another, tiny: is our training loss its own loss, and at ε > 0 what its logits say?

python tests/support/model_sweep.py CAUSAL_LM SEQ_TO_SEQ_CAUSAL_LM ... prints a row per class and the counts per mapping.
The expected values come from the model's own forward with labels and its own logits, in float64, apart from `hf_ls`.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as tf
from tiny_models import VOCAB, classes, tiny_model
from torch import Tensor
from transformers.trainer_callback import PrinterCallback

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer

MAPPINGS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE", "IMAGE_CLASSIFICATION",
)  # fmt: skip
CLASSES, ROWS, LENGTH = 5, 3, 16
_STEADY = ("MULTIPLE_CHOICE", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING")  # nothing random left without dropout
EPSILON = 0.1


@dataclass
class Outcome:
    """What became of one class: not built, not run (its own forward fails), refused, or trained with these errors."""

    model: str
    state: str  # "not built", "not run", "refused", "failed", "wrong", "exact"
    reason: str = ""
    own: float = float("nan")
    added: float = 0.0  # own loss − cross entropy
    errors: tuple[float, float, float] = (float("nan"),) * 3  # of the loss at ε = 0 and 0.1, of the gradient at ε = 0; relative
    logits_free: str = ""  # "yes", or why not


def _settings(mapping: str) -> dict[str, Any]:
    if mapping == "SEQUENCE_CLASSIFICATION":
        return {"num_labels": CLASSES, "pad_token_id": 0}
    if mapping in ("TOKEN_CLASSIFICATION", "IMAGE_CLASSIFICATION"):
        return {"num_labels": CLASSES}
    return {"num_labels": 2} if mapping == "QUESTION_ANSWERING" else {}


def _tokens(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(90, VOCAB, shape, generator=generator)  # below are the special tokens of the tiny configs


def batches(mapping: str, model: Any) -> Iterator[dict[str, Tensor]]:
    """Batches with labels which the class may take; the first one which its own forward takes is used."""
    g = torch.Generator().manual_seed(0)
    ids = _tokens(g, ROWS, LENGTH)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = ids.clone()
    labels[0, :5] = labels[1, -4:] = -100
    image = torch.randn(ROWS, 3, 28, 28, generator=g)
    if mapping in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"):
        yield {**text, "labels": labels}
        yield {"input_ids": ids, "labels": labels}
        zeros = torch.zeros_like(ids)
        yield {**text, "token_type_ids": zeros, "labels": labels}
        yield {**text, "token_type_ids": zeros, "mm_token_type_ids": zeros, "labels": labels}
        if mapping == "IMAGE_TEXT_TO_TEXT":
            yield {**text, "pixel_values": image, "labels": labels}
            yield {"pixel_values": image, "labels": labels}
            pictures = image[:, None]
            yield {**text, "pixel_values": pictures, "labels": labels}
            yield {**text, "pixel_values": pictures, "image_attention_mask": torch.ones(ROWS, LENGTH, 1).long(), "labels": labels}
    elif mapping == "MASKED_LM":
        yield {**text, "input_ids": torch.where(labels != -100, ids, 3), "labels": labels}
        yield {"input_ids": ids, "labels": labels}
    elif mapping in ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"):
        source = _tokens(g, ROWS, 9)
        labels = ids[:, :12].clone()
        labels[0, 7:] = labels[1, -2:] = -100  # shorter rows
        if mapping == "SEQ_TO_SEQ_CAUSAL_LM":
            yield {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": labels}
        for frames in (64, 3000, 600):
            for bins in (16, 32, 80, 128):
                yield {"input_features": torch.randn(ROWS, bins, frames, generator=g), "labels": labels}
                yield {"input_features": torch.randn(ROWS, frames, bins, generator=g), "labels": labels}
        for samples in (400, 16000):
            yield {"input_values": torch.randn(ROWS, samples, generator=g), "labels": labels}
            yield {"input_values": torch.randn(ROWS, 1, samples, generator=g), "labels": labels}
            sound = torch.randn(ROWS, samples, generator=g)
            yield {"input_values": sound, "attention_mask": torch.ones_like(sound).long(), "labels": labels}
        yield {**text, "labels": ids}  # decoders alone
        yield {"input_values": torch.randn(ROWS, 64, 16, generator=g), "labels": labels}
    elif mapping == "SEQUENCE_CLASSIFICATION":
        yield {**text, "labels": torch.tensor([0, 3, 4])}
        yield {"input_ids": torch.cat([ids[:, :-1], torch.full((ROWS, 1), _eos(model))], 1), "labels": torch.tensor([0, 3, 4])}
    elif mapping == "TOKEN_CLASSIFICATION":
        yield {**text, "labels": torch.where(labels == -100, labels, labels % CLASSES)}
    elif mapping == "QUESTION_ANSWERING":
        yield {**text, "start_positions": torch.tensor([1, 4, 7]), "end_positions": torch.tensor([2, 9, 7])}
    elif mapping == "MULTIPLE_CHOICE":
        choices = _tokens(g, ROWS, CLASSES, LENGTH)
        yield {"input_ids": choices, "attention_mask": torch.ones_like(choices), "labels": torch.tensor([0, 3, 4])}
    elif mapping == "IMAGE_CLASSIFICATION":
        for size in (28, 32, 64, 224):
            yield {"pixel_values": torch.randn(ROWS, 3, size, size, generator=g), "labels": torch.tensor([0, 3, 4])}


def _eos(model: Any) -> int:
    found = getattr(model.config.get_text_config(), "eos_token_id", None)
    return (found[0] if isinstance(found, list) else found) or 2


def _logits(outputs: Any) -> Tensor:
    if "start_logits" in outputs:
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], 1).double()
    return outputs["logits"].double()


def _terms(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """The mean NLL and the mean of z_y − mean z over the kept labels, by hand."""
    z, y = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    z, y = z[y != -100], y[y != -100]
    chosen = z.gather(-1, y[:, None])[:, 0]
    return float((z.logsumexp(-1) - chosen).mean()), float((chosen - z.mean(-1)).mean())


def _expected(model: Any, batch: dict[str, Tensor]) -> tuple[float, float, float, dict[str, Tensor]]:
    """Own loss, what it adds to the cross entropy, the loss at ε = 0.1, and the gradient of the own loss."""
    model.zero_grad()
    outputs = model(**batch)
    outputs["loss"].backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    own, logits = float(outputs["loss"].detach().double()), _logits(outputs).detach()
    model.zero_grad()
    labels = batch["labels"] if "labels" in batch else torch.stack([batch["start_positions"], batch["end_positions"]], 1)
    found = [_terms(logits, labels)] if logits.shape[:-1] == labels.shape else []
    if labels.dim() == 2 and "start_positions" not in batch and logits.shape[:-1] == labels.shape:
        found.append(_terms(logits[:, :-1], labels[:, 1:]))
    if not found:
        raise ValueError(f"logits {tuple(logits.shape)} for labels {tuple(labels.shape)}")
    nll, term = min(found, key=lambda pair: abs(own - pair[0]))
    return own, own - nll, own + EPSILON * term, gradient


class _Reasons(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    handler, logger = _Reasons(), logging.getLogger("hf_ls")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _ours(model: Any, batch: dict[str, Tensor], epsilon: float, folder: str) -> tuple[float, dict[str, Tensor], Any]:
    names = [name for name in batch if name in ("labels", "start_positions", "end_positions")]
    args = LabelSmoothingArguments(
        folder,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        label_smoothing_factor=epsilon,
        label_names=names,
    )
    trainer = LabelSmoothingTrainer(model=model, args=args)
    trainer.remove_callback(PrinterCallback)
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    given = {name: value.clone() for name, value in batch.items()}
    count = trainer._get_num_items_in_batch([given], torch.device("cpu"))
    model.zero_grad()
    loss = trainer.compute_loss(model, given, num_items_in_batch=count)
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), gradient, trainer


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all weights; a missing gradient is 0."""
    names = found.keys() | expected.keys()
    zero = torch.zeros(())
    difference = sum(float((found.get(n, zero).double() - expected.get(n, zero).double()).pow(2).sum()) for n in names)
    return (difference / max(1e-30, sum(float(g.double().pow(2).sum()) for g in expected.values()))) ** 0.5


def examine(mapping: str, model_type: str, class_name: str, **settings: Any) -> Outcome:
    """Build, run and train one class, see `Outcome`."""
    torch.manual_seed(0)
    try:
        model = tiny_model(model_type, class_name, **_settings(mapping) | settings)
    except Exception as error:
        return Outcome(class_name, "not built", f"{type(error).__name__}: {error}")
    for config in (model.config, model.config.get_text_config(decoder=True)):
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = True
    model.train()
    failure, batch = "no batch", {}
    for batch in batches(mapping, model):
        try:
            own, added, smoothed, gradient = _expected(model, batch)
            again = _expected(model, batch)[0] if mapping not in _STEADY else own
        except Exception as error:
            failure = f"{type(error).__name__}: {error}" if failure == "no batch" else failure
            continue
        break
    else:
        return Outcome(class_name, "not run", failure)
    if again != own:
        return Outcome(class_name, "not run", f"random in training mode: {own} and {again}")
    outcome = Outcome(class_name, "exact", own=own, added=added)
    with tempfile.TemporaryDirectory() as folder, _listening() as reasons:
        try:
            plain, found, trainer = _ours(model, batch, 0.0, folder)
            loss, _, _ = _ours(model, batch, EPSILON, folder)
        except (ValueError, TypeError) as error:
            refused = str(error).startswith("expected")
            outcome.state, outcome.reason = "refused" if refused else "failed", f"{type(error).__name__}: {error}"
            return outcome
        except Exception as error:
            outcome.state, outcome.reason = "failed", f"{type(error).__name__}: {error}"
            return outcome
    outcome.errors = abs(plain - own) / max(1, abs(own)), abs(loss - smoothed) / max(1, abs(smoothed)), _distance(found, gradient)
    outcome.logits_free = "yes" if trainer._head is not None else (reasons[0] if reasons else "no word")
    if outcome.errors[0] > 2e-5 or outcome.errors[1] > 2e-5 or outcome.errors[2] > 1e-3:
        outcome.state = "wrong"
    return outcome


def table(mapping: str, outcomes: list[Outcome]) -> str:
    """One row of the support matrix."""
    states = collections.Counter(outcome.state for outcome in outcomes)
    ran = [o for o in outcomes if o.state not in ("not built", "not run")]
    free = sum(o.logits_free == "yes" for o in ran)
    added = sum(o.state == "exact" and abs(o.added) > 1e-4 * max(1, abs(o.own)) for o in ran)
    cells = (mapping, len(outcomes), len(ran), states["exact"], added, free, states["refused"], states["failed"], states["wrong"])
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


HEADER = (
    "| mapping | classes | run tiny | exact | with a term of their own | logits-free | refused | failed | wrong |\n"
    + "|---" * 9
    + "|"
)


def sweep(mapping: str, part: str = "") -> list[Outcome]:
    """Every class of a mapping with `part` in its name, once."""
    seen: dict[str, Outcome] = {}
    for model_type, name in classes(mapping):
        if part in name and (name not in seen or seen[name].state == "not built"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                seen[name] = examine(mapping, model_type, name)
            o = seen[name]
            errors = " ".join(f"{e:.0e}" for e in o.errors)
            print(
                f"{o.state:9s} {name:48s} own {o.own:.5f} adds {o.added:.5f} errors {errors} | {o.logits_free[:150]} | {o.reason[:300]}".replace(
                    "\n", " "
                ),
                flush=True,
            )
    return list(seen.values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    names = [name for name in sys.argv[1:] if name in MAPPINGS]
    part = next((name for name in sys.argv[1:] if name not in MAPPINGS), "")  # of the names of classes
    rows = [table(mapping, sweep(mapping, part)) for mapping in names or MAPPINGS]
    print("\n".join([HEADER, *rows]))
