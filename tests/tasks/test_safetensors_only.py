"""No pickle: none is written, none is read, whatever lies in a folder."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import schemas
from schemas.errors import ModelError
from schemas.run_store import RunStore
from tasks.graph import MODELS
from tasks.language_model.loading import load_model
from tests.tasks.test_models import resolve
from tests.tiny_models import make_model, save_model

REPOSITORY = Path(str(schemas.__file__)).parents[1]
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle"}


def unpickling(source: str) -> list[str]:
    """Return what in a Python file could read or write a pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [name for name in names if name.split(".")[0] in MODULES or name in CALLS]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in CALLS:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained"):
            # Models, not tokenizers or configs; GGUF files hold no code either.
            loads = ast.unparse(node)
            if "ModelFor" in loads and "**options" not in loads and "use_safetensors=True" not in loads:
                found.append(loads)
    return found


def test_no_code_reads_or_writes_pickles() -> None:
    files = [path for folder in ("flows", "tasks", "schemas") for path in (REPOSITORY / folder).rglob("*.py")]
    assert len(files) > 50
    assert {str(path): found for path in files if (found := unpickling(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "x = torch.load(path, weights_only=True)",
        "torch.save(x, path)",
        "np.load(path)",
        "read(path, allow_pickle=True)",
        "AutoModelForCausalLM.from_pretrained(folder)",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert unpickling(line)


def pickled_model(folder: Path) -> Path:
    """A model folder as many were published: its weights in `pytorch_model.bin`."""
    save_model(folder, make_model(seed=3))
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


def test_pickled_weights_are_refused(tmp_path: Path, teacher_dir: Path) -> None:
    folder = pickled_model(tmp_path / "old")
    refusal = r"old: it has no safetensors weights but pytorch_model.bin.*save_pretrained\(OTHER\)"
    with pytest.raises(ModelError, match=refusal):
        load_model(folder)
    for name, teacher, student in (("a", folder, {"init": "prune", "keep_layers": 1}), ("b", teacher_dir, None)):
        with pytest.raises(ModelError, match=refusal):
            resolve(tmp_path / name, teacher, student or {"model": str(folder)})
        assert not (tmp_path / name / "test" / "models" / "manifest.json").exists()


def test_an_index_cannot_name_a_pickle(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    make_model(seed=3).save_pretrained(folder, max_shard_size="20KB")
    load_model(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("pytorch_model.bin", "../other/model.safetensors", 3):
        first = next(iter(index["weight_map"]))
        path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {first: name}}))
        with pytest.raises(ModelError, match="no safetensors file of the folder"):
            load_model(folder)


def test_adapters_beside_weights_are_refused(tmp_path: Path, teacher_dir: Path) -> None:
    """Where peft is installed transformers would add them, and read their pickle; vLLM would not."""
    folder = save_model(tmp_path / "adapted", make_model(seed=3))
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(teacher_dir)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapted: has adapters \(adapter_config.json\)"):
        load_model(folder)
    with pytest.raises(ModelError, match="adapted: has adapters"):
        resolve(tmp_path / "run", teacher_dir, {"model": str(folder)})


@pytest.mark.parametrize("keep", [0, 4, 2_000])
def test_damaged_safetensors_are_a_model_error(tmp_path: Path, keep: int) -> None:
    folder = save_model(tmp_path / "damaged", make_model(seed=3))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match="damaged: its weights cannot be loaded"):
        load_model(folder)


def warnings(store: RunStore) -> list[Any]:
    return list(store.finished(MODELS).counters.get("warnings", []))


def test_code_of_a_model_runs_only_if_the_config_says_so_and_then_aloud(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose config names code of its own, which leaves a mark when it runs."""
    # Where transformers copies such code, and imports it from.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    marker, folder = tmp_path / "ran", save_model(tmp_path / "own_code", make_model(seed=3))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_code", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'own_code'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    with pytest.raises(ModelError):
        resolve(tmp_path / "off", teacher_dir, {"model": str(folder)})
    assert not marker.exists()
    store, _ = resolve(tmp_path / "on", teacher_dir, {"model": str(folder), "trust_remote_code": True})
    assert marker.exists()
    assert warnings(store) == [f"student.trust_remote_code: code that comes with {folder} runs on this machine"]
    store, _ = resolve(tmp_path / "plain", teacher_dir, {"model": str(student_dir)})
    assert warnings(store) == []
