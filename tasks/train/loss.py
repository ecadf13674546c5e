"""CE + top-k forward KL fused with the output head: values and gradients of one chunk of positions at a time."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from schemas.errors import ConfigError
from tasks.language_model.head import OutputHead
from tasks.language_model.triton_kernels import missing_for_triton

KdForm = Literal["truncated", "tail", "renormalized"]
Kernel = Literal["torch", "triton"]


@dataclass(frozen=True)
class Targets:
    """What the labelled positions of a pack should learn.

    Args:
        places: Position in the packed row of the state that predicts each label, int64 [n].
        labels: Token ids, int64 [n].
        topk_ids: int64 [n, k], different ids in each row; None in a warm-up.
        topk_logprobs: Teacher log-probabilities over its full vocabulary, float [n, k]; None in a warm-up.
    """

    places: Tensor
    labels: Tensor
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """L = (1 - kd_weight) CE + kd_weight KD, and how KD is formed.

    The forward KL from the teacher's top k to the student at one position, in nats:

    - `truncated`: sum_c p_T(c) (log p_T(c) - log p_S(c)) over the k tokens, both over the full vocabulary
      (arXiv 2605.05940). Can be negative; its gradient does not vanish at p_S = p_T.
    - `tail`: the same plus one bucket for all other tokens, T log(T / S) with T = 1 - sum_c p_T(c) and S likewise for
      the student: the KL between two distributions over k + 1 outcomes, so never negative. Where the k are the
      student's whole vocabulary there is no other token, and it is `renormalized`.
    - `renormalized`: both sides divided by their sum over the k tokens.

    Args:
        kd_weight: Lambda; not used without targets.
        kd_form: What happens to the mass outside the top k.
        chunk: Positions projected onto the vocabulary at a time.
        kernel: What computes it from the logits: PyTorch's operators, or one Triton kernel.
    """

    kd_weight: float
    kd_form: KdForm
    chunk: int
    kernel: Kernel = "torch"


class LossSums(NamedTuple):
    """Sums over labelled positions, in nats; only ``loss`` has a gradient.

    Args:
        loss: Weighted sum of CE and KD, scalar.
        ce: Hard-label negative log-likelihood, scalar.
        kd: Top-k forward KL, scalar; 0 without targets.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor


def loss_sums(hidden: Tensor, head: OutputHead, targets: Targets, objective: Objective) -> LossSums:
    """Sum CE and KD over the labelled positions without ever holding [positions x vocabulary].

    The gradient is taken together with the value, chunk by chunk, so that no logits are stored or computed twice
    (the idea of Liger's fused linear losses, arXiv 2410.10989). Prompt and filler positions are never projected.
    Logits and everything after them are float32 (float64 for float64 weights); the three matrix products run in the
    autocast type where autocast is on.

    Args:
        hidden: Last hidden states [tokens, width].
        head: The student's output projection.
        targets: Labels and the teacher's top k.
        objective: Weights and form of the loss.

    Raises:
        ConfigError: the output head has adapters.
    """
    if not isinstance(head.projection, nn.Linear):
        raise ConfigError(
            "train.lora.target_modules: the output head cannot have adapters; name other modules, or `all-linear`"
        )
    if targets.topk_ids is None or targets.topk_logprobs is None:
        # The label alone takes the place of the top k, with no weight on KD.
        ids, logprobs = targets.labels[:, None], hidden.new_zeros((len(targets.labels), 1), dtype=torch.float32)
        objective = replace(objective, kd_weight=0.0, kd_form="truncated")
    else:
        ids, logprobs = targets.topk_ids, targets.topk_logprobs
    states = hidden.index_select(0, targets.places)
    weight, bias = head.projection.weight, head.projection.bias
    if objective.kd_form == "tail" and ids.shape[1] == len(weight):
        # No token is left for one more bucket; what the teacher does not list is padding of its vocabulary.
        objective = replace(objective, kd_form="renormalized")
    loss, ce, kd = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        states, weight, bias, targets.labels, ids, logprobs, objective, head.scale, head.softcap
    )
    return LossSums(loss, ce, kd if targets.topk_ids is not None else torch.zeros_like(kd))


def choose_kernel(kernel: Kernel | Literal["auto"], device: torch.device) -> Kernel:
    """Return the kernel to use on ``device``; "auto" is the Triton kernel where it runs.

    Raises:
        ConfigError: the Triton kernel was asked for where it cannot run.
    """
    if kernel == "torch":
        return kernel
    missing = missing_for_triton(device)
    if kernel == "auto":
        return "triton" if missing is None else "torch"
    if missing is not None:
        raise ConfigError(f"loss_kernel: `triton` {missing}, or say `torch`")
    return kernel


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ids: Tensor,
        logprobs: Tensor,
        objective: Objective,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_states = torch.empty_like(states) if wants_states else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if wants_bias and bias is not None else None
        loss, ce, kd = (torch.zeros((), dtype=exact, device=states.device) for _ in range(3))
        parts_ = _parts_
        if objective.kernel == "triton":
            from tasks.train.loss_triton import parts_
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(labels), objective.chunk):
                part = slice(start, start + objective.chunk)
                inputs = states[part].to(dtype)
                logits = _project(inputs, matrix, bias, exact)
                slope = _transform_(logits, scale, softcap)
                parts = parts_(logits, labels[part], ids[part], logprobs[part], objective, any(ctx.needs_input_grad))
                loss, ce, kd = loss + parts.loss.sum(), ce + parts.ce.sum(), kd + parts.kd.sum()
                if not any(ctx.needs_input_grad):
                    continue
                if slope is not None:
                    logits.mul_(slope)
                if grad_bias is not None:
                    grad_bias += logits.sum(0)
                lower = logits.to(dtype)
                # Both at once would be the largest thing here.
                del logits, slope
                if grad_states is not None:
                    grad_states[part] = (lower @ matrix).to(states.dtype)
                if grad_weight is not None:
                    _add_product_(grad_weight, lower.T, inputs)
                del lower
        in_float = [None if gradient is None else gradient.to(weight.dtype) for gradient in (grad_weight, grad_bias)]
        ctx.gradients = [grad_states, *in_float]
        ctx.mark_non_differentiable(ce, kd)
        return loss, ce, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since the head's gradient is as large as the head; so a graph can be walked once only.
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grads[0])
        return (*gradients, *[None] * 6)


class Parts(NamedTuple):
    """Loss, CE and KD per position, in nats, [n]."""

    loss: Tensor
    ce: Tensor
    kd: Tensor


def _project(inputs: Tensor, matrix: Tensor, bias: Tensor | None, exact: torch.dtype) -> Tensor:
    if inputs.is_cuda and inputs.dtype in (torch.bfloat16, torch.float16):
        logits: Tensor = torch.mm(inputs, matrix.T, out_dtype=torch.float32)
    else:
        logits = (inputs @ matrix.T).to(exact)
    return logits if bias is None else logits.add_(bias)


def _transform_(logits: Tensor, scale: float, softcap: float | None) -> Tensor | None:
    """Scale and cap logits in place; return the derivative, None where it is 1 everywhere."""
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is None:
        return None if scale == 1.0 else logits.new_tensor(scale)
    logits.div_(softcap).tanh_()
    slope = (1 - logits.square()).mul_(scale)
    logits.mul_(softcap)
    return slope


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total += torch.mm(left, right, out_dtype=torch.float32)
    else:
        total += left @ right


def _parts_(
    logits: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, objective: Objective, with_gradient: bool
) -> Parts:
    """Return loss, CE and KD per position [n]; ``logits`` [n, vocabulary] become the gradient of the loss in place.

    With q the student's probabilities, K the top-k ids, S and T the mass of student and teacher outside K, P = 1 - T,
    and u(j) = q(j) / S, the student's distribution outside K:

        dCE/dz(j) = q(j) - [j is the label]
        dKD/dz(j), j in K:      truncated P q(j) - p(j);  tail q(j) - p(j);  renormalized q(j) / sum_K q - p(j) / P
        dKD/dz(j), j not in K:  truncated P q(j);         tail u(j) (S - T); renormalized 0

    Outside K every form is u(j) times a number of the row, so one exponential over the vocabulary serves value and
    gradient, and S is a sum of its own: exact also where the student leaves next to nothing there.
    """
    weight, form = objective.kd_weight, objective.kd_form
    # A token the teacher rules out (-inf) has probability 0 and adds nothing; 0 * inf would be NaN.
    teacher = logprobs.to(logits.dtype).clamp(min=-1e4)
    if form == "renormalized":
        teacher = teacher - teacher.logsumexp(-1, keepdim=True)
    elif form == "tail":
        # Rounding in storage can push the k probabilities above 1 in sum; they are scaled back so that a tail is left
        # that is at least 0 and the KL stays one between distributions.
        teacher = teacher - teacher.logsumexp(-1, keepdim=True).clamp(min=0)
    p = teacher.exp()

    listed = logits.gather(1, ids)
    label = logits.gather(1, labels[:, None])
    logits.scatter_(1, ids, -torch.inf)
    peak = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    rest = logits.sub_(peak).exp_().sum(-1, keepdim=True)
    outside = peak + rest.log()
    normalizer = torch.logaddexp(outside, listed.logsumexp(-1, keepdim=True))
    student = listed - normalizer
    ce = normalizer - label

    teacher_outside = torch.zeros_like(rest)
    if form == "renormalized":
        kd = (p * (teacher - listed.log_softmax(-1))).sum(-1, keepdim=True)
    else:
        kd = (p * (teacher - student)).sum(-1, keepdim=True)
        if form == "tail":
            teacher_outside = (1 - p.sum(-1, keepdim=True)).clamp(min=0)
            kd += torch.xlogy(teacher_outside, teacher_outside)
            kd -= torch.where(teacher_outside > 0, teacher_outside * (outside - normalizer), 0.0)
    parts = Parts(*(value[:, 0] for value in ((1 - weight) * ce + weight * kd, ce, kd)))
    if not with_gradient:
        return parts

    student_outside = (outside - normalizer).exp()
    if form == "truncated":
        total = p.sum(-1, keepdim=True)
        of_rest, of_listed = weight * total * student_outside, total * student.exp() - p
    elif form == "tail":
        of_rest, of_listed = weight * (student_outside - teacher_outside), student.exp() - p
    else:
        of_rest, of_listed = torch.zeros_like(rest), listed.softmax(-1) - p
    of_rest = (1 - weight) * student_outside + of_rest
    logits.mul_(torch.where(rest > 0, of_rest / rest, 0.0))
    logits.scatter_(1, ids, (1 - weight) * student.exp() + weight * of_listed)
    logits.scatter_add_(1, labels[:, None], torch.full_like(label, weight - 1))
    return parts
