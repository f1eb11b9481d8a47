"""A run's plan and its folder: what is refused in one line, what is read again, what is left behind. No worker."""

from pathlib import Path

import msgspec
import pytest

from bench.errors import DataError, UsageError
from bench.measure import run as measuring
from bench.measure.plan import Limits
from bench.measure.server_process import RunServers
from bench.record import Run
from bench.store.run_folder import locked, samples_file
from kvcache import models
from tests.handmade import ENVIRONMENT, grid, make_plan, make_run
from tests.stored import create_run

MADE = make_run(grid(["naive", "dynamic"], [8]), rounds=2)
WEIGHTS = {"smollm2-135m": "5f" * 32}
HANDMADE = msgspec.structs.replace(MADE, manifest=msgspec.structs.replace(MADE.manifest, weights=WEIGHTS))


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of the hand-made runs, and weights as they were."""
    monkeypatch.setattr(measuring, "read_environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(models, "weights_digest", lambda model, seed: WEIGHTS[model])


def stored(out: Path) -> tuple[Path, str]:
    """Store a run that was interrupted after its first sample; its folder, and its manifest's digest."""
    folder, manifest = create_run(out, HANDMADE.manifest)
    with samples_file(folder, manifest.digest) as writer:
        writer.append(HANDMADE.samples[0])
    return folder, manifest.digest


def no_model(model: str, seed: int) -> str:
    raise models.ModelError("its weights cannot be fetched")


def test_weights_that_are_missing_are_refused_when_the_run_is_planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (planned,) = map(make_plan, grid(["naive"], [8]))
    planned = msgspec.structs.replace(planned, unpredicted="it asks for numbers")
    monkeypatch.setattr(measuring.planning, "plan", lambda _: [planned])
    monkeypatch.setattr(measuring.planning, "memory_bytes", lambda _: 0)
    monkeypatch.setattr(measuring.planning, "temporary_bytes", lambda _: 0)
    monkeypatch.setattr(models, "weights_digest", no_model)
    with pytest.raises(UsageError, match=r"^--model smollm2-135m: its weights cannot be fetched"):
        measuring.plan([], Limits(), tmp_path, None)
    assert capsys.readouterr().err == "kvbench: no costs of naive, prompt 8: it asks for numbers\n"


@pytest.mark.usefixtures("_here")
def test_weights_that_are_gone_are_refused_when_the_run_is_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, _ = stored(tmp_path)
    monkeypatch.setattr(models, "weights_digest", no_model)
    with pytest.raises(DataError, match=r"cannot be resumed here: its weights cannot be fetched$"):
        measuring.resume(str(folder), tmp_path)


@pytest.mark.usefixtures("_here")
def test_a_resumed_run_is_read_again_when_no_other_process_can_write_to_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, digest = stored(tmp_path)
    job = measuring.resume(str(folder), tmp_path)
    with samples_file(folder, digest) as other:
        other.append(HANDMADE.samples[1])
    seen: list[Run] = []
    monkeypatch.setattr(measuring, "measure_cases", lambda *arguments: seen.append(arguments[5]))
    measuring.measure(job, RunServers())
    assert seen[0].samples == HANDMADE.samples[:2]


def test_a_manifest_that_cannot_be_written_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise UsageError("--out: cannot be written")

    monkeypatch.setattr(measuring, "write_manifest", full)
    job = measuring.Job(HANDMADE.manifest, tmp_path, ceilings=False)
    with pytest.raises(UsageError) as refused:
        measuring.measure(job, RunServers())
    assert refused.value.__notes__ == [measuring.NOTHING_KEPT]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kind", ["samples", "checks", "failures", "ceilings", "texts", None])
def test_a_refused_model_leaves_a_folder_unless_it_is_new_and_without_results(
    kind: str | None, new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    empty: dict[str, list[object]] = {"samples": [], "checks": []}
    stored = msgspec.structs.replace(MADE, **(empty | ({} if kind is None else {kind: [object()]})))
    monkeypatch.setattr(measuring, "read_run", lambda _folder: stored)
    with pytest.raises(UsageError, match="it does not repeat itself") as caught, measuring._kept(folder, new=new):
        raise UsageError("it does not repeat itself")
    removed = new and kind is None
    assert folder.exists() == (not removed)
    assert ("so nothing is kept" in str(caught.value)) == removed


@pytest.mark.usefixtures("_here")
def test_a_run_that_another_process_measures_is_left_alone(tmp_path: Path) -> None:
    folder, _ = create_run(tmp_path, HANDMADE.manifest)  # without a sample yet
    job = measuring.resume(str(folder), tmp_path)
    with locked(folder), pytest.raises(UsageError, match="another process measures into it"):
        measuring.measure(job, RunServers())
    assert (folder / "manifest.json").exists()
