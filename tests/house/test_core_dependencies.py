"""The core dependencies are enough for the losses and the Trainers, nothing needs a module which Windows lacks, extras are named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import pytest
from places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What the core brings along itself: transformers and torch need these two.
BROUGHT_ALONG = ("pyyaml", "jinja2")
BLOCKED = [re.split(r"[>=<\[]", line)[0] for line in EXTRAS["scripts"] + EXTRAS["trl"]]
BLOCKED = [name.replace("-", "_") for name in BLOCKED if name not in BROUGHT_ALONG]

TRAINS = """
import numpy as np, torch
import hf_ls
from helpers import arguments, classification_rows, collate, tiny_bert
for name in hf_ls.__all__:
    if "SFT" not in name:
        getattr(hf_ls, name)
logits, labels = torch.randn(8, 5, requires_grad=True), torch.randint(0, 5, (8,))
hf_ls.smoothed_cross_entropy(logits, labels, 0.1).backward()
trainer = hf_ls.LabelSmoothingTrainer(tiny_bert(), arguments("out", max_steps=2, label_smoothing_factor=0.1),
    train_dataset=classification_rows(), eval_dataset=classification_rows(seed=1), data_collator=collate)
trainer.train()
assert 0 <= trainer.evaluate()["eval_ece"] <= 1
trainer.save_model("out/saved")
for refused in ("hf_ls.metrics.smooth_ece(np.array([.5, .9]), np.array([0, 1]))", "hf_ls.LabelSmoothingSFTTrainer",
    "import hf_ls.run.config", "from hf_ls.metrics.text import text_metrics; text_metrics(['a'], ['a'], ['bleu'])"):
    try:
        exec(refused)
    except ImportError as error:
        print("refused:", error)
"""

IMPORTS = """
import importlib, pkgutil
import hf_ls
for module in pkgutil.walk_packages(hf_ls.__path__, "hf_ls."):
    if ".metrics.modules" not in module.name and not module.name.endswith("._cuda"):  # which needs Triton
        importlib.import_module(module.name)
        print(module.name)
"""


def run_without(blocked: list[str], code: str, folder) -> str:
    start = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    made = subprocess.run(
        [sys.executable, "-c", start + code], cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return made.stdout


def test_losses_and_trainers_need_the_core_only_and_what_is_missing_is_named(tmp_path):
    assert {"matplotlib", "rich", "relplot", "sacrebleu", "rapidfuzz", "trl"} <= set(BLOCKED)
    out = run_without(BLOCKED, TRAINS, tmp_path)
    refusals = re.findall("refused: (.*)", out)
    assert len(refusals) == 4
    for refusal, extra in zip(refusals, ("scripts", "trl", "scripts", "scripts"), strict=True):
        assert re.fullmatch(rf"expected \w+ for .*, got no such package; do: pip install 'hf_ls\[{extra}\]'", refusal), refusal


def test_every_module_can_be_imported_where_there_are_no_modules_of_unix(tmp_path):
    out = run_without(["fcntl", "pwd", "grp"], IMPORTS, tmp_path)  # psutil and huggingface_hub import resource and termios here
    assert len(out.split()) > 60


def test_no_module_names_a_signal_at_import_which_windows_lacks():
    """`signal.SIGKILL` and the like exist on Unix only; in a function behind a check they do no harm, at the top they do."""
    lacking = re.compile(r"^(?:[^\s#].*)?\bsignal\.(?!SIG(?:INT|TERM|ABRT|FPE|ILL|SEGV|BREAK)\b)SIG[A-Z]+\b", re.MULTILINE)
    found = [path.name for path in (ROOT / "hf_ls").rglob("*.py") if lacking.search(path.read_text(encoding="utf-8"))]
    assert not found


@pytest.mark.parametrize("extra", ["demo", "test"])
def test_the_extras_which_run_the_scripts_contain_theirs(extra):
    def whole(name: str) -> set[str]:
        lines = EXTRAS[name]
        return set(lines).union(*(whole(inner) for line in lines for inner in re.findall(r"^hf_ls\[(\w+)\]", line)))

    assert set(EXTRAS["scripts"]) <= whole(extra)


def test_types_are_shipped():
    assert (ROOT / "hf_ls" / "py.typed").is_file()
