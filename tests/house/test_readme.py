"""The README and docs/: their Python runs and prints what they say, their commands are accepted by the real parsers,
their links and names exist.

A new block that needs a new name gets it in `known_to_the_reader`; a new command gets a line in `check_command`. Nothing here
trains more than a tiny model, and nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sft_rows
import torch
import transformers as tf
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from byte_tokenizer import byte_tokenizer
from helpers import CLASSES, arguments, classification_rows, collate, tiny_bert, tiny_llama
from model_sweep import MAPPINGS
from places import ROOT
from shtab import SUPPORTED_SHELLS
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from torch.distributed.run import get_args_parser

from hf_ls.compare.experiment import CompareArguments, parse_compare
from hf_ls.run.arguments import DataArguments, ModelArguments, RunArguments, TrainingQuestions
from hf_ls.run.config import Parser, parse_config
from hf_ls.run.evaluate import EvaluateArguments, parse_evaluation
from hf_ls.trainer.arguments import LabelSmoothingSeq2SeqArguments

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
BLOCKS = [
    (name, m.group(1), m.group(2), text.count("\n", 0, m.start(2)))
    for name, text in DOCUMENTS.items()
    for m in FENCE.finditer(text)
]
PROSE = {name: FENCE.sub("", text) for name, text in DOCUMENTS.items()}
USER_FILES = {".csv": "sentence,stars,text,label\ngood,1,good,1\nbad,0,bad,0\n", ".jsonl": '{"text": "good", "label": 1}\n'}
# These do what the words say, in a fresh environment; what can be wrong in them is checked below.
PROGRAMS = {"cd": None, "git": None, "pip": None, "pytest": None}


def known_to_the_reader() -> dict[str | None, dict[str, Any]]:
    """The names which a block may use without defining them: for all blocks (None), and from the block that holds a text on."""
    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES, (4,))
    answers = torch.randint(0, CLASSES, (200,))
    scores = torch.randn(200, CLASSES) + 2 * torch.nn.functional.one_hot(answers, CLASSES)
    tokenizer = sft_rows.tokenizer()
    return {
        None: dict(
            torch=torch, model=tiny_bert(), train=classification_rows(), validation=classification_rows(seed=1), collator=collate,
            args=arguments("out"), model_init=lambda trial=None: tiny_bert(), logits=torch.randn(4, CLASSES, requires_grad=True),
            labels=labels, class_weight=torch.ones(CLASSES), hidden=torch.randn(4, 16, requires_grad=True),
            head_weight=torch.randn(CLASSES, 16), validation_logits=scores.numpy(), validation_labels=answers.numpy(),
            language_model=tiny_llama(), conversations=sft_rows.conversations(), tokenizer=tokenizer, texts=["w5 w6", "w7"],
            reward_model=sft_rows.reward_model(), preferences=sft_rows.preferences(),
            pipe=tf.pipeline("text-classification", tiny_bert(), tokenizer=tokenizer, device="cpu"),
        ),
        "predict_proba": predictions_of_scikit_learn(),
        "answer_logits": dict(language_model=tiny_llama(vocab_size=280), tokenizer=byte_tokenizer()),
        "evaluate.load": dict(probabilities=scores.softmax(-1).numpy(), labels=answers.numpy()),
    }  # fmt: skip


def predictions_of_scikit_learn() -> dict[str, Any]:
    x, y = make_classification(400, n_informative=4, n_classes=3, random_state=0)
    parts = {"x_validation": x[200:300], "y_validation": y[200:300], "x_test": x[300:], "y_test": y[300:]}
    return {"classifier": LogisticRegression().fit(x[:200], y[:200])} | parts


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a shell block as words, continued lines joined, settings of the environment before them left out."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", ";", "|")), len(words))
            command, words = words[:end], words[end + 1 :]
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command = command[1:]
            yield command


def script(path: str) -> ModuleType:
    if (folder := str((ROOT / path).parent)) not in sys.path:
        sys.path.append(folder)  # as Python does for a script
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


# How each script reads its arguments.
PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "scripts/finetune.py": parse_config,
    "scripts/compare.py": parse_compare,
    "scripts/evaluate.py": parse_evaluation,
    "scripts/benchmark_loss.py": lambda argv: script("scripts/benchmark_loss.py").command_line().parse_args(argv),
    "scripts/benchmark_step.py": lambda argv: script("scripts/benchmark_step.py").command_line().parse_args(argv),
    "scripts/benchmark_training.py": lambda argv: script("scripts/benchmark_training.py").command_line().parse_args(argv),
    "scripts/study.py": lambda argv: script("scripts/study.py").command_line().parse_args(argv),
    "tests/support/model_sweep.py": lambda argv: [MAPPINGS.index(name) for name in argv],
}


def check_command(words: list[str]) -> None:
    """Whether this would start; raises what the program itself raises or says."""
    program, rest = Path(words[0]).name, words[1:]
    if re.fullmatch(r"python[\d.]*", program):
        if rest[0] == "-m":
            assert rest[1] in ("pip", "venv") or importlib.util.find_spec(rest[1]), rest[1]
            return
        name, argv = rest[0], rest[1:]
    elif program == "accelerate":
        args = launch_command_parser().parse_args(rest[1:])
        assert rest[0] == "launch" and (args.config_file is None or Path(args.config_file).is_file())
        name, argv = args.training_script, args.training_script_args
    elif program == "torchrun":
        args = get_args_parser().parse_args(rest)
        name, argv = args.training_script, args.training_script_args
    elif program == "uv":
        assert rest[0] == "run"
        name, argv = rest[1], rest[2:]
    elif program == "hf-ls" and rest[-1] in ("--version", "--help"):
        assert rest[:-1] in ([], ["finetune"])
        return
    elif program == "hf-ls" and rest[0] == "completion":
        assert rest[1] in SUPPORTED_SHELLS
        return
    elif program == "hf-ls":
        assert rest[0] in ("finetune", "compare", "evaluate"), rest[0]
        name, argv = f"scripts/{rest[0]}.py", rest[1:]
    elif program in PROGRAMS:
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)) if program == "pip" else []:
            assert set(extra.split(",")) <= declared.keys(), f"expected extras among {set(declared)}, got {extra}"
        return
    else:
        raise AssertionError(f"expected a program which this test knows, got {words[0]}; add it to check_command")
    assert name in PARSERS, f"expected a script among {sorted(PARSERS)}, got {name}; add it to PARSERS"
    assert (ROOT / name).is_file()
    for word in argv:
        if (content := USER_FILES.get(Path(word).suffix)) and not Path(word).exists():
            Path(word).write_text(content)
    PARSERS[name](argv)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder which looks like the checkout to a command, so that whatever is written is thrown away."""
    for name in ("configs", "scripts", "model_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", sorted({name for name, language, *_ in BLOCKS if language == "python"}))
def test_every_python_block_runs_in_its_order(document, checkout, capsys):
    """All of a document in one namespace, each unchanged; a traceback names the line. A `text` block right below is what it prints."""
    given = known_to_the_reader()
    namespace = dict(given[None])
    blocks = [block for block in BLOCKS if block[0] == document]
    for (_, language, code, line), after in zip(blocks, [*blocks[1:], None], strict=True):
        if language != "python":
            continue
        for mark, names in given.items():
            namespace |= names if mark is not None and mark in code else {}
        AcceleratorState._reset_state(reset_partial_state=True)  # TRL trains in bfloat16, and one process keeps one precision
        capsys.readouterr()
        exec(compile("\n" * line + code, str(ROOT / document), "exec"), namespace)
        if after and after[1] == "text" and after[3] == line + code.count("\n") + 3:
            assert capsys.readouterr().out == after[2]


def test_the_readme_is_short_and_speaks_of_every_other_page():
    words = [word for word in DOCUMENTS["README.md"].split() if re.search(r"\w", word)]  # not the lines of a table
    assert len(words) <= 1500
    linked = set(re.findall(r"\]\((docs/[^)#]+)\)", PROSE["README.md"]))
    assert linked == {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "words",
    [c for _, language, block, _ in BLOCKS if language in ("bash", "sh") for c in commands(block)],
    ids=lambda c: " ".join(c)[:60],
)
def test_every_command_is_accepted(words, checkout):
    check_command(words)


def test_commands_with_a_mistake_are_noticed(checkout):
    launch = ["accelerate", "launch", "--cpu", "scripts/finetune.py", "--config", "configs/text-classification.yaml"]
    check_command([*launch, "--label_smoothing_factor", "0.05"])
    for wrong, error in (
        ([*launch, "--label_smoothing", "0.05"], ValueError),
        ([*launch[:-1], "configs/none.yaml"], ValueError),
        (["python", "scripts/none.py"], AssertionError),
        (["pip", "install", ".[none]"], AssertionError),
        (["python", "scripts/benchmark_loss.py", "--round", "3"], SystemExit),
    ):
        with pytest.raises(error):
            check_command(wrong)


def test_every_block_says_its_language_and_yaml_can_be_read():
    for document, language, block, line in BLOCKS:
        assert language in ("python", "bash", "sh", "yaml", "text"), f"{document}:{line}"
        if language == "yaml":
            yaml.safe_load(block)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_images_exist(document):
    def slug(heading: str) -> str:
        return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

    prose = PROSE[document]
    anchors = {slug(m.group(1)) for m in re.finditer(r"^#+ (.*)$", prose, re.M)}
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith(("http://", "https://", "mailto:")):
            assert ((ROOT / document).parent / target.split("#")[0]).exists(), target


def spans() -> list[str]:
    return [span for prose in PROSE.values() for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)]


def test_flags_in_the_text_exist():
    """`--name` or `--name value` in a sentence is a flag of a script, of accelerate or of torchrun."""
    settings = [RunArguments, ModelArguments, DataArguments, TrainingQuestions, LabelSmoothingSeq2SeqArguments]
    parsers = [Parser(settings), Parser(CompareArguments), Parser(EvaluateArguments), launch_command_parser(), get_args_parser()]
    parsers += [script(path).command_line() for path in PARSERS if "benchmark" in path or "study" in path]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings} | {"--config"}
    named = {span.split()[0] for span in spans() if re.fullmatch(r"--[a-z_-]+( \S+)*", span)}
    assert named
    assert not named - known


def test_names_in_the_text_exist():
    """`hf_ls.a.b` in a sentence can be imported, and `label_smoothing_…` is a setting."""
    settings = {field.name for field in fields(LabelSmoothingSeq2SeqArguments)}
    for span in spans():
        if re.fullmatch(r"hf_ls(\.\w+)+", span):
            found: Any = importlib.import_module("hf_ls")
            for part in span.split(".")[1:]:
                found = getattr(found, part)
        elif match := re.fullmatch(r"(label_smoothing_\w+)(?:[:=] ?.*)?", span):
            assert match.group(1) in settings, span
    paths = [span for span in spans() if re.fullmatch(r"(?:hf_ls|scripts|configs|tests|model_cards|\.ci)/[\w./-]+", span)]
    assert not [path for path in paths if not os.path.exists(ROOT / path)]
