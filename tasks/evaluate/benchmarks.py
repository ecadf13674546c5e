"""Benchmarks of `lm-eval`, by the names it gives them."""

import math
from functools import cache
from typing import Any

from schemas.config import LmEvalConfig
from schemas.errors import ConfigError
from tasks.evaluate.means import Mean
from tasks.language_model.loading import load_ref, load_tokenizer
from tasks.language_model.sources import ModelRef
from tasks.stage import StageJob

PREFIX = "lm_eval"
"""Begins the names of the metrics: `lm_eval/<task>/<metric>`."""


def benchmark_means(job: StageJob, settings: LmEvalConfig, model: ModelRef) -> dict[str, Mean]:
    """Run the tasks on a model and return their metrics, as `lm-eval` computes them.

    Args:
        job: The stage, for the run's seed.
        settings: Which tasks, and how they are asked.
        model: Loaded here.

    Returns:
        See ``metrics_of_results``; the job is warned of metrics that are left out.

    Raises:
        ConfigError: a task is unknown.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tasks = _task_manager(settings.include_path)
    if unknown := [name for name in settings.tasks if name not in tasks.all_tasks]:
        raise ConfigError(f"evaluate.lm_eval.tasks: `lm-eval` has no task `{unknown[0]}`")
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=load_ref(model), tokenizer=tokenizer, batch_size=settings.batch_size),
        tasks=settings.tasks,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        task_manager=tasks,
        apply_chat_template=settings.apply_chat_template,
        log_samples=False,
        random_seed=job.config.seed,
        numpy_random_seed=job.config.seed,
        torch_random_seed=job.config.seed,
        fewshot_random_seed=job.config.seed,
    )
    means = metrics_of_results(found)
    if undefined := sorted(name for name, mean in means.items() if not math.isfinite(mean.value)):
        job.warn(f"`lm-eval` gave no finite value for {', '.join(undefined)}: left out of the metrics")
    return {name: mean for name, mean in means.items() if name not in undefined}


def metrics_of_results(found: dict[str, Any]) -> dict[str, Mean]:
    """Return the metrics in what `lm_eval.simple_evaluate` returned.

    ``n`` counts questions, and is 0 for a group, whose tasks have their own; the standard error is 0 where `lm-eval`
    gives none. A filter other than `none` is named after a comma.

    >>> scores = {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": 0.1}
    >>> metrics_of_results({"results": {"sums": scores}, "n-samples": {"sums": {"original": 90, "effective": 25}}})
    {'lm_eval/sums/acc': Mean(value=0.5, stderr=0.1, n=25)}
    """
    counts = found["n-samples"]
    return {
        f"{PREFIX}/{task}/{_metric_name(name)}": Mean(float(value), _stderr(values, name), _questions(counts, task))
        for task, values in found["results"].items()
        for name, value in values.items()
        if "," in name and "_stderr," not in name and isinstance(value, int | float)
    }


@cache
def _task_manager(include_path: str | None) -> Any:
    """Return what knows the tasks: it reads thousands of files, once for all models of a stage."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _metric_name(name: str) -> str:
    """Return a metric's name without the filter that filters nothing.

    >>> _metric_name("acc,none"), _metric_name("exact_match,strict-match")
    ('acc', 'exact_match,strict-match')
    """
    return name.removesuffix(",none")


def _stderr(values: dict[str, Any], name: str) -> float:
    metric, _, kind = name.partition(",")
    stderr = values.get(f"{metric}_stderr,{kind}")
    return float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else 0.0


def _questions(counts: dict[str, Any], task: str) -> int:
    return int(counts[task]["effective"]) if task in counts else 0
