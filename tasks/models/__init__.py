"""Stage models: check that teacher and student fit each other and the prompts, and make both loadable."""

from pathlib import Path

from schemas.config import RunConfig
from schemas.errors import ModelError
from schemas.manifest import hash_json
from tasks.language_model.fingerprint import folder_fingerprint
from tasks.language_model.sources import find_source
from tasks.stage import StageJob


def source_fingerprints(config: RunConfig) -> dict[str, str]:
    """Return what stands for the content of both models: of local files their bytes, of a Hub id its name.

    Raises:
        ModelError: a local model is not there, or the chat template cannot be read.
    """
    prints = {}
    for key, own in (("teacher", config.teacher), ("student", config.student)):
        if own.model is None:
            continue
        source = find_source(own.model, f"{key}.model")
        if source.folder is None:
            prints[key] = hash_json([own.model, own.revision])
        else:
            prints[key] = folder_fingerprint(source.folder, source.gguf_file, code=own.trust_remote_code)
    if config.student.chat_template is not None:
        prints["chat_template"] = hash_json(read_template(config.student.chat_template))
    return prints


def read_template(path: str) -> str:
    """Return the text of `student.chat_template`.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"student.chat_template: {path}: cannot be read: {error}") from None


def run(job: StageJob) -> None:
    """Resolve the teacher, write the student the run starts from, and check both against the prompts.

    Everything that tokenizers and configs can tell is checked before any weights load.

    Raises:
        ModelError: a model is missing, has no chat template, or cannot be pruned as asked.
        TokenizerMismatchError: teacher and student number their tokens differently.
        PromptError: a prompt leaves no room for a reply.
        ConfigError: a package that training will need is not installed.
    """
    from tasks.models.stage import resolve_models

    resolve_models(job)
