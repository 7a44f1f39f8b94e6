"""What `evaluate.load` finds for e_aurc: it takes the first metric in this file."""

from hf_ls.metrics.evaluate_modules import EAurc as EAurc
