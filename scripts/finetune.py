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

import sys

from hf_ls.common.errors import end_with, one_sentence
from hf_ls.run.config import parse_config
from hf_ls.run.finetune import finetune
from hf_ls.run.launch import check_started, end_processes, explain_failure
from hf_ls.run.stopping import Stopped, end_at_signals, end_stopped, give_signals_back


def main() -> None:
    """Run the job; wrong settings, data and checkpoints end with one sentence, with a traceback under --log_level debug."""
    config = None
    end_at_signals()
    try:
        check_started()
        config = parse_config()
        finetune(config)
        end_processes()
        give_signals_back()
    except Stopped as stopped:
        sys.exit(end_stopped(stopped))
    except Exception as error:
        if one_sentence(error) is None:  # of one rank alone; what hf_ls refuses, it refuses on all
            explain_failure(error)
        end_with(error, debug=config is not None and config.training.log_level == "debug")


if __name__ == "__main__":
    main()
