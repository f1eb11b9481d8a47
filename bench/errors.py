"""What a command refuses: each error is one clear line for the user and bears the exit code of the contract."""

from typing import ClassVar


class KvbenchError(Exception):
    """An error that a user can cause or act on; the message is one line that names what is wrong and what is valid."""

    exit_code: ClassVar[int]


class UsageError(KvbenchError):
    """What the user asked for cannot be run: refused before anything ran."""

    exit_code = 2


class DataError(KvbenchError):
    """Stored data is missing, damaged, of a newer schema, or not comparable."""

    exit_code = 3


class FailedRun(KvbenchError):
    """The run itself failed: a case of it crashed or emitted other tokens, so it cannot be used for this."""

    exit_code = 5


def blaming(flag: str, value: str, reason: object) -> str:
    """Write what is wrong with the value of a flag; many reasons name the value, which is then not repeated."""
    return f"{flag} {value}: {str(reason).removeprefix(value).lstrip(': ')}"
