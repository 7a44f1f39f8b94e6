"""Known vulnerabilities of the packages in an environment, found by pip-audit in another environment.

    python .ci/audit.py ENVIRONMENT SCRATCH

Ends with 1 for a direct dependency which has a version without the vulnerability: pyproject.toml or a pin can be changed for
it. What other packages bring, and what nobody has mended yet, is printed only: a check which fails for what its reader cannot
change is soon switched off. Without an answer of the index, and without pip-audit there, one line says that it was skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any


def normal(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def direct_dependencies(pyproject: Path) -> set[str]:
    """The packages which the project itself names, in its extras too."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {normal(re.match(r"[\w.-]+", line).group()) for line in lines}  # type: ignore[union-attr]


def verdict(answer: dict[str, Any], direct: set[str]) -> tuple[list[str], int]:
    """What to print of pip-audit's answer, and the exit code."""
    audited = [package for package in answer["dependencies"] if "vulns" in package]
    if not audited:
        return [f"audit skipped: the index knows none of the {len(answer['dependencies'])} packages"], 0
    lines, code = [], 0
    for package in audited:
        for found in package["vulns"]:
            mended = ", ".join(found["fix_versions"])
            line = (
                f"{package['name']} {package['version']}: {found['id']}, {f'mended in {mended}' if mended else 'not mended yet'}"
            )
            if mended and normal(package["name"]) in direct:
                code = 1
            elif normal(package["name"]) not in direct:
                line += " (not a direct dependency)"
            lines.append(line)
    return lines or [f"{len(audited)} packages audited, no known vulnerability"], code


def main() -> None:
    """Install pip-audit into SCRATCH, ask it about ENVIRONMENT, and say what it found."""
    environment, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    packages = next(environment.glob("lib/python*/site-packages"))
    subprocess.run([sys.executable, "-m", "venv", str(scratch)], check=True)
    install = [str(scratch / "bin" / "pip"), "install", "--quiet", "--retries", "1", "pip-audit"]
    ask = [str(scratch / "bin" / "pip-audit"), "--path", str(packages), "--format", "json", "--progress-spinner", "off"]
    try:
        subprocess.run(install, check=True, timeout=300, capture_output=True)
        # pip-audit itself ends with 1 for a finding and for a broken connection alike: the answer tells them apart.
        answer = json.loads(subprocess.run(ask, timeout=600, capture_output=True, text=True, check=False).stdout)
    except (subprocess.SubprocessError, json.JSONDecodeError) as error:
        print(f"audit skipped: no answer from the index ({type(error).__name__})")
        return
    lines, code = verdict(answer, direct_dependencies(Path(__file__).parent.parent / "pyproject.toml"))
    print("\n".join(lines))
    sys.exit(code)


if __name__ == "__main__":
    main()
