"""The names of the ways to compute a product, one table; and the file that pins which of them is used. Needs no torch.

Which way is the fastest depends on the processor, so `choice.py` times them where the product is needed. A product is
named by its shape and its rows: `1536x576 float32, 1 row` is a step's product of one row with a weight of 1,536 by 576,
`1536x576 float32, prompt` that of a prompt, `mlp 1536x576 gated float32, prompt` its whole feed-forward block.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STEP = {
    "sum-1": "a multiply-and-sum that the compiled step contains, one reduction for each row",
    "sum-2": "the same, which reads each weight at two places at once",
    "sum-4": "the same at four places",
    "linear": "torch's F.linear",
    "onednn": "oneDNN's product on the weight as it lies",
}
"""Candidates for the rows of a decode step (one for each sequence of the batch)."""

PROMPT = {
    "onednn": "oneDNN's product on the weight as it lies",
    "linear": "torch's F.linear",
    "weight-first": "oneDNN's product with the weight as its first factor, which it does not lay out anew",
    "onednn-wide": "`onednn` in float32 on a bfloat16 model",
    "linear-wide": "`linear` in float32 on a bfloat16 model",
    "weight-first-wide": "`weight-first` in float32 on a bfloat16 model",
}
"""Candidates for a prompt, which has many rows."""

WIDE = "-wide"
"""How the names end that are candidates for bfloat16 only."""

Kernels = Mapping[str, str]
"""Name of a product -> name of the candidate that computes it. A product that is not in it has the default."""

DEFAULT: Kernels = {}
"""Every product by its default: what was fastest on the processors of `results/examples/engine-notes.md`."""


class InvalidKernels(ValueError):
    """A file names no kernels. The message is one line for users."""


def read(path: Path) -> dict[str, str]:
    """Read the kernels that a file of this project's cache folder (`kernels-*.json`) holds, or one like it.

    Raises:
        InvalidKernels: it cannot be read, or names a kernel that does not exist.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidKernels(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InvalidKernels(f"{path} is no JSON document ({error})") from error
    return checked(document.get("kernels") if isinstance(document, dict) else None, str(path))


def checked(kernels: Any, where: str) -> dict[str, str]:
    """Return `kernels` if it maps names of products to candidates for them.

    Raises:
        InvalidKernels: it does not; the message begins with `where`.
    """
    if not isinstance(kernels, dict):
        raise InvalidKernels(f'{where} has no object "kernels" that maps products to kernels')
    for product, kernel in kernels.items():
        table = PROMPT if product.endswith(", prompt") else STEP
        if not isinstance(kernel, str) or kernel not in table:
            raise InvalidKernels(f"{where}: {product}: {kernel!r} is no kernel, choose from {', '.join(table)}")
    return kernels
