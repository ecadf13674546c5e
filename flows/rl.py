"""The flow `npd-rl`: GRPO with verifiable rewards, from the student that a distillation run exported."""

from dataclasses import asdict
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run

from flows.configs import read_as
from flows.figures import publish_figures
from flows.progress import artifact_key, if_server_answers
from flows.rl_summary import rl_markdown, rl_rows, summarize_rl
from flows.stage_tasks import StageTask, stage_task
from schemas.config import RLConfig
from schemas.errors import NPDError
from schemas.run_store import RunStore
from tasks.report import write_report
from tasks.report.images import figures_markdown
from tasks.report.rl_findings import read_rl_findings
from tasks.report.rl_page import rl_sections_of

prompts = stage_task("prompts", "The prompts and the split of the distillation run.")
baseline = stage_task("baseline", "The start model answers the held-out prompts.")
rl = stage_task("rl", "GRPO on the train prompts; rewards are what their verifiers say.")
evaluate = stage_task("evaluate", "The trained model answers the held-out prompts.")

RL_TASKS: dict[str, StageTask] = {of_stage.name: of_stage for of_stage in (prompts, baseline, rl, evaluate)}
"""Every stage's task by the stage's name."""


def _run_name() -> str:
    parameters = flow_run.parameters
    try:
        return read_as(RLConfig, parameters["config"], parameters["overrides"]).name
    except NPDError:
        # The flow itself is about to say what is wrong.
        return str(parameters["config"])


@flow(name="npd-rl", flow_run_name=_run_name, persist_result=False)
def npd_rl(config: str = "configs/rl-quickstart.yaml", overrides: list[str] | None = None) -> dict[str, Any]:
    """Continue a student with RL, or continue that where it stopped.

    Args:
        config: Path of a YAML config, or an RL run's folder to continue with the config it last ran with.
        overrides: Changes to the config, each `key.sub=value`, for example `grpo.steps=100`.

    Returns:
        The run's summary: held-out accuracy before and after, the reward curve, tokens, seconds, and the model.

    Raises:
        RunLockedError: another process works on this run.
        NPDError: the config is wrong, or a stage failed.
    """
    settings = read_as(RLConfig, config, overrides)
    store = RunStore.at(settings)
    with store.lock.held():
        store.record_config(settings)
        run = (store, settings)

        prompts(*run)
        baseline(*run)
        rl(*run)
        evaluate(*run)
        publish(store, settings)

        write_report(store)
        return asdict(summarize_rl(store, settings))


def publish(store: RunStore, config: RLConfig) -> None:
    """Publish the run as a table, as Markdown and as figures, where Prefect's UI shows them."""
    summary, sections = summarize_rl(store, config), rl_sections_of(read_rl_findings(store, config))
    with if_server_answers(get_run_logger()):
        create_table_artifact(
            rl_rows(summary),
            key=artifact_key(config.name, "rl", "table"),
            description=f"{config.name}: held-out accuracy before and after, and the reward",
        )
        create_markdown_artifact(
            rl_markdown(summary), key=artifact_key(config.name, "rl", "summary"), description=f"{config.name}: RL"
        )
        create_markdown_artifact(
            figures_markdown(config.name, sections),
            key=artifact_key(config.name, "rl", "figures"),
            description=f"{config.name}: the numbers of its figures",
        )
        publish_figures(config.name, (figure for section in sections for figure in section.figures))
