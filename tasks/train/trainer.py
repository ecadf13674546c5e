"""TRL's SFTTrainer, extended: packs with targets, CE + top-k KL, and one run over several rounds."""

import functools
import math
import types
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from schemas.config import GuardConfig, OptimizerConfig, WarmupConfig
from schemas.errors import DivergedError
from schemas.tables import IGNORE_LABEL
from tasks.checkpoint import CheckpointFolder, PlainCheckpoints
from tasks.language_model.head import OutputHead, hidden_states
from tasks.train.guard import ends_round, is_measured, is_over_budget
from tasks.train.loss import LossSums, Objective, Targets, loss_sums
from tasks.train.packs import PackCollator, PackReader
from tasks.train.policy_probe import PolicyProbe, probe_kl
from tasks.train.schedule import EpochSampler, RoundSchedule, cosine_scheduler, pack_costs
from tasks.trainer_settings import StepProgress, StepsDone


def add_distillation_head(model: PreTrainedModel, objective: Objective) -> None:
    """Let ``model(...)`` return LossSums instead of logits with ``distillation_targets``, or a probe's policy KL.

    The forward itself is extended, not replaced, so that wrappers around it (autocast, DDP, PEFT) still apply.
    """
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        distillation_targets: Targets | None = None,
        policy_probe: PolicyProbe | None = None,
        **kwargs: Any,
    ) -> Any:
        if policy_probe is not None:
            return {"policy_kl": probe_kl(self, policy_probe)}
        if distillation_targets is None:
            return original(*args, **kwargs)
        hidden = hidden_states(self, kwargs["input_ids"], kwargs["position_ids"])[0]
        return loss_sums(hidden, OutputHead.of(self), distillation_targets, objective)._asdict()

    model.forward = types.MethodType(forward, model)


def shard_model(model: torch.nn.Module, device: torch.device) -> None:
    """Divide a model's weights among all processes (FSDP2), layer by layer.

    What is in no layer (embeddings, output head, last norm) is gathered for the whole of a forward and backward pass,
    so that the fused loss finds the head's weights.

    Args:
        model: A language model, or adapters around one.
        device: Where this process trains.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    names = set(getattr(model, "_no_split_modules", None) or ())
    for layer in [module for module in model.modules() if type(module).__name__ in names]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


class _Guard(TrainerCallback):
    def __init__(self, schedule: RoundSchedule, guard: GuardConfig) -> None:
        self.schedule, self.guard = schedule, guard

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if is_over_budget(state.log_history, self.schedule.start_step, self.guard):
            control.should_save = control.should_training_stop = True


class NearPolicyTrainer(PlainCheckpoints, SFTTrainer):
    """Trains one round of a run.

    Loss of an optimizer step: (1 - kd_weight) CE + kd_weight KD, each a mean over the step's response tokens.

    Args:
        model: The student, float32 weights.
        args: TRL's settings.
        tokenizer: The student's.
        reader: The round's packs.
        schedule: Where the round lies in the run.
        optimizer_config: Learning rates.
        objective: The loss.
        guard: What to do when the student leaves its sampler too far behind, and how often to look; None where the
            packs are not of its own samples.
        probe: Where to look; None as with ``guard``.
        peft_config: Adapters to train instead of all weights.
        on_steps: Told steps done and steps of the round.
        checkpoint_folder: Where to keep checkpoints; None: keep none.
        shard: Divide weights, gradients and optimizer state among the processes (FSDP2).
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
        objective: Objective,
        guard: GuardConfig | None = None,
        probe: PolicyProbe | None = None,
        peft_config: Any = None,
        on_steps: StepsDone = lambda done, total: None,
        checkpoint_folder: CheckpointFolder | None = None,
        shard: bool = False,
    ) -> None:
        self.schedule, self.optimizer_config = schedule, optimizer_config
        self.objective: Objective = objective
        self.guard, self.probe = guard, probe
        self.checkpoint_folder = checkpoint_folder
        self.shards = shard
        self.sampler = EpochSampler(
            pack_costs(reader.seq_lengths, model.config.get_text_config().hidden_size),
            schedule.packs_per_step,
            args.seed,
            schedule.epochs_before,
            args.world_size,
            args.process_index,
        )
        # As many as an optimizer step takes, which the trainer asks for all at once.
        following = functools.partial(self.sampler.after, count=args.gradient_accumulation_steps)
        add_distillation_head(model, objective)
        super().__init__(
            model=model,
            args=args,
            # The last row stands for no pack, where a process has none to take.
            train_dataset=Dataset.from_dict({"pack": list(range(len(reader) + 1))}),
            data_collator=PackCollator(reader, following),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[
                StepProgress(on_steps, schedule.start_step),
                *([_Guard(schedule, guard)] if guard is not None and ends_round(schedule, guard) else []),
            ],
        )
        # The loss below divides by the step's response tokens itself.
        self.model_accepts_loss_kwargs = True
        self._sums: dict[str, Tensor] = {}
        if args.process_index > 0:
            # What is dropped out must differ; all that must not is drawn by now.
            torch.manual_seed(args.seed + args.process_index)

    def create_accelerator_and_postprocess(self) -> None:
        """Let accelerate leave the model as it is where its weights are divided: without DDP, but with autocast."""
        super().create_accelerator_and_postprocess()
        if self.shards:
            prepare = self.accelerator.prepare_model
            # Of a model that it evaluates accelerate expects no more than that.
            self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer, of the divided weights where they are to be divided."""
        if self.shards and self.optimizer is None:
            assert self.model is not None
            shard_model(self.model, self.args.device)
        return super().create_optimizer(model)

    # -- the loss --------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the micro-batch's share of the optimizer step's loss."""
        places = (inputs["labels"][0, 1:] != IGNORE_LABEL).nonzero()[:, 0]
        distil = self.objective.kd_weight > 0
        targets = Targets(
            places=places,
            labels=inputs["labels"][0, places + 1],
            topk_ids=inputs.get("topk_ids") if distil else None,
            topk_logprobs=inputs.get("topk_logprobs") if distil else None,
        )
        sums = LossSums(
            **model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], distillation_targets=targets)
        )
        tokens = len(places) if num_items_in_batch is None else num_items_in_batch
        loss = sums.loss / torch.as_tensor(tokens).clamp(min=1)
        parts = {"ce": sums.ce, "response_tokens": sums.ce.new_tensor(len(places))} | (
            {"kd": sums.kd} if distil else {}
        )
        # Kept on the device: a number read from a GPU waits for everything before it.
        self._sums = {name: value.double() + self._sums.get(name, 0.0) for name, value in parts.items()}
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP and FSDP2 average gradients over processes; the token count is theirs together.
            loss = loss * self.accelerator.num_processes
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's own parts to what is logged: token-weighted means in nats, over all processes.

        Raises:
            DivergedError: the step's loss or gradient is not finite.
        """
        if self._sums:
            totals = self.accelerator.reduce(torch.stack(list(self._sums.values())), "sum")
            sums = dict(zip(self._sums, totals.tolist(), strict=True))
            self._sums = {}
            tokens = sums.pop("response_tokens")
            if not all(map(math.isfinite, sums.values())):
                told = ", ".join(f"{name.upper()} {value:.4g}" for name, value in sums.items())
                raise DivergedError(
                    f"train: the loss of optimizer step {self.state.global_step} is not finite ({told} nats over "
                    f"{tokens:.0f} tokens); {self._remedy()}"
                )
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                raise DivergedError(
                    f"train: the gradient of optimizer step {self.state.global_step} is not finite; {self._remedy()}"
                )
            logs |= {name: value / tokens for name, value in sums.items()}
            logs["response_tokens"] = tokens
            logs["run_epoch"] = self.schedule.epoch(self.state.global_step)
            if self.guard is not None and is_measured(self.state.global_step, self.schedule, self.guard):
                logs["policy_kl"] = self.measured_policy_kl()
        super().log(logs, start_time)

    def _remedy(self) -> str:
        section = "warmup" if isinstance(self.optimizer_config, WarmupConfig) else "train"
        more = "" if self.optimizer_config.precision == "fp32" else f" or set `{section}.precision: fp32`"
        return f"lower `{section}.learning_rate`{more}"

    def measured_policy_kl(self) -> float:
        """Return how far the student is from its packs' sampler now, nats per token."""
        assert self.probe is not None, "a guard comes with a probe"
        model = self.model_wrapped
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            # Through the model as it is wrapped for training: its weights may lie on several devices.
            found = model(
                input_ids=self.probe.row.input_ids, position_ids=self.probe.row.position_ids, policy_probe=self.probe
            )
        model.train()
        return float(found["policy_kl"])

    # -- one run over all rounds -----------------------------------------------------------------------------------

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the run's cosine, which spans all rounds."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = cosine_scheduler(optimizer, self.schedule, self.optimizer_config)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        """Restore the state, counting this round's epochs from the round's own first step.

        Rounds differ in packs, so an epoch of an earlier round had another number of steps.
        """
        super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        done = max(self.state.global_step - self.schedule.start_step, 0)
        epochs, steps = divmod(done, self.schedule.steps_per_epoch)
        # With several processes the trainer cannot reach the sampler of an epoch that it resumes in the middle.
        self.sampler.set_epoch(epochs)
        return epochs, steps * self.args.gradient_accumulation_steps
