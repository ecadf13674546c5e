"""The errors a user can act on. Each names what is wrong, where, and what to do."""

from schemas.untrusted_text import visible


class NPDError(Exception):
    """Base of every error this project raises on purpose.

    ``exit_code`` is what the command line returns: 2 for input the user can correct, 1 for a stage that failed.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        # It goes to terminals and logs, and may quote names and texts from outside.
        super().__init__(visible(message))


class ConfigError(NPDError):
    """A config file, key or value is wrong."""

    exit_code = 2


class PromptError(NPDError):
    """A prompt source is missing, empty, or has a row that cannot be used."""

    exit_code = 2


class ModelError(NPDError):
    """A teacher or student cannot be used: not found, no chat template, context too short, wrong shape."""

    exit_code = 2


class TokenizerMismatchError(ModelError):
    """Teacher and student do not share one tokenizer, so the teacher cannot score the student's tokens."""


class ArtifactError(NPDError):
    """A table, manifest or folder of a run is missing, damaged or not what its schema says."""


class RunNotFoundError(ArtifactError):
    """There is no run where one was named."""

    exit_code = 2


class RunLockedError(NPDError):
    """Another process works on the run; names it."""

    exit_code = 2


class StorageError(NPDError):
    """Files cannot be written or read: disk full, folder read-only, object store out of reach."""


class OrchestrationError(NPDError):
    """Prefect's server cannot be reached."""


class StageError(NPDError):
    """A stage could not finish: non-finite numbers, nothing left to train on, or its process died."""


class DivergedError(StageError):
    """A loss or gradient is not finite: the learning rate is too high, or the precision too low."""


def error_by_name(name: str) -> type[NPDError]:
    """Return the error class called ``name``, to raise again what a stage's process reported; StageError if unknown."""
    classes: list[type[NPDError]] = [NPDError]
    while classes:
        cls = classes.pop()
        if cls.__name__ == name:
            return cls
        classes.extend(cls.__subclasses__())
    return StageError
