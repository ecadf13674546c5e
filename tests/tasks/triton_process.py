"""A process in which Triton runs: on a GPU where there is one, else in its interpreter, settled when it is imported."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def results_of(module: str, folder: Path) -> Any:
    """Run a test module as a command that saves its results where it is told, and return them."""
    path = folder / "found.pt"
    environment = os.environ | ({} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(
        [sys.executable, "-m", module, str(path)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(path)


def compile_for_a_gpu(kernel: Any, types: list[str], constants: dict[str, Any], warps: int) -> Any:
    """Compile a kernel for compute capability 9.0, down to machine code; no GPU is needed for that.

    The interpreter takes more than the compiler does.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
    source = ASTSource(kernel, signature, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
