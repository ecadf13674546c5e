"""The command `npd compare`."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import typer

from flows.terminal import Terminal


def compare(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file of a comparison.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change the comparison: key.sub=value, for example seeds=[0,1] or 'set={train.kd_weight: 0.5}'.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="METHOD", help="Run this method alone, and what it needs. May be repeated."),
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Runs at a time.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log too.")] = False,
) -> None:
    """Compare the methods of CONFIG, or continue: every run that is done stays.

    All methods start from one warmed-up student. Each is tried at every learning rate with the first seed, then run at
    its best with all seeds; then GRPO continues the students that `rl` names. Results go to ROOT/NAME: comparison.md,
    comparison.parquet, comparison_runs.parquet, and report.html to look at.
    """
    from flows.comparison_progress import RunsDisplay, listening_to_runs
    from flows.stage_process import fork_server
    from flows.watch import run_flow
    from schemas.config import load_comparison
    from schemas.run_store import REPORT_NAME
    from tasks.comparison.outcome import process_modules

    comparison, base = load_comparison(config, overrides)
    fork_server(process_modules(comparison, base))
    console = Terminal()

    def load() -> Callable[[], object]:
        from flows.compare import npd_compare

        return partial(npd_compare, config, overrides, only, workers)

    with RunsDisplay(console) as display, listening_to_runs(display):
        run_flow(load, verbose)
    for name in ("comparison.md", REPORT_NAME):
        console.print(f"{comparison.folder}/{name}", soft_wrap=True)
