"""The answers of a causal language model to questions with options: questions and prompts as data, and the probability of each
option, on which every metric, temperature, plot and card of classifiers works as it is.
"""
