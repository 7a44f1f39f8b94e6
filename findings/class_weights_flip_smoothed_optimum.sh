#!/usr/bin/env bash
# torch 2.13.0: cross_entropy with class weights and label smoothing does not weight the examples; it changes the target.
#
# Behaviour: with `weight` alone an example's loss is w[y] * (-log p[y]), so its optimum stays p = one-hot(y). With
#   `label_smoothing` too, every class's share of the smoothed target is multiplied by that class's own weight: the optimum is
#   p[c] proportional to w[c] * target[c]. The documentation of `label_smoothing` does not mention `weight`.
# Output seen: 2 classes, label 0, smoothing 0.1: the loss is lowest at p(label) = 0.95 without weights and at 0.16 with the
#   weights 1 and 99. The loss teaches the other class for a perfectly clean example.
# Why it matters: weights are used for rare classes, with ratios such as 1:99. Together with a small smoothing the frequent
#   class is taught as "wrong", and probabilities cannot be calibrated. The loss falls as usual. (pytorch issue 104776.)
# Exit code: 0 the behaviour is as described, 1 it is not, 2 the packages could not be installed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 || exit 2
cat > demo.py <<'PY'
import sys

import torch

LABEL = torch.tensor([0])


def best_probability(weight, smoothing):
    """The probability of the label (class 0 of 2) at which the loss is lowest, searched on a grid."""
    p = torch.linspace(0.0005, 0.9995, 1999, dtype=torch.float64)
    log_p = torch.stack([p.log(), (1 - p).log()], dim=1)  # log-probabilities are valid logits
    labels = LABEL.expand(len(p))
    loss = torch.nn.functional.cross_entropy(
        log_p, labels, weight=weight, label_smoothing=smoothing, reduction="none"
    )
    return p[loss.argmin()].item()


weights = torch.tensor([1.0, 99.0], dtype=torch.float64)
plain, smoothed = best_probability(None, 0.0), best_probability(None, 0.1)
weighted, both = best_probability(weights, 0.0), best_probability(weights, 0.1)
predicted = 1 * 0.95 / (1 * 0.95 + 99 * 0.05)
print("torch", torch.__version__, "| p(label) at which the loss of one example of class 0 is lowest:")
print(f"  no weights,   no smoothing  {plain:.3f}")
print(f"  weights 1:99, no smoothing  {weighted:.3f}")
print(f"  no weights,   smoothing 0.1 {smoothed:.3f}")
print(f"  weights 1:99, smoothing 0.1 {both:.3f}   (w[c] * target[c], normalised: {predicted:.3f})")
holds = plain > 0.99 and weighted > 0.99 and abs(smoothed - 0.95) < 0.001 and abs(both - predicted) < 0.001
print("As described: the lowest loss prefers the wrong class." if holds else "Changed: not as described.")
sys.exit(not holds)
PY
code=0
venv/bin/python -I demo.py || code=$?
exit "$code"
