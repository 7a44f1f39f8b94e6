"""Run by test_push_to_hub.py in a process of its own, whose Hub is the one of HF_ENDPOINT. Usage: push_worker.py FOLDER"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import transformers as tf
from helpers import arguments, classification_rows, collate, tiny_bert
from reports import make_report

from hf_ls import LabelSmoothingTrainer
from hf_ls.report.calibration_report import REPORT
from hf_ls.report.facts import TrainingFacts
from hf_ls.run.evaluate import update_card


def pushed(trainer_class: type, folder: Path, report: bool = False) -> None:
    rows = classification_rows()
    args = arguments(folder, label_smoothing_factor=0.1, hub_token="hf_fake")
    trainer = trainer_class(model=tiny_bert(), args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    trainer.train()
    trainer.log(trainer.evaluate() | {"eval_accuracy": np.float64(0.625), "eval_nll": np.float32(1.25), "eval_ece": 0.125})
    if report:
        dataset = replace(make_report(rows=1).dataset, hub_id="owner/snippets")
        make_report(dataset=dataset, training=TrainingFacts(seeds=[1], steps=1)).save(folder / REPORT)
    trainer.push_to_hub(dataset_tags="owner/data", dataset="Data", tasks="text-classification")


def main(folder: Path) -> None:
    try:
        pushed(tf.Trainer, folder / "stock")
    except ValueError as error:
        (folder / "stock.txt").write_text(str(error))
    pushed(LabelSmoothingTrainer, folder / "ours")
    pushed(LabelSmoothingTrainer, folder / "reported", report=True)
    dataset = replace(make_report(rows=1).dataset, hub_id="owner/other")
    report = make_report(rows=1, dataset=dataset, published="baseline")
    update_card(report, "me/ours", token="hf_fake")
    update_card(report, "me/ours", token="hf_fake")  # the same results again are no new ones


if __name__ == "__main__":
    main(Path(sys.argv[1]))
