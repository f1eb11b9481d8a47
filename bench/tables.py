"""Frames -> text: the table of a run or a comparison as Markdown, for a terminal, as CSV or JSON. No file access."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import pandas as pd
from tabulate import tabulate

Format = Literal["md", "csv", "json", "jsonl"]
