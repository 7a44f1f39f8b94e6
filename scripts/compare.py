# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_ls[demo]"]
#
# [tool.uv.sources]
# hf_ls = { path = "..", editable = true }
# ///
"""Compare the baseline, label smoothing and temperature scaling fairly, over several seeds, and end in a verdict.

python scripts/compare.py --config configs/text-classification.yaml --output_dir outputs/compare
python scripts/compare.py --config configs/text-classification.yaml --output_dir outputs/auto --epsilon auto --seeds 0 1 2 3 4
python scripts/compare.py --config configs/text-classification.yaml --output_dir outputs/noisy --flip_labels 0.2
python scripts/compare.py --config configs/text-classification.yaml --output_dir outputs/ood --ood_sources tweets
python scripts/compare.py --config configs/seq2seq.yaml --output_dir outputs/g2p                  (or another task)
python scripts/compare.py --config configs/seq2seq.yaml --output_dir outputs/g2p --print_cells    (for other machines)

A run which was stopped goes on when the same line is given again.
"""

from hf_ls.cli import compare_command

if __name__ == "__main__":
    compare_command()
