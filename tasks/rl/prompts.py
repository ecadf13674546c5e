"""Stage prompts of an RL run: those of the distillation run, split as there; or of sources of its own."""

from schemas.config import RLConfig
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.graph import PROMPTS
from tasks.prompts.fingerprint import sources_fingerprints
from tasks.prompts.table import write_prompts
from tasks.rl.start import source_run
from tasks.stage import StageJob


def run(job: StageJob[RLConfig]) -> None:
    """Write the prompts table.

    Raises:
        ArtifactError: the distillation run, or its prompts, are not there.
        PromptError: a source is missing, empty or has rows that cannot be used.
    """
    config = job.config
    if config.prompts is not None:
        write_prompts(job, config.prompts, config.prompts.split_by(config.seed))
        return
    for index, table in enumerate(source_run(config).store.iterate_table(PROMPTS, PROMPTS_TABLE)):
        job.store.write_table(job.store.part(job.key, index), table, PROMPTS_TABLE)


def source_fingerprints(config: RLConfig) -> dict[str, str]:
    """Return what stands for the content of the prompts.

    Raises:
        PromptError: a local file or a needed package is missing.
        ArtifactError: the distillation run, or its prompts, are not there.
    """
    if config.prompts is None:
        return {"run": source_run(config).store.finished(PROMPTS).outputs_fingerprint}
    return sources_fingerprints(config.prompts.sources)
