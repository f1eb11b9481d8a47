"""llama-bench's results as a run: read from its json, jsonl or sqlite, stored with a manifest that names their origin.

A `pp` test is the prefill of a case, a `tg` test a case with a prompt of one token: n_gen forwards of one token at its
depth. llama-bench times a whole test, so every token of a `tg` has its share of the time.
"""

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from bench.case import Case, naive_steps
from bench.errors import DataError
from bench.manifest import SCHEMA_VERSION, CasePlan, Environment, Manifest, Origin
from bench.record import CellPlan, Sample
from bench.store.run_folder import check_name, make_folder, samples_file, write_manifest
from bench.tell.exchange.llama_bench import GGML_TYPES, Test

ELSEWHERE = "measured elsewhere"
"""The machine of an imported run: llama-bench stores no host."""

SQLITE_MAGIC = b"SQLite format 3\0"


def read_tests(path: Path) -> list[Test]:
    """Read the tests of a file, whichever of the three formats it has.

    Raises:
        DataError: it cannot be read, is damaged, or holds no test; the message names the line.
    """
    try:
        content = path.read_bytes()
        if content.startswith(SQLITE_MAGIC):
            return [_test(row, f"{path}, row {number}") for number, row in enumerate(_sqlite_rows(path), start=1)]
        if content.lstrip()[:1] == b"[":
            return [_test(row, f"{path}, test {number}") for number, row in enumerate(json.loads(content), start=1)]
        lines = [(number, line) for number, line in enumerate(content.splitlines(), start=1) if line.strip()]
        tests = []
        for number, line in lines:
            where = f"{path}, line {number}"
            try:
                tests.append(_test(json.loads(line), where))
            except ValueError as error:
                raise DataError(f"{where}: no JSON ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (ValueError, sqlite3.Error) as error:
        raise DataError(f"{path}: not llama-bench's json, jsonl or sqlite ({error})") from error
    return tests


def store(path: Path, out: Path, name: str | None) -> tuple[Path, list[str]]:
    """Store the tests of `path` as a run folder in `out`; return it, and a line for each kind of test left out.

    Raises:
        DataError: see `read_tests`; or none of its tests can be a case.
        UsageError: the folder exists, or cannot be written.
    """
    tests = read_tests(path)
    lost = {reason: 0 for test in tests if (reason := _why_not(test))}
    for test in tests:
        if reason := _why_not(test):
            lost[reason] += 1
    kept = [test for test in tests if not _why_not(test)]
    notes = [f"left out: {count} of {len(tests)} tests ({reason})" for reason, count in lost.items()]
    if not kept:
        raise DataError(f"{path}: holds no test that can be imported{''.join(f'; {note}' for note in notes)}")
    samples = list(_samples(kept))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    stamp = re.sub(r"[^0-9TZ]", "", kept[0].test_time) or "undated"
    manifest = _manifest(
        kept, samples, f"{stamp}-{check_name(name or 'llama-bench')}", Origin("llama-bench", str(path), digest)
    )
    folder = make_folder(out, manifest.run_id)
    manifest = write_manifest(folder, manifest)
    with samples_file(folder, manifest.digest) as file:
        for plan in _cell_plans(manifest, samples):
            file.append(plan)
        for sample in samples:
            file.append(sample)
    return folder, notes


def _sqlite_rows(path: Path) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(f"file:{path.resolve()}?mode=ro", uri=True)) as database:
        database.row_factory = sqlite3.Row
        # Of the table that `llama-bench -o sql` makes.
        return [dict(row) for row in database.execute("SELECT * FROM test ORDER BY rowid")]


def _test(row: Any, where: str) -> Test:
    """Check one test.

    Raises:
        DataError: a field is missing, or of another kind than llama-bench's.
    """
    try:
        # Lax: the SQL output quotes its numbers.
        test = msgspec.convert(row, Test, strict=False)
    except msgspec.ValidationError as error:
        raise DataError(f"{where}: no test of llama-bench ({error})") from error
    if min([test.avg_ns, *test.samples_ns]) <= 0 or min(test.n_prompt, test.n_gen, test.n_depth) < 0:
        raise DataError(f"{where}: a time is not positive, or a number of tokens is negative")
    return test


def _why_not(test: Test) -> str:
    """Say why a test cannot be a case; nothing if it can."""
    if test.n_prompt and test.n_gen:
        return "prompt and generation timed together"
    if not test.n_prompt and not test.n_gen:
        return "no tokens"
    if test.embeddings:
        return "embeddings"
    if set(re.split(r"[,\s]+", test.backends.upper())) - {"CPU", "BLAS", "CUDA", ""}:
        return f"backend {test.backends}; only CPU and CUDA are known"
    return ""


def _case(test: Test) -> Case:
    """Name a test as a case: the strategy is llama.cpp, the dtype what its weights are stored in."""
    stored = re.search(r"\b(?:BF16|F16|F32|(?:IQ|Q|TQ|MXFP)\d\w*)", test.model_type)
    ggml = stored[0].lower() if stored else "unknown"
    return Case(
        model=test.model_type,
        strategy="llama.cpp",
        device="cuda" if "CUDA" in test.backends.upper() and test.n_gpu_layers != 0 else "cpu",
        dtype={ours: name for name, ours in GGML_TYPES.items()}.get(ggml, ggml),
        attn_implementation="flash" if test.flash_attn in {True, "on", "1"} else "ggml",
        n_threads=test.n_threads,
        batch_size=1,
        n_prompt=test.n_prompt or 1,
        n_gen=test.n_gen or 1,
        n_depth=test.n_depth,
        seed=0,
    )


def _samples(tests: Iterable[Test]) -> Iterator[Sample]:
    order, rounds = 0, dict[str, int]()
    for test in tests:
        case = _case(test)
        for time_ns in test.samples_ns or [test.avg_ns]:
            share_ns = max(1, round(time_ns / (test.n_gen or 1)))
            number = rounds[case.key] = rounds.get(case.key, -1) + 1
            steps = naive_steps(case, tokens_per_turn=1)  # one step stands for all
            yield Sample(
                case=case.key,
                process=0,
                round=number,
                order=order,
                warmup=False,
                prefill_ns=share_ns,
                steps=steps,
                step_ns=[share_ns] * len(steps),
            )
            order += 1


def _cell_plans(manifest: Manifest, samples: Iterable[Sample]) -> Iterator[CellPlan]:
    """Say of each cell how many rounds it has: llama-bench was free to repeat each test as often as it liked."""
    counts: dict[str, int] = {}
    for sample in samples:
        counts[sample.case] = counts.get(sample.case, 0) + 1
    rounds: dict[str, int] = {}
    for plan in manifest.plan:
        cell = plan.case.cell.key
        rounds[cell] = min(rounds.get(cell, 2**31), counts[plan.case.key])
    for cell, repetitions in rounds.items():
        yield CellPlan(cell=cell, repetitions=repetitions, tokens_per_turn=1, spent_s=0.0)


def _manifest(tests: list[Test], samples: list[Sample], run_id: str, origin: Origin) -> Manifest:
    first, plans = tests[0], {_case(test).key: test for test in tests}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        run_id=run_id,
        created_utc=first.test_time,
        command=["kvbench", "import", origin.path],
        repetitions=1 + max(sample.round for sample in samples),
        processes=1,
        timeout_s=0.0,
        environment=Environment(
            hostname=ELSEWHERE,
            cpu_model=first.cpu_info,
            cores=max(test.n_threads for test in tests),
            gpu=first.gpu_info or None,
            git_commit=first.build_commit or None,
        ),
        plan=[
            CasePlan(case=_case(test), prefill=None, decode=None, weights_bytes=test.model_size)
            for test in plans.values()
        ],
        weights={},
        origin=origin,
    )
