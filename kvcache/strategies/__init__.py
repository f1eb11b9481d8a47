"""The contract of a strategy, the twins naive and cached, hf-generate, the catalogue."""
