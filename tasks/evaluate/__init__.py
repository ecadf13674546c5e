"""Stages evaluate and baseline: how good models are on prompts that never reach training, and how near the teacher."""

from pathlib import Path

from schemas.config import RunConfig
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
    """Return what stands for the content of the folder with `lm-eval` tasks of one's own."""
    settings = config.evaluate.lm_eval
    if settings is None or settings.include_path is None:
        return {}
    folder = Path(settings.include_path)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {
        "lm_eval.include_path": hash_json([[path.relative_to(folder).as_posix(), hash_file(path)] for path in files])
    }
