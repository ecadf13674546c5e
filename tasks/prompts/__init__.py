"""Stage prompts: every source's rows become one table of distinct prompts, split into train and held-out."""

from schemas.config import RunConfig
from tasks.prompts.fingerprint import sources_fingerprints
from tasks.prompts.table import write_prompts
from tasks.stage import StageJob

__all__ = ["run", "source_fingerprints"]


def run(job: StageJob) -> None:
    """Read all sources and write the prompts table.

    Raises:
        PromptError: a source is missing, empty or has rows that cannot be used, or nothing is left to train on.
    """
    write_prompts(job, job.config.prompts, job.config.split_seed)


def source_fingerprints(config: RunConfig) -> dict[str, str]:
    """Return what stands for the content of each source, by its place in the config.

    Local files count by their bytes, Hub datasets by id and revision, procedural tasks by the version of their
    package.

    Raises:
        PromptError: a local file or a needed package is missing.
    """
    return sources_fingerprints(config.prompts.sources)
