"""One file for each family of architectures: how transformers' modules become a description (`decoder.py`)."""
