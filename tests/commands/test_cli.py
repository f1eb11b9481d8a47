"""The command itself: its help, its errors, its completion."""

import signal
from importlib.metadata import version
from pathlib import Path

import msgspec
import pytest

from bench import cli
from bench.cli import app, baseline
from bench.commands import flags
from bench.machine import environment
from tests.commandline import in_a_process, kvbench, refused


def test_help_teaches_and_is_quick_to_say() -> None:
    done = in_a_process("--help", blocked=True)
    for command in ("run", "report", "compare", "generate", "env"):
        assert command in done.stdout
    told = " ".join(in_a_process("run", "--help", blocked=True).stdout.split())
    assert "--n-prompt" in told
    assert " ".join(flags.below_the_flags().replace("\b", "").split()) in told


def test_version_is_said_without_torch() -> None:
    assert in_a_process("--version", blocked=True).stdout == f"kvbench {version('kvbench')}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rum"], "see kvbench --help"),
        (["--verbose"], "see kvbench --help"),
        (["run", "--stratgies", "naive"], "see kvbench run --help"),
        (["report"], "see kvbench report --help"),
        (["generate", "--prompt", "x", "-t", "1,2"], "see kvbench generate --help"),
    ],
)
def test_what_cannot_be_parsed_points_to_the_help(arguments: list[str], says: str) -> None:
    assert refused(*arguments).strip().endswith(says)


def test_an_error_of_the_command_itself_is_one_line_too() -> None:
    done = in_a_process("run", "-p", "0", code=2)
    assert done.stderr.startswith("kvbench: --n-prompt 0")
    assert len(done.stderr.strip().splitlines()) == 1


COMMANDS = [
    *([command.name or command.callback.__name__] for command in app.registered_commands),
    *(["baseline", command.callback.__name__] for command in baseline.registered_commands),
]


@pytest.mark.parametrize("command", [[], ["baseline"], *COMMANDS], ids=" ".join)
def test_no_help_is_cut_at_80_columns(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = kvbench(*command, "--help").stdout
    assert "..." not in page.replace("[ARGS]...", "").replace("{FOLDER}...", "").replace("[FOLDER]...", "")
    assert not [line for line in page.splitlines() if " Of " in line]
    assert max(map(len, page.splitlines())) <= 90  # an example is not filled


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_teaches_by_an_example(command: list[str]) -> None:
    page = kvbench(*command, "--help").stdout
    assert f"  kvbench {' '.join(command)}" in page.partition("Example")[2]


@pytest.mark.parametrize(
    ("words", "completes"),
    [
        ("kvbench generate --strategy nai", "naive"),
        ("kvbench ga", "gate"),
        ("kvbench run --preset sm", "smoke"),
        ("kvbench run --bud", "--budget"),
    ],
)
def test_the_shell_completes_commands_flags_and_words(
    words: str, completes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_KVBENCH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert kvbench().stdout.split() == [completes]


def test_completion_is_shown_for_the_shell_and_an_unknown_shell_is_no_regression(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")
    assert "_KVBENCH_COMPLETE=complete_bash" in kvbench("--show-completion").stdout
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: None)
    kvbench("--show-completion", code=2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_second_signal_does_not_disturb_the_end(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {each: signal.signal(each, cli._stopped) for each in cli.SIGNALS}
    monkeypatch.setattr(cli, "app", lambda *_, **__: signal.raise_signal(number))
    monkeypatch.setattr(cli, "_end_children", lambda: [signal.raise_signal(each) for each in before])
    try:
        assert cli._run(["env"], lambda: None) == code
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert capsys.readouterr().err in ("kvbench: interrupted\n", "kvbench: terminated\n")


def test_nohup_keeps_its_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {each: signal.getsignal(each) for each in cli.SIGNALS}
    monkeypatch.setattr(cli, "_run", lambda *_: signal.getsignal(signal.SIGHUP) == cli._stopped)
    try:
        for handler, ends in ((signal.SIG_IGN, 0), (signal.SIG_DFL, 1)):
            signal.signal(signal.SIGHUP, handler)
            with pytest.raises(SystemExit) as ended:
                cli.main([])
            assert ended.value.code == ends
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_a_current_folder_that_was_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert environment.git_commit() is None
    assert refused("ab", "main") == "kvbench: the current folder was removed: go to another\n"
    monkeypatch.setenv("TMPDIR", "relative")
    assert refused("report", "x") == "kvbench: the current folder was removed: go to another\n"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert "no run folder" in refused("report", "x", code=3)
    monkeypatch.setattr(cli, "app", lambda *_, **__: Path("src").resolve())  # as transformers does when it is imported
    assert refused("run") == "kvbench: the current folder was removed: go to another\n"


def test_an_argument_too_long_for_a_file_is_refused() -> None:
    assert "File name too long" in refused("report", "x" * 5000)


def test_bytes_that_are_no_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", lambda *_, **__: msgspec.json.encode("bad\udcff"))
    assert refused("run", "bad\udcff") == (
        "kvbench: 'bad\\udcff': is no valid text in this locale, choose another name\n"
    )
    monkeypatch.setenv("TMPDIR", "/bad\udcff")
    assert refused("run").startswith("kvbench: TMPDIR: '/bad\\udcff' is no valid text")
