"""Stage evaluate: how far the student is from the teacher on prompts it never trained on."""

from tasks.stage import StageJob


def run(job: StageJob) -> None:
    """Compare student and teacher on the teacher's held-out responses and write the metrics table."""
    from tasks.evaluate.stage import evaluate_student

    evaluate_student(job)
