"""What a benchmark prints: a Markdown table with the bar beside each measurement, the machine and the versions."""

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.measure import Measurement
from schemas.provenance import package_versions
from tasks.cores import available_cores


class BenchmarkParser(argparse.ArgumentParser):
    """Arguments that all benchmarks have, and sizes that ``--quick`` makes tiny."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(
            prog=f"python -m benchmarks.{name}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.name = name
        self._sizes: dict[str, tuple[Any, Any]] = {}
        self.add_argument("--device", default="cpu", help="where models compute: cpu, cuda or cuda:N")
        self.add_argument("--json", type=Path, metavar="PATH", help="write the rows there too")
        self.add_argument("--quick", action="store_true", help="tiny sizes, to see it run; its numbers mean nothing")
        self.add_size("--repeats", 5, 1, "how often each side is measured")
        self.add_size("--warmup", 1, 0, "how often each side runs before that")

    def add_size(self, flag: str, default: Any, quick: Any, meaning: str) -> None:
        """Add an argument of ``default``'s type whose default is ``quick`` under ``--quick``."""
        name = flag.removeprefix("--").replace("-", "_")
        self._sizes[name] = (default, quick)
        text = f"{meaning} (default: {default}; {quick} with --quick)"
        self.add_argument(flag, type=type(default), default=argparse.SUPPRESS, metavar="N", help=text)

    def read(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line and fill in the sizes that it leaves out."""
        values = self.parse_args(arguments)
        for name, (default, quick) in self._sizes.items():
            if not hasattr(values, name):
                setattr(values, name, quick if values.quick else default)
        return values


@dataclass(frozen=True)
class Machine:
    """What the numbers were measured on.

    Args:
        system: Kernel and architecture.
        cpu: Its model.
        cores: Those this process may use.
        memory_gib: Of the machine.
        gpu: Its name; None if nothing ran on one.
        load: Load average over the last minute before the benchmark began: others at work spoil timings.
        python: Version.
        packages: Versions.
    """

    system: str
    cpu: str
    cores: int
    memory_gib: float
    gpu: str | None
    load: float
    python: str
    packages: dict[str, str]


def this_machine(device: str = "cpu") -> Machine:
    """Describe this machine."""
    gpu = None
    if device.startswith("cuda"):
        import torch

        gpu = torch.cuda.get_device_name(device)
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_model(),
        cores=available_cores(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpu=gpu,
        load=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        packages=package_versions(),
    )


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown(rows: Sequence[Measurement], machine: Machine, notes: Sequence[str] = ()) -> str:
    """Return the table, then the notes, the machine and the versions."""
    lines = ["| what | median (min to max) | bar | |", "|---|---|---|---|"]
    for row in rows:
        bar = "" if row.bar is None else f"{'≥' if row.bar.at_least else '≤'} {number(row.bar.limit)} {row.unit}"
        verdict = f"**{row.verdict}**" if row.verdict == "missed" else row.verdict
        lines.append(f"| {row.what} | {_spread(row)} | {bar} | {verdict} |")
    lines += ["", *(f"- {note}" for note in notes)]
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    memory = f"{machine.memory_gib:.0f} GiB"
    lines += [
        f"- Machine: {machine.gpu + ', ' if machine.gpu else ''}{machine.cpu}, {machine.cores} cores, {memory}, "
        f"{machine.system}; load before: {machine.load}.",
        f"- Versions: Python {machine.python}, {packages}.",
    ]
    return "\n".join(lines)


def _spread(row: Measurement) -> str:
    if len(row.values) == 1:
        return f"{number(row.median)} {row.unit}"
    return f"{number(row.median)} ({number(min(row.values))} to {number(max(row.values))}) {row.unit}"


def number(value: float) -> str:
    """Write a number with four significant digits, or whole with separators from 1,000.

    >>> number(0.0123456), number(8.1), number(1234567.8)
    ('0.01235', '8.1', '1,234,568')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


Measure = Callable[[argparse.Namespace], tuple[list[Measurement], list[str]]]
"""Takes the parsed arguments; returns the rows, and notes that a reader of the table needs."""


def main(parser: BenchmarkParser, measure: Measure, arguments: Sequence[str] | None = None) -> None:
    """Run a benchmark's command: measure, print the table, write the JSON."""
    values = parser.read(arguments)
    machine = this_machine(values.device)
    rows, notes = measure(values)
    if values.quick:
        notes = [*notes, "**`--quick`: these sizes show that it runs; the numbers mean nothing.**"]
    print(markdown(rows, machine, notes))
    if values.json is not None:
        values.json.write_text(json.dumps(as_json(parser.name, values, rows, machine, notes), indent=2) + "\n")


def as_json(
    name: str, arguments: argparse.Namespace, rows: Sequence[Measurement], machine: Machine, notes: Sequence[str]
) -> dict[str, Any]:
    """Return everything about one benchmark's result as JSON values."""
    return {
        "benchmark": name,
        "arguments": {key: str(v) if isinstance(v, Path) else v for key, v in vars(arguments).items() if key != "json"},
        "machine": {field.name: getattr(machine, field.name) for field in fields(machine)},
        "notes": list(notes),
        "rows": [
            {
                "what": row.what,
                "unit": row.unit,
                "median": row.median,
                "min": min(row.values),
                "max": max(row.values),
                "values": list(row.values),
                "bar": None if row.bar is None else asdict(row.bar),
                "verdict": row.verdict,
            }
            for row in rows
        ],
    }
