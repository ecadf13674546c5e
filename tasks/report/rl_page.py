"""An RL run's figures as one page of HTML that needs nothing else."""

from tasks.report.evaluation import Metric, kind_of, shown_names
from tasks.report.page import Section, cost_section, environment, links_of, run_parts
from tasks.report.rl_findings import RLFindings
from tasks.report.rl_plots import START, TRAINED, answers_figure, before_after_figure, curve_figures
from tasks.report.text import count_text, duration_text, number_text, percent_text
from tasks.report.tiles import Tile
from tasks.rl.graph import RL


def rl_sections_of(findings: RLFindings) -> list[Section]:
    """Return every figure that the run has something for, in the order to show them."""
    outcome = [
        before_after_figure(name, findings.metrics, findings.accuracy_change if name == "accuracy" else None)
        for name in shown_names(findings.metrics)
    ]
    if findings.answers is not None:
        outcome.insert(1, answers_figure(findings.answers))
    grpo = findings.config.grpo
    found = [
        Section("outcome", "Outcome", "Held-out prompts, answered by the start model and by the trained one.", outcome),
        Section(
            "training",
            "Training",
            f"{grpo.prompts_per_step:,} prompts a batch, {grpo.num_generations} responses each; the group's mean is "
            "what each of its responses is held against.",
            [] if findings.curves is None else curve_figures(findings.curves),
        ),
        cost_section(findings.stages),
    ]
    return [section for section in found if section.figures]


def rl_report_html(findings: RLFindings) -> str:
    """Return the report. Whatever comes from prompts, models or settings is escaped; nothing in it runs or loads."""
    config = findings.config
    start = config.model if config.run is None else f"{config.run}, {_round_words(config.round)}"
    return (
        environment()
        .get_template("rl.html")
        .render(
            title=config.name,
            lead=f"GRPO with verifiable rewards from {start}: {config.grpo.steps:,} steps, seed {config.seed}.",
            tiles=_tiles(findings),
            sections=rl_sections_of(findings),
            samples=findings.shown,
            chains=[("run", f"starts from {start}", links_of(findings.stages))],
            **run_parts(findings.record, findings.stages),
        )
    )


def _round_words(index: int | None) -> str:
    if index is None:
        return "its newest student"
    return "its warm-up" if index < 0 else f"round {index}"


def _tiles(findings: RLFindings) -> list[Tile]:
    """Return the run's key numbers, those that it has."""
    tiles = [_metric_tile(name, findings.metrics) for name in shown_names(findings.metrics)]
    if findings.curves is not None:
        rewards = findings.curves["reward"]
        rewards = rewards[rewards == rewards]
        tiles.append(Tile("Reward", number_text(float(rewards[-1]), 3), f"first {number_text(float(rewards[0]), 3)}"))
        trained = next(stage for stage in findings.stages if stage.key == RL)
        tiles.append(
            Tile(
                "Sampled tokens",
                count_text(trained.tokens or 0),
                f"{trained.tokens_per_second or 0:,.0f} tokens/s with training",
            )
        )
    tiles.append(Tile("Time", duration_text(sum(stage.seconds for stage in findings.stages)), "of work"))
    return tiles


def _metric_tile(name: str, metrics: list[Metric]) -> Tile:
    found = {metric.model: metric for metric in metrics if metric.name == name}
    shown = found.get(TRAINED) or found[START]
    detail = f"± {number_text(shown.stderr, 2)}"
    if TRAINED in found and START in found:
        detail = f"before {_value(found[START])}"
    return Tile(kind_of(name).title, _value(shown), detail)


def _value(metric: Metric) -> str:
    return percent_text(metric.value) if metric.name == "accuracy" else number_text(metric.value, 3)
