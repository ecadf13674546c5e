"""The flow `npd-compare`: methods against each other, from one warmed-up student."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from pydantic import Field

from flows.comparison_progress import current_runs_listener
from flows.comparison_worker import Worker, lenders, stands
from flows.figures import publish_figures
from flows.process import cancelled_by_errors
from flows.progress import artifact_key, if_server_answers
from flows.stage_process import fork_server
from schemas.comparison_tables import COMPARISON, COMPARISON_RUNS
from schemas.config import (
    BASE,
    ComparisonConfig,
    RLConfig,
    RunConfig,
    RunSettings,
    continuation_config,
    load_comparison,
    method_config,
)
from schemas.errors import DivergedError, NPDError, StageError
from schemas.local_files import storage_errors, writing_file
from schemas.run_store import REPORT_NAME, RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.table_files import write_parquet
from tasks.comparison.landmarks import read_landmarks
from tasks.comparison.outcome import (
    Outcome,
    Scores,
    base_stages,
    continuation_label,
    continuation_stages,
    method_stages,
    process_modules,
    read_outcome,
    read_scores,
    step_prompts,
    validation_prompts,
)
from tasks.comparison.table import (
    MethodRuns,
    best_rate,
    comparison_markdown,
    comparison_table,
    end_of_grid,
    runs_table,
)
from tasks.cores import available_cores
from tasks.graph import initial_policy
from tasks.language_model.sources import exported_folder
from tasks.report.comparison import comparison_figures, comparison_html
from tasks.rl.graph import EVALUATE


def _flow_run_name() -> str:
    return Path(flow_run.parameters["config"]).stem


@flow(name="npd-compare", flow_run_name=_flow_run_name, persist_result=False)
def npd_compare(
    config: str,
    overrides: list[str] | None = None,
    only: list[str] | None = None,
    workers: Annotated[int, Field(ge=1)] | None = None,
) -> dict[str, Any]:
    """Run a comparison, or continue it where it stopped: runs that are done stay.

    First the run that all methods start from, then every method at every learning rate with the first seed, then every
    method at its best rate with all seeds; then GRPO from the students that `rl` names. Then the tables
    `comparison.parquet` and `comparison_runs.parquet`, `comparison.md` and `report.html`.

    Args:
        config: Path of a comparison's YAML file.
        overrides: Changes to it, each `key.sub=value`.
        only: Run these methods alone (and those whose rates they take); the tables hold whatever is done.
        workers: Runs at a time; none: as the config says.

    Returns:
        Where the comparison is, how many runs it has, and each method's accuracy.

    Raises:
        ConfigError: the comparison, the run or a method is configured wrong.
        RunLockedError: another process works on this comparison.
        StageError: runs failed, after all others have been made; names them and their logs.
    """
    comparison, base = load_comparison(config, overrides)
    store = RunStore.at(base)
    fork_server(process_modules(comparison, base))
    with store.lock.held(), cancelled_by_errors():
        methods, folder = comparison.methods_for(only), Path(config).parent
        work = Work(comparison, base, store, methods, workers or comparison.workers, folder)
        work.run_base()
        work.tune()
        work.run_seeds()
        work.continue_with_rl()
        table = work.publish()
        work.require_all_done()
    accuracies = dict(zip(table.column("method").to_pylist(), table.column("accuracy").to_pylist(), strict=True))
    return {"folder": comparison.folder, "runs": len(work.outcomes), "accuracy": accuracies}


@dataclass(frozen=True)
class MethodRun:
    """One run of a method."""

    method: str
    rate: float
    seed: int

    @property
    def label(self) -> str:
        """Name for people.

        >>> MethodRun("npd", 1e-4, 3).label
        'npd · lr 0.0001 · seed 3'
        """
        return f"{self.method} · lr {self.rate:g} · seed {self.seed}"


@dataclass
class Work:
    """A comparison at work.

    Args:
        comparison: What to do.
        base: The run all methods start from.
        store: Its files; held.
        methods: The methods to run; of the others the tables show what is done.
        workers: Runs at a time.
        folder: Of the comparison's file.
        outcomes: Of the runs that are done.
        continued: Scores of students after GRPO, by the run they come from.
        failures: What went wrong in the others, by label.
        rates: Learning rate of each method that has one.
        validation: Held-out prompts that learning rates are chosen on, once the base has run.
        prompts_per_step: Of on-policy training, once NPD has run where that is its measure; None: as a method sets it.
    """

    comparison: ComparisonConfig
    base: RunConfig
    store: RunStore
    methods: list[str]
    workers: int
    folder: Path
    outcomes: dict[MethodRun, Outcome] = field(default_factory=dict)
    continued: dict[MethodRun, Scores] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    validation: frozenset[str] = frozenset()
    prompts_per_step: int | None = None

    def __post_init__(self) -> None:
        threads = self.base.devices.cpu_threads or max(1, available_cores() // self.workers)
        self._worker = Worker(threading.BoundedSemaphore(self.workers), threads, current_runs_listener())
        tuned = [name for name in self.methods if self.comparison.methods[name].rate_of is None]
        total = 1 + sum(len(self.comparison.rates_of(name)) - 1 for name in tuned)
        for name in self.methods:
            total += len(self.comparison.seeds_of(name)) + len(self.comparison.rl_seeds_of(name))
        if self._worker.listener is not None:
            self._worker.listener.planned(total)

    # -- the phases ------------------------------------------------------------------------------------------------

    def run_base(self) -> None:
        """Bring the run that all methods start from to its warmed-up student."""
        self.store.record_config(self.base)
        near = lenders(self.store, self.base.seed, self.comparison.folder)
        self._worker.settle(self.store, self.base, BASE, base_stages(self.base), near)
        student = read_scores(self.store, StageKey("evaluate", WARMUP), "student")
        self.validation = validation_prompts(student.prompt_ids, self.comparison.validation)

    def tune(self) -> None:
        """Run every method at every rate with the first seed, and choose; a rate at which it diverges is not chosen.

        What on-policy training takes as a step is known once NPD has run, so it comes second.
        """
        logger = get_run_logger()
        for late in (False, True):
            names = [name for name in self.comparison.methods if self.comparison.measures_steps(name) == late]
            tuned = [name for name in names if self.comparison.methods[name].rate_of is None]
            seed = self.comparison.seeds[0]
            diverged = self._run([MethodRun(n, rate, seed) for n in tuned for rate in self.comparison.rates_of(n)])
            for name in tuned:
                found = {run.rate: o for run, o in self.outcomes.items() if run.method == name and run.seed == seed}
                told = {run.label: message for run, message in diverged.items() if run.method == name}
                if found:
                    self.rates[name] = best_rate(found, self.validation)
                    for label, message in told.items():
                        logger.warning("%s: diverged, so another rate is chosen: %s", label, message)
                    if (end := end_of_grid(self.rates[name], self.comparison.rates_of(name))) is not None:
                        logger.warning("%s: best at the %s rate tried; widen `learning_rates` to be sure", name, end)
                else:
                    self.failures |= told
            if not late and any(self.comparison.measures_steps(name) for name in self.comparison.methods):
                self._measure_steps()

    def run_seeds(self) -> None:
        """Run every method at its rate with all its seeds."""
        for name in self.comparison.methods:
            other = self.comparison.methods[name].rate_of
            if other is not None and other in self.rates:
                self.rates[name] = self.rates[other]
        diverged = self._run(
            [
                MethodRun(name, self.rates[name], seed)
                for name in self.comparison.methods
                if name in self.rates
                for seed in self.comparison.seeds_of(name)
            ]
        )
        self.failures |= {run.label: message for run, message in diverged.items()}

    def continue_with_rl(self) -> None:
        """Continue the students of the chosen runs with GRPO, all with the same budget."""
        futures: dict[MethodRun, PrefectFuture[Scores]] = {}
        for run in self.outcomes:
            if run.rate != self.rates.get(run.method) or run.seed not in self.comparison.rl_seeds_of(run.method):
                continue
            store = RunStore.at(self._config(run))
            config = continuation_config(self.comparison, self.base, run.method, seed=run.seed, run=store.url)
            label = continuation_label(run.method, run.seed)
            if run.method not in self.methods:
                if _is_done(config, continuation_stages()):
                    self.continued[run] = read_scores(RunStore.at(config), EVALUATE, "rl")
                continue
            futures[run] = continuation.with_options(task_run_name=label).submit(config, label, self._worker)
        for run, future in futures.items():
            try:
                self.continued[run] = future.result()
            except NPDError as error:
                self.failures[continuation_label(run.method, run.seed)] = str(error)

    def publish(self) -> pa.Table:
        """Write the tables and show them, of all methods whose runs are there; return table COMPARISON."""
        runs = {}
        for name, rate in self.rates.items():
            tried = {(run.rate, run.seed): o for run, o in self.outcomes.items() if run.method == name}
            chosen = {seed: o for (at, seed), o in tried.items() if at == rate}
            if chosen:
                continued = {r.seed: s for r, s in self.continued.items() if (r.method, r.rate) == (name, rate)}
                runs[name] = MethodRuns(rate, chosen, tried, continued)
        table = comparison_table(self.comparison, runs, read_landmarks(self.store, self.base), self.validation)
        record = self.store.record()
        run_id = "" if record is None else record.run_id
        folder = Path(self.comparison.folder)
        tables = {
            "comparison": (table, COMPARISON),
            "comparison_runs": (runs_table(self.comparison, runs, self.validation), COMPARISON_RUNS),
        }
        markdown = comparison_markdown(table)
        with storage_errors(self.comparison.folder):
            for name, (rows, schema) in tables.items():
                with writing_file(folder / f"{name}.parquet") as temporary:
                    write_parquet(temporary, rows, schema, f"{name}.parquet", run_id=run_id, row_group_rows=4096)
            with writing_file(folder / "comparison.md") as temporary:
                temporary.write_text(f"# {self.comparison.name}\n\n{markdown}", encoding="utf-8")
            with writing_file(folder / REPORT_NAME) as temporary:
                temporary.write_text(comparison_html(table, self.comparison.name), encoding="utf-8")
        with if_server_answers(get_run_logger()):
            create_markdown_artifact(markdown, key=artifact_key(self.comparison.name, "comparison"))
            publish_figures(self.comparison.name, comparison_figures(table))
        return table

    def require_all_done(self) -> None:
        """Raise what went wrong.

        Raises:
            StageError: a run failed.
        """
        if self.failures:
            told = "\n".join(f"  {label}: {message}" for label, message in self.failures.items())
            raise StageError(
                f"{len(self.failures)} run(s) of {self.comparison.name} failed; the others are done, and the same "
                f"command tries these again:\n{told}"
            )

    # -- parts -----------------------------------------------------------------------------------------------------

    def _config(self, run: MethodRun) -> RunConfig:
        return method_config(
            self.comparison,
            self.base,
            run.method,
            folder=self.folder,
            rate=run.rate,
            seed=run.seed,
            student=str(self.store.fetch(exported_folder(self.store, initial_policy(self.base)))),
            prompts_per_step=self.prompts_per_step,
        )

    def _run(self, runs: list[MethodRun]) -> dict[MethodRun, str]:
        """Make these runs, so many at a time; what fails is noted. Of other methods those that are done are read.

        Returns:
            What is told of the runs that diverged, which are not noted among the failures.
        """
        record = self.store.record()
        assert record is not None, "the base has run"
        futures: dict[MethodRun, PrefectFuture[Outcome]] = {}
        diverged: dict[MethodRun, str] = {}
        for run in runs:
            if run in self.outcomes or run.label in self.failures or run.method in self.failures:
                continue
            if run.method not in self.methods:
                config = self._config(run)
                if _is_done(config, method_stages(config)):
                    self.outcomes[run] = read_outcome(RunStore.at(config), config)
                continue
            futures[run] = method_run.with_options(task_run_name=run.label).submit(
                self._config(run), run.label, self.comparison.folder, record.run_id, self._worker
            )
        for run, future in futures.items():
            try:
                self.outcomes[run] = future.result()
            except DivergedError as error:
                diverged[run] = str(error)
            except NPDError as error:
                self.failures[run.label] = str(error)
        return diverged

    def _measure_steps(self) -> None:
        done = [run for run in self.outcomes if run.method == self.comparison.npd]
        if done:
            config = self._config(min(done, key=lambda run: (run.seed, run.rate)))
            self.prompts_per_step = step_prompts(RunStore.at(config), config)
        else:
            for name in self.methods:
                if self.comparison.measures_steps(name):
                    self.failures[name] = f"waits for `{self.comparison.npd}`, whose steps it takes as its measure"


def _is_done(config: RunSettings, stages: Sequence[StageKey]) -> bool:
    """Say whether a run that is not made this time has done ``stages`` under ``config``; a damaged one has not."""
    try:
        return stands(RunStore.at(config), config, stages)
    except NPDError as error:
        get_run_logger().warning("%s: left out of the tables: %s", config.name, error)
        return False


@task(name="method run", cache_policy=NO_CACHE, persist_result=False, retries=0)
def method_run(config: RunConfig, label: str, comparison: str, run_id: str, worker: Worker) -> Outcome:
    """Make one run of a method, or continue it, and return what it came to.

    Args:
        config: The run's.
        label: Its name for people.
        comparison: Folder of the comparison.
        run_id: Of the run all methods start from: all are branches of it.
        worker: Makes runs.

    Raises:
        NPDError: a stage failed; names the log.
    """
    store = RunStore.at(config)
    with store.lock.held():
        store.record_config(config, run_id)
        worker.settle(store, config, label, method_stages(config), lenders(store, config.seed, comparison))
        return read_outcome(store, config)


@task(name="rl run", cache_policy=NO_CACHE, persist_result=False, retries=0)
def continuation(config: RLConfig, label: str, worker: Worker) -> Scores:
    """Continue one run's student with GRPO, or continue that, and return what it then scores.

    Args:
        config: The RL run's.
        label: Its name for people.
        worker: Makes runs.

    Raises:
        NPDError: a stage failed; names the log.
    """
    store = RunStore.at(config)
    with store.lock.held():
        store.record_config(config)
        worker.settle(store, config, label, continuation_stages())
        return read_scores(store, EVALUATE, "rl")
