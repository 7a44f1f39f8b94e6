"""What `evaluate.load` finds for ece_equal_mass: it takes the first metric in this file."""

from hf_ls.metrics.evaluate_modules import EceEqualMass as EceEqualMass
