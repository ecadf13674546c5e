"""The stages of an RL run, in order."""

from typing import Any

from schemas.config import RLConfig
from schemas.stage_key import StageKey
from tasks.graph import PROMPTS, Stage

BASELINE, RL, EVALUATE = StageKey("baseline"), StageKey("rl"), StageKey("evaluate")

RL_LOOP = (PROMPTS, BASELINE, RL, EVALUATE)
"""Every stage of the run, in the order in which they run."""


def _prompts_config(config: RLConfig, key: StageKey) -> dict[str, Any]:
    if config.prompts is None:
        return {"prompts": None}
    return {"seed": config.prompts.split_by(config.seed), "prompts": config.prompts.fingerprinted()}


def _evaluate_config(config: RLConfig, key: StageKey) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "evaluate": config.evaluate.fingerprinted(),
        "max_new_tokens": config.evaluate.max_new_tokens or config.grpo.max_new_tokens,
        "trust_remote_code": config.trust_remote_code,
    }


def _rl_config(config: RLConfig, key: StageKey) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "grpo": config.grpo.fingerprinted(),
        "export": config.export.fingerprinted(),
        "trust_remote_code": config.trust_remote_code,
    }


RL_STAGES: dict[str, Stage[RLConfig]] = {
    "prompts": Stage("tasks.rl.prompts", 1, _prompts_config, lambda c, k: [], own_process=False),
    "baseline": Stage("tasks.rl.baseline", 1, _evaluate_config, lambda c, k: [PROMPTS]),
    "rl": Stage("tasks.rl.train", 1, _rl_config, lambda c, k: [PROMPTS]),
    "evaluate": Stage("tasks.rl.evaluate", 1, _evaluate_config, lambda c, k: [PROMPTS, RL]),
}
