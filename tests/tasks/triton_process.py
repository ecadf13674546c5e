"""A process in which Triton runs: on a GPU where there is one, else in its interpreter, settled when it is imported."""

import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


MODULES = ["tests.tasks.test_loss_triton", "tests.tasks.test_prefill_triton"]
"""Test modules that as commands save what Triton makes of their cases."""
if find_spec("liger_kernel") is not None:
    # Last: it changes Triton's interpreter for itself.
    MODULES.append("tests.tasks.test_train_liger")


@cache
def all_results() -> dict[str, Any]:
    """Run MODULES one after another in a process, which imports its libraries once; return what each has saved."""
    environment = os.environ | ({} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.tasks.triton_process", folder]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return {module: torch.load(Path(folder, module)) for module in MODULES}


def compile_for_a_gpu(kernel: Any, types: list[str], constants: dict[str, Any], warps: int) -> Any:
    """Compile a kernel for compute capability 9.0, down to machine code; no GPU is needed for that.

    The interpreter takes more than the compiler does.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
    source = ASTSource(kernel, signature, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for name in MODULES:
        sys.argv[1:] = [str(place / name)]
        runpy.run_module(name, run_name="__main__")
