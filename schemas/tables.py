"""The tables stages write and read: Arrow types, value checks, versions. docs/artifacts.md says what they mean."""

from dataclasses import dataclass, field

import pandera.pyarrow as pandera
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import ArtifactError
from schemas.untrusted_text import readable

SCHEMA_KEY, VERSION_KEY, RUN_KEY = b"npd.schema", b"npd.schema_version", b"npd.run_id"

IGNORE_LABEL = -100
"""Label of positions without loss, as PyTorch and transformers use it."""

FILLER_ID = -1
"""Target id where a position has no targets: outside every vocabulary, so a use by mistake fails."""


@dataclass(frozen=True)
class TableSchema:
    """One table's contract.

    Args:
        name: Written to the Parquet metadata and shown in errors.
        version: Raised when a column changes its type or meaning.
        columns: Arrow fields in order; a field that is not nullable may hold no null.
        checks: pandera checks of single columns.
        parallel: Groups of list columns that must have equal list lengths in every row.
        unique: Columns whose values may not repeat within one table.
        unique_together: Columns whose values together may not repeat within one table.
    """

    name: str
    version: int
    columns: pa.Schema
    checks: dict[str, list[pandera.Check]] = field(default_factory=dict)
    parallel: tuple[tuple[str, ...], ...] = ()
    unique: tuple[str, ...] = ()
    unique_together: tuple[str, ...] = ()

    def validate_columns(self, found: pa.Schema, where: str) -> None:
        """Check names and types of a table's columns; see ``validate``."""
        missing = [name for name in self.columns.names if name not in found.names]
        if missing:
            raise ArtifactError(f"{where}: table `{self.name}` lacks column(s) {', '.join(missing)}")
        twice = [name for name in self.columns.names if found.names.count(name) > 1]
        if twice:
            raise ArtifactError(f"{where}: table `{self.name}` has column(s) {', '.join(twice)} more than once")
        wrong = [
            f"`{column.name}` is {readable(str(found.field(column.name).type), 100)}, should be {column.type}"
            for column in self.columns
            if found.field(column.name).type != column.type
        ]
        if wrong:
            raise ArtifactError(f"{where}: table `{self.name}` v{self.version}: {'; '.join(wrong)}")

    def validate(self, table: pa.Table, where: str) -> pa.Table:
        """Check ``table`` and return it.

        Args:
            table: The table, whole or one part of it.
            where: File or stage that an error should name.

        Raises:
            ArtifactError: names ``where``, every offending column and what it should be.
        """
        self.validate_columns(table.schema, where)
        contract = pandera.DataFrameSchema(
            {
                column.name: pandera.Column(
                    checks=self.checks.get(column.name, []),
                    nullable=column.nullable,
                    unique=column.name in self.unique,
                )
                for column in self.columns
                if not pa.types.is_nested(column.type)
            }
        )
        flat = [column.name for column in self.columns if not pa.types.is_nested(column.type)]
        try:
            contract.validate(table.select(flat), lazy=True)
        except pandera.errors.SchemaErrors as error:
            raise ArtifactError(f"{where}: table `{self.name}`: {_failures(error)}") from None
        together = list(self.unique_together)
        if together and table.group_by(together).aggregate([]).num_rows != table.num_rows:
            raise ArtifactError(f"{where}: table `{self.name}`: rows repeat in {', '.join(together)}")
        nested = [column for column in self.columns if pa.types.is_nested(column.type)]
        with_null = [
            c.name for c in nested if any(_has_null(chunk, c.nullable) for chunk in table.column(c.name).chunks)
        ]
        if with_null:
            raise ArtifactError(f"{where}: table `{self.name}`: null in column(s) {', '.join(with_null)}")
        for first, *others in self.parallel:
            lengths = pc.list_value_length(table.column(first))
            for other in others:
                if not lengths.equals(pc.list_value_length(table.column(other))):
                    raise ArtifactError(
                        f"{where}: table `{self.name}`: `{other}` is not as long as `{first}` in every row"
                    )
        return table


def _has_null(array: pa.Array, nullable: bool) -> bool:
    """Say whether a row is null, unless it may be, or anything inside one is."""
    if array.null_count and not nullable:
        return True
    if pa.types.is_struct(array.type):
        return any(_has_null(child, False) for child in array.flatten())
    return pa.types.is_nested(array.type) and _has_null(array.flatten(), False)


def _failures(error: pandera.errors.SchemaErrors) -> str:
    failures = {
        f"`{failure.schema.name}` {failure.check or failure.reason_code}"
        if failure.schema is not None
        else str(failure)
        for failure in error.schema_errors
    }
    return "; ".join(sorted(failures))


def _required(name: str, dtype: pa.DataType) -> pa.Field:
    return pa.field(name, dtype, nullable=False)


_AT_LEAST_0 = [pandera.Check.ge(0)]
_LIST_INT32 = pa.list_(pa.int32())

PROMPTS = TableSchema(
    name="prompts",
    version=2,
    columns=pa.schema(
        [
            _required("prompt_id", pa.string()),
            _required("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
            pa.field("answer", pa.string()),
            # JSON: what a response is checked with (tasks/verification); null where it cannot be.
            pa.field("verification", pa.string()),
            _required("source", pa.string()),
            _required("source_row", pa.int64()),
            _required("split", pa.string()),
        ]
    ),
    checks={"split": [pandera.Check.isin(["train", "held_out"])]},
    unique=("prompt_id",),
)

GENERATE = TableSchema(
    name="generate",
    version=1,
    columns=pa.schema(
        [
            _required("sample_id", pa.string()),
            _required("prompt_id", pa.string()),
            _required("sample_index", pa.int32()),
            _required("round", pa.int32()),
            _required("policy_version", pa.string()),
            _required("policy_step", pa.int64()),
            _required("prompt_ids", _LIST_INT32),
            _required("response_ids", _LIST_INT32),
            _required("response", pa.string()),
            _required("finish_reason", pa.string()),
            _required("sampled_logprobs", pa.list_(pa.float32())),
            _required("seed", pa.int64()),
        ]
    ),
    checks={
        "finish_reason": [pandera.Check.isin(["stop", "length"])],
        "sample_index": _AT_LEAST_0,
        "policy_step": _AT_LEAST_0,
    },
    parallel=(("response_ids", "sampled_logprobs"),),
    unique=("sample_id",),
)


def targets_type(top_k: int, dtype: str) -> tuple[pa.DataType, pa.DataType]:
    """Return the Arrow types of the top-k ids and log-probabilities; ``dtype`` is `float16` or `float32`."""
    value = {"float16": pa.float16(), "float32": pa.float32()}[dtype]
    return pa.list_(pa.list_(pa.int32(), top_k)), pa.list_(pa.list_(value, top_k))


SCORES = (
    "student_nll",
    "student_nll_uncond",
    "teacher_nll",
    "teacher_nll_uncond",
    "student_ifd",
    "teacher_ifd",
    "delta_ifd",
)
"""Columns of the score table with one number a sample."""


def score_schema(top_k: int, dtype: str) -> TableSchema:
    """Return the score table's schema for ``top_k`` targets stored as ``dtype``."""
    ids, logprobs = targets_type(top_k, dtype)
    return TableSchema(
        name="score",
        version=1,
        columns=pa.schema(
            [
                _required("sample_id", pa.string()),
                _required("response_tokens", pa.int32()),
                # Null where a response has no token to average over.
                *(pa.field(name, pa.float32()) for name in SCORES),
                _required("teacher_topk_ids", ids),
                _required("teacher_topk_logprobs", logprobs),
            ]
        ),
        checks={"response_tokens": _AT_LEAST_0, "student_nll": _AT_LEAST_0, "teacher_nll": _AT_LEAST_0},
        parallel=(("teacher_topk_ids", "teacher_topk_logprobs"),),
        unique=("sample_id",),
    )


# The next two are a score stage's own, gone once it is done: what it keeps of the student until the teacher is loaded.
SCORE_STUDENT = TableSchema(
    name="score_student",
    version=1,
    columns=pa.schema([pa.field("nll", pa.float64()), pa.field("nll_uncond", pa.float64())]),
    checks={"nll": _AT_LEAST_0, "nll_uncond": _AT_LEAST_0},
)

SCORE_CHECK = TableSchema(
    name="score_check",
    version=1,
    columns=pa.schema(
        [
            _required("sample_id", pa.string()),
            _required("response_tokens", pa.int32()),
            # Mean absolute difference of the sampler's log-probabilities from a prefill's, nats per token.
            _required("gap", pa.float64()),
        ]
    ),
    checks={"response_tokens": _AT_LEAST_0, "gap": _AT_LEAST_0},
    unique=("sample_id",),
)

ZONES = ("learnable", "degenerate", "cognitive_disconnect")

FILTER = TableSchema(
    name="filter",
    version=2,
    columns=pa.schema(
        [
            _required("sample_id", pa.string()),
            pa.field("delta_ifd", pa.float32()),
            # Null where there is no finite delta-IFD to place.
            pa.field("zone", pa.string()),
            _required("keep", pa.bool_()),
            _required("reason", pa.string()),
            _required("min_delta_ifd", pa.float32()),
            _required("max_delta_ifd", pa.float32()),
            # Optimizer steps between the weights that sampled and those that begin to learn from the sample.
            _required("policy_lag", pa.int64()),
        ]
    ),
    checks={"zone": [pandera.Check.isin(list(ZONES))], "policy_lag": _AT_LEAST_0},
    unique=("sample_id",),
)


def pack_schema(top_k: int | None, dtype: str = "float16") -> TableSchema:
    """Return the pack table's schema; without ``top_k`` (the warm-up) it has no targets."""
    columns = [
        _required("pack_id", pa.int64()),
        _required("input_ids", _LIST_INT32),
        _required("labels", _LIST_INT32),
        _required("seq_lengths", _LIST_INT32),
        _required("sample_ids", pa.list_(pa.string())),
    ]
    parallel: tuple[tuple[str, ...], ...] = (("input_ids", "labels"), ("seq_lengths", "sample_ids"))
    if top_k is not None:
        ids, logprobs = targets_type(top_k, dtype)
        columns += [
            # The sampler's own log-probability of each response token (nats), NaN where labels are -100.
            _required("sampled_logprobs", pa.list_(pa.float32())),
            _required("teacher_topk_ids", ids),
            _required("teacher_topk_logprobs", logprobs),
        ]
        parallel = (
            ("input_ids", "labels", "sampled_logprobs", "teacher_topk_ids", "teacher_topk_logprobs"),
            ("seq_lengths", "sample_ids"),
        )
    return TableSchema(
        name="pack" if top_k is not None else "pack_sft",
        version=1,
        columns=pa.schema(columns),
        checks={"pack_id": _AT_LEAST_0},
        parallel=parallel,
        unique=("pack_id",),
    )


TRAIN_METRICS = TableSchema(
    name="train_metrics",
    version=2,
    columns=pa.schema(
        [
            _required("step", pa.int64()),
            _required("epoch", pa.float64()),
            _required("round", pa.int32()),
            _required("loss", pa.float64()),
            # Null in on-policy training, which has no hard labels.
            pa.field("ce", pa.float64()),
            # Null where no targets are learned from: warm-up, `train.kd_weight: 0`.
            pa.field("kd", pa.float64()),
            _required("learning_rate", pa.float64()),
            _required("grad_norm", pa.float64()),
            _required("response_tokens", pa.int64()),
            # Null: a rate is a time, and times live in the manifest only, so that tables repeat byte for byte.
            pa.field("tokens_per_second", pa.float64()),
            # Null where the student did not sample what it learns from: warm-up, `generate.policy`, on-policy.
            pa.field("policy_kl", pa.float64()),
            # Optimizer steps since the weights that sampled what the step learned from; null as above.
            pa.field("policy_lag", pa.int64()),
        ]
    ),
    checks={"step": _AT_LEAST_0, "response_tokens": _AT_LEAST_0},
    unique=("step",),
)

METRICS_FILE, RESPONSES_FILE = "metrics.parquet", "responses.parquet"
"""One file a stage: metrics of train, evaluate, baseline and rl; responses of evaluate and baseline."""

AGREEMENT_METRICS = ("kl_teacher_student", "kl_student_teacher", "top1_agreement")
"""Metrics of a student against the teacher, on the teacher's responses to held-out prompts."""

RESPONSE_METRICS = ("accuracy", "response_tokens", "truncation_rate", "repetition")
"""Metrics of a model's own responses to held-out prompts."""

EVALUATED_MODELS = ("student", "teacher", "start", "rl")
"""`student` is the one a round ends with, `start` the one the run begins with."""

EVALUATE_METRICS = TableSchema(
    name="evaluate_metrics",
    version=2,
    columns=pa.schema(
        [
            _required("round", pa.int32()),
            _required("metric", pa.string()),
            _required("value", pa.float64()),
            _required("n", pa.int64()),
            _required("stderr", pa.float64()),
            _required("model", pa.string()),
        ]
    ),
    checks={"n": _AT_LEAST_0, "stderr": _AT_LEAST_0, "model": [pandera.Check.isin(list(EVALUATED_MODELS))]},
    unique_together=("model", "metric"),
)

EVALUATE_RESPONSES = TableSchema(
    name="evaluate_responses",
    version=1,
    columns=pa.schema(
        [
            _required("model", pa.string()),
            _required("round", pa.int32()),
            _required("prompt_id", pa.string()),
            _required("sample_index", pa.int32()),
            _required("response", pa.string()),
            _required("response_tokens", pa.int32()),
            _required("finish_reason", pa.string()),
            # In [0, 1], 1 is right; null where the prompt has nothing to check against.
            pa.field("score", pa.float64()),
            # Share of the response's token 4-grams that stood in it before.
            _required("repetition", pa.float64()),
        ]
    ),
    checks={
        "model": [pandera.Check.isin(list(EVALUATED_MODELS))],
        "sample_index": _AT_LEAST_0,
        "response_tokens": _AT_LEAST_0,
        "finish_reason": [pandera.Check.isin(["stop", "length"])],
        "score": [pandera.Check.in_range(0, 1)],
        "repetition": [pandera.Check.in_range(0, 1)],
    },
    unique_together=("model", "prompt_id", "sample_index"),
)
