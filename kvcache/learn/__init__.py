"""Corpus, training and its folder, trace."""
