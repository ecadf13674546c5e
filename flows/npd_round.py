"""The flow `npd-round`: Near-Policy Distillation, round after round."""

from dataclasses import asdict
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run

from flows.configs import read_config
from flows.figures import publish_figures
from flows.process import cancelled_by_errors
from flows.progress import artifact_key, if_server_answers
from flows.stage_tasks import (
    baseline,
    evaluate,
    export,
    filter,
    generate,
    models,
    pack,
    prompts,
    reference,
    score,
    train,
)
from flows.summary import round_rows, summarize, summary_markdown
from schemas.config import RunConfig
from schemas.errors import NPDError
from schemas.manifest import Manifest
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP
from tasks.graph import samples
from tasks.report import write_report
from tasks.report.findings import read_findings
from tasks.report.images import figures_markdown
from tasks.report.page import sections_of


def _run_name() -> str:
    parameters = flow_run.parameters
    try:
        return read_config(parameters["config"], parameters["overrides"]).name
    except NPDError:
        # The flow itself is about to say what is wrong.
        return str(parameters["config"])


@flow(name="npd-round", flow_run_name=_run_name, persist_result=False)
def npd_round(config: str = "configs/quickstart.yaml", overrides: list[str] | None = None) -> dict[str, Any]:
    """Run Near-Policy Distillation, or continue it where it stopped.

    Args:
        config: Path of a YAML config, or a run's folder to continue with the config it last ran with.
        overrides: Changes to the config, each `key.sub=value`, for example `train.kd_weight=0.5`.

    Returns:
        The run's summary: where it is, and of every round its metrics, what was kept and dropped, tokens and seconds.

    Raises:
        RunLockedError: another process works on this run.
        NPDError: the config is wrong, or a stage failed.
    """
    settings = read_config(config, overrides)
    store = RunStore.at(settings)
    with store.lock.held():
        store.record_config(settings)
        run = (store, settings)

        prompts(*run)
        models(*run)
        reference(*run)
        baseline(*run)

        if settings.warmup is not None:
            pack(*run, round=WARMUP)
            train(*run, round=WARMUP)
            export(*run, round=WARMUP)
        evaluate(*run, round=WARMUP)
        publish_round(store, settings, WARMUP)

        ahead = SamplingAhead(store, settings)
        with cancelled_by_errors():
            for index in range(settings.rounds):
                if samples(settings, index):
                    if not ahead.finish(index):
                        generate(*run, round=index)
                        score(*run, round=index)
                    filter(*run, round=index)
                    pack(*run, round=index)
                ahead.start(index + 1)
                train(*run, round=index)
                export(*run, round=index)
                evaluate(*run, round=index)
                publish_round(store, settings, index)

        write_report(store)
        return asdict(summarize(store, settings))


class SamplingAhead:
    """Samples and scores a round while the one before it trains (`overlap`)."""

    def __init__(self, store: RunStore, config: RunConfig) -> None:
        self._store, self._config = store, config
        self._begun: dict[int, list[PrefectFuture[Manifest]]] = {}

    def start(self, index: int) -> None:
        """Begin to sample round ``index`` and score it, if the config wants that and the round samples at all."""
        if not self._config.overlap or index >= self._config.rounds or not samples(self._config, index):
            return
        run = (self._store, self._config)
        generated = generate.submit(*run, round=index)
        self._begun[index] = [generated, score.submit(*run, round=index, wait_for=[generated])]

    def finish(self, index: int) -> bool:
        """Wait until round ``index`` is scored; return False if nobody began it.

        Raises:
            NPDError: what went wrong in stage generate or score.
        """
        futures = self._begun.pop(index, [])
        for future in futures:
            future.result()
        return bool(futures)


def publish_round(store: RunStore, config: RunConfig, index: int) -> None:
    """Publish a round's table, and the run so far as Markdown and figures, where Prefect's UI shows them."""
    # Later rounds may still lie there from before what made this one run again, damaged or of other settings.
    summary, sections = summarize(store, config, through=index), sections_of(read_findings(store, through=index))
    name = "warm-up" if index == WARMUP else f"round-{index}"
    with if_server_answers(get_run_logger()):
        create_table_artifact(
            round_rows(summary, index),
            key=artifact_key(config.name, name, "table"),
            description=f"{config.name}, {name}: held-out metrics, and what was kept and dropped",
        )
        create_markdown_artifact(
            summary_markdown(summary),
            key=artifact_key(config.name, name, "summary"),
            description=f"{config.name} up to {name}",
        )
        create_markdown_artifact(
            figures_markdown(config.name, sections),
            key=artifact_key(config.name, name, "figures"),
            description=f"{config.name} up to {name}: the numbers of its figures",
        )
        figures = [figure for section in sections for figure in section.figures]
        if index < config.rounds - 1:
            # Those of the run so far would be replaced by the next round's.
            figures = [figure for figure in figures if figure.round == index]
        publish_figures(config.name, figures)
