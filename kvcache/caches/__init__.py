"""Kinds of cache: all that this project knows of transformers' Cache API."""
