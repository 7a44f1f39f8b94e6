"""The house: what imports what, how many files a folder has, how long they are, and that nothing stands about unused.

Everything is read from the source by `ast`; only the checks of what an import loads start a process.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

import hf_ls

LONGEST = 550  # about 500 is the soft limit; a class is never cut in two for it
MOST_FILES = 15
# package -> the packages it may import
MAY_IMPORT = {
    "common": set(),
    "losses": {"common"},
    "metrics": {"common"},
    "calibration": {"common", "losses", "metrics"},
    "data": {"common", "losses", "metrics", "calibration"},
    "report": {"common", "losses", "metrics", "calibration", "data"},
    "trainer": {"common", "losses", "metrics", "calibration", "data", "report"},
    "answers": {"common", "losses", "metrics", "calibration", "data", "report", "trainer"},
    "run": {"common", "losses", "metrics", "calibration", "data", "report", "trainer", "answers"},
    "compare": {"common", "losses", "metrics", "calibration", "data", "report", "trainer", "answers", "run"},
}
HEAVY = {"torch", "transformers", "datasets", "matplotlib", "sklearn", "scipy", "evaluate", "trl", "peft", "rich", "relplot"}
# One name in two places, each right in its own: what a script or `evaluate` calls by that name.
SHARED_NAMES = {"logger", "main"}
EXAMPLES = [
    *("Smoothing", "Schedule", "SmoothedCrossEntropy", "smoothed_cross_entropy", "linear_smoothed_cross_entropy", "Objective"),
    *(
        "probabilities",
        "temperature.fit_temperature",
        "temperature.apply_temperature",
        "compare.statistics.compare",
        "metrics.summarise",
    ),
    *("metrics.ece", "metrics.brier", "metrics.nll", "metrics.signed_gap", "priors.support_prior", "priors.unigram_prior"),
    *("priors.confusion_prior", "priors.similarity_prior", "priors.restrict_prior", "priors.soft_targets"),
]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("hf_ls/**/*.py"))}
SCRIPTS = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("scripts/*.py"))}
MODULES = {name_of(path): tree for path, tree in SOURCES.items()}


def imports(tree: ast.AST, late: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The imports of a module, and whether a function has to be called for them; those for type checkers are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, late
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        else:
            yield from imports(node, late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def picture(wanted_late: bool) -> dict[str, set[str]]:
    """Module of hf_ls -> the modules of hf_ls which it imports at its top, or in its functions."""
    found: dict[str, set[str]] = {name: set() for name in MODULES}
    for name, tree in MODULES.items():
        for node, late in imports(tree):
            if late is not wanted_late:
                continue
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports relatively: {ast.unparse(node)}"
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                found[name] |= {path if path in MODULES else str(node.module) for path in inner}
            else:
                found[name] |= {alias.name for alias in node.names}
    return {name: {target for target in targets if target in MODULES} - {name} for name, targets in found.items()}


def way(edges: dict[str, set[str]], start: str, end: str) -> list[str] | None:
    """The shortest way from one module to another, along their imports."""
    ways, seen = [[start]], {start}
    for path in ways:
        for target in sorted(edges[path[-1]]):
            if target == end:
                return [*path, end]
            if target not in seen:
                seen.add(target)
                ways.append([*path, target])
    return None


def top_level() -> Iterator[tuple[str, str, ast.stmt]]:
    """(module, name, statement) of every function, class and constant of hf_ls."""
    for module, tree in MODULES.items():
        if module.startswith("hf_ls.metrics.modules"):  # each re-exports one metric for `evaluate.load`
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield module, node.name, node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    yield from ((module, n.id, node) for n in ast.walk(target) if isinstance(n, ast.Name))


def used_in(node: ast.AST) -> set[str]:
    """Names which a statement reads: variables, attributes, re-exports (`import A as A`), and the words in lists of names."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
            found.add(part.id)
        elif isinstance(part, ast.Attribute):
            found.add(part.attr)
        elif isinstance(part, ast.alias) and part.name == part.asname:
            found.add(part.name)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.isidentifier():
            found.add(part.value)
    return found


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    return set(done.stdout.split())


def test_imports_go_in_one_direction():
    edges, late = picture(wanted_late=False), picture(wanted_late=True)
    circles = {tuple(path) for name in edges if (path := way(edges, name, name))}
    closing = [
        f"{name} -> {' -> '.join(path)}"
        for name, targets in late.items()
        for target in sorted(targets)
        if (path := way(edges, target, name))
    ]
    assert not circles, f"circles: {circles}; imports inside functions which would close one more: {closing}"


def test_packages_import_one_way():
    edges, late = picture(wanted_late=False), picture(wanted_late=True)
    assert {path.parent.name for path in ROOT.glob("hf_ls/*/__init__.py")} == set(MAY_IMPORT)
    may = MAY_IMPORT | {"cli": set(MAY_IMPORT)}  # the command line stands above all packages
    wrong = [
        f"{name} -> {target}"
        for name in MODULES
        for target in sorted(edges[name] | late[name])
        if name.count(".") and target.count(".")
        if target.split(".")[1] not in may[name.split(".")[1]] | {name.split(".")[1]}
    ]
    assert not wrong


def test_no_folder_is_crowded():
    folders = Counter(path.parent for path in ROOT.glob("hf_ls/**/*") if path.is_file() and path.suffix != ".pyc")
    assert not {str(folder.relative_to(ROOT)): count for folder, count in folders.items() if count > MOST_FILES}


def test_importing_the_package_is_light():
    assert not loaded_by("import hf_ls") & HEAVY


def test_losses_need_only_torch():
    loaded = loaded_by("from hf_ls import Smoothing, smoothed_cross_entropy")
    assert "torch" in loaded
    assert not loaded & (HEAVY - {"torch"})


def test_numbers_need_neither_torch_nor_pictures():
    loaded = loaded_by("import hf_ls; hf_ls.metrics.ece, hf_ls.temperature.fit_temperature, hf_ls.report.CalibrationReport")
    assert not loaded & {"torch", "transformers", "datasets", "matplotlib", "evaluate", "rich"}


@pytest.mark.parametrize("folder", ["hf_ls", "scripts", "tests"])
def test_no_file_is_too_long(folder):
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ROOT.glob(f"{folder}/**/*.py")}
    assert lengths
    assert not {path: lines for path, lines in lengths.items() if lines > LONGEST}


def test_every_file_opens_with_a_docstring():
    paths = [*(path for path in SOURCES if "modules" not in path.parts), *SCRIPTS, *ROOT.glob("tests/**/*.py")]
    assert not [str(path) for path in paths if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]


def test_no_module_reads_private_names_of_another():
    found = []
    for module, tree in [*MODULES.items(), *((path.stem, tree) for path, tree in SCRIPTS.items())]:
        own = {alias.asname or alias.name for node, _ in imports(tree) for alias in node.names if _ours(node, alias)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_ls"):
                names = [alias.name for alias in node.names if _private(alias.name)]
                mates = {name for name in names if f"{node.module}.{name}" in MODULES and module.startswith(f"{node.module}.")}
                found += [f"{module}: {node.module}.{name}" for name in names if name not in mates]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in own:
                found += [f"{module}: {ast.unparse(node)}"] if _private(node.attr) else []
    assert not found


def _ours(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> bool:
    return (node.module or "").startswith("hf_ls") if isinstance(node, ast.ImportFrom) else alias.name.startswith("hf_ls")


def _private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_a_public_name_means_one_thing():
    homes = defaultdict(set)
    for module, name, _ in top_level():
        if not name.startswith("_"):
            homes[name].add(module)
    assert not {name: sorted(at) for name, at in homes.items() if len(at) > 1 and name not in SHARED_NAMES}


def test_no_function_is_written_twice():
    bodies = defaultdict(set)
    for path, tree in [*SOURCES.items(), *SCRIPTS.items()]:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = "\n".join(ast.unparse(part) for part in node.body[ast.get_docstring(node) is not None :])
                if len(body) > 60:  # shorter ones are forwarding
                    bodies[body].add(f"{path.name}: {node.name}")
    assert not [sorted(at) for at in bodies.values() if len(at) > 1]


def test_nothing_stands_about_unused():
    public = {*hf_ls.__all__, *hf_ls.metrics.__all__, "__getattr__", "__dir__"}
    offered = {f"hf_ls.{home}" for home in hf_ls._MODULES.values()} & MODULES.keys()  # what stands public in these is for users
    statements = [node for tree in [*SOURCES.values(), *SCRIPTS.values()] for node in tree.body]
    uses = Counter(name for node in statements for name in used_in(node))
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    readme = {word for page in pages for word in re.findall(r"\w+", page.read_text(encoding="utf-8"))}
    unused = [
        f"{module}.{name}"
        for module, name, node in top_level()
        if name not in public | readme
        and not (module in offered and not name.startswith("_"))
        and uses[name] - (name in used_in(node)) == 0
    ]
    assert not unused


def test_no_path_of_one_machine():
    """Absolute paths below the folders where people and build machines keep their work."""
    path = re.compile(r"(?<![\w.~:/-])/(?:home|Users|root|opt|mnt|srv|work|workspace|scratch|private)/\w")
    files = [
        file
        for folder in ("hf_ls", "scripts", "tests", "configs", "docs", "model_cards", ".ci")
        for file in ROOT.glob(f"{folder}/**/*")
    ]
    texts = [
        file
        for file in files
        if file.suffix in {"", ".py", ".md", ".yaml", ".json", ".html", ".txt", ".ipynb"} and file.is_file()
    ]
    found = []
    for file in [*texts, ROOT / "README.md", ROOT / "pyproject.toml"]:
        found += [f"{file.name}: {hit}" for hit in path.findall(file.read_text(encoding="utf-8"))]
    assert len(texts) > 100
    assert not found


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_most_used_names_show_an_example_which_runs(name):
    """`--doctest-modules` runs them with this suite; here is only that they stay."""
    home, _, attribute = name.rpartition(".")
    module = getattr(hf_ls, home) if home in hf_ls.__all__ else importlib.import_module(f"hf_ls{'.' * bool(home)}{home}")
    found = getattr(module, attribute)
    assert doctest.DocTestFinder(recurse=False).find(found, name)[0].examples
