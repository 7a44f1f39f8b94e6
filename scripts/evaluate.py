"""Calibration of a model which is already trained: report, plots and card, without training.

python scripts/evaluate.py --model_name_or_path outputs/text-classification --dataset_name snippets --output_dir outputs/again
python scripts/evaluate.py --model_name_or_path owner/model --test_file test.csv --validation_file dev.csv --output_dir out
"""

import sys

from hf_ls.evaluating import evaluate, parse_evaluation


def main() -> None:
    """Run the job; wrong settings end with one sentence instead of a traceback."""
    try:
        settings = parse_evaluation()
    except ValueError as error:
        sys.exit(f"error: {error}")
    evaluate(settings)


if __name__ == "__main__":
    main()
