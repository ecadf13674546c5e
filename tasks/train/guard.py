"""The near-policy guard: how far the student has moved from the policy whose samples it learns from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from schemas.config import GuardConfig
from tasks.train.schedule import RoundSchedule


def sampled_policy_kl(label_logprobs: Tensor, sampled_logprobs: Tensor) -> Tensor:
    """Estimate D_KL(pi_current || pi_gen) in nats at each token drawn from pi_gen, [n].

    With r = pi_current / pi_gen of the drawn token, r log r - (r - 1) has the KL as its mean under pi_gen and is never
    negative (the control variate r - 1 has mean 0). It costs nothing: the training pass has both log-probabilities.
    """
    log_ratio = label_logprobs.double() - sampled_logprobs.double()
    return log_ratio.exp() * log_ratio - torch.expm1(log_ratio)


def recent_policy_kl(history: Sequence[dict[str, Any]], start_step: int, window_steps: int) -> float | None:
    """Return the token-weighted mean policy KL of the last steps, nats per token.

    Args:
        history: Logged steps, with `step`, `policy_kl` and `response_tokens`.
        start_step: Optimizer steps before the round: earlier ones belong to another sampler.
        window_steps: Steps to look back on.

    Returns:
        None until the round has had so many steps.
    """
    steps = [entry for entry in history if "policy_kl" in entry and entry["step"] > start_step]
    if len(steps) < window_steps:
        return None
    last = steps[-window_steps:]
    tokens = sum(entry["response_tokens"] for entry in last)
    return float(sum(entry["policy_kl"] * entry["response_tokens"] for entry in last) / tokens)


def is_over_budget(history: Sequence[dict[str, Any]], start_step: int, guard: GuardConfig) -> bool:
    """Say whether the last steps' policy KL is above the guard's budget."""
    recent = recent_policy_kl(history, start_step, guard.window_steps)
    return recent is not None and guard.max_policy_kl is not None and recent > guard.max_policy_kl


def ends_round(schedule: RoundSchedule, guard: GuardConfig) -> bool:
    """Say whether being over budget ends the round: the last one has no sampler after it to refresh."""
    return guard.action == "stop" or (guard.action == "refresh" and not schedule.is_last)


def first_breach(history: Sequence[dict[str, Any]], schedule: RoundSchedule, guard: GuardConfig) -> str | None:
    """Return what to tell people of the first step at which the round was over budget; None if it never was."""
    steps = [entry for entry in history if "policy_kl" in entry and entry["step"] > schedule.start_step]
    for end in range(guard.window_steps, len(steps) + 1):
        window = steps[end - guard.window_steps : end]
        if is_over_budget(window, schedule.start_step, guard):
            return describe_breach(window, schedule, guard)
    return None


def describe_breach(history: Sequence[dict[str, Any]], schedule: RoundSchedule, guard: GuardConfig) -> str:
    """Return what to tell people of the budget being exceeded at the last step of ``history``."""
    recent = recent_policy_kl(history, schedule.start_step, guard.window_steps)
    return (
        f"at optimizer step {history[-1]['step']} the student is {recent:.4f} nats per token from the policy that "
        f"sampled its packs (mean of {guard.window_steps} steps); `train.guard.max_policy_kl` is {guard.max_policy_kl}"
    )
