"""Training: the warm-up, the near-policy rounds, and export."""

from typing import Literal

from pydantic import Field, model_validator

from schemas.config.base import PLACEMENT, Section
from schemas.config.launch import LaunchConfig


class LoraConfig(Section):
    """Train low-rank adapters instead of all weights (needs the extra `lora`)."""

    r: int = Field(default=16, ge=1)
    """Rank."""

    alpha: int = Field(default=32, ge=1)
    """Scale of the update is alpha / r."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""

    target_modules: str | list[str] = "all-linear"
    """Which modules get an adapter."""


class GuardConfig(Section):
    """The near-policy guard: measures D_KL(current student || the policy that sampled its packs) while training."""

    max_policy_kl: float | None = Field(default=0.10, gt=0)
    """The budget, nats per token. The paper: about 0.10. null: no guard; the KL is recorded all the same."""

    every_steps: int = Field(default=10, ge=1)
    """Optimizer steps of a round from one measurement to the next; its last step is always measured."""

    probe_tokens: int = Field(default=2048, ge=1)
    """Response tokens it is measured at, of samples that the round trains on, the same ones throughout a round; at most
    as many tokens as an optimizer step has, so that a measurement costs no more than a third of a step. At each the
    sampler's 64 most likely tokens count one by one and all others together: never more than all would one by one."""

    action: Literal["warn", "refresh", "stop"] = "warn"
    """Over budget: `warn` says so once a round; `refresh` ends the round there, so that the next one samples from the
    student as it is (the last round trains the epochs that this leaves; it can only warn), which `overlap` rules out;
    `stop` fails the stage."""


class OptimizerConfig(Section):
    """What warm-up and rounds both need to train."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak of the cosine schedule."""

    min_learning_rate: float = Field(default=1e-6, ge=0)
    """End of the cosine schedule."""

    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the run over which the rate rises linearly from 0 to its peak."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping, global norm."""

    packs_per_step: int = Field(default=1, ge=1)
    """Bins in one optimizer step: divided among the processes that train (`train.launch`), and gradients of what one
    process gets are accumulated."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16`: autocast over float32 weights. `fp32`: no autocast."""

    gradient_checkpointing: bool = Field(default=True, json_schema_extra=PLACEMENT)
    """Recompute activations in the backward pass: less memory, about a third more time."""

    loss_chunk: int = Field(default=1024, ge=1, json_schema_extra=PLACEMENT)
    """Response positions projected onto the vocabulary at a time; bounds memory."""

    loss_kernel: Literal["auto", "torch", "triton"] = "auto"
    """What makes loss and gradient of the logits: PyTorch's operators, or one Triton kernel (CUDA only; a fifth
    less time on an H200). `auto`: the kernel where it runs."""

    liger_kernels: bool = False
    """Run the model's norms, rotary embeddings and gated MLPs as Liger's fused Triton kernels: less time and memory
    between the matrix products (CUDA only; needs the extra `liger`)."""

    save_every_steps: int = Field(default=500, ge=1, json_schema_extra=PLACEMENT)
    """Optimizer steps between checkpoints; what a crash can lose at most."""

    report_to: list[str] = Field(default=[], json_schema_extra=PLACEMENT)
    """Trackers `transformers` knows (`wandb`, `tensorboard`, `mlflow`, ...), to install beside this package. A run of
    theirs is a stage, as `mine-round-0-train`, with steps counted over all rounds; TensorBoard's files lie in the
    run's `logs/tensorboard`."""

    @model_validator(mode="after")
    def _rates_fall(self) -> "OptimizerConfig":
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"`min_learning_rate` {self.min_learning_rate} is above `learning_rate` {self.learning_rate}"
            )
        return self


class OnPolicyConfig(Section):
    """On-policy distillation by TRL's `DistillationTrainer`: every optimizer step samples its own batch.

    Nothing is scored, filtered or packed; needs one round of `train.steps_per_round` steps. The loss is TRL's, over the
    whole vocabulary; `kd_weight`, `kd_form`, `packs_per_step` and the guard have no part in it.
    """

    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts in one optimizer step, each answered once."""

    batch_prompts: int | None = Field(default=None, ge=1)
    """Prompts in one forward and backward pass, a divisor of `prompts_per_step`; null: all of a step at once."""

    beta: float = Field(default=0.0, ge=0, le=1)
    """0: forward KL, as near-policy distillation takes; 1: reverse KL; between: generalised Jensen-Shannon."""

    @model_validator(mode="after")
    def _batches_fill_a_step(self) -> "OnPolicyConfig":
        if self.batch_prompts is not None and self.prompts_per_step % self.batch_prompts:
            raise ValueError(
                f"`batch_prompts` {self.batch_prompts} does not divide `prompts_per_step` {self.prompts_per_step}"
            )
        return self


class TrainConfig(OptimizerConfig):
    """Stage train: L = (1 - kd_weight) CE + kd_weight KD, one run over all rounds."""

    epochs_per_round: int = Field(default=5, ge=1)
    """Passes over a round's packs before the sampler is refreshed. The paper: 10 epochs in two rounds."""

    steps_per_round: int | None = Field(default=None, ge=1)
    """Optimizer steps of a round, over its packs again and again, in place of `epochs_per_round`; null: whole epochs.
    Runs of different filters then take equally many steps."""

    kd_weight: float = Field(default=0.9, ge=0, le=1)
    """Lambda: weight of the top-k forward KL against the hard-label loss."""

    kd_form: Literal["truncated", "tail", "renormalized"] = "tail"
    """What happens to the mass outside the top k. `truncated`: left out, the paper's formula; can go negative.
    `tail`: one more bucket; never negative, no gradient where the student equals the teacher. `renormalized`: both
    sides renormalised over the k tokens."""

    guard: GuardConfig = GuardConfig()
    """How far the student may move from its sampler."""

    lora: LoraConfig | None = None
    """Train adapters instead of all weights; null: all weights."""

    on_policy: OnPolicyConfig | None = None
    """Not near-policy distillation but the on-policy baseline; null: the method."""

    launch: LaunchConfig = Field(default=LaunchConfig(), json_schema_extra=PLACEMENT)
    """On how many GPUs and machines to train, warm-up and rounds."""

    @model_validator(mode="after")
    def _on_policy_training_is_one_process(self) -> "TrainConfig":
        if self.on_policy is not None and self.launch.world_size > 1:
            raise ValueError("`on_policy` trains in one process: no `launch.processes` and `launch.machines` above 1")
        return self


class WarmupConfig(OptimizerConfig):
    """SFT warm-up of the student, before the first round."""

    responses: Literal["teacher", "answers"] = "teacher"
    """What to imitate: the teacher's sampled responses, or the prompts' `answer` column."""

    prompts: int | None = Field(default=None, ge=1)
    """Train prompts to use, the first so many; null: all."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the warm-up responses."""

    temperature: float = Field(default=1.0, ge=0)
    """The teacher's sampling temperature for warm-up responses."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest teacher response; null: as `generate.max_new_tokens`."""


class ExportConfig(Section):
    """Stage export: the student as a plain Hugging Face model directory."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the exported weights, which are also the next round's sampler."""

    max_shard_size: str = Field(default="5GB", pattern=r"^\d+(\.\d+)?\s?[KMG]B$")
    """Largest safetensors file."""
