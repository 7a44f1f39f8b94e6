"""Calibration of a model which is already trained: report, plots and card, without training.

python scripts/evaluate.py --model_name_or_path outputs/text-classification --dataset_name snippets --output_dir outputs/again
python scripts/evaluate.py --model_name_or_path owner/model --test_file test.csv --validation_file dev.csv --output_dir out
"""

from hf_ls.common.errors import end_with
from hf_ls.run.evaluate import evaluate, parse_evaluation


def main() -> None:
    """Run the job; wrong settings, data and models end with one sentence instead of a traceback."""
    try:
        evaluate(parse_evaluation())
    except Exception as error:
        end_with(error)


if __name__ == "__main__":
    main()
