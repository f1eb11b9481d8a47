"""Kinds of cache, a file each: all that this project knows of transformers' Cache API."""
