"""Evaluating models: the one a round ends with, or the two that a run starts from."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import ArtifactError, StageError
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import (
    EVALUATE_METRICS,
    EVALUATE_RESPONSES,
    GENERATE,
    METRICS_FILE,
    PROMPTS,
    RESPONSES_FILE,
)
from tasks.collector import free_memory
from tasks.evaluate.agreement import KeptStates, compare_with_teacher, keep_states
from tasks.evaluate.benchmarks import benchmark_means
from tasks.evaluate.means import Mean, metrics_table, response_means
from tasks.evaluate.resolution import TARGET, detectable_difference, noisiest_accuracy, prompts_needed
from tasks.evaluate.responses import Sampling, held_out_prompts, own_responses
from tasks.graph import BASELINE, evaluated_in_baseline
from tasks.language_model.prefill import TokensDone
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ModelRef, result_model, start_model, teacher_model
from tasks.language_model.tensor_parallel import prefill_model
from tasks.packages import require_lm_eval
from tasks.stage import StageJob

_LOGITS_CHUNK = 512


@dataclass(frozen=True)
class _Subject:
    """A model to evaluate; the ``teacher`` is not compared with itself."""

    name: str
    model: ModelRef

    @property
    def is_teacher(self) -> bool:
        return self.name == "teacher"


def evaluate(job: StageJob) -> None:
    """See ``tasks.evaluate.run``."""
    store, config = job.store, job.config
    if evaluated_in_baseline(config, job.key):
        _take_from_baseline(store, job.key)
        return
    round_index = WARMUP if job.key == BASELINE else job.round
    teacher = teacher_model(store, config)
    if job.key == BASELINE:
        subjects = [_Subject("teacher", teacher), _Subject("start", _on_sampler(job))]
    else:
        subjects = [_Subject("student", result_model(store, config, round_index))]
    if config.evaluate.lm_eval is not None:
        require_lm_eval()
    metrics: dict[str, dict[str, Mean]] = {subject.name: {} for subject in subjects}
    if config.evaluate.generate:
        responses = _responses(job, subjects, teacher, round_index)
        for subject in subjects:
            metrics[subject.name] |= response_means(responses.filter(pc.equal(responses["model"], subject.name)))
        _tell_resolution(job, metrics)
    for subject in subjects:
        if not subject.is_teacher:
            metrics[subject.name] = _agreement(job, teacher, subject.model) | metrics[subject.name]
        if config.evaluate.lm_eval is not None:
            metrics[subject.name] |= benchmark_means(job, config.evaluate.lm_eval, subject.model)
    table = metrics_table(metrics, round_index)
    store.write_table(store.path(job.key, METRICS_FILE), table, EVALUATE_METRICS)


def _responses(job: StageJob, subjects: Sequence[_Subject], teacher: ModelRef, round_index: int) -> pa.Table:
    """Return what all subjects answer, unless an interrupted try has written it already."""
    path = job.store.path(job.key, RESPONSES_FILE)
    if not path.is_file():
        held_out, tables = held_out_prompts(job, teacher), []
        for each in subjects:
            sampling = Sampling.of(job.config, teacher=each.is_teacher)
            tables.append(own_responses(held_out, each.model, each.name, round_index, sampling, job.progress))
        job.store.write_table(path, pa.concat_tables(tables), EVALUATE_RESPONSES)
    return job.store.read_part(path, EVALUATE_RESPONSES)


def _take_from_baseline(store: RunStore, key: StageKey) -> None:
    """Write what baseline found of the student that the run starts from as what evaluation ``key`` finds of it."""
    schemas = {METRICS_FILE: EVALUATE_METRICS, RESPONSES_FILE: EVALUATE_RESPONSES}
    for path in store.table_files(BASELINE):
        found = store.read_part(path, schemas[path.name])
        own = found.filter(pc.equal(found["model"], "start"))
        column = own.schema.get_field_index("model")
        own = own.set_column(column, own.schema.field(column), pa.repeat("student", len(own)))
        store.write_table(store.path(key, path.name), own, schemas[path.name])


def _on_sampler(job: StageJob) -> ModelRef:
    return replace(start_model(job.store, job.config, WARMUP), device=job.config.devices.sampler)


def _agreement(job: StageJob, teacher_ref: ModelRef, student_ref: ModelRef) -> dict[str, Mean]:
    """Compare student and teacher token by token on the teacher's responses to the held-out prompts.

    The student first, which is freed before the teacher is loaded: its hidden states wait on disk.
    """
    begun = time.perf_counter()
    prompts, responses = held_out_references(job)
    batch_tokens = job.config.evaluate.batch_tokens
    total, done = 2 * (len(prompts.values) + len(responses.values)), 0

    def on_tokens(count: int) -> None:
        nonlocal done
        done += count
        job.progress(done, total, "tokens")

    with job.store.scratch_folder(job.key) as scratch:
        student = _keep(student_ref, prompts, responses, scratch, batch_tokens, on_tokens)
        free_memory()
        metrics = _compare(teacher_ref, student, prompts, responses, batch_tokens, on_tokens)
    free_memory()
    for name, mean in metrics.items():
        if not np.isfinite(mean.value):
            raise StageError(f"{job.key.label}: {name} is not finite; the student's weights are damaged")
    # What sampling and benchmarks took of the stage's time is not these tokens'.
    rate = round(done / (time.perf_counter() - begun), 1)
    job.counters |= {"tokens": done, "tokens_per_second": rate, "held_out_responses": len(responses)}
    return metrics


def _keep(
    ref: ModelRef, prompts: Ragged, responses: Ragged, folder: Path, batch_tokens: int, on_tokens: TokensDone
) -> KeptStates:
    with prefill_model(ref) as student:
        return keep_states(student, prompts, responses, folder, batch_tokens, on_tokens)


def _compare(
    ref: ModelRef, student: KeptStates, prompts: Ragged, responses: Ragged, batch_tokens: int, on_tokens: TokensDone
) -> dict[str, Mean]:
    with prefill_model(ref) as teacher:
        return compare_with_teacher(
            teacher,
            student,
            prompts,
            responses,
            batch_tokens=batch_tokens,
            logits_chunk=_LOGITS_CHUNK,
            on_tokens=on_tokens,
        )


def _tell_resolution(job: StageJob, metrics: dict[str, dict[str, Mean]]) -> None:
    """Count which difference in accuracy the held-out prompts can tell; warn once a run if it is above 2 points."""
    checked = [found["accuracy"] for found in metrics.values() if "accuracy" in found]
    if not checked:
        return
    prompts = checked[0].n // job.config.evaluate.samples_per_prompt
    accuracy = noisiest_accuracy(mean.value for mean in checked)
    difference, needed = detectable_difference(accuracy, prompts), prompts_needed(accuracy, prompts)
    job.counters |= {
        "verified_prompts": prompts,
        "detectable_difference": round(difference, 4),
        "prompts_for_two_points": needed,
    }
    if job.key == BASELINE and difference > TARGET:
        job.warn(
            f"{prompts} held-out prompts can be verified: differences in accuracy below {100 * difference:.1f} points "
            f"cannot be told from noise (95%, two-sided); telling {100 * TARGET:.0f} points takes about {needed:,} "
            "prompts (`prompts.held_out`)"
        )


def held_out_references(job: StageJob) -> tuple[Ragged, Ragged]:
    """Return prompts and teacher responses of the held-out split.

    Raises:
        ArtifactError: the reference table has none.
    """
    store = job.store
    of_split = (
        shard.filter(pc.equal(shard["split"], "held_out"))["prompt_id"]
        for shard in store.iterate_table(StageKey("prompts"), PROMPTS, ["prompt_id", "split"])
    )
    ids = pa.chunked_array([chunk for column in of_split for chunk in column.chunks], pa.string())
    columns = ["prompt_id", "prompt_ids", "response_ids"]
    kept = []
    for shard in store.iterate_table(StageKey("reference"), GENERATE, columns):
        found = shard.filter(pc.is_in(shard["prompt_id"], value_set=ids))
        if not found.num_rows:
            # They come first; behind them lie a warm-up's, as many as there are train prompts.
            break
        kept.append(found)
    if not kept:
        raise ArtifactError("reference: no held-out responses to evaluate on; re-run stage `reference`")
    table = pa.concat_tables(kept).combine_chunks()
    return Ragged.from_arrow(table["prompt_ids"]), Ragged.from_arrow(table["response_ids"])
