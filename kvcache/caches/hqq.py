"""transformers' QuantizedCache with HQQ's integers (half-quadratic quantization)."""

from typing import ClassVar

from kvcache.caches.quantized import QuantizedKV


class HqqKV(QuantizedKV):
    """What hqq stores; a subclass for each number of bits that it has."""

    package: ClassVar[str] = "hqq"
    backend: ClassVar[str] = "hqq"


class HqqInt1(HqqKV):
    """1 bit a number."""

    nbits: ClassVar[int] = 1


class HqqInt2(HqqKV):
    """2 bits a number."""

    nbits: ClassVar[int] = 2


class HqqInt3(HqqKV):
    """3 bits a number."""

    nbits: ClassVar[int] = 3


class HqqInt4(HqqKV):
    """4 bits a number."""

    nbits: ClassVar[int] = 4


class HqqInt8(HqqKV):
    """8 bits a number."""

    nbits: ClassVar[int] = 8
