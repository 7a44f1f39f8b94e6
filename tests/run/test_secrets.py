"""No secret in any file, log or command line, and no path of this machine in anything pushed: all outputs are swept."""

from __future__ import annotations

import copy
import json
import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
import yaml
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from tiny_run import ALL, arguments

from hf_ls import LabelSmoothingArguments
from hf_ls.common.errors import uploading
from hf_ls.common.privacy import pickled_for_others, without_paths, without_secrets, yaml_without_secrets
from hf_ls.compare.experiment import parse_compare, run_comparison
from hf_ls.compare.worker import run_cell
from hf_ls.run.config import parse_config
from hf_ls.run.evaluate import evaluate, parse_evaluation
from hf_ls.run.finetune import finetune

SECRET = "hf_plantedPlantedPlanted"
SHORT = ["--max_train_samples", "48", "--max_eval_samples", "40", "--max_predict_samples", "50", "--max_steps", "2"]
SAVING = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1",
          "--load_best_model_at_end", "--metric_for_best_model", "nll"]  # fmt: skip


@pytest.fixture
def pushed(monkeypatch):
    """What is uploaded, by name, and the token it is sent with."""
    sent: dict[str, bytes] = {}

    def commit(self, repo_id, operations, **kwargs):
        assert self.token == SECRET
        for found in operations:
            content = found.path_or_fileobj
            sent[found.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: RepoUrl(f"https://huggingface.co/{name}"))
    monkeypatch.setattr(HfApi, "create_commit", commit)
    return sent


def holding(folder: Path, secret: str) -> list[str]:
    """The files, and members of zip archives, in which the secret stands."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        parts = {str(path): path.read_bytes()}
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts |= {f"{path}:{name}": archive.read(name) for name in archive.namelist()}
        found += [name for name, content in parts.items() if secret.encode() in content]
    return found


def test_the_sweep_finds_what_is_there(tmp_path):
    torch.save(tf.TrainingArguments(output_dir=str(tmp_path), hub_token=SECRET), tmp_path / "training_args.bin")
    (tmp_path / "a.json").write_text(json.dumps({"token": SECRET}))
    assert len(holding(tmp_path, SECRET)) >= 2


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_run_keeps_the_token_and_its_paths_to_itself(peft, tiny, tmp_path, pushed, capfd, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    config = parse_config(
        [*arguments(tiny, tmp_path / "out", *ALL, *SHORT, *SAVING), "--label_smoothing_factor", "0.1", "--peft", peft,
         "--push_to_hub", "--hub_model_id", "me/tiny", "--hub_token", SECRET, "--log_level", "info"]
    )  # fmt: skip
    finetune(config)
    assert config.training.hub_token == SECRET and "HF_TOKEN" not in os.environ
    assert holding(tmp_path, SECRET) == [] and SECRET not in "".join(capfd.readouterr())
    weights = "model.safetensors" if peft == "none" else "adapter_model.safetensors"
    assert {"README.md", "calibration.json", "trainer_state.json", weights} <= set(pushed) and "notes.txt" not in pushed
    assert {"config.json" if peft == "none" else "adapter_config.json"} <= set(pushed)
    for path in (str(tmp_path), tiny, str(Path.home()) + "/", str(Path.cwd()) + "/", SECRET):
        assert [name for name, content in pushed.items() if path.encode() in content] == [], path


def test_hub_strategies_which_push_checkpoints_are_refused(tiny, tmp_path, pushed):
    push = ["--push_to_hub", "--hub_strategy", "all_checkpoints", "--hub_token", SECRET]
    with pytest.raises(ValueError, match="expected hub_strategy end or every_save, got all_checkpoints"):
        finetune(parse_config([*arguments(tiny, tmp_path / "out", *ALL, *SHORT), *push]))
    assert not pushed and not (tmp_path / "out").exists()


def test_a_comparison_gives_its_cells_the_token_and_no_file(tiny, tmp_path, capfd, monkeypatch):
    """From the command line and from a YAML file; the cells find it in their environment."""
    started = []

    class Ended:
        """A cell which has run in this process."""

        returncode, stdin = 0, None

        def __init__(self, command, *, env, **kwargs):
            started.append((command, env.get("HF_TOKEN")))
            run_cell(Path(command[-1]))

        def poll(self):
            return self.returncode

    monkeypatch.setattr("hf_ls.compare.cells.subprocess.Popen", Ended)
    own = tmp_path / "own.yaml"
    own.write_text(f"hub_token: {SECRET}\nseed: 3\n")
    argv = arguments(tiny, tmp_path / "out", *SHORT, "--epsilons", "0.2", "--seeds", "0", "--repetitions", "20", "--jobs", "1")
    run_comparison(*parse_compare([*argv, "--config", str(own), "--hub-token", SECRET]))
    assert [token for _, token in started] == [SECRET] * 2 and all("hf_ls.compare.worker" in command for command, _ in started)
    assert SECRET not in repr([command for command, _ in started])
    assert holding(tmp_path / "out", SECRET) == [] and SECRET not in "".join(capfd.readouterr())
    assert (tmp_path / "out" / "config.yaml").read_text() == "hub_token: null\nseed: 3\n"


def test_an_evaluation_writes_no_token(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    evaluate(parse_evaluation(
        ["--model_name_or_path", tiny, "--output_dir", str(tmp_path / "out"), "--dataset_name", "snippets", "--max_samples", "40",
         "--use_cpu", "true", "--write_card", "true", "--label_map", '{"negative": 0, "neutral": 1, "positive": 2}']
    ))  # fmt: skip
    assert (tmp_path / "out" / "README.md").is_file()
    assert holding(tmp_path, SECRET) == [] and SECRET not in "".join(capfd.readouterr())
    for name in ("calibration.json", "README.md"):
        assert tiny not in (tmp_path / "out" / name).read_text()


@pytest.mark.parametrize("kind", [LabelSmoothingArguments, tf.TrainingArguments])
def test_the_arguments_which_a_trainer_pickles_hold_no_secret_and_no_path(tmp_path, kind):
    """Of plain arguments too; pickles of others, as for a new process, and copies stay whole."""
    args = kind(output_dir=str(tmp_path / "out"), hub_token=SECRET, fsdp_config={"x": str(tmp_path / "out" / "y")})
    with pickled_for_others(args):
        torch.save(args, tmp_path / "training_args.bin")
    assert holding(tmp_path, SECRET) == holding(tmp_path, str(tmp_path)) == []
    found = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (type(found), found.hub_token, found.output_dir, found.seed) == (kind, None, "./out", args.seed)
    whole = pickle.loads(pickle.dumps(args))
    for same in (args, whole, copy.copy(args), copy.deepcopy(args)):
        assert (same.hub_token, same.output_dir) == (SECRET, str(tmp_path / "out"))
    assert SECRET not in str(args) + args.to_json_string()


def _status(number):
    return SimpleNamespace(headers={}, request=None, status_code=number)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (HFValidationError("Repo id must use alphanumeric chars"), "give a name such as owner/name as hub_model_id"),
        (LocalTokenNotFoundError("no token"), "log in"),
        (HfHubHTTPError("401 Unauthorized", response=_status(401)), "log in"),
        (HfHubHTTPError("500 Server Error", response=_status(500)), "try again later"),
        (OfflineModeIsEnabled("offline"), "unset HF_HUB_OFFLINE"),
        (TimeoutError("timed out"), "try again later"),
    ],
    ids=["name", "no token", "refused", "broken", "offline", "slow"],
)
def test_what_the_hub_refuses_is_a_sentence_with_a_remedy(error, remedy):
    with (
        pytest.raises(ValueError, match=r"^expected to upload the model to me/x, got: ") as found,
        uploading("the model", "me/x"),
    ):
        raise error
    assert remedy in str(found.value) and "\n" not in str(found.value)


def test_an_error_of_ours_while_something_is_sent_stays_as_it_is():
    with pytest.raises(KeyError), uploading("the model", "me/x"):
        raise KeyError("ours")


@pytest.mark.parametrize(
    "argv", [["--hub_token", SECRET], [f"--hub_token={SECRET}"], ["--hub-token", SECRET], [f"--hub-token={SECRET}"]]
)
def test_options_which_hold_a_secret_are_taken_out(argv):
    assert without_secrets(["--seed", "1", *argv, "--max_length", "4"]) == ["--seed", "1", "--max_length", "4"]


@pytest.mark.parametrize("text", [f"{{hub_token: {SECRET}, seed: 3}}", f"hub_token: '{SECRET}'  # mine\nseed: 3", "seed: 3"])
def test_secrets_are_taken_out_of_yaml(text):
    found = yaml_without_secrets(text)
    assert SECRET not in found and yaml.safe_load(found)["seed"] == 3
    assert text != "seed: 3" or found == text


def test_paths_become_names_or_the_text_stays_here():
    assert without_paths('{"a": ["/data/me/model"], "b": 1}', ["/data/me/"]) == '{\n  "a": [\n    "./model"\n  ],\n  "b": 1\n}\n'
    assert without_paths('{"a" : 1}', ["/data/me/"]) == '{"a" : 1}'
    assert without_paths("base: /data/me/model", ["/data/me/"]) is None
    assert without_paths('{"/data/me/model": 1}', ["/data/me/"]) is None
