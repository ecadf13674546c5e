"""Where the teacher and the student come from."""

from typing import Literal

from pydantic import Field, model_validator

from schemas.config.base import Section

DType = Literal["auto", "float32", "bfloat16", "float16"]


class ModelSource(Section):
    """One causal language model and its tokenizer."""

    model: str = Field(min_length=1)
    """Where the weights are: a local Hugging Face model directory; a Hub id (`Qwen/Qwen2.5-Math-7B-Instruct`); a
    `.gguf` file; or `package://PACKAGE/PATH.gguf`, a GGUF file inside an installed Python package."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model. A commit makes the run reproducible after the branch moves."""

    dtype: DType = "auto"
    """Weights' type for inference. `auto`: as stored on a GPU, float32 on a CPU."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    attn_implementation: str | None = None
    """Attention kernel of `transformers` (`sdpa`, `flex_attention`, `flash_attention_2`). null: its own choice to
    sample, and to prefill and train ours, which costs what the sequences of a pack cost."""


class TeacherConfig(ModelSource):
    """The model that annotates. It prefills, and decodes only warm-up and held-out references."""


class StudentConfig(Section):
    """The model that learns."""

    init: Literal["pretrained", "prune"] = "pretrained"
    """`pretrained`: start from `model`. `prune`: start from some of the layers of `model` (or of the teacher)."""

    model: str | None = None
    """As `teacher.model`. May be left out with `init: prune`: the teacher's weights are then cut down."""

    keep_layers: int | list[int] | None = None
    """With `init: prune`: how many layers to keep, spread evenly from the first to the last, or which (from 0)."""

    chat_template: str | None = None
    """Path of a Jinja chat template, for models whose tokenizer has none; null: the tokenizer's own."""

    revision: str | None = None
    """As `teacher.revision`."""

    dtype: DType = "auto"
    """As `teacher.dtype`. Training keeps float32 weights whatever this says."""

    trust_remote_code: bool = False
    """As `teacher.trust_remote_code`."""

    attn_implementation: str | None = None
    """As `teacher.attn_implementation`."""

    @model_validator(mode="after")
    def _init_is_complete(self) -> "StudentConfig":
        if self.init == "pretrained" and self.model is None:
            raise ValueError("`init: pretrained` needs `model`; or say `init: prune` and `keep_layers`")
        if self.init == "pretrained" and self.keep_layers is not None:
            raise ValueError("`keep_layers` goes with `init: prune`")
        if self.init == "prune" and self.keep_layers is None:
            raise ValueError("`init: prune` needs `keep_layers`: a count, or the layers by number from 0")
        kept = self.keep_layers
        if isinstance(kept, int) and kept < 1:
            raise ValueError("`keep_layers` must keep at least one layer")
        if isinstance(kept, list) and (not kept or sorted(set(kept)) != kept or kept[0] < 0):
            raise ValueError("`keep_layers` as a list must be ascending layer numbers from 0, each once")
        return self
