"""What stands for the content of prompt sources, so that a change in it is seen wherever they lie."""

from collections.abc import Sequence
from pathlib import Path

from schemas.config import DatasetSource, JsonlSource, ParquetSource, PromptSource, ReasoningGymSource
from schemas.manifest import hash_file, hash_json
from tasks.prompts.sources import existing_file, file_labels, local_dataset, reasoning_gym_version


def sources_fingerprints(sources: Sequence[PromptSource]) -> dict[str, str]:
    """Return what stands for the content of each source and for its name in the table, by its place in the config.

    Raises:
        PromptError: a local file or a needed package is missing.
    """
    labels = file_labels(sources)
    return {f"prompts.sources[{index}]": _fingerprint(source, labels) for index, source in enumerate(sources)}


def _fingerprint(source: PromptSource, labels: dict[Path, str]) -> str:
    match source:
        case JsonlSource() | ParquetSource():
            return hash_json([labels[Path(source.path)], hash_file(existing_file(source.path))])
        case DatasetSource():
            local = local_dataset(source)
            if local is None:
                return f"{source.dataset}@{source.revision or 'default'}"
            files = [local] if local.is_file() else sorted(path for path in local.rglob("*") if path.is_file())
            hashes = [[path.relative_to(local).as_posix(), hash_file(path)] for path in files]
            return hash_json([local.name, hashes])
        case ReasoningGymSource():
            return f"reasoning-gym=={reasoning_gym_version()}"
