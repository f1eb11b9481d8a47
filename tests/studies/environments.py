"""Runs, reports, gates and compares a tiny model in some eighty environments that others have met (an hour).

Each must work, or be refused by the exit code of the README and one line that names what to change: no traceback, no
sample lost, no wrong repository, no file left behind. Writes results/examples/environments.csv and .md.
"""

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bench.errors import DataError
from bench.machine.affinity import usable_cores
from bench.machine.environment import read_environment
from bench.manifest import Environment
from bench.store.run_folder import read_run
from tests.studies.environment_rows import DONE, ROWS, Command, Row

TREE = Path(__file__).resolve().parents[2]
RESULTS = TREE / "results" / "examples"
GRID = ["-m", "random:tiny", "-p", "8", "-n", "4", "-t", "1"]
STRATEGIES = ("naive", "dynamic")
LONGEST_S = 900.0
START = "from kvbench import main; main()"
"""As the program `kvbench` does."""
MODEL = "import kvcache\n\n\ndef build():\n    return kvcache.load('random:tiny')\n"
BAD = re.compile(r"Traceback \(most recent call last\)|Exception ignored|Segmentation fault|KVBENCH_TRACEBACK")
"""What no user should see; the last is the message of an error that was not foreseen."""


@dataclass(frozen=True)
class Outcome:
    """What a command did in an environment; `fault` is empty where all was as it should be."""

    environment: str
    command: str
    exit_code: int | None
    fault: str
    said: str
    """The line of a refusal."""


class Bench:
    """What all environments share: a stored run, its baseline, two repositories and a cache of weights."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.cache = scratch, scratch / "cache"
        self.mine, self.other = (self._repository(scratch / name) for name in ("mine", "other"))
        environment = os.environ | {"PYTHONPATH": str(TREE), "KVBENCH_CACHE": str(self.cache)}
        for words in (
            ["run", *GRID, "--strategies", ",".join(STRATEGIES), "-r", "1", "--no-ceilings", "--name", "stored"],
            ["baseline", "promote", "stored", "--baseline-dir", str(scratch / "baselines"), "--name", "tiny"],
        ):
            command = [sys.executable, "-P", "-m", "bench.cli", *words, "--out", str(scratch / "runs")]
            subprocess.run(command, check=True, env=environment, capture_output=True)
            if words[0] == "run":
                (self.run,) = (scratch / "runs").glob("[!.]*")
                self.run = self.run.rename(scratch / "runs" / "stored")

    def _repository(self, folder: Path) -> Path:
        """A repository of the user's model, with two commits."""
        identity = ["-c", "user.name=study", "-c", "user.email=study@example.org"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        subprocess.run(["git", "init", "-q", str(folder)], check=True, env=clean)
        for text in ("", f"# {folder.name}\n"):
            (folder / "mine.py").write_text(text + MODEL)
            for words in (["add", "."], ["commit", "-q", "-m", "next"]):
                subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, env=clean)
        return folder

    def arguments(self, command: Command, folder: Path) -> list[str]:
        """The command's arguments, with every file that it writes in `folder`."""
        out = ["--out", str(folder / "runs")]
        match command:
            case "run":
                return ["run", *GRID, "--strategies", ",".join(STRATEGIES), "-r", "1", "--no-ceilings", *out]
            case "report":
                return ["report", str(folder / "stored")]
            case "gate":
                return ["gate", str(folder / "stored"), "--baseline", str(self.scratch / "baselines" / "tiny")]
            case "ab":
                model = ["-m", "py:mine:build", *GRID[2:], "--strategies", "dynamic"]
                return ["ab", "HEAD~1", *model, "--budget", "0.1", *out]

    def tried(self, row: Row) -> Iterator[Outcome]:
        """Each command of an environment, in a folder of its own."""
        if reason := row.skip():
            yield Outcome(row.name, "-", None, "", f"not tried here: {reason}")
            return
        for command in row.commands:
            folder = self.scratch / row.name / command / row.inside
            here = Path(row.here.format(folder=folder))
            (folder / "tmp").mkdir(parents=True)
            (folder / "home").mkdir()
            if command == "ab" and folder in here.parents:
                shutil.copytree(self.mine, here)
            elif folder in here.parents:
                here.mkdir()
            if command in {"report", "gate"}:
                shutil.copytree(self.run, folder / "stored")
            if "setpriv" in row.prefix:
                subprocess.run(["chmod", "-R", "a+rwX", str(folder)], check=True)
            before = set(here.iterdir()) if folder in here.parents else set()
            done = self._start(row, command, folder, here)
            yield self._judged(row, command, folder, here, before, done)

    def _start(self, row: Row, command: Command, folder: Path, here: Path) -> subprocess.CompletedProcess[str]:
        places = {"folder": str(folder), "other": str(self.other), "tree": str(TREE)}
        mine = {"PYTHONPATH": str(TREE), "KVBENCH_CACHE": str(self.cache), "HOME": str(folder / "home")}
        variables = os.environ | mine | {"TMPDIR": str(folder / "tmp")}
        for name, value in row.variables.items():
            variables.pop(name, None)
            if value is not None:
                variables[name] = value.format(**places)
        script = f'{row.setup.format(**places)}\n"$@" {row.redirect}\nexit ${{PIPESTATUS[0]}}'
        program = [*row.prefix, sys.executable, "-P", "-c", START, *self.arguments(command, folder)]
        try:
            return subprocess.run(
                ["bash", "-c", script, "bash", *program],
                cwd=here,
                env=variables,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=False,
                timeout=LONGEST_S,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(program, 124, "", f"no end within {LONGEST_S:.0f} s")

    def _judged(
        self,
        row: Row,
        command: Command,
        folder: Path,
        here: Path,
        before: set[Path],
        done: subprocess.CompletedProcess[str],
    ) -> Outcome:
        """What is wrong with it; the checks are in the order in which they explain each other."""
        refused = row.refused.get(command)
        lines = [line for line in done.stderr.splitlines() if line.startswith("kvbench: ")]
        faults = []
        if bad := BAD.search(done.stdout + done.stderr):
            faults.append(f"said {bad[0]!r}")
        if done.returncode not in ((refused.code,) if refused else DONE[command]):
            faults.append(f"exit {done.returncode}: {(done.stderr.strip().splitlines() or ['no line'])[-1]}")
        elif refused:
            if sum(refused.says in line for line in lines) != 1:
                faults.append(f"no one line names {refused.says!r}")
        else:
            faults += self._wrong(row, command, folder, done.stdout)
        left = set(here.iterdir()) - before if before or folder in here.parents else set()
        left |= set((folder / "tmp").glob("kvbench*"))
        if left := {path for path in left if path.name != "__pycache__"}:
            faults.append(f"left {', '.join(sorted(path.name for path in left))}")
        said = lines[-1] if refused and lines else ""
        return Outcome(row.name, command, done.returncode, *map(self._anywhere, ("; ".join(faults), said)))

    def _anywhere(self, text: str) -> str:
        """Leave the paths of this machine out."""
        return re.sub(rf"{re.escape(str(self.scratch))}(/[\w-]+){{0,2}}", "FOLDER", text).replace(str(TREE), "TREE")

    def _wrong(self, row: Row, command: Command, folder: Path, stdout: str) -> list[str]:
        """What is wrong with the result of a command that says all is well."""
        faults = []
        if command == "run":
            try:
                (path,) = (folder / "runs").glob("[!.]*")
                run = read_run(path)
            except (OSError, ValueError, DataError) as error:
                return [f"no run that can be read: {error}"]
            kept = sorted(sample.case.split()[1] for sample in run.samples if not sample.warmup)
            if kept != sorted(STRATEGIES):
                faults.append(f"samples of {kept} are stored")
            cores = row.cores or usable_cores()
            if run.manifest.environment.cores != cores:
                faults.append(f"{run.manifest.environment.cores} cores are stored, there are {cores}")
            faults += [f"no {name}" for name in ("summary.csv", "plots") if not (path / name).exists()]
        if command in {"run", "report"} and not row.silent:
            faults += [f"no row of {name}" for name in STRATEGIES if not re.search(rf"\| {name} ", stdout)]
        if command == "ab" and not row.silent:
            clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
            answer = subprocess.run(
                ["git", "-C", str(self.mine), "rev-parse", "HEAD~1"],
                env=clean,
                capture_output=True,
                text=True,
                check=True,
            )
            if answer.stdout[:12] not in stdout:
                faults.append("base is no commit of the repository of the current folder")
        return faults


def table(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row per environment and command."""
    return pd.DataFrame(outcomes).assign(exit_code=lambda frame: frame["exit_code"].astype("Int64"))


def markdown(outcomes: Sequence[Outcome], here: Environment) -> str:
    """A row per environment, a column per command: its exit code, with what is wrong, and the line of a refusal."""
    names = list(dict.fromkeys(outcome.environment for outcome in outcomes))
    wide = pd.DataFrame("", index=pd.Index(names, name="environment"), columns=[*DONE, "not tried"])
    for outcome in outcomes:
        if outcome.exit_code is None:
            wide.loc[outcome.environment, "not tried"] = outcome.said
        else:
            code = str(outcome.exit_code)
            wide.loc[outcome.environment, outcome.command] = f"**{code}: {outcome.fault}**" if outcome.fault else code
    refusals = [
        f"- {each.environment}, {each.command}: `{each.said}`" for each in outcomes if each.said and each.exit_code
    ]
    faults = sum(bool(outcome.fault) for outcome in outcomes)
    title = f"# {len(names)} of {len(ROWS)} environments\n\n`nox -s study -- environments`: exit codes by command; "
    verdict = f"**{faults} are not as they should be.**" if faults else "all are as they should be."
    versions = f"kvbench {here.kvbench}, Python {here.python}, torch {here.torch}, transformers {here.transformers}"
    machine = f"{here.cores} cores of {here.cpu_model}, {here.os}"
    lines = [f"{title}{verdict}", f"{versions}; {machine}.\n", wide.to_markdown(), "\nRefusals:\n", *refusals, ""]
    return "\n".join(lines)


def write(outcomes: Sequence[Outcome]) -> None:
    """Write the table; rows of environments that were not tried now stay as they are."""
    path = RESULTS / "environments.csv"
    tried = {outcome.environment for outcome in outcomes}
    stored = pd.read_csv(path, keep_default_na=False).to_dict("records") if path.exists() else []
    kept = [
        Outcome(**row | {"exit_code": int(row["exit_code"]) if row["exit_code"] != "" else None})  # type: ignore[arg-type]
        for row in stored
        if row["environment"] not in tried
    ]
    order = [row.name for row in ROWS]
    known = [outcome for outcome in [*kept, *outcomes] if outcome.environment in order]
    known.sort(key=lambda outcome: order.index(outcome.environment))
    table(known).to_csv(path, index=False, lineterminator="\n")
    (RESULTS / "environments.md").write_text(markdown(known, read_environment()), encoding="utf-8")


def main() -> None:
    """Try all environments, or those of --only, and write the table."""
    parser = argparse.ArgumentParser(prog="nox -s study -- environments", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="Try this one again (repeatable; *, ?).")
    parser.add_argument("--jobs", type=int, default=2, help="Environments at a time.")
    parser.add_argument("--list", action="store_true", help="List the environments.")
    asked = parser.parse_args()
    rows = [row for row in ROWS if any(fnmatch.fnmatch(row.name, name) for name in asked.only or ["*"])]
    if not rows:
        parser.error(f"--only {' '.join(asked.only)}: valid: {', '.join(row.name for row in ROWS)}")
    if asked.list:
        print("\n".join(row.name for row in rows))
        return
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(asked.jobs) as pool:
        bench = Bench(Path(scratch).resolve())
        for found in pool.map(lambda row: list(bench.tried(row)), rows):
            outcomes += found
            for outcome in found:
                verdict = outcome.fault or ("as it should be" if outcome.exit_code is not None else outcome.said)
                print(f"{outcome.environment} {outcome.command} {outcome.exit_code}: {verdict}", flush=True)
            write(outcomes)  # an interruption keeps what was tried
    if any(outcome.fault for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
