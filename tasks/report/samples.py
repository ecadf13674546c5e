"""A few samples of each zone to read: the prompt, and every response token with both models' probability of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.config import RunConfig
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import FILTER, GENERATE, PROMPTS, ZONES, TableSchema, score_schema
from tasks.graph import PROMPTS as PROMPTS_STAGE
from tasks.language_model.token_texts import TokenTexts
from tasks.report.findings import spread

SHOWN_SAMPLES = 3
"""Samples shown of a zone, drawn evenly."""

SHOWN_TOKENS = 160
"""Response tokens shown of a sample."""

SHOWN_CHARACTERS = 1200
"""Characters shown of a message."""


@dataclass(frozen=True)
class ShownToken:
    """A response token.

    Args:
        text: Its text, or its id where the run has no tokenizer to read.
        student: Its probability under the student that sampled it, at temperature 1; None: somebody else wrote it.
        teacher: Its probability under the teacher; None: not among the teacher's top k.
        teacher_least: Probability of the least likely of the teacher's top k: what an absent token is not above.
    """

    text: str
    student: float | None
    teacher: float | None
    teacher_least: float


@dataclass(frozen=True)
class ShownSample:
    """A sample to read.

    Args:
        sample_id: Its id.
        zone: Its zone.
        keep: Whether it went into training.
        reason: Why not, or ``kept``.
        delta_ifd: Teacher's IFD minus student's.
        student_ifd: IFD of the student that sampled it.
        teacher_ifd: The teacher's IFD.
        finish_reason: `stop` or `length`.
        prompt: Role and content of each message, long ones cut.
        tokens: The response's first tokens.
        response_tokens: How many it has.
    """

    sample_id: str
    zone: str
    keep: bool
    reason: str
    delta_ifd: float
    student_ifd: float
    teacher_ifd: float
    finish_reason: str
    prompt: list[tuple[str, str]]
    tokens: list[ShownToken]
    response_tokens: int


def samples_to_read(store: RunStore, config: RunConfig, rounds: Sequence[int]) -> dict[int, list[ShownSample]]:
    """Return samples of the first and the last of ``rounds``, by round; see ``read_samples``."""
    return {index: read_samples(store, config, index) for index in spread(rounds, 2)}


def read_samples(store: RunStore, config: RunConfig, index: int) -> list[ShownSample]:
    """Return up to SHOWN_SAMPLES samples of each zone of round ``index``, whose filter has finished.

    Raises:
        ArtifactError: a table is damaged.
    """
    drawn = draw(store, index)
    if not drawn.num_rows:
        return []
    ids = drawn.column("sample_id").combine_chunks()
    columns = ["sample_id", "prompt_id", "response_ids", "finish_reason", "sampled_logprobs"]
    rollouts = rows_by_id(store, StageKey("generate", index), GENERATE, columns, ids)
    columns = ["sample_id", "student_ifd", "teacher_ifd", "teacher_topk_ids", "teacher_topk_logprobs"]
    schema = score_schema(config.score.top_k, config.score.topk_dtype)
    scores = rows_by_id(store, StageKey("score", index), schema, columns, ids)
    prompt_ids = pa.array({row["prompt_id"] for row in rollouts.values()}, pa.string())
    prompts = read_prompts(store, prompt_ids)
    texts, by_student = TokenTexts(store), config.generate.policy == "student"
    return [
        _sample(row, rollouts[row["sample_id"]], scores[row["sample_id"]], prompts, texts, by_student=by_student)
        for row in drawn.to_pylist()
        if row["sample_id"] in rollouts and row["sample_id"] in scores
    ]


def draw(store: RunStore, index: int) -> pa.Table:
    """Return ledger rows of each zone, zone by zone: those with the smallest of random numbers that repeat.

    Raises:
        ArtifactError: the ledger is damaged.
    """
    rng = np.random.default_rng(0)
    columns = ["sample_id", "delta_ifd", "zone", "keep", "reason"]
    best: dict[str, pa.Table] = {}
    for shard in store.iterate_table(StageKey("filter", index), FILTER, columns):
        numbered = shard.append_column("lot", pa.array(rng.random(shard.num_rows)))
        for zone in ZONES:
            of_zone = numbered.filter(pc.equal(numbered.column("zone"), zone))
            both = pa.concat_tables([best[zone], of_zone]) if zone in best else of_zone
            first = pc.select_k_unstable(both, k=min(SHOWN_SAMPLES, both.num_rows), sort_keys=[("lot", "ascending")])
            best[zone] = both.take(first)
    kept = [best[zone] for zone in ZONES if zone in best]
    return pa.concat_tables(kept).drop_columns(["lot"]) if kept else FILTER.columns.empty_table().select(columns)


def rows_by_id(
    store: RunStore, key: StageKey, schema: TableSchema, columns: list[str], ids: pa.Array
) -> dict[str, dict[str, Any]]:
    """Return the rows of a table whose first column is in ``ids``, by that column."""
    found: dict[str, dict[str, Any]] = {}
    for path in store.table_files(key):
        names = store.read_part(path, schema, columns[:1]).column(0)
        rows = np.flatnonzero(pc.is_in(names, ids).to_numpy())
        if rows.size:
            for row in store.read_part(path, schema, columns).take(rows).to_pylist():
                found[row[columns[0]]] = row
    return found


def read_prompts(store: RunStore, ids: pa.Array) -> dict[str, list[tuple[str, str]]]:
    """Return role and content of each message, long ones cut, of the prompts in ``ids``, by prompt id."""
    found = rows_by_id(store, PROMPTS_STAGE, PROMPTS, ["prompt_id", "messages"], ids)
    return {
        name: [(message["role"] or "", shortened(message["content"] or "")) for message in row["messages"]]
        for name, row in found.items()
    }


def _sample(
    drawn: dict[str, Any],
    rollout: dict[str, Any],
    score: dict[str, Any],
    prompts: dict[str, list[tuple[str, str]]],
    texts: TokenTexts,
    *,
    by_student: bool,
) -> ShownSample:
    return ShownSample(
        sample_id=drawn["sample_id"],
        zone=drawn["zone"],
        keep=drawn["keep"],
        reason=drawn["reason"],
        delta_ifd=drawn["delta_ifd"],
        student_ifd=score["student_ifd"],
        teacher_ifd=score["teacher_ifd"],
        finish_reason=rollout["finish_reason"],
        prompt=prompts.get(rollout["prompt_id"], []),
        tokens=_tokens(rollout, score, texts, by_student=by_student),
        response_tokens=len(rollout["response_ids"]),
    )


def _tokens(rollout: dict[str, Any], score: dict[str, Any], texts: TokenTexts, *, by_student: bool) -> list[ShownToken]:
    tokens = []
    places = zip(
        rollout["response_ids"][:SHOWN_TOKENS],
        rollout["sampled_logprobs"],
        score["teacher_topk_ids"],
        score["teacher_topk_logprobs"],
        strict=False,
    )
    for token, logprob, top_ids, top_logprobs in places:
        probabilities = np.exp(np.array(top_logprobs, np.float64))
        found = np.flatnonzero(np.array(top_ids) == token)
        text = texts.of(token)
        tokens.append(
            ShownToken(
                text=f"[{token}]" if text is None else text,
                student=float(np.exp(logprob)) if by_student else None,
                teacher=float(probabilities[found[0]]) if found.size else None,
                teacher_least=float(probabilities[-1]),
            )
        )
    return tokens


def shortened(text: str) -> str:
    """Return a text's beginning, with how much is left out.

    >>> shortened("abc")
    'abc'
    """
    left = len(text) - SHOWN_CHARACTERS
    return text if left <= 0 else f"{text[:SHOWN_CHARACTERS]}… ({left:,} characters more)"
