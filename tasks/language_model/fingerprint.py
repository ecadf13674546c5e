"""Content fingerprints of model folders, quick enough to take at every start."""

import hashlib
from pathlib import Path

from schemas.manifest import hash_json

_WHOLE = 256 * 2**20
_BLOCK, _BLOCKS = 64 * 2**10, 256


def model_files(*, code: bool) -> list[str]:
    """Return the patterns of the files that a model is made of; with ``code`` of its Python files, too."""
    return ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", *(["*.py"] if code else [])]


def folder_fingerprint(folder: Path, gguf_file: str | None, *, code: bool = False) -> str:
    """Return a hash of a model folder's files, or of one GGUF file in it; with ``code`` of its Python files, too.

    Files up to 256 MiB are hashed whole; of larger ones the size and 256 blocks of 64 KiB spread over the file, which
    any training step changes.
    """
    patterns = model_files(code=code)
    names = [gguf_file] if gguf_file else sorted({p.name for pattern in patterns for p in folder.glob(pattern)})
    return hash_json([[name, _hash(folder / name)] for name in names])


def _hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        for index in range(_BLOCKS):
            file.seek((size - _BLOCK) * index // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()
