"""What `evaluate.load` finds for mce: it takes the first metric in this file."""

from hf_ls.metrics.evaluate_modules import Mce as Mce
