"""The stages of a run as a graph: what each reads of the config, and whose tables it reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

from typing_extensions import TypeVar

from schemas.config import RunConfig, RunSettings
from schemas.stage_key import WARMUP, StageKey

PROMPTS, MODELS, REFERENCE = StageKey("prompts"), StageKey("models"), StageKey("reference")
BASELINE = StageKey("baseline")

C = TypeVar("C", bound=RunSettings, default=RunConfig)
"""The config of a kind of run; of a distillation run where nothing is said."""


@dataclass(frozen=True)
class Stage(Generic[C]):
    """One kind of stage.

    Args:
        module: Where its ``run(job)`` lives.
        version: Raised when the code changes what the stage writes from the same inputs.
        config: The part of the config that the stage reads; a change in it re-runs the stage.
        inputs: Stages whose outputs it reads.
        own_process: Whether it loads models, and so runs in a process of its own.
    """

    module: str
    version: int
    config: Callable[[C, StageKey], dict[str, Any]]
    inputs: Callable[[C, StageKey], list[StageKey]]
    own_process: bool = True


def initial_policy(config: RunConfig) -> StageKey:
    """Return the stage whose model the near-policy rounds start from."""
    return StageKey("export", WARMUP) if config.warmup is not None else MODELS


def result_policy(config: RunConfig, round_index: int) -> StageKey:
    """Return the stage whose model round ``round_index`` ends with; below 0: the initial policy."""
    return initial_policy(config) if round_index < 0 else StageKey("export", round_index)


def evaluated_in_baseline(config: RunConfig, key: StageKey) -> bool:
    """Say whether baseline has evaluated the model of evaluation ``key`` already: the untouched student's."""
    return key.stage == "evaluate" and result_policy(config, _round(key)) == MODELS


def sampling_policy(config: RunConfig, round_index: int) -> StageKey:
    """Return the stage whose model samples round ``round_index`` (pi_gen).

    Without overlap the student as the round before left it; with overlap as that round found it, since sampling then
    runs beside its training.
    """
    return result_policy(config, round_index - (2 if config.overlap else 1))


def samples(config: RunConfig, round_index: int) -> bool:
    """Say whether round ``round_index`` samples anew before it trains."""
    return config.train.on_policy is None and sampled_round(config, round_index) == round_index


def sampled_round(config: RunConfig, round_index: int) -> int:
    """Return the round whose samples round ``round_index`` trains on (WARMUP: its own).

    What is not the student's own does not change with it, so it is drawn once.
    """
    if round_index == WARMUP:
        return WARMUP
    return 0 if config.generate.policy != "student" else round_index - round_index % config.refresh_every


def _round(key: StageKey) -> int:
    if key.round is None:
        raise ValueError(f"stage {key.stage} belongs to a round")
    return key.round


def _sections(*names: str) -> Callable[[RunConfig, StageKey], dict[str, Any]]:
    def read(config: RunConfig, key: StageKey) -> dict[str, Any]:
        values: dict[str, Any] = {"seed": config.seed}
        for name in names:
            section = getattr(config, name)
            values[name] = None if section is None else section.fingerprinted()
        return values

    return read


def _prompts_config(config: RunConfig, key: StageKey) -> dict[str, Any]:
    values = _sections("prompts")(config, key)
    return values | {"seed": config.split_seed}


def _generate_config(config: RunConfig, key: StageKey) -> dict[str, Any]:
    sampler = {"student": ["student"], "teacher": ["student", "teacher"], "answers": ["student"]}
    values = _sections("generate", *sampler[config.generate.policy])(config, key)
    if config.generate.policy == "teacher":
        values["generate"]["engine"] = config.teacher_sampling.engine
    return values


def _train_config(config: RunConfig, key: StageKey) -> dict[str, Any]:
    if key.round == WARMUP:
        return _sections("warmup")(config, key)
    values = _sections("train")(config, key)
    if config.train.guard.action != "refresh":
        # Only then does the guard change what comes out; a run that it stopped goes on with a higher budget.
        values["train"]["guard"] = None
    # The schedule spans all rounds, so their number shapes every step.
    values |= {"rounds": config.rounds}
    if config.train.on_policy is not None:
        # It samples as it trains.
        values |= _sections("generate", "student", "teacher")(config, key)
    return values


def _pack_config(config: RunConfig, key: StageKey) -> dict[str, Any]:
    values: dict[str, Any] = {"pack": config.pack.fingerprinted()}
    if key.round != WARMUP:
        values["targets"] = [config.score.top_k, config.score.topk_dtype]
    return values


def _filter_config(config: RunConfig, key: StageKey) -> dict[str, Any]:
    return {
        "filter": config.filter.fingerprinted(),
        "max_tokens": config.pack.max_tokens,
        "targets": [config.score.top_k, config.score.topk_dtype],
    }


def _models_config(config: RunConfig, key: StageKey) -> dict[str, Any]:
    values = _sections("teacher", "student")(config, key)
    return values | {"too_long": config.prompts.too_long}


def _reference_config(config: RunConfig, key: StageKey) -> dict[str, Any]:
    """Only what the teacher's responses depend on: not how the student samples, nor the warm-up's optimizer."""
    values = _sections("generate", "teacher")(config, key)
    for name in ("policy", "temperature", "top_p", "samples_per_prompt"):
        del values["generate"][name]
    values["generate"]["engine"] = config.teacher_sampling.engine
    values["evaluate_max_new_tokens"] = config.evaluate.max_new_tokens
    if config.warmup is not None:
        warmup = config.warmup
        values["warmup"] = [warmup.responses, warmup.prompts, warmup.temperature, warmup.max_new_tokens]
    return values


def _generate_inputs(config: RunConfig, key: StageKey) -> list[StageKey]:
    own = config.generate.policy == "student"
    return [PROMPTS, MODELS, *([sampling_policy(config, _round(key))] if own else [])]


def _evaluate_config(config: RunConfig, key: StageKey) -> dict[str, Any]:
    """With how models answer, if they do: not how the student samples for training."""
    if not config.evaluate.generate:
        return _sections("evaluate")(config, key)
    values = _sections("evaluate", "generate")(config, key)
    for name in ("policy", "temperature", "top_p", "samples_per_prompt"):
        del values["generate"][name]
    values["generate"]["engine"] = config.local_sampling.engine
    served = key == BASELINE and config.score.engine == "server"
    return values | {"teacher_engine": config.score.engine if served else None}


def _evaluate_inputs(config: RunConfig, key: StageKey) -> list[StageKey]:
    if evaluated_in_baseline(config, key):
        return [BASELINE]
    return [PROMPTS, REFERENCE, MODELS, result_policy(config, _round(key))]


def _pack_inputs(config: RunConfig, key: StageKey) -> list[StageKey]:
    index = _round(key)
    if index == WARMUP:
        return [PROMPTS, REFERENCE]
    return [StageKey("generate", index), StageKey("score", index), StageKey("filter", index)]


def _train_inputs(config: RunConfig, key: StageKey) -> list[StageKey]:
    index = _round(key)
    if index == WARMUP:
        return [MODELS, StageKey("pack", WARMUP)]
    if config.train.on_policy is not None:
        return [PROMPTS, MODELS, initial_policy(config)]
    return [initial_policy(config), StageKey("pack", sampled_round(config, index)), *_trained_before(index)]


def _filter_inputs(config: RunConfig, key: StageKey) -> list[StageKey]:
    index = _round(key)
    # The lag of a sample counts up to where the round's training begins.
    return [StageKey("generate", index), StageKey("score", index), *_trained_before(index)]


def _trained_before(index: int) -> list[StageKey]:
    return [StageKey("train", index - 1)] if index > 0 else []


def _export_inputs(config: RunConfig, key: StageKey) -> list[StageKey]:
    start = MODELS if key.round == WARMUP else initial_policy(config)
    return [start, StageKey("train", _round(key))]


STAGES: dict[str, Stage] = {
    "prompts": Stage("tasks.prompts", 2, _prompts_config, lambda c, k: [], own_process=False),
    "models": Stage("tasks.models", 3, _models_config, lambda c, k: [PROMPTS]),
    "reference": Stage("tasks.reference", 3, _reference_config, lambda c, k: [PROMPTS, MODELS]),
    "generate": Stage("tasks.generate", 3, _generate_config, _generate_inputs),
    "score": Stage(
        "tasks.score",
        2,
        _sections("score"),
        lambda c, k: [MODELS, sampling_policy(c, _round(k)), StageKey("generate", _round(k))],
    ),
    "filter": Stage(
        "tasks.filter",
        2,
        _filter_config,
        _filter_inputs,
        own_process=False,
    ),
    "pack": Stage("tasks.pack", 1, _pack_config, _pack_inputs, own_process=False),
    "train": Stage("tasks.train", 3, _train_config, _train_inputs),
    "export": Stage("tasks.export", 2, _sections("export"), _export_inputs),
    "baseline": Stage("tasks.evaluate", 1, _evaluate_config, lambda c, k: [PROMPTS, MODELS, REFERENCE]),
    "evaluate": Stage(
        "tasks.evaluate",
        3,
        _evaluate_config,
        _evaluate_inputs,
    ),
}

WARMUP_STAGES = ("pack", "train", "export")
SAMPLING_STAGES = ("generate", "score", "filter", "pack")
TRAINING_STAGES = ("train", "export", "evaluate")


def loop(config: RunConfig) -> list[StageKey]:
    """Return every stage of the run in the order of the loop."""
    keys = [PROMPTS, MODELS, REFERENCE, BASELINE]
    if config.warmup is not None:
        keys += [StageKey(stage, WARMUP) for stage in WARMUP_STAGES]
    keys.append(StageKey("evaluate", WARMUP))
    for index in range(config.rounds):
        if samples(config, index):
            keys += [StageKey(stage, index) for stage in SAMPLING_STAGES]
        keys += [StageKey(stage, index) for stage in TRAINING_STAGES]
    return keys
