"""How two runs differ: settings, package versions, and what their stages wrote."""

from dataclasses import asdict, dataclass
from typing import Any

from schemas.config import RunSettings
from schemas.errors import ArtifactError, ConfigError
from schemas.manifest import FileRecord, Manifest
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.audit.digests import first_difference
from tasks.audit.manifests import differing_keys
from tasks.audit.tables import stage_schema
from tasks.stage import stages_of


@dataclass(frozen=True)
class Setting:
    """A setting that differs; ``placement``: it says only where, in what portions or how visibly work runs."""

    key: str
    left: Any
    right: Any
    placement: bool


@dataclass(frozen=True)
class FileDifference:
    """A file that differs; a side is None where it is not there. ``first``: where or how a table differs."""

    path: str
    left: dict[str, Any] | None
    right: dict[str, Any] | None
    first: str | None


@dataclass(frozen=True)
class StageDifference:
    """A stage: `equal`, `different`, or finished in one run only (`left only`, `right only`)."""

    stage: str
    state: str
    rows: tuple[int, int]
    bytes: tuple[int, int]
    files: list[FileDifference]


@dataclass(frozen=True)
class RunDifference:
    """How two runs differ; packages by name as (left, right)."""

    settings: list[Setting]
    packages: dict[str, tuple[str | None, str | None]]
    stages: list[StageDifference]

    @property
    def equal(self) -> bool:
        """Whether settings that shape results, packages and everything the stages wrote are equal."""
        settings = any(not setting.placement for setting in self.settings)
        return not (settings or self.packages or any(stage.state != "equal" for stage in self.stages))

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"equal": self.equal} | asdict(self)


def compare_runs(left: RunStore, right: RunStore) -> RunDifference:
    """Compare two runs by their configs and manifests; tables are read only where their hashes differ.

    What a manifest records is believed: `npd verify` says whether the files are what it says.

    Raises:
        ConfigError: one is an RL run and the other is not.
        ArtifactError: run.json or a manifest of either is damaged.
    """
    configs = left.settings, right.settings
    if type(configs[0]) is not type(configs[1]):
        raise ConfigError(
            f"{left.url}, {right.url}: an RL run and a distillation run have no settings or stages in common to compare"
        )
    manifests = _manifests(left, configs[0]), _manifests(right, configs[1])
    keys = sorted({*manifests[0], *manifests[1]}, key=lambda key: _order(configs, key))
    return RunDifference(
        _settings(*configs),
        _packages((left, right), manifests),
        [_stage((left, right), configs, key, (manifests[0].get(key), manifests[1].get(key))) for key in keys],
    )


def _manifests(store: RunStore, config: RunSettings) -> dict[StageKey, Manifest]:
    return {key: manifest for key in stages_of(config) if (manifest := store.manifest(key)) is not None}


def _order(configs: tuple[RunSettings, RunSettings], key: StageKey) -> tuple[int, int]:
    orders = [stages_of(config) for config in configs]
    places = [order.index(key) for order in orders if key in order]
    return (-2 if key.round is None else key.round, min(places))


def _settings(left: RunSettings, right: RunSettings) -> list[Setting]:
    sides = left.model_dump(mode="json"), right.model_dump(mode="json")
    shaping = set(differing_keys(left.identified(), right.identified()))

    def shapes(key: str) -> bool:
        return any(key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in shaping)

    return [Setting(key, _at(sides[0], key), _at(sides[1], key), not shapes(key)) for key in differing_keys(*sides)]


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(values, dict):
            return None
        values = values.get(name)
    return values


def _packages(
    stores: tuple[RunStore, RunStore], manifests: tuple[dict[StageKey, Manifest], dict[StageKey, Manifest]]
) -> dict[str, tuple[str | None, str | None]]:
    """Return packages whose versions differ; of a run whose stages ran with several, all of them."""
    sides: list[dict[str, str]] = []
    for store, of_stages in zip(stores, manifests, strict=True):
        record = store.record()
        found: dict[str, set[str]] = {}
        for packages in (*(m.packages for m in of_stages.values()), {} if record is None else record.packages):
            for name, version in packages.items():
                found.setdefault(name, set()).add(version)
        sides.append({name: ", ".join(sorted(versions)) for name, versions in found.items()})
    names = sorted({*sides[0], *sides[1]})
    pairs = {name: (sides[0].get(name), sides[1].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _stage(
    stores: tuple[RunStore, RunStore],
    configs: tuple[RunSettings, RunSettings],
    key: StageKey,
    manifests: tuple[Manifest | None, Manifest | None],
) -> StageDifference:
    outputs = [{} if m is None else {record.path: record for record in m.outputs} for m in manifests]
    left_rows, right_rows = (sum(record.rows or 0 for record in side.values()) for side in outputs)
    left_bytes, right_bytes = (sum(record.bytes for record in side.values()) for side in outputs)
    rows, sizes = (left_rows, right_rows), (left_bytes, right_bytes)
    if manifests[0] is None or manifests[1] is None:
        return StageDifference(key.label, "right only" if manifests[0] is None else "left only", rows, sizes, [])
    files = []
    explained = False
    for path in sorted({*outputs[0], *outputs[1]}):
        left, right = outputs[0].get(path), outputs[1].get(path)
        if left and right and left.sha256 == right.sha256:
            continue
        first = None
        # The first shard that differs tells where a table begins to; reading the others would tell nothing new.
        if left and right and path.endswith(".parquet") and not explained:
            explained, first = True, _first(stores, configs, key, path)
        files.append(FileDifference(path, _side(left), _side(right), first))
    return StageDifference(key.label, "different" if files else "equal", rows, sizes, files)


def _side(record: FileRecord | None) -> dict[str, Any] | None:
    return None if record is None else {"rows": record.rows, "bytes": record.bytes, "sha256": record.sha256}


def _first(
    stores: tuple[RunStore, RunStore], configs: tuple[RunSettings, RunSettings], key: StageKey, path: str
) -> str | None:
    schemas = [stage_schema(config, key, path.rpartition("/")[2]) for config in configs]
    if schemas[0] is None or schemas[1] is None:
        return None
    if schemas[0].columns != schemas[1].columns:
        return "their columns have other types"
    try:
        tables = [
            store.read_part(store.folder / path, schema)
            for store, schema in zip(stores, schemas, strict=True)
            if schema
        ]
    except ArtifactError as error:
        return f"cannot be read: {error}"
    differing: dict[str, int] = {}
    for name in tables[0].column_names:
        row = first_difference(tables[0].column(name), tables[1].column(name))
        if row is not None:
            differing[name] = row
    if not differing:
        return "only in how the file was written: every row is equal"
    row = min(differing.values())
    names = [name for name, at in differing.items() if at == row]
    more = [name for name in differing if name not in names]
    return f"row {row}, column {', '.join(names)}" + (f"; later rows of {', '.join(more)}" if more else "")
