"""Models of transformers: their weights (safetensors only), the model inside wrappers, its output layer, evaluation mode."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Labels with this value are not counted, as in torch and transformers.
IGNORE_INDEX = -100
# Set on reward models whose forward takes pairs of texts.
COMPARES_PAIRS = "compares_pairs"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def load_weights(auto_model: Any, place: str | os.PathLike[str], **kwargs: Any) -> Any:
    """`auto_model.from_pretrained` of safetensors alone, since a pickled file (`pytorch_model.bin`) is a program.

    kwargs: as `from_pretrained`; what it returns is returned.

    Raises: ValueError for a model whose weights are in no safetensors file; OSError when there is no such model.
    """
    try:
        return auto_model.from_pretrained(place, use_safetensors=True, **kwargs)
    except OSError as error:
        in_folder = any(Path(place, name).is_file() for name in _PICKLED)
        if in_folder or "cannot be loaded with `safetensors`" in str(error):
            raise ValueError(
                f"expected the weights of {place} as safetensors, got pickled ones, which can run code; take a revision with "
                "model.safetensors, or convert them where you trust them: from_pretrained(...).save_pretrained(...)"
            ) from error
        raise


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch off dropout, and restore each module's own mode afterwards: a frozen backbone may be in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer which makes the logits of a language model, or None for other models.

    Some models which generate name none (BLIP): theirs is that of the one language model in them.
    """
    from transformers.modeling_utils import unwrap_model

    inner: Any = unwrap_model(model)
    found = _named_output_embedding(inner)
    generates = getattr(base_model(inner), "can_generate", None)
    if found is not None or not callable(generates) or not generates():
        return found
    below = {id(head): head for part in inner.modules() if (head := _named_output_embedding(part)) is not None}
    return next(iter(below.values())) if len(below) == 1 else None


def _named_output_embedding(model: Any) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def no_cache(model: nn.Module) -> dict[str, bool]:
    """The input by which a forward keeps no cache, as with labels; {} for a model which takes none such.

    With a cache, the default without labels, FSMT has no causal mask: each position sees the words to come.
    """
    return {"use_cache": False} if "use_cache" in inspect.signature(base_model(model).forward).parameters else {}


def chooses(model: nn.Module) -> bool:
    """Whether the classes of a model are the choices of each example, which mean something else in every one."""
    inner = base_model(model)
    return type(inner).__name__.endswith("ForMultipleChoice") or getattr(inner, COMPARES_PAIRS, False)


def base_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT, DDP and the like."""
    from transformers.modeling_utils import unwrap_model

    inner: Any = unwrap_model(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
