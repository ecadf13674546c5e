"""Models of the Hub: fetched into its cache, and found there again at the same commit. Imports no torch."""

from pathlib import Path

from schemas.errors import ModelError
from tasks.language_model.fingerprint import folder_fingerprint, model_files


def fetch(name: str, revision: str | None, key: str, *, trust_remote_code: bool) -> Path:
    """Return a Hub model's folder in the Hub's cache, named by its commit; what is not there is downloaded.

    Args:
        name: Hub id.
        revision: Branch, tag or commit; None: the default branch.
        key: The config key, for errors.
        trust_remote_code: Whether to fetch code, too.

    Raises:
        ModelError: the Hub has no such model, or is out of reach.
    """
    from huggingface_hub import snapshot_download

    patterns = model_files(code=trust_remote_code)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(f"{key}: {name}: not a local folder, and the Hub could not provide it: {error}") from error
    # Where the Hub is out of reach its client settles for what the cache has, which may be links to nothing.
    dangling = [path for pattern in patterns for path in folder.glob(pattern) if not path.exists()]
    if dangling:
        raise ModelError(
            f"{key}: {name}: the Hub's cache has lost the content of {dangling[0]}, and the Hub could not provide it: "
            "run the same command again where the Hub can be reached"
        )
    return folder


def find_or_fetch(name: str, commit: str, version: str, key: str, *, trust_remote_code: bool) -> Path:
    """Return the folder of a model that was fetched before, on this machine or another; asks the Hub only if need be.

    Args:
        name: Hub id.
        commit: Of the model.
        version: Beginning of its ``folder_fingerprint``: a download that was interrupted is gone on with.
        key: The config key, for errors.
        trust_remote_code: Whether to fetch code, too.

    Raises:
        ModelError: it is not here, and the Hub could not provide it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=commit, local_files_only=True))
    except LocalEntryNotFoundError:
        folder = None
    if folder is not None and _is_version(folder, version):
        return folder
    return fetch(name, commit, key, trust_remote_code=trust_remote_code)


def _is_version(folder: Path, version: str) -> bool:
    try:
        return folder_fingerprint(folder, None).startswith(version)
    except OSError:
        # A snapshot is links, and what they lead to may have been cleared away.
        return False
