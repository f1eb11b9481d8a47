"""The fast path over a quantised cache, read and written inside the compiled step: `compiled-int8`, `compiled-int4`."""

from __future__ import annotations

from typing import ClassVar

from kvcache.caches.contract import Promise
from kvcache.compiled.int4_rows import Int4Rows
from kvcache.compiled.int8_rows import Int8Rows
from kvcache.compiled.rows import Rows
from kvcache.compiled.strategy import Compiled


class CompiledInt8(Compiled):
    """As `Compiled`, with keys and values as 8-bit integers, a scale per token and head."""

    name = "compiled-int8"
    promise: Promise = "lossy"
    rows: ClassVar[type[Rows]] = Int8Rows


class CompiledInt4(Compiled):
    """As `Compiled`, with keys and values as 4-bit integers, a scale per token and head of what `Int4Rows` leaves."""

    name = "compiled-int4"
    promise: Promise = "lossy"
    rows: ClassVar[type[Rows]] = Int4Rows
