"""A plan -> turns -> records."""
