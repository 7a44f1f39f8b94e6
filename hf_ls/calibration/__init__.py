"""Maps of logits fitted on validation and reported on test: temperature, vector and matrix scaling, isotonic regression.

A temperature can be baked into the head of a classifier, so that the published model is calibrated without a wrapper.
"""
