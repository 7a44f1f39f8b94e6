"""The main job on a tiny classifier and real text, run as the script: shared by the tests of the script and of its faults."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import transformers as tf
from forked import Forked, all_ended, ranks, run_file
from places import ROOT

from hf_ls.data.classification import EMBEDDED_MODEL, model_path

FAST = [
    *("--dataset_name", "snippets", "--report_to", "none", "--use_cpu", "true", "--max_length", "32", "--disable_tqdm", "true"),
    *("--max_train_samples", "256", "--max_eval_samples", "150", "--max_predict_samples", "210", "--seed", "3"),
    *("--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "64", "--learning_rate", "1e-2"),
    *("--logging_steps", "1"),
]
ALL = ["--do_train", "--do_eval", "--do_predict"]


def save_tiny_model(folder, kind=tf.BertForSequenceClassification, **settings):
    """A BERT of 16 dimensions with dropout, unless the settings say otherwise, and the real tokenizer."""
    tokenizer = tf.AutoTokenizer.from_pretrained(model_path(EMBEDDED_MODEL))
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    kind(tf.BertConfig(vocab_size=len(tokenizer), num_labels=3, **sizes, **settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def arguments(model, folder, *extra):
    return ["--model_name_or_path", model, "--output_dir", str(folder), *FAST, *extra]


def started(argv, processes=1):
    """The processes of the script, forks without a launcher."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    file = ROOT / "scripts" / "finetune.py"
    return [Forked(run_file, str(file), argv, environment=env)] if processes == 1 else ranks(processes, file, argv, env)


def script(argv, processes=1, check=True):
    """Exit code and output of the script."""
    code, output = all_ended(started(argv, processes), 280)
    assert not check or code == 0, output
    return code, output


def torchrun(argv, processes):
    """The script from a command line, as a user starts several processes."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [*command, str(ROOT / "scripts" / "finetune.py"), *argv], env=env, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
