"""The command line: `hf-ls`, a help of two screens, lists for `--report_to`, headings of runs and a quiet second load."""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from transformers import TrainingArguments
from transformers.utils import logging

from hf_ls import __version__, cli
from hf_ls.report.naming import CardArguments
from hf_ls.run.arguments import DataArguments, ModelArguments, RunArguments
from hf_ls.run.config import Parser, parse_config
from hf_ls.run.launch import silenced
from hf_ls.trainer.arguments import LabelSmoothingArguments

SNIPPETS = ["--dataset_name", "snippets"]
OWN = [field.name for kind in (RunArguments, ModelArguments, DataArguments, CardArguments) for field in fields(kind)]
OWN += list(LabelSmoothingArguments.__annotations__)


def shown(monkeypatch: pytest.MonkeyPatch, capsys: Any, *argv: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["hf-ls", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    return capsys.readouterr().out.splitlines()


def test_help_of_finetune_fits_two_screens_with_label_smoothing_first(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lines = shown(monkeypatch, capsys, "finetune", "--help")
    assert len(lines) <= 110 and max(map(len, lines)) <= 118
    names = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    assert names[0] == "label_smoothing_factor" and set(OWN) <= set(names) and len(names) == len(set(names))
    assert names.index("task") < names.index("model_name_or_path") < names.index("learning_rate")
    assert {"output_dir", "seed", "report_to", "help_all", "version"} <= set(names)


def test_help_all_has_every_setting_in_whole_sentences(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lines = shown(monkeypatch, capsys, "finetune", "--help_all")
    names = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    assert {field.name for field in fields(TrainingArguments)} | set(OWN) <= set(names) and len(names) == len(set(names))
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_the_other_commands_say_their_settings(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lines = shown(monkeypatch, capsys, command, "--help")
    assert lines[0].startswith("usage: ") and 10 < len(lines) <= 60 and sum(line.startswith("  --") for line in lines) > 5


def test_the_version_and_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert shown(monkeypatch, capsys, "evaluate", "--version") == [f"hf_ls {__version__}"]
    monkeypatch.setattr(sys, "argv", ["hf-ls", "--version"])
    cli.main()
    monkeypatch.setattr(sys, "argv", ["hf-ls"])
    cli.main()
    out = capsys.readouterr().out
    assert f"hf_ls {__version__}" in out and all(f"  {name} " in out for name in ("finetune", "compare", "evaluate"))
    monkeypatch.setattr(sys, "argv", ["hf-ls", "train"])
    with pytest.raises(SystemExit, match="expected a command of finetune, compare, evaluate, completion, got 'train'"):
        cli.main()


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command_and_setting(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-ls", "completion", shell])
    cli.main()
    out = capsys.readouterr().out
    assert all(name in out for name in ("finetune", "compare", "evaluate", *OWN, "num_train_epochs", "epsilons", "predictions"))
    monkeypatch.setattr(sys, "argv", ["hf-ls", "completion", "csh"])
    with pytest.raises(SystemExit, match=r"expected a shell of bash, .*, got csh; try hf-ls completion bash"):
        cli.main()


def test_the_entry_point_and_the_scripts_call_the_same_functions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["hf-ls"].partition(":")
    assert getattr(import_module(module), name) is cli.main
    for command in ("finetune", "compare", "evaluate"):
        assert f"from hf_ls.cli import {command}_command\n" in Path(ROOT, "scripts", f"{command}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [(["tensorboard", "wandb"], ["tensorboard", "wandb"]), (["none"], []), (["tensorboard"], ["tensorboard"])],
)
def test_report_to_takes_a_list(words: list[str], wanted: list[str]) -> None:
    assert parse_config([*SNIPPETS, "--report_to", *words]).training.report_to == wanted
    with pytest.raises(ValueError, match="expected report_to among"):
        parse_config([*SNIPPETS, "--report_to", "tensorboard", "wandbb"])


def test_help_is_no_setting_of_a_file(tmp_path: Path) -> None:
    for name in ("help_all", "version"):
        (tmp_path / "a.yaml").write_text(f"{name}: true\n")
        with pytest.raises(ValueError, match=f"expected known settings in .*, got '{name}'"):
            parse_config(["--config", str(tmp_path / "a.yaml")])
    assert not vars(Parser([CardArguments]).parse_args([])).keys() & {"help_all", "version"}


def test_a_second_load_is_quiet_and_leaves_the_settings_as_they_were() -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), silenced():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
        raise KeyError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("name", ["finetune", "compare", "evaluate"])
def test_uv_run_finds_what_a_script_needs(name: str) -> None:
    """The header of PEP 723, as its reference implementation reads it: this checkout, with an extra which it has."""
    text = (ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8")
    (found,) = re.finditer(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text)
    header = tomllib.loads("".join(line[2:] if line[:2] == "# " else line[1:] for line in found["content"].splitlines(True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert found["type"] == "script" and header["requires-python"] == project["requires-python"]
    (extra,) = re.fullmatch(r"hf_ls\[(\w+)\]", header["dependencies"][0]).groups()
    assert extra in project["optional-dependencies"]
    assert (ROOT / "scripts" / header["tool"]["uv"]["sources"]["hf_ls"]["path"]).resolve() == ROOT
