#!/usr/bin/env bash
# huggingface_hub 2.4.0: a model card's evaluation results change when the card is only read and written.
#
# Behaviour: (a) `eval_results_to_model_index` groups results by task type and the dataset's type, config, split and
#   revision; `dataset_name`, `task_name` and `dataset_args` are taken from the first result of a group. (b) ModelCardData
#   reads a model-index of several models into one list of results under one model's name.
# Output seen: accuracy 0.91 on "shop A" and 0.42 on "shop B" (two local data sets, both of type "unknown") come back as two
#   accuracies of "shop A"; the results of the models "small" and "large" come back as the results of one model.
# Why it matters: whatever updates a card through ModelCard.load and save, such as metadata_update, does this round
#   trip, so numbers which it was not asked to touch end up under another data set or another model. No warning is shown.
# Exit code: 0 the behaviour is as described, 1 it is not, 2 the packages could not be installed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    huggingface_hub==2.4.0 PyYAML==6.0.4 || exit 2
cat > demo.py <<'PY'
import sys

import huggingface_hub
import yaml
from huggingface_hub import ModelCard


def entry(dataset_type, dataset_name, value):
    return {
        "task": {"type": "text-classification"},
        "dataset": {"type": dataset_type, "name": dataset_name, "split": "test"},
        "metrics": [{"type": "accuracy", "value": value}],
    }


def show(index):
    """(model, data set, accuracy) of every number in a model-index."""
    return [
        (model["name"], result["dataset"]["name"], metric["value"])
        for model in index
        for result in model["results"]
        for metric in result["metrics"]
    ]


def round_trip(index):
    """What a card with this model-index holds after it was loaded and turned into text again."""
    text = "---\n" + yaml.safe_dump({"model-index": index}) + "---\n# A card\n"
    return show(yaml.safe_load(str(ModelCard(text)).split("---")[1])["model-index"])


two_datasets = [{"name": "small", "results": [entry("unknown", "shop A", 0.91), entry("unknown", "shop B", 0.42)]}]
two_models = [
    {"name": "small", "results": [entry("acme/news", "News", 0.70)]},
    {"name": "large", "results": [entry("acme/web", "Web", 0.80)]},
]
print("huggingface_hub", huggingface_hub.__version__, "| a card's results before and after ModelCard(text) -> str(card):")
for index in (two_datasets, two_models):
    print("  before", show(index))
    print("  after ", round_trip(index))
datasets_merged = [name for _, name, _ in round_trip(two_datasets)] == ["shop A", "shop A"]
models_merged = len({name for name, _, _ in round_trip(two_models)}) == 1
holds = datasets_merged and models_merged
print("As described: numbers moved to another data set and another model." if holds else "Changed: not as described.")
sys.exit(not holds)
PY
code=0
HF_HUB_OFFLINE=1 venv/bin/python -I demo.py || code=$?
exit "$code"
