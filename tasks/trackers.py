"""Trackers that training reports to (`report_to`): whether they are there, what they call it, where they write."""

from collections.abc import Sequence
from typing import Any

from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from schemas.errors import ConfigError
from schemas.untrusted_text import readable
from tasks.stage import StageJob


def check_trackers(names: Sequence[str], key: str) -> None:
    """Check that a trainer can report to trackers.

    Args:
        names: As in the config.
        key: The setting they come from, for errors.

    Raises:
        ConfigError: `transformers` knows no such tracker, or its package is not installed.
    """
    for name in names:
        if name in ("all", "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ConfigError(f"{key}: `transformers` knows no tracker `{readable(name, 40)}`; it knows {known}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise ConfigError(f"{key}: `{name}` cannot be used: {readable(str(error))}") from None


def tracked_name(job: StageJob[Any]) -> str:
    """Return what trackers call the training of a stage, after its run and round: `mine-round-0-train`."""
    return f"{job.config.name}-{job.store.log(job.key).stem}"


def keep_tensorboard(trainer: Trainer, job: StageJob[Any]) -> None:
    """Let TensorBoard write beside the stage's log, unless the environment says where (`TENSORBOARD_LOGGING_DIR`).

    By itself it writes into the trainer's folder, of which nothing is kept.
    """
    log = job.store.log(job.key)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(log.parent / "tensorboard" / log.stem)
