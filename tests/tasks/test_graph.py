"""Which stages a setting makes run again, and whose results a stage reads."""

from typing import Any

import pytest

from schemas.config import RunConfig, parse_config
from schemas.stage_key import WARMUP, StageKey
from tasks.graph import STAGES, loop
from tests.schemas.test_config import MINIMAL

ON_POLICY = {"rounds": 1, "train": {"on_policy": {}, "steps_per_round": 2}}
SERVED = {"engine": "server", "server": {"urls": ["http://a"]}}
ANSWERING = {"baseline", "evaluate", "generate", "reference"}


def config_of(*changes: dict[str, Any]) -> RunConfig:
    """Return a config with a warm-up and ``changes``, one after another."""

    def merged(values: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
        new = {
            name: merged(values.get(name) or {}, value) if isinstance(value, dict) else value
            for name, value in change.items()
        }
        return values | new

    values = MINIMAL | {"warmup": {}}
    for change in changes:
        values = merged(values, change)
    return parse_config(values)


def name_of(key: StageKey) -> str:
    return f"warm-up {key.stage}" if key.round == WARMUP and key.stage != "evaluate" else key.stage


@pytest.mark.parametrize(
    ("base", "change", "stages"),
    [
        (
            {},
            {"seed": 1},
            {"prompts", "models", "score", "train", "export", "warm-up train", "warm-up export"} | ANSWERING,
        ),
        ({}, {"prompts": {"split_seed": 7}}, {"prompts"}),
        ({}, {"prompts": {"too_long": "drop"}}, {"prompts", "models"}),
        ({}, {"teacher": {"quantization": "int8"}}, {"models", "reference"}),
        ({"generate": {"policy": "teacher"}}, {"teacher": {"dtype": "float32"}}, {"models", "reference", "generate"}),
        ({}, {"student": {"revision": "r"}}, {"models", "generate"}),
        ({}, {"warmup": {"learning_rate": 1e-3}}, {"warm-up train"}),
        ({}, {"warmup": {"prompts": 3}}, {"reference", "warm-up train"}),
        ({}, {"warmup": {"responses": "answers"}}, {"reference", "warm-up train"}),
        ({}, {"generate": {"temperature": 0.5}}, {"generate"}),
        ({}, {"generate": {"samples_per_prompt": 2}}, {"generate"}),
        ({}, {"generate": {"policy": "teacher"}}, {"generate"}),
        ({}, {"generate": {"max_new_tokens": 7}}, ANSWERING),
        ({}, {"generate": {"engine": "vllm"}}, ANSWERING),
        ({}, {"generate": SERVED}, {"generate"}),
        ({}, {"score": SERVED}, {"reference", "baseline", "score"}),
        ({"generate": {"policy": "teacher"}}, {"score": SERVED}, {"reference", "baseline", "score", "generate"}),
        ({}, {"score": {"top_k": 3}}, {"score", "filter", "pack"}),
        ({}, {"score": {"topk_dtype": "float32"}}, {"score", "filter", "pack"}),
        ({}, {"score": {"ifd_form": "ppl_ratio"}}, {"score"}),
        ({}, {"filter": {"max_delta_ifd": 0.5}}, {"filter"}),
        ({}, {"pack": {"max_tokens": 4096}}, {"filter", "pack", "warm-up pack"}),
        ({}, {"pack": {"shard_bins": 3}}, {"pack", "warm-up pack"}),
        # The schedule spans all rounds.
        ({}, {"rounds": 3}, {"train"}),
        ({}, {"train": {"kd_weight": 0.5}}, {"train"}),
        # A budget changes what comes out only where it ends a round.
        ({}, {"train": {"guard": {"max_policy_kl": 0.5}}}, set()),
        ({}, {"train": {"guard": {"action": "stop"}}}, set()),
        ({}, {"train": {"guard": {"action": "refresh"}}}, {"train"}),
        ({"train": {"guard": {"action": "refresh"}}}, {"train": {"guard": {"max_policy_kl": 0.5}}}, {"train"}),
        (ON_POLICY, {"generate": {"temperature": 0.5}}, {"train"}),
        (ON_POLICY, {"student": {"revision": "r"}}, {"models", "train"}),
        (ON_POLICY, {"teacher": {"quantization": "int8"}}, {"models", "reference", "train"}),
        ({}, {"export": {"dtype": "float32"}}, {"export", "warm-up export"}),
        ({}, {"evaluate": {"temperature": 0.5}}, {"baseline", "evaluate"}),
        ({}, {"evaluate": {"max_new_tokens": 9}}, {"baseline", "evaluate", "reference"}),
        ({"evaluate": {"generate": False}}, {"generate": {"max_new_tokens": 7}}, {"generate", "reference"}),
        ({}, {"generate": {"batch_size": 7}, "score": {"batch_tokens": 64}, "evaluate": {"batch_tokens": 99}}, set()),
    ],
)
def test_a_setting_is_read_by_these_stages(base: dict[str, Any], change: dict[str, Any], stages: set[str]) -> None:
    before, after = config_of(base), config_of(base, change)
    found = {
        name_of(key)
        for key in set(loop(before)) & set(loop(after))
        if STAGES[key.stage].config(before, key) != STAGES[key.stage].config(after, key)
    }
    assert found == stages


def inputs_of(config: RunConfig, stage: str, index: int | None = None) -> set[str]:
    key = StageKey(stage, index)
    assert key in loop(config)
    return {other.label for other in STAGES[stage].inputs(config, key)}


def test_stages_read_the_results_of_these() -> None:
    plain = config_of()
    assert inputs_of(plain, "prompts") == set()
    assert inputs_of(plain, "models") == {"prompts"}
    assert inputs_of(plain, "reference") == {"prompts", "models"}
    assert inputs_of(plain, "baseline") == {"prompts", "models", "reference"}
    assert inputs_of(plain, "pack", WARMUP) == {"prompts", "reference"}
    assert inputs_of(plain, "train", WARMUP) == {"models", "warm-up · pack"}
    assert inputs_of(plain, "export", WARMUP) == {"models", "warm-up · train"}
    assert inputs_of(plain, "evaluate", WARMUP) == {"prompts", "models", "reference", "warm-up · export"}
    for index, sampler in ((0, "warm-up · export"), (1, "round 0 · export")):
        here, before = f"round {index} · ", {f"round {index - 1} · train"} if index else set()
        assert inputs_of(plain, "generate", index) == {"prompts", "models", sampler}
        assert inputs_of(plain, "score", index) == {"models", sampler, f"{here}generate"}
        assert inputs_of(plain, "filter", index) == {f"{here}generate", f"{here}score"} | before
        assert inputs_of(plain, "pack", index) == {f"{here}generate", f"{here}score", f"{here}filter"}
        assert inputs_of(plain, "train", index) == {"warm-up · export", f"{here}pack"} | before
        assert inputs_of(plain, "export", index) == {"warm-up · export", f"{here}train"}
        assert inputs_of(plain, "evaluate", index) == {"prompts", "models", "reference", f"{here}export"}
    bare = config_of({"warmup": None})
    assert inputs_of(bare, "evaluate", WARMUP) == {"baseline"}
    assert inputs_of(bare, "train", 0) == {"models", "round 0 · pack"}
    # Sampled beside the training of the round before.
    ahead = config_of({"overlap": True, "rounds": 3})
    samplers = ["warm-up · export", "warm-up · export", "round 0 · export"]
    for index, sampler in enumerate(samplers):
        assert inputs_of(ahead, "generate", index) == {"prompts", "models", sampler}
        assert inputs_of(ahead, "score", index) == {"models", sampler, f"round {index} · generate"}
    sparse = config_of({"refresh_every": 2})
    assert inputs_of(sparse, "train", 1) == {"warm-up · export", "round 0 · pack", "round 0 · train"}
    for policy in ("teacher", "answers"):
        assert inputs_of(config_of({"generate": {"policy": policy}}), "generate", 0) == {"prompts", "models"}
    assert inputs_of(config_of(ON_POLICY), "train", 0) == {"prompts", "models", "warm-up · export"}
