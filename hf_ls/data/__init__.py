"""From the name of a data set to tokenised splits: files and the Hub, labels, sentences, sequences, the embedded sets.

Model selection never sees the test split.
"""
