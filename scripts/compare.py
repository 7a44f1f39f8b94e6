"""Compare the baseline, label smoothing and temperature scaling fairly, over several seeds, and end in a verdict.

python scripts/compare.py --config configs/text-classification.yaml --output_dir outputs/compare
python scripts/compare.py --config configs/text-classification.yaml --output_dir outputs/auto --epsilon auto --seeds 0 1 2 3 4
python scripts/compare.py --config configs/text-classification.yaml --output_dir outputs/noisy --flip_labels 0.2
python scripts/compare.py --config configs/text-classification.yaml --output_dir outputs/ood --ood_sources tweets

A run which was stopped goes on when the same line is given again.
"""

import sys

from hf_ls.common.errors import end_with
from hf_ls.compare.cells import CellFailed
from hf_ls.compare.experiment import parse_compare, run_comparison


def main() -> None:
    """Run the comparison; wrong settings and data end with one sentence, with a traceback under --log_level debug."""
    config = None
    try:
        options, config, argv = parse_compare(sys.argv[1:])
        run_comparison(options, config, argv)
    except CellFailed as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same line goes on where this one ended")
    except Exception as error:
        end_with(error, debug=config is not None and config.training.log_level == "debug")


if __name__ == "__main__":
    main()
