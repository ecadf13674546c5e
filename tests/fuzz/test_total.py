import importlib

from tests.fuzz.harness import MODULES, Reader

LEAST = 10_000
"""Mutated inputs that the readers must be tried on."""


def test_there_are_enough_inputs() -> None:
    readers: list[Reader] = []
    for name in MODULES:
        readers += importlib.import_module(f"tests.fuzz.test_fuzz_{name}").READERS
    assert len({reader.name for reader in readers}) == len(readers)
    # Each reader's own test fails if it gets fewer.
    assert sum(reader.inputs for reader in readers) >= LEAST
