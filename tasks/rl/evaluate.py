"""Stage evaluate of an RL run: the model it ends with answers the held-out prompts."""

from schemas.config import RLConfig
from tasks.rl.graph import RL
from tasks.stage import StageJob


def run(job: StageJob[RLConfig]) -> None:
    """Write `metrics.parquet` and `responses.parquet` of the trained model.

    Raises:
        PromptError: no held-out prompt has an answer to check, or leaves room for a response.
    """
    from tasks.rl.held_out import evaluate_model

    evaluate_model(job, job.store.fetch(job.store.path(RL, "model")), "rl")
