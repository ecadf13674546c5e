"""The whole config of a run."""

from pydantic import Field, model_validator

from schemas.config.base import PLACEMENT, Section
from schemas.config.models import StudentConfig, TeacherConfig
from schemas.config.prompts import PromptsConfig
from schemas.config.ray import RayConfig
from schemas.config.settings import RunSettings
from schemas.config.stages import EvaluateConfig, FilterConfig, GenerateConfig, PackConfig, ScoreConfig
from schemas.config.training import ExportConfig, TrainConfig, WarmupConfig


class DevicesConfig(Section):
    """Where models run. null: the first GPU, else the CPU."""

    sampler: str | None = None
    """Torch device (`cuda:0`, `cpu`) of the student when it samples, is scored and is evaluated."""

    teacher: str | None = None
    """Device of the teacher; null with `teacher.device_map` or `teacher.tensor_parallel`,
    which take them all."""

    trainer: str | None = None
    """Device the student trains on; with `overlap` it is evaluated there too, since the next round may still be
    sampled on `sampler`."""

    cpu_threads: int | None = Field(default=None, ge=1)
    """CPU threads of a stage's process. null: one per core; with `overlap`, half of the cores each for stages that
    run side by side."""


class RunConfig(RunSettings):
    """A run of Near-Policy Distillation."""

    rounds: int = Field(default=2, ge=1)
    """Rounds of training, each ending in an export. The paper: two."""

    refresh_every: int = Field(default=1, ge=1)
    """Rounds between two refreshes of the sampler; the rounds between train on the packs that are there. 1: every
    round samples anew."""

    overlap: bool = False
    """While a round trains, sample and score the next from the newest export there is: the student before that
    round. Costs one round of policy lag, saves up to the shorter of the two. Needs room for both at once: see
    `devices`."""

    devices: DevicesConfig = Field(default=DevicesConfig(), json_schema_extra=PLACEMENT)
    """Where models run."""

    ray: RayConfig | None = Field(default=None, json_schema_extra=PLACEMENT)
    """Stages generate and score over a cluster; null: in one process here."""

    teacher: TeacherConfig
    """The model that annotates."""

    student: StudentConfig
    """The model that learns."""

    prompts: PromptsConfig
    """What both are asked."""

    warmup: WarmupConfig | None = None
    """SFT of the student before the first round; null: the student starts as it is."""

    generate: GenerateConfig = GenerateConfig()
    """The student answers."""

    score: ScoreConfig = ScoreConfig()
    """The teacher annotates."""

    filter: FilterConfig = FilterConfig()
    """What to learn from."""

    pack: PackConfig = PackConfig()
    """Sequences into bins."""

    train: TrainConfig = TrainConfig()
    """The student learns."""

    export: ExportConfig = ExportConfig()
    """The next sampler, and what you deploy."""

    evaluate: EvaluateConfig = EvaluateConfig()
    """How far the student still is from the teacher."""

    @model_validator(mode="after")
    def _responses_fit_into_packs(self) -> "RunConfig":
        longest = {"generate.max_new_tokens": self.generate.max_new_tokens}
        if self.warmup is not None and self.warmup.max_new_tokens is not None:
            longest["warmup.max_new_tokens"] = self.warmup.max_new_tokens
        for key, tokens in longest.items():
            if tokens > self.pack.max_tokens:
                raise ValueError(
                    f"`{key}` {tokens} does not fit into `pack.max_tokens` {self.pack.max_tokens}: the longest "
                    "responses would all be dropped"
                )
        return self

    @model_validator(mode="after")
    def _the_teacher_has_one_place(self) -> "RunConfig":
        spread = self.teacher.device_map is not None or self.teacher.tensor_parallel > 1
        if spread and self.devices.teacher is not None:
            raise ValueError(
                "`teacher.device_map` and `teacher.tensor_parallel` spread the teacher over devices and "
                "`devices.teacher` names one: set one of them"
            )
        return self

    @model_validator(mode="after")
    def _one_schedule_refreshes(self) -> "RunConfig":
        if self.refresh_every > 1 and self.train.guard.action == "refresh":
            raise ValueError(
                "`train.guard.action: refresh` and `refresh_every` above 1 both say when the sampler is refreshed; "
                "for rarer refreshes beside the guard raise `train.epochs_per_round` instead"
            )
        if self.overlap and self.train.guard.action == "refresh":
            raise ValueError(
                "`train.guard.action: refresh` ends a round so that the next samples from the student as it is, and "
                "with `overlap` the next has been sampled already, from an older student that is over budget too: set "
                "`overlap: false`, or `train.guard.action` to `warn` or `stop`"
            )
        return self

    @model_validator(mode="after")
    def _flash_attention_trains_in_16_bits(self) -> "RunConfig":
        attention = self.student.attn_implementation or ""
        for key, training in (("warmup", self.warmup), ("train", self.train)):
            if "flash" in attention and training is not None and training.precision == "fp32":
                raise ValueError(
                    f"`student.attn_implementation: {attention}` takes no float32, which `{key}.precision: fp32` "
                    f"trains in: set `{key}.precision: bf16`, or another attention (null: ours)"
                )
        return self

    @model_validator(mode="after")
    def _a_prompt_has_one_answer(self) -> "RunConfig":
        if self.generate.policy == "answers" and self.generate.samples_per_prompt != 1:
            raise ValueError("`generate.policy: answers` has one response a prompt: `generate.samples_per_prompt: 1`")
        return self

    @model_validator(mode="after")
    def _only_the_students_own_samples_age(self) -> "RunConfig":
        if self.generate.policy != "student" and self.train.guard.action != "warn":
            raise ValueError(
                f"`train.guard.action: {self.train.guard.action}` watches the policy KL, which there is only with "
                "`generate.policy: student`"
            )
        return self

    @model_validator(mode="after")
    def _a_sampling_teacher_has_servers(self) -> "RunConfig":
        if self.generate.engine == "server" and self.generate.policy == "teacher" and self.score.engine != "server":
            raise ValueError(
                "`generate.engine: server` with `generate.policy: teacher` samples from the teacher's servers: set "
                "`score.engine: server` and `score.server.urls`"
            )
        return self

    @model_validator(mode="after")
    def _on_policy_training_is_one_round(self) -> "RunConfig":
        if self.train.on_policy is None:
            return self
        if self.train.steps_per_round is None or self.rounds != 1:
            raise ValueError("`train.on_policy` needs `rounds: 1` and `train.steps_per_round`, its optimizer steps")
        if self.train.lora is not None or self.generate.policy != "student":
            raise ValueError(
                "`train.on_policy` trains all weights on the student's samples: no `lora`, no other policy"
            )
        return self

    @model_validator(mode="after")
    def _machines_share_a_folder(self) -> "RunConfig":
        if self.train.launch.machines > 1 and "://" in self.root:
            raise ValueError(
                "`train.launch.machines` above 1 needs a `root` that all machines see as a folder, not a URL"
            )
        return self

    @model_validator(mode="after")
    def _an_actor_is_one_process(self) -> "RunConfig":
        if self.ray is not None and self.teacher.tensor_parallel > 1:
            raise ValueError(
                "`teacher.tensor_parallel` starts processes of its own, and an actor of `ray` is one: give an actor "
                "several GPUs (`ray.gpus_per_actor`) and set `teacher.device_map: auto`, or score by servers "
                "(`score.engine: server`)"
            )
        return self

    @model_validator(mode="after")
    def _actors_see_their_own_gpus_alone(self) -> "RunConfig":
        for key in ("sampler", "teacher"):
            device = getattr(self.devices, key)
            if self.ray is not None and device is not None and ":" in device:
                raise ValueError(
                    f"`devices.{key}: {device}` names a GPU by its number, and an actor of `ray` sees its own GPUs "
                    f"alone: set `devices.{key}: null`"
                )
        return self

    @model_validator(mode="after")
    def _an_actor_has_the_gpus_of_its_model(self) -> "RunConfig":
        wanted = self.generate.vllm.tensor_parallel_size if self.generate.engine == "vllm" else 1
        if self.ray is not None and wanted > 1 and (self.ray.gpus_per_actor or 1) < wanted:
            raise ValueError(
                f"`generate.vllm.tensor_parallel_size: {wanted}` spreads a model over more GPUs than an actor of `ray` "
                f"has: set `ray.gpus_per_actor: {wanted}`"
            )
        return self

    @property
    def teacher_sampling(self) -> GenerateConfig:
        """How the teacher samples: by its own servers if it has some, never by the student's."""
        if self.score.engine == "server":
            return self.generate.model_copy(update={"engine": "server", "server": self.score.server})
        return self.local_sampling

    @property
    def local_sampling(self) -> GenerateConfig:
        """How models sample that are on no server: as train prompts are answered, where that is in this process."""
        if self.generate.engine == "server":
            return self.generate.model_copy(update={"engine": "transformers"})
        return self.generate

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole training run, which the cosine schedule spans where rounds are counted in epochs."""
        return self.rounds * self.train.epochs_per_round

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole training run, which the schedule then spans; None: rounds count in epochs."""
        return None if self.train.steps_per_round is None else self.rounds * self.train.steps_per_round

    @property
    def split_seed(self) -> int:
        """Seed of which prompts are kept and which held out."""
        return self.prompts.split_by(self.seed)

    @property
    def is_near_policy(self) -> bool:
        """Whether the student learns from samples of its own snapshots, made before it trains."""
        return self.generate.policy == "student" and self.train.on_policy is None
