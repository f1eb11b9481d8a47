"""Compare, gate, baseline and drift, and the rules they decide by. Needs no torch."""
