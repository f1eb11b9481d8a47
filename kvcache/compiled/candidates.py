"""The names of the ways to compute a product, one table; and the file that pins which of them is used. Needs no torch.

Which way is the fastest depends on the processor, so `choice.py` times them where the product is needed. A product is
named by its shape and its rows: `1536x576 float32, step of 1` is a step's product of one row with a weight of 1,536 by
576, `1536x576 float32, prompt of 128` that of a prompt, `mlp gated 1536x576 float32, prompt of 128` its whole
feed-forward block.
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
    "weight-first": "torch's product with the weight as its first factor",
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

OF_PROMPT = ", prompt of "
"""What the names of a prompt's products have before their rows."""

PROMPT_ROWS = (128, 512)
"""Rows for which candidates for a prompt are timed. Each number of rows takes the kernel of the nearest, by ratio.

A feed-forward block by `weight-first`, the fastest over 128 rows on Zen 4, took 1.29 times as long over 512 as by
`linear` (Zen 3, float32)."""

Kernels = Mapping[str, str]
"""Name of a product -> name of the candidate that computes it. A product that is not in it has the default."""

DEFAULT: Kernels = {}
"""Every product by its default: what was fastest on the processors of `results/examples/engine-notes.md`."""


class InvalidKernels(ValueError):
    """A file names no kernels. The message is one line for users."""


PINNED_TO_DEFAULT = "default"
"""What `--kernels` takes in place of a file: every product by its default."""


def pinned(text: str) -> dict[str, str]:
    """Return the kernels that a user's `--kernels FILE|default` names.

    Raises:
        InvalidKernels: as `read`.
    """
    return dict(DEFAULT) if text == PINNED_TO_DEFAULT else read(Path(text))


def read(path: Path) -> dict[str, str]:
    """Read the kernels of a file: of the cache folder (`kernels-*.json`), or of a baseline, those of its cases.

    Raises:
        InvalidKernels: it cannot be read, or names a kernel that does not exist, or two for one product.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidKernels(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InvalidKernels(f"{path} is no JSON document ({error})") from error
    if not isinstance(document, dict) or not document.keys() & {"kernels", "figures"}:
        raise InvalidKernels(f'{path} has no object "kernels" that maps products to kernels')
    merged: dict[str, str] = {}
    for part in [document] if "kernels" in document else document["figures"]:
        kernels = checked(part.get("kernels") or {}, str(path))
        for product in merged.keys() & kernels.keys():
            if merged[product] != kernels[product]:
                raise InvalidKernels(f"{path}: {product} has two kernels, {merged[product]} and {kernels[product]}")
        merged |= kernels
    return merged


def checked(kernels: Any, where: str) -> dict[str, str]:
    """Return `kernels` if it maps names of products to candidates for them.

    Raises:
        InvalidKernels: it does not; the message begins with `where`.
    """
    if not isinstance(kernels, dict):
        raise InvalidKernels(f'{where} has no object "kernels" that maps products to kernels')
    for product, kernel in kernels.items():
        if product.endswith(OF_PROMPT.removesuffix(" of ")):
            raise InvalidKernels(f"{where}: {product} does not say of how many rows: have the kernels chosen again")
        table = PROMPT if OF_PROMPT in product else STEP
        if not isinstance(kernel, str) or kernel not in table:
            raise InvalidKernels(f"{where}: {product}: {kernel!r} is no kernel, choose from {', '.join(table)}")
    return kernels
