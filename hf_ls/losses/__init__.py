"""The losses: tensors in, tensor out.

Label smoothing and its relatives over logits [..., K], and the same from hidden states and the weight of a linear head without
building the logits. Knows nothing of Trainers, files or the Hub.
"""
