"""TRL's GRPOTrainer, with this project's prompts as tokens and its checkpoints."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl.trainer.grpo_config import GRPOConfig as TRLConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from schemas.errors import DivergedError
from tasks.checkpoint import CheckpointFolder, PlainCheckpoints
from tasks.language_model.ragged import Ragged
from tasks.rl.reward import VerifiedReward
from tasks.trainer_settings import StepProgress, StepsDone

_OF_TOKENS = ("entropy", "kl", "clip_ratio/region_mean")
"""What TRL measures as a mean over the response tokens of one forward pass, of which a step may have several."""


def prompt_order(prompts: int, needed: int, seed: int) -> NDArray[np.int64]:
    """Return which prompt is answered when: every prompt once, in random order, before any is met again.

    >>> order = prompt_order(3, 7, 0)
    >>> sorted(order[:3].tolist()), sorted(order[3:6].tolist()), len(order)
    ([0, 1, 2], [0, 1, 2], 7)

    Args:
        prompts: How many there are.
        needed: How many are answered in the whole run.
        seed: Draws the order.
    """
    random = np.random.default_rng(seed)
    passes = [random.permutation(prompts) for _ in range(-(-needed // prompts))]
    return np.concatenate(passes)[:needed]


class VerifiedGRPOTrainer(PlainCheckpoints, GRPOTrainer):
    """Trains on verified rewards.

    The dataset is the whole run, in order, so that a resumed run meets the prompts that are left.

    Args:
        model: The start, float32 weights.
        args: TRL's settings.
        tokenizer: The model's.
        reward: Scores responses.
        tokens: Each train prompt, up to where the reply begins.
        order: Which prompt is answered when.
        on_steps: Told steps done and steps in all.
        checkpoint_folder: Where to keep checkpoints.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TRLConfig,
        tokenizer: PreTrainedTokenizerBase,
        reward: VerifiedReward,
        tokens: Ragged,
        order: NDArray[np.int64],
        on_steps: StepsDone,
        checkpoint_folder: CheckpointFolder,
    ) -> None:
        self._prompt_tokens = tokens
        self._learned_tokens: list[int] = []
        super().__init__(
            model=model,
            reward_funcs=reward,
            args=args,
            # TRL repeats and copies prompts; it carries their numbers, and their tokens come from here.
            train_dataset=Dataset.from_dict({"prompt": [str(row) for row in order], "row": order}),
            processing_class=tokenizer,
            callbacks=[StepProgress(on_steps)],
        )
        self.checkpoint_folder = checkpoint_folder
        if args.use_vllm:
            # TRL gives the engine in this process the seed 0, and it has seeded all of the process with that.
            set_seed(args.seed)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Return tokens in which control tokens are the template's own, as in every stage."""
        return [self._prompt_tokens[int(prompt)].tolist() for prompt in prompts], None, {}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Return TRL's loss; note the response tokens that it is of."""
        self._learned_tokens.append(int(inputs["completion_mask"].sum()))
        compute: Callable[..., Any] = super()._compute_loss
        return compute(model, inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step: means over response tokens are over all of the step's, however they were passed.

        Raises:
            DivergedError: its loss or gradient is not finite.
        """
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise DivergedError(
                    f"rl: `{name}` of optimizer step {self.state.global_step} is not finite; lower "
                    "`grpo.learning_rate` or set `grpo.precision: fp32`"
                )
        tokens, self._learned_tokens = self._learned_tokens, []
        for values in (self._metrics["train"][name] for name in _OF_TOKENS if name in self._metrics["train"]):
            # TRL gives each pass the same weight, also one of which every response is masked.
            if any(tokens):
                values[:] = [float(np.average(values, weights=tokens))]
        # A time, which checkpoints must not hold: the same run gives the same bytes.
        self._metrics["train"].pop("step_time", None)
        super().log(logs, start_time)
