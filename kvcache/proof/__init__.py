"""Same tokens and exact counts: what is known before any time is taken."""
