"""The stages as Prefect tasks: each is skipped if its result still stands, and shows how far it is."""

from collections.abc import Callable
from typing import Any

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.process import run_in_process
from flows.progress import ProgressArtifact, current_listener
from schemas.config import RunConfig
from schemas.manifest import Manifest
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.untrusted_text import visible
from tasks.graph import STAGES
from tasks.stage import current_manifest, execute

StageTask = Task[..., Manifest]


def run_stage(store: RunStore, config: RunConfig, key: StageKey) -> Manifest:
    """Return the manifest of ``key``, running the stage first unless its result still stands.

    Raises:
        NPDError: what the stage found wrong.
    """
    store.lock.require()
    logger, listener = get_run_logger(), current_listener()
    manifest = current_manifest(store, config, key)
    if manifest is not None:
        logger.info("%s: up to date, finished %s", key.label, manifest.finished)
        if listener is not None:
            listener.finished(key, manifest, up_to_date=True)
        return manifest
    if listener is not None:
        listener.started(key)
    artifact = ProgressArtifact(config, key, logger)

    def progressed(done: int, total: int, unit: str) -> None:
        artifact.progressed(done, total, unit)
        if listener is not None:
            listener.progressed(key, done, total, unit)

    run = run_in_process if STAGES[key.stage].own_process else execute
    try:
        manifest = run(store, config, key, progressed)
    except BaseException:
        if listener is not None:
            listener.failed(key)
        raise
    artifact.finished(manifest)
    if listener is not None:
        listener.finished(key, manifest, up_to_date=False)
    for warning in manifest.counters.get("warnings", []):
        logger.warning("%s: %s", key.label, visible(warning))
    logger.info("%s: done in %.1f s", key.label, manifest.counters["seconds"])
    return manifest


def _stage_task(stage: str, description: str) -> StageTask:
    # Prefect passes the call's parameters; its type for that asks for a method of its own besides.
    def label(parameters: dict[str, Any]) -> str:
        return StageKey(stage, parameters["round"]).label

    named: Callable[..., str] = label

    # No tags: Prefect takes a concurrency slot for every tag before a task starts, which costs two seconds each time.
    # No retries: a stage fails because of its code or data, which a second try would find as they are. No Prefect
    # cache and no persisted result: the manifest decides what is current, and the run's folder holds the result.
    @task(
        name=stage,
        description=description,
        task_run_name=named,
        retries=0,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def run(store: RunStore, config: RunConfig, round: int | None = None) -> Manifest:
        return run_stage(store, config, StageKey(stage, round))

    return run


prompts = _stage_task("prompts", "Read the prompts, keep each once, set some aside for evaluation.")
models = _stage_task("models", "Check teacher and student against each other and the prompts; make the student.")
reference = _stage_task("reference", "The teacher answers the held-out prompts, and those of the warm-up.")
generate = _stage_task("generate", "The student's snapshot answers every prompt.")
score = _stage_task("score", "Prefill both models: delta-IFD of every sample, and the teacher's top-k targets.")
filter = _stage_task("filter", "Keep what is learnable; the ledger says why the rest is not.")
pack = _stage_task("pack", "Whole sequences into bins.")
train = _stage_task("train", "Train the student on the packs, continuing the run's one optimizer and schedule.")
export = _stage_task("export", "Write the student as a Hugging Face model directory.")
baseline = _stage_task("baseline", "Evaluate the teacher, and the student that the run starts from.")
evaluate = _stage_task("evaluate", "Held-out prompts: agreement with the teacher, and the student's own responses.")

TASKS: dict[str, StageTask] = {
    stage_task.name: stage_task
    for stage_task in (prompts, models, reference, baseline, generate, score, filter, pack, train, export, evaluate)
}
"""Every stage's task by the stage's name."""
