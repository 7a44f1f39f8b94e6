"""No data may run code: weights, arrays, checkpoints, settings, and code from a model's repository.

The bait is a pickle, a Python file or a YAML tag which would create a file. `test_the_bait_works` shows that it does where
somebody lets it; every other test shows that nobody does. Of the Trainer (transformers 5.23) these tests state: it reads
optimizer.pt, scheduler.pt and rng_state.pth of a checkpoint with `torch.load(weights_only=True)`, never reads training_args.bin,
which it writes, and reads a pytorch_model.bin with weights_only=True where there is no model.safetensors.
"""

from __future__ import annotations

import ast
import json
import pickle
import runpy
import shutil
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import arguments, classification_rows, collate, tiny_bert
from places import ROOT

from hf_ls import LabelSmoothingArguments, LabelSmoothingTrainer
from hf_ls.calibration.temperature import bake_folder
from hf_ls.common.models import load_weights
from hf_ls.compare.cells import Cell
from hf_ls.compare.results import Predictions
from hf_ls.data.classification import EMBEDDED_MODEL, model_path
from hf_ls.report.pictures import PENULTIMATE, Penultimate
from hf_ls.run.config import parse_config
from hf_ls.run.evaluate import evaluate, parse_evaluation
from hf_ls.run.finetune import finetune
from hf_ls.run.loading import load_distillation_teacher
from hf_ls.run.outcome import PREDICTIONS
from hf_ls.trainer.distillation import load_teacher

SOURCES = [*ROOT.glob("hf_ls/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob(".ci/*.py")]
AUTO = tf.AutoModelForSequenceClassification
DRY = [
    "--do_train",
    "--dataset_name",
    "snippets",
    "--dry_run",
    "true",
    "--use_cpu",
    "true",
    "--report_to",
    "none",
    "--max_train_samples",
    "20",
]


class Bait:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def trap(tmp_path):
    """The file which must never appear."""
    path = tmp_path / "owned"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A tiny BERT for three classes with the real tokenizer, saved in safetensors."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = tf.AutoTokenizer.from_pretrained(model_path(EMBEDDED_MODEL))
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3)
    tf.BertForSequenceClassification(tf.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pickled(classifier: Path, folder: Path, weights: object) -> Path:
    """The same model with these pickled weights alone."""
    shutil.copytree(classifier, folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def test_the_bait_works(tmp_path):
    torch.save({"w": Bait(tmp_path / "owned")}, tmp_path / "w.bin")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.bin", weights_only=True)
    assert not (tmp_path / "owned").exists()
    torch.load(tmp_path / "w.bin", weights_only=False)
    assert (tmp_path / "owned").exists()


# Weights


@pytest.mark.parametrize("content", ["good", "bad"])
@pytest.mark.parametrize("load", [
    lambda folder, out: load_weights(AUTO, folder),
    lambda folder, out: load_teacher(str(folder), AUTO),
    lambda folder, out: bake_folder(folder, 2.0),
    lambda folder, out: finetune(parse_config([*DRY, *out, "--model_name_or_path", str(folder)])),
    lambda folder, out: evaluate(parse_evaluation([*out, "--dataset_name", "snippets", "--model_name_or_path", str(folder)])),
], ids=["load_weights", "load_teacher", "bake_folder", "finetune", "evaluate"])  # fmt: skip
def test_pickled_weights_are_refused_whatever_is_in_them(load, content, classifier, tmp_path, trap):
    weights = AUTO.from_pretrained(classifier).state_dict() if content == "good" else {"w": Bait(trap)}
    folder = pickled(classifier, tmp_path / "model", weights)
    with pytest.raises(ValueError, match=r"expected the weights of .* as safetensors, got pickled ones"):
        load(folder, ["--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_model_without_weights_is_another_error(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load_weights(AUTO, tmp_path / "model")


def test_what_transformers_alone_would_do_with_pickled_weights(classifier, tmp_path, trap):
    """The reason why the test above has to refuse: transformers reads them, but with weights_only, so the bait is not taken."""
    AUTO.from_pretrained(pickled(classifier, tmp_path / "good", AUTO.from_pretrained(classifier).state_dict()))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        AUTO.from_pretrained(pickled(classifier, tmp_path / "bad", {"w": Bait(trap)}))


def trainer(folder: Path, model: torch.nn.Module | None = None) -> LabelSmoothingTrainer:
    args = arguments(
        folder, LabelSmoothingArguments, save_strategy="steps", save_steps=1, max_steps=2, label_smoothing_factor=0.1
    )
    return LabelSmoothingTrainer(
        model=model or tiny_bert(), args=args, train_dataset=classification_rows(), data_collator=collate
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run = trainer(folder)
    run.train()
    run.save_model()
    return folder


def test_weights_are_saved_as_safetensors(trained):
    """The rest that is pickled: what only a resumed run needs, and training_args.bin, which nothing here ever reads."""
    suffixes = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {path.name for path in trained.rglob("*") if path.suffix in suffixes} <= state | {"training_args.bin"}
    for folder in (trained, trained / "checkpoint-2"):
        assert (folder / "model.safetensors").is_file()
    assert not any((trained / name).exists() for name in state)


# Checkpoints


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_poisoned_checkpoint_stops_the_run_and_is_not_executed(name, trained, tmp_path, trap):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(trained / "checkpoint-1", checkpoint)
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    else:
        assert (checkpoint / name).is_file()
    torch.save({"w": Bait(trap)}, checkpoint / name)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer(tmp_path / "out").train(resume_from_checkpoint=str(checkpoint))


def test_training_args_of_a_checkpoint_are_never_read(trained, tmp_path, trap):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(trained / "checkpoint-1", checkpoint)
    torch.save(Bait(trap), checkpoint / "training_args.bin")
    run = trainer(tmp_path / "out")
    run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 2


# Arrays


def test_arrays_of_objects_are_refused(tmp_path, trap):
    """NumPy keeps them as pickles; `Bait` would be called by allow_pickle=True."""
    bait = np.array([Bait(trap)], dtype=object)
    np.savez(tmp_path / PREDICTIONS, logits_validation=bait, labels_validation=bait, logits_test=bait, labels_test=bait)
    np.savez(tmp_path / PENULTIMATE, features=bait, labels=bait, weight=bait, bias=bait)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Predictions.load(Cell("smoothed", "smoothed_ce", None, 0.1, 0), tmp_path)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Penultimate.load(tmp_path / PENULTIMATE)


# Code of a model's repository


def repository(classifier: Path, tmp_path: Path) -> Path:
    """A model whose configuration is a Python file beside it, which takes the bait."""
    trap = tmp_path / "owned"
    folder = tmp_path / "foreign"
    shutil.copytree(classifier, folder)
    (folder / "code.py").write_text(
        f"open({str(trap)!r}, 'w')\nfrom transformers import BertConfig\nclass Foreign(BertConfig):\n    model_type = 'foreign'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Foreign"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def foreign(classifier, tmp_path):
    return repository(classifier, tmp_path)


def teacher(argv: list[str], student: Path):
    config = parse_config([*argv, "--model_name_or_path", str(student)])
    return load_distillation_teacher(config, tf.AutoTokenizer.from_pretrained(student))


def by_every_way(folder: Path, student: Path, out: Path, *more: str):
    argv = ["--output_dir", str(out), *more]
    yield lambda: finetune(parse_config([*DRY, *argv, "--model_name_or_path", str(folder)]))
    yield lambda: teacher([*DRY, *argv, "--distillation_teacher", str(folder)], student)
    yield lambda: evaluate(parse_evaluation([*argv, "--dataset_name", "snippets", "--model_name_or_path", str(folder)]))


def test_code_of_a_repository_is_not_run_unless_the_user_says_so(foreign, classifier, tmp_path, trap):
    for run in by_every_way(foreign, classifier, tmp_path / "out"):
        with pytest.raises(ValueError, match="trust_remote_code"):
            run()


@pytest.mark.parametrize("way", range(3), ids=["finetune", "teacher", "evaluate"])
def test_the_user_can_say_so(way, classifier, tmp_path):
    """The bait is taken wherever `trust_remote_code` is given; the configuration then has no model class to go with it."""
    folder = repository(classifier, tmp_path)
    run = list(by_every_way(folder, classifier, tmp_path / "out", "--trust_remote_code", "true"))[way]
    with pytest.raises(Exception, match=r"(?i)foreign"):
        run()
    assert (tmp_path / "owned").exists()


def test_trust_is_never_the_default():
    """In no dataclass of settings; and whoever can set it has it passed on, as the tests above show."""
    found = []
    for path in ROOT.glob("hf_ls/**/*.py"):
        if "modules" in path.parts or path.name == "_cuda.py":  # which needs Triton
            continue
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        for value in vars(module).values():
            if isinstance(value, type) and is_dataclass(value) and value.__module__ == module.__name__:
                found += [field.default for field in fields(value) if field.name == "trust_remote_code"]
    assert found == [False] * len(found) and len(found) >= 2


# The source


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_source_opens_no_door(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    modules |= {node.module for node in froms if [alias.name for alias in node.names] != ["UnpicklingError"]}  # to catch it
    assert not {name.split(".")[0] for name in modules} & {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
    for name, given, node in calls(tree):
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), ast.unparse(node)
        assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"), ast.unparse(node)
        assert given.get("shell", "False") == "False", ast.unparse(node)
        assert given.get("trust_remote_code", "False") != "True", ast.unparse(node)
        if name == "torch.load":
            assert given.get("weights_only") == "True", ast.unparse(node)
        if name in ("np.load", "numpy.load"):
            assert given.get("allow_pickle") == "False", ast.unparse(node)
        if name == "yaml.compose":
            assert given.get("Loader") == "yaml.SafeLoader", ast.unparse(node)
        if (
            name.endswith(".from_pretrained")
            and name not in ("AutoTokenizer.from_pretrained", "AutoConfig.from_pretrained")
            and path.parent.name == "hf_ls"
        ):
            assert given.get("use_safetensors") == "True", f"{ast.unparse(node)}: use pretrained.load_weights"


# Known vulnerabilities: what .ci/audit.py makes of the answer of pip-audit


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ([("torch", []), ("idna", [])], 0, "2 packages audited, no known vulnerability"),
        ([("torch", None), ("idna", None)], 0, "audit skipped: the index knows none of the 2 packages"),
        ([("torch", [("CVE-1", ["9.9"])])], 1, "torch 1.0: CVE-1, mended in 9.9"),
        ([("Torch", [("CVE-1", [])])], 0, "Torch 1.0: CVE-1, not mended yet"),
        ([("idna", [("CVE-2", ["2.0"])]), ("numpy", None)], 0, "idna 1.0: CVE-2, mended in 2.0 (not a direct dependency)"),
    ],
)
def test_what_an_audit_says(found, code, said):
    audit = runpy.run_path(str(ROOT / ".ci" / "audit.py"))
    packages = [
        {"name": name, "version": "1.0", "skip_reason": "not found"} if vulns is None else
        {"name": name, "version": "1.0", "vulns": [{"id": i, "fix_versions": fixed} for i, fixed in vulns]}
        for name, vulns in found
    ]  # fmt: skip
    lines, got = audit["verdict"]({"dependencies": packages}, audit["direct_dependencies"](ROOT / "pyproject.toml"))
    assert (got, said) == (code, next((line for line in lines if line == said), None))
