"""Stages evaluate and baseline: how good models are on prompts that never reach training, and how near the teacher."""

from tasks.stage import StageJob


def run(job: StageJob) -> None:
    """Write the metrics table, and the table of the models' own responses unless `evaluate.generate` is off.

    Stage evaluate looks at the student that its round ends with; stage baseline at the teacher and at the student that
    the run starts from, once.
    """
    from tasks.evaluate.stage import evaluate

    evaluate(job)
