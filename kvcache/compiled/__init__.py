"""The fast path: a static cache and a compiled decode step."""
