"""The educational-value filter of phi-1 (arXiv 2306.11644, §2.1): a random forest on embeddings of labelled
samples.

embed   a text as the mean hidden state of a language model
fit     labels → forest, judged on labels held out
forest  a fitted forest as plain arrays
score   each document of a corpus; the top share is kept
rules  demonstration labels for Python, from rules one can read
"""
