"""The image: what its Dockerfile names is there. No engine here builds it; hadolint reads it in `make lint`."""

import re
import tomllib
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
DOCKERFILE = (CHECKOUT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_extras_that_are_installed_exist() -> None:
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", DOCKERFILE, re.MULTILINE)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_what_is_copied_is_there_and_may_enter_the_build() -> None:
    copied = [path for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for path in line.split()[:-1]]
    assert "flows" in copied
    assert all((CHECKOUT / path).exists() for path in copied)
    lines = (CHECKOUT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == set(copied)


# Not for the image: developers' tools, the worker that starts it, and a quickstart for machines without a GPU.
OUTSIDE = {"dev", "docker-worker", "quickstart"}


@pytest.mark.parametrize("extra", [None, *sorted(PROJECT["optional-dependencies"].keys() - OUTSIDE)])
def test_every_dependency_is_pinned(extra: str | None) -> None:
    wanted = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    names = {re.split(r"[\[<>=!~ ]", requirement)[0].lower() for requirement in wanted}
    lines = (CHECKOUT / "deploy/constraints.txt").read_text(encoding="utf-8").splitlines()
    assert names <= {line.split("==")[0] for line in lines}
