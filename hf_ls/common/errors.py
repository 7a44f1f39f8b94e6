"""One sentence for the user in place of the traceback of another library: for settings, the Hub, model files, the disk.

`hf_ls` words its own checks where it makes them; the names which somebody may have meant are looked up here.
"""

from __future__ import annotations

import difflib
import errno
import json
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import NoReturn

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError

# That of the library below: also a connection which fails or takes too long.
_HTTP_ERROR: type[Exception] = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
_PACKAGE = Path(__file__).parents[1]
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO)
# What safetensors, tokenizers (a bare Exception) and torch.save (a RuntimeError) say of it.
_DISK_FULL = (
    *("No space left on device", "Disk quota exceeded"),
    *("] . unexpected pos", "PytorchStreamWriter failed", "basic_ios::clear: iostream error"),
)
# Names of other programs and of habit, and what they are called here.
_ALIASES = {
    "label_smoothing_factor": ("epsilon", "eps", "smoothing", "label_smoothing", "label_smoothing_epsilon", "ls"),
    "label_smoothing_objective": ("objective", "loss", "loss_type", "criterion", "use_dft_loss", "use_eaft_loss", "use_eaft"),
    "learning_rate": ("lr",),
    "lr_scheduler_type": ("scheduler", "lr_scheduler", "lr_schedule"),
    "num_train_epochs": ("epochs", "num_epochs", "n_epochs", "max_epochs", "train_epochs"),
    "max_steps": ("steps", "num_steps", "train_steps", "max_train_steps", "num_train_steps"),
    "warmup_steps": ("warmup", "warmup_ratio", "num_warmup_steps"),
    "per_device_train_batch_size": ("batch_size", "train_batch_size", "bs", "per_gpu_train_batch_size", "per_device_batch_size"),
    "per_device_eval_batch_size": ("eval_batch_size", "per_gpu_eval_batch_size", "test_batch_size"),
    "gradient_accumulation_steps": ("accumulation_steps", "grad_accum", "gradient_accumulation", "grad_acc_steps"),
    "max_grad_norm": ("clip_grad_norm", "gradient_clip", "gradient_clipping", "max_norm", "gradient_clip_val"),
    "weight_decay": ("wd",),
    "optim": ("optimizer", "optimiser"),
    "bf16": ("dtype", "torch_dtype", "precision", "mixed_precision", "fp32"),
    "use_cpu": ("cpu", "no_cuda", "device"),
    "seed": ("random_seed", "random_state"),
    "eval_strategy": ("evaluation_strategy",),
    "metric_for_best_model": ("metric", "metric_name", "metrics"),
    "early_stopping_patience": ("patience", "early_stopping"),
    "peft": ("use_peft", "lora", "use_lora", "qlora", "peft_method"),
    "lora_r": ("lora_rank", "rank"),
    "model_name_or_path": ("model", "model_name", "model_id", "model_path", "checkpoint", "pretrained_model_name_or_path"),
    "tokenizer_name": ("tokenizer", "tokenizer_name_or_path"),
    "distillation_teacher": ("teacher_model", "teacher_model_name_or_path", "teacher_name_or_path"),
    "mixup_alpha": ("mixup",),
    "dataset_name": ("dataset", "data"),
    "dataset_config_name": ("dataset_config", "subset"),
    "train_file": ("train_data", "train_path", "data_file", "train"),
    "validation_file": ("val_file", "dev_file", "eval_file", "valid_file"),
    "test_file": ("test_data", "test_path", "predict_file"),
    "validation_fraction": ("validation_split_percentage", "validation_split", "val_split", "val_size", "test_size"),
    "text_column": ("text_column_name", "text_field", "dataset_text_field", "sentence_column", "text_key"),
    "label_column": ("label_column_name", "labels_column", "target_label", "label_key"),
    "messages_column": ("messages_field", "conversation_column", "conversations_column", "messages"),
    "chat_template_path": ("chat_template", "chat_template_name"),
    "assistant_only_loss": ("train_on_responses_only", "response_only", "mask_user", "train_on_prompt"),
    "max_length": ("max_seq_length", "max_seq_len", "max_source_length", "model_max_length", "block_size", "cutoff_len"),
    "output_dir": ("output", "out", "out_dir", "save_dir", "output_path"),
    "overwrite_output_dir": ("overwrite", "force"),
    "resume_from_checkpoint": ("resume", "resume_from"),
    "with_baseline": ("baseline", "compare_baseline"),
    "dry_run": ("check", "test_run"),
    "dataloader_num_workers": ("num_workers", "workers"),
    "train_sampling_strategy": ("group_by_length",),
    "report_to": ("wandb", "tensorboard", "logger"),
    "num_hidden_layers": ("num_layers", "n_layers", "n_layer"),
    "ece_equal_mass": ("adaptive_ece", "ace", "equal_mass_ece"),
    "ece_classwise": ("classwise_ece", "static_ece", "sce", "cw_ece"),
    "smooth_ece": ("smece",),
    "nll": ("cross_entropy", "log_loss", "negative_log_likelihood"),
    "brier": ("brier_score",),
}
_MEANT = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
_LOG_IN = "log in with `hf auth login`, or give a token which may do this (HF_TOKEN, hub_token)"


def one_sentence(error: BaseException) -> str | None:
    """What to tell the user, or None for an error which is none of the user's: it deserves its traceback.

    An error which `hf_ls` itself has raised as "expected …, got …; do this" is told as it is; a full disk or a folder which
    cannot be written is put into words, whoever noticed it.
    """
    if isinstance(error, OSError) and error.errno in _DISK and not str(error.strerror).startswith("expected"):
        return disk_sentence(error)
    if not isinstance(error, OSError | ValueError) and any(said in str(error) for said in _DISK_FULL):
        said = next((said for said in _DISK_FULL[:2] if said in str(error)), "a file cut short, as on a full disk")
        return disk_sentence(OSError(errno.ENOSPC, said))
    if not isinstance(error, ValueError | TypeError | OSError | ImportError):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    text = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
    ours = bool(frames) and Path(frames[-1].filename).is_relative_to(_PACKAGE)
    return text if ours and text.startswith("expected ") else None


def disk_sentence(error: OSError, place: str | Path | None = None) -> str:
    """The words for a file which cannot be written, or for want of a right, not be read."""
    where = place or error.filename
    what = "read or write" if error.errno in (errno.EACCES, errno.EPERM, errno.EIO) else "write"
    return (
        f"expected to {what} {where or 'in output_dir'}, got: {error.strerror}; free some space or give another output_dir. What "
        "was finished before is kept"
    )


def end_with(error: Exception, *, debug: bool = False) -> NoReturn:
    """End the script: with the sentence where there is one, else, and always for `debug`, with the traceback.

    Raises: SystemExit, or the error itself.
    """
    text = None if debug else one_sentence(error)
    if text is None:
        raise error
    sys.exit(f"error: {text}")


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A question after the known name which this one stands for elsewhere or is most like; `otherwise` if there is none.

    >>> did_you_mean("--lr", ["learning_rate", "seed"]), did_you_mean("lerning_rate", ["learning_rate", "seed"])
    ("did you mean 'learning_rate'?", "did you mean 'learning_rate'?")
    """
    names = {found for found in known if "-" not in found}  # argparse knows each setting with both kinds of dashes
    asked = name.lstrip("-").split("=")[0].replace("-", "_").lower()
    meant = {alias: target for alias, target in _MEANT.items() if target in names} | {found.lower(): found for found in names}
    cutoff = 0.75 if len(asked) > 4 else 0.6  # two letters the wrong way round in a short name
    close = difflib.get_close_matches(asked, sorted(meant), n=1, cutoff=cutoff)
    return f"did you mean {meant[close[0]]!r}?" if close else otherwise


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Word the lack of a package which comes with an extra of `hf_ls`, while it is imported.

    Raises: ImportError which says what to install.
    """
    try:
        yield
    except ImportError as error:
        missing = (error.name or "").partition(".")[0] or "a package which can be imported"
        raise ImportError(
            f"expected {missing} for {what}, got no such package; do: pip install 'hf_ls[{name}]'", name=error.name
        ) from error


def need_scripts() -> None:
    """Look for the packages of the extra `scripts`, without importing them.

    Raises: ImportError as `extra`, for the first which is not installed.
    """
    for name in ("yaml", "rich", "jinja2", "matplotlib", "relplot", "sacrebleu", "rapidfuzz"):
        with extra("scripts", "the scripts of hf_ls"):
            if find_spec(name) is None:
                raise ImportError(name=name)


@contextmanager
def settling(remedy: str = "change or drop one of these settings") -> Iterator[None]:
    """Word whatever transformers, accelerate and others raise while arguments are made of the user's settings.

    Any error: what they refuse ends in ValueError, TypeError, KeyError, ImportError, FileNotFoundError, OverflowError and more.

    Raises: ValueError.
    """
    try:
        yield
    except Exception as error:
        if str(error).startswith("expected ") and isinstance(error, ValueError | TypeError | OSError):
            raise
        cause, advice = _cause(error), remedy
        if isinstance(error, FileNotFoundError):
            cause, advice = f"no file at {error.filename}", "check the path"
        elif isinstance(error, ImportError):
            advice = "install that package, or drop the setting which needs it"
        elif isinstance(error, KeyError):
            cause = f"no {cause}"
        raise ValueError(f"expected settings which can be used together, got: {cause}; {advice}") from error


@contextmanager
def loading(what: str, remedy: str) -> Iterator[None]:
    """Word the errors of other libraries while something is loaded from a folder or the Hub.

    Raises: ValueError, except for errors which are no matter of what is there.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError, UnpicklingError, RuntimeError) as error:
        text = str(error)
        if text.startswith("expected ") and isinstance(error, ValueError):
            raise
        raise ValueError(f"expected {what}, got: {_cause(error)}; {_advice(error, remedy)}") from error


@contextmanager
def uploading(what: str, place: str) -> Iterator[None]:
    """Word the refusals of the Hub while something is sent there.

    Raises: ValueError for no token, a refused one, a name which can be none of the Hub, no connection.
    """
    try:
        yield
    except (_HTTP_ERROR, HFValidationError, LocalTokenNotFoundError, ConnectionError, TimeoutError) as error:
        if isinstance(error, HFValidationError):
            remedy = "give a name such as owner/name as hub_model_id"
        elif _offline(error):
            remedy = "unset HF_HUB_OFFLINE and run again, or leave the upload out: what was finished is saved in output_dir"
        else:
            remedy = _LOG_IN if _refused(error) else "try again later: what was finished is saved in output_dir"
        raise ValueError(f"expected to upload {what} to {place}, got: {_cause(error)}; {remedy}") from error


def read_json(path: Path, remedy: str) -> dict:
    """The mapping in a JSON file which an earlier run wrote.

    Raises: ValueError for anything else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected a whole JSON file at {path}, got: {error}; {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON mapping at {path}, got {type(found).__name__}; {remedy}")
    return found


def _cause(error: BaseException) -> str:
    """The first line that says something."""
    if isinstance(error, UnpicklingError):
        return "a pickle, which could run any code"
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        return "weights of other sizes"
    if "Repo id must" in str(error):
        return "no such folder, and no name of the Hub"
    if "trust_remote_code" in str(error):
        return "a repository with code of its own"
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".;: ")


def _advice(error: BaseException, remedy: str) -> str:
    """What to do when something could not be loaded."""
    if _offline(error):
        return "unset HF_HUB_OFFLINE, or give a folder; without a network, download it beforehand with `hf download`"
    if _refused(error):
        return _LOG_IN
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        return "set ignore_mismatched_sizes to start with a new head"
    if "trust_remote_code" in str(error):
        return "read that code, then set trust_remote_code"
    return remedy


def _offline(error: BaseException) -> bool:
    return any(isinstance(found, OfflineModeIsEnabled) for found in _chain(error)) or "offline" in str(error).lower()


def _refused(error: BaseException) -> bool:
    """Whether the Hub asked for a token, or for another one."""
    return any(
        isinstance(found, LocalTokenNotFoundError) or getattr(getattr(found, "response", None), "status_code", None) in (401, 403)
        for found in _chain(error)
    )


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what it came from."""
    chain = [error]
    while (source := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(source)
    return chain
