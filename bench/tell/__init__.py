"""Frames and verdicts -> text, report, exchange formats; tell/plots draws figures. Needs no torch."""
