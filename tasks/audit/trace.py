"""One sample's whole life: its prompt, who sampled it, its scores, what became of it, and what learned from it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.config import RunConfig
from schemas.errors import ConfigError
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import IGNORE_LABEL, PROMPTS, SCORES, TableSchema
from tasks.audit.epochs import epochs_of, pack_costs, pack_key, student_width
from tasks.audit.rollouts import recorded_version
from tasks.audit.tables import stage_schema
from tasks.graph import MODELS, REFERENCE, loop, sampled_round, sampling_policy
from tasks.graph import PROMPTS as PROMPTS_STAGE
from tasks.language_model.ragged import Ragged
from tasks.language_model.token_texts import TokenTexts

Section = dict[str, Any]
"""Names and JSON values, in the order to show them."""

Life = dict[str, Section]
"""Sections by title."""

_CLOSE = 3


@dataclass(frozen=True)
class Found:
    """A sample's row: of which table, in which file, at which row of it, and all columns."""

    key: StageKey
    file: str
    row: int
    values: dict[str, Any]


def trace_sample(store: RunStore, sample_id: str) -> Life:
    """Return everything the run knows of a sample.

    Raises:
        ConfigError: the run has no such sample; names ids that begin alike.
        ArtifactError: a table it goes through is damaged.
    """
    config = store.config
    found = find_sample(store, config, sample_id)
    life = {"sample": _sample(found), "prompt": _prompt(store, found), "sampler": _sampler(store, config, found)}
    life["tokens"] = _tokens(store, found)
    if found.key == REFERENCE:
        return life | _uses_of_reference(store, config, found, life["prompt"])
    rounds = [index for index in range(config.rounds) if sampled_round(config, index) == found.key.round]
    life["scores"] = _later_row(store, config, StageKey("score", found.key.round), sample_id, list(SCORES))
    life["ledger"] = _later_row(store, config, StageKey("filter", found.key.round), sample_id, _LEDGER)
    why_not = f"not kept: {life['ledger']['reason']}" if life["ledger"].get("keep") is False else None
    return life | _packed(store, config, StageKey("pack", found.key.round), sample_id, rounds, why_not)


def trace_token(store: RunStore, round_index: int, pack: int, token: int) -> Life:
    """Return where a token of a pack comes from, what is to be learned there, and its sample's life.

    Args:
        store: The run.
        round_index: The round that trains on the pack; WARMUP for the warm-up.
        pack: The pack's id.
        token: Place in the pack, from 0.

    Raises:
        ConfigError: there is no such round, pack or token; says which there are.
        ArtifactError: a table it goes through is damaged.
    """
    config = store.config
    rounds = [key.round for key in loop(config) if key.stage == "train"]
    if round_index not in rounds:
        raise ConfigError(f"--round {round_index}: this run trains in {', '.join(map(str, rounds))}")
    key = pack_key(config, round_index)
    row = _pack_row(store, config, key, pack)
    input_ids = Ragged.from_arrow(row.column("input_ids")).values
    if not 0 <= token < len(input_ids):
        raise ConfigError(f"--token {token}: pack {pack} of `{key.label}` has tokens 0 to {len(input_ids) - 1}")
    lengths = Ragged.from_arrow(row.column("seq_lengths")).values.astype(np.int64)
    sequence = int(np.searchsorted(np.cumsum(lengths), token, side="right"))
    sample_id = row.column("sample_ids")[0][sequence].as_py()
    life = trace_sample(store, sample_id)
    place = token - int(lengths[:sequence].sum())
    prompt_tokens = life["tokens"]["prompt_tokens"]
    response = place >= prompt_tokens
    number, of = (place - prompt_tokens, life["tokens"]["response_tokens"]) if response else (place, prompt_tokens)
    texts = TokenTexts(store)
    label = Ragged.from_arrow(row.column("labels")).values[token].item()
    section: Section = {
        "pack": f"{pack} of `{key.label}`, token {token} of {len(input_ids)}",
        "sequence": f"{sequence} of {len(lengths)} in the pack: sample {sample_id}",
        "place": f"{'response' if response else 'prompt'} token {number} of {of}",
        "id": int(input_ids[token]),
        "text": texts.of(int(input_ids[token])),
        "label": label,
        "has_loss": label != IGNORE_LABEL,
    }
    if "teacher_topk_ids" in row.column_names and response:
        section["sampled_logprob"] = row.column("sampled_logprobs")[0][token].as_py()
        ids = row.column("teacher_topk_ids")[0][token].as_py()
        logprobs = [float(value) for value in row.column("teacher_topk_logprobs")[0][token].as_py()]
        section["teacher_top_k"] = [
            {"id": name, "text": texts.of(name), "probability": float(np.exp(value)), "logprob": value}
            for name, value in zip(ids, logprobs, strict=True)
        ]
    return {"token": section} | life


def find_sample(store: RunStore, config: RunConfig, sample_id: str) -> Found:
    """Return a sample's row of the generate or reference table it is in.

    Raises:
        ConfigError: no finished table has it; names ids that begin alike.
    """
    tables = [k for k in loop(config) if k.stage in ("generate", "reference") and store.manifest(k) is not None]
    for key in tables:
        found = _find(store, config, key, sample_id)
        if found is not None:
            return found
    close = _close_ids(store, config, tables, sample_id)
    hint = f"; close to it: {', '.join(close)}" if close else "; no rollout table is finished yet" if not tables else ""
    raise ConfigError(f"--sample {sample_id}: this run has no such sample{hint}")


def _find(store: RunStore, config: RunConfig, key: StageKey, sample_id: str) -> Found | None:
    schema = _schema(config, key)
    for path in store.table_files(key):
        row = pc.index(store.read_part(path, schema, ["sample_id"]).column("sample_id"), sample_id).as_py()
        if row >= 0:
            values = store.read_part(path, schema).slice(row, 1).to_pylist()[0]
            return Found(key, store.relative(path), row, values)
    return None


def _schema(config: RunConfig, key: StageKey) -> TableSchema:
    schema = stage_schema(config, key)
    assert schema is not None, "only stages with tables are asked for rows"
    return schema


def _close_ids(store: RunStore, config: RunConfig, tables: list[StageKey], sample_id: str) -> list[str]:
    """Return ids that share the longest beginning with ``sample_id``."""
    best: list[str] = []
    longest = 0
    for key in tables:
        for path in store.table_files(key):
            ids = store.read_part(path, _schema(config, key), ["sample_id"]).column("sample_id")
            for length in range(len(sample_id), max(longest, 1) - 1, -1):
                alike = ids.filter(pc.starts_with(ids, sample_id[:length]))
                if len(alike):
                    if length > longest:
                        best, longest = [], length
                    best += alike.slice(0, _CLOSE).to_pylist()
                    break
    return best[:_CLOSE]


def _sample(found: Found) -> Section:
    values = found.values
    return {
        "sample_id": values["sample_id"],
        "stage": found.key.label,
        "file": found.file,
        "row": found.row,
        "round": values["round"],
        "sample_index": values["sample_index"],
        "seed": values["seed"],
    }


def _prompt(store: RunStore, found: Found) -> Section:
    for path in store.table_files(PROMPTS_STAGE):
        table = store.read_part(path, PROMPTS)
        row = pc.index(table.column("prompt_id"), found.values["prompt_id"]).as_py()
        if row >= 0:
            return {str(name): value for name, value in table.slice(row, 1).to_pylist()[0].items()}
    return {"prompt_id": found.values["prompt_id"], "missing": "table prompts does not have it: see `npd verify`"}


def _sampler(store: RunStore, config: RunConfig, found: Found) -> Section:
    values = found.values
    section = {"policy_version": values["policy_version"], "policy_step": values["policy_step"]}
    if found.key.round is None or config.generate.policy != "student":
        return {"model": "the teacher, or the prompt's own answer"} | section
    sampler = sampling_policy(config, found.key.round)
    manifest = store.manifest(sampler)
    present = manifest is not None and recorded_version(manifest, sampler) == values["policy_version"]
    folder = f"{sampler.folder}/{'student' if sampler == MODELS else 'model'}"
    return section | {"model": folder, "is_still_there": present}


def _tokens(store: RunStore, found: Found) -> Section:
    values, texts = found.values, TokenTexts(store)
    return {
        "prompt_tokens": len(values["prompt_ids"]),
        "response_tokens": len(values["response_ids"]),
        "finish_reason": values["finish_reason"],
        "response": values["response"],
        "response_ids": values["response_ids"],
        "response_token_texts": [texts.of(token) for token in values["response_ids"]],
        "sampled_logprobs": values["sampled_logprobs"],
    }


_LEDGER = ["delta_ifd", "min_delta_ifd", "max_delta_ifd", "zone", "keep", "reason", "policy_lag"]


def _later_row(store: RunStore, config: RunConfig, key: StageKey, sample_id: str, columns: list[str]) -> Section:
    if store.manifest(key) is None:
        return {"missing": f"`{key.label}` has not finished"}
    schema = _schema(config, key)
    for path in store.table_files(key):
        table = store.read_part(path, schema, ["sample_id", *columns])
        row = pc.index(table.column("sample_id"), sample_id).as_py()
        if row >= 0:
            values = table.slice(row, 1).to_pylist()[0]
            return {"file": store.relative(path), "row": row} | {name: values[name] for name in columns}
    return {"missing": f"`{key.label}` has no such sample: see `npd verify`"}


def _uses_of_reference(store: RunStore, config: RunConfig, found: Found, prompt: Section) -> Life:
    if prompt.get("split") == "held_out":
        return {"use": {"evaluation": "the student is compared with the teacher on this response; never trained on"}}
    if config.warmup is None:
        return {"use": {"none": "the run has no warm-up"}}
    sample_id = found.values["sample_id"]
    why_not = "too long for a pack, or empty"
    return _packed(store, config, StageKey("pack", WARMUP), sample_id, [WARMUP], why_not)


def _packed(
    store: RunStore, config: RunConfig, key: StageKey, sample_id: str, rounds: list[int], why_not: str | None
) -> Life:
    if store.manifest(key) is None:
        return {"pack": {"missing": why_not or f"`{key.label}` has not finished"}}
    for path in store.table_files(key):
        table = store.read_part(path, _schema(config, key), ["pack_id", "sample_ids", "seq_lengths"])
        names = Ragged.from_arrow(table.column("seq_lengths"))
        flat = pc.index(pa.chunked_array([c.flatten() for c in table.column("sample_ids").chunks]), sample_id).as_py()
        if flat >= 0:
            row = int(np.searchsorted(names.offsets, flat, side="right")) - 1
            start, pack = int(names.offsets[row]), table.column("pack_id")[row].as_py()
            begins = int(names.values[start:flat].sum())
            section = {
                "file": store.relative(path),
                "pack": pack,
                "sequence": flat - start,
                "of_sequences": int(names.lengths[row]),
                "first_token": begins,
                "last_token": begins + int(names.values[flat]) - 1,
            }
            return {"pack": section} | {
                f"training, {StageKey('train', index).label}": _training(store, config, index, pack) for index in rounds
            }
    return {"pack": {"missing": why_not or f"`{key.label}` does not have it: see `npd verify`"}}


def _training(store: RunStore, config: RunConfig, round_index: int, pack: int) -> Section:
    """Return the optimizer steps that learned from a pack, drawn again from the seed, and what came out."""
    train, export = StageKey("train", round_index), StageKey("export", round_index)
    manifest = store.manifest(train)
    if manifest is None:
        return {"missing": f"`{train.label}` has not finished"}
    counters = manifest.counters
    before = (
        0.0 if round_index <= 0 else float(store.finished(StageKey("train", round_index - 1)).counters["epochs_done"])
    )
    epochs = epochs_of(config, round_index, int(counters["packs"]), int(counters["start_step"]), before)
    section: Section = {"packs": epochs.packs, "packs_per_step": epochs.settings.packs_per_step}
    costs = np.ones(epochs.packs)
    width = None
    if epochs.settings.packs_per_step > 1:
        width = student_width(store)
        key = pack_key(config, round_index)
        lengths = [store.read_part(p, _schema(config, key), ["seq_lengths"]) for p in store.table_files(key)]
        if width is not None:
            costs = pack_costs(Ragged.concat([Ragged.from_arrow(t.column("seq_lengths")) for t in lengths]), width)
    if epochs.settings.packs_per_step == 1 or width is not None:
        steps = epochs.steps_of(pack, costs, int(counters["policy_step"]))
        section["optimizer_steps"] = [step for _, step in steps]
        section["epochs"] = [round(epochs.before + epoch, 6) for epoch, _ in steps]
    exported = store.manifest(export)
    section["export"] = None if exported is None else f"{export.folder}/model"
    section["policy_version"] = None if exported is None else recorded_version(exported, export)
    return section


def _pack_row(store: RunStore, config: RunConfig, key: StageKey, pack: int) -> pa.Table:
    schema, last = _schema(config, key), -1
    for path in store.table_files(key):
        table = store.read_part(path, schema, ["pack_id"])
        row = pc.index(table.column("pack_id"), pack).as_py()
        if row >= 0:
            return store.read_part(path, schema).slice(row, 1)
        last = max(last, pc.max(table.column("pack_id")).as_py())
    raise ConfigError(f"--pack {pack}: `{key.label}` has packs 0 to {last}")
