import importlib
from collections.abc import Callable

from tests.fuzz.harness import MODULES, Reader, counted

LEAST = 10_000
"""Mutated inputs that the readers must be tried on."""


def test_there_are_enough_inputs(record_property: Callable[[str, object], None]) -> None:
    readers: list[Reader] = []
    for name in MODULES:
        readers += importlib.import_module(f"tests.fuzz.test_fuzz_{name}").READERS
    assert len({reader.name for reader in readers}) == len(readers)
    assert sum(reader.inputs for reader in readers) >= LEAST
    record_property("fuzzed inputs", dict(counted) | {"in all": sum(counted.values())})
    assert all(counted[reader.name] >= reader.inputs for reader in readers if reader.name in counted)
