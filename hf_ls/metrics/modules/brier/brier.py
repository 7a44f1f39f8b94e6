"""What `evaluate.load` finds for brier: it takes the first metric in this file."""

from hf_ls.metrics.evaluate_modules import Brier as Brier
