"""What plugs into the Trainers of transformers and TRL: arguments, the mixin, and the ready-made Trainers.

A micro-batch is read once, its loss taken with or without logits, and every evaluation reports unsmoothed numbers.
"""
