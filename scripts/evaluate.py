# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_ls[demo]"]
#
# [tool.uv.sources]
# hf_ls = { path = "..", editable = true }
# ///
"""Calibration of a model which is already trained: report, plots and card, without training.

python scripts/evaluate.py --model_name_or_path outputs/text-classification --dataset_name snippets --output_dir outputs/again
python scripts/evaluate.py --model_name_or_path owner/model --test_file test.csv --validation_file dev.csv --output_dir out
python scripts/evaluate.py --task multiple-choice --model_name_or_path owner/llm --test_file questions.jsonl --output_dir out
python scripts/evaluate.py --predictions test.npz --validation_predictions dev.npz --output_dir out --write_card true
"""

from hf_ls.cli import evaluate_command

if __name__ == "__main__":
    evaluate_command()
