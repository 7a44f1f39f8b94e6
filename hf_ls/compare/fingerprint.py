"""What a training run started from and saw, as hashes: the proof that two runs differ in nothing but their loss.

Which runs must agree says `experiment.check_fingerprints`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_ls.common.files import write_atomically

FINGERPRINT = "fingerprint.json"


class Fingerprint(TrainerCallback, ExportableState):
    """Record what training starts from and what the model sees, and write it to `fingerprint.json` when training ends.

    weights: SHA-256 of the weights before the first step. inputs: h_i = SHA-256(h_{i−1} ‖ batch_i) over every forward
    pass in training mode, labels excluded (the trainer keeps them from the model). batches: how many there were; steps:
    optimizer steps. A resumed run goes on with the values in its checkpoint.
    With several processes: the weights and the batches of the main one.
    """

    def __init__(self) -> None:
        self.weights: str | None = None
        self.inputs = hashlib.sha256().hexdigest()
        self.batches = 0
        self._hook: Any = None

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return {"args": {}, "attributes": {"weights": self.weights, "inputs": self.inputs, "batches": self.batches}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Hash the weights, or take up the values of the checkpoint, and listen to the model.

        Raises: ValueError when resuming from a checkpoint without them.
        """
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}) if state.global_step else {}
        if state.global_step and not saved.get("weights"):
            raise ValueError("expected a fingerprint in the checkpoint, got none; start the run afresh")
        self.weights = saved.get("weights") or hash_weights(model)
        self.inputs = saved.get("inputs", hashlib.sha256().hexdigest())
        self.batches = saved.get("batches", 0)
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening and write the file."""
        self._hook.remove()
        if args.should_save:
            found = {"weights": self.weights, "inputs": self.inputs, "batches": self.batches, "steps": state.global_step}
            write_atomically(Path(args.output_dir) / FINGERPRINT, json.dumps(found, indent=1) + "\n")

    def _see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training:
            batch = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
            self.inputs = hashlib.sha256(bytes.fromhex(self.inputs) + hash_tensors(batch)).hexdigest()
            self.batches += 1


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers with their names, types and shapes, as hexadecimal digits."""
    return hash_tensors(model.state_dict()).hex()


def hash_tensors(values: Mapping[str, Any]) -> bytes:
    """SHA-256 of the tensors of a mapping in the order of their names; values which are no tensors do not count."""
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            digest.update(value.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
