"""The exported model's card: what it is, where it comes from, and how to check that."""

from dataclasses import dataclass
from typing import Any

from schemas.config import RunConfig, StudentConfig, TeacherConfig
from schemas.stage_key import WARMUP, StageKey
from schemas.untrusted_text import code_markdown, escape_markdown
from tasks.language_model.model_card import model_card

_METRICS = {
    "step": "optimizer steps",
    "epoch": "epochs",
    "loss": "loss",
    "ce": "cross-entropy (nats per token)",
    "kd": "KL from the teacher's top k (nats per token)",
    "policy_kl": "KL from the sampling policy (nats per token)",
}
"""Columns of the training metrics that the card shows, with their titles."""


@dataclass(frozen=True)
class Lineage:
    """What a set of exported weights was made from.

    Args:
        run_id: Of the run.
        config_hash: Of the resolved config.
        version: Hash of the exported weights, as the tables' `policy_version` names them.
        teacher_version: Hash of the teacher's weights.
        sampled_by: Hash of the policy that sampled what they learned from; None in warm-up and on-policy training.
        prompts: Fingerprint of the prompts table.
        packs: Fingerprint of the packs; None in on-policy training.
        training: Fingerprint of the training stage's inputs and settings.
        metrics: The last row of the training metrics; empty if it took no step.
    """

    run_id: str
    config_hash: str
    version: str
    teacher_version: str
    sampled_by: str | None
    prompts: str
    packs: str | None
    training: str
    metrics: dict[str, Any]


def student_card(config: RunConfig, key: StageKey, lineage: Lineage) -> str:
    """Return the card in Markdown. Nothing from outside is in its front matter, or unescaped below it.

    Args:
        config: The run's config.
        key: The export stage.
        lineage: What the weights were made from.
    """
    source = config.teacher if config.student.model is None else config.student
    pruned = "" if config.student.init == "pretrained" else "layers of "
    student = pruned + _name(source)
    names = [*_METRICS] if key.round != WARMUP else ["step", "epoch", "loss", "ce"]
    nobody = "nobody: warm-up" if key.round == WARMUP else "itself: on-policy"
    rows = [
        ("teacher", f"{_name(config.teacher)}{_revision(config.teacher.revision)}"),
        ("teacher's weights", f"`{lineage.teacher_version}`"),
        ("student", f"{student}{_revision(source.revision)}"),
        ("run id", f"`{lineage.run_id}`"),
        ("config hash", f"`{lineage.config_hash}`"),
        ("policy version of these weights", f"`{lineage.version}`"),
        ("sampled by policy version", nobody if lineage.sampled_by is None else f"`{lineage.sampled_by}`"),
        ("prompts (fingerprint)", f"`{lineage.prompts}`"),
        ("packs (fingerprint)", "none" if lineage.packs is None else f"`{lineage.packs}`"),
        ("training (fingerprint)", f"`{lineage.training}`"),
    ]
    return model_card(
        f"{escape_markdown(config.name)}, {key.label.split(' · ')[0]}",
        "A student distilled by Near-Policy Distillation (arXiv 2605.05940).",
        tags=("near-policy-distillation", "distillation"),
        lineage=rows,
        last_step=[(_METRICS[name], lineage.metrics.get(name)) for name in names],
        notes=[
            "`npd verify RUN` on the run's folder re-hashes every file from the prompts to these weights, and follows "
            "every sample through them."
        ],
    )


def _name(source: TeacherConfig | StudentConfig) -> str:
    """Return a model's name; of a local folder its own, since where it lies is nobody's business but this machine's."""
    return code_markdown(source.identified()["model"] or "")


def _revision(revision: str | None) -> str:
    return "" if revision is None else f", revision {code_markdown(revision)}"
