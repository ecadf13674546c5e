"""What an RL run has come to, from its tables and manifests: the same numbers for terminal, Markdown and Prefect."""

from dataclasses import dataclass
from typing import Any

from flows.summary import METRIC_TITLES, TextTable, display_place, evaluation_metrics, metric_text
from schemas.config import RLConfig
from schemas.run_store import REPORT_NAME, RunStore
from schemas.tables import RESPONSE_METRICS
from schemas.untrusted_text import code_markdown, escape_markdown
from tasks.report.evaluation import Metric
from tasks.report.rl_findings import CurvePoint, read_curve
from tasks.report.text import duration_text, markdown_table
from tasks.rl.graph import BASELINE, EVALUATE, RL
from tasks.stage import standing


@dataclass(frozen=True)
class RLSummary:
    """An RL run as far as it has come.

    Args:
        name: The run's name.
        folder: Where it is.
        before: Held-out metrics of the start model, by name.
        after: Of the model that the run ends with.
        curve: The training's means, in order.
        tokens: Response tokens sampled to learn from.
        seconds: Seconds of work by stage.
        model: The trained model's folder.
        report: The report to look at, if it has been written.
    """

    name: str
    folder: str
    before: dict[str, Metric]
    after: dict[str, Metric]
    curve: list[CurvePoint]
    tokens: int
    seconds: dict[str, float]
    model: str | None
    report: str | None = None


def summarize_rl(store: RunStore, config: RLConfig) -> RLSummary:
    """Read the summary of an RL run from what stands of it (``standing``).

    Raises:
        ArtifactError: a manifest or table is damaged.
    """
    manifests = standing(store, config)
    trained = manifests.get(RL)
    return RLSummary(
        name=config.name,
        folder=display_place(store),
        before=evaluation_metrics(store, BASELINE)["start"] if BASELINE in manifests else {},
        after=evaluation_metrics(store, EVALUATE)["rl"] if EVALUATE in manifests else {},
        curve=[] if trained is None else read_curve(store),
        tokens=0 if trained is None else int(trained.counters["tokens"]),
        seconds={key.stage: float(manifest.counters["seconds"]) for key, manifest in manifests.items()},
        model=None if trained is None else f"{display_place(store)}/{RL.folder}/model",
        report=f"{display_place(store)}/{REPORT_NAME}" if store.has_report() else None,
    )


def accuracy_table(summary: RLSummary) -> TextTable:
    """Return the held-out metrics before and after, as text."""
    models = [("before", summary.before), ("after", summary.after)]
    rows = [[label, *(metric_text(found.get(name)) for name in RESPONSE_METRICS)] for label, found in models if found]
    titles = ["model", *(METRIC_TITLES[name] for name in RESPONSE_METRICS)]
    return "Held-out prompts: mean ± standard error over prompts", titles, rows


def curve_table(summary: RLSummary) -> TextTable:
    """Return the training's means, as text."""
    rows = [
        [
            f"{point.first} to {point.last}" if point.last > point.first else str(point.first),
            *("" if v is None else f"{v:.4f}" for v in (point.score, point.reward)),
            "" if point.response_tokens is None else f"{point.response_tokens:.1f}",
            "" if point.entropy is None else f"{point.entropy:.3f}",
        ]
        for point in summary.curve
    ]
    return "Training: means over steps", ["steps", "score", "reward", "response tokens", "entropy"], rows


def rl_files(summary: RLSummary) -> list[tuple[str, str]]:
    """Return what it cost and what lies where: description and text."""
    cost = [
        ("sampled", f"{summary.tokens:,} response tokens"),
        ("time", ", ".join(f"{stage} {duration_text(seconds)}" for stage, seconds in summary.seconds.items())),
    ]
    made = [(what, place) for what, place in (("model", summary.model), ("report", summary.report)) if place]
    return [*cost, *made, ("tables", f"{summary.folder}/*/*.parquet"), ("logs", f"{summary.folder}/logs")]


def rl_rows(summary: RLSummary) -> list[dict[str, Any]]:
    """Return the run as rows of a table: held-out metrics before and after, then the reward curve."""
    rows: list[dict[str, Any]] = [
        {"what": f"{label}: {name}", "value": metric.value, "stderr": metric.stderr, "n": metric.n}
        for label, metrics in (("before", summary.before), ("after", summary.after))
        for name, metric in metrics.items()
    ]
    return rows + [
        {"what": f"reward: steps {point.first} to {point.last}", "value": point.reward, "stderr": None, "n": None}
        for point in summary.curve
    ]


def rl_markdown(summary: RLSummary) -> str:
    """Return the run as Markdown."""
    lines = [f"# {escape_markdown(summary.name)}"]
    for title, header, rows in (accuracy_table(summary), curve_table(summary)):
        lines += ["", f"## {escape_markdown(title)}", "", *markdown_table(header, rows)]
    lines += ["", *(f"- {what}: {code_markdown(text)}" for what, text in rl_files(summary))]
    return "\n".join(lines) + "\n"
