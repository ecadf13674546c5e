"""A whole RL run in one process, without Prefect."""

from schemas.config import RLConfig
from schemas.manifest import Manifest
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.rl.graph import RL_LOOP
from tasks.stage import Progress, current_manifest, execute, no_progress


def run_rl(store: RunStore, config: RLConfig, progress: Progress = no_progress) -> dict[StageKey, Manifest]:
    """Run every stage of an RL run that does not stand yet, in this process.

    The store must be held (``store.lock.held()``) where another process might work on it.

    Args:
        store: Of the RL run (``RunStore.at(config)``).
        config: Its settings; they are recorded.
        progress: Told of the work within each stage.

    Returns:
        The manifest of every stage, in order.

    Raises:
        NPDError: what a stage found wrong; what was done stands, and the next call goes on from there.
    """
    store.record_config(config)
    return {key: current_manifest(store, config, key) or execute(store, config, key, progress) for key in RL_LOOP}
