"""The flow `npd-stage`: run one stage of one round again."""

from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from pydantic import Field, WithJsonSchema

from flows.configs import recorded_config
from flows.rl import RL_TASKS
from flows.stage_tasks import TASKS
from flows.states import outdated_after, stage_key, upstream_problem
from schemas.config import RunConfig
from schemas.errors import ArtifactError
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP

STAGE_NAMES = list(dict.fromkeys([*TASKS, *RL_TASKS]))

# What the form of Prefect's UI offers, and its server accepts.
StageName = Annotated[str, WithJsonSchema({"type": "string", "enum": STAGE_NAMES})]
RoundIndex = Annotated[int, Field(ge=WARMUP)]


def _run_name() -> str:
    parameters = flow_run.parameters
    place = "" if parameters["round"] is None else f" · round {parameters['round']}"
    return f"{Path(parameters['run']).name}{place} · {parameters['stage']}"


@flow(name="npd-stage", flow_run_name=_run_name, persist_result=False)
def npd_stage(
    run: str, stage: StageName, round: RoundIndex | None = None, overrides: list[str] | None = None
) -> dict[str, Any]:
    """Run one stage of a run of any kind again, from its start.

    The result there was is kept until `npd gc`. Later stages stay as they are: those that no longer match run again at
    the next `npd-round` (`npd-rl`) of this run.

    Args:
        run: The run's folder or URL, for example `runs/quickstart`.
        stage: Which stage: prompts, models, reference, baseline, generate, score, filter, pack, train, export or
            evaluate; of an RL run prompts, baseline, rl or evaluate.
        round: Which round, from 0; -1 is the warm-up; none for prompts, models, reference and baseline, and in an RL
            run.
        overrides: Changes to the config the run last ran with, each `key.sub=value`; the run keeps them.

    Returns:
        The stage, its counters, and the labels of the stages that no longer match it.

    Raises:
        ConfigError: no such stage or round.
        RunLockedError: another process works on this run.
        ArtifactError: no such run, or an earlier stage is missing or out of date.
        NPDError: the stage failed.
    """
    store = RunStore.open(run)
    config = recorded_config(store, overrides)
    key = stage_key(config, stage, round)
    with store.lock.held():
        problem = upstream_problem(store, config, key)
        if problem is not None:
            raise ArtifactError(problem)
        if overrides:
            store.record_config(config)
        store.supersede(key)
        tasks = TASKS if isinstance(config, RunConfig) else RL_TASKS
        manifest = tasks[stage](store, config, round=key.round)
        outdated = [other.label for other in outdated_after(store, config, key)]
    if outdated:
        get_run_logger().info("out of date now, and run again at the next npd-round or npd-rl: %s", ", ".join(outdated))
    return {"stage": key.label, "counters": manifest.counters, "outdated": outdated}
