"""What `evaluate.load` finds for ece_classwise: it takes the first metric in this file."""

from hf_ls.metrics.evaluate_modules import EceClasswise as EceClasswise
