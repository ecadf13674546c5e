import pytest

from tests.fuzz.harness import counted


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if counted:
        terminalreporter.section("fuzzed inputs")
        for name, inputs in counted.items():
            terminalreporter.write_line(f"{inputs:8,} {name}")
        terminalreporter.write_line(f"{sum(counted.values()):8,} in all")
