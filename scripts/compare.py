"""Compare the baseline, label smoothing and temperature scaling fairly, over several seeds, and end in a verdict.

python scripts/compare.py --config configs/text-classification.yaml --output_dir outputs/compare
python scripts/compare.py --config configs/text-classification.yaml --output_dir outputs/auto --epsilon auto --seeds 0 1 2 3 4
python scripts/compare.py --config configs/text-classification.yaml --output_dir outputs/noisy --flip_labels 0.2
python scripts/compare.py --config configs/text-classification.yaml --output_dir outputs/ood --ood_sources tweets

A run which was stopped goes on when the same line is given again.
"""

import sys

from hf_ls.cells import CellFailed
from hf_ls.compare import parse_compare, run_comparison


def main() -> None:
    """Run the comparison; wrong settings end with one sentence instead of a traceback."""
    try:
        options, config, argv = parse_compare(sys.argv[1:])
        run_comparison(options, config, argv)
    except (ValueError, CellFailed) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same line goes on where this one ended")


if __name__ == "__main__":
    main()
