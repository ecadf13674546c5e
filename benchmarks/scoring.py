"""Scoring: tokens/s of `prefill` with the teacher's top k against the bare forward pass over the same packed rows.

- `here`: `tasks.language_model.prefill` of responses after their contexts, packing included: log-probability of each
  response token and the top 10 at its position, as NumPy arrays.
- `bare forward`: `model(input_ids, position_ids, use_cache=False)` over the rows that `prefill` makes, attention as in
  `prefill` (`packed_sequences`); its logits of all positions are thrown away. The bar is held against this.
- `bare forward, sdpa`: the same with transformers' own attention, which makes a mask [tokens x tokens].
- `body alone`: without the output head, so without what is asked for; what no scoring can beat.
- `vLLM`: `prompt_logprobs=10` of the whole sequences, one token generated, eagerly, without prefix caching; tokens in,
  its Python objects out. It runs in a process of its own after the others, all repeats in one, first batch left out.
"""

import argparse
import importlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.measure import Measurement, Work, alternate, at_least, in_child, ratios, seconds
from benchmarks.random_models import SHAPES, Shape, make_model, write_model
from benchmarks.random_packs import draw_sequences
from benchmarks.report import BenchmarkParser, main
from tasks.language_model.loading import prefer_packed_attention
from tasks.language_model.packed_attention import PACKED_SEQUENCES, packed_row
from tasks.language_model.prefill import prefill, prefill_batches
from tasks.language_model.ragged import Ragged

TOP_K = 10
Rows = list[tuple[Tensor, Tensor]]
"""Token ids and position ids of packed rows, each [1, tokens]."""


def packed_rows(context: Ragged, response: Ragged, batch_tokens: int, device: str) -> Rows:
    """Return the rows that `prefill` packs, on their device."""
    batches = prefill_batches(context, response, batch_tokens)
    return [
        (torch.from_numpy(batch.input_ids).to(device), torch.from_numpy(batch.position_ids).to(device))
        for batch in batches
    ]


def here(model: PreTrainedModel, context: Ragged, response: Ragged, batch_tokens: int, chunk: int) -> Work[None]:
    """Prefill with the top k everywhere."""

    def work() -> None:
        model.set_attn_implementation(PACKED_SEQUENCES)
        prefill(model, context, response, batch_tokens=batch_tokens, logits_chunk=chunk, top_k=TOP_K)

    return work


def bare(model: PreTrainedModel, rows: Rows, *, head: bool = True, attention: str = PACKED_SEQUENCES) -> Work[None]:
    """The forward pass alone, with or without the output head."""
    forward: Callable[..., Any] = model if head else model.base_model

    @torch.no_grad()
    def work() -> None:
        model.set_attn_implementation(attention)
        for input_ids, position_ids in rows:
            with packed_row(model, position_ids) as options:
                forward(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)

    return work


def vllm(shape: Shape, context: Ragged, response: Ragged, repeats: int, device: str) -> Work[list[float]]:
    """Prepare vLLM; the work returns the seconds of each repeat."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
    from vllm import SamplingParams

    # Any: whether vLLM is installed must not change what type checkers see.
    load: Any = importlib.import_module("vllm").LLM
    on_gpu = device.startswith("cuda")
    sequences = [np.concatenate([context[row], response[row]]).tolist() for row in range(len(context))]
    with tempfile.TemporaryDirectory() as name:
        dtype = torch.bfloat16 if on_gpu else torch.float32
        folder = write_model(Path(name), shape, device=device, dtype=dtype)
        engine = load(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="bfloat16" if on_gpu else "float32",
            max_model_len=max(map(len, sequences)) + 1,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_logprobs=TOP_K,
        )
    params = SamplingParams(max_tokens=1, prompt_logprobs=TOP_K, detokenize=False)
    prompts = [{"prompt_token_ids": tokens} for tokens in sequences]

    def work() -> list[float]:
        taken = []
        for _ in range(1 + repeats):
            started = time.perf_counter()
            engine.generate(prompts, params, use_tqdm=False)
            taken.append(time.perf_counter() - started)
        return taken[1:]

    return work


def measure(arguments: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Measure all sides on the same sequences."""
    device, on_gpu = arguments.device, arguments.device.startswith("cuda")
    shape = SHAPES[arguments.model]
    shape = replace(shape, layers=arguments.layers or shape.layers)
    model = make_model(shape, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    if not prefer_packed_attention(model):
        raise ValueError(f"{arguments.model}: cannot attend by `{PACKED_SEQUENCES}`")
    # A quarter to seven quarters of the mean.
    mean = arguments.mean_tokens
    lengths = np.random.default_rng(0).integers(mean // 4, 2 * mean - mean // 4, arguments.sequences)
    context, response = draw_sequences(lengths, shape.vocab)
    tokens = len(context.values) + len(response.values)
    rows = packed_rows(context, response, arguments.batch_tokens, device)
    samples = alternate(
        {
            "here": here(model, context, response, arguments.batch_tokens, arguments.logits_chunk),
            "bare forward": bare(model, rows),
            "bare forward, sdpa": bare(model, rows, attention="sdpa"),
            "body alone": bare(model, rows, head=False),
        },
        arguments.repeats,
        device=device,
    )
    taken = {name: seconds(samples[name]) for name in samples}
    del model, rows
    if wants_vllm(arguments):
        if on_gpu:
            torch.cuda.empty_cache()
        prepare = partial(vllm, shape, context, response, arguments.repeats, device)
        taken["vLLM"] = in_child(prepare, device=device).value
    table = [Measurement(name, [tokens / s for s in values], "tokens/s") for name, values in taken.items()]
    for name, values in taken.items():
        if name != "here":
            bar = at_least(0.9) if name == "bare forward" else None
            table.append(Measurement(f"tokens/s over those of {name}", ratios(values, taken["here"]), "x", bar))
    notes = [
        f"`{arguments.model}`, {shape.layers} layers, {'bfloat16' if on_gpu else 'float32'}; {len(context):,} "
        f"sequences, {tokens:,} tokens in all, a quarter of each context, in rows of {arguments.batch_tokens:,}; "
        f"top {TOP_K} and log-probabilities of {len(response.values):,} response tokens, {arguments.logits_chunk:,} "
        "positions a chunk.",
        "`bare forward` projects every position, `here` those that predict a response token.",
    ]
    if "vLLM" not in taken:
        notes.append("vLLM: not installed, or left out (`--vllm`).")
    return table, notes


def wants_vllm(arguments: argparse.Namespace) -> bool:
    """Say whether to measure vLLM: as told, else where it is installed, but not for `--quick`."""
    if arguments.vllm is not None:
        return bool(arguments.vllm)
    return not arguments.quick and importlib.util.find_spec("vllm") is not None


def parser() -> BenchmarkParser:
    """Return the command's arguments."""
    result = BenchmarkParser("scoring", "Tokens/s of packed prefill with the top k against the bare forward pass.")
    result.add_size("--sequences", 64, 6, "sequences to score")
    result.add_size("--mean-tokens", 256, 24, "their mean length")
    result.add_size("--batch-tokens", 4_096, 96, "tokens in a packed row")
    result.add_size("--logits-chunk", 1_024, 32, "positions projected at a time")
    result.add_size("--model", "smollm2-135m", "mini", "shape of the model (benchmarks.random_models.SHAPES)")
    result.add_size("--layers", 8, 2, "layers of it; 0: all")
    result.add_argument(
        "--vllm", action=argparse.BooleanOptionalAction, help="measure vLLM; by default where it is installed"
    )
    return result


if __name__ == "__main__":
    main(parser(), measure)
