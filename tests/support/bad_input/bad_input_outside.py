"""Rows of the bad-input matrix about what lies outside: the Hub, the disk, comparisons and evaluations."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import huggingface_hub
from bad_input import DEV, OTHER, Call, Place, Row, compare, evaluate, files, finetune, script
from bad_input_files import _earlier, _resumed
from huggingface_hub.utils import _http, close_session

from hf_ls.common.files import write_atomically

httpx: Any = getattr(_http, "httpx2", None) or _http.httpx  # type: ignore[attr-defined]
PUSH = ("--push_to_hub", "true", "--hub_model_id", "me/tiny")
LOCK = r"out/\.lock$"  # held while a comparison works; to delete it would open a race
ALL = {"validation_csv": DEV, "test_csv": OTHER}


def _hub(status: int, **content: str | bytes) -> Call:
    """Files, and a Hub which answers every request with this status."""

    def refuse(request: Any) -> Any:
        headers = {"X-Error-Code": "GatedRepo"} if status == 403 else {}
        return httpx.Response(status, headers=headers, json={"error": "no"}, request=request)

    def given(place: Place) -> None:
        files(**content)(place)
        place.patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        place.patch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        place.patch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", lambda: httpx.Client(transport=httpx.MockTransport(refuse)))
        close_session()  # the next request makes a client by that factory, the one after this row by the old one
        place.undo.append(close_session)

    return given


HUB = [
    Row("hub: model while offline", sentence=r"unset HF_HUB_OFFLINE, or give a folder", given=files(), call=finetune("--model_name_or_path", "owner/model")),
    Row("hub: data while offline", sentence=r"the dataset owner/data on the Hub or in a folder, got: .*; unset HF_HUB_OFFLINE", call=finetune("--dataset_name", "owner/data", train=None)),
    Row("hub: push while offline", sentence=r"to upload the model to me/tiny, got: .*; unset HF_HUB_OFFLINE", given=files(), call=finetune(*PUSH)),
    Row("hub: model without a right (401)", sentence=r"got: .*; log in with `hf auth login`, or give a token", given=_hub(401), call=finetune("--model_name_or_path", "owner/model")),
    Row("hub: gated model (403)", sentence=r"got: .*; log in with `hf auth login`, or give a token", given=_hub(403), call=finetune("--model_name_or_path", "owner/model")),
    Row("hub: data without a right (401)", sentence=r"the dataset owner/data.*got: ", given=_hub(401), call=finetune("--dataset_name", "owner/data", train=None)),
    Row("hub: push without a right (403)", sentence=r"to upload the model to me/tiny, got: .*403.*; log in", given=_hub(403), call=finetune(*PUSH, "--hub_token", "hf_x")),
    Row("hub: push without a token (401)", sentence=r"to upload the model to me/tiny, got: .*; log in", given=_hub(401), call=finetune(*PUSH)),
    Row("hub: push over an earlier run (401)", sentence=r"to upload the model to me/tiny", given=lambda p: (_earlier(p), _hub(401)(p)), call=finetune(*PUSH, "--overwrite_output_dir")),
    Row("hub: server is down (503)", sentence=r"got: .*; try again later", given=_hub(503), call=finetune(*PUSH)),
]  # fmt: skip


def _full(place: Place, after: int = 0) -> None:
    """Every write to disk by `write_atomically` fails, the first ones not."""
    count = iter(range(after, -1, -1))

    def fsync(descriptor: int) -> None:
        if next(count, 0) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place.patch.setattr("hf_ls.common.files.os.fsync", fsync)


def _no_room(name: str, error: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(error, os.strerror(error), name)

    return fail


def _trainer_fails(method: str, error: int) -> Call:
    def given(place: Place) -> None:
        files()(place)
        place.patch.setattr(f"transformers.Trainer.{method}", _no_room("out/x", error))

    return given


DISK = [
    Row("disk: full while a file is replaced", lambda p: write_atomically(p.folder / "a.json", "new"), r"to write .*a\.json, got: No space left on device; free some space or give another output_dir", OSError, lambda p: (p.write(a_json="old"), _full(p))),
    Row("disk: full at the start", sentence=r"to write out/settings\.json, got: No space left on device", error=OSError, given=lambda p: (files()(p), _full(p)), call=finetune()),
    Row("disk: full in a checkpoint", sentence=r"to write out/x, got: No space left on device; .* What was finished before is kept", error=OSError, given=_trainer_fails("_save_checkpoint", errno.ENOSPC), call=finetune("--save_steps", "1"), may_add=r"out/settings\.json"),
    Row("disk: quota used up at the end", sentence=r"to write out/x, got: .*; free some space", error=OSError, given=_trainer_fails("save_model", errno.EDQUOT), call=finetune("--save_strategy", "no"), may_add="out/"),
    Row("disk: full when resumed", sentence=r"to write .*, got: No space left on device", error=OSError, given=lambda p: (_earlier(p), p.patch.setattr("transformers.Trainer.save_model", _no_room("out/x", errno.ENOSPC))), call=_resumed()["call"], may_add="out/(?!checkpoint-1/|settings)"),
    Row("disk: read-only output folder", sentence=r"to write out/settings\.json, got: Read-only file system", error=OSError, given=lambda p: (files()(p), p.patch.setattr("hf_ls.common.files.os.replace", _no_room("out", errno.EROFS))), call=finetune()),
    Row("disk: output folder of somebody else", sentence=r"to read or write out/settings\.json, got: Permission denied", error=PermissionError, given=lambda p: (files()(p), p.patch.setattr("hf_ls.common.files.os.replace", _no_room("out", errno.EACCES))), call=finetune()),
    Row("disk: output folder is a file", sentence=r"to write out.*, got: (Not a directory|File exists)", error=NotADirectoryError, given=lambda p: (files()(p), (p.folder / "out").write_text("mine")), call=finetune()),
    Row("disk: output folder in a file", sentence=r"to write train\.csv/out.*, got: Not a directory", error=NotADirectoryError, given=files(), call=finetune("--output_dir", "train.csv/out")),
    Row("disk: output folder in /proc", sentence=r"got: No such file or directory", error=FileNotFoundError, given=files(), call=finetune("--output_dir", "/proc/out")),
]  # fmt: skip


def _by_hand(place: Place) -> None:
    (place.folder / "out").mkdir()
    (place.folder / "out" / "README.md").write_text("# Mine\n")


def _compared(*argv: str, **content: str) -> dict[str, Any]:
    call = compare("--validation_file", "validation.csv", "--test_file", "test.csv", *argv)
    return {"given": files(**(ALL | content)), "call": call, "may_add": LOCK}


COMPARE = [
    Row("compare: epsilons beyond 1", sentence=r"different epsilons in \[0, 1\), got \[0\.1, 1\.5\]", **_compared("--epsilons", "0.1", "1.5")),
    Row("compare: an epsilon twice", sentence=r"different epsilons in \[0, 1\), got \[0\.1, 0\.1\]", **_compared("--epsilons", "0.1", "0.1")),
    Row("compare: the baseline alone", sentence=r"an epsilon above 0 or objectives, got the baseline alone", **_compared("--epsilons", "0")),
    Row("compare: a seed twice", sentence=r"different seeds of 0 or more, got \[1, 1\]", **_compared("--seeds", "1", "1")),
    Row("compare: all labels flipped", sentence=r"0 <= flip_labels < 1, got 1\.0", **_compared("--flip_labels", "1")),
    Row("compare: unknown objective", sentence=r"an objective in .*, got 'focl'", **_compared("--objectives", "focl")),
    Row("compare: flipped labels of tokens", sentence=r"flip_labels only with task text-classification, got 0.2", **_compared("--task", "causal-lm", "--flip_labels", "0.2")),
    Row("compare: soft labels", sentence=r"labels to learn, got soft_label_columns \['good', 'bad'\], on which no cell would train", **_compared("--soft_label_columns", "good", "bad")),
    Row("compare: early stopping", sentence=r"no early_stopping_patience, got one", **_compared("--early_stopping_patience", "2", "--load_best_model_at_end", "true", "--eval_strategy", "epoch", "--save_strategy", "epoch")),
    Row("compare: resume", sentence=r"no resume_from_checkpoint or overwrite_output_dir, got one", **_compared("--overwrite_output_dir")),
    Row("compare: an unknown setting", sentence=r"known settings, got --epsilonz \(did you mean", **_compared("--epsilonz", "0.1")),
    Row("compare: a set which is no file", sentence=r"different names as in name=path\.csv, got \['other'\]", **_compared("--ood_file", "other")),
    Row("compare: sources of other data", sentence=r"ood_sources only with dataset_name: snippets, got None", **_compared("--ood_sources", "tweets", "--dry_run")),
    Row("compare: no test split", sentence=r"train, validation and test, got no \['test'\]", given=files(), call=compare("--dry_run", "--test_fraction", "0"), may_add=LOCK),
    Row("compare: one-off labels in another set", sentence=r"labels among \['bad', 'good'\] in far\.csv, got \['ugly'\]", **_compared("--ood_file", "far=far.csv", "--dry_run", far_csv="text,label\nw1 w2,ugly\n")),
]  # fmt: skip


EVALUATE = [
    Row("evaluate: no data", sentence=r"expected dataset_name or test_file, got None and \{\}", call=lambda p: script("evaluate", p, ["--model_name_or_path", p.models["good"], "--output_dir", "out"])),
    Row("evaluate: missing file", evaluate(), r"existing files, got \['test\.csv'\]"),
    Row("evaluate: empty file", evaluate(), r"rows in \['test\.csv'\], got: empty files", given=files(test_csv="")),
    Row("evaluate: validation is test", evaluate("--validation_file", "./test.csv"), r"two files, got one for both splits", given=files(test_csv=OTHER)),
    Row("evaluate: missing column", evaluate("--label_column", "class"), r"examples with \['text', 'class'\] in test, got", given=files(test_csv=OTHER)),
    Row("evaluate: classes the model has not", evaluate(), r"the labels of the model, bad, good, got ugly in the data; say which is which with label_map", given=files(test_csv=OTHER + "w1,ugly\n")),
    Row("evaluate: label_map is no JSON", evaluate("--label_map", "a=b"), r"label_map as JSON, got 'a=b'", given=files(test_csv=OTHER)),
    Row("evaluate: labels are real numbers", evaluate(), r"classes as words or integers in label, got 0\.5", given=files(test_csv="text,label\nw1,0.5\n")),
    Row("evaluate: text missing in a row", evaluate(), r"text in every row of test, got 1 empty of 25", given=files(test_csv=OTHER + ",good\n")),
    Row("evaluate: epsilon beyond 1", evaluate("--epsilon", "1.5"), r"0 <= epsilon < 1, got 1\.5", given=files(test_csv=OTHER)),
    Row("evaluate: unknown setting", evaluate("--do_train"), r"known settings, got --do_train", given=files(test_csv=OTHER)),
    Row("evaluate: into the model's folder", lambda p: evaluate("--output_dir", p.models["good"])(p), r"an output_dir beside the model, got its own folder", given=files(test_csv=OTHER)),
    Row("evaluate: a model without a head", evaluate(model="headless"), r"a trained text-classification model, got .* without classifier", given=files(test_csv=OTHER)),
    Row("evaluate: a model which is not there", evaluate("--model_name_or_path", "./nowhere"), r"a model in safetensors at \./nowhere, got: no such folder, and no name of the Hub; check", given=files(test_csv=OTHER)),
    Row("evaluate: a card which is not there", evaluate("--update_card", "./nowhere", "--dataset_id", "owner/data"), r"update_card as a README\.md, a folder or a Hub id, got '\./nowhere'", given=files(test_csv=OTHER)),
    Row("evaluate: into a training run", evaluate(), r"an output_dir beside that of a run, got one with settings\.json; its report would be lost", given=lambda p: (_earlier(p), p.write(test_csv=OTHER))),
    Row("evaluate: over a card written by hand", evaluate("--write_card"), r"out/README\.md to be absent or generated, got one written by hand", given=lambda p: (p.write(test_csv=OTHER), _by_hand(p))),
    Row("evaluate: a card of nobody", evaluate("--update_card", "./nowhere"), r"data with an id on the Hub or a title to update a card, got 'test\.csv'", given=files(test_csv=OTHER)),
]  # fmt: skip

ROWS = [*HUB, *DISK, *COMPARE, *EVALUATE]
