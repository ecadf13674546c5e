import math
from typing import Any

import pytest
import torch
from torch import Tensor

from schemas.errors import ConfigError
from tasks.language_model.head import OutputHead
from tasks.train.loss import KdForm, LossSums, Objective, Targets, loss_sums

FORMS: tuple[KdForm, ...] = ("truncated", "tail", "renormalized")


def reference_kl(logits: Tensor, ids: Tensor, teacher: Tensor, form: KdForm) -> Tensor:
    """The definition, position by position and token by token, in float64."""
    rows = []
    for position in range(len(logits)):
        q = torch.softmax(logits[position].double(), -1)
        p_k = [teacher[position, j].double().exp() for j in range(ids.shape[1])]
        q_k = [q[ids[position, j]] for j in range(ids.shape[1])]
        if form == "renormalized":
            p_sum, q_sum = torch.stack(p_k).sum(), torch.stack(q_k).sum()
            p_k, q_k = [p / p_sum for p in p_k], [value / q_sum for value in q_k]
        total = torch.stack([p * torch.log(p / value) for p, value in zip(p_k, q_k, strict=True)]).sum()
        if form == "tail" and ids.shape[1] < logits.shape[1]:
            p_rest, q_rest = 1 - torch.stack(p_k).sum(), 1 - torch.stack(q_k).sum()
            total = total + p_rest * torch.log(p_rest / q_rest)
        rows.append(total)
    return torch.stack(rows)


def random_case(n: int, vocabulary: int, k: int, seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)
    teacher = spread * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)
    logprobs, ids = teacher.log_softmax(-1).topk(k, dim=-1)
    return student, ids, logprobs


def reference_loss(logits: Tensor, labels: Tensor, ids: Tensor, teacher: Tensor, form: KdForm, weight: float) -> Tensor:
    ce = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    return (1 - weight) * ce + weight * reference_kl(logits, ids, teacher, form)


def identity_head(vocabulary: int, dtype: torch.dtype) -> OutputHead:
    """A head whose logits are its hidden states, so that the gradient at the logits can be seen."""
    projection = torch.nn.Linear(vocabulary, vocabulary, bias=False, dtype=dtype)
    with torch.no_grad():
        projection.weight.copy_(torch.eye(vocabulary, dtype=dtype))
    return OutputHead(projection.requires_grad_(False))


def fused(
    logits: Tensor, ids: Tensor, teacher: Tensor, form: KdForm, weight: float = 1.0, labels: Tensor | None = None
) -> tuple[LossSums, Tensor]:
    """The fused loss of given logits [n, vocabulary], and its gradient there."""
    logits = logits.clone().requires_grad_()
    places = torch.arange(len(logits))
    labels = torch.zeros_like(places) if labels is None else labels
    head = identity_head(logits.shape[1], logits.dtype)
    sums = loss_sums(logits, head, Targets(places, labels, ids, teacher), Objective(weight, form, 3))
    sums.loss.backward()
    assert logits.grad is not None
    return sums, logits.grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(("n", "vocabulary", "k"), [(1, 2, 1), (7, 11, 3), (5, 263, 10), (3, 13, 12), (4, 7, 7)])
def test_loss_and_gradient_match_the_definition(form: KdForm, weight: float, n: int, vocabulary: int, k: int) -> None:
    student, ids, teacher = random_case(n, vocabulary, k, seed=n + vocabulary)
    # Labels inside the top k and outside it.
    labels = torch.arange(n) % vocabulary
    labels[0] = ids[0, -1]
    sums, gradient = fused(student, ids, teacher, form, weight, labels)
    theirs = student.clone().requires_grad_()
    expected = reference_loss(theirs, labels, ids, teacher, form, weight)
    expected.sum().backward()
    assert theirs.grad is not None
    torch.testing.assert_close(sums.loss, expected.sum(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sums.kd, reference_kl(student, ids, teacher, form).sum(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, theirs.grad, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_float32_stays_close_to_float64(form: KdForm) -> None:
    student, ids, teacher = random_case(9, 515, 10, seed=5, spread=4.0)
    expected, gradient = fused(student, ids, teacher, form)
    sums, close = fused(student.float(), ids, teacher.float(), form)
    torch.testing.assert_close(sums.kd.double(), expected.kd, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(close.double(), gradient, rtol=1e-4, atol=1e-6)


def test_tail_is_never_negative_and_truncated_can_be() -> None:
    student, ids, teacher = random_case(400, 50, 3, seed=8)
    # Close to the teacher is where a sign error would show.
    near = torch.full((400, 50), -6.0, dtype=torch.float64).scatter(1, ids, teacher)
    for logits in (student, near, near + 0.01 * student):
        for targets in (teacher, teacher.half().double()):
            for row in range(0, 400, 40):
                sums, _ = fused(logits[row : row + 1], ids[row : row + 1], targets[row : row + 1], "tail")
                assert sums.kd >= -1e-12
    concentrated = torch.full((1, 4), -20.0, dtype=torch.float64)
    concentrated[0, 0] = 0.0
    half = torch.tensor([[math.log(0.5)]], dtype=torch.float64)
    assert fused(concentrated, torch.tensor([[0]]), half, "truncated")[0].kd < 0


@pytest.mark.parametrize("form", ["tail", "renormalized"])
def test_no_gradient_where_student_equals_teacher(form: KdForm) -> None:
    logits = torch.randn(6, 31, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logprobs, ids = logits.log_softmax(-1).topk(5, dim=-1)
    sums, gradient = fused(logits, ids, logprobs, form)
    assert sums.kd.abs() < 1e-12
    assert gradient.abs().max() < 1e-12


def test_a_tail_without_a_token_is_none() -> None:
    """All of the student's tokens are listed; a teacher with padding in its vocabulary leaves mass on none of them."""
    teacher = torch.randn(6, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(-1)
    logprobs, ids = teacher[:, :7].topk(7, dim=-1)
    sums, gradient = fused(teacher[:, :7], ids, logprobs, "tail")
    assert sums.kd.abs() < 1e-12
    assert gradient.abs().max() < 1e-12


def test_truncated_has_a_gradient_at_equality() -> None:
    logits = torch.randn(6, 31, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logprobs, ids = logits.log_softmax(-1).topk(5, dim=-1)
    assert fused(logits, ids, logprobs, "truncated")[1].abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extremes_stay_finite_and_right(form: KdForm, dtype: torch.dtype) -> None:
    """A certain teacher, a student that leaves nothing outside the top k, and one that leaves nothing inside."""
    student, ids, teacher = random_case(4, 9, 3, seed=1)
    certain = torch.full((4, 3), -torch.inf, dtype=torch.float64)
    certain[:, 0] = 0.0
    inside = torch.full((4, 9), -500.0, dtype=torch.float64).scatter(1, ids, student.gather(1, ids))
    outside = student.scatter(1, ids, -80.0)
    for logits in (student, inside, outside):
        for logprobs in (teacher, certain):
            sums, gradient = fused(logits.to(dtype), ids, logprobs.to(dtype), form, 0.5)
            assert torch.isfinite(gradient).all()
            assert torch.isfinite(sums.loss)
            # Any two logits moved alike change no probability.
            assert gradient.sum(-1).abs().max() < 1e-5 or form == "truncated"
    # Student 500 nats surer than the teacher: -T log S must not round S to 0.
    sums, _ = fused(inside, ids, teacher, "tail")
    tail = 1 - teacher.exp().sum(-1)
    listed = (teacher.exp() * (teacher - inside.gather(1, ids).log_softmax(-1))).sum(-1)
    student_tail = math.log(6) - 500 - inside.gather(1, ids).logsumexp(-1)
    assert sums.kd.item() == pytest.approx((listed + tail * (tail.log() - student_tail)).sum().item(), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.7, None), (1.3, 2.5)])
def test_chunked_sums_and_gradients_match_whole_logits(
    form: KdForm, chunk: int, scale: float, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(23, 8, generator=generator)
    projection = torch.nn.Linear(8, 37, bias=True)
    places = torch.tensor([0, 3, 4, 9, 10, 11, 20])
    labels = torch.randint(0, 37, (7,), generator=generator)
    teacher = torch.randn(7, 37, generator=generator).log_softmax(-1)
    logprobs, ids = teacher.topk(5, dim=-1)

    ours = hidden.clone().requires_grad_()
    targets = Targets(places, labels, ids, logprobs)
    sums = loss_sums(ours, OutputHead(projection, scale, softcap), targets, Objective(0.75, form, chunk))
    (3 * sums.loss).backward()
    found = [ours.grad, projection.weight.grad, projection.bias.grad]
    projection.weight.grad = projection.bias.grad = None

    theirs = hidden.double().clone().requires_grad_()
    logits = scale * torch.nn.functional.linear(theirs[places], projection.weight.double(), projection.bias.double())
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    kd = reference_kl(logits, ids, logprobs.double(), form).sum()
    (3 * (0.25 * ce + 0.75 * kd)).backward()

    torch.testing.assert_close(sums.ce.double(), ce.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.kd.double(), kd.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.loss.double(), 0.25 * ce + 0.75 * kd, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(found, [theirs.grad, projection.weight.grad, projection.bias.grad], strict=True):
        assert gradient is not None
        assert expected is not None
        torch.testing.assert_close(gradient.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_without_targets_it_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(11, 8, generator=generator, requires_grad=True)
    projection = torch.nn.Linear(8, 37, bias=False)
    places, labels = torch.arange(11), torch.randint(0, 37, (11,), generator=generator)
    sums = loss_sums(hidden, OutputHead(projection), Targets(places, labels), Objective(0.9, "tail", 4))
    sums.loss.backward()
    found = projection.weight.grad
    projection.weight.grad = None
    expected = torch.nn.functional.cross_entropy(projection(hidden), labels, reduction="sum")
    expected.backward()
    assert sums.kd == 0
    torch.testing.assert_close(sums.loss, expected)
    torch.testing.assert_close(found, projection.weight.grad)


def test_no_logits_are_kept_between_forward_and_backward() -> None:
    """What a graph holds is as large as the states and the head, whatever the vocabulary times the positions."""
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    hidden = torch.randn(64, 4, requires_grad=True)
    projection = torch.nn.Linear(4, 1000, bias=False)
    _, ids, teacher = random_case(64, 1000, 5, seed=0)
    targets = Targets(torch.arange(64), ids[:, 0], ids, teacher)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sums = loss_sums(hidden, OutputHead(projection), targets, Objective(0.9, "tail", 16))
    assert max(saved, default=0) < 16 * 1000
    node: Any = sums.loss.grad_fn
    assert sum(gradient.numel() for gradient in node.gradients if gradient is not None) == 64 * 4 + 4 * 1000
    sums.loss.backward()
    assert node.gradients is None


def test_frozen_weights_get_no_gradient() -> None:
    hidden = torch.randn(5, 4, requires_grad=True)
    projection = torch.nn.Linear(4, 9).requires_grad_(False)
    _, ids, teacher = random_case(5, 9, 3, seed=0)
    targets = Targets(torch.arange(5), ids[:, 0], ids, teacher)
    sums = loss_sums(hidden, OutputHead(projection), targets, Objective(0.9, "tail", 2))
    sums.loss.backward()
    assert hidden.grad is not None
    assert projection.weight.grad is None
    with torch.no_grad():
        again = loss_sums(hidden, OutputHead(projection), targets, Objective(0.9, "tail", 2))
    assert again.loss.item() == pytest.approx(sums.loss.item())
    assert not again.loss.requires_grad


def test_adapters_on_the_output_head_are_refused() -> None:
    wrapped = torch.nn.Sequential(torch.nn.Linear(4, 9))
    targets = Targets(torch.arange(2), torch.tensor([1, 2]))
    with pytest.raises(ConfigError, match=r"train\.lora\.target_modules"):
        loss_sums(torch.randn(2, 4), OutputHead(wrapped), targets, Objective(0.9, "tail", 2))


def test_bf16_hidden_states_lose_only_bf16_precision() -> None:
    """Tolerance: 3 bf16 roundings (2^-8 relative each) on terms of a few nats."""
    generator = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(33, 16, generator=generator), 0.3 * torch.randn(65, 16, generator=generator)
    labels = torch.randint(0, 65, (33,), generator=generator)
    logprobs, ids = torch.randn(33, 65, generator=generator).log_softmax(-1).topk(10, dim=-1)
    projection = torch.nn.Linear(16, 65, bias=False).bfloat16()
    with torch.no_grad():
        projection.weight.copy_(weight)
    targets = Targets(torch.arange(33), labels, ids, logprobs)
    states = hidden.bfloat16().requires_grad_()
    sums = loss_sums(states, OutputHead(projection), targets, Objective(0.9, "tail", 8))
    sums.loss.backward()
    logits = hidden.double() @ weight.double().T
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    kd = reference_kl(logits, ids, logprobs, "tail").sum()
    assert abs(sums.ce.item() - ce.item()) < 3 * 2**-8 * ce.item()
    assert abs(sums.kd.item() - kd.item()) < 3 * 2**-8 * ce.item()
    # Gradients: one more rounding of each entry, and of the sum; relative to the largest.
    exact = hidden.double().requires_grad_()
    logits = exact @ weight.double().T
    reference_loss(logits, labels, ids, logprobs, "tail", 0.9).sum().backward()
    assert states.grad is not None
    assert exact.grad is not None
    assert (states.grad.double() - exact.grad).abs().max() < 5 * 2**-8 * exact.grad.abs().max()
