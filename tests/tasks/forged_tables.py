"""Wrong tables: what `verify` must find under manifests that fit them."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from schemas.config import RunSettings
from schemas.manifest import record_bytes
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import IGNORE_LABEL
from tasks.audit.tables import stage_schema
from tasks.graph import PROMPTS, REFERENCE
from tasks.stage import plan, stages_of

Change = Callable[[pa.Table], pa.Table]


def reseal(store: RunStore, config: RunSettings) -> None:
    """Make every manifest fit the files and the manifests before it, as whoever forges a table would."""
    for key in stages_of(config):
        manifest, planned = store.finished(key), plan(store, config, key)
        update = {"inputs": planned.inputs, "fingerprint": planned.fingerprint, "outputs": store.outputs(key)}
        store.write_bytes(store.path(key, "manifest.json"), record_bytes(manifest.model_copy(update=update)))


def forge(store: RunStore, config: RunSettings, key: StageKey, change: Change, shard: int = 0) -> None:
    """Replace a shard of a table by what ``change`` makes of it; to be resealed."""
    path = store.table_files(key)[shard]
    schema = stage_schema(config, key, path.name)
    assert schema is not None
    store.write_table(path, change(store.read_part(path, schema)), schema)


def put(column: str, value: Any, row: int = 0) -> Change:
    """Put ``value`` (or what it returns for the value there) into one row of a column."""

    def change(table: pa.Table) -> pa.Table:
        values = table.column(column).to_pylist()
        values[row] = value(values[row]) if callable(value) else value
        place = table.schema.get_field_index(column)
        return table.set_column(place, table.field(column), pa.array(values, table.field(column).type))

    return change


def put_at(column: str, place: int, value: Any) -> Change:
    """Put ``value`` into one place (from the end if negative) of the first row's list."""

    def change(values: list[Any]) -> list[Any]:
        values[place] = value(values[place]) if callable(value) else value
        return values

    return put(column, change)


def swap_rows(table: pa.Table) -> pa.Table:
    return table.take([1, 0, *range(2, table.num_rows)])


def second_answer(table: pa.Table) -> pa.Table:
    """Let the second response answer the prompt of the third."""
    other = table.column("prompt_id")[2].as_py()
    return put("prompt_id", other, 1)(put("sample_index", 1, 1)(table))


FORGERIES: dict[StageKey, list[tuple[int, Change, str]]] = {
    PROMPTS: [
        (0, put("messages", [{"role": "user", "content": "other"}], 3), "row 3, .*`messages`: are those of prompt"),
        (0, put("split", lambda s: "train" if s == "held_out" else "held_out"), "row 0, .*`split`: the seed draws"),
    ],
    REFERENCE: [(0, put("policy_version", "f" * 16), "the teacher of table models is")],
    StageKey("generate", 1): [
        (0, put("policy_version", "f" * 16, 2), "row 2, .*the weights of its sampler are"),
        (0, put("policy_step", lambda n: n + 1), "row 0, .*its sampler's weights have"),
        (0, put("seed", lambda n: n ^ 1, 4), "row 4, .*not what the run's seed gives"),
        (0, put("round", 0), "`round`: 0, should be 1"),
        (0, put_at("sampled_logprobs", 1, float("inf")), "`sampled_logprobs`: has a token without a finite number"),
        (1, put("prompt_id", "0" * 16), "table prompts does not have"),
        (0, put("sample_id", "r001-x-000", 1), "row 1, .*should be r001-<prompt_id>-<sample_index>"),
        (1, lambda t: t.slice(0, t.num_rows - 1), "holds 39 samples; 10 prompts less 0 dropped, 4 each, make 40"),
    ],
    StageKey("score", 1): [
        (0, put("response_tokens", lambda n: n + 1), "`response_tokens`: .*, the response has"),
        (0, put("delta_ifd", lambda x: x + 0.5, 2), "row 2, .*`delta_ifd`: .*the two IFD values make"),
        (0, put("teacher_ifd", 9.0, 3), "row 3, .*`teacher_ifd`: 9, but its negative log-likelihoods make"),
        (1, put("student_nll", lambda x: x * 1.5), "`student_nll`: .*the sampler's own log-probabilities make"),
        (2, put_at("teacher_topk_logprobs", 0, lambda k: k[::-1]), "the most likely first"),
        (3, swap_rows, "row 0, .*`sample_id`: stage generate has"),
        (4, lambda t: t.slice(1), "scores 39 samples, `round 1 · generate` has 40"),
        (0, put_at("teacher_topk_ids", 0, lambda k: [-1, *k[1:]]), "a token's targets are not ids"),
        (1, put_at("teacher_topk_logprobs", 0, lambda k: [0.5, *k[1:]]), "with log-probabilities up to 0"),
    ],
    StageKey("filter", 1): [
        (0, put("delta_ifd", 0.5), "`delta_ifd`: 0.5, the score table has"),
        (0, put("zone", "degenerate", 1), "row 1, .*`zone`: 'degenerate', its bounds make it"),
        (0, put("reason", "too_long_for_pack", 2), "`reason`: 'too_long_for_pack', its score, its length"),
        (0, put("keep", lambda keep: not keep, 3), "row 3, .*`keep`: .*its reason makes it"),
        (0, put("max_delta_ifd", 7.0), "`max_delta_ifd`: 7.0, the config makes it"),
        (0, put("policy_lag", lambda n: n + 1), "`policy_lag`: .*the steps of sampler and training"),
        (1, swap_rows, "`sample_id`: .*stage score has in this place"),
        (2, lambda t: t.slice(1), "has 39 rows, `round 1 · score` has 40"),
    ],
    StageKey("pack", 1): [
        (0, put_at("input_ids", -1, 77), "sample r001-.*`input_ids`: .*has 77, stage generate makes it"),
        (1, put_at("input_ids", 2, 77), "`input_ids`: token 2 of the sequence .prompt token 2. has 77"),
        (2, put_at("labels", -1, IGNORE_LABEL), "`labels`: .*has -100, stage generate makes it"),
        (3, put_at("labels", 1, 5), "`labels`: token 1 .*has 5, stage generate makes it -100"),
        (4, put_at("sampled_logprobs", -1, -0.25), "`sampled_logprobs`: .*has -0.25, stage generate"),
        (5, put_at("sampled_logprobs", 0, -0.25), "`sampled_logprobs`: token 0 .*has -0.25"),
        (6, put_at("teacher_topk_ids", -1, lambda k: k[::-1]), "`teacher_topk_ids`: .*stage score"),
        (7, put_at("teacher_topk_ids", 0, lambda k: [1] * len(k)), "`teacher_topk_ids`: token 0"),
        (8, put_at("teacher_topk_logprobs", -1, lambda k: [2 * x for x in k]), "`teacher_topk_logprobs`: .*score"),
        (9, put_at("seq_lengths", 0, lambda n: n + 1), "`seq_lengths`: add up to"),
        (9, put("pack_id", 99), "`pack_id`: should be 9"),
        (10, put_at("sample_ids", 0, "r001-x-000"), "packs sample r001-x-000, which was never sampled"),
        (10, lambda t: t, "sample .* is kept, but in no pack"),
        (11, put("sample_ids", lambda ids: [ids[1], ids[1], *ids[2:]]), "is packed more than once"),
    ],
    StageKey("pack", 0): [
        (0, put("seq_lengths", lambda n: [n[0] + 1, n[1] - 1, *n[2:]]), "`seq_lengths`: .*, prompt and response have"),
    ],
    StageKey("pack", WARMUP): [
        (0, put_at("labels", -1, 3), "sample ref-.*`labels`: .*has 3, stage reference makes it"),
    ],
    StageKey("train", 1): [
        (0, put("learning_rate", lambda x: x * 1.001), "`learning_rate`: .*the schedule makes it"),
        (0, put("epoch", 0.0), "`epoch`: 0, the schedule makes it"),
        (0, put("policy_lag", 40), "`policy_lag`: 40, the steps since its sampler's weights are"),
        (0, put("response_tokens", lambda n: n + 1), "the packs of this step have"),
        (0, put("ce", float("inf")), "`ce`: is not finite"),
        (0, put("round", 0, 1), "row 1, .*`round`: 0, should be 1"),
        (0, lambda t: t.slice(0, t.num_rows - 1), "the schedule ends the round at"),
    ],
    StageKey("train", WARMUP): [(0, put("step", lambda n: n + 50, 1), "`step`: 52, steps follow each other: 2")],
    StageKey("evaluate", 1): [
        (0, put("round", 0), "`round`: 0, should be 1"),
        (0, put("n", 3, 1), "`n`: 3, the held-out references have"),
        (0, put("metric", "other"), "lacks kl_teacher_student of the student"),
        (0, put("value", float("inf"), 2), "row 2, .*`value`: is not finite"),
        (0, lambda t: t, "`value`: .*the student's responses make it"),
        (1, put("prompt_id", "nowhere"), "`prompt_id`: is no held-out prompt"),
        (1, put("response_tokens", 3), "has 6 responses of the student to 5 prompts, 1 each expected"),
        (1, second_answer, "has responses of the student to 5 prompts, 6 are held out"),
        (1, put("round", 0, 2), "row 2, .*`round`: 0, should be 1"),
    ],
    StageKey("baseline"): [
        (0, put("model", "student"), "lacks response_tokens of the teacher"),
        (0, put("value", 1.5, 1), "`value`: .*the teacher's responses make it"),
        (1, put("model", "student", 3), "`model`: student is not evaluated by this stage"),
    ],
}
"""By stage: which shard is changed how, and what `verify` says of it."""
