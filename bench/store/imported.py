"""llama-bench's results as a run, stored with a manifest that names their origin.

A `pp` test is the prefill of a case, a `tg` test a case with a prompt of one token: n_gen forwards of one token at its
depth. llama-bench times a whole test, so every token of a `tg` has its share of the time.
"""

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from bench.case import Case, naive_steps
from bench.errors import DataError
from bench.manifest import ELSEWHERE, SCHEMA_VERSION, CasePlan, Environment, Manifest, Origin
from bench.record import CellPlan, Sample
from bench.store import sealed
from bench.store.llama_tests import DEFAULTS, GGML_TYPES, ReadTest, read_tests, utc
from bench.store.run_folder import check_name, make_folder, samples_file, write_manifest, writing

STRATEGY = "llama.cpp"

FLASH = {**dict.fromkeys(("1", "True", "on"), "flash"), **dict.fromkeys(("0", "False", "off"), "ggml")}
FLASH |= dict.fromkeys(("-1", "auto"), "auto")
"""flash_attn of a test -> the attention of its case."""


def store(path: Path, out: Path, name: str | None) -> tuple[Path, list[str]]:
    """Store the tests of `path` as a run folder in `out`; return it, and a line for each kind of test left out.

    Raises:
        DataError: see `read_tests`; or none of its tests can be a case, or they are of several machines.
        UsageError: the folder exists, or cannot be written.
    """
    tests = read_tests(path)
    lost = Counter(reason for test in tests if (reason := _why_not(test)))
    kept = [test for test in tests if not _why_not(test)]
    notes = [f"left out: {count} of {len(tests)} tests ({reason})" for reason, count in lost.items()]
    if not kept:
        raise DataError(f"{path}: holds no test that can be imported{''.join(f'; {note}' for note in notes)}")
    for field in ("cpu_info", "gpu_info"):
        if len(machines := _distinct(kept, field)) > 1:
            raise DataError(
                f"{path}: holds tests of several machines ({field}: {', '.join(machines)}); import each alone"
            )
    cases = _cases(kept)
    samples = list(_samples(kept, cases))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    stamp = re.sub(r"[^0-9TZ]", "", utc(kept[0].test_time))
    run_id = f"{stamp}-{check_name(name or 'llama-bench')}"
    manifest = _manifest(kept, cases, samples, run_id, Origin("llama-bench", str(path), digest))
    folder = make_folder(out, manifest.run_id)
    try:
        with writing(f"--out {out}"):
            with samples_file(folder, sealed.sealed(manifest).digest) as file:
                for record in (*_cell_plans(manifest, samples), *samples):
                    file.append(record)
            write_manifest(folder, manifest)  # at last: a folder without it is no run
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder, notes


def _distinct(tests: Iterable[ReadTest], field: str) -> list[str]:
    """List the values that tests have in a field, without empty ones."""
    return [value for value in dict.fromkeys(str(getattr(test, field)) for test in tests) if value]


def _why_not(test: ReadTest) -> str:
    """Say why a test cannot be a case; nothing if it can."""
    if test.n_prompt and test.n_gen:
        return "prompt and generation timed together"
    if not test.n_prompt and not test.n_gen:
        return "no tokens"
    if test.embeddings:
        return "embeddings"
    if str(test.flash_attn) not in FLASH:
        return f"flash_attn {test.flash_attn}"
    if set(re.split(r"[,\s]+", test.backends.upper())) - {"CPU", "BLAS", "CUDA", ""}:
        return f"backend {test.backends}; only CPU and CUDA are known"
    return ""


def _cases(tests: Sequence[ReadTest]) -> list[Case]:
    """Name tests as cases, in their order: what differs between tests of one name is said in their strategy."""
    named = [(_case(test), _told_apart(test)) for test in tests]
    setups: dict[str, list[dict[str, str]]] = {}
    for case, setup in named:
        setups.setdefault(case.key, []).append(setup)
    apart = {}
    for key, own in setups.items():
        names = dict.fromkeys(name for setup in own for name in setup)
        apart[key] = [name for name in names if len({_value(setup, name) for setup in own}) > 1]
    return [
        msgspec.structs.replace(
            case, strategy=" ".join([STRATEGY, *(f"{name}={_value(setup, name)}" for name in apart[case.key])])
        )
        for case, setup in named
    ]


def _told_apart(test: ReadTest) -> dict[str, str]:
    """Return what a case has no field for; a prompt of one token would have the name of a generation."""
    return {"test": "pp" if test.n_prompt else "tg", **test.setup}


def _value(setup: dict[str, str], name: str) -> str:
    return setup.get(name, DEFAULTS.get(name, ""))


def _stored_setup(test: ReadTest) -> dict[str, str]:
    """Return how a test was run, without the build, which is the run's commit, and the folder of the model's file."""
    setup = {name: value for name, value in test.setup.items() if name != "build_commit"}
    return setup | {"model_filename": re.split(r"[/\\]", test.model_filename)[-1]}


def _case(test: ReadTest) -> Case:
    """Name a test as a case: the strategy is llama.cpp, the dtype what its weights are stored in."""
    stored = re.search(r"\b(?:BF16|F16|F32|(?:IQ|Q|TQ|MXFP)\d\w*)", test.model_type)
    ggml = stored[0].lower() if stored else "unknown"
    return Case(
        model=test.model_type,
        strategy=STRATEGY,
        device="cuda" if "CUDA" in test.backends.upper() and test.n_gpu_layers != 0 else "cpu",
        dtype={ours: name for name, ours in GGML_TYPES.items()}.get(ggml, ggml),
        attn_implementation=FLASH[str(test.flash_attn)],
        n_threads=test.n_threads,
        batch_size=1,
        n_prompt=test.n_prompt or 1,
        n_gen=test.n_gen or 1,
        n_depth=test.n_depth,
        seed=0,
    )


def _samples(tests: Sequence[ReadTest], cases: Sequence[Case]) -> Iterator[Sample]:
    order, rounds = 0, dict[str, int]()
    for test, case in zip(tests, cases, strict=True):
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
    counts = Counter(sample.case for sample in samples)
    rounds: dict[str, int] = {}
    for plan in manifest.plan:
        cell = plan.case.cell.key
        rounds[cell] = min(rounds.get(cell, 2**31), counts[plan.case.key])
    for cell, repetitions in rounds.items():
        yield CellPlan(cell=cell, repetitions=repetitions, tokens_per_turn=1, spent_s=0.0)


def _manifest(
    tests: Sequence[ReadTest], cases: Sequence[Case], samples: list[Sample], run_id: str, origin: Origin
) -> Manifest:
    plans = dict(zip(cases, tests, strict=True))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        run_id=run_id,
        created_utc=utc(tests[0].test_time),
        command=["kvbench", "import", origin.path],
        repetitions=1 + max(sample.round for sample in samples),
        processes=1,
        timeout_s=0.0,
        environment=Environment(
            hostname=ELSEWHERE,
            cpu_model=", ".join(_distinct(tests, "cpu_info")),
            cores=max(test.n_threads for test in tests),
            gpu=", ".join(_distinct(tests, "gpu_info")) or None,
            git_commit=", ".join(_distinct(tests, "build_commit")) or None,
        ),
        plan=[
            CasePlan(case=case, prefill=None, decode=None, weights_bytes=test.model_size, setup=_stored_setup(test))
            for case, test in plans.items()
        ],
        weights={},
        origin=origin,
    )
