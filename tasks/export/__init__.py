"""Stage export: the student as a plain Hugging Face model directory."""

from tasks.stage import StageJob


def run(job: StageJob) -> None:
    """Write the trained student: what the next round samples from, what users deploy, what RL continues from."""
    from tasks.export.stage import export_student

    export_student(job)
