"""The tests of llama-bench, read from its json, jsonl or sqlite."""

import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bench.errors import DataError

GGML_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Types of weights -> as llama.cpp calls them."""

Count = Annotated[int, msgspec.Meta(le=10_000_000)]
"""Of tokens, layers, threads: beyond what any model or machine has, and still small enough to work with."""
Big = Annotated[int, msgspec.Meta(le=10**15)]
"""Bytes, parameters; of ns eleven days."""


class Test(msgspec.Struct, frozen=True, kw_only=True):
    """One test of llama-bench: n_prompt tokens in one go (pp), or n_gen one after the other (tg), at a depth.

    Fields with a default may be missing: older and newer builds have fewer and more.
    """

    build_commit: str = ""
    build_number: int = 0
    cpu_info: str = ""
    gpu_info: str = ""
    backends: str = ""
    model_filename: str
    model_type: str
    model_size: Big = 0
    """Bytes."""
    model_n_params: Big = 0
    n_batch: Count = 0
    n_ubatch: Count = 0
    n_threads: Count
    cpu_mask: str = "0x0"
    cpu_strict: bool = False
    poll: int = 0
    type_k: str = ""
    type_v: str = ""
    n_gpu_layers: Count = 0
    split_mode: str = "layer"
    main_gpu: int = 0
    no_kv_offload: bool = False
    flash_attn: bool | int | str = False
    tensor_split: str = "0.00"
    tensor_buft_overrides: str = "none"
    use_mmap: bool = True
    embeddings: bool = False
    no_op_offload: bool = False
    n_prompt: Count
    n_gen: Count
    n_depth: Count = 0
    test_time: str
    avg_ns: Big
    stddev_ns: int = 0
    avg_ts: float = 0.0
    stddev_ts: float = 0.0
    samples_ns: list[Big] = []
    """Of each repetition the whole test; SQL output has none."""
    samples_ts: list[float] = []


class ReadTest(Test, frozen=True, kw_only=True):
    """A test as a file has it."""

    setup: dict[str, str]
    """How it was run: all fields but `LABELS` and `BACKENDS`, also those of builds newer than `Test`. Fields that have
    their default (`DEFAULTS`) are left out."""


LABELS = {
    *("build_number", "cpu_info", "gpu_info", "model_type", "model_n_params", "n_threads", "flash_attn", "embeddings"),
    *("n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts"),
    *("samples_ns", "samples_ts", "test"),
}
"""Fields that do not say how a test was run, and those that a case has as fields of its own."""

BACKENDS = {
    "cuda": "cuda",
    "vulkan": "vulkan",
    "kompute": "kompute",
    "metal": "metal",
    "sycl": "sycl",
    "rpc": "rpc",
    "opencl": "opencl",
    "gpu_blas": "gpu-blas",
    "blas": "blas",
}
"""Older builds have a field for each of these in place of `backends` -> as `backends` names it. The last two are true
beside any other, which is the backend then."""

_NEWER = {"n_cpu_moe": 0, "devices": "auto", "no_host": False, "use_direct_io": False}

SQLITE_MAGIC = b"SQLite format 3\0"


def read_tests(path: Path) -> list[ReadTest]:
    """Read the tests of a file, whichever of the three formats it has.

    Raises:
        DataError: it cannot be read, is damaged, or holds no test; the message names the line.
    """
    try:
        content = path.read_bytes()
        if content.startswith(SQLITE_MAGIC):
            return [_test(row, f"{path}, row {number}") for number, row in enumerate(_sqlite_rows(path), start=1)]
        encoding = json.detect_encoding(content)  # PowerShell's > writes UTF-16
        text = content.decode(encoding)
        if text.lstrip()[:1] == "[":
            return [_test(row, f"{path}, test {number}") for number, row in enumerate(json.loads(text), start=1)]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError, sqlite3.Error) as error:
        raise DataError(f"{path}: not llama-bench's json, jsonl or sqlite ({error})") from error
    lines = ((f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), start=1))
    return [_test(_parsed(line, where), where) for where, line in lines if line.strip()]


def _sqlite_rows(path: Path) -> list[dict[str, Any]]:
    """Read the table that `llama-bench -o sql` makes: `llama_bench`, in older builds `test`."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        database.row_factory = sqlite3.Row
        names = [row["name"] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        newer, older = "SELECT * FROM llama_bench ORDER BY rowid", "SELECT * FROM test ORDER BY rowid"
        return [dict(row) for row in database.execute(newer if "llama_bench" in names else older)]


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no JSON ({error})") from error


def _test(row: Any, where: str) -> ReadTest:
    """Check one test.

    Raises:
        DataError: a field is missing, of another kind than llama-bench's, or no such number or time can be.
    """
    try:
        # Lax: the SQL output quotes its numbers.
        test = msgspec.convert(row, Test, strict=False)
    except msgspec.ValidationError as error:
        raise DataError(f"{where}: no test of llama-bench ({error})") from error
    if min([test.avg_ns, *test.samples_ns]) <= 0 or min(test.n_prompt, test.n_gen, test.n_depth) < 0:
        raise DataError(f"{where}: a time is not positive, or a number of tokens is negative")
    try:
        utc(test.test_time)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{where}: test_time is no ISO 8601 ({error})") from error
    fields = msgspec.structs.asdict(test)
    if "backends" not in row:
        fields["backends"] = _backends(row)
    values = {name: written(value) for name, value in (row | fields).items() if name not in LABELS | BACKENDS.keys()}
    setup = {name: value for name, value in values.items() if value != DEFAULTS.get(name)}
    return ReadTest(**fields, setup=setup)


def _backends(row: dict[str, Any]) -> str:
    """Return what `backends` would be in a row of an older build; empty where it says nothing of them."""
    used = [name for field, name in BACKENDS.items() if written(row.get(field, "")).lower() in ("1", "true")]
    return ",".join([name for name in used if "blas" not in name] or used[:1])


def written(value: object) -> str:
    """Write a value of a field; yes and no as the SQL output has them.

    >>> written(True), written("layer"), written(-1)
    ('1', 'layer', '-1')
    """
    return str(int(value) if isinstance(value, bool) else value)


def utc(test_time: str) -> str:
    """Write the time of a test as manifests have theirs.

    >>> utc("2026-04-24T13:58:50+02:00")
    '2026-04-24T11:58:50Z'
    """
    found = datetime.fromisoformat(test_time)
    return f"{(found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


DEFAULTS = {
    **{field.name: written(field.default) for field in msgspec.structs.fields(Test) if not field.required},
    **{name: written(value) for name, value in _NEWER.items()},
}
"""What a field is where a file does not have it."""
