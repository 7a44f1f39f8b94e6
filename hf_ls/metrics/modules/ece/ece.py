"""What `evaluate.load` finds for ece: it takes the first metric in this file."""

from hf_ls.metrics.evaluate_modules import Ece as Ece
