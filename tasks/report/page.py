"""A run's figures as one page of HTML that needs nothing else: no script, no file, no network."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from schemas.config import RunConfig, StudentConfig
from schemas.manifest import RunRecord
from schemas.stage_key import WARMUP
from schemas.untrusted_text import visible
from tasks.graph import sampling_policy
from tasks.report.drawing import Figure
from tasks.report.evaluation import shown_names
from tasks.report.findings import RunFindings
from tasks.report.outcome_plots import metric_figure, rate_figures, time_figure
from tasks.report.sample_plots import (
    ZONE_CLASSES,
    ZONE_NAMES,
    delta_ifd_figure,
    ifd_figure,
    reason_name,
    reasons_figure,
)
from tasks.report.samples import SHOWN_TOKENS, ShownSample, ShownToken
from tasks.report.stages import StageCost
from tasks.report.text import count_text, number_text, round_name, safe
from tasks.report.tiles import tiles_of
from tasks.report.training_plots import fill_figure, training_figures

LEVELS = (0.01, 0.1, 0.3, 0.5, 0.8, 0.95)
"""Probabilities from which a token gets the next deeper shade."""


@dataclass(frozen=True)
class Section:
    """Figures that belong together: their anchor, title, an explaining sentence."""

    key: str
    title: str
    words: str
    figures: list[Figure]


def sections_of(findings: RunFindings) -> list[Section]:
    """Return every figure that the run has something for, in the order to show them."""
    config, ledgers = findings.config, {ledger.round: ledger for ledger in findings.ledgers}
    shown = [ledgers[index] for index in findings.shown_rounds]
    left_out = "" if len(shown) == len(ledgers) else f" {len(shown)} of {len(ledgers)} rounds are drawn."
    found = [
        Section(
            "outcome",
            "Outcome",
            "The student on held-out prompts, from where the rounds start, beside the teacher.",
            [
                metric_figure(name, findings.metrics, config, findings.accuracy_change if name == "accuracy" else None)
                for name in shown_names(findings.metrics)
            ],
        ),
        Section(
            "delta-ifd",
            "Δ-IFD",
            "How much more the prompt helps the student than the teacher. Below the lower bound the student is less "
            "sure than the teacher of its own words; above the upper it is sure of what the teacher finds "
            f"improbable.{left_out}",
            [delta_ifd_figure(ledger) for ledger in shown],
        ),
        Section(
            "ifd",
            "IFD",
            f"Each model's loss on a response with its prompt, over that without.{left_out}",
            [ifd_figure(ledger, findings.ifd[ledger.round]) for ledger in shown],
        ),
        Section(
            "filter",
            "Filter and packs",
            "What went into training, and how tightly.",
            ([reasons_figure(findings.ledgers)] if ledgers else [])
            + ([fill_figure(findings.packs)] if findings.packs else []),
        ),
        Section(
            "training",
            "Training",
            "One run over all rounds: optimizer and schedule go on where the round before left them.",
            training_figures(findings.curves, config.train.guard.max_policy_kl),
        ),
        cost_section(findings.stages),
    ]
    return [section for section in found if section.figures]


def cost_section(stages: list[StageCost]) -> Section:
    """Return what the stages of a run of any kind took; without figures where none has finished."""
    finished = any(stage.finished for stage in stages)
    return Section(
        "cost",
        "Cost",
        "Time, throughput and bytes of every stage, from its manifest.",
        [time_figure(stages), *rate_figures(stages)] if finished else [],
    )


def report_html(findings: RunFindings, samples: Mapping[int, list[ShownSample]]) -> str:
    """Return the report. Whatever comes from prompts, models or settings is escaped; nothing in it runs or loads.

    Args:
        findings: What is drawn.
        samples: By round, samples to read.
    """
    config = findings.config
    named = [
        (round_name(index), [_sample(sample, first=_is_first(sample, shown)) for sample in shown])
        for index, shown in samples.items()
        if shown
    ]
    return (
        environment()
        .get_template("report.html")
        .render(
            title=config.name,
            lead=f"Near-Policy Distillation of {config.teacher.model} into {_student_words(config.student)}: "
            f"{config.rounds} round{'s' if config.rounds > 1 else ''}, top {config.score.top_k} targets, "
            f"λ = {config.train.kd_weight:g}, seed {config.seed}.",
            tiles=tiles_of(findings),
            sections=sections_of(findings),
            samples=named,
            level_names=["", *(f"≥ {low:g}" for low in LEVELS)],
            by_student=config.generate.policy == "student",
            top_k=config.score.top_k,
            chains=_chains(findings),
            **run_parts(findings.record, findings.stages),
        )
    )


def _student_words(student: StudentConfig) -> str:
    if student.init == "pretrained":
        return str(student.model)
    kept = student.keep_layers if isinstance(student.keep_layers, int) else len(student.keep_layers or [])
    return f"{kept} of its layers" if student.model is None else f"{kept} layers of {student.model}"


def run_parts(record: RunRecord, stages: list[StageCost]) -> dict[str, Any]:
    """Return what the page of a run of any kind says of its record and its stages."""
    done = [stage for stage in stages if stage.finished]
    return {
        "unfinished": len(done) < len(stages),
        "state": "finished" if len(done) == len(stages) else f"{len(done)} of {len(stages)} stages done",
        "lineage": [_lineage(stage) for stage in done],
        "settings": list(_flat(record.config)),
        "packages": sorted(record.packages.items()),
        "warnings": [(stage.key.label, warning) for stage in stages for warning in stage.warnings],
        "footer": f"Run {record.run_id[:12]}, config {record.config_hash[:12]}, started {record.created[:10]}. "
        "Made by npd report.",
    }


@cache
def environment() -> Environment:
    """Return the templates' environment: everything escaped unless it is markup already."""
    made = Environment(
        loader=PackageLoader("tasks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["seen"] = lambda value: safe(str(value))
    made.filters["text"] = visible
    made.filters["number"] = number_text
    return made


def _is_first(sample: ShownSample, shown: list[ShownSample]) -> bool:
    return next(other for other in shown if other.zone == sample.zone) is sample


def _sample(sample: ShownSample, *, first: bool) -> dict[str, Any]:
    more = sample.response_tokens - len(sample.tokens)
    left = f"{more:,} more tokens; the first {SHOWN_TOKENS} are shown. " if more > 0 else ""
    return {
        "zone": ZONE_NAMES[sample.zone],
        "zone_class": ZONE_CLASSES[sample.zone],
        "open": first,
        "sample_id": sample.sample_id,
        "delta_ifd": number_text(sample.delta_ifd, 3),
        "student_ifd": number_text(sample.student_ifd, 3),
        "teacher_ifd": number_text(sample.teacher_ifd, 3),
        "fate": reason_name(sample.reason) if sample.keep else f"dropped: {reason_name(sample.reason)}",
        "prompt": sample.prompt,
        "sides": {
            "student": [
                (f"p{level(token.student)}", number_text(token.student, 3), _shown(token.text))
                for token in sample.tokens
                if token.student is not None
            ],
            "teacher": [_teacher_token(token) for token in sample.tokens],
        },
        "left": left + ("Cut at the length limit." if sample.finish_reason == "length" else ""),
    }


def _teacher_token(token: ShownToken) -> tuple[str, str, str]:
    if token.teacher is None:
        return "none", f"not among the top k: at most {number_text(token.teacher_least, 2)}", _shown(token.text)
    return f"p{level(token.teacher)}", number_text(token.teacher, 3), _shown(token.text)


def _shown(text: str) -> str:
    """Return a token's text with a mark for what has no ink: an empty text and a line's end."""
    return "∅" if not text else text.replace("\r\n", "\n").replace("\n", "⏎\n")


def level(probability: float) -> int:
    """Return a probability's shade, 0 to 6.

    >>> level(0.005), level(0.01), level(0.97)
    (0, 1, 6)
    """
    return sum(probability >= low for low in LEVELS)


def _chains(findings: RunFindings) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Return for the run's shared stages, the warm-up and each round: its name, who sampled, and its stages."""
    rounds = dict.fromkeys(stage.key.round for stage in findings.stages)
    chains = []
    for index in rounds:
        links = links_of(stage for stage in findings.stages if stage.key.round == index)
        words = ""
        if index is not None and index in findings.samplers:
            words = _sampler_words(findings.config, index, *findings.samplers[index])
            lag = next((ledger.policy_lag for ledger in findings.ledgers if ledger.round == index), None)
            words += f"; lag when training begins: {lag:,} steps" if lag is not None else ""
        elif index not in (None, WARMUP):
            words = "trains on the packs of the round before" if links[0]["stage"] == "train" else ""
        chains.append(("shared" if index is None else round_name(index), words, links))
    return chains


def _sampler_words(config: RunConfig, index: int, version: str, step: int) -> str:
    if config.generate.policy == "answers":
        return "the prompts' own answers"
    if config.generate.policy == "teacher":
        return f"sampled by the teacher, {version[:12]}"
    source = sampling_policy(config, index)
    return f"sampled by policy {version[:12]} of {source.label}, after {step:,} optimizer steps"


def links_of(stages: Iterable[StageCost]) -> list[dict[str, Any]]:
    """Return the stages of a chain as the page draws them."""
    return [{"stage": stage.key.stage, "finished": stage.finished, "words": _link_words(stage)} for stage in stages]


def _link_words(stage: StageCost) -> str:
    if not stage.finished:
        return "not yet"
    return f"{count_text(stage.rows)} rows" if stage.rows else f"{stage.files} file{'s' * (stage.files != 1)}"


def _lineage(stage: StageCost) -> list[str]:
    reads = ", ".join(stage.inputs) or "sources outside the run"
    hashes = (stage.fingerprint[:12], stage.outputs[:12])
    return [stage.key.label, reads, *hashes, f"{stage.files:,}", stage.when, stage.host]


def _flat(values: Any, prefix: str = "") -> Iterable[list[str]]:
    """Yield every setting as its dotted key and value."""
    if isinstance(values, dict | list) and values:
        entries = values.items() if isinstance(values, dict) else enumerate(values)
        for name, value in entries:
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(values, float) and math.isfinite(values):
        yield [prefix, f"{values:g}"]
    else:
        yield [prefix, "null" if values is None else str(values)]
