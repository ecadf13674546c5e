"""The tables of an RL run; docs/artifacts.md says what they mean."""

import pandera.pyarrow as pandera
import pyarrow as pa

from schemas.tables import TableSchema

_AT_LEAST_0 = [pandera.Check.ge(0)]


def _required(name: str, dtype: pa.DataType) -> pa.Field:
    return pa.field(name, dtype, nullable=False)


RL_METRICS = TableSchema(
    name="rl_metrics",
    version=1,
    columns=pa.schema(
        [
            _required("step", pa.int64()),
            _required("loss", pa.float64()),
            _required("learning_rate", pa.float64()),
            _required("grad_norm", pa.float64()),
            # Mean over response tokens, nats.
            _required("entropy", pa.float64()),
            # From the start model, nats per response token; null where `grpo.beta` is 0 and nobody measures it.
            pa.field("kl", pa.float64()),
            # Share of response tokens whose probability ratio was clipped.
            _required("clip_ratio", pa.float64()),
            # The rest is of the step's responses; null in a step that learns once more from those of an earlier step.
            pa.field("score", pa.float64()),
            pa.field("reward", pa.float64()),
            pa.field("reward_std", pa.float64()),
            # Share of prompts whose responses all had one reward, so that nothing was learned from them.
            pa.field("equal_rewards", pa.float64()),
            pa.field("response_tokens", pa.float64()),
            pa.field("truncation_rate", pa.float64()),
        ]
    ),
    checks={"step": _AT_LEAST_0, "entropy": _AT_LEAST_0},
    unique=("step",),
)

RL_ROLLOUTS = TableSchema(
    name="rl_rollouts",
    version=1,
    columns=pa.schema(
        [
            # The optimizer step that learned from it (first).
            _required("step", pa.int64()),
            _required("prompt_id", pa.string()),
            _required("sample_index", pa.int32()),
            _required("response", pa.string()),
            _required("response_tokens", pa.int32()),
            _required("finish_reason", pa.string()),
            # The verifier's, from 0 to 1.
            _required("score", pa.float64()),
            _required("reward", pa.float64()),
        ]
    ),
    checks={
        "step": _AT_LEAST_0,
        "sample_index": _AT_LEAST_0,
        "response_tokens": _AT_LEAST_0,
        "finish_reason": [pandera.Check.isin(["stop", "length"])],
        "score": [pandera.Check.in_range(0, 1)],
    },
)
