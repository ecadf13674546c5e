"""Stages evaluate and baseline: how good models are on prompts that never reach training, and how near the teacher."""

import os
from pathlib import Path

from schemas.config import RunConfig
from schemas.errors import ConfigError
from schemas.manifest import hash_file, hash_json
from tasks.stage import StageJob


def run(job: StageJob) -> None:
    """Write the metrics table, and the table of the models' own responses unless `evaluate.generate` is off.

    Stage evaluate looks at the student that its round ends with; stage baseline at the teacher and at the student that
    the run starts from, once.
    """
    from tasks.evaluate.stage import evaluate

    evaluate(job)


def source_fingerprints(config: RunConfig) -> dict[str, str]:
    """Return what stands for the content of the folder with `lm-eval` tasks of one's own.

    Raises:
        ConfigError: the folder is not there, or something in it cannot be read.
    """
    settings = config.evaluate.lm_eval
    if settings is None or settings.include_path is None:
        return {}
    folder = Path(settings.include_path)
    try:
        files = [[path.relative_to(folder).as_posix(), hash_file(path)] for path in _files(folder)]
    except OSError as error:
        raise ConfigError(
            f"evaluate.lm_eval.include_path: {folder}: cannot be read: {error}; name a folder that this user can read, "
            "or set it to null"
        ) from None
    return {"lm_eval.include_path": hash_json(files)}


def _files(folder: Path) -> list[Path]:
    """Return the files below ``folder``; not by a glob, which passes over folders that cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    found = [Path(parent) / name for parent, _, names in os.walk(folder, onerror=fail) for name in names]
    return sorted(path for path in found if path.is_file() and path.suffix != ".pyc")
