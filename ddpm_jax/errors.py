"""The ways in which a run ends that are not a defect of the program, and others' errors in one line."""


class InputError(ValueError):
    """Something the user gave can't be used; the message is one line that names it and says what to do. Exit status 2."""


class NonFiniteLossError(RuntimeError):
    """Training diverged; the message names the step and the last good checkpoint. Exit status 1."""


class StorageHangError(RuntimeError):
    """Reading or writing has not ended in time; the message names what. Exit status 2, by `endings.end_now`."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its kind where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def joined_lines(error: BaseException) -> str:
    """An error's message with its lines as one, or the name of its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
