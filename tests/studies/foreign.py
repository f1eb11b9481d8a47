"""Measures the KV caches that others publish as drop-in, each through `cache:module:factory` (10 min, pip's downloads).

Each is measured, or refused with the true reason; a round whose tokens differ from those that were checked fails.
Packages are pinned in foreign_caches.py and installed into folders of their own: the environment stays as it is.
Writes results/examples/foreign.csv and .md.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.tell.layout import markdown_table
from bench.tell.words import NOTHING, missing, number
from tests.studies.foreign_caches import FOLDERS, PACKAGES, Package

TREE = Path(__file__).resolve().parents[2]
RESULTS = TREE / "results" / "examples"
INSTALLED = TREE / ".nox" / "foreign" / platform.python_version()
GRID = ["-m", "smollm2-135m", "-p", "128", "-n", "16", "-d", "0,384"]
QUICK = ["-m", "random:tiny", "-p", "24", "-n", "6", "-d", "0,12"]
BESIDE = 4
"""Caches in a run: each has a process with the model."""
A_CASE_FAILED = 5
MODULE = "cache:foreign_caches:"
TIMES = ["step_vs_dynamic", "prefill_vs_dynamic"]
COLUMNS = {
    "n_depth": "n_depth",
    "n_prompt": "n_prompt",
    "status": "status",
    "samples": "equal_rounds",
    "kv_bytes_allocated": "bytes",
    "kv_bytes_vs_exact": "bytes_vs_dynamic",
    "logit_kl": "logit_kl",
    "logit_kl_floor": "logit_kl_floor",
    "top1_agreement": "top1_agreement",
    "recall_agreement": "recall_agreement",
    "matching_tokens": "matching_tokens",
    "error": "error",
}
"""Columns of the summary, and their names in the table; those of times come beside them."""


def install(name: str, package: Package) -> str:
    """Install a package into its folder, unless it is there; return pip's reason where that fails."""
    folder = INSTALLED / name
    if folder.exists():
        return ""
    part = folder.with_name(f"{name}.part")
    shutil.rmtree(part, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target"]
    done = subprocess.run([*pip, str(part), *package.pins], capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
    part.rename(folder)
    return ""


def measure(names: Sequence[str], arguments: list[str], scratch: Path) -> pd.DataFrame:
    """Run the caches, BESIDE at a time, each time with `dynamic`; return the summaries, `dynamic` of the first only."""
    runs = [names[first : first + BESIDE] for first in range(0, len(names), BESIDE)]
    frames = [run(some, arguments, scratch / str(place)) for place, some in enumerate(runs)]
    own = [frame[frame["strategy"] != "dynamic"] for frame in frames[1:]]
    return pd.concat([*frames[:1], *own], ignore_index=True)


def run(names: Sequence[str], arguments: list[str], out: Path) -> pd.DataFrame:
    """Run some caches and `dynamic` beside each other; return the summary."""
    strategies = ",".join(["dynamic", *(MODULE + name for name in names)])
    command = [sys.executable, "-P", "-m", "bench.cli", "run", *arguments, "--strategies", strategies]
    done = subprocess.run(
        [*command, "--no-ceilings", "--out", str(out), "--name", "foreign", "-o", "csv"],
        cwd=Path(__file__).parent,  # where the factories are
        env=os.environ | {"PYTHONPATH": str(TREE), FOLDERS: str(INSTALLED)},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode not in {0, A_CASE_FAILED}:
        raise SystemExit(done.returncode)
    (folder,) = out.glob("[!.]*")
    return pd.read_csv(folder / "summary.csv")


def table(summary: pd.DataFrame, *, times: bool) -> pd.DataFrame:
    """Make a row for each package and depth: bytes at the end of decode, quality, and the reason where it failed."""
    cases = ["strategy", "n_depth"]
    rows = summary.drop_duplicates(cases, keep="last").set_index(cases)  # decode, which is the later phase
    prefill = summary.drop_duplicates(cases).set_index(cases)
    found = rows.reset_index()[["strategy", *COLUMNS]].rename(columns=COLUMNS)
    if times:
        found[TIMES[0]] = rows["latency_vs_exact"].to_numpy()
        found[TIMES[1]] = prefill["latency_vs_exact"].to_numpy()
    found["error"] = found["error"].str.replace(f"{INSTALLED}{os.sep}", "").str.replace(f"{TREE}{os.sep}", "")
    names = found["strategy"].str.removeprefix(MODULE)
    found.insert(0, "package", [PACKAGES[name].title if name in PACKAGES else "transformers' own" for name in names])
    found.insert(1, "settings", [PACKAGES[name].settings if name in PACKAGES else "-" for name in names])
    return found.assign(strategy=names)


def with_missing(found: pd.DataFrame, reasons: Mapping[str, str]) -> pd.DataFrame:
    """Add a row for each package that pip does not install, by the name of its factory, with pip's reason."""
    rows = [
        {
            "package": PACKAGES[name].title,
            "settings": PACKAGES[name].settings,
            "strategy": name,
            "status": "not installed",
            "error": reason,
        }
        for name, reason in reasons.items()
    ]
    whole = {"n_depth": "Int64", "n_prompt": "Int64"}
    return pd.concat([found, pd.DataFrame(rows, columns=found.columns)], ignore_index=True).astype(whole)


def markdown(found: pd.DataFrame, arguments: list[str]) -> str:
    """Write the rows as a page: what ran, and what did not with its reason."""
    has_times = TIMES[0] in found
    headers = ["package", "settings", "depth", "bytes / dynamic", "KL, nats", "floor", "same top 1", "recall", "equal"]
    headers += ["step / dynamic", "prefill / dynamic"] if has_times else []
    ran = found[found["status"] == "ok"].to_dict("records")
    lines = []
    for row in ran:
        small = [NOTHING if missing(row[name]) else f"{row[name]:.0e}" for name in ("logit_kl", "logit_kl_floor")]
        shares = [number(row[name]) for name in ("top1_agreement", "recall_agreement")]
        line = [row["package"], row["settings"], str(row["n_depth"]), number(row["bytes_vs_dynamic"]), *small, *shares]
        line.append(NOTHING if missing(row["matching_tokens"]) else f"{row['matching_tokens']:.0f}")
        lines.append(line + [number(row[name]) for name in TIMES if has_times])
    command = f"kvbench run {' '.join(arguments)}"
    align = ["left", "left", *["right"] * (len(headers) - 2)]
    reasons = dict.fromkeys(
        f"- {row['package']}{_depth(row['n_depth'])}: {row['status']}: `{row['error']}`"
        for row in found[found["status"] != "ok"].to_dict("records")
    )
    timed = "" if has_times else " Times are left out: other work ran on this machine."
    return "\n".join(
        [
            "# Caches that others publish\n",
            f"`nox -s study -- foreign`: `{command}`, {BESIDE} caches at a time beside `dynamic`.\n",
            "Each package has the settings that its own documentation recommends.\n",
            f"Bytes are those held after the last token; the rounds of a case emitted equal tokens.{timed}\n",
            markdown_table(lines, headers, align),
            "\nNot measured, with the reason that the run stored:\n",
            *(reasons or ["- none"]),
            "",
        ]
    )


def _depth(n_depth: Any) -> str:
    return "" if missing(n_depth) else f", depth {n_depth}"


def main() -> None:
    """Install and measure all packages, or those of --only, and write the table."""
    parser = argparse.ArgumentParser(prog="nox -s study -- foreign", description=__doc__)
    parser.add_argument("--only", action="append", choices=PACKAGES, help="This cache only (repeatable).")
    parser.add_argument("--quick", action="store_true", help="On random:tiny, to see what runs; writes no table.")
    parser.add_argument("--no-times", action="store_true", help="Leave times out: this machine is not quiet.")
    parser.add_argument("--repetitions", type=int, default=6, help="Rounds.")
    asked = parser.parse_args()
    names = asked.only or list(PACKAGES)
    lacking = {name: reason for name in names if (reason := install(name, PACKAGES[name]))}
    installed = [name for name in names if name not in lacking]
    if not installed:
        raise SystemExit(f"nothing can be installed: {lacking}")
    arguments = [*(QUICK if asked.quick else GRID), "-r", str(asked.repetitions)]
    with tempfile.TemporaryDirectory() as scratch:
        summary = measure(installed, arguments, Path(scratch))
    found = with_missing(table(summary, times=not asked.no_times), lacking)
    page = markdown(found, arguments)
    print(page)
    if not asked.quick and asked.only is None:
        found.to_csv(RESULTS / "foreign.csv", index=False, lineterminator="\n")
        (RESULTS / "foreign.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
