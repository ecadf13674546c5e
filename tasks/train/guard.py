"""The near-policy guard: what follows from how far the student is from the policy whose samples it learns from."""

from collections.abc import Sequence
from typing import Any

from schemas.config import GuardConfig
from tasks.train.schedule import RoundSchedule


def is_measured(step: int, schedule: RoundSchedule, guard: GuardConfig) -> bool:
    """Say whether the policy KL is measured after optimizer step ``step`` of the run, one of the round's."""
    return step == schedule.end_step or (step - schedule.start_step) % guard.every_steps == 0


def policy_kls(history: Sequence[dict[str, Any]], start_step: int) -> list[tuple[int, float]]:
    """Return step and policy KL (nats per token) of the measurements after ``start_step``.

    Args:
        history: Logged steps, with `step` and some with `policy_kl`.
        start_step: Optimizer steps before the round: earlier ones belong to another sampler.
    """
    return [
        (entry["step"], entry["policy_kl"]) for entry in history if "policy_kl" in entry and entry["step"] > start_step
    ]


def is_over_budget(history: Sequence[dict[str, Any]], start_step: int, guard: GuardConfig) -> bool:
    """Say whether the newest policy KL of the round is above the guard's budget."""
    newest = _newest(history, start_step)
    return newest is not None and guard.max_policy_kl is not None and newest[1] > guard.max_policy_kl


def _newest(history: Sequence[dict[str, Any]], start_step: int) -> tuple[int, float] | None:
    """Return the last of ``policy_kls``, if there is one."""
    # From the end: asked after every step, all steps so far would take the square of their number.
    entry = next((entry for entry in reversed(history) if "policy_kl" in entry), None)
    return (entry["step"], entry["policy_kl"]) if entry is not None and entry["step"] > start_step else None


def ends_round(schedule: RoundSchedule, guard: GuardConfig) -> bool:
    """Say whether being over budget ends the round: the last one has no sampler after it to refresh."""
    return guard.action == "stop" or (guard.action == "refresh" and not schedule.is_last)


def first_breach(history: Sequence[dict[str, Any]], schedule: RoundSchedule, guard: GuardConfig) -> str | None:
    """Return what to tell people of the first step at which the round was over budget; None if it never was."""
    if guard.max_policy_kl is None:
        return None
    over = [found for found in policy_kls(history, schedule.start_step) if found[1] > guard.max_policy_kl]
    return _describe(*over[0], guard) if over else None


def last_breach(history: Sequence[dict[str, Any]], schedule: RoundSchedule, guard: GuardConfig) -> str:
    """Return what to tell people of the budget being exceeded at the round's newest measurement."""
    newest = _newest(history, schedule.start_step)
    assert newest is not None, "asked once the budget is exceeded"
    return _describe(*newest, guard)


def _describe(step: int, policy_kl: float, guard: GuardConfig) -> str:
    return (
        f"at optimizer step {step} the student is {policy_kl:.4f} nats per token from the policy that sampled its "
        f"packs; `train.guard.max_policy_kl` is {guard.max_policy_kl}"
    )
