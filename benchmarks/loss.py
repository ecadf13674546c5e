"""Loss alone: CE and top-k forward KL from hidden states, values and gradients, against the ways others take.

Each side begins with hidden states [tokens, width] and the output head [vocabulary, width] and ends with a scalar and
its gradients with respect to both. Every position has a label. The sides:

- `here`: `tasks.train.loss.loss_sums`, at several numbers of positions a chunk; on a GPU `here, Triton` too, the same
  with `loss_kernel: triton`.
- `naive`: full logits, log_softmax in float32, CE and top-k KL by autograd. What the bars are held against.
- `naive, compiled`: the same function under `torch.compile`, where a compiler works.
- `TRL chunked_divergence`: what TRL's DistillationTrainer calls, with beta 0. It takes no stored targets: it projects
  the teacher's hidden states (here as wide as the student's) too, for a KL over the whole vocabulary, and has no CE.
- `Liger`: LigerFusedLinearJSDLoss with beta 0 and a tenth of CE; it, too, projects the teacher's hidden states.

What TRL and Liger add by projecting the teacher here, the top-k targets pay for in the scoring stage.

Values and gradients are compared with the naive ones before anything is timed. Memory is the most that was held beside
what the side began with; on a CPU it is taken once, in a process of its own.
"""

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import Measurement, Work, alternate, at_least, at_most, in_child, ratios, seconds
from benchmarks.random_packs import draw_top_k
from benchmarks.report import BenchmarkParser, main
from tasks.language_model.head import OutputHead
from tasks.train.loss import KdForm, Kernel, Objective, Targets, choose_kernel, loss_sums

KD_WEIGHT = 0.9
HERE, HERE_TRITON = "here, ", "here, Triton, "
NAIVE, COMPILED, TRL, LIGER = "naive", "naive, compiled", "TRL chunked_divergence", "Liger"
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest norm of a difference over the norm; bfloat16 has 8 bits, and the naive logits are rounded to it."""


@dataclass(frozen=True)
class Problem:
    """What to take the loss of.

    Args:
        tokens: Positions, all with a label.
        hidden: Width.
        vocab: Rows of the output head.
        top_k: Targets of a position.
        dtype: Of states and weights; a name in torch.
        device: Where.
        kd_form: Of the top-k KL.
    """

    tokens: int
    hidden: int
    vocab: int
    top_k: int
    dtype: str
    device: str
    kd_form: KdForm


class Inputs(NamedTuple):
    """Tensors of a Problem; those of the teacher are as large as the student's."""

    states: Tensor
    weight: Tensor
    teacher_states: Tensor
    teacher_weight: Tensor
    targets: Targets


class Result(NamedTuple):
    """Mean loss, and its gradients with respect to states and weight."""

    loss: Tensor
    states: Tensor
    weight: Tensor


def draw(problem: Problem) -> Inputs:
    """Draw the tensors, always the same ones."""
    dtype, device = getattr(torch, problem.dtype), problem.device
    random = torch.Generator(device).manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        drawn = torch.randn(rows, problem.hidden, generator=random, device=device, dtype=torch.float32)
        return drawn.mul_(scale).to(dtype)

    spread = 1 / problem.hidden**0.5  # of the weights: logits of unit variance
    ids, logprobs = draw_top_k(problem.tokens, problem.vocab, problem.top_k)
    targets = Targets(
        places=torch.arange(problem.tokens, device=device),
        labels=torch.randint(problem.vocab, (problem.tokens,), generator=random, device=device),
        topk_ids=torch.from_numpy(ids).long().to(device),
        topk_logprobs=torch.from_numpy(logprobs).to(device),
    )
    return Inputs(
        normal(problem.tokens, 1.0).requires_grad_(),
        normal(problem.vocab, spread).requires_grad_(),
        normal(problem.tokens, 1.0),
        normal(problem.vocab, spread),
        targets,
    )


def with_gradients(inputs: Inputs, loss: Callable[[], Tensor]) -> Work[Result]:
    """Take a mean loss forward and backward."""

    def work() -> Result:
        value = loss()
        states, weight = torch.autograd.grad(value, (inputs.states, inputs.weight))
        return Result(value.detach(), states, weight)

    return work


def here(inputs: Inputs, problem: Problem, chunk: int, kernel: Kernel = "torch") -> Work[Result]:
    """The fused loss."""
    projection = nn.Linear(1, 1, bias=False, device="meta")
    projection.weight = nn.Parameter(inputs.weight)
    head, objective = OutputHead(projection), Objective(KD_WEIGHT, problem.kd_form, chunk, kernel)
    fused = inputs._replace(weight=projection.weight)
    return with_gradients(fused, lambda: loss_sums(fused.states, head, fused.targets, objective).loss / problem.tokens)


def naive_loss(states: Tensor, weight: Tensor, labels: Tensor, ids: Tensor, teacher: Tensor, kd_form: KdForm) -> Tensor:
    """Return the mean loss from full logits [tokens, vocabulary]; the formulas are Objective's."""
    logprobs = (states @ weight.T).float().log_softmax(-1)
    ce = -logprobs.gather(1, labels[:, None])
    student = logprobs.gather(1, ids)
    if kd_form == "renormalized":
        teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
    p = teacher.exp()
    kd = (p * (teacher - student)).sum(-1, keepdim=True)
    if kd_form == "tail":
        outside, student_outside = (1 - q.sum(-1, keepdim=True) for q in (p, student.exp()))
        kd = kd + outside * (outside.log() - student_outside.log())
    return ((1 - KD_WEIGHT) * ce + KD_WEIGHT * kd).mean()


def naive(inputs: Inputs, problem: Problem, *, compiled: bool = False) -> Work[Result]:
    """The loss from full logits."""
    function = torch.compile(naive_loss) if compiled else naive_loss
    targets = inputs.targets
    arguments = inputs.states, inputs.weight, targets.labels, targets.topk_ids, targets.topk_logprobs
    return with_gradients(inputs, lambda: function(*arguments, problem.kd_form))  # type: ignore[arg-type]


def trl(inputs: Inputs) -> Work[Result]:
    """TRL's fused divergence."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence: Any = ChunkedDivergenceFunction
    arguments = inputs.states, inputs.weight, None, inputs.teacher_states, inputs.teacher_weight, None, 0.0
    return with_gradients(inputs, lambda: divergence.apply(*arguments)[0].mean())


def liger(inputs: Inputs) -> Work[Result]:
    """Liger's fused distillation loss, compiled as it is by default."""
    # Any: whether Liger is installed must not change what type checkers see.
    losses: Any = importlib.import_module("liger_kernel.chunked_loss")
    fused = losses.LigerFusedLinearJSDLoss(weight_hard_loss=1 - KD_WEIGHT, weight_soft_loss=KD_WEIGHT, beta=0.0)
    arguments = inputs.states, inputs.weight, inputs.teacher_states, inputs.teacher_weight, inputs.targets.labels
    return with_gradients(inputs, lambda: fused(*arguments))


def full_kl(inputs: Inputs, ce_weight: float, kd_weight: float) -> Work[Result]:
    """CE and the KL over the whole vocabulary from full logits of both: what TRL and Liger should give."""

    def loss() -> Tensor:
        student = (inputs.states @ inputs.weight.T).float().log_softmax(-1)
        teacher = (inputs.teacher_states @ inputs.teacher_weight.T).float().log_softmax(-1)
        ce = -student.gather(1, inputs.targets.labels[:, None]).mean()
        return ce_weight * ce + kd_weight * (teacher.exp() * (teacher - student)).sum(-1).mean()

    return with_gradients(inputs, loss)


def chunk_name(chunk: int, kernel: Kernel = "torch") -> str:
    """Name the fused loss of a chunk size and a kernel."""
    return f"{HERE_TRITON if kernel == 'triton' else HERE}{chunk:,} a chunk"


def works(problem: Problem, inputs: Inputs, names: list[str]) -> dict[str, Work[Result]]:
    """Return the named sides."""
    known: dict[str, Callable[[], Work[Result]]] = {
        NAIVE: partial(naive, inputs, problem),
        COMPILED: partial(naive, inputs, problem, compiled=True),
        TRL: partial(trl, inputs),
        LIGER: partial(liger, inputs),
    }
    made = {}
    for name in names:
        kernel: Kernel = "triton" if name.startswith(HERE_TRITON) else "torch"
        chunk = name.removeprefix(HERE_TRITON).removeprefix(HERE).removesuffix(" a chunk").replace(",", "")
        made[name] = known[name]() if name in known else here(inputs, problem, int(chunk), kernel)
    return made


def alone(problem: Problem, name: str) -> Work[float]:
    """Prepare one side for a process of its own."""
    work = works(problem, draw(problem), [name])[name]
    return lambda: work().loss.item()


def available(names: list[str]) -> tuple[list[str], list[str]]:
    """Return the sides that can run here, and why the others cannot."""
    left_out = []
    for name, package in ((TRL, "trl"), (LIGER, "liger_kernel")):
        if importlib.util.find_spec(package) is None:
            names = [other for other in names if other != name]
            left_out.append(f"{name}: `{package}` is not installed.")
    return names, left_out


def compiler_failure(problem: Problem) -> str | None:
    """Compile the naive loss at its size; return what went wrong, None if it works."""
    try:
        works(problem, draw(problem), [COMPILED])[COMPILED]()
    except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, no Triton
        return str(error).splitlines()[0]
    return None


def distance(result: Result, expected: Result) -> float:
    """Return the largest relative distance of value and gradients, by norms."""
    pairs = zip(result, expected, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def check(problem: Problem, name: str) -> None:
    """Compare a side's value and gradients with those from full logits, on few positions (compiled: on all).

    Raises:
        ValueError: they differ by more than rounding.
    """
    # Another size would be compiled anew.
    few = problem if name == COMPILED else replace(problem, tokens=min(problem.tokens, 256))
    inputs = draw(few)
    result = works(few, inputs, [name])[name]()
    if name in (TRL, LIGER):
        weights = (0.0, 1.0) if name == TRL else (1 - KD_WEIGHT, KD_WEIGHT)
        expected = full_kl(inputs, *weights)()
    else:
        expected = naive(inputs, few)()
    apart = distance(result, expected)
    if not apart <= TOLERANCE[problem.dtype]:
        raise ValueError(f"{name}, {problem.dtype}: differs from the naive loss by {apart:.2g} of its norm")


def problem_rows(problem: Problem, names: list[str], repeats: int, default: str) -> list[Measurement]:
    """Time and memory of all sides on one problem; ``default`` names the side that the bars are for."""
    on_gpu = problem.device.startswith("cuda")
    for name in names:
        check(problem, name)
    samples = alternate(works(problem, draw(problem), names), repeats, device=problem.device, warmup=2)
    if on_gpu:
        memory = {name: [float(taken.extra_bytes) for taken in samples[name]] for name in names}
    else:
        memory = {name: [float(in_child(partial(alone, problem, name), warmup=1).extra_bytes)] for name in names}
    rows = []
    for name in names:
        label = f"{problem.dtype}: {name}"
        rows.append(Measurement(f"{label}: time", [1000 * s for s in seconds(samples[name])], "ms"))
        rows.append(Measurement(f"{label}: memory", [held / 2**20 for held in memory[name]], "MiB"))
        if name == NAIVE:
            continue
        bars = (at_least(3.0), at_most(0.2)) if on_gpu and name == default else (None, None)
        faster = ratios(seconds(samples[NAIVE]), seconds(samples[name]))
        rows.append(Measurement(f"{label}: times as fast as naive", faster, "x", bars[0]))
        if not all(memory[NAIVE]):  # too little for the operating system to see
            continue
        of_naive = ratios(memory[name], memory[NAIVE])
        rows.append(Measurement(f"{label}: memory of naive's", of_naive, "x", bars[1]))
    return rows


def measure(arguments: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Measure all sides, in every dtype."""
    on_gpu = arguments.device.startswith("cuda")
    tokens, hidden, vocab = arguments.tokens, arguments.hidden, arguments.vocab
    chunks = sorted({int(chunk) for chunk in arguments.chunks.split(",")} | {arguments.default_chunk})
    # Compiling takes most of a minute.
    naive_sides = [NAIVE] if arguments.quick else [NAIVE, COMPILED]
    chosen = choose_kernel("auto", torch.device(arguments.device))
    kernels: tuple[Kernel, ...] = ("torch", "triton") if chosen == "triton" else ("torch",)
    ours = [chunk_name(chunk, kernel) for chunk in chunks for kernel in kernels]
    names, notes = available([*ours, *naive_sides, TRL, LIGER])
    rows = []
    for dtype in arguments.dtypes.split(","):
        problem = Problem(tokens, hidden, vocab, arguments.top_k, dtype, arguments.device, arguments.kd_form)
        failure = compiler_failure(problem) if COMPILED in names else None
        if failure is not None:
            names = [name for name in names if name != COMPILED]
            notes.append(f"{COMPILED}: {failure}")
        rows += problem_rows(problem, names, arguments.repeats, chunk_name(arguments.default_chunk, chosen))
    notes = [
        f"{tokens:,} labelled positions, width {hidden:,}, vocabulary {vocab:,}, top {arguments.top_k}, "
        f"`{arguments.kd_form}`. Forward and backward to hidden states and head.",
        "`naive` holds full logits and their log_softmax in float32; value and gradients of every side were compared "
        "with it first. TRL and Liger project the teacher's hidden states as well.",
        "The bars are for a GPU."
        if not on_gpu
        else f"The bars are for {arguments.default_chunk:,} positions a chunk, the default of `train.loss_chunk`, and "
        f"the kernel that `train.loss_kernel: auto` takes here, {chosen}.",
        *notes,
    ]
    return rows, notes


def parser() -> BenchmarkParser:
    """Return the command's arguments."""
    result = BenchmarkParser("loss", "Time and memory of the fused loss alone, against the naive one and other fused.")
    result.add_size("--tokens", 1_024, 256, "labelled positions; 8,192 on a GPU")
    result.add_size("--hidden", 576, 64, "width; 2,048 on a GPU")
    result.add_size("--vocab", 49_152, 8_192, "rows of the output head; 151,936 on a GPU")
    result.add_size("--chunks", "256,512,1024", "128", "positions a chunk, with commas between")
    result.add_size("--default-chunk", 1_024, 128, "the chunk size that the bars are for")
    result.add_size("--dtypes", "float32,bfloat16", "float32", "of states and weights; bfloat16 on a GPU")
    result.add_argument("--top-k", type=int, default=10, help="targets of a position")
    result.add_argument("--kd-form", default="tail", choices=["truncated", "tail", "renormalized"])
    return result


if __name__ == "__main__":
    main(parser(), measure)
