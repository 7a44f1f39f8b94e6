"""Temperature scaling: fit one number T on held-out hard labels, divide logits by it, or bake it into a head.

Fit on validation, report on test. torch is imported only where a model is baked. Source: Guo et al. 2017.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_ls.common.files import move, temporary_folder, temporary_name
from hf_ls.common.models import in_eval_mode, load_weights
from hf_ls.metrics.validation import Floats, check_labels, check_logits

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

# T is searched within these multiples of the spread of the logits; exact optima lie far inside.
_RELATIVE_BOUNDS = (1e-4, 1e4)


class NoFiniteTemperature(ValueError):
    """The validation NLL has no minimum at a finite T > 0, so that no temperature can be fitted."""


def _check_temperature(temperature: Any) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"expected a number as temperature, got {temperature!r}; give the result of fit_temperature")
    value = float(temperature)
    if not (np.isfinite(value) and value > 0.0):
        raise ValueError(f"expected a finite temperature above 0, got {temperature}; 1.0 changes nothing")
    return value


def fit_temperature(logits: Any, labels: Any) -> float:
    """Return the T > 0 that minimises the mean NLL of labels [n] under softmax(logits [n, K] / T), in
    float64.

    mean_i [ logsumexp(z_i / T) − z_{i, y_i} / T ], which is convex in 1 / T and minimised over log T to
    about 1e-7 relative. T > 1 cools over-confident logits, T < 1 sharpens under-confident ones; T(c·z) =
    c·T(z), and accuracy never changes. At K = 2, scikit-learn's
    `CalibratedClassifierCV(method="temperature")` reports 2·T, because it takes a decision value d for the
    logits (−d, d).

    >>> logits, labels = np.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]]), [0, 0, 0, 1]
    >>> temperature = fit_temperature(logits, labels)  # 3 of 4 are right, at a confidence of 0.982
    >>> float(np.exp(apply_temperature(logits, temperature)[0, 0] - np.logaddexp.reduce(logits[0] / temperature)).round(3))
    0.75

    Raises:
        NoFiniteTemperature: every label has its row's largest logit (the NLL falls for ever as T → 0), the
        labels
            score no better than the mean logit (it falls for ever as T → ∞), or the optimum is beyond reach.
        TypeError: labels not integers.
        ValueError: soft labels, −100, NaN, fewer than 2 rows, or a label whose logit is −inf.
    """
    from scipy.optimize import minimize_scalar

    z = check_logits(logits).astype(np.float64)
    target = check_labels(labels, *z.shape)
    if len(z) < 2:
        raise ValueError("expected at least 2 rows to fit a temperature, got 1; use the whole validation split")
    z -= z.max(axis=1, keepdims=True)
    z_label = z[np.arange(len(z)), target]
    if np.isneginf(z_label).any():
        raise ValueError(
            f"expected a finite logit for every label, got −inf (probability 0) in {int(np.isneginf(z_label).sum())} of {len(z)} "
            "rows, whose NLL is infinite at every temperature; the label's class must not be masked"
        )
    finite = np.isfinite(z)
    mean_logit = np.where(finite, z, 0.0).sum(axis=1) / finite.sum(axis=1)
    if np.mean(mean_logit - z_label) >= 0.0:  # d NLL / d(1/T) → mean(mean z − z_y) as T → ∞
        raise NoFiniteTemperature(
            "expected labels to score above the mean logit, got logits no better than a uniform guess: the NLL "
            "falls for ever as T → ∞; check the label mapping, or train longer"
        )
    if (z_label == 0.0).all():  # d NLL / d(1/T) → mean(max z − z_y) as T → 0
        raise NoFiniteTemperature(
            f"expected at least one misclassified row, got {len(z)} rows that are all right: the NLL "
            "falls for ever as T → 0; use a larger validation split, or keep T = 1"
        )
    # Searching relative to the spread makes the result scale with the logits exactly as T should.
    spread = -float(mean_logit.mean())
    z, z_label = z / spread, z_label / spread

    def mean_nll(log_t: float) -> float:
        inverse = np.exp(-log_t)
        return float(np.mean(np.log(np.exp(z * inverse).sum(axis=1)) - z_label * inverse))

    low, high = np.log(_RELATIVE_BOUNDS)
    found = float(minimize_scalar(mean_nll, bounds=(low, high), method="bounded", options={"xatol": 1e-10}).x)
    if min(found - low, high - found) < 1e-3:
        raise NoFiniteTemperature(
            f"expected an optimum well inside {_RELATIVE_BOUNDS} times the spread {spread:.3g} of the logits, "
            "got one at the end; the validation split is all but separable: use a larger one, or keep T = 1"
        )
    return float(np.exp(found) * spread)


def apply_temperature(logits: Any, temperature: float) -> Floats:
    """Return logits [n, K] / T in float64.

    >>> apply_temperature([[4.0, 0.0]], 2.0)
    array([[2., 0.]])

    Raises:
        TypeError, ValueError: invalid logits, or T not a finite number above 0.
    """
    return check_logits(logits).astype(np.float64) / _check_temperature(temperature)


def bake_temperature(model: PreTrainedModel, temperature: float, inputs: Mapping[str, Any] | None = None) -> None:
    """Divide the final linear layer of a transformers classifier by T in place: its logits become logits / T.

    weight ← weight / T, bias ← bias / T, so that the saved model is calibrated without any wrapper. The
    layer is the last `nn.Linear` with `config.num_labels` outputs which a forward pass shows to produce the
    logits (directly, or by selecting one position), and the logits are compared before and after.
    `config.calibration_temperature` records the product of all T baked so far and is saved with the model.
    In half precision the weights are rounded, so bake in float32 where that matters.

    inputs: a small batch of the model's forward arguments for the check; by default a few token ids.

    Raises:
        TypeError: T is not a number.
        ValueError: T not finite and above 0; not a single-label classifier; the head is frozen, tied,
        quantised,
            sharded, adapted or not what produces the logits. The model is then unchanged.
    """
    import torch

    t = _check_temperature(temperature)
    batch = _example_inputs(model) if inputs is None else dict(inputs)
    with in_eval_mode(model), torch.no_grad():
        before, name, head = find_head(model, batch)
        _check_head(model, name, head)
        parameters = [p for p in (head.weight, head.bias) if p is not None]
        original = [p.detach().clone() for p in parameters]
        for parameter in parameters:
            parameter.div_(t)
        after = _logits_of(model, batch)
        error, allowed = _error(before, after, t)
        if not error <= allowed:
            for parameter, values in zip(parameters, original, strict=True):
                parameter.copy_(values)
            raise ValueError(
                f"expected logits / {t:.6g} after scaling {name}, got an error of {error:.3g}: "
                "the logits are not linear in that layer; use apply_temperature on the logits instead"
            )
    baked = getattr(model.config, "calibration_temperature", 1.0)
    setattr(model.config, "calibration_temperature", baked * t)  # noqa: B010, no declared field of the config


def bake_folder(folder: str | os.PathLike[str], temperature: float, inputs: Mapping[str, Any] | None = None) -> None:
    """Bake T into the classifier saved in a folder, so that whoever loads it with plain transformers gets logits / T.

    Loads it with `AutoModelForSequenceClassification`, bakes, saves beside it, loads that again and compares the logits; only
    then do the new files replace the old ones, and the folder itself is loaded once more. A folder whose config says that this
    very T is in its weights already (a resumed run) stays as it is.

    inputs: as `bake_temperature`.

    Raises: ValueError for a reloaded model with other logits, the folder then being as it was; as `bake_temperature`.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    t = _check_temperature(temperature)
    model = load_weights(AutoModelForSequenceClassification, folder)
    if t != 1.0 and math.isclose(getattr(model.config, "calibration_temperature", 1.0), t, rel_tol=1e-9):
        return
    batch = _example_inputs(model) if inputs is None else dict(inputs)
    with in_eval_mode(model), torch.no_grad():
        before = _logits_of(model, batch)
    bake_temperature(model, t, batch)

    def check(place: str | os.PathLike[str]) -> None:
        reloaded = load_weights(AutoModelForSequenceClassification, place).eval()
        with torch.no_grad():
            error, allowed = _error(before, _logits_of(reloaded, batch), t)
        if not error <= allowed:
            raise ValueError(
                f"expected the model saved in {place} to give logits / {t:.6g} when loaded again, got an error of {error:.3g}: "
                "not all of its weights are saved; keep T = 1 and apply_temperature"
            )

    with temporary_folder(temporary_name(Path(folder))) as made:
        model.save_pretrained(made)
        check(made)
        for file in sorted(made.iterdir(), reverse=True):  # the weights before the config
            move(file, Path(folder, file.name))
    check(folder)


def _error(before: torch.Tensor, after: torch.Tensor, temperature: float) -> tuple[float, float]:
    """The largest error of after · T against before, and what rounding in this precision allows."""
    import torch

    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(after.dtype, 3e-2)
    before = before.double()
    return float((after.double() * temperature - before).abs().max()), tolerance * float(before.abs().max())


def _example_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return four token ids, the last one the end of sequence, where BART and T5 classifiers look for it."""
    import torch

    config: Any = getattr(model, "config", None)
    if not isinstance(getattr(config, "num_labels", None), int):
        raise ValueError(
            f"expected a transformers model with config.num_labels, got {type(model).__name__}; "
            "pass the unwrapped AutoModelForSequenceClassification"
        )
    text = config.get_text_config()
    if not isinstance(getattr(text, "vocab_size", None), int):
        raise ValueError(f"expected a text model, got {type(model).__name__}; pass inputs= with a small batch for it")
    last = text.eos_token_id if isinstance(getattr(text, "eos_token_id", None), int) else 8
    return {"input_ids": torch.tensor([[5, 6, 7, last]], device=model.device) % text.vocab_size}


def _logits_of(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    try:
        outputs = model(**batch)
    except Exception as error:  # whatever a model raises for inputs it was not made for
        raise ValueError(
            f"expected {type(model).__name__} to accept {sorted(batch)}, got {type(error).__name__}: {error}; "
            "pass inputs= with a small batch for this model"
        ) from error
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError(f"expected a model whose output has logits, got {type(model).__name__}; give a sequence classifier")
    return logits


def find_head(model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, str, nn.Linear]:
    """Return the logits of the batch with the name and module of the linear layer that produced them."""
    from torch import nn

    config = getattr(model, "config", None)
    num_labels = getattr(config, "num_labels", None)
    kind = getattr(config, "problem_type", None)
    if not isinstance(num_labels, int) or num_labels < 2 or kind not in (None, "single_label_classification"):
        raise ValueError(
            f"expected a single-label classifier with 2 or more labels, got {type(model).__name__} with "
            f"num_labels={num_labels} and problem_type={kind!r}; temperature scaling needs a softmax over classes"
        )
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == num_labels}
    seen: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output.detach()}))
        for name, layer in linear.items()
    ]
    try:
        logits = _logits_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name in reversed(linear):
        if name in seen and _selects(seen[name].double(), logits.double()):
            return logits, name, linear[name]
    raise ValueError(
        f"expected a linear layer with {num_labels} outputs that produces the logits of "
        f"{type(model).__name__}, got {list(linear) or 'none'}; use apply_temperature on the logits instead"
    )


def _selects(output: torch.Tensor, logits: torch.Tensor) -> bool:
    """Say whether logits [B, K] are the output [B, K] or one position of [B, T, K] (Llama scores, then pools)."""
    if output.shape == logits.shape:
        return bool((output == logits).all())
    if output.ndim != 3 or logits.ndim != 2 or output.shape[::2] != logits.shape:
        return False
    return bool((output == logits[:, None, :]).all(-1).any(-1).all())


def _check_head(model: nn.Module, name: str, head: nn.Linear) -> None:
    """Refuse a head that is not the sole owner of plain, trainable floating-point weights."""
    import torch
    from torch import nn

    own = dict(head.named_parameters(recurse=False))
    plain = type(head) is nn.Linear and "weight" in own and type(head.weight.data) is torch.Tensor
    if not plain or not head.weight.is_floating_point() or head.weight.is_meta:
        raise ValueError(
            f"expected {name} to be a plain floating-point nn.Linear, got {type(head).__name__} with "
            f"{head.weight.dtype} weights; merge adapters, dequantise and gather the weights first"
        )
    if head.weight.shape != (head.out_features, head.in_features):
        raise ValueError(f"expected {name} with its whole weight, got shape {list(head.weight.shape)}; gather the shards first")
    for key, parameter in own.items():
        if not parameter.requires_grad:
            raise ValueError(
                f"expected {name}.{key} to be trainable, got a frozen parameter; "
                "call requires_grad_(True) on the head if it may change"
            )
        for other, tensor in model.named_parameters(remove_duplicate=False):
            if other != f"{name}.{key}" and tensor.data_ptr() == parameter.data_ptr():
                raise ValueError(
                    f"expected {name}.{key} to be used once, got it tied to {other}, which would be scaled "
                    "too; untie them (clone the weight) first"
                )
