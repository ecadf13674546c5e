"""Utilisation: tokens/s and model FLOPs utilisation (MFU) of generate, score and train, for models of real size.

Meant for `--device cuda`; on a CPU it runs with `--quick`. Each stage's own code on random weights, no run around it:

- generate: the student, bfloat16, samples by the transformers engine's slots; prompt tokens count as work, the rate is
  of response tokens. Decoding is bound by memory, so it has no bar.
- score: the teacher, bfloat16, prefills packed rows and gives the top 10 of every response token.
- train: the student, float32 weights under bfloat16 autocast, on one packed row a step: forward, CE + top-k KL and
  backward by the fused loss, gradient clipping and AdamW in a plain loop.

MFU is the FLOPs that the model needs over what the device could do in the time (PaLM, arXiv 2204.02311, appendix B):
forward 2 a parameter and token, embeddings left out and the head only where a token is projected, and attention 4 a
layer, head width and pair of tokens that see each other; three times that for training, recomputation not counted.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks.measure import Bar, Measurement, Sample, Work, alternate, at_least
from benchmarks.random_models import SHAPES, make_model
from benchmarks.random_packs import draw_rows, draw_sequences, draw_top_k
from benchmarks.report import BenchmarkParser, main
from tasks.language_model.head import OutputHead, hidden_states
from tasks.language_model.loading import prefer_packed_attention
from tasks.language_model.prefill import prefill, prefill_batches
from tasks.rollout.engine import Requests, SamplingSettings
from tasks.rollout.slots import SlotDecoder
from tasks.train.liger import fuse_layers
from tasks.train.loss import Kernel, Objective, Targets, choose_kernel, loss_sums

TOP_K = 10
PROFILED = 12
"""Kernels that a profile lists."""
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by a part of the GPU's name (NVIDIA's data sheets); the first that fits counts."""


class Done(NamedTuple):
    """What one repeat of a stage did: the tokens its rate counts, and the model's FLOPs."""

    tokens: int
    flops: float


def forward_flops(model: PreTrainedModel, lengths: NDArray[np.int64], projected: int) -> float:
    """Return the FLOPs of a forward pass over sequences of ``lengths`` with ``projected`` tokens through the head."""
    config = model.config.get_text_config()
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert isinstance(embedding, nn.Parameter)
    assert isinstance(head, nn.Parameter)
    body = sum(weight.numel() for weight in model.base_model.parameters()) - embedding.numel()
    pairs = float((lengths * (lengths + 1) // 2).sum())
    attention: float = 4 * config.num_hidden_layers * config.num_attention_heads * head_width * pairs
    return 2.0 * (body * float(lengths.sum()) + head.numel() * projected) + attention


def peak_flops(device: str, given: float | None) -> float | None:
    """Return the device's FLOP/s: ``given`` in TFLOP/s, else by its name; None if neither tells."""
    if given is not None:
        return given * 1e12
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def sequence_lengths(tokens: int, mean: int) -> NDArray[np.int64]:
    """Return lengths from a quarter to seven quarters of ``mean``, ``tokens`` in all or slightly fewer."""
    return np.linspace(mean // 4, 2 * mean - mean // 4, max(tokens // mean, 1)).astype(np.int64)


def generate(arguments: argparse.Namespace) -> Work[Done]:
    """Prepare sampling by the student."""
    model = load(arguments, arguments.student)
    vocab = int(model.config.vocab_size)
    decoder = SlotDecoder(model, arguments.slots)
    prompts = draw_rows(np.full(arguments.prompts, arguments.prompt_tokens), vocab)
    requests = Requests(prompts.rows(), np.arange(len(prompts)))
    settings = SamplingSettings(
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=arguments.new_tokens,
        context=arguments.prompt_tokens + arguments.new_tokens,
        end_ids=(int(model.config.eos_token_id),),
        vocab_size=vocab,
    )

    def work() -> Done:
        sampled = np.diff(decoder.decode(requests, settings, lambda finished: None).offsets)
        # The last token of a response is drawn and never read.
        lengths = prompts.lengths + sampled - 1
        return Done(int(sampled.sum()), forward_flops(model, lengths, int(sampled.sum())))

    return work


def score(arguments: argparse.Namespace) -> Work[Done]:
    """Prepare the teacher's prefill."""
    model = load(arguments, arguments.teacher)
    require_packed(model)
    lengths = sequence_lengths(arguments.rows * arguments.row_tokens, arguments.mean_tokens)
    context, response = draw_sequences(lengths, int(model.config.vocab_size))
    done = Done(int(lengths.sum()), forward_flops(model, lengths, len(response.values)))

    def work() -> Done:
        prefill(
            model,
            context,
            response,
            batch_tokens=arguments.row_tokens,
            logits_chunk=arguments.chunk,
            top_k=TOP_K,
        )
        return done

    return work


def train(arguments: argparse.Namespace) -> Work[Done]:
    """Prepare training steps of the student, one packed row each."""
    device, on_gpu = arguments.device, arguments.device.startswith("cuda")
    model = load(arguments, arguments.student, torch.float32)
    require_packed(model)
    model.train()
    if arguments.liger:
        fuse_layers(model, torch.device(device))
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=on_gpu)
    head, objective = OutputHead.of(model), Objective(0.9, "tail", arguments.chunk, loss_kernel(arguments))
    lengths = sequence_lengths(arguments.row_tokens, arguments.mean_tokens)
    vocab = int(model.config.vocab_size)
    context, response = draw_sequences(lengths, vocab)
    (batch,) = prefill_batches(context, response, int(lengths.sum()))
    input_ids, position_ids = (torch.from_numpy(ids).to(device) for ids in (batch.input_ids, batch.position_ids))
    ids, logprobs = draw_top_k(len(response.values), vocab, TOP_K)
    targets = Targets(
        places=torch.from_numpy(batch.states_at).to(device),
        labels=torch.from_numpy(response.values[batch.targets].astype(np.int64)).to(device),
        topk_ids=torch.from_numpy(ids.astype(np.int64)).to(device),
        topk_logprobs=torch.from_numpy(logprobs).to(device),
    )
    tokens, flops = int(lengths.sum()), 3 * forward_flops(model, lengths, len(response.values))

    def work() -> Done:
        for _ in range(arguments.steps):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=on_gpu):
                states = hidden_states(model, input_ids, position_ids)[0]
                loss = loss_sums(states, head, targets, objective).loss / len(targets.labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return Done(arguments.steps * tokens, arguments.steps * flops)

    return work


STAGES: dict[str, tuple[Callable[[argparse.Namespace], Work[Done]], str, Bar | None]] = {
    "generate": (generate, "student", None),
    "score": (score, "teacher", at_least(50)),
    "train": (train, "student", at_least(45)),
}
"""What prepares a stage, the argument that names its model, and the bar of its MFU."""


def load(arguments: argparse.Namespace, name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make a random model; by default bfloat16 on a GPU and float32 on a CPU."""
    shape = SHAPES[name]
    shape = replace(shape, layers=arguments.layers or shape.layers)
    if dtype is None:
        dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    return make_model(shape, device=arguments.device, dtype=dtype)


def loss_kernel(arguments: argparse.Namespace) -> Kernel:
    """Return the kernel that training's loss takes."""
    return choose_kernel(arguments.loss_kernel, torch.device(arguments.device))


def require_packed(model: PreTrainedModel) -> None:
    """Let a model attend by `packed_sequences`.

    Raises:
        ValueError: it cannot.
    """
    if not prefer_packed_attention(model):
        raise ValueError(f"{type(model).__name__}: cannot attend by `packed_sequences`")


def kernel_shares(work: Work[Done]) -> list[str]:
    """Run once more under PyTorch's profiler; return each of the longest GPU kernels with its part of their time."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    taken = [(event.self_device_time_total, event.count, event.key) for event in profiler.key_averages()]
    total = sum(microseconds for microseconds, _, _ in taken)
    return [
        f"{100 * microseconds / total:.1f}% in {count:,} x `{name[:90]}`"
        for microseconds, count, name in sorted(taken, reverse=True)[:PROFILED]
    ]


def stage_rows(label: str, samples: list[Sample[Done]], peak: float | None, bar: Bar | None) -> list[Measurement]:
    """Rate, FLOP/s, MFU where the device's peak is known, and memory."""
    rows = [
        Measurement(f"{label}: rate", [taken.value.tokens / taken.seconds for taken in samples], "tokens/s"),
        Measurement(f"{label}: work", [taken.value.flops / taken.seconds / 1e12 for taken in samples], "TFLOP/s"),
        Measurement(f"{label}: peak memory", [taken.peak_bytes / 2**30 for taken in samples], "GiB"),
    ]
    if peak is not None:
        shares = [100 * taken.value.flops / taken.seconds / peak for taken in samples]
        rows.append(Measurement(f"{label}: MFU", shares, "%", bar))
    return rows


def measure(arguments: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Measure one stage after the other, each with the memory to itself."""
    peak = peak_flops(arguments.device, arguments.peak_tflops)
    on_gpu = arguments.device.startswith("cuda")
    if arguments.profile and not on_gpu:
        raise ValueError("--profile lists the kernels of a GPU: add `--device cuda`")
    rows, profiles = [], []
    for stage in arguments.stages:
        prepare, model, bar = STAGES[stage]
        label = f"{stage}, {getattr(arguments, model)}"
        work = prepare(arguments)
        samples = alternate({label: work}, arguments.repeats, device=arguments.device)[label]
        rows += stage_rows(label, samples, peak, bar)
        if arguments.profile:
            profiles += [f"{label}: {share}" for share in kernel_shares(work)]
        del work
        if on_gpu:
            torch.cuda.empty_cache()
    notes = [
        f"generate: {arguments.prompts:,} prompts of {arguments.prompt_tokens:,} tokens, at most "
        f"{arguments.new_tokens:,} new ones, {arguments.slots:,} at a time; the rate is of response tokens.",
        f"score: {arguments.rows:,} rows of {arguments.row_tokens:,} tokens, top {TOP_K}; train: one such row a step, "
        f"{arguments.steps} steps a repeat; sequences of {arguments.mean_tokens:,} tokens on average, a quarter of "
        f"each prompt; {arguments.chunk:,} positions projected at a time; gradient checkpointing "
        f"{'on' if arguments.gradient_checkpointing else 'off'}; `loss_kernel: {loss_kernel(arguments)}`; "
        f"`liger_kernels: {str(arguments.liger).lower()}`.",
        "The peak of this device is not known: no MFU (`--peak-tflops`)."
        if peak is None
        else f"Peak: {peak / 1e12:,.4g} TFLOP/s.",
    ]
    return rows, notes + profiles


def parser() -> BenchmarkParser:
    """Return the command's arguments."""
    result = BenchmarkParser("utilisation", "Tokens/s and model FLOPs utilisation of generate, score and train.")
    result.add_size("--student", "qwen2.5-1.5b", "micro", "shape of the student (benchmarks.random_models.SHAPES)")
    result.add_size("--teacher", "qwen2.5-7b", "mini", "shape of the teacher")
    result.add_size("--layers", 0, 2, "layers of both; 0: all")
    result.add_size("--prompts", 512, 6, "prompts to answer")
    result.add_size("--prompt-tokens", 128, 12, "their length")
    result.add_size("--new-tokens", 256, 8, "longest response")
    result.add_size("--slots", 256, 4, "responses decoded at a time")
    result.add_size("--row-tokens", 16_384, 128, "tokens in a packed row")
    result.add_size("--rows", 4, 2, "rows that a repeat of score prefills")
    result.add_size("--mean-tokens", 1_024, 32, "mean length of the sequences in a row")
    result.add_size("--steps", 4, 1, "training steps a repeat")
    result.add_size("--chunk", 1_024, 32, "positions projected onto the vocabulary at a time")
    result.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to measure")
    result.add_argument("--loss-kernel", choices=["auto", "torch", "triton"], default="auto", help="of training")
    result.add_argument("--liger", action="store_true", help="train with Liger's fused layers")
    result.add_argument("--profile", action="store_true", help="list the GPU kernels that take longest")
    result.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in training")
    result.add_argument("--peak-tflops", type=float, metavar="N", help="dense bfloat16 TFLOP/s of the device")
    return result


if __name__ == "__main__":
    main(parser(), measure)
