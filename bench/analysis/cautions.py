"""What a reader should know before believing a run: cautions as values, each with what to do about it."""

from collections.abc import Collection, Iterator

import msgspec
import pandas as pd

from bench.analysis import frames
from bench.analysis.disturbance import CLOCK_TICK_NS
from bench.analysis.tidy import MIN_PROCESSES, Tidy
from bench.case import Group
from bench.naming import plural
from bench.record import Run, outgrows

FIRST_STEP_FACTOR = 10.0
"""A first decode step that takes this many times the median step is no cold cache: something was compiled or set up."""

STALL_FACTOR = 2.0
"""And this many times the slowest of the other steps: on a machine that stalls, any step is slow now and then."""

MAX_DROPPED = 0.2
"""With a larger share of a case's rounds disturbed nothing is concluded from the rest (the gate: inconclusive)."""

MAX_IDLE_SHARE = 0.01
"""CPU time of processes that should sleep, as a share of the turns'. One tick of the counter a turn is rounding."""

MIN_ROUNDS = 6
"""Undisturbed rounds that a 95 % interval needs."""

MAX_INTERVAL_WIDTH = 0.2
"""Width of an interval as a share of its median."""


MAX_SHARE = 1.05
"""A strategy that reads this much faster than the kernels that only read shows that they did not find the roof."""


STORED_NOISE_BYTES = 3 << 20
"""Libraries' buffers of up to 2.7 MB were weighed too in runs stored before such a pass was repeated."""


class Caution(msgspec.Struct, frozen=True):
    """Something that weakens a figure. `case` is its key, or None where the whole run is meant."""

    case: str | None
    text: str
    advice: str


def cautions(tidy: Tidy, summary: pd.DataFrame) -> list[Caution]:
    """List every caution that a run gives rise to, those of the whole run first; `summary` as `summarize` makes it."""
    return [
        *_whole_run(tidy),
        *_disturbed(tidy),
        *_idle_arms(tidy.measured),
        *_first_steps(tidy.steps),
        *_intervals(tidy, summary),
        *_above_the_roof(summary),
        *_not_replayed(tidy.run),
        *of_caches(tidy.run),
    ]


def of_caches(run: Run) -> list[Caution]:
    """List what weakens the quality and the bytes of caches, whatever the machine does meanwhile."""
    return [*_quality(run), *_growth(run)]


def disturbed(tidy: Tidy) -> dict[str, float]:
    """Find the cases of which too many rounds were disturbed (`MAX_DROPPED`), and the share of those."""
    shares = tidy.measured.groupby("case", sort=False)["disturbed"].mean()
    return {str(case): float(share) for case, share in shares.items() if share > MAX_DROPPED}


def scope(n_processes: int) -> str:
    """Say where an interval holds: `within 1 process`, `within 3 processes`, or `over 8 processes`."""
    if n_processes >= MIN_PROCESSES:
        return f"over {n_processes} processes"
    return f"within {plural(n_processes, 'process', 'processes')}"


def _whole_run(tidy: Tidy) -> Iterator[Caution]:
    """Yield cautions of how the run was set up, and of its end."""
    plan, origin = tidy.run.manifest.plan, tidy.run.manifest.origin
    if origin is not None:
        text = f"imported from {origin.tool} ({origin.path}): measured elsewhere, its tokens were not checked"
        yield Caution(None, text, "compare it with your runs as a first look only")
    if tidy.unfinished:
        text = f"the run was interrupted: {len(tidy.unfinished)} of {len(plan)} cases lack rounds"
        yield Caution(None, text, f"`kvbench run --resume {tidy.run.path}` adds them")
    n_processes = tidy.measured["process"].nunique()
    if 0 < n_processes < MIN_PROCESSES:
        text = f"the intervals hold {scope(n_processes)}; processes differ by a few percent"
        yield Caution(None, text, f"for intervals over processes measure with --processes {MIN_PROCESSES}")
    yield from _machines(tidy)
    yield from _threads(tidy.run)
    if any(item.case.naive_logits == "all" for item in plan):
        text = "naive computes the logits of every position, so it pays for the LM head many times over"
        yield Caution(None, text, "for a fair baseline leave out --naive-logits all")
    judged = {check.case for check in tidy.run.checks if check.quality is not None}
    if any(item.case.key in judged and item.case.model.startswith("random:") for item in plan):
        text = "the weights are random, so the quality of a lossy strategy says little of a trained model"
        yield Caution(None, text, "judge quality on a trained model, as --model smollm2-135m")


def _machines(tidy: Tidy) -> Iterator[Caution]:
    """Say which machines measured a run of several, and how they differ: their times are no comparison."""
    if len(tidy.run.environments) < 2:
        return
    prints = [environment.fingerprint for environment in tidy.run.environments]
    differing = [name for name in prints[0] if len({each[name] for each in prints}) > 1]
    unlike = f", which differ in {', '.join(differing)}" if differing else ", alike by what is stored of them"
    yield Caution(
        None,
        f"the run was measured on {tidy.run.machine_names}{unlike}",
        "compare times only between rows of one machine (the column machine); ratios never cross machines",
    )
    groups: dict[Group, dict[str, None]] = {}
    for case in (plan.case for plan in tidy.run.manifest.plan if tidy.outcomes[plan.case.key].measured):
        groups.setdefault(case.group, {})[tidy.run.environment(case).hostname] = None
    for group, hosts in groups.items():
        if len(hosts) > 1:
            yield Caution(
                None,
                f"{group.model}, {group.dtype}, {_listed([group.n_threads])} was measured on {', '.join(hosts)}, since "
                "its job was resumed: a slope or a line over several prompts joins times of both",
                "measure this group again on one machine where such a line matters",
            )


def _threads(run: Run) -> Iterator[Caution]:
    """Find more threads than a container's quota keeps busy, or than the cores that variables bind them to."""
    counts: dict[tuple[float | None, tuple[int, ...], str | None, int], set[int]] = {}
    for case in (item.case for item in run.manifest.plan if item.case.on_host):
        machine = run.environment(case)
        limits = machine.cpu_quota, tuple(machine.bound_cores or ()), machine.bound_by, machine.cores
        counts.setdefault(limits, set()).add(case.n_threads)
    for (quota, bound, bound_by, cores), numbers in counts.items():
        if quota is not None and (over := sorted(count for count in numbers if count > quota)):
            text = f"{_listed(over)} on a CPU quota of {quota:g} cores are stopped once it is used up"
            yield Caution(None, text, f"measure with --threads {cores}, or raise the limit of the container")
        if bound and (over := sorted(count for count in numbers if count > len(bound))):
            text = f"{_listed(over)} with the main thread bound to core {_numbers(bound)} ({bound_by})"
            yield Caution(None, text, "unset that variable, or compare only with runs under the same binding")


def _listed(counts: Collection[int]) -> str:
    """Write numbers of threads: `1 thread`, `2, 4 threads`."""
    *others, last = counts
    return ", ".join([*map(str, others), plural(last, "thread")])


def _numbers(values: Collection[int]) -> str:
    return ", ".join(map(str, values))


def _disturbed(tidy: Tidy) -> Iterator[Caution]:
    for case, share in disturbed(tidy).items():
        text = f"{share:.0%} of the rounds were disturbed by CPU steal or throttling: inconclusive"
        yield Caution(case, text, "measure again when the machine is quieter, or with more --repetitions")


def _idle_arms(turns: pd.DataFrame) -> Iterator[Caution]:
    known = turns[turns["idle_arms_ns"].notna()]
    beyond_rounding = (known["idle_arms_ns"] - CLOCK_TICK_NS).clip(lower=0).astype("float64") / frames.NS_PER_MS
    totals = known[["case", "wall_ms"]].assign(idle_ms=beyond_rounding).groupby("case", sort=False).sum()
    for case, share in (totals["idle_ms"] / totals["wall_ms"]).items():
        if share > MAX_IDLE_SHARE:
            text = f"the other strategies' processes, which should sleep, used over {MAX_IDLE_SHARE:.0%} of a core"
            advice = "set OMP_WAIT_POLICY=PASSIVE, and see that nothing in the model runs in the background"
            yield Caution(str(case), text, advice)


def _first_steps(steps: pd.DataFrame) -> Iterator[Caution]:
    others = steps[~steps["first"]].groupby("case", sort=False)["latency_ms"].agg(["median", "max"])
    slowest_first = steps[steps["first"]].groupby("case", sort=False)["latency_ms"].max().reindex(others.index)
    ratios = slowest_first / others["median"]
    for case, ratio in ratios[slowest_first > STALL_FACTOR * others["max"]].items():
        if ratio >= FIRST_STEP_FACTOR:
            text = f"a first decode step took {ratio:.0f} x the median step: probably one-time set-up or a stall"
            yield Caution(str(case), text, "compare its rounds, and measure again on a quieter machine")


def _intervals(tidy: Tidy, summary: pd.DataFrame) -> Iterator[Caution]:
    """Yield cautions of intervals that are missing or wide; an unfinished case has another, to resume the run."""
    planned = tidy.run.manifest.repetitions * tidy.run.manifest.processes
    advice = f"measure with --repetitions {MIN_ROUNDS} or more"
    if planned >= MIN_ROUNDS:  # so some were disturbed, and what replaced them too
        advice = "measure again when the machine is quieter"
    told = set(tidy.unfinished)
    for row in frames.records(summary[summary["latency_ms"].notna()]):
        if pd.isna(row["latency_ms_low"]):
            if row["case"] not in told:
                told.add(row["case"])  # both phases have the same turns
                yield Caution(
                    row["case"], f"no interval: six undisturbed rounds are needed, it has {row['samples']}", advice
                )
        elif (row["latency_ms_high"] - row["latency_ms_low"]) / row["latency_ms"] > MAX_INTERVAL_WIDTH:
            text = f"the interval of {row['phase']} is wider than {MAX_INTERVAL_WIDTH:.0%} of its median"
            yield Caution(row["case"], text, "measure on a quieter machine, or with more --repetitions")


def _above_the_roof(summary: pd.DataFrame) -> Iterator[Caution]:
    for row in frames.records(summary):
        for share, what in (("mbu", "reads at {:.2f} x the bandwidth"), ("mfu", "computes at {:.2f} x the GEMM rate")):
            if row[share] > MAX_SHARE:
                text = f"{row['phase']} {what.format(row[share])} measured beside it: that is no ceiling"
                advice = f"do not trust its {share.upper()}; measure again when the machine is quieter"
                yield Caution(row["case"], text, advice)


def _not_replayed(run: Run) -> Iterator[Caution]:
    for case in dict.fromkeys(check.case for check in run.checks if check.replays is False):
        yield Caution(
            case,
            "its decode steps could not be recorded, so each also runs inductor's Python around its kernels, which "
            "takes a fifth of the step or more",
            "if it is a mixture of experts, compare it only with mixtures of experts; else report the model and the "
            "version of torch",
        )


def _quality(run: Run) -> Iterator[Caution]:
    """Say what the figures of a lossy strategy do not show; a text is equal in all processes, so one line a case."""
    judged = {check.case: check.quality for check in run.checks if check.quality is not None}
    for case, quality in judged.items():
        if quality.top1_agreement <= quality.commonest_share:
            yield Caution(
                case,
                f"top1_agreement {quality.top1_agreement:.2f} is no better than always naming the commonest token "
                f"({quality.commonest_share:.2f})",
                "judge it by logit_kl and perplexity_ratio, or over another text (--seed or --text)",
            )

    for case in dict.fromkeys(check.case for check in run.checks if check.depends_on_later and not check.exact):
        yield Caution(
            case,
            "earlier positions of this model depend on later ones within its text, so it was not judged",
            "judge this cache on a model whose forward is causal",
        )


def _growth(run: Run) -> Iterator[Caution]:
    """Find caches that are larger from outside than what can be reached from them: one line a case."""
    hidden: dict[str, tuple[int, int]] = {}
    for check in run.checks:
        growth, found = check.growth_bytes, check.kv_bytes_allocated_after_decode
        if growth is not None and found is not None and outgrows(growth, found, STORED_NOISE_BYTES):
            hidden[check.case] = max((growth, found), hidden.get(check.case, (0, 0)))
    for case, (growth, found) in hidden.items():
        yield Caution(
            case,
            f"its process grew by {growth / 1e6:.1f} MB while the cache was filled, of which {found / 1e6:.1f} MB "
            "can be reached from it: kv_bytes_allocated may be too small",
            "look for what it keeps in a library's or a thread's variables, in memory of its own (C, a device), or for "
            "working memory that it does not give back",
        )
