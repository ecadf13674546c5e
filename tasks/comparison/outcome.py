"""What one run of a method came to, read from its tables and manifests."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.config import ComparisonConfig, RunConfig
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import (
    EVALUATE_METRICS,
    EVALUATE_RESPONSES,
    GENERATE,
    METRICS_FILE,
    RESPONSES_FILE,
    TRAIN_METRICS,
)
from tasks.evaluate.means import right_shares
from tasks.graph import loop
from tasks.rl.graph import BASELINE, RL_LOOP

Float64 = NDArray[np.float64]

COUNTED = ("generate", "score", "filter", "pack", "train", "export")
"""Stages whose seconds are a method's wall-clock: all that lies between the warmed-up student and the exported one,
loading models included. Prompts, models, references and evaluation are the same for all methods and left out."""


@dataclass(frozen=True)
class Scores:
    """How right a model's responses to the held-out prompts are.

    Args:
        prompt_ids: Prompts that can be checked, sorted.
        values: float64 [prompts]; share of each prompt's responses that are right (score 1).
    """

    prompt_ids: tuple[str, ...]
    values: Float64

    def of(self, prompt_ids: frozenset[str]) -> "Scores":
        """Return the scores of some of the prompts."""
        wanted = [index for index, name in enumerate(self.prompt_ids) if name in prompt_ids]
        return Scores(tuple(self.prompt_ids[index] for index in wanted), self.values[wanted])

    @property
    def accuracy(self) -> float | None:
        """Mean over prompts; None where none can be checked."""
        return float(self.values.mean()) if len(self.values) else None


@dataclass(frozen=True)
class Outcome:
    """One finished run.

    Args:
        scores: Of the exported student's responses.
        kl_teacher_student: Held-out KL(teacher || student), nats per token.
        kl_stderr: Its standard error over prompts.
        policy_kl: Policy KL after the last step, nats per token; None if not measured.
        seconds: Wall-clock time of the stages in COUNTED.
        generated_tokens: Response tokens sampled, by whatever model.
        steps: Optimizer steps.
    """

    scores: Scores
    kl_teacher_student: float
    kl_stderr: float
    policy_kl: float | None
    seconds: float
    generated_tokens: int
    steps: int


def process_modules(comparison: ComparisonConfig, base: RunConfig) -> tuple[str, ...]:
    """Return what the runs' processes should have imported beside the stages' libraries, since it takes its time."""
    engines = {base.generate.engine}
    modules = []
    if any(method.trainer == "on_policy" for method in comparison.methods.values()):
        modules.append("tasks.train.on_policy")
    if comparison.rl is not None:
        modules.append("tasks.rl.grpo")
        engines.add(comparison.rl.grpo.engine)
        if comparison.rl.evaluate is not None:
            engines.add(comparison.rl.evaluate.engine)
    # TRL's trainers import vLLM where it is installed, and vLLM must not be imported before its engine is set up.
    return () if "vllm" in engines else tuple(modules)


def method_stages(config: RunConfig) -> list[StageKey]:
    """Return the stages that a method's run needs: of the evaluations only the last.

    What the teacher and the student before training come to is known from the run that all methods start from.
    """
    last = config.rounds - 1
    return [k for k in loop(config) if k.stage != "baseline" and (k.stage != "evaluate" or k.round == last)]


def continuation_stages() -> list[StageKey]:
    """Return the stages of an RL run that continues a method's: what its start comes to is known from that run."""
    return [key for key in RL_LOOP if key != BASELINE]


def base_stages(config: RunConfig) -> list[StageKey]:
    """Return the stages up to the warmed-up student and its evaluation."""
    return [key for key in loop(config) if key.round is None or key.round < 0]


def read_scores(store: RunStore, key: StageKey, model: str) -> Scores:
    """Return the scores of a model's responses in an evaluation stage (evaluate or baseline).

    Args:
        store: The run.
        key: The stage.
        model: `student`, `teacher` or `start`; `rl` in an RL run.
    """
    columns = ["model", "prompt_id", "score"]
    table = store.read_part(store.path(key, RESPONSES_FILE), EVALUATE_RESPONSES, columns)
    shares = right_shares(table.filter(pc.equal(table.column("model"), model))).sort_by("prompt_id")
    return Scores(tuple(shares.column("prompt_id").to_pylist()), shares.column("share").to_numpy())


def read_kl(store: RunStore, key: StageKey, model: str) -> tuple[float, float] | None:
    """Return a model's held-out KL(teacher || student) and its standard error, nats per token; None if it has none."""
    table = store.read_part(store.path(key, METRICS_FILE), EVALUATE_METRICS, ["model", "metric", "value", "stderr"])
    of_model, of_kl = pc.equal(table.column("model"), model), pc.equal(table.column("metric"), "kl_teacher_student")
    rows = table.filter(pc.and_(of_model, of_kl))
    if not rows.num_rows:
        return None
    return float(rows.column("value")[0].as_py()), float(rows.column("stderr")[0].as_py())


def read_outcome(store: RunStore, config: RunConfig) -> Outcome:
    """Return what a finished run came to.

    Raises:
        ArtifactError: a stage has not finished, or a table is damaged.
    """
    keys = method_stages(config)
    counters = {key: store.finished(key).counters for key in keys}
    last = StageKey("evaluate", config.rounds - 1)
    kl = read_kl(store, last, "student")
    value, stderr = (float("nan"), float("nan")) if kl is None else kl
    return Outcome(
        scores=read_scores(store, last, "student"),
        kl_teacher_student=value,
        kl_stderr=stderr,
        policy_kl=_last_policy_kl(store, config),
        seconds=sum(counters[key]["seconds"] for key in keys if key.stage in counted(config)),
        generated_tokens=sum(_generated(key, counters[key], config) for key in keys),
        steps=int(counters[StageKey("train", config.rounds - 1)]["policy_step"]),
    )


def counted(config: RunConfig) -> tuple[str, ...]:
    """Return the stages whose time a method needs: scoring only where training or the filter reads it."""
    unfiltered = config.filter.min_delta_ifd is None and config.filter.max_delta_ifd is None
    if config.train.kd_weight == 0 and unfiltered:
        return tuple(stage for stage in COUNTED if stage != "score")
    return COUNTED


def _generated(key: StageKey, counters: dict[str, Any], config: RunConfig) -> int:
    if key.stage == "generate" and config.generate.policy != "answers":
        return int(counters["tokens"])
    return int(counters.get("generated_tokens", 0)) if key.stage == "train" else 0


def _last_policy_kl(store: RunStore, config: RunConfig) -> float | None:
    key = StageKey("train", config.rounds - 1)
    measured = store.read_table(key, TRAIN_METRICS, ["policy_kl"]).column("policy_kl").drop_null()
    return measured[-1].as_py() if len(measured) else None


def step_prompts(store: RunStore, config: RunConfig) -> int:
    """Return how many of a run's samples have as many tokens as its mean optimizer step.

    On-policy training with so many prompts a step learns from as many tokens, prompts and responses together.

    Raises:
        ArtifactError: the run has not finished.
    """
    trained = [store.finished(key) for key in method_stages(config) if key.stage == "train"]
    per_step = sum(int(m.counters["tokens"]) for m in trained) / int(trained[-1].counters["policy_step"])
    lengths = [
        pc.add(pc.list_value_length(table.column("prompt_ids")), pc.list_value_length(table.column("response_ids")))
        for table in store.iterate_table(StageKey("generate", 0), GENERATE, ["prompt_ids", "response_ids"])
    ]
    mean = float(pc.mean(pa.chunked_array([chunk for column in lengths for chunk in column.chunks])).as_py())
    return max(1, round(per_step / mean))


def validation_prompts(prompt_ids: tuple[str, ...], share: float) -> frozenset[str]:
    """Return the prompts that learning rates are chosen on: the first ``share`` in the order of a hash of their ids."""
    ordered = sorted(prompt_ids, key=lambda name: hashlib.sha256(f"validation:{name}".encode()).hexdigest())
    return frozenset(ordered[: round(share * len(ordered))])


def continuation_label(method: str, seed: int) -> str:
    """Return an RL run's name for people.

    >>> continuation_label("npd", 3)
    'npd · GRPO · seed 3'
    """
    return f"{method} · GRPO · seed {seed}"
