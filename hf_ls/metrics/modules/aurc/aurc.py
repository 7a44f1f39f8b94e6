"""What `evaluate.load` finds for aurc: it takes the first metric in this file."""

from hf_ls.metrics.evaluate_modules import Aurc as Aurc
