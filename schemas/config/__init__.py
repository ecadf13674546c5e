"""The config of a run: pydantic models that are also its manual. `npd config` prints every field."""

from schemas.config.base import Section
from schemas.config.load import apply_overrides, load_config, parse_config
from schemas.config.models import ModelSource, StudentConfig, TeacherConfig
from schemas.config.prompts import (
    DatasetSource,
    JsonlSource,
    ParquetSource,
    PromptsConfig,
    PromptSource,
    ReasoningGymSource,
)
from schemas.config.reference import fields_markdown
from schemas.config.run import DevicesConfig, RunConfig
from schemas.config.stages import (
    EvaluateConfig,
    FilterConfig,
    GenerateConfig,
    LmEvalConfig,
    PackConfig,
    Quantile,
    ScoreConfig,
    VllmOptions,
)
from schemas.config.training import (
    ExportConfig,
    GuardConfig,
    LoraConfig,
    OptimizerConfig,
    TrainConfig,
    WarmupConfig,
)

__all__ = [
    "DatasetSource",
    "DevicesConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FilterConfig",
    "GenerateConfig",
    "GuardConfig",
    "JsonlSource",
    "LmEvalConfig",
    "LoraConfig",
    "ModelSource",
    "OptimizerConfig",
    "PackConfig",
    "ParquetSource",
    "PromptSource",
    "PromptsConfig",
    "Quantile",
    "ReasoningGymSource",
    "RunConfig",
    "ScoreConfig",
    "Section",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "VllmOptions",
    "WarmupConfig",
    "apply_overrides",
    "fields_markdown",
    "load_config",
    "parse_config",
]
