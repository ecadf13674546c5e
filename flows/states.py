"""How each stage of a run stands, and what follows from running one again."""

from enum import StrEnum

from schemas.config import RunConfig, RunSettings
from schemas.errors import ConfigError, NPDError
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from tasks.graph import PROMPTS
from tasks.models import source_fingerprints as model_fingerprints
from tasks.stage import downstream, graph_of, plan, stage_of, stages_of


class StageState(StrEnum):
    """How a stage stands."""

    COMPLETE = "complete"
    """Its result stands."""

    OUTDATED = "out of date"
    """It finished, but its settings, sources, inputs or files have changed since: the next run does it again."""

    UNFINISHED = "unfinished"
    """It began and did not finish: the next run continues it."""

    MISSING = "not run"
    """It has not begun."""


def stage_states(store: RunStore, config: RunSettings) -> dict[StageKey, StageState]:
    """Return the state of every stage of a run, in order.

    Files are compared by size, not by content: that is for the run itself, which hashes them.
    """
    states: dict[StageKey, StageState] = {}
    for key in stages_of(config):
        inputs = [states[needed] for needed in stage_of(config, key).inputs(config, key)]
        states[key] = _state(store, config, key, all(state is StageState.COMPLETE for state in inputs))
    return states


def _state(store: RunStore, config: RunSettings, key: StageKey, inputs_complete: bool) -> StageState:
    manifest = store.manifest(key)
    if manifest is None:
        return StageState.UNFINISHED if store.has_begun(key) else StageState.MISSING
    if not inputs_complete or _fingerprint(store, config, key) != manifest.fingerprint:
        return StageState.OUTDATED
    intact = store.first_damage(manifest, content=False) is None
    return StageState.COMPLETE if intact else StageState.OUTDATED


def _fingerprint(store: RunStore, config: RunSettings, key: StageKey) -> str | None:
    """Return the fingerprint ``key`` would have now; None where its sources are gone."""
    try:
        return plan(store, config, key).fingerprint
    except NPDError:
        return None


def check_sources(config: RunConfig) -> None:
    """Check, before anything runs, that local prompts and models are where the config says.

    Raises:
        PromptError: a prompt source is not there.
        ModelError: a model is not there.
        ConfigError: ``root`` cannot hold a run.
    """
    plan(RunStore.at(config), config, PROMPTS)
    model_fingerprints(config)


def stage_key(config: RunSettings, stage: str, round_index: int | None) -> StageKey:
    """Return the key of a stage that a user named.

    Raises:
        ConfigError: the run has no such stage or round; says which there are.
    """
    stages = graph_of(config)
    if stage not in stages:
        raise ConfigError(f"stage `{stage}`: no such stage; there are {', '.join(stages)}")
    rounds = [key.round for key in stages_of(config) if key.stage == stage]
    if round_index in rounds:
        return StageKey(stage, round_index)
    if rounds == [None]:
        raise ConfigError(f"stage `{stage}` belongs to the whole run: leave the round out")
    known = ", ".join(f"{index} (warm-up)" if index == WARMUP else str(index) for index in rounds)
    found = "no round given" if round_index is None else f"no round {round_index}"
    raise ConfigError(f"stage `{stage}`: {found}; this run has {known}")


def command_of(config: RunSettings) -> str:
    """Return the command that runs, or continues, the kind of run that ``config`` is of."""
    return "npd run" if isinstance(config, RunConfig) else "npd rl"


def upstream(config: RunSettings, key: StageKey) -> list[StageKey]:
    """Return the stages whose results reach ``key``, directly or not; in the order in which they run."""
    return [other for other in stages_of(config) if key in downstream(config, other)]


def upstream_problem(store: RunStore, config: RunSettings, key: StageKey) -> str | None:
    """Return why ``key`` cannot run yet, naming the first earlier stage that is not complete; None if it can."""
    states = stage_states(store, config)
    for other in upstream(config, key):
        if states[other] is not StageState.COMPLETE:
            return (
                f"{store.url}: `{key.label}` reads `{other.label}`, which is {states[other]} "
                f"under these settings. Run that stage first, or the whole run: {command_of(config)} {store.url}"
            )
    return None


def outdated_after(store: RunStore, config: RunSettings, key: StageKey) -> list[StageKey]:
    """Return the finished stages after ``key`` that no longer match it, in the order in which they run."""
    states = stage_states(store, config)
    return [other for other in downstream(config, key) if states[other] is StageState.OUTDATED]
