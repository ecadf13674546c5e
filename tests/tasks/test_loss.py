import math

import pytest
import torch
from torch import Tensor

from tasks.language_model.head import OutputHead
from tasks.train.loss import KdForm, Targets, loss_sums, topk_forward_kl
from tasks.train.trainer import sampled_policy_kl

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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "vocabulary", "k"), [(1, 2, 1), (7, 11, 3), (5, 263, 10), (3, 13, 12)])
def test_kl_and_gradient_match_the_definition(form: KdForm, n: int, vocabulary: int, k: int) -> None:
    student, ids, teacher = random_case(n, vocabulary, k, seed=n + vocabulary)
    ours = student.clone().requires_grad_()
    value = topk_forward_kl(ours, ids, teacher, form)
    value.sum().backward()
    theirs = student.clone().requires_grad_()
    expected = reference_kl(theirs, ids, teacher, form)
    expected.sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_float32_stays_close_to_float64(form: KdForm) -> None:
    student, ids, teacher = random_case(9, 515, 10, seed=5, spread=4.0)
    expected = topk_forward_kl(student, ids, teacher, form)
    value = topk_forward_kl(student.float(), ids, teacher.float(), form)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


def test_tail_is_never_negative_and_truncated_can_be() -> None:
    student, ids, teacher = random_case(400, 50, 3, seed=8)
    # Close to the teacher is where a sign error would show.
    near = torch.full((400, 50), -6.0, dtype=torch.float64).scatter(1, ids, teacher)
    for logits in (student, near, near + 0.01 * student):
        assert topk_forward_kl(logits, ids, teacher, "tail").min() >= -1e-12
        stored = teacher.half().double()
        assert topk_forward_kl(logits, ids, stored, "tail").min() >= -1e-12
    concentrated = torch.full((1, 4), -20.0, dtype=torch.float64)
    concentrated[0, 0] = 0.0
    half = torch.tensor([[math.log(0.5)]], dtype=torch.float64)
    assert topk_forward_kl(concentrated, torch.tensor([[0]]), half, "truncated").item() < 0


@pytest.mark.parametrize("form", ["tail", "renormalized"])
def test_no_gradient_where_student_equals_teacher(form: KdForm) -> None:
    logits = torch.randn(6, 31, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    logprobs, ids = logits.detach().log_softmax(-1).topk(5, dim=-1)
    value = topk_forward_kl(logits, ids, logprobs, form)
    value.sum().backward()
    assert logits.grad is not None
    assert value.abs().max() < 1e-12
    assert logits.grad.abs().max() < 1e-12


def test_truncated_has_a_gradient_at_equality() -> None:
    logits = torch.randn(6, 31, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    logprobs, ids = logits.detach().log_softmax(-1).topk(5, dim=-1)
    topk_forward_kl(logits, ids, logprobs, "truncated").sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() > 1e-3


def test_whole_vocabulary_and_certain_teacher_have_finite_gradients() -> None:
    student, ids, teacher = random_case(4, 7, 7, seed=1)
    certain = torch.full((4, 7), -torch.inf, dtype=torch.float64)
    certain[:, 0] = 0.0
    for logprobs in (teacher, certain):
        logits = student.clone().requires_grad_()
        value = topk_forward_kl(logits, ids, logprobs, "tail")
        value.sum().backward()
        assert logits.grad is not None
        assert torch.isfinite(value).all()
        assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunked_sums_match_whole_logits(form: KdForm, chunk: int) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(23, 8, generator=generator, dtype=torch.float32)
    projection = torch.nn.Linear(8, 37, bias=True)
    places = torch.tensor([0, 3, 4, 9, 10, 11, 20])
    labels = torch.randint(0, 37, (7,), generator=generator)
    teacher = torch.randn(7, 37, generator=generator).log_softmax(-1)
    logprobs, ids = teacher.topk(5, dim=-1)

    ours = hidden.clone().requires_grad_()
    sums = loss_sums(ours, OutputHead(projection), Targets(places, labels, ids, logprobs), form, chunk)
    (0.25 * sums.ce + 0.75 * sums.kd).backward()
    weight_gradient = projection.weight.grad
    projection.weight.grad = None

    theirs = hidden.double().clone().requires_grad_()
    logits = torch.nn.functional.linear(theirs[places], projection.weight.double(), projection.bias.double())
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    kd = reference_kl(logits, ids, logprobs.double(), form).sum()
    (0.25 * ce + 0.75 * kd).backward()

    torch.testing.assert_close(sums.ce.double(), ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.kd.double(), kd, rtol=1e-5, atol=1e-5)
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    assert projection.weight.grad is not None
    assert weight_gradient is not None
    torch.testing.assert_close(weight_gradient, projection.weight.grad, rtol=1e-4, atol=1e-5)
    expected = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(sums.label_logprobs.double(), expected, rtol=1e-5, atol=1e-5)


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
    sums = loss_sums(hidden.bfloat16(), OutputHead(projection), targets, "tail", 8)
    logits = hidden.double() @ weight.double().T
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    kd = reference_kl(logits, ids, logprobs, "tail").sum()
    assert abs(sums.ce.item() - ce.item()) < 3 * 2**-8 * ce.item()
    assert abs(sums.kd.item() - kd.item()) < 3 * 2**-8 * ce.item()


def test_sampled_policy_kl_estimates_the_exact_kl() -> None:
    generator = torch.Generator().manual_seed(4)
    sampler = torch.randn(12, generator=generator, dtype=torch.float64).log_softmax(-1)
    current = (sampler + 0.5 * torch.randn(12, generator=generator, dtype=torch.float64)).log_softmax(-1)
    exact = (current.exp() * (current - sampler)).sum().item()
    # The estimator's mean over all tokens, each weighted by how often the sampler draws it, is the KL itself.
    values = sampled_policy_kl(current, sampler)
    assert (sampler.exp() * values).sum().item() == pytest.approx(exact, rel=1e-9)
    assert values.min() >= 0
    assert sampled_policy_kl(sampler, sampler).abs().max() == 0
