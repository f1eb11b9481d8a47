"""transformers' QuantizedCache with optimum-quanto's integers."""

from __future__ import annotations

from typing import ClassVar

from kvcache.caches.quantized import QuantizedKV


class QuantoKV(QuantizedKV):
    """What optimum-quanto stores; a subclass for each number of bits that it has."""

    package: ClassVar[str] = "optimum-quanto"
    backend: ClassVar[str] = "quanto"


class QuantoInt2(QuantoKV):
    """2 bits a number."""

    nbits: ClassVar[int] = 2


class QuantoInt4(QuantoKV):
    """4 bits a number."""

    nbits: ClassVar[int] = 4
