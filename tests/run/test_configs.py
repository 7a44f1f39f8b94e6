"""Every YAML of configs/ gets through a dry run: its settings, its data and its model are what the script can use.

Where a config needs the Hub (token-classification.yaml downloads CoNLL-2003) or a file of the user's own, the data come from a local
file, given on the command line as a reader without a network would.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from byte_tokenizer import byte_tokenizer
from helpers import tiny_llama
from places import ROOT

from hf_ls.run.config import parse_config
from hf_ls.run.finetune import finetune

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# What stands on the command line beside `--config`, so that a dry run tokenises little; the keys are the files there must be.
FEW = ["--max_train_samples", "60", "--max_eval_samples", "20", "--max_predict_samples", "20"]
OWN = {
    "answers.yaml": ["--model_name_or_path", "language-model", "--peft", "none"],
    "own-data.yaml": ["--train_file", "words.jsonl"],
    "token-classification.yaml": ["--dataset_name", "null", "--train_file", "words.jsonl", "--test_file", "test.jsonl"],
}
SPLITS = {  # what the log says it found; 4 of 40 rows are cut from train where there is no validation file
    "answers.yaml": "60 train, 20 validation, 20 test",
    "causal-lm.yaml": "60 train, 20 validation, 20 test",
    "raters.yaml": "60 train, 20 validation, 20 test",
    "sft.yaml": "60 train, 20 validation, 20 test",
    "seq2seq.yaml": "60 train, 20 validation, 20 test",
    "text-classification.yaml": "60 train, 20 validation, 20 test",
    "own-data.yaml": "32 train, 4 validation, 4 test",
    "token-classification.yaml": "36 train, 4 validation, 10 test",
}


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Two files with the columns of CoNLL-2003 and a language model, in the current folder."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(vocab_size=280).save_pretrained("language-model")
    byte_tokenizer().save_pretrained("language-model")
    for name, start, n in (("words.jsonl", 0, 40), ("test.jsonl", 40, 10)):
        rows = [{"tokens": [f"Ann{i}", "saw", "Oslo"], "ner_tags": ["B-PER", "O", "B-LOC"]} for i in range(start, start + n)]
        Path(name).write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_there_is_one_config_for_each_expectation():
    assert {path.name for path in CONFIGS} == SPLITS.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_gets_through_a_dry_run(path, words, capsys):
    before = sorted(words.rglob("*"))
    argv = ["--config", str(path), "--dry_run", "true", "--use_cpu", "true", *FEW, *OWN.get(path.name, [])]
    assert finetune(parse_config(argv)) is None
    assert f"dry run: {SPLITS[path.name]}; " in capsys.readouterr().out
    assert sorted(words.rglob("*")) == before, "a dry run leaves nothing"


def parts(config):
    return [config.run, config.model, config.data, config.training, config.questions]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_what_a_config_says_is_what_the_script_gets(path):
    config = parse_config(["--config", str(path), "--use_cpu", "true"])
    for name, said in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        (holder,) = (part for part in parts(config) if hasattr(part, name))
        got = getattr(holder, name)
        got = getattr(got, "value", got)  # of an enumeration
        if isinstance(said, dict):
            assert json.loads(got) == said, name
        elif isinstance(got, float):
            assert got == float(said), name  # YAML 1.1 reads 2e-5 as a word
        elif name == "report_to":
            assert (said, got) == ("none", [])
        else:
            assert got == said, name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_settings_which_a_comment_recommends_exist(path):
    config = parse_config(["--config", str(path), "--use_cpu", "true"])
    advice = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    names = {name for line in advice for name in re.findall(r"\b([a-z]+_[a-z_]+)(?=: )", line)}
    assert not [name for name in names if not any(hasattr(part, name) for part in parts(config))]
