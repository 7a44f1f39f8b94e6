"""What `evaluate.load` finds for rmsce_debiased: it takes the first metric in this file."""

from hf_ls.metrics.evaluate_modules import RmsceDebiased as RmsceDebiased
