"""`scripts/gpu_check.py` at toy sizes on a CPU: its check passes, and notices a loss which is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"
WRONG = f"""
import runpy, sys
from hf_ls.losses import _chunks
accumulate = _chunks.accumulate
_chunks.accumulate = lambda g, *args, fresh: accumulate(g, *args, fresh=True)  # only the last chunk counts
sys.argv = ["gpu_check.py", "--device", "cpu", "--quick", "--parts", "check"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def test_the_script_runs_and_stops_at_a_wrong_number():
    options = dict(capture_output=True, text=True, timeout=200)
    right = subprocess.run([sys.executable, SCRIPT, "--device", "cpu", "--quick", "--parts", "check"], **options)
    assert right.returncode == 0 and "WRONG" not in right.stdout, right.stdout[-2000:] + right.stderr[-2000:]
    assert right.stdout.count("right") == 59
    wrong = subprocess.run([sys.executable, "-c", WRONG, "--device", "cpu"], **options)
    assert wrong.returncode == 1 and "WRONG float32   chunks" in wrong.stdout, wrong.stdout[-2000:] + wrong.stderr[-2000:]
