"""What `evaluate.load` finds for smooth_ece: it takes the first metric in this file."""

from hf_ls.metrics.evaluate_modules import SmoothEce as SmoothEce
