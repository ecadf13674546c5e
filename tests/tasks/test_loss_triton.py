"""The loss's Triton kernel against the float64 definitions, all cases in one process (`triton_process`)."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.loss import Problem, check, chunk_name
from schemas.errors import ConfigError
from tasks.language_model.head import OutputHead
from tasks.train.loss import KdForm, LossSums, Objective, Targets, choose_kernel, loss_sums
from tests.tasks.test_loss import FORMS, identity_head, random_case, reference_kl, reference_loss
from tests.tasks.triton_process import DEVICE, all_results, compile_for_a_gpu

pytestmark = pytest.mark.xdist_group("triton")

Found = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """Logits to take the loss of.

    Args:
        form: Of the KL.
        weight: Of it.
        rows: Positions.
        vocabulary: Tokens; a row of more than 4,096 takes several blocks.
        k: Targets of a position.
        dtype: Of the logits.
        shape: Which logits: `random`; a student with next to nothing `outside` or `inside` the top k.
        certain: Whether the teacher rules out all but one token.
    """

    form: KdForm
    weight: float
    rows: int
    vocabulary: int
    k: int
    dtype: torch.dtype = torch.float64
    shape: str = "random"
    certain: bool = False

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return float64 logits, labels inside the top k and outside it, ids and the teacher's log-probabilities."""
        logits, ids, teacher = random_case(self.rows, self.vocabulary, self.k, seed=self.rows + self.vocabulary)
        labels = torch.arange(self.rows) % self.vocabulary
        labels[0] = ids[0, -1]
        if self.shape == "outside":
            logits = logits.scatter(1, ids, -80.0)
        if self.shape == "inside":
            logits = torch.full_like(logits, -500.0).scatter(1, ids, logits.gather(1, ids))
        if self.certain:
            teacher = torch.full_like(teacher, -torch.inf)
            teacher[:, 0] = 0.0
        return logits.to(self.dtype).double(), labels, ids, teacher.to(self.dtype).double()


SIZES = [(1, 2, 1), (7, 11, 3), (5, 263, 10), (3, 13, 12), (4, 7, 7), (2, 4103, 10)]
CASES = [
    *(Case(form, 0.9, *size) for form, size in product(FORMS, SIZES)),
    *(Case(form, weight, 7, 11, 3) for form, weight in product(FORMS, (0.0, 1.0))),
    *(Case(form, 0.9, 9, 515, 10, torch.float32) for form in FORMS),
]
EXTREMES = [
    Case(form, 0.5, 4, 9, 3, dtype, shape, certain)
    for form, dtype, shape, certain in product(
        FORMS, (torch.float64, torch.float32), ("random", "outside", "inside"), (False, True)
    )
]


def taken(sums: LossSums, **gradients: Tensor | None) -> dict[str, Tensor]:
    """Return sums and gradients, for a file."""
    return {name: value.detach().cpu() for name, value in (sums._asdict() | gradients).items() if value is not None}


def of_logits(case: Case) -> dict[str, Tensor]:
    """Take the loss by the kernel through a head that changes nothing, three positions at a time."""
    logits, labels, ids, teacher = (tensor.to(DEVICE) for tensor in case.draw())
    states = logits.to(case.dtype).requires_grad_()
    targets = Targets(torch.arange(case.rows, device=DEVICE), labels, ids, teacher.to(case.dtype))
    head = OutputHead(identity_head(case.vocabulary, case.dtype).projection.to(DEVICE))
    sums = loss_sums(states, head, targets, Objective(case.weight, case.form, 3, "triton"))
    sums.loss.backward()
    return taken(sums, gradient=states.grad)


def of_a_head(kernel: str, with_targets: bool) -> dict[str, Tensor]:
    """Take the loss through a head with bias, scale and softcap, some positions left out."""
    random = torch.Generator().manual_seed(2)
    hidden = torch.randn(23, 8, generator=random).to(DEVICE).requires_grad_()
    projection = torch.nn.Linear(8, 37)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    places, labels = torch.tensor([0, 3, 4, 9, 10, 11, 20]), torch.randint(0, 37, (7,), generator=random)
    logprobs, ids = torch.randn(7, 37, generator=random).log_softmax(-1).topk(5, dim=-1)
    targets = Targets(places.to(DEVICE), labels.to(DEVICE))
    if with_targets:
        targets = Targets(places.to(DEVICE), labels.to(DEVICE), ids.to(DEVICE), logprobs.to(DEVICE))
    objective = Objective(0.75, "tail", 4, "triton" if kernel == "triton" else "torch")
    projection = projection.to(DEVICE)
    head = OutputHead(projection, 1.3, 2.5)
    sums = loss_sums(hidden, head, targets, objective)
    with torch.no_grad():
        alone = loss_sums(hidden, head, targets, objective)
    (3 * sums.loss).backward()
    gradients = {"states": hidden.grad, "weight": projection.weight.grad, "bias": projection.bias.grad}
    return taken(sums, **gradients, without_gradient=alone.loss)


HEADS = {"targets": True, "warm-up": False}


@pytest.fixture(scope="module")
def found() -> Found:
    """What the kernel makes of every case."""
    loaded: Found = all_results()[__name__]
    return loaded


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_match_the_definition(case: Case, found: Found) -> None:
    logits, labels, ids, teacher = case.draw()
    theirs = logits.clone().requires_grad_()
    expected = reference_loss(theirs, labels, ids, teacher, case.form, case.weight)
    expected.sum().backward()
    ours = {name: value.double() for name, value in found[str(case)].items()}
    exact = case.dtype == torch.float64
    values: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 1e-5, "atol": 1e-5}
    gradients: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-11} if exact else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(ours["loss"], expected.detach().sum(), **values)
    torch.testing.assert_close(ours["kd"], reference_kl(logits, ids, teacher, case.form).sum(), **values)
    logprobs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(ours["ce"], -logprobs.sum(), **values)
    assert theirs.grad is not None
    torch.testing.assert_close(ours["gradient"], theirs.grad, **gradients)


@pytest.mark.parametrize("case", EXTREMES, ids=str)
def test_extremes_are_those_of_the_torch_kernel(case: Case, found: Found) -> None:
    logits, labels, ids, teacher = case.draw()
    states = logits.to(case.dtype).requires_grad_()
    targets = Targets(torch.arange(case.rows), labels, ids, teacher.to(case.dtype))
    head = identity_head(case.vocabulary, case.dtype)
    sums = loss_sums(states, head, targets, Objective(case.weight, case.form, 3))
    sums.loss.backward()
    expected = taken(sums, gradient=states.grad)
    assert all(torch.isfinite(value).all() for value in found[str(case)].values())
    tolerance: dict[str, Any] = (
        {"rtol": 1e-10, "atol": 1e-12} if case.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    )
    torch.testing.assert_close(found[str(case)], expected, **tolerance)


@pytest.mark.parametrize("name", HEADS)
def test_any_head_gets_the_gradients_of_the_torch_kernel(name: str, found: Found) -> None:
    expected = of_a_head("torch", HEADS[name])
    assert expected["loss"] == expected["without_gradient"]
    assert {"states", "weight", "bias"} <= expected.keys()
    torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_gradient", [True, False])
def test_it_compiles_for_a_gpu(
    form: KdForm, with_gradient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.train.loss_triton import WARPS, constants, kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = constants(Objective(0.9, form, 1024), 151_936, 10, with_gradient)
    types = ["*fp32", "*i64", "*i64", *["*fp32"] * 4, "i32", "i32"]
    compiled = compile_for_a_gpu(kernel, types, fixed, WARPS)
    assert compiled.asm["cubin"]
    # Threads wait for each other where one reads what another wrote.
    assert compiled.asm["ptx"].count("bar.sync") >= 2


def test_the_kernel_is_refused_without_a_cuda_device() -> None:
    assert choose_kernel("torch", torch.device("cpu")) == "torch"
    with pytest.raises(ConfigError, match="loss_kernel: `triton` needs a CUDA device"):
        choose_kernel("triton", torch.device("cpu"))


Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Make this one that has Triton, a C compiler and Python's headers, or has not."""

    def make(*, triton: bool = True, compiler: str | None = "gcc", headers: bool = True) -> None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr("shutil.which", lambda name: name if name == compiler else None)
        folder = tmp_path / str(headers)
        folder.mkdir(exist_ok=True)
        if headers:
            (folder / "Python.h").touch()
        monkeypatch.setattr("sysconfig.get_path", lambda *wanted: str(folder))

    return make


def test_auto_takes_the_kernel_where_it_runs(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    machine()
    assert choose_kernel("auto", torch.device("cpu")) == "torch"
    assert choose_kernel("auto", torch.device("cuda")) == "triton"
    machine(triton=False)
    assert choose_kernel("auto", torch.device("cuda")) == "torch"
    machine(headers=False)
    assert choose_kernel("auto", torch.device("cuda")) == "torch"
    machine(compiler=None)
    assert choose_kernel("auto", torch.device("cuda")) == "torch"
    monkeypatch.setenv("CC", "cc")
    assert choose_kernel("auto", torch.device("cuda")) == "triton"


def test_the_kernel_is_refused_where_it_does_not_run(machine: Machine) -> None:
    machine(triton=False)
    with pytest.raises(ConfigError, match="loss_kernel: `triton` is not installed; install it"):
        choose_kernel("triton", torch.device("cuda"))
    machine(compiler=None)
    with pytest.raises(ConfigError, match="loss_kernel: `triton` finds no C compiler; install gcc"):
        choose_kernel("triton", torch.device("cuda"))
    machine(headers=False)
    with pytest.raises(ConfigError, match=r"loss_kernel: `triton` finds no Python\.h; install Python's headers"):
        choose_kernel("triton", torch.device("cuda"))


if __name__ == "__main__":
    # What the benchmark would time; raises where it is not the naive loss.
    check(Problem(9, 8, 40, 4, "float32", DEVICE, "tail"), chunk_name(4, "triton"))
    results = {str(case): of_logits(case) for case in (*CASES, *EXTREMES)}
    results |= {name: of_a_head("triton", with_targets) for name, with_targets in HEADS.items()}
    torch.save(results, sys.argv[1])
