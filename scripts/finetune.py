"""Fine-tune with label smoothing and see the calibration.

accelerate launch scripts/finetune.py --config configs/text-classification.yaml
accelerate launch --num_processes 2 --cpu scripts/finetune.py --config configs/text-classification.yaml --output_dir outputs/two
"""

from hf_ls.common.errors import end_with, one_sentence
from hf_ls.run.config import parse_config
from hf_ls.run.finetune import finetune
from hf_ls.run.launch import check_started, end_processes, explain_failure


def main() -> None:
    """Run the job; wrong settings, data and checkpoints end with one sentence, with a traceback under --log_level debug."""
    config = None
    try:
        check_started()
        config = parse_config()
        finetune(config)
        end_processes()
    except Exception as error:
        if one_sentence(error) is None:  # of one rank alone; what hf_ls refuses, it refuses on all
            explain_failure()
        end_with(error, debug=config is not None and config.training.log_level == "debug")


if __name__ == "__main__":
    main()
