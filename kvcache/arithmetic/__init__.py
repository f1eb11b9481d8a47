"""Geometry, architectures, costs: what can be computed without a model. Needs no torch."""
