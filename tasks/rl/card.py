"""The card of a model that RL ends with."""

from dataclasses import dataclass
from typing import Any

from schemas.config import RLConfig
from schemas.untrusted_text import code_markdown, escape_markdown
from tasks.language_model.model_card import model_card

_METRICS = {
    "step": "optimizer steps",
    "score": "verifier's score, mean of the step's responses",
    "reward": "reward, mean of the step's responses",
    "response_tokens": "response length (tokens)",
    "entropy": "entropy (nats per token)",
    "kl": "KL to the start model (nats per token)",
}
"""Columns of the metrics that the card shows, with their titles."""


@dataclass(frozen=True)
class RLLineage:
    """What the weights were made from.

    Args:
        start: The start model in words.
        start_fingerprint: What stands for its content.
        version: Hash of the exported weights.
        prompts: Fingerprint of the prompts table.
    """

    start: str
    start_fingerprint: str
    version: str
    prompts: str


def rl_card(config: RLConfig, lineage: RLLineage, metrics: dict[str, Any]) -> str:
    """Return the card in Markdown. Nothing from outside is in its front matter, or unescaped below it.

    Args:
        config: The run's config.
        lineage: What the weights were made from.
        metrics: The last row of table RL_METRICS.
    """
    grpo = config.grpo
    rows = [
        ("start", code_markdown(lineage.start)),
        ("start (fingerprint)", f"`{lineage.start_fingerprint}`"),
        ("version of these weights", f"`{lineage.version}`"),
        ("prompts (fingerprint)", f"`{lineage.prompts}`"),
        ("responses of a step", f"{grpo.prompts_per_step} prompts x {grpo.num_generations}"),
        ("learning rate", f"{grpo.learning_rate:g}, {grpo.lr_scheduler_type}"),
    ]
    return model_card(
        escape_markdown(config.name),
        "Trained by GRPO (arXiv 2402.03300) on verified rewards, with TRL's `GRPOTrainer`.",
        tags=("near-policy-distillation", "grpo", "reinforcement-learning"),
        lineage=rows,
        last_step=[(title, metrics[name]) for name, title in _METRICS.items()],
    )
