"""The study note: generate, train, trace."""
