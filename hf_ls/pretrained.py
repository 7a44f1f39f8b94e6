"""Reading the weights of a model: safetensors only.

Owns: that no pickled file is opened for weights, and what is said where there is nothing else.
Does not own: which model (`loading`, `evaluating`, `distillation`), or the checkpoints which the Trainer itself reads.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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
