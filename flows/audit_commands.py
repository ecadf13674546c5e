"""The commands that look at a run without changing its results: `npd verify`, `trace`, `diff`, `report`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.terminal import Terminal
from schemas.untrusted_text import one_line

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Folder or URL of a run, for example runs/quickstart or s3://bucket/runs/x."),
]


def verify(
    run: RunArgument,
    all_breaks: Annotated[bool, typer.Option("--all", help="List every broken link, not only the first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check that everything RUN holds is whole and fits together, from prompts to exported weights.

    Hashes every file again; checks every table against its schema; follows every stage's inputs, every id, every packed
    token back to its sample, score, prompt and the weights that sampled it, and every reason in the ledger to its
    bounds. Of a run that is not finished it checks what is there. Prompt files and models outside the run are only
    noted where they have changed. Changes nothing. Exit codes: 0 if all that is there holds, else 1.
    """
    from flows.audit import WatchLine, print_report, report_dict
    from flows.summary import display_place
    from schemas.run_store import RunStore
    from tasks.audit.verify import verify as verify_run

    store = RunStore(run)
    with WatchLine(Terminal(stderr=True)) as watch:
        report = verify_run(store, watch)
    if as_json:
        _print_json(report_dict(report))
    else:
        print_report(Terminal(), display_place(store), report, all_breaks=all_breaks)
    if not report.holds:
        raise typer.Exit(1)


def trace(
    run: RunArgument,
    sample: Annotated[str | None, typer.Option("--sample", metavar="ID", help="A sample's id.")] = None,
    round_index: Annotated[int | None, typer.Option("--round", help="The round of --pack; -1 is the warm-up.")] = None,
    pack: Annotated[int | None, typer.Option("--pack", metavar="P", help="A pack's id, from 0.")] = None,
    token: Annotated[int | None, typer.Option("--token", metavar="T", help="Place in the pack, from 0.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell one sample's whole life, from its prompt to the export that learned from it.

    Who sampled it, its response and scores, why it was kept or not, where it is packed, and which optimizer steps
    trained on it. With --round, --pack and --token go back from a token of a pack: its text, label and targets, and
    its sample's life.
    """
    from flows.audit import print_life
    from schemas.errors import ConfigError
    from schemas.run_store import RunStore
    from tasks.audit.trace import trace_sample, trace_token

    places = (round_index, pack, token)
    if (sample is None) == (None in places) or (sample is not None and places != (None, None, None)):
        raise ConfigError("give either --sample ID, or --round R --pack P --token T")
    store = RunStore.open(run)
    if sample is not None:
        life = trace_sample(store, sample)
    else:
        assert round_index is not None and pack is not None and token is not None  # noqa: PT018
        life = trace_token(store, round_index, pack, token)
    if as_json:
        _print_json(life)
    else:
        print_life(Terminal(), life)


def diff(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help="Folder or URL of a run.")],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="Folder or URL of another.")],
    as_json: AsJson = False,
) -> None:
    """Say in what two runs differ: settings, package versions, and what each stage wrote.

    Both are distillation runs, or both RL runs. Settings that say only where, in what portions or how visibly work runs
    are shown and do not count. Exit codes: 0 if the runs are equal, 1 if they differ.
    """
    from flows.audit import print_difference
    from flows.summary import display_place
    from schemas.run_store import RunStore
    from tasks.audit.diff import compare_runs

    left, right = RunStore.open(run_a), RunStore.open(run_b)
    found = compare_runs(left, right)
    if as_json:
        _print_json(found.as_dict())
    else:
        print_difference(Terminal(), display_place(left), display_place(right), found)
    if not found.equal:
        raise typer.Exit(1)


def report(
    run: RunArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", dir_okay=False, help="Write there instead of RUN/report.html."),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write what RUN has come to as one page to look at, RUN/report.html, and print where it lies.

    Held-out metrics, delta-IFD and its zones, samples to read, packs, training, cost and lineage, of what is there so
    far; of an RL run, held-out answers before and after and its training. The page holds everything it shows, loads
    nothing and runs no script. `npd run` and `npd rl` write it at their end.
    """
    import webbrowser

    from schemas.local_files import storage_errors, writing_file
    from schemas.run_store import REPORT_NAME, RunStore
    from tasks.report import run_report, write_report

    store = RunStore.open(run)
    if output is None:
        place, local = write_report(store), store.folder / REPORT_NAME
    else:
        place, local = str(output), output.absolute()
        with storage_errors(place), writing_file(local) as temporary:
            temporary.write_text(run_report(store), encoding="utf-8")
    typer.echo(one_line(place))
    if open_it:
        webbrowser.open(local.as_uri())


def _print_json(values: Any) -> None:
    # ASCII only, so that nothing in a text reaches the terminal as a control character; NaN is no JSON.
    typer.echo(json.dumps(_finite(values), indent=2, ensure_ascii=True, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(child) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value
