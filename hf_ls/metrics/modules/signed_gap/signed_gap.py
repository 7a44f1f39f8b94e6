"""What `evaluate.load` finds for signed_gap: it takes the first metric in this file."""

from hf_ls.metrics.evaluate_modules import SignedGap as SignedGap
