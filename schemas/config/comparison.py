"""The config of a comparison: methods that start from one student and differ in nothing but what they name."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from schemas.config.base import PLACEMENT, Section
from schemas.config.document import read_document
from schemas.config.load import apply_overrides, load_config, parse_config, parse_section, with_values
from schemas.config.models import StudentConfig
from schemas.config.rl import GRPOConfig, RLConfig, RLEvaluateConfig
from schemas.config.run import RunConfig
from schemas.config.settings import FOLDER_NAME
from schemas.errors import ConfigError
from schemas.object_store import is_url
from schemas.untrusted_text import readable

Settings = dict[str, Any]

BASE = "base"
"""Folder of the run that all methods start from."""


class MethodConfig(Section):
    """One method: a run with settings of its own."""

    title: str | None = Field(default=None, min_length=1)
    """Name for people; null: the method's key."""

    role: Literal["npd", "baseline", "ablation"]
    """`npd`: the method the others are held against; one has this role. `baseline`: something else. `ablation`: it,
    with a part left out or changed."""

    trainer: Literal["pipeline", "on_policy"] = "pipeline"
    """`pipeline`: the stages of a run. `on_policy`: TRL's `DistillationTrainer`, as many optimizer steps in one round
    (`train.on_policy`); unless `set` says so, with as many prompts a step as fill the batch tokens of the method whose
    role is `npd`."""

    set: Settings = Field(default={})
    """Settings of this method, each `key.sub: value`. With `train.learning_rate` it is not tuned."""

    rate_of: str | None = None
    """Take the tuned learning rate of this other method; null: tune its own."""

    seeds: int | None = Field(default=None, ge=1)
    """Use only so many of the seeds, the first; null: all."""


class ComparisonRLConfig(Section):
    """The same GRPO from the students of several methods: which of them RL makes most of."""

    methods: list[str] = Field(min_length=1)
    """The methods whose exported students continue, each with the seeds of its runs."""

    seeds: int | None = Field(default=None, ge=1)
    """Use only so many of a method's seeds, the first; null: all."""

    grpo: GRPOConfig = GRPOConfig()
    """How they learn; see `npd rl`."""

    evaluate: RLEvaluateConfig | None = None
    """How they then answer the held-out prompts; null: as the methods' students do (`evaluate` of the run), so that
    accuracy before and after compare. Where it is set, its `max_new_tokens` null: as `grpo.max_new_tokens`."""


class ComparisonConfig(Section):
    """Methods against each other: one warmed-up student, the same prompts, steps, tokens and search for a rate."""

    name: str = Field(pattern=FOLDER_NAME, max_length=100)
    """Folder of the comparison under `root`. Running the same name again resumes it."""

    root: str = Field(default="runs", min_length=1)
    """Where comparisons live, a folder."""

    run: str = Field(min_length=1)
    """Config of the run that all methods start from, relative to this file: its warm-up, its prompts, its settings."""

    set: Settings = Field(default={})
    """Settings for all methods and the run they start from, each `key.sub: value`; paths start at this file's folder,
    in a method's own settings too."""

    seeds: list[int] = Field(default=[0, 1, 2, 3, 4], min_length=1)
    """Seeds of the methods' runs. All share the held-out prompts (`prompts.split_seed`) and the warmed-up student."""

    learning_rates: list[float] = Field(default=[1e-5], min_length=1)
    """Learning rates tried for every method, with the first seed; `train.min_learning_rate` keeps its ratio."""

    validation: float = Field(default=0.2, gt=0, lt=1)
    """Share of the held-out prompts that learning rates are chosen on; accuracy is of the others."""

    workers: int = Field(default=1, ge=1, json_schema_extra=PLACEMENT)
    """Runs at a time, each in a process of its own with its share of the CPU's cores. More than one makes wall-clock
    times those of runs beside each other."""

    methods: dict[str, MethodConfig] = Field(min_length=1)
    """The methods by name."""

    rl: ComparisonRLConfig | None = None
    """Continue students with GRPO after the methods' runs; null: do not."""

    @field_validator("root")
    @classmethod
    def _is_a_folder(cls, root: str) -> str:
        if is_url(root):
            raise ValueError("a comparison lies in a folder of this machine, not in an object store")
        return root

    @field_validator("seeds", "learning_rates")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values) or min(values) < 0:
            raise ValueError("each value once, and none below 0")
        return values

    @model_validator(mode="after")
    def _methods_fit(self) -> "ComparisonConfig":
        npd = [name for name, method in self.methods.items() if method.role == "npd"]
        if len(npd) != 1:
            raise ValueError(f"one of `methods` has `role: npd`, found {', '.join(npd) or 'none'}")
        folders: dict[str, str] = {}
        for name, method in self.methods.items():
            other_case = folders.setdefault(name.casefold(), name)
            if other_case != name:
                raise ValueError(
                    f"`methods.{name}`: on some disks (macOS, Windows) its folder would be that of `{other_case}`: let "
                    "names differ in more than letters' case"
                )
            if name.casefold() == BASE or not re.fullmatch(FOLDER_NAME, name):
                raise ValueError(f"`methods.{name}`: a method's name is a folder's, and not `{BASE}`")
            other = method.rate_of
            if other is not None and (other not in self.methods or self.methods[other].rate_of is not None):
                raise ValueError(f"`methods.{name}.rate_of`: `{other}` is no method with a learning rate of its own")
        if self.rl is not None and (unknown := sorted(set(self.rl.methods) - self.methods.keys())):
            raise ValueError(f"`rl.methods`: {', '.join(unknown)}: the methods are {', '.join(self.methods)}")
        return self

    @property
    def folder(self) -> str:
        """Where all runs of the comparison lie."""
        return f"{self.root.rstrip('/')}/{self.name}"

    @property
    def npd(self) -> str:
        """The method that others are held against."""
        return next(name for name, method in self.methods.items() if method.role == "npd")

    def seeds_of(self, method: str) -> list[int]:
        """Return the seeds of a method's runs."""
        return self.seeds[: self.methods[method].seeds]

    def rl_seeds_of(self, method: str) -> list[int]:
        """Return the seeds of a method's runs whose students continue with RL."""
        if self.rl is None or method not in self.rl.methods:
            return []
        return self.seeds_of(method)[: self.rl.seeds]

    def rates_of(self, method: str) -> list[float]:
        """Return the learning rates tried for a method that takes no other's.

        Raises:
            ConfigError: the method's own is no number.
        """
        own = self.methods[method].set.get("train.learning_rate")
        if own is None:
            return self.learning_rates
        try:
            return [float(own)]
        except (TypeError, ValueError):
            shown = readable(repr(own), 80)
            raise ConfigError(f"methods.{method}.set: train.learning_rate: {shown} is no number") from None

    def measures_steps(self, method: str) -> bool:
        """Say whether a method's prompts a step follow from what the steps of NPD hold."""
        own = self.methods[method]
        return own.trainer == "on_policy" and "train.on_policy.prompts_per_step" not in own.set

    def methods_for(self, only: Sequence[str] | None) -> list[str]:
        """Return the methods to run: those named (None: all), those whose rates they take, and NPD if it is a measure.

        Raises:
            ConfigError: one named is no method.
        """
        if unknown := sorted(set(only or []) - self.methods.keys()):
            raise ConfigError(f"--only {', '.join(unknown)}: the methods are {', '.join(self.methods)}")
        wanted = set(only or self.methods)
        if any(self.measures_steps(name) for name in wanted):
            wanted.add(self.npd)
        wanted |= {other for name in wanted if (other := self.methods[name].rate_of) is not None}
        return [name for name in self.methods if name in wanted]


def load_comparison(path: str | Path, overrides: list[str] | None = None) -> tuple[ComparisonConfig, RunConfig]:
    """Read a comparison, and the config of the run that all its methods start from.

    Args:
        path: The comparison's YAML file.
        overrides: Changes to it, each `key.sub=value`.

    Returns:
        The comparison, and the run's config: `set` applied, named `base` below the comparison's folder, seeded with
        the first seed, its split fixed.

    Raises:
        ConfigError: a file is missing or no YAML, or holds an unknown or wrong value, of the comparison, the run or
            any method; names the key.
    """
    path = Path(path)
    comparison = parse_section(apply_overrides(read_document(path), overrides or []), ComparisonConfig, str(path))
    run = load_config(path.parent / comparison.run)
    changed = with_values(run.model_dump(mode="json"), comparison.set, f"{path}: set")
    changed |= {"name": BASE, "root": comparison.folder, "seed": comparison.seeds[0]}
    if changed["prompts"].get("split_seed") is None:
        changed["prompts"]["split_seed"] = run.seed
    base = parse_config(changed, origin=f"{path}: run with `set`", folder=path.parent)
    if not base.evaluate.generate:
        raise ConfigError(f"{path}: a comparison is of what models answer: it needs `evaluate.generate: true`")
    for name in comparison.methods:
        rate = comparison.rates_of(name)[0]
        method_config(comparison, base, name, folder=path.parent, rate=rate, seed=0, student="student")
    return comparison, base


def method_config(
    comparison: ComparisonConfig,
    base: RunConfig,
    method: str,
    *,
    folder: Path,
    rate: float,
    seed: int,
    student: str,
    prompts_per_step: int | None = None,
) -> RunConfig:
    """Return the config of one run of a method.

    Args:
        comparison: The comparison.
        base: The run all methods start from.
        method: Name of the method.
        folder: The comparison file's, from which relative paths in the method's settings start.
        rate: Peak learning rate.
        seed: The run's seed.
        student: Folder of the warmed-up student.
        prompts_per_step: Of on-policy training, unless the method sets it.

    Raises:
        ConfigError: a setting of the method is unknown or wrong; names the method and the key.
    """
    own = comparison.methods[method]
    values = base.model_dump(mode="json")
    values |= {"name": f"seed-{seed}", "root": f"{comparison.folder}/{method}/lr={rate:g}", "seed": seed}
    learner = StudentConfig(
        model=student,
        dtype=base.student.dtype,
        trust_remote_code=base.student.trust_remote_code,
        attn_implementation=base.student.attn_implementation,
    )
    values |= {"student": learner.model_dump(mode="json"), "warmup": None}
    floor = rate * base.train.min_learning_rate / base.train.learning_rate
    values["train"] |= {"learning_rate": rate, "min_learning_rate": floor}
    origin = f"methods.{method}"
    if own.trainer == "on_policy":
        if base.total_steps is None:
            raise ConfigError(f"{origin}: `trainer: on_policy` needs `train.steps_per_round` in the run or in `set`")
        values |= {"rounds": 1, "refresh_every": 1, "overlap": False}
        values["train"] |= {"steps_per_round": base.total_steps, "on_policy": {}}
        if prompts_per_step is not None:
            values["train"]["on_policy"] = {"prompts_per_step": prompts_per_step}
    return parse_config(with_values(values, own.set, f"{origin}.set"), origin=origin, folder=folder)


def continuation_config(comparison: ComparisonConfig, base: RunConfig, method: str, *, seed: int, run: str) -> RLConfig:
    """Return the config of the RL run that continues one run of a method.

    Args:
        comparison: The comparison, with `rl`.
        base: The run all methods start from.
        method: Name of the method.
        seed: The run's seed, and that of RL.
        run: Folder of the method's run.
    """
    assert comparison.rl is not None, "only called where the comparison has it"
    return RLConfig(
        name=f"seed-{seed}",
        root=f"{comparison.folder}/{method}/rl",
        seed=seed,
        run=run,
        trust_remote_code=base.student.trust_remote_code,
        device=base.devices.trainer,
        grpo=comparison.rl.grpo,
        export=base.export,
        evaluate=comparison.rl.evaluate or _evaluated_alike(base),
    )


def _evaluated_alike(base: RunConfig) -> RLEvaluateConfig:
    """Return how a student after RL answers as the students before it do."""
    own = base.evaluate
    return RLEvaluateConfig(
        samples_per_prompt=own.samples_per_prompt,
        temperature=own.temperature,
        max_new_tokens=own.max_new_tokens or base.generate.max_new_tokens,
        batch_size=base.generate.batch_size,
    )
