"""A stand-in for vLLM on a GPU: what the engine asks of it is kept, and nothing is sampled."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def install(monkeypatch: pytest.MonkeyPatch, device_type: str = "cuda") -> list[dict[str, Any]]:
    """Make `import vllm` find the stand-in; return the arguments of every `LLM` that is then made."""
    made: list[dict[str, Any]] = []

    class LLM:
        def __init__(self, **arguments: Any) -> None:
            made.append(arguments)
            self.model_config = SimpleNamespace(get_vocab_size=lambda: 259)

    modules: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": LLM},
        "vllm.platforms": {"current_platform": SimpleNamespace(device_type=device_type)},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return made
