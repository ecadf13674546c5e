from dataclasses import replace
from pathlib import Path

import yaml

from schemas.stage_key import WARMUP, StageKey
from schemas.tables import TRAIN_METRICS
from tasks.export.card import Lineage, student_card
from tasks.language_model.sources import policy_version, result_model
from tasks.stage import execute
from tests.run_fixtures import make_config
from tests.schemas.test_untrusted_text import HOSTILE, rendered
from tests.tasks.training_runs import random_packs, training_run

LINEAGE = Lineage(
    run_id="0123",
    config_hash="4567",
    version="89ab",
    teacher_version="cdef",
    sampled_by="fedc",
    prompts="ba98",
    packs="7654",
    training="3210",
    metrics={"step": 12, "epoch": 2.0, "loss": 0.5, "ce": 1.25, "kd": 0.75, "policy_kl": None},
)


def front_matter(card: str) -> object:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_no_name_leaves_its_cell_or_reaches_the_front_matter(tmp_path: Path) -> None:
    plain = student_card(make_config(tmp_path), StageKey("export", 0), LINEAGE)
    for text in HOSTILE:
        sections = {"teacher": {"model": text, "revision": text}, "student": {"model": text, "revision": text}}
        card = student_card(make_config(tmp_path, **sections), StageKey("export", 0), LINEAGE)
        assert front_matter(card) == front_matter(plain)
        assert len(card.splitlines()) == len(plain.splitlines())
        tags = [tag for tag in rendered(card.split("---\n", 2)[2].split("```")[0]).tags if tag != "code"]
        assert tags == [tag for tag in rendered(plain.split("---\n", 2)[2].split("```")[0]).tags if tag != "code"]


def test_the_warm_up_has_no_sampler(tmp_path: Path) -> None:
    card = student_card(make_config(tmp_path), StageKey("export", WARMUP), replace(LINEAGE, sampled_by=None))
    assert "| sampled by policy version | nobody: warm-up |" in card
    assert "sampling policy" not in card


def test_where_models_lie_on_this_machine_is_not_published(tmp_path: Path) -> None:
    teacher, student = {"model": "/home/me/models/big"}, {"model": "/home/me/models/small"}
    card = student_card(make_config(tmp_path, teacher=teacher, student=student), StageKey("export", 0), LINEAGE)
    assert "/home/me" not in card
    assert "| teacher | `big` |" in card
    assert "| student | `small` |" in card


def test_the_card_states_the_lineage_of_the_weights(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = training_run(tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=random_packs())
    for stage in ("train", "export"):
        execute(store, config, StageKey(stage, 0))
    folder = store.path(StageKey("export", 0), "model")
    card, record = (folder / "README.md").read_text(encoding="utf-8"), store.record()
    assert record is not None
    last = store.read_table(StageKey("train", 0), TRAIN_METRICS).to_pylist()[-1]
    stated = [
        record.run_id,
        record.config_hash,
        result_model(store, config, 0).version,
        policy_version(store, config, 0),
        store.finished(StageKey("prompts")).outputs_fingerprint,
        store.finished(StageKey("pack", 0)).outputs_fingerprint,
        store.finished(StageKey("train", 0)).fingerprint,
    ]
    for value in stated:
        assert f"`{value}`" in card
    assert f"| loss | {last['loss']:.6g} |" in card
    assert f"| optimizer steps | {last['step']} |" in card
    assert "npd verify RUN" in card
