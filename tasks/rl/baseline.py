"""Stage baseline of an RL run: the start model answers the held-out prompts."""

from schemas.config import RLConfig
from tasks.rl.start import start_fingerprint, start_folder
from tasks.stage import StageJob


def run(job: StageJob[RLConfig]) -> None:
    """Write `metrics.parquet` and `responses.parquet` of the start model.

    Raises:
        PromptError: no held-out prompt has an answer to check, or leaves room for a response.
    """
    from tasks.rl.held_out import evaluate_model

    evaluate_model(job, start_folder(job.config), "start")


def source_fingerprints(config: RLConfig) -> dict[str, str]:
    """Return what stands for the start model; see ``start_fingerprint``."""
    return {"start": start_fingerprint(config)}
