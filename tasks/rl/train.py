"""Stage rl: GRPO from the start model, and the model it ends with."""

from schemas.config import RLConfig
from tasks.rl.start import start_fingerprint
from tasks.stage import StageJob


def run(job: StageJob[RLConfig]) -> None:
    """Train, and write `metrics.parquet`, `rollouts/`, `model/` and the last checkpoint.

    Raises:
        PromptError: no train prompt has an answer to check, or leaves room for a response.
        DivergedError: a loss or gradient is not finite.
    """
    from tasks.rl.grpo import train_model

    train_model(job)


def source_fingerprints(config: RLConfig) -> dict[str, str]:
    """Return what stands for the start model; see ``start_fingerprint``."""
    return {"start": start_fingerprint(config)}
