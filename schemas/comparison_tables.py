"""The tables of a comparison, beside the runs it is made of."""

import pandera.pyarrow as pandera
import pyarrow as pa

from schemas.tables import TableSchema


def _required(name: str, dtype: pa.DataType) -> pa.Field:
    return pa.field(name, dtype, nullable=False)


COMPARISON_ROLES = ("teacher", "start", "baseline", "npd", "ablation")

_ANY_FLOAT = (
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    # NPD's accuracy less this one's, paired by seed and prompt, with its 95 % interval.
    "difference",
    "difference_low",
    "difference_high",
    # Nats per token.
    "kl_teacher_student",
    "kl_stderr",
    "policy_kl",
    # Wall-clock: median, lowest and highest over seeds, and the median over that of NPD.
    "seconds",
    "seconds_min",
    "seconds_max",
    "seconds_ratio",
    "learning_rate",
    # After GRPO, with its 95 % interval; null where a method's students did not continue.
    "rl_accuracy",
    "rl_low",
    "rl_high",
)

# The only tables that hold times: they are what these are about.
COMPARISON = TableSchema(
    name="comparison",
    version=1,
    columns=pa.schema(
        [
            _required("method", pa.string()),
            _required("title", pa.string()),
            _required("role", pa.string()),
            *(pa.field(name, pa.float64()) for name in _ANY_FLOAT),
            pa.field("generated_tokens", pa.int64()),
            pa.field("steps", pa.int64()),
            pa.field("seeds", pa.int32()),
            _required("test_prompts", pa.int64()),
        ]
    ),
    checks={"role": [pandera.Check.isin(list(COMPARISON_ROLES))]},
    unique=("method",),
)

COMPARISON_RUNS = TableSchema(
    name="comparison_runs",
    version=1,
    columns=pa.schema(
        [
            _required("method", pa.string()),
            _required("learning_rate", pa.float64()),
            _required("seed", pa.int64()),
            # Whether its learning rate is the one taken; the other runs only served to choose it.
            _required("chosen", pa.bool_()),
            # Null where no prompt can be checked.
            pa.field("accuracy", pa.float64()),
            pa.field("validation_accuracy", pa.float64()),
            _required("kl_teacher_student", pa.float64()),
            _required("kl_stderr", pa.float64()),
            pa.field("policy_kl", pa.float64()),
            _required("seconds", pa.float64()),
            _required("generated_tokens", pa.int64()),
            _required("steps", pa.int64()),
            # On the test prompts, after GRPO; null where this run's student did not continue.
            pa.field("rl_accuracy", pa.float64()),
        ]
    ),
)
