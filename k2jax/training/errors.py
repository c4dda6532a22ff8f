"""Errors that a person can act on. Their messages name the thing and the fix; no traceback is needed."""


class RunError(Exception):
    """A run cannot start or go on."""


class SetupError(RunError):
    """The data, the devices or the config cannot do what was asked; nothing has been started."""


class WorkdirError(RunError):
    """The work folder holds something that this run must not overwrite."""


class CheckpointError(RunError):
    """A checkpoint could not be written or read."""


class NonFiniteError(RunError):
    """Too many steps in a row gave a loss or gradient that is not finite."""


class Interrupted(RunError):
    """The process was asked to stop by a signal; its state is saved."""

    def __init__(self, message, number: int):
        super().__init__(message)
        self.number = number  # of the signal; the exit status is 128 more
