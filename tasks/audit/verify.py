"""Does everything in a run hold together, from prompts to exported weights?"""

from collections.abc import Callable, Mapping
from typing import Any

from schemas.config import RunConfig
from schemas.errors import ArtifactError, ConfigError, RunNotFoundError
from schemas.manifest import RUN_NAME, hash_json
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.audit.evaluation import check_evaluation
from tasks.audit.findings import Audit, Break, Report, Watch
from tasks.audit.manifests import check_chain, check_files, check_other_files, read_manifests
from tasks.audit.packs import check_packs
from tasks.audit.rl import check_answers, check_rl, check_rl_prompts
from tasks.audit.rollouts import check_prompts, check_rollouts, require_models
from tasks.audit.scores import check_ledger, check_scores
from tasks.audit.stored_files import StoredFiles
from tasks.audit.tables import check_tables
from tasks.audit.training import check_export, check_training
from tasks.stage import stages_of

Check = Callable[[Audit[Any], StageKey], None]

_ROWS: Mapping[str, Check] = {
    "prompts": check_prompts,
    "models": require_models,
    "reference": check_rollouts,
    "generate": check_rollouts,
    "score": check_scores,
    "filter": check_ledger,
    "pack": check_packs,
    "train": check_training,
    "export": check_export,
    "baseline": check_evaluation,
    "evaluate": check_evaluation,
}
_RL_ROWS: Mapping[str, Check] = {
    "prompts": check_rl_prompts,
    "baseline": check_answers,
    "rl": check_rl,
    "evaluate": check_answers,
}


def not_watched(what: str, done: int, total: int, unit: str) -> None:
    """Ignore how far it is."""


def verify(store: RunStore, watch: Watch = not_watched) -> Report:
    """Check everything that a run of any kind holds, stage by stage in the order in which they run.

    Of each stage: its manifest's own checksum and place; every file's hash, and that no other file lies there; that
    its inputs are the present outputs of the stages it reads, and its fingerprint theirs; every table against its
    schema; and its rows against those they come from. A stage is looked into only as far as what it stands on holds.
    Memory holds one shard of a table, and of the round at hand ids and some 50 bytes per sample.

    Args:
        store: The run.
        watch: Told how far it is.

    Raises:
        RunNotFoundError: there is no run.
        StorageError: the run's place is out of reach.
    """
    report = Report()
    try:
        record = store.record()
        if record is None:
            raise RunNotFoundError(f"{store.url}: no run here (no {RUN_NAME})")
        config = store.settings
    except (ArtifactError, ConfigError) as error:
        if isinstance(error, RunNotFoundError):
            raise
        report.breaks.append(Break(RUN_NAME, str(error).removeprefix(f"{store.url}/{RUN_NAME}: ")))
        report.unchecked.append(f"everything else, since {RUN_NAME} says what the run should be")
        return report
    audit: Audit[Any] = Audit(store, config, record.run_id, watch, report)
    rows = _ROWS if isinstance(config, RunConfig) else _RL_ROWS
    if record.config_hash != hash_json(config.identified()) or record.seed != config.seed:
        audit.broken(RUN_NAME, "config_hash and seed are not those of the config beside them")
    files = StoredFiles(store)
    sizes = files.sizes()
    report.coverage.files += 1
    report.coverage.bytes += sizes[RUN_NAME]
    present = read_manifests(audit, files, sizes)
    found, order = list(report.breaks), stages_of(config)
    # Told again in the order of the loop, where each belongs.
    report.breaks[:] = [entry for entry in found if entry.where == RUN_NAME]
    for key in present:
        report.breaks += [entry for entry in found if entry.where.startswith(f"{key.folder}/")]
        check_files(audit, files, sizes, key)
        if key not in order:
            report.notes.append(f"{key.folder}: of a stage that the run's config has no more")
            continue
        check_chain(audit, key)
        check_tables(audit, key)
        if key in audit.manifests:
            rows[key.stage](audit, key)
        _forget(audit, key)
    check_other_files(audit, files, sizes)
    return report


def _forget(audit: Audit[Any], key: StageKey) -> None:
    """Drop what no later stage is compared with."""
    if key.stage == "pack" and key.round is not None:
        audit.rollouts.pop(StageKey("generate", key.round), None)
        audit.kept.pop(StageKey("filter", key.round), None)
