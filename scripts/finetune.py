# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_ls[demo]"]
#
# [tool.uv.sources]
# hf_ls = { path = "..", editable = true }
# ///
"""Fine-tune with label smoothing and see the calibration.

accelerate launch scripts/finetune.py --config configs/text-classification.yaml
torchrun --nproc_per_node 2 scripts/finetune.py --config configs/text-classification.yaml --use_cpu true --output_dir outputs/two

What a run does, in this order (`finetune` in hf_ls/run/finetune.py reads the same):

1. load: settings, data, tokenizer and token ids; a rehearsal of the first step (with --dry_run, that is all)
2. train: the baseline if asked for, then the smoothed model, with checkpoints to resume from
3. calibrate: logits of validation and test, the temperature fitted on validation
4. report: `calibration.json`, the table with its verdict, plots and the model card
5. publish: upload what is for others, with --push_to_hub
"""

from hf_ls.cli import finetune_command

if __name__ == "__main__":
    finetune_command()
