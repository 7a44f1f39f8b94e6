#!/usr/bin/env bash
# transformers 5.24.0: a setting for the training sampler changes the order of Trainer.predict's rows.
#
# Behaviour: `train_sampling_strategy="group_by_length"` is documented as "the sampler to use for the training dataloader", but
#   `Trainer._get_eval_sampler` reads it too: `predict` and `evaluate` go through the data grouped by length.
# Output seen: a model which answers each row's length gives 3 9 5 12 4 7 2 11 (the order of the data) with the strategy
#   "random", and the same numbers in another order, the longest row first, with "group_by_length".
# Why it matters: `predictions[i]` is then not the prediction for row i. `label_ids` moves with it, so every metric of the Trainer
#   stays right and hides it; a submission file, an error analysis or pseudo-labels made from `predictions` are shuffled.
# Exit code: 0 the behaviour is as described, 1 it is not, 2 the packages could not be installed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6 || exit 2
cat > demo.py <<'PY'
import sys

import torch
import transformers
from transformers import Trainer, TrainingArguments

lengths = [3, 9, 5, 12, 4, 7, 2, 11]
rows = [{"input_ids": [1] * length, "labels": length} for length in lengths]


class CountTokens(torch.nn.Module):
    """Answers how many tokens a row has, so that a prediction tells which row it belongs to."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids, labels=None):
        counts = (input_ids != 0).sum(-1) * self.scale
        return {"loss": (counts - labels).abs().mean(), "logits": counts}


def collate(batch):
    ids = [torch.tensor(row["input_ids"]) for row in batch]
    labels = torch.tensor([row["labels"] for row in batch])
    return {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), "labels": labels}


def predict(strategy):
    arguments = TrainingArguments(
        "out",
        train_sampling_strategy=strategy,
        per_device_eval_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    output = Trainer(model=CountTokens(), args=arguments, data_collator=collate).predict(rows)
    return output.predictions.astype(int).tolist(), output.label_ids.tolist()


print("transformers", transformers.__version__, "| each prediction is its row's length; the data's order:")
print(f"  {'the data':16s}", lengths)
for strategy in ("random", "group_by_length"):
    print(f"  {strategy:16s}", predict(strategy)[0])
grouped, labels = predict("group_by_length")
holds = predict("random")[0] == lengths and grouped != lengths and sorted(grouped) == sorted(lengths) and grouped == labels
print("As described: predictions are not in the data's order." if holds else "Changed: not as described.")
sys.exit(not holds)
PY
code=0
HF_HUB_OFFLINE=1 venv/bin/python -I demo.py 2>errors.txt || code=$?
if [ "$code" != 0 ]; then cat errors.txt >&2; fi
exit "$code"
