"""What each stage cost and wrote, and what it was made from: read from the manifests."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from schemas.manifest import Manifest
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import GENERATE


@dataclass(frozen=True)
class StageCost:
    """A stage of the loop.

    Args:
        key: Which.
        finished: Whether it has a manifest; without one the other values are empty.
        seconds: Its work.
        tokens: Tokens it went through; None: it counts none.
        tokens_per_second: Their rate.
        bytes: What it wrote.
        rows: Rows of its tables.
        peak_memory: Bytes; None: not measured.
        fingerprint: Of its settings, inputs and version.
        inputs: Labels of the stages it read.
        files: How many files it wrote.
        outputs: Hash of their names and contents.
        when: When it finished, UTC.
        host: Where.
        warnings: What it warned of.
    """

    key: StageKey
    finished: bool
    seconds: float = 0.0
    tokens: int | None = None
    tokens_per_second: float | None = None
    bytes: int = 0
    rows: int = 0
    peak_memory: int | None = None
    fingerprint: str = ""
    inputs: tuple[str, ...] = ()
    files: int = 0
    outputs: str = ""
    when: str = ""
    host: str = ""
    warnings: tuple[str, ...] = ()


def costs(keys: Iterable[StageKey], done: Mapping[StageKey, Manifest]) -> list[StageCost]:
    """Return what the stages ``keys`` cost, in that order; those not in ``done`` are still to come."""
    return [_cost(key, done.get(key)) for key in keys]


def mean_rate(stages: Iterable[StageCost]) -> float | None:
    """Return the tokens a second of several stages, of the time that went into these tokens; None if none has a rate.

    A stage knows this time best: to load a model is none of it, nor is what an evaluation samples.
    """
    rated = [(stage.tokens, stage.tokens_per_second) for stage in stages if stage.tokens and stage.tokens_per_second]
    return sum(tokens for tokens, _ in rated) / sum(tokens / rate for tokens, rate in rated) if rated else None


def _cost(key: StageKey, manifest: Manifest | None) -> StageCost:
    if manifest is None:
        return StageCost(key, finished=False)
    counters = manifest.counters
    read = dict.fromkeys(StageKey.of_file(record.path) for record in manifest.inputs)
    return StageCost(
        key=key,
        finished=True,
        seconds=float(counters.get("seconds", 0.0)),
        tokens=counters.get("tokens"),
        tokens_per_second=counters.get("tokens_per_second"),
        bytes=sum(record.bytes for record in manifest.outputs),
        rows=sum(record.rows or 0 for record in manifest.outputs),
        peak_memory=counters.get("peak_memory_bytes"),
        fingerprint=manifest.fingerprint,
        inputs=tuple(other.label for other in read if other is not None),
        files=len(manifest.outputs),
        outputs=manifest.outputs_fingerprint,
        when=manifest.finished[:19].replace("T", " "),
        host=manifest.host,
        warnings=tuple(str(warning) for warning in counters.get("warnings", [])),
    )


def sampler_of(store: RunStore, index: int) -> tuple[str, int] | None:
    """Return the policy version that sampled round ``index`` and the optimizer steps it had; None: no sample.

    Raises:
        ArtifactError: the generate stage has not finished, or its table cannot be read.
    """
    for path in store.table_files(StageKey("generate", index)):
        rows = store.read_part(path, GENERATE, ["policy_version", "policy_step"]).slice(0, 1).to_pylist()
        if rows:
            return rows[0]["policy_version"], rows[0]["policy_step"]
    return None
