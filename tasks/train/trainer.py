"""TRL's SFTTrainer, extended: packs with targets, CE + top-k KL, and one run over several rounds."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from schemas.config import OptimizerConfig
from schemas.errors import StageError
from tasks.language_model.head import OutputHead, hidden_states
from tasks.train.loss import KdForm, LossSums, Targets, loss_sums
from tasks.train.packs import PackCollator, PackReader
from tasks.train.schedule import EpochSampler, RoundSchedule, cosine_scheduler

StepsDone = Callable[[int, int], None]


def add_distillation_head(model: PreTrainedModel, form: KdForm, chunk: int) -> None:
    """Let ``model(..., distillation_targets=targets)`` return LossSums instead of logits.

    The forward itself is extended, not replaced, so that wrappers around it (autocast, DDP, PEFT) still apply.
    """
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, distillation_targets: Targets | None = None, **kwargs: Any) -> Any:
        if distillation_targets is None:
            return original(*args, **kwargs)
        hidden = hidden_states(self, kwargs["input_ids"], kwargs["position_ids"])[0]
        sums = loss_sums(hidden, OutputHead.of(self), distillation_targets, form, chunk)
        return {"ce": sums.ce, "kd": sums.kd, "label_logprobs": sums.label_logprobs}

    model.forward = types.MethodType(forward, model)


def sampled_policy_kl(label_logprobs: Tensor, sampled_logprobs: Tensor) -> Tensor:
    """Estimate D_KL(pi_current || pi_gen) in nats at each token drawn from pi_gen, [n].

    With r = pi_current / pi_gen of the drawn token, r log r - (r - 1) has the KL as its mean under pi_gen and is never
    negative (the control variate r - 1 has mean 0).
    """
    log_ratio = label_logprobs.double() - sampled_logprobs.double()
    return log_ratio.exp() * log_ratio - torch.expm1(log_ratio)


class _Progress(TrainerCallback):
    def __init__(self, schedule: RoundSchedule, on_steps: StepsDone) -> None:
        self.schedule, self.on_steps = schedule, on_steps

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        total = self.schedule.end_step - self.schedule.start_step
        self.on_steps(state.global_step - self.schedule.start_step, total)


class NearPolicyTrainer(SFTTrainer):
    """Trains one round of a run.

    Loss of an optimizer step: (1 - kd_weight) CE + kd_weight KD, each a mean over the step's response tokens.

    Args:
        model: The student, float32 weights.
        args: TRL's settings.
        tokenizer: The student's.
        reader: The round's packs.
        schedule: Where the round lies in the run.
        optimizer_config: Learning rates and chunk size.
        kd_weight: Lambda; 0 trains on labels alone and needs no targets.
        kd_form: See ``topk_forward_kl``.
        peft_config: Adapters to train instead of all weights.
        on_steps: Told steps done and steps of the round.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: SFTConfig,
        tokenizer: PreTrainedTokenizerBase,
        reader: PackReader,
        schedule: RoundSchedule,
        optimizer_config: OptimizerConfig,
        kd_weight: float,
        kd_form: KdForm,
        peft_config: Any = None,
        on_steps: StepsDone = lambda done, total: None,
    ) -> None:
        self.schedule, self.optimizer_config = schedule, optimizer_config
        self.kd_weight, self.kd_form, self.seed = kd_weight, kd_form, args.seed
        add_distillation_head(model, kd_form, optimizer_config.loss_chunk)
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"pack": list(range(len(reader)))}),
            data_collator=PackCollator(reader),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[_Progress(schedule, on_steps)],
        )
        # The loss below divides by the step's response tokens itself.
        self.model_accepts_loss_kwargs = True
        self._sums = {"ce": 0.0, "kd": 0.0, "policy_kl": 0.0, "response_tokens": 0.0}

    # -- the loss --------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the micro-batch's share of the optimizer step's loss."""
        places = (inputs["labels"][0, 1:] != -100).nonzero()[:, 0]
        targets = Targets(
            places=places,
            labels=inputs["labels"][0, places + 1],
            topk_ids=inputs.get("topk_ids") if self.kd_weight > 0 else None,
            topk_logprobs=inputs.get("topk_logprobs") if self.kd_weight > 0 else None,
        )
        sums = LossSums(
            **model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], distillation_targets=targets)
        )
        tokens = len(places) if num_items_in_batch is None else num_items_in_batch
        loss = ((1 - self.kd_weight) * sums.ce + self.kd_weight * sums.kd) / torch.as_tensor(tokens).clamp(min=1)
        if not torch.isfinite(loss):
            raise StageError(
                f"train: the loss of optimizer step {self.state.global_step + 1} is not finite "
                f"(CE {sums.ce.item():.4g}, KD {sums.kd.item():.4g} nats over {len(places)} tokens); lower "
                "`train.learning_rate` or set `train.precision: fp32`"
            )
        self._sums["ce"] += sums.ce.item()
        self._sums["kd"] += sums.kd.item()
        self._sums["response_tokens"] += len(places)
        if "sampled_logprobs" in inputs:
            kl = sampled_policy_kl(sums.label_logprobs, inputs["sampled_logprobs"])
            self._sums["policy_kl"] += kl.sum().item()
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages gradients over processes; the token count is theirs together.
            loss = loss * self.accelerator.num_processes
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's own parts to what is logged: token-weighted means in nats."""
        tokens = self._sums["response_tokens"]
        if tokens:
            gradient = logs.get("grad_norm", 0.0)
            if not torch.isfinite(torch.tensor(gradient)):
                raise StageError(
                    f"train: the gradient of optimizer step {self.state.global_step} is not finite; lower "
                    "`train.learning_rate` or set `train.precision: fp32`"
                )
            logs |= {name: self._sums[name] / tokens for name in ("ce", "kd", "policy_kl")}
            logs["response_tokens"] = tokens
            logs["run_epoch"] = self.schedule.epoch(self.state.global_step)
            self._sums = dict.fromkeys(self._sums, 0.0)
        super().log(logs, start_time)

    # -- one run over all rounds -----------------------------------------------------------------------------------

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the run's cosine, which spans all rounds."""
        if self.lr_scheduler is None:
            config, optimizer = self.optimizer_config, optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = cosine_scheduler(
                optimizer,
                self.schedule,
                config.learning_rate,
                config.min_learning_rate,
                config.warmup_ratio,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return EpochSampler(self.schedule.packs, self.seed, self.schedule.epochs_before)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        """Restore the state, counting this round's epochs from the round's own first step.

        Rounds differ in packs, so an epoch of an earlier round had another number of steps.
        """
        super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        done = max(self.state.global_step - self.schedule.start_step, 0)
        epochs, steps = divmod(done, self.schedule.steps_per_epoch)
        return epochs, steps * self.args.gradient_accumulation_steps

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: stage export writes the card."""
