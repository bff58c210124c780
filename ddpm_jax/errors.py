"""The two ways in which a run ends that are not a defect of the program."""


class InputError(ValueError):
    """Something the user gave can't be used; the message is one line that names it and says what to do. Exit status 2."""


class NonFiniteLossError(RuntimeError):
    """Training diverged; the message names the step and the last good checkpoint. Exit status 1."""
