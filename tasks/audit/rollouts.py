"""Prompts and the responses to them: ids, splits, seeds, and the weights that sampled."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.errors import ArtifactError
from schemas.manifest import Manifest, hash_json
from schemas.stage_key import WARMUP, StageKey
from tasks.audit.digests import LOGPROBS, TOKENS, row_digests
from tasks.audit.findings import Audit
from tasks.audit.rollout_index import PromptIndex, RolloutIndex
from tasks.audit.tables import shards
from tasks.graph import MODELS, PROMPTS, sampling_policy
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ANSWERS_VERSION, resolved_models
from tasks.prompts.messages import prompt_id
from tasks.prompts.split import drawn_order
from tasks.rollout.seeds import sample_seed

_BATCH_ROWS = 4096
_COLUMNS = [
    "sample_id",
    "prompt_id",
    "sample_index",
    "round",
    "policy_version",
    "policy_step",
    "prompt_ids",
    "response_ids",
    "sampled_logprobs",
    "seed",
]


def check_prompts(audit: Audit, key: StageKey) -> None:
    """Check that prompts are distinct, named by their messages, and split as the seed draws."""
    if not audit.needs(key, key):
        return
    prompts = read_prompts(audit, key)
    # The drawn order of any subset is that of the whole, so the held-out prompts are the first of those that are here.
    order = drawn_order(prompts.ids.to_pylist(), audit.config.split_seed)
    expected_split = np.zeros(len(order), bool)
    expected_split[order[: audit.config.prompts.held_out]] = True
    audit.expect_rows(
        audit.manifests[key].outputs[0].path,
        0,
        prompts.ids,
        "split",
        expected_split == prompts.held_out,
        lambda i: f"the seed draws {'held_out' if expected_split[i] else 'train'}",
    )
    audit.expect_counter(key, "held_out", int(prompts.held_out.sum()))
    audit.prompts = prompts


def read_prompts(audit: Audit[Any], key: StageKey) -> PromptIndex:
    """Read the prompts table; check that prompts are distinct and named by their messages."""
    ids, held_out = [], []
    for name, _, table in shards(audit, key, ["prompt_id", "messages", "split"]):
        for start in range(0, table.num_rows, _BATCH_ROWS):
            part = table.slice(start, _BATCH_ROWS)
            _check_names(audit, name, start, part)
        ids.append(table.column("prompt_id"))
        held_out.append(np.asarray(pc.equal(table.column("split"), "held_out")))
    prompts = PromptIndex(
        pa.chunked_array([c for column in ids for c in column.chunks], pa.string()), np.concatenate(held_out)
    )
    _check_distinct(audit, key, prompts.ids, "prompt_id")
    return prompts


def _check_names(audit: Audit[Any], name: str, first_row: int, part: pa.Table) -> None:
    found = part.column("prompt_id")
    expected = [prompt_id(messages) for messages in part.column("messages").to_pylist()]
    same = np.asarray(pc.equal(found, pa.array(expected, pa.string())))
    audit.expect_rows(name, first_row, found, "messages", same, lambda i: f"are those of prompt `{expected[i]}`")


def _check_distinct(audit: Audit[Any], key: StageKey, ids: pa.ChunkedArray, column: str) -> bool:
    audit.report.coverage.joins += len(ids)
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(pc.struct_field(counts, 1), 1))
    if len(twice):
        name, times = pc.struct_field(twice, 0)[0].as_py(), pc.struct_field(twice, 1)[0].as_py()
        audit.broken(key.folder, f"`{column}` {name} is there {times} times", len(twice) - 1)
    return not len(twice)


def recorded_version(manifest: Manifest, key: StageKey) -> str:
    """Return the hash that samples carry of the student that ``key`` (models or export) wrote.

    The first 16 hex digits of the sha256 over names and hashes of its safetensors files.
    """
    folder = f"{key.folder}/{'student' if key == MODELS else 'model'}"
    records = [r for r in manifest.outputs if r.path.endswith(".safetensors") and r.path.rpartition("/")[0] == folder]
    return hash_json([[Path(r.path).name, r.sha256] for r in records])[:16]


def policy_steps(audit: Audit, key: StageKey) -> int | None:
    """Return the optimizer steps of the near-policy run in a student: as its train stage counted them."""
    if key == MODELS or key.round == WARMUP:
        return 0
    assert key.round is not None
    steps = audit.counter(StageKey("train", key.round), "policy_step")
    return None if steps is None else int(steps)


def check_rollouts(audit: Audit, key: StageKey) -> None:
    """Check a rollout table against the prompts it answers and the weights that sampled it."""
    if not audit.needs(key, key, PROMPTS, MODELS) or audit.prompts is None:
        return
    own = key.round is not None and audit.config.generate.policy == "student"
    sampler = sampling_policy(audit.config, key.round) if own and key.round is not None else MODELS
    if key.round is not None and not audit.needs(key, sampler):
        return
    if own:
        expected_version = recorded_version(audit.manifests[sampler], sampler)
    elif key.round is not None and audit.config.generate.policy == "answers":
        expected_version = ANSWERS_VERSION
    else:
        expected_version = resolved_models(audit.store).teacher_version
    step = policy_steps(audit, sampler)
    parts = [
        _check_shard(audit, key, name, table, expected_version, step) for name, _, table in shards(audit, key, _COLUMNS)
    ]
    index = _joined(parts)
    distinct = _check_distinct(audit, key, index.sample_ids, "sample_id")
    if distinct:
        audit.rollouts[key] = index
    _check_answered(audit, key, index)


def _check_shard(
    audit: Audit, key: StageKey, name: str, table: pa.Table, version: str, step: int | None
) -> RolloutIndex:
    """Check a shard's ids, seeds and sampler row by row, then its tokens; return what is remembered of its rows."""
    assert audit.prompts is not None
    ids, prompt_ids = table.column("sample_id"), table.column("prompt_id")
    number = WARMUP if key.round is None else key.round
    rows = audit.prompts.rows(prompt_ids)

    def expect(column: str, holds: NDArray[np.bool_], expected: str) -> None:
        values = table.column(column)
        audit.expect_rows(name, 0, ids, column, holds, lambda i: f"{values[i].as_py()!r}, {expected}")

    expect("prompt_id", rows >= 0, "which table prompts does not have")
    held_out = audit.prompts.held_out[np.maximum(rows, 0)] & (rows >= 0)
    prefix = "ref" if key.round is None else f"r{number:03d}"
    padded = pc.utf8_lpad(table.column("sample_index").cast(pa.string()), 3, "0")
    named = pc.binary_join_element_wise(prefix, prompt_ids, padded, "-")
    expect("sample_id", np.asarray(pc.equal(ids, named)), f"should be {prefix}-<prompt_id>-<sample_index>")
    expect("round", table.column("round").to_numpy() == number, f"should be {number}")
    versions = table.column("policy_version")
    right = np.asarray(pc.equal(versions, version))
    if key.round is None:
        expected_from = f"the teacher of table models is {version}"
        if audit.config.warmup is not None and audit.config.warmup.responses == "answers":
            right = np.where(held_out, right, np.asarray(pc.equal(versions, ANSWERS_VERSION)))
    else:
        expect("prompt_id", ~held_out, "a held-out prompt: it must never be trained on")
        expected_from = f"the weights of its sampler are {version}"
    expect("policy_version", right, expected_from)
    if step is not None:
        steps = table.column("policy_step").to_numpy()
        expect("policy_step", steps == step, f"its sampler's weights have {step} optimizer steps")
    seeds = [
        sample_seed(audit.config.seed, number, prompt, index)
        for prompt, index in zip(prompt_ids.to_pylist(), table.column("sample_index").to_pylist(), strict=True)
    ]
    expect("seed", table.column("seed").to_numpy() == np.array(seeds, np.int64), "not what the run's seed gives")
    return _check_tokens(audit, key, name, table, held_out)


def _check_tokens(audit: Audit, key: StageKey, name: str, table: pa.Table, held_out: NDArray[np.bool_]) -> RolloutIndex:
    """Check a shard's log-probabilities, and return what is remembered of its rows; ``held_out``: of each prompt."""
    ids = table.column("sample_id")
    prompts, responses, sampled = (
        Ragged.from_arrow(table.column(c)) for c in ("prompt_ids", "response_ids", "sampled_logprobs")
    )
    scored = audit.config.score.student_logprobs == "sampled" and audit.config.generate.policy == "student"
    if key.round is not None and scored:
        missing = np.zeros(len(sampled.values) + 1, np.int64)
        np.cumsum(~np.isfinite(sampled.values), out=missing[1:])
        finite = np.diff(missing[sampled.offsets]) == 0
        audit.expect_rows(name, 0, ids, "sampled_logprobs", finite, lambda i: "has a token without a finite number")
    digest = row_digests(prompts.values, prompts.offsets, TOKENS)
    digest += row_digests(responses.values, responses.offsets, TOKENS, prompts.lengths)
    if key.round is not None:
        digest += row_digests(sampled.values, sampled.offsets, LOGPROBS)
    return RolloutIndex(
        ids,
        held_out,
        prompts.lengths,
        responses.lengths,
        table.column("policy_step").to_numpy(),
        mean_nll(sampled),
        digest,
    )


def mean_nll(logprobs: Ragged) -> NDArray[np.float64]:
    """Return each row's mean negative log-likelihood, nats per token; NaN for an empty row."""
    total = np.concatenate([[0.0], np.cumsum(np.maximum(-logprobs.values.astype(np.float64), 0.0))])
    sums, counts = np.diff(total[logprobs.offsets]), logprobs.lengths
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return means


def _joined(parts: list[RolloutIndex]) -> RolloutIndex:
    return RolloutIndex(
        pa.chunked_array([chunk for part in parts for chunk in part.sample_ids.chunks], pa.string()),
        np.concatenate([part.held_out for part in parts]),
        np.concatenate([part.prompt_tokens for part in parts]),
        np.concatenate([part.response_tokens for part in parts]),
        np.concatenate([part.policy_step for part in parts]),
        np.concatenate([part.nll for part in parts]),
        np.concatenate([part.digest for part in parts]),
    )


def _check_answered(audit: Audit, key: StageKey, index: RolloutIndex) -> None:
    """Check that no prompt was left out but those that were too long."""
    assert audit.prompts is not None
    config, dropped = audit.config, audit.counter(key, "dropped_prompts")
    held_out = int(audit.prompts.held_out.sum())
    train = len(audit.prompts.ids) - held_out
    if key.round is not None:
        asked, times = train, config.generate.samples_per_prompt
    else:
        asked, times = held_out, 1
        if config.warmup is not None:
            asked += train if config.warmup.prompts is None else min(train, config.warmup.prompts)
    if dropped is not None and len(index) != (asked - int(dropped)) * times:
        audit.broken(
            key.folder,
            f"holds {len(index):,} samples; {asked:,} prompts less {int(dropped):,} dropped, {times} each, make "
            f"{(asked - int(dropped)) * times:,}",
        )
    audit.expect_counter(key, "samples", len(index))
    audit.expect_counter(key, "tokens", int(index.response_tokens.sum()))


def require_models(audit: Audit, key: StageKey) -> None:
    """Check that a stage that writes a model wrote weights."""
    if key not in audit.sound:
        return
    folder = f"{key.folder}/{'student' if key == MODELS else 'model'}"
    names = {record.path for record in audit.manifests[key].outputs}
    weights = [name for name in names if name.startswith(f"{folder}/") and name.endswith(".safetensors")]
    if not weights or f"{folder}/config.json" not in names:
        audit.broken(folder, "holds no model: config.json or safetensors files are missing")
        audit.sound.discard(key)
    if key == MODELS:
        try:
            resolved_models(audit.store)
        except (ArtifactError, OSError):
            audit.broken(f"{key.folder}/models.json", "is not what stage `models` writes")
            audit.sound.discard(key)
