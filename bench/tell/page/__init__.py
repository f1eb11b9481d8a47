"""Frames, verdicts and figures -> one HTML file that works offline: its template, its script and its style sheet."""
