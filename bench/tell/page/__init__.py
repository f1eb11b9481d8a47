"""Frames, verdicts and figures -> one HTML file that works offline: its template, its script and its style sheet."""

import bench.tell.plots  # noqa: F401  # before matplotlib is imported here: without the user's settings
