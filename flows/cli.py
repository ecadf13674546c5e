"""The command line, `npd`: a command each to run, compare, continue, look at, check and tidy up runs."""

import signal
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from flows import audit_commands
from flows.audit_commands import RunArgument
from flows.compare_command import compare
from flows.terminal import Terminal
from flows.watch import ended_by
from schemas.errors import NPDError
from tasks.quick_exit import QuickExit

_EPILOG = (
    "Exit codes: 0 done; 1 a stage failed (verify: something does not hold; diff: the runs differ); 2 wrong input, "
    "config or arguments, or another process works on the run; 130 interrupted, 143 ended by SIGTERM. "
    "A run that failed or was interrupted continues where it stopped when the same command is called again."
)


class _Group(TyperGroup):
    """Turns the errors a user can act on into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            # A library in the middle of something may have made another error of what the signal raised.
            if isinstance(error, KeyboardInterrupt) or ended_by:
                Terminal(stderr=True).print("interrupted; the same command continues where it stopped", soft_wrap=True)
                raise typer.Exit(128 + (ended_by or [signal.SIGINT])[0]) from None
            if not isinstance(error, NPDError):
                raise
            message = Text.assemble(("error: ", "bold red"), str(error))
            Terminal(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(error.exit_code) from None


app = typer.Typer(
    name="npd",
    cls=_Group,
    help="Near-Policy Distillation: a student learns from its own samples, annotated by a teacher, round after round.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _changes(example: str) -> Any:
    return typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=f"Change the config: key.sub=value, the value as YAML, for example {example}. A mapping changes the keys "
        "it names alone. May be repeated. `npd config` lists every key.",
    )


Overrides = Annotated[list[str] | None, _changes("train.kd_weight=0.5")]
RLOverrides = Annotated[list[str] | None, _changes("grpo.steps=100")]
Round = Annotated[int | None, typer.Option("--round", help="Which round, from 0; -1 is the warm-up.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log too.")]


@app.command(epilog=_EPILOG)
def run(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="A YAML config, or a run's folder to continue it as it last ran."),
    ],
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Run the loop of CONFIG, or continue it: what is up to date is not done again.

    Prompts, models, reference, baseline, warm-up; then generate, score, filter, pack, train, export and evaluate, round
    after round. Files go to ROOT/NAME of the config. With PREFECT_API_URL set, the run shows up on that Prefect server.
    """
    from flows.configs import read_config
    from flows.states import check_sources

    settings = read_config(config, overrides)
    check_sources(settings)

    def load() -> Callable[[], object]:
        from flows.npd_round import npd_round

        return partial(npd_round, config, overrides)

    from flows.display import print_summary
    from flows.stage_process import fork_server
    from flows.summary import summarize
    from schemas.run_store import RunStore
    from tasks.graph import loop

    if RunStore.at(settings).manifest(loop(settings)[-1]) is None:
        # There is work to do: the stages' libraries are imported while Prefect starts.
        fork_server()
    console = Terminal()
    _watch(console, load, verbose)

    print_summary(console, summarize(RunStore.at(settings), settings))


@app.command(epilog=_EPILOG)
def join(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The config of the run, or the run's folder.")],
    machine: Annotated[int, typer.Option("--machine", min=1, help="Which of `train.launch.machines` this one is.")],
    overrides: Overrides = None,
) -> None:
    """Let this machine take part in the training of a run that `npd run` runs on another, until it is ended.

    CONFIG says how many machines there are and where the first one is (`train.launch`). All see the run's folder, the
    models and this installation under the same paths.
    """
    from flows.configs import read_config
    from flows.join import join_training
    from flows.watch import answer_signals

    settings, console = read_config(config, overrides), Terminal()
    answer_signals()
    join_training(settings, machine, lambda text: _say(console, text))


@app.command(epilog=_EPILOG)
def rl(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="A YAML config, or an RL run's folder to continue it as it last ran."),
    ],
    overrides: RLOverrides = None,
    verbose: Verbose = False,
) -> None:
    """Continue a student with RL: GRPO whose rewards are what the prompts' verifiers say.

    Held-out accuracy before, training, held-out accuracy after. Files go to ROOT/NAME of the config; what is up to date
    is not done again.
    """
    from flows.configs import read_as
    from flows.display import print_rl_summary
    from flows.rl_summary import summarize_rl
    from flows.stage_process import fork_server
    from schemas.config import RLConfig
    from schemas.run_store import RunStore
    from tasks.rl.graph import EVALUATE
    from tasks.rl.start import check_start

    settings = read_as(RLConfig, config, overrides)
    check_start(settings)
    store = RunStore.at(settings)

    def load() -> Callable[[], object]:
        from flows.rl import npd_rl

        return partial(npd_rl, config, overrides)

    if store.manifest(EVALUATE) is None:
        # There is work to do: the stages' libraries are imported while Prefect starts.
        fork_server()
    console = Terminal()
    _watch(console, load, verbose)

    print_rl_summary(console, summarize_rl(store, settings))


@app.command(epilog=_EPILOG)
def status(run: RunArgument) -> None:
    """Show how every stage of RUN stands, and what the rounds have come to."""
    from flows.display import print_rl_summary, print_states, print_summary
    from flows.rl_summary import summarize_rl
    from flows.states import stage_states
    from flows.summary import summarize
    from schemas.config import RLConfig, RunConfig
    from schemas.run_store import RunStore

    store = RunStore.open(run)
    config = store.settings
    console = Terminal()
    print_states(console, store, stage_states(store, config))
    if isinstance(config, RLConfig):
        continued = summarize_rl(store, config)
        if continued.before:
            print_rl_summary(console, continued)
        return
    assert isinstance(config, RunConfig)
    summary = summarize(store, config)
    if summary.rounds:
        print_summary(console, summary)


@app.command(epilog=_EPILOG)
def rerun(
    run: RunArgument,
    stage: Annotated[
        str,
        typer.Option(
            "--stage",
            help="prompts, models, reference, baseline, generate, score, filter, pack, train, export or evaluate; of "
            "an RL run prompts, baseline, rl or evaluate.",
        ),
    ],
    round_index: Round = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would follow.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run one stage of one round of RUN again, from its start, with the config RUN last ran with.

    RUN is of either kind. Stages before it must be up to date. The result there was is kept until `npd gc`. Stages
    after it stay as they are; those that no longer match run again at the next `npd run RUN` (`npd rl RUN`). Settings
    given with --set are kept by the run.
    """
    from flows.configs import recorded_config
    from flows.states import command_of, outdated_after, stage_key, upstream_problem
    from schemas.errors import ArtifactError
    from schemas.run_store import RunStore
    from tasks.stage import downstream

    store = RunStore.open(run)
    config = recorded_config(store, overrides)
    key = stage_key(config, stage, round_index)
    problem = upstream_problem(store, config, key)
    if problem is not None:
        raise ArtifactError(problem)
    console = Terminal()
    after = [other.label for other in downstream(config, key) if store.manifest(other) is not None]
    will = "would run" if dry_run else "runs"
    _say(console, f"{key.label} {will} again; finished stages that read it: {', '.join(after) or 'none'}")
    if dry_run:
        return

    def load() -> Callable[[], object]:
        from flows.npd_stage import npd_stage

        return partial(npd_stage, run, stage, round_index, overrides)

    _watch(console, load, verbose)
    outdated = [other.label for other in outdated_after(store, config, key)]
    if outdated:
        _say(console, f"out of date now: {', '.join(outdated)}; `{command_of(config)} {run}` runs them again")
    else:
        _say(console, "every later stage still matches")


@app.command(epilog=_EPILOG)
def inspect(
    run: RunArgument,
    stage: Annotated[str | None, typer.Option("--stage", help="Which stage; none: a list of all.")] = None,
    round_index: Round = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Rows to show of each table.")] = 5,
) -> None:
    """Show what RUN holds: its stages with rows, bytes and seconds; or one stage's manifest, schemas and first rows."""
    from flows.inspection import print_stage, print_tree
    from flows.states import stage_key
    from schemas.errors import ConfigError
    from schemas.run_store import RunStore

    store = RunStore.open(run)
    if stage is None:
        if round_index is not None:
            raise ConfigError("--round needs --stage: which stage of that round?")
        print_tree(Terminal(), store)
    else:
        print_stage(Terminal(), store, stage_key(store.settings, stage, round_index), rows)


@app.command(epilog=_EPILOG)
def gc(
    run: RunArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Delete what RUN keeps of stages that ran again: their earlier results, under superseded/."""
    from schemas.run_store import RunStore
    from tasks.report.text import bytes_text

    store = RunStore.open(run)
    with store.lock.held():
        found = store.superseded()
        if not dry_run:
            store.drop_superseded()
    size = bytes_text(sum(size for _, size in found))
    console = Terminal()
    for folder in sorted({name.rpartition("/")[0] for name, _ in found}):
        _say(console, folder)
    _say(console, f"{len(found):,} files, {size}: {'would be deleted' if dry_run else 'deleted'}")


@app.command(epilog=_EPILOG)
def config() -> None:
    """Print every config key with its default and meaning, as Markdown."""
    from schemas.config import fields_markdown

    typer.echo(fields_markdown(), nl=False)


def _say(console: Terminal, text: str) -> None:
    console.print(text, soft_wrap=True)


def _watch(console: Console, load: Callable[[], Callable[[], object]], verbose: bool) -> None:
    """Run a flow with a display of its stages."""
    from flows.display import make_display
    from flows.progress import listening
    from flows.watch import run_flow

    with make_display(console) as display, listening(display):
        run_flow(load, verbose)


for _command in (
    compare,
    audit_commands.verify,
    audit_commands.trace,
    audit_commands.diff,
    audit_commands.report,
):
    app.command(epilog=_EPILOG)(_command)


def main() -> None:
    """Entry point of the `npd` command."""
    leaving = QuickExit()
    try:
        app()
    except SystemExit as ended:
        leaving.code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise


if __name__ == "__main__":
    main()
