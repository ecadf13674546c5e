"""What a run has come to, read from its tables and manifests: the same rows for terminal, Markdown and Prefect."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.config import RunConfig
from schemas.manifest import Manifest
from schemas.run_store import REPORT_NAME, RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import RESPONSE_METRICS
from schemas.untrusted_text import code_markdown, escape_markdown, one_line
from tasks.evaluate.resolution import TARGET
from tasks.graph import BASELINE
from tasks.report.evaluation import Metric, read_metrics
from tasks.report.ledger import KEPT, read_reasons
from tasks.report.text import duration_text, markdown_table
from tasks.stage import standing

METRIC_TITLES = {
    "kl_teacher_student": "KL(teacher‖student)",
    "kl_student_teacher": "KL(student‖teacher)",
    "top1_agreement": "top-1 agreement",
    "accuracy": "accuracy",
    "response_tokens": "tokens",
    "truncation_rate": "cut off",
    "repetition": "repetition",
}
"""Column titles of the metrics that have one; another metric goes by its name."""


@dataclass(frozen=True)
class RoundSummary:
    """One round, as far as it has come.

    Args:
        round: Index from 0; WARMUP before the first.
        label: Name for people.
        metrics: Held-out metrics of the student that the round ends with, by name.
        reasons: Samples by the filter ledger's reason, ``kept`` first, then the most frequent.
        tokens: Tokens by stage, of the stages that count them.
        seconds: Seconds of work by stage.
    """

    round: int
    label: str
    metrics: dict[str, Metric]
    reasons: dict[str, int]
    tokens: dict[str, int]
    seconds: dict[str, float]

    @property
    def kept(self) -> int:
        """Samples that went into training."""
        return self.reasons.get(KEPT, 0)

    @property
    def dropped(self) -> int:
        """Samples that did not."""
        return sum(self.reasons.values()) - self.kept


@dataclass(frozen=True)
class RunSummary:
    """A run as far as it has come.

    Args:
        name: The run's name.
        folder: Where it is.
        rounds: The warm-up, then the rounds that have begun.
        baseline: Held-out metrics of the models that do not train, by model: `teacher` and `start`.
        resolution: Which difference in accuracy the held-out prompts can tell; empty where none is verified.
        seconds: Seconds of the stages that belong to no round.
        student: The newest exported model's folder.
        report: The report to look at, if it has been written.
    """

    name: str
    folder: str
    rounds: list[RoundSummary]
    baseline: dict[str, dict[str, Metric]]
    resolution: str
    seconds: dict[str, float]
    student: str | None
    report: str | None = None

    @property
    def metric_names(self) -> list[str]:
        """Metrics that anything has, those with a title first."""
        found = {
            name for metrics in (*self.baseline.values(), *(row.metrics for row in self.rounds)) for name in metrics
        }
        return [name for name in METRIC_TITLES if name in found] + sorted(found - set(METRIC_TITLES))


def summarize(store: RunStore, config: RunConfig, *, through: int | None = None) -> RunSummary:
    """Read the summary of a run from what stands of it (``standing``), to round ``through`` if that is given.

    Raises:
        ArtifactError: a manifest or table is damaged.
    """
    manifests = standing(store, config, through=through)
    indices = sorted({key.round for key in manifests if key.round is not None})
    exports = [key for key in manifests if key.stage == "export"]
    student = f"{display_place(store)}/{exports[-1].folder}/model" if exports else None
    return RunSummary(
        name=config.name,
        folder=display_place(store),
        rounds=[_round(store, config, manifests, index) for index in indices],
        baseline=evaluation_metrics(store, BASELINE) if BASELINE in manifests else {},
        resolution=_resolution([m for key, m in manifests.items() if key == BASELINE or key.stage == "evaluate"]),
        seconds={key.stage: _seconds(manifest) for key, manifest in manifests.items() if key.round is None},
        student=student,
        report=f"{display_place(store)}/{REPORT_NAME}" if store.has_report() else None,
    )


def _round(store: RunStore, config: RunConfig, manifests: dict[StageKey, Manifest], index: int) -> RoundSummary:
    own = {key.stage: manifest for key, manifest in manifests.items() if key.round == index}
    return RoundSummary(
        round=index,
        label=round_label(config, index),
        metrics=evaluation_metrics(store, StageKey("evaluate", index))["student"] if "evaluate" in own else {},
        reasons=read_reasons(store, index) if "filter" in own else {},
        tokens={stage: int(m.counters["tokens"]) for stage, m in own.items() if "tokens" in m.counters},
        seconds={stage: _seconds(manifest) for stage, manifest in own.items()},
    )


def evaluation_metrics(store: RunStore, key: StageKey) -> dict[str, dict[str, Metric]]:
    """Return the metrics of a finished evaluation (evaluate or baseline) by model and name.

    Raises:
        ArtifactError: the table is damaged.
    """
    found: dict[str, dict[str, Metric]] = {}
    for metric in read_metrics(store, [key]):
        found.setdefault(metric.model, {})[metric.name] = metric
    return found


def _resolution(evaluations: list[Manifest]) -> str:
    """Return what holds for every model that was evaluated: an accuracy near one half has most noise."""
    names = ("detectable_difference", "verified_prompts", "prompts_for_two_points")
    told = [
        tuple(manifest.counters[name] for name in names) for manifest in evaluations if names[0] in manifest.counters
    ]
    if not told:
        return ""
    difference, prompts, needed = max(told)
    text = f"{prompts:,} verified held-out prompts tell differences in accuracy from {100 * difference:.1f} points on"
    return text if difference <= TARGET else f"{text}; {100 * TARGET:.0f} points take about {needed:,}"


def _seconds(manifest: Manifest) -> float:
    return float(manifest.counters.get("seconds", 0.0))


def round_label(config: RunConfig, index: int) -> str:
    """Return a round's name for people: rounds count from 0, as their folders do."""
    if index == WARMUP:
        return "warm-up" if config.warmup is not None else "start"
    return f"round {index} ({index + 1} of {config.rounds})"


def display_place(store: RunStore) -> str:
    """Return where a run is: its URL, or its folder, relative to the working directory where it is below it."""
    place = Path(store.url)
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else store.url


def metric_text(metric: Metric | None) -> str:
    """Return a metric with its standard error.

    >>> metric_text(Metric("kl", "student", 0, value=1.25, stderr=0.03, n=10)), metric_text(None)
    ('1.2500 ± 0.0300', '')
    """
    return "" if metric is None else f"{metric.value:.4f} ± {metric.stderr:.4f}"


def why_text(row: RoundSummary) -> str:
    """Return why samples were dropped.

    >>> why_text(RoundSummary(0, "round 0", {}, {"kept": 9, "too_long": 2, "empty": 1}, {}, {}))
    '2 too_long, 1 empty'
    """
    return ", ".join(f"{count:,} {reason}" for reason, count in row.reasons.items() if reason != KEPT)


TextTable = tuple[str, list[str], list[list[str]]]
"""A title, column titles, and rows of cells."""


def held_out_tables(summary: RunSummary) -> list[TextTable]:
    """Return the held-out metrics by model, as text: agreement with the teacher, then the models' own responses."""
    agreement = [name for name in summary.metric_names if not _of_responses(name)]
    responses = [name for name in summary.metric_names if _of_responses(name)]
    told_with_rounds = {row.label for row in summary.rounds if row.metrics}
    models = [
        # Without a warm-up the start is evaluated with the rounds, too.
        *((model, metrics) for model, metrics in summary.baseline.items() if model not in told_with_rounds),
        *((row.label, row.metrics) for row in summary.rounds),
    ]
    told = f" ({summary.resolution})" if summary.resolution else ""
    titles = {
        "Held-out agreement: mean over tokens ± standard error over prompts; KL in nats": agreement,
        f"Own responses to held-out prompts: mean ± standard error{told}": responses,
    }
    return [
        (
            title,
            ["round", *(METRIC_TITLES.get(name, name) for name in names)],
            [
                [label, *(metric_text(metrics.get(name)) for name in names)]
                for label, metrics in models
                # The teacher has no agreement with itself.
                if metrics.keys() & set(names) or label not in summary.baseline
            ],
        )
        for title, names in titles.items()
        if names or title.startswith("Held-out")
    ]


def _of_responses(metric: str) -> bool:
    return metric in RESPONSE_METRICS or metric.startswith("lm_eval/")


def samples_table(summary: RunSummary) -> TextTable:
    """Return what was sampled, kept and dropped by round, and how long the round took, as text."""
    rows = [
        [
            row.label,
            f"{row.tokens['generate']:,}" if "generate" in row.tokens else "",
            f"{row.kept:,}" if row.reasons else "",
            f"{row.dropped:,}" if row.reasons else "",
            why_text(row),
            duration_text(sum(row.seconds.values())),
        ]
        for row in summary.rounds
    ]
    return "Samples, their tokens, and time", ["round", "tokens", "kept", "dropped", "why", "time"], rows


def run_files(summary: RunSummary) -> list[tuple[str, str]]:
    """Return what lies where: description and place."""
    files = [("student", summary.student), ("report", summary.report)]
    return [
        *((what, path) for what, path in files if path is not None),
        ("tables", f"{summary.folder}/round=*/stage=*/*.parquet"),
        ("logs", f"{summary.folder}/logs"),
    ]


def round_rows(summary: RunSummary, index: int) -> list[dict[str, Any]]:
    """Return one round as rows of a table: its metrics, then samples by reason, then seconds by stage."""
    rows: list[dict[str, Any]] = []
    for row in (row for row in summary.rounds if row.round == index):
        for name, metric in row.metrics.items():
            rows.append({"what": one_line(name), "value": metric.value, "stderr": metric.stderr, "n": metric.n})
        for reason, count in row.reasons.items():
            what = KEPT if reason == KEPT else one_line(f"dropped: {reason}")
            rows.append({"what": what, "value": count, "stderr": None, "n": row.kept + row.dropped})
        for stage, seconds in row.seconds.items():
            rows.append({"what": f"seconds: {stage}", "value": seconds, "stderr": None, "n": None})
    return rows


def summary_markdown(summary: RunSummary) -> str:
    """Return the run so far as Markdown."""
    lines = [f"# {escape_markdown(summary.name)}"]
    for title, header, rows in (*held_out_tables(summary), samples_table(summary)):
        lines += ["", f"## {escape_markdown(title)}", "", *markdown_table(header, rows)]
    lines += ["", f"Prompts, models, reference and baseline: {duration_text(sum(summary.seconds.values()))}.", ""]
    lines += [f"- {what}: {code_markdown(path)}" for what, path in run_files(summary)]
    return "\n".join(lines) + "\n"
