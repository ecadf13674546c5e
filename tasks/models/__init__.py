"""Stage models: check that teacher and student fit each other and the prompts, and make both loadable."""

from pathlib import Path

from schemas.config import RunConfig
from schemas.manifest import hash_json
from tasks.language_model.sources import find_source
from tasks.models.fingerprint import folder_fingerprint
from tasks.stage import StageJob


def source_fingerprints(config: RunConfig) -> dict[str, str]:
    """Return what stands for the content of both models: of local files their bytes, of a Hub id its name.

    Raises:
        ModelError: a local model is not there.
    """
    prints = {}
    for key, model, revision in (
        ("teacher", config.teacher.model, config.teacher.revision),
        ("student", config.student.model, config.student.revision),
    ):
        if model is None:
            continue
        source = find_source(model, f"{key}.model")
        local = None if source.folder is None else folder_fingerprint(source.folder, source.gguf_file)
        prints[key] = local or hash_json([model, revision])
    if config.student.chat_template is not None and Path(config.student.chat_template).is_file():
        prints["chat_template"] = hash_json(Path(config.student.chat_template).read_text(encoding="utf-8"))
    return prints


def run(job: StageJob) -> None:
    """Resolve the teacher, write the student the run starts from, and check both against the prompts.

    Everything that tokenizers and configs can tell is checked before any weights load.

    Raises:
        ModelError: a model is missing, has no chat template, or cannot be pruned as asked.
        TokenizerMismatchError: teacher and student number their tokens differently.
        PromptError: a prompt leaves no room for a reply.
    """
    from tasks.models.stage import resolve_models

    resolve_models(job)
