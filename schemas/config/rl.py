"""The config of an RL run: GRPO with verifiable rewards, from the student that a distillation run exported."""

from typing import Literal

from pydantic import Field, model_validator

from schemas.config.base import PLACEMENT, Section
from schemas.config.prompts import PromptsConfig
from schemas.config.settings import RunSettings
from schemas.config.training import ExportConfig


class GRPOConfig(Section):
    """Group Relative Policy Optimization (Shao et al. 2024, arXiv 2402.03300) with TRL's `GRPOTrainer`."""

    steps: int = Field(default=300, ge=1)
    """Optimizer steps. The paper: 300 on 7K problems."""

    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts answered for one batch of responses. Every prompt is met once before any is met again."""

    num_generations: int = Field(default=8, ge=2)
    """Responses to each prompt: the group whose mean reward is the baseline of each of them (G)."""

    num_iterations: int = Field(default=1, ge=1)
    """Optimizer steps on one batch of responses (mu). 1: every step learns from responses of its own weights."""

    max_new_tokens: int = Field(default=512, ge=1)
    """Longest response, in tokens."""

    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the responses that are learned from."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1.0 keeps the whole distribution."""

    truncation_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from the reward of a response that reached `max_new_tokens`. 0: the verifier's score is the reward."""

    mask_truncated_completions: bool = False
    """Leave such responses out of the loss (DAPO, arXiv 2503.14476)."""

    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL to the start model, nats per token. 0 loads no reference model; DeepSeek-R1 has 0.001."""

    epsilon: float = Field(default=0.2, gt=0)
    """Clipping of the probability ratio: from 1 - epsilon to 1 + `epsilon_high`. Without effect while
    `num_iterations` is 1."""

    epsilon_high: float | None = Field(default=None, gt=0)
    """Upper side of the clipping; null: as `epsilon`. DAPO: 0.28."""

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """How token losses are averaged. `grpo`: within each response first, which favours short right ones. `dapo`: over
    all tokens of the step. `bnpo`: over those of a batch on the device. `dr_grpo`: by a constant."""

    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What an advantage is divided by: the standard deviation of its group, of the batch, or nothing (Dr. GRPO)."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """AdamW's peak learning rate."""

    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """How the rate falls to 0 over the steps; `constant`: it does not."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises from 0."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping, global norm."""

    sequences_per_batch: int | None = Field(default=None, ge=1)
    """Responses in one forward and backward pass; a divisor of prompts_per_step x num_generations. null: all of a
    step's at once. Lower is less memory."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16`: autocast over float32 weights. `fp32`: no autocast."""

    gradient_checkpointing: bool = Field(default=True, json_schema_extra=PLACEMENT)
    """Recompute activations in the backward pass: less memory, about a third more time."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: `model.generate`, or vLLM inside the training process, which shares its GPU (extra `vllm`)."""

    vllm_gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1, json_schema_extra=PLACEMENT)
    """Share of the GPU's memory vLLM may take beside training."""

    save_every_steps: int = Field(default=50, ge=1)
    """Optimizer steps between checkpoints, and in one file of rollouts; what a crash can lose at most. A multiple of
    `num_iterations`."""

    report_to: list[str] = Field(default=[], json_schema_extra=PLACEMENT)
    """As `train.report_to` of a distillation run."""

    @model_validator(mode="after")
    def _batches_divide(self) -> "GRPOConfig":
        responses = self.prompts_per_step * self.num_generations
        if self.sequences_per_batch is not None and responses % self.sequences_per_batch:
            raise ValueError(
                f"`sequences_per_batch` {self.sequences_per_batch} does not divide the {responses} responses of a step "
                f"(`prompts_per_step` {self.prompts_per_step} x `num_generations` {self.num_generations})"
            )
        if self.save_every_steps % self.num_iterations:
            raise ValueError(
                f"`save_every_steps` {self.save_every_steps} is no multiple of `num_iterations` {self.num_iterations}: "
                "a checkpoint amid the steps on one batch of responses could not go on with them"
            )
        return self


class RLEvaluateConfig(Section):
    """The model answers the held-out prompts, before and after."""

    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses to each held-out prompt."""

    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature; 0 is greedy."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest response, in tokens; null: as `grpo.max_new_tokens`."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """As `generate.engine` of a distillation run."""

    batch_size: int = Field(default=32, ge=1, json_schema_extra=PLACEMENT)
    """Sequences decoded at a time by the transformers engine."""


class RLConfig(RunSettings):
    """A run of GRPO with verifiable rewards: `npd rl CONFIG`."""

    kind: Literal["rl"] = "rl"
    """What kind of run this is; its `run.json` says so."""

    run: str | None = Field(default=None, min_length=1, json_schema_extra=PLACEMENT)
    """Folder or URL of the distillation run whose exported student is the start, and whose prompts and split are used:
    only train prompts are learned from. Relative to the working directory."""

    round: int | None = Field(default=None, ge=-1, json_schema_extra=PLACEMENT)
    """Round of `run` whose export is the start, from 0; -1 is the warm-up. null: the newest."""

    model: str | None = Field(default=None, min_length=1, json_schema_extra=PLACEMENT)
    """Instead of `run`: a local Hugging Face model folder; then `prompts` says what to train on."""

    prompts: PromptsConfig | None = None
    """Prompts with answers, where the start is a `model`."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    device: str | None = Field(default=None, json_schema_extra=PLACEMENT)
    """Torch device (`cuda:0`, `cpu`); null: the first GPU, else the CPU."""

    cpu_threads: int | None = Field(default=None, ge=1, json_schema_extra=PLACEMENT)
    """CPU threads of a stage's process; null: one per core."""

    grpo: GRPOConfig = GRPOConfig()
    """How the model learns."""

    export: ExportConfig = ExportConfig()
    """How its weights are written."""

    evaluate: RLEvaluateConfig = RLEvaluateConfig()
    """Held-out accuracy, before and after."""

    @model_validator(mode="after")
    def _start_is_complete(self) -> "RLConfig":
        if (self.run is None) == (self.model is None):
            raise ValueError("name where to start: either `run`, a distillation run, or `model` and `prompts`")
        if self.run is not None and self.prompts is not None:
            raise ValueError("`prompts` goes with `model`; a start from `run` uses that run's prompts and split")
        if self.model is not None and self.prompts is None:
            raise ValueError("`model` needs `prompts`: what to train on, and what to hold out")
        if self.model is not None and self.round is not None:
            raise ValueError("`round` goes with `run`")
        return self
