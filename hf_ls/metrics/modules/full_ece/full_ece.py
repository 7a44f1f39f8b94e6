"""What `evaluate.load` finds for full_ece: it takes the first metric in this file."""

from hf_ls.metrics.evaluate_modules import FullEce as FullEce
