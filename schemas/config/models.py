"""Where the teacher and the student come from."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from schemas.config.base import PLACEMENT, SOURCE, Section

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
TemplateValue = bool | int | str
MemoryLimits = dict[
    Annotated[int, Field(ge=0)] | Literal["cpu"],
    Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(GiB|MiB|KiB|GB|MB|KB)$")],
]


_GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""Variables that a chat template always has."""


class ModelSource(Section):
    """One causal language model and its tokenizer."""

    model: str = Field(min_length=1, json_schema_extra=SOURCE)
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

    quantization: Quantization | None = None
    """Round its weights when they are loaded, all but the output head (extra `quantization`, which is bitsandbytes).
    `int8`: a byte each, LLM.int8. `int4`: half a byte, NF4 with double quantization. It computes in `dtype`, and what
    it says changes a little. null: the weights as stored, quantized or not. vLLM does not read bitsandbytes: such a
    teacher samples by `transformers`, whatever `generate.engine` says."""

    device_map: DeviceMap | None = Field(default=None, json_schema_extra=PLACEMENT)
    """Spread its layers over all GPUs, then the CPU's memory, then the disk, as `accelerate` knows it, for a teacher
    larger than one GPU. What is not on a GPU is fetched layer by layer at every pass, so give `score.batch_tokens` all
    that fits. null: whole on `devices.teacher`. vLLM spreads by `generate.vllm.tensor_parallel_size`."""

    max_memory: MemoryLimits | None = Field(default=None, json_schema_extra=PLACEMENT)
    """With `device_map`: what its weights may take of each GPU, by number, and of the CPU, as in
    `{'0': 70GiB, '1': 70GiB, cpu: 200GiB}`; leave room for a pass. A device that is left out takes no weights. null:
    what is free."""

    offload_folder: str | None = Field(default=None, json_schema_extra=PLACEMENT)
    """With `device_map`: where layers wait that are kept on disk in another form than the model's own files (mixtures
    of experts); others are read from the model's folder. null: such layers must fit into memory."""

    tensor_parallel: int = Field(default=1, ge=1, json_schema_extra=PLACEMENT)
    """Processes, each with a GPU (without any: on the CPU) and a part of every layer, that prefill together; faster
    than `device_map`, whose GPUs work one after another. Must divide the teacher's heads. It samples as without:
    vLLM has `generate.vllm.tensor_parallel_size`, `transformers` takes `device_map`, which may be set beside this."""

    @model_validator(mode="after")
    def _quantized_weights_stay_whole(self) -> "TeacherConfig":
        if self.quantization is not None and self.tensor_parallel > 1:
            raise ValueError("`quantization` and `tensor_parallel`: weights of bitsandbytes cannot be split; set one")
        return self

    @model_validator(mode="after")
    def _limits_need_a_map(self) -> "TeacherConfig":
        for name in ("max_memory", "offload_folder"):
            if self.device_map is None and getattr(self, name) is not None:
                raise ValueError(f"`{name}` goes with `device_map`; without one the teacher is whole on one device")
        return self


class StudentConfig(Section):
    """The model that learns."""

    init: Literal["pretrained", "prune"] = "pretrained"
    """`pretrained`: start from `model`. `prune`: start from some of the layers of `model` (or of the teacher)."""

    model: str | None = Field(default=None, json_schema_extra=SOURCE)
    """As `teacher.model`. May be left out with `init: prune`: the teacher's weights are then cut down."""

    keep_layers: int | list[int] | None = None
    """With `init: prune`: how many layers to keep, spread evenly from the first to the last, or which (from 0)."""

    chat_template: str | None = Field(default=None, json_schema_extra=SOURCE)
    """Path of a Jinja chat template; null: the tokenizer's own, or the teacher's where it has none."""

    chat_template_kwargs: dict[str, TemplateValue] = Field(default_factory=dict)
    """Variables of the chat template, as in `{enable_thinking: false}`: both models are asked with them, warm-up and
    held-out prompts too. They become defaults of the exported student's template, so that it is deployed as it was
    trained; a caller may still give others."""

    revision: str | None = None
    """As `teacher.revision`."""

    dtype: DType = "auto"
    """As `teacher.dtype`. Training keeps float32 weights whatever this says."""

    trust_remote_code: bool = False
    """As `teacher.trust_remote_code`."""

    attn_implementation: str | None = None
    """As `teacher.attn_implementation`. Flash attention takes no float32: it trains with `precision: bf16` only."""

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _variables_are_free(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
                raise ValueError("names of a template's variables are letters, digits and underscores")
            if name in _GIVEN or name.endswith("_token"):
                raise ValueError(f"`{name}` is given to every chat template by what renders it; leave it out")
            if not isinstance(value, TemplateValue):
                raise ValueError(f"`{name}` should be true, false, a whole number or text")
        return values

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
