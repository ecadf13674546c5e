"""How large a run becomes: the tables of docs/scale.md, computed from rates that stand here with their source.

`python -m benchmarks.simulate --prompts 1e8` prints one run's table; `make docs` writes those of
the document.
"""

import math
from collections.abc import Sequence

from benchmarks.report import number
from benchmarks.scale_model import ROUND_STAGES, WORK, Line, Rates, Simulated, Workload, simulate
from schemas.config import GenerateConfig, PackConfig, ScoreConfig, TrainConfig

PAPER = Workload(prompts=1.2e6, rounds=2, epochs_per_round=5)
"""The paper's main run. Its lengths are not known: 150 tokens of prompt and 500 of response are assumed."""

PAPER_HOURS = {"generate": 300.0, "score": 18.0, "train": 42.0, "evaluate": 6.0}
"""NPU-hours of that run (7B to 1B), from a second-hand reading; `evaluate` stands for what it calls other."""

H200_TOKENS = {"generate": 11_139.0, "teacher": 34_656.0, "student": 96_900.0, "train": 36_804.0}
"""Tokens a second on one H200 (BENCHMARKS.md, 2026-11-27): sampled by a 1.5B student (engine `transformers`), prefilled
by a 7B teacher and by the student, and trained on by the student, in bfloat16."""

CORE_SECONDS = {"prompts": 1 / 5_500, "filter": 1 / 53_000, "pack": 1 / 340_000}
"""Seconds of a CPU core for a prompt (200,000 of JSONL), a sample and a packed token (`benchmarks.million`)."""

TABLE_BYTES = {"prompts": 233.0, "generate": 10.7, "score": 34.1, "filter": 8.2, "pack": 46.0}
"""Bytes of a prompt, of a response token with its prompt (generate, score, pack), and of a sample (filter).

Score is measured on real targets (`benchmarks.storage`), the others on drawn tables (`benchmarks.million`): pack with
the real targets' 34.1 bytes in place of the drawn ones' 17.1.
"""

STUDENT_PARAMETERS = 1.5e9
"""Of the student; export writes 2 bytes each, a checkpoint 12 (float32 weights and AdamW's two moments)."""

SIZES = (1e5, 1e6, 1e7, 1e8)
SHARED = ("generate", "score", "train")
"""Stages that share their work among all devices."""

PACKS = TrainConfig().packs_per_step
FILL = 0.99
"""Share of a bin that holds tokens."""

RECORD_BYTES = 190
"""Of one file in a stage's manifest."""

MEMORY = {"prompts": 48, "generate": 5, "filter": 8, "pack": 56, "train": 4}
"""Bytes a stage holds for each prompt (prompts, generate) or sample; see docs/scale.md."""


def rates() -> Rates:
    """Return what stages cost on one device or core, and what they write."""
    seconds = {stage: Line(0.0, cost) for stage, cost in CORE_SECONDS.items()} | {"export": Line(0.0, 0.0)}
    for stage, hours in PAPER_HOURS.items():
        work, spent = WORK[stage](PAPER), hours * 3600 / PAPER.rounds
        seconds[stage] = Line(0.0, spent / work) if work else Line(spent, 0.0)
    size = {stage: Line(0.0, each) for stage, each in TABLE_BYTES.items()}
    size |= {
        "train": Line(12 * STUDENT_PARAMETERS, 0.0),
        "export": Line(2 * STUDENT_PARAMETERS, 0.0),
        "evaluate": Line(0.0, 0.0),
    }
    return Rates(seconds, size, between=10.0)


def h200_hours(load: Workload) -> dict[str, float]:
    """Return the hours of one H200 that the stages with a model take, all rounds, at the measured rates.

    The teacher prefills each response after its prompt and alone, the student alone: the sampler gave it the rest.
    """
    responses = load.samples * load.response_tokens
    samples = load.samples * (load.prompt_tokens + load.response_tokens)
    seconds = {
        "generate": responses / H200_TOKENS["generate"],
        "score": (samples + responses) / H200_TOKENS["teacher"] + responses / H200_TOKENS["student"],
        "train": WORK["train"](load) / H200_TOKENS["train"],
    }
    return {stage: load.rounds * each / 3600 for stage, each in seconds.items()}


def simulated(load: Workload, devices: int, *, overlap: bool = False) -> Simulated:
    """Predict a run whose stages with a model share ``devices`` devices."""
    return simulate(load, rates(), overlap=overlap, workers=dict.fromkeys(SHARED, devices))


def files(load: Workload) -> dict[str, int]:
    """Return how many files each stage of a round writes, with the config's own shard sizes."""
    generate = math.ceil(load.prompts / GenerateConfig().shard_prompts)
    score = generate * math.ceil(GenerateConfig().shard_prompts * load.samples_per_prompt / ScoreConfig().shard_samples)
    pack = math.ceil(load.packed_tokens / (PackConfig().max_tokens * FILL) / PackConfig().shard_bins)
    return {"generate": generate, "score": score, "filter": score, "pack": pack}


def size_text(size: float) -> str:
    """Write bytes with a unit.

    >>> size_text(2_500), size_text(3.41e12)
    ('2.5 kB', '3.41 TB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


def run_table(prompts: float, prompt_tokens: float, response_tokens: float, devices: int) -> str:
    """Return what one run takes, stage by stage, as Markdown."""
    load = Workload(prompts=prompts, prompt_tokens=prompt_tokens, response_tokens=response_tokens)
    found, one = simulated(load, devices), simulated(load, 1)
    count = files(load)
    rows = [
        [
            stage,
            number(sum(seconds[stage] for seconds in one.seconds) / 3600),
            number(sum(seconds[stage] for seconds in found.seconds) / 3600),
            size_text(sum(size[stage] for size in one.bytes)),
            number(count[stage]) if stage in count else "",
            size_text(MEMORY[stage] * load.samples) if stage in MEMORY else "",
        ]
        for stage in ROUND_STAGES
    ]
    ahead = simulated(load, devices, overlap=True)
    header = ["stage", "device-hours", f"hours on {devices}", "bytes", "files a round", "memory that grows"]
    return (
        f"{prompts:,.0f} prompts, {load.rounds} rounds of {load.epochs_per_round} epochs, {prompt_tokens:g} + "
        f"{response_tokens:g} tokens a sample; filter and pack on one core.\n\n"
        + "\n".join(_markdown(header, rows))
        + f"\n\nAll rounds: {found.wall / 3600:,.1f} hours, with `overlap` on devices of its own "
        f"{ahead.wall / 3600:,.1f}.\n"
    )


def scale_tables() -> str:
    """Return the generated part of docs/scale.md."""
    loads = [Workload(prompts=size) for size in SIZES]
    titles = [f"10{'⁵⁶⁷⁸'[index]}" for index in range(len(SIZES))]
    return "\n\n".join(
        [
            "### Bytes on disk",
            _table("table, all rounds", titles, _byte_rows(loads)),
            "### Time, at the paper's rates",
            _table("stage, all rounds", titles, _time_rows(loads)),
            "### Device time, at rates measured on one H200",
            _table("stage, all rounds", titles, _h200_rows(loads)),
            "### What grows beside them",
            _table("what", titles, _other_rows(loads)),
        ]
    )


def _byte_rows(loads: Sequence[Workload]) -> dict[str, list[str]]:
    runs = [simulated(load, 1) for load in loads]
    once = [run.bytes[0]["prompts"] for run in runs]
    rows = {"prompts (once)": once}
    for stage in ("generate", "score", "filter", "pack"):
        rows[stage] = [sum(size[stage] for size in run.bytes) for run in runs]
    rows["checkpoints and exports"] = [sum(size["train"] + size["export"] for size in run.bytes) for run in runs]
    rows["**all**"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    rows["while packing, beside it"] = [run.bytes[0]["pack"] for run in runs]
    return {name: [size_text(size) for size in sizes] for name, sizes in rows.items()}


def _time_rows(loads: Sequence[Workload]) -> dict[str, list[str]]:
    def hours(run: Simulated, stage: str) -> float:
        return sum(seconds[stage] for seconds in run.seconds) / 3600

    alone = [simulated(load, 1) for load in loads]
    rows = {f"{stage}, device-hours": [hours(run, stage) for run in alone] for stage in ("generate", "score", "train")}
    rows["export, evaluate and the rest, device-hours"] = [hours(run, "evaluate") for run in alone]
    rows["**all**, device-hours"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    rows["prompts (once), core-hours"] = [run.seconds[0]["prompts"] / 3600 for run in alone]
    rows |= {f"{stage}, core-hours": [hours(run, stage) for run in alone] for stage in ("filter", "pack")}
    for devices in (8, 64, 512):
        for overlap in (False, True):
            name = f"days on {devices} devices{', and as many that sample ahead' if overlap else ''}"
            rows[name] = [simulated(load, devices, overlap=overlap).wall / 86_400 for load in loads]
    return {name: [number(value) for value in values] for name, values in rows.items()}


def _h200_rows(loads: Sequence[Workload]) -> dict[str, list[str]]:
    hours = [h200_hours(load) for load in loads]
    rows = {f"{stage}, H200-hours": [number(each[stage]) for each in hours] for stage in hours[0]}
    return rows | {"**all three**, H200-hours": [number(sum(each.values())) for each in hours]}


def _other_rows(loads: Sequence[Workload]) -> dict[str, list[str]]:
    counts = [files(load) for load in loads]
    rows = {f"files of {stage}, a round": [number(count[stage]) for count in counts] for stage in counts[0]}
    rows["manifest of generate"] = [size_text(RECORD_BYTES * count["generate"]) for count in counts]
    for stage, each in MEMORY.items():
        rows[f"memory of {stage} that grows ({each} bytes each)"] = [size_text(each * load.samples) for load in loads]
    steps = [load.packed_tokens * load.epochs_per_round / (PackConfig().max_tokens * FILL) / PACKS for load in loads]
    rows[f"optimizer steps a round ({PACKS} packs each)"] = [number(count) for count in steps]
    return rows


def _table(first: str, titles: Sequence[str], rows: dict[str, list[str]]) -> str:
    return "\n".join(_markdown([first, *titles], [[name, *cells] for name, cells in rows.items()]))


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
