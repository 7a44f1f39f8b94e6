"""Fine-tune with label smoothing and see the calibration.

accelerate launch scripts/finetune.py --config configs/text-classification.yaml
accelerate launch --num_processes 2 --cpu scripts/finetune.py --config configs/text-classification.yaml --output_dir outputs/two
"""

import sys

from hf_ls.config import parse_config
from hf_ls.finetune import finetune
from hf_ls.launch import end_processes, explain_failure, start_missing_processes


def main() -> None:
    """Run the job; wrong settings end with one sentence instead of a traceback."""
    try:
        start_missing_processes()
        config = parse_config()
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        finetune(config)
        end_processes()
    except Exception:
        explain_failure()
        raise


if __name__ == "__main__":
    main()
