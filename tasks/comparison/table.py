"""The tables of a comparison: a row a run, a row a method, and the latter as Markdown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.comparison_tables import COMPARISON, COMPARISON_RUNS
from schemas.config import ComparisonConfig
from schemas.untrusted_text import escape_markdown
from tasks.comparison.intervals import Float64, Interval, crossed_interval
from tasks.comparison.landmarks import Landmark
from tasks.comparison.outcome import Outcome, Scores

Row = dict[str, Any]


@dataclass(frozen=True)
class MethodRuns:
    """The finished runs of a method.

    Args:
        rate: Learning rate taken.
        chosen: Outcomes at that rate by seed.
        tried: Outcomes of all runs by rate and seed, those of ``chosen`` among them.
        continued: Scores of the students after GRPO, by seed; empty where there was none.
    """

    rate: float
    chosen: dict[int, Outcome]
    tried: dict[tuple[float, int], Outcome]
    continued: dict[int, Scores] = field(default_factory=dict)


def best_rate(outcomes: Mapping[float, Outcome], validation: frozenset[str]) -> float:
    """Return the learning rate with the best accuracy on the validation prompts; of equals the lowest held-out KL.

    Args:
        outcomes: Of one run at each rate.
        validation: Prompts to choose on.
    """

    def merit(rate: float) -> tuple[float, float, float]:
        outcome = outcomes[rate]
        accuracy = outcome.scores.of(validation).accuracy
        kl = outcome.kl_teacher_student
        return (-1.0 if accuracy is None else accuracy, -kl if math.isfinite(kl) else -math.inf, -rate)

    return max(outcomes, key=merit)


def end_of_grid(rate: float, tried: Sequence[float]) -> str | None:
    """Return at which end of the rates tried a chosen one lies, beyond which a better one may be; None: at neither.

    >>> end_of_grid(1e-4, [1e-4, 3e-4, 1e-3]), end_of_grid(3e-4, [1e-4, 3e-4, 1e-3]), end_of_grid(1e-4, [1e-4])
    ('lowest', None, None)
    """
    ends = {} if len(tried) < 2 else {min(tried): "lowest", max(tried): "highest"}
    return ends.get(rate)


def scores_on_test(scores: Mapping[int, Scores], validation: frozenset[str]) -> tuple[tuple[str, ...], Float64]:
    """Return the prompts outside ``validation`` that every seed has, and their scores, float64 [seeds, prompts]."""
    shared = frozenset.intersection(*(frozenset(of_seed.prompt_ids) for of_seed in scores.values())) - validation
    parts = [scores[seed].of(shared) for seed in sorted(scores)]
    return parts[0].prompt_ids, np.stack([part.values for part in parts])


def difference(npd: Mapping[int, Outcome], other: Mapping[int, Outcome], validation: frozenset[str]) -> Interval | None:
    """Return accuracy of ``npd`` less that of ``other``, paired by seed and prompt; None if they share none."""
    seeds = sorted(npd.keys() & other.keys())
    if not seeds:
        return None
    (left_ids, left), (right_ids, right) = (
        scores_on_test({s: o[s].scores for s in seeds}, validation) for o in (npd, other)
    )
    if left_ids != right_ids or not left_ids:
        return None
    return crossed_interval(left - right)


def comparison_table(
    comparison: ComparisonConfig,
    runs: Mapping[str, MethodRuns],
    landmarks: list[Landmark],
    validation: frozenset[str],
) -> pa.Table:
    """Return table COMPARISON: teacher and starts first, then the methods as the config lists them."""
    rows = [_landmark_row(landmark, validation) for landmark in landmarks]
    npd = runs.get(comparison.npd)
    for name, method in comparison.methods.items():
        if name not in runs:
            continue
        row = _method_row(runs[name], validation) | {
            "method": name,
            "title": method.title or name,
            "role": method.role,
        }
        if npd is not None:
            row["seconds_ratio"] = row["seconds"] / median(o.seconds for o in npd.chosen.values())
            if name != comparison.npd:
                row |= _named(difference(npd.chosen, runs[name].chosen, validation), "difference")
        rows.append(row)
    names = COMPARISON.columns.names
    return pa.Table.from_pylist([{n: row.get(n) for n in names} for row in rows], schema=COMPARISON.columns)


def runs_table(comparison: ComparisonConfig, runs: Mapping[str, MethodRuns], validation: frozenset[str]) -> pa.Table:
    """Return table COMPARISON_RUNS, one row a run."""
    rows = []
    for name in comparison.methods:
        if name not in runs:
            continue
        for (rate, seed), outcome in sorted(runs[name].tried.items()):
            test = frozenset(outcome.scores.prompt_ids) - validation
            chosen = runs[name].chosen.get(seed) is outcome
            continued = runs[name].continued.get(seed) if chosen else None
            rows.append(
                {
                    "method": name,
                    "learning_rate": rate,
                    "seed": seed,
                    "chosen": chosen,
                    "accuracy": outcome.scores.of(test).accuracy,
                    "validation_accuracy": outcome.scores.of(validation).accuracy,
                    "kl_teacher_student": outcome.kl_teacher_student,
                    "kl_stderr": outcome.kl_stderr,
                    "policy_kl": outcome.policy_kl,
                    "seconds": outcome.seconds,
                    "generated_tokens": outcome.generated_tokens,
                    "steps": outcome.steps,
                    "rl_accuracy": None if continued is None else continued.of(test).accuracy,
                }
            )
    return pa.Table.from_pylist(rows, schema=COMPARISON_RUNS.columns)


def _landmark_row(landmark: Landmark, validation: frozenset[str]) -> Row:
    scores = landmark.scores.of(frozenset(landmark.scores.prompt_ids) - validation)
    row: Row = {"method": landmark.method, "title": landmark.title, "role": landmark.role}
    row["test_prompts"] = len(scores.values)
    if len(scores.values):
        row |= _named(crossed_interval(scores.values[None], share=True), "accuracy")
    if landmark.kl is not None:
        row["kl_teacher_student"], row["kl_stderr"] = landmark.kl
    return row


def _method_row(runs: MethodRuns, validation: frozenset[str]) -> Row:
    outcomes = list(runs.chosen.values())
    prompt_ids, values = scores_on_test({seed: o.scores for seed, o in runs.chosen.items()}, validation)
    seconds = [o.seconds for o in outcomes]
    kls = [o.kl_teacher_student for o in outcomes]
    policy_kls = [o.policy_kl for o in outcomes if o.policy_kl is not None]
    # Prompts are the same for all seeds, so their part of the error does not fall with the number of seeds.
    of_seeds = stdev(kls) ** 2 / len(kls) if len(kls) > 1 else 0.0
    row: Row = {
        "kl_teacher_student": fmean(kls),
        "kl_stderr": math.sqrt(of_seeds + fmean(o.kl_stderr**2 for o in outcomes)),
        "policy_kl": fmean(policy_kls) if policy_kls else None,
        "seconds": median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "generated_tokens": round(fmean(o.generated_tokens for o in outcomes)),
        "steps": round(fmean(o.steps for o in outcomes)),
        "learning_rate": runs.rate,
        "seeds": len(outcomes),
        "test_prompts": len(prompt_ids),
    }
    if prompt_ids:
        row |= _named(crossed_interval(values, share=True), "accuracy")
    if runs.continued:
        prompt_ids, values = scores_on_test(runs.continued, validation)
        row |= _named(crossed_interval(values, share=True), "rl_accuracy", "rl") if prompt_ids else {}
    return row


def _named(interval: Interval | None, name: str, ends: str | None = None) -> Row:
    """Return an interval as columns; ``ends`` begins the names of its ends where ``name`` does not."""
    if interval is None:
        return {}
    low, high = (end if math.isfinite(end) else None for end in (interval.low, interval.high))
    return {name: interval.mean, f"{ends or name}_low": low, f"{ends or name}_high": high}


MARKDOWN_COLUMNS = (
    "method",
    "accuracy, %",
    "NPD − this, points",
    "KL(teacher‖student)",
    "policy KL",
    "seconds",
    "× NPD's time",
    "generated tokens",
    "steps",
    "rate",
    "seeds",
)


def comparison_markdown(table: pa.Table) -> str:
    """Return table COMPARISON as Markdown, with what its columns mean."""
    rows = table.to_pylist()
    continued = any(row["rl_accuracy"] is not None for row in rows)
    columns = [*MARKDOWN_COLUMNS, *(["after GRPO, %"] if continued else [])]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for row in rows:
        cells = [
            f"**{escape_markdown(row['title'])}**" if row["role"] == "npd" else escape_markdown(row["title"]),
            _spread(row, "accuracy"),
            _spread(row, "difference", signed=True),
            "" if row["kl_teacher_student"] is None else f"{row['kl_teacher_student']:.4f} ± {row['kl_stderr']:.4f}",
            "" if row["policy_kl"] is None else f"{row['policy_kl']:.4f}",
            _seconds(row),
            "" if row["seconds_ratio"] is None else f"{row['seconds_ratio']:.2f}",
            "" if row["generated_tokens"] is None else f"{row['generated_tokens']:,}",
            "" if row["steps"] is None else f"{row['steps']:,}",
            "" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
            "" if row["seeds"] is None else str(row["seeds"]),
            *([_spread(row, "rl_accuracy", ends="rl")] if continued else []),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    prompts = max((row["test_prompts"] or 0 for row in rows), default=0)
    notes = (
        f"Accuracy: mean over {prompts} test prompts and all seeds, with its 95 % interval over both; where one seed "
        "ran, over prompts alone. NPD − this: paired by seed and prompt, 95 % interval. KL: held-out, nats per token, "
        "± one standard error. Policy KL: mean of the last steps. Seconds: median over seeds (lowest to highest) of "
        "all between the warmed-up student and the exported one, models loaded; scoring is left out where nothing "
        "reads it. Evaluation, prompts, references and warm-up are the same for all and not counted."
    )
    if continued:
        notes += " After GRPO: accuracy on the same prompts once the exported student has learned on from its rewards."
    return "\n".join([*lines, "", notes, ""])


def _spread(row: Row, name: str, *, signed: bool = False, ends: str | None = None) -> str:
    """Return a share and its interval in percent."""
    if row[name] is None:
        return ""
    value = f"{row[name] * 100:{'+' if signed else ''}.1f}"
    low, high = (row[f"{ends or name}_{end}"] for end in ("low", "high"))
    return value if low is None else f"{value} ({low * 100:.1f} to {high * 100:.1f})"


def _seconds(row: Row) -> str:
    if row["seconds"] is None:
        return ""
    value = f"{row['seconds']:.1f}"
    return value if row["seeds"] == 1 else f"{value} ({row['seconds_min']:.1f} to {row['seconds_max']:.1f})"
