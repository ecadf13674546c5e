"""The config of a run: pydantic models that are also its manual. `npd config` prints every field."""

from schemas.config.base import Section
from schemas.config.comparison import (
    BASE,
    ComparisonConfig,
    continuation_config,
    load_comparison,
    method_config,
)
from schemas.config.launch import LaunchConfig
from schemas.config.load import apply_overrides, kind_of, load_as, load_config, parse_as, parse_config, parse_settings
from schemas.config.models import (
    DeviceMap,
    MemoryLimits,
    Quantization,
    StudentConfig,
    TeacherConfig,
    TemplateValue,
)
from schemas.config.prompts import (
    DatasetSource,
    JsonlSource,
    ParquetSource,
    PromptsConfig,
    PromptSource,
    ReasoningGymSource,
)
from schemas.config.ray import RayConfig
from schemas.config.reference import fields_markdown
from schemas.config.rl import GRPOConfig, RLConfig
from schemas.config.run import DevicesConfig, RunConfig
from schemas.config.servers import ServersConfig, TeacherServersConfig
from schemas.config.settings import RunSettings
from schemas.config.stages import (
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
    OnPolicyConfig,
    OptimizerConfig,
    TrainConfig,
    WarmupConfig,
)

__all__ = [
    "BASE",
    "ComparisonConfig",
    "DatasetSource",
    "DeviceMap",
    "DevicesConfig",
    "ExportConfig",
    "FilterConfig",
    "GRPOConfig",
    "GenerateConfig",
    "GuardConfig",
    "JsonlSource",
    "LaunchConfig",
    "LmEvalConfig",
    "LoraConfig",
    "MemoryLimits",
    "OnPolicyConfig",
    "OptimizerConfig",
    "PackConfig",
    "ParquetSource",
    "PromptSource",
    "PromptsConfig",
    "Quantile",
    "Quantization",
    "RLConfig",
    "RayConfig",
    "ReasoningGymSource",
    "RunConfig",
    "RunSettings",
    "ScoreConfig",
    "Section",
    "ServersConfig",
    "StudentConfig",
    "TeacherConfig",
    "TeacherServersConfig",
    "TemplateValue",
    "TrainConfig",
    "VllmOptions",
    "WarmupConfig",
    "apply_overrides",
    "continuation_config",
    "fields_markdown",
    "kind_of",
    "load_as",
    "load_comparison",
    "load_config",
    "method_config",
    "parse_as",
    "parse_config",
    "parse_settings",
]
