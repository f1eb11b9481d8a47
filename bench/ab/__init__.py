"""Two revisions or environments, measured in turns and judged."""
