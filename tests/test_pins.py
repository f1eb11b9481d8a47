"""Versions that stand in several files are the same in all of them, and nothing in CI follows a moving name."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_pre_commit_has_the_pinned_ruff():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["rev"] == f"v{PINS['ruff']}"


def test_a_citation_names_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit_and_nox_by_version(workflow):
    text = workflow.read_text()
    jobs = yaml.safe_load(text)["jobs"].values()
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for job in jobs for step in job["steps"] if "uses" in step)
    assert all("timeout-minutes" in job for job in jobs)
    assert set(re.findall(r"nox==(\S+)", text)) <= {PINS["nox"]}


def test_every_range_admits_its_pin():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    pins = {name.lower().replace("_", "-"): version for name, version in PINS.items()}
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
