"""Where prompts come from."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from schemas.config.base import SOURCE, Section


class _Rows(Section):
    messages: str = "messages"
    """Column holding a list of `{role, content}` messages, or of ShareGPT's `{from, value}`, that ends with a user's.
    Texts only: no tool calls, no images."""

    last_reply: Literal["error", "answer", "drop"] = "error"
    """What becomes of the assistant's reply where messages end with one. `error`: the row cannot be used. `answer`: it
    is the row's answer, unless its column `answer` has one. `drop`: it is left out, and the student answers itself."""

    prompt: str | Annotated[list[str], Field(min_length=1)] = "prompt"
    """Column holding a single user message as text, or a list as `messages` does; used where a row has no `messages`.
    Texts of several columns, `[instruction, input]`, are joined by an empty line, those left out that a row lacks."""

    answer: str | None = "answer"
    """Column holding the reference answer, if rows have one; null: ignore it. Of every column's name, dots lead into
    objects: `reward_model.ground_truth`."""

    verifier: Literal["math", "exact"] | None = "math"
    """How a response is checked where a row has an answer: `math`, equal as mathematics (`math-verify`) or as text;
    `exact`, the same text after the last `####`, else in `<answer>` tags, else in the last line; null: not at all,
    where answers are prose."""

    system: str | None = None
    """System message put before every prompt that does not bring its own."""

    tools: Literal["error", "drop"] = "error"
    """What becomes of a row whose column `tools` holds tools to call, as TRL has it. `error`: it cannot be used, since
    no model here is told of them. `drop`: it is asked without them."""

    limit: int | None = Field(default=None, ge=1)
    """Take the first so many rows; null: all."""


class JsonlSource(_Rows):
    """A JSON Lines file, one prompt a line; it may be compressed by gzip."""

    type: Literal["jsonl"]
    """Which kind of source this is."""

    path: str = Field(min_length=1, json_schema_extra=SOURCE)
    """The file; a relative path starts at the config file's folder, or at the working directory if it exists only
    there."""


class ParquetSource(_Rows):
    """A Parquet file."""

    type: Literal["parquet"]
    """Which kind of source this is."""

    path: str = Field(min_length=1, json_schema_extra=SOURCE)
    """The file; a relative path starts at the config file's folder, or at the working directory if it exists only
    there."""


class DatasetSource(_Rows):
    """A dataset that `datasets` loads: a Hub id, a local folder (of files, or of `save_to_disk`), or a CSV, TSV or JSON
    file."""

    type: Literal["dataset"]
    """Which kind of source this is."""

    dataset: str = Field(min_length=1, json_schema_extra=SOURCE)
    """Hub id, folder, or file (`.csv`, `.tsv`, `.json`)."""

    config: str | None = None
    """The dataset's configuration, where it has several."""

    dataset_split: str = "train"
    """The dataset's own split to read (not this run's train/held-out split)."""

    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""


class ReasoningGymSource(Section):
    """Procedural tasks of `reasoning-gym`, made on the spot: no download, answers included."""

    type: Literal["reasoning_gym"]
    """Which kind of source this is."""

    tasks: list[str] = Field(min_length=1)
    """Names of the tasks (`basic_arithmetic`, `letter_counting`, ...). Their verifiers get what follows the last `####`
    of a response, else what is in `<answer>` tags, else its last lines, as many as the answer has: a sentence around
    the answer is wrong."""

    size: int = Field(default=64, ge=1)
    """Prompts for each task."""

    seed: int = 0
    """Seed of the task generators."""

    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options of single tasks, by task name, as `reasoning_gym.create_dataset` takes them."""

    system: str | None = None
    """System message put before every prompt: the place to say how an answer is marked."""


PromptSource = Annotated[JsonlSource | ParquetSource | DatasetSource | ReasoningGymSource, Field(discriminator="type")]


class PromptsConfig(Section):
    """The prompts of the run, the same for every round."""

    sources: list[PromptSource] = Field(min_length=1)
    """Read in order and joined; a prompt met twice is kept once and counted."""

    held_out: int = Field(default=64, ge=1)
    """Prompts set aside for evaluation. They never reach training, nor does a prompt that differs from one of them only
    in spaces or in letters' case or form."""

    split_seed: int | None = Field(default=None, ge=0, lt=2**31)
    """Seed of which prompts are kept and which held out; null: the run's seed. Set it where runs of several seeds are
    measured on the same prompts."""

    limit: int | None = Field(default=None, ge=2)
    """Keep only so many prompts in all, chosen by seed; null: all."""

    too_long: Literal["error", "drop"] = "error"
    """A prompt that leaves no room for a reply in the model's context: `error` stops before any model loads, `drop`
    leaves it out and counts it."""

    def split_by(self, seed: int) -> int:
        """Return the seed of the split in a run of ``seed``."""
        return seed if self.split_seed is None else self.split_seed

    @model_validator(mode="after")
    def _limit_leaves_training_prompts(self) -> "PromptsConfig":
        if self.limit is not None and self.limit <= self.held_out:
            raise ValueError(f"`limit: {self.limit}` leaves nothing to train on beside `held_out: {self.held_out}`")
        return self
