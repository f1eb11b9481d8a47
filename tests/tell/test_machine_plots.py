"""Plots of a run that several machines measured: each has its own, and no figure holds the times of two."""

import warnings

import pytest

from bench.analysis.agreement import agreement
from bench.analysis.slopes import slopes
from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.record import Run
from bench.tell.drawn import MOST_PLOTS, limits_line
from bench.tell.plots.machines import groups
from bench.tell.representative import representative_line
from tests.handmade import floors_ms, grid, make_run, on_nodes, run_with_lossy_kinds, smollm2_plan, steady_roofs
from tests.tell.test_plots import assert_readable, legend

USUAL = ["naive", "dynamic", "static"]


def figures_of(run: Run) -> dict:
    tidy = Tidy.of(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = groups(summarize(tidy), tidy.steps, slopes(tidy.steps), agreement(run))
        return {name: draw() for listed in drawn for name, draw in listed().items()}


def ms(case, step: int) -> float:
    return (3 if case.n_prompt > 1000 else 1) * (1.7 * max(floors_ms(case, step)) + 5)


def floors_run(cases, rounds: int = 6) -> Run:
    return make_run(cases, ms=ms, plan=smollm2_plan, roofs=steady_roofs, rounds=rounds)


LENGTHS = grid(USUAL, [32, 128, 512, 2048, 4096, 8192])


@pytest.fixture(scope="module")
def two_nodes() -> dict:
    """One setting, its long prompts measured on a node of its own that is three times as slow."""
    run = on_nodes(floors_run(LENGTHS), lambda case: "node-2" if case.n_prompt > 1000 else "node-1")
    return figures_of(run)


def test_each_machine_has_files_of_its_own(two_nodes: dict) -> None:
    kinds = {"step_latency", "throughput", "speedup", "waterfall", "ladder"}
    assert set(two_nodes) == {f"{kind}-node-{number}" for kind in kinds for number in (1, 2)}
    for name, figure in two_nodes.items():
        assert figure.get_suptitle().split(", prompt")[0].endswith(f", on {name[-6:]}"), figure.get_suptitle()
        assert_readable(figure)


def test_a_figure_holds_the_lengths_of_one_machine(two_nodes: dict) -> None:
    for number, lengths in ((1, [32, 128, 512]), (2, [2048, 4096, 8192])):
        assert legend(two_nodes[f"ladder-node-{number}"]) == [f"prompt {length}" for length in lengths]
        for axes in two_nodes[f"throughput-node-{number}"].axes:
            assert all(len(line.get_xdata()) == len(lengths) for line in axes.lines)


def test_a_slope_is_fitted_to_the_steps_of_one_machine() -> None:
    """The long prompts are from a slower machine: a line through both would rise by what the machines differ."""
    run = make_run(LENGTHS, ms=lambda case, _: 60.0 if case.n_prompt > 1000 else 20.0, step_noise=0, turn_noise=0)
    found = slopes(Tidy.of(on_nodes(run, lambda case: "slow" if case.n_prompt > 1000 else "fast")).steps)
    assert list(found["machine"]) == ["fast"] * 3 + ["slow"] * 3
    cached = found[found["strategy"] != "naive"]
    assert cached["slope_ms_per_1000_tokens"].to_list() == pytest.approx([0] * 4, abs=1e-9)
    assert slopes(Tidy.of(run).steps).query("strategy == 'dynamic'")["slope_ms_per_1000_tokens"].iloc[0] > 1


THREADS = [case for count in (1, 2) for case in grid(USUAL, [128, 512], n_threads=count)]
DTYPES = [case for dtype in ("float32", "bfloat16") for case in grid(USUAL, [128, 512], dtype=dtype)]


@pytest.mark.parametrize(
    ("cases", "apart", "plot"), [(THREADS, "n_threads", "threads"), (DTYPES, "dtype", "across-dtype")]
)
def test_a_setting_is_compared_across_its_values_on_one_machine_alone(cases, apart: str, plot: str) -> None:
    run = floors_run(cases)
    values = [getattr(cases[0], apart), getattr(cases[-1], apart)]
    assert plot in figures_of(on_nodes(run, lambda _: "node-1"))
    alone = on_nodes(run, lambda case: f"node-{values.index(getattr(case, apart))}")
    assert {name.removesuffix("-node-0").removesuffix("-node-1") for name in figures_of(alone)} == {
        *("step_latency", "throughput", "speedup", "waterfall", "ladder")
    }
    assert representative_line(summarize(Tidy.of(alone))) == ""
    both = figures_of(on_nodes(run, lambda case: f"node-{case.n_prompt}"))
    assert {f"{plot}-node-128", f"{plot}-node-512"} < set(both)
    assert "on node-512, prompt 512" in both[f"{plot}-node-512"].get_suptitle()


def test_caches_are_drawn_by_machine_too() -> None:
    run = on_nodes(run_with_lossy_kinds(), lambda case: f"node-{case.n_prompt}")
    drawn = figures_of(run)
    assert {"trade-node-100", "trade-node-300", "agreement-node-100", "agreement-node-300"} < set(drawn)
    assert not [name for name in drawn if name.startswith("tpot-context")]  # one length on each
    assert "on node-300" in drawn["trade-node-300"].get_suptitle()


def test_of_many_machines_some_are_drawn_and_the_document_says_so(monkeypatch) -> None:
    monkeypatch.setattr("bench.tell.plots.machines.run.groups", lambda *_: [lambda: {"throughput": lambda: None}])
    cases = grid(["dynamic"], range(8, 8 * 13, 8), n_gen=4)
    run = on_nodes(make_run(cases, rounds=1), lambda case: f"node-{case.n_prompt}")
    drawn = figures_of(run)
    assert len(drawn) == MOST_PLOTS
    assert {"throughput-node-8", "throughput-node-96"} <= set(drawn)
    expected = f"The plots draw {MOST_PLOTS} of 12 machines, evenly spread; the tables have all.\n"
    assert limits_line(summarize(Tidy.of(run))) == expected
