"""Frames -> figures."""
