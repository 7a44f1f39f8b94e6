#!/usr/bin/env bash
# probmetrics 1.3.0, installed alone: its post-hoc calibrators cannot be imported, since numba, which they import, is not required.
#
# Behaviour: `pip install probmetrics` brings torch, scikit-learn and others, but no numba, which is named in none of its plain
#   requirements. `from probmetrics.calibrators import SMSCalibrator`, the structured matrix scaling of its paper, and even temperature
#   scaling from the same module, end in a ModuleNotFoundError for numba. With numba installed the same lines fit and predict.
# Output seen: no numba after the installation; "No module named 'numba'" by the import; after `pip install numba` probabilities
#   whose rows sum to 1.
# Why it matters: who names probmetrics alone as a requirement, or catches ImportError to find out whether matrix scaling is there,
#   ships a program without it and does not know.
# Exit code: 0 the behaviour is as described, 1 it is not, 2 the packages could not be installed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    probmetrics==1.3.0 torch==2.13.0 numpy==2.4.6 scikit-learn==1.9.1 || exit 2
cat > demo.py <<'PY'
import importlib.util
import sys

import numpy as np

print("numba installed:", importlib.util.find_spec("numba") is not None)
try:
    from probmetrics.calibrators import SMSCalibrator
except ModuleNotFoundError as error:
    print("refused:", error)
    sys.exit(3)
random = np.random.default_rng(0)
labels = random.integers(3, size=200)
logits = 2.0 * np.eye(3)[labels] + random.normal(size=(200, 3))
probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
found = np.asarray(SMSCalibrator().fit(probabilities, labels).predict_proba(probabilities))
print("rows sum to 1:", np.allclose(found.sum(1), 1, atol=1e-5))
sys.exit(0 if np.allclose(found.sum(1), 1, atol=1e-5) else 1)
PY
alone=0
venv/bin/python demo.py | tee alone.txt || alone=$?
grep -q "numba installed: False" alone.txt && grep -q "No module named 'numba'" alone.txt && [ "$alone" -ne 0 ] || {
    echo "changed: probmetrics alone can be imported"
    exit 1
}
venv/bin/pip install --quiet --no-compile --disable-pip-version-check numba==0.68.1 || exit 2
venv/bin/python demo.py || { echo "changed: numba does not mend it"; exit 1; }
echo "as described"
