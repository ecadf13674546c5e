"""The run's key numbers, for the top of the report."""

from dataclasses import dataclass

from schemas.stage_key import WARMUP
from tasks.report.evaluation import STUDENT, TEACHER, Metric, kind_of
from tasks.report.findings import RunFindings, start_name
from tasks.report.stages import mean_rate
from tasks.report.text import count_text, duration_text, number_text, percent_text


@dataclass(frozen=True)
class Tile:
    """A number, its name, and what to hold it against; ``over``: it is beyond what the config allows."""

    label: str
    value: str
    detail: str
    over: bool = False


def tiles_of(findings: RunFindings) -> list[Tile]:
    """Return the tiles that the run has numbers for."""
    tiles = [
        tile
        for name in ("accuracy", "kl_teacher_student", "top1_agreement")
        if (tile := _metric_tile(name, findings)) is not None
    ]
    samples, kept = sum(ledger.samples for ledger in findings.ledgers), sum(ledger.kept for ledger in findings.ledgers)
    if samples:
        tiles.append(Tile("Samples kept", percent_text(kept / samples), f"{kept:,} of {samples:,}"))
    generated = [s for s in findings.stages if s.key.stage == "generate" and s.tokens is not None]
    if generated:
        rate = mean_rate(generated)
        words = "" if rate is None else f"{rate:,.0f} tokens/s"
        tiles.append(Tile("Generated tokens", count_text(sum(s.tokens or 0 for s in generated)), words))
    rounds = [fill for fill in findings.packs if fill.round != WARMUP]
    packs = sum(fill.packs for fill in rounds)
    if packs:
        share = sum(fill.tokens for fill in rounds) / sum(fill.packs * fill.capacity for fill in rounds)
        tiles.append(Tile("Pack fill", percent_text(share), f"{packs:,} packs"))
    tiles += _policy_kl_tile(findings)
    seconds = sum(stage.seconds for stage in findings.stages)
    rounds_done = sum(
        stage.finished for stage in findings.stages if stage.key.stage == "export" and stage.key.round != WARMUP
    )
    tiles.append(Tile("Time", duration_text(seconds), f"{rounds_done} of {findings.config.rounds} rounds"))
    return tiles


def _metric_tile(name: str, findings: RunFindings) -> Tile | None:
    own = [metric for metric in findings.metrics if metric.name == name]
    student = [metric for metric in own if metric.model == STUDENT]
    if not student:
        return None
    first, last = student[0], student[-1]
    teacher = next((metric for metric in own if metric.model == TEACHER), None)
    detail = f"± {number_text(last.stderr, 2)}"
    if first is not last:
        detail = f"{start_name(findings.config)} {_value(first)}"
    if teacher is not None:
        detail += f", teacher {_value(teacher)}"
    return Tile(kind_of(name).title, _value(last), detail)


def _value(metric: Metric) -> str:
    return percent_text(metric.value) if metric.name in ("accuracy", "top1_agreement") else number_text(metric.value, 3)


def _policy_kl_tile(findings: RunFindings) -> list[Tile]:
    """Return the largest policy KL that was measured."""
    measured = [curve.most_policy_kl for curve in findings.curves if curve.most_policy_kl is not None]
    if not measured:
        return []
    budget, most = findings.config.train.guard.max_policy_kl, max(measured)
    detail = "no budget" if budget is None else f"budget {number_text(budget, 2)}"
    return [Tile("Largest policy KL", number_text(most, 3), detail, over=budget is not None and most > budget)]
