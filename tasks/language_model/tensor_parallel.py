"""One model over several processes, each with a part of every layer: tensor parallelism, as transformers has it.

This process is rank 0 and the only one that anybody calls. Whatever enters the model's body or its output head here is
broadcast first, and the other ranks, which do nothing of their own, pass the same through their parts.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException, start_processes
from transformers import AutoConfig, PreTrainedModel

from schemas.errors import ModelError
from tasks.language_model.head import (
    OutputHead,
    body_of,
    check_head,
    hidden_states,
    input_device,
    pad_rows_if_needed,
    pads_rows,
)
from tasks.language_model.loading import load_ref, prefer_packed_attention
from tasks.language_model.sources import ModelRef

_END, _BODY, _HEAD = 0, 1, 2
_READY = "ready-{}"
_POLL_SECONDS = 0.2
_EXIT_SECONDS = 10.0
# Of waiting for another rank: between two passes rank 0 reads and writes shards.
_TIMEOUT = timedelta(minutes=30)


def load_whole(ref: ModelRef) -> PreTrainedModel:
    """Load a model to prefill packed rows with into this process alone, and check its head.

    Raises:
        ModelError: it cannot be loaded, or packed rows are not for it.
    """
    model = load_ref(ref, packed=True)
    pad_rows_if_needed(model)
    check_head(model)
    return model


@contextmanager
def prefill_model(ref: ModelRef) -> Iterator[PreTrainedModel]:
    """Load a model to prefill packed rows with, over ``ref.tensor_parallel`` processes, and check its head.

    Raises:
        ModelError: it cannot be loaded, or not split so; or packed rows are not for it.
    """
    if ref.tensor_parallel == 1:
        yield load_whole(ref)
        return
    _check(ref)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        others = start_processes(_follow, (ref, folder), ref.tensor_parallel - 1, join=False, start_method="spawn")
        try:
            while len(list(folder.glob(_READY.format("*")))) < ref.tensor_parallel - 1:
                others.join(_POLL_SECONDS)
            with _rank(0, ref.tensor_parallel, folder):
                try:
                    model = _load_part(ref)
                    device = input_device(model)
                    _tell(model, device)
                    check_head(model)
                    yield model
                    _send(_END, None, device)
                except RuntimeError:
                    # Of another rank's death this one sees a lost connection; this raises what it died of.
                    others.join(_EXIT_SECONDS)
                    raise
            others.join(_EXIT_SECONDS)
        except ProcessException as error:
            rank = error.error_index + 1
            raise ModelError(f"teacher.tensor_parallel: rank {rank} failed: {str(error).strip()}") from error
        finally:
            for process in others.processes:
                process.kill()


def _check(ref: ModelRef) -> None:
    """Check what would else fail in every rank."""
    ranks, gpus = ref.tensor_parallel, torch.cuda.device_count()
    if 0 < gpus < ranks:
        raise ModelError(f"teacher.tensor_parallel: {ranks} GPUs wanted, found {gpus}")
    config = AutoConfig.from_pretrained(ref.path, trust_remote_code=ref.trust_remote_code).get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None) or ranks
        if heads % ranks:
            raise ModelError(f"teacher.tensor_parallel: {ranks} does not divide the teacher's {name}, {heads}")


@contextmanager
def _rank(rank: int, ranks: int, folder: Path) -> Iterator[None]:
    """Be one of the ranks that meet in ``folder``; transformers reads which from the environment."""
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(
            backend, init_method=f"file://{folder}/ranks", rank=rank, world_size=ranks, timeout=_TIMEOUT
        )
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _load_part(ref: ModelRef) -> PreTrainedModel:
    """Load this rank's part, and wait for the others': one that has no room for its own ends them all."""
    model = load_ref(ref, tensor_parallel=ref.tensor_parallel)
    dist.all_reduce(torch.zeros(1))
    if ref.attn_implementation is None:
        prefer_packed_attention(model)
    pad_rows_if_needed(model)
    if pads_rows(model):
        raise ModelError(
            f"teacher.tensor_parallel: {type(model).__name__} cannot keep the sequences of a packed row apart, which "
            "the ranks need; set it to 1, and spread the teacher by `teacher.device_map`"
        )
    return model


def _tell(model: PreTrainedModel, device: torch.device) -> None:
    """Let ``model`` send what its body and its head are given, before either computes."""

    def send_body(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        _send(_BODY, torch.cat([options["input_ids"], options["position_ids"]]), device)

    def send_head(module: nn.Module, args: tuple[Any, ...]) -> None:
        _send(_HEAD, args[0], device)

    body_of(model).register_forward_pre_hook(send_body, prepend=True, with_kwargs=True)
    OutputHead.of(model).projection.register_forward_pre_hook(send_head, prepend=True)


def _send(what: int, given: Tensor | None, device: torch.device) -> None:
    shape = () if given is None else given.shape
    dist.broadcast(torch.tensor([what, *shape, *[0] * (3 - len(shape))]), 0)
    if given is not None:
        dist.broadcast(given.to(device).contiguous(), 0)


@torch.no_grad()
def _follow(index: int, ref: ModelRef, folder: Path) -> None:
    """Be rank ``index + 1`` until rank 0 ends."""
    (folder / _READY.format(index + 1)).touch()
    with _rank(index + 1, ref.tensor_parallel, folder):
        model = _load_part(ref)
        head, device = OutputHead.of(model), input_device(model)
        header = torch.zeros(4, dtype=torch.int64)
        while True:
            dist.broadcast(header, 0)
            what, *sizes = header.tolist()
            if what == _END:
                return
            given = torch.empty(
                [size for size in sizes if size], dtype=torch.int64 if what == _BODY else model.dtype, device=device
            )
            dist.broadcast(given, 0)
            if what == _BODY:
                hidden_states(model, *given.split(1))
            else:
                head.projection(given)
