import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from schemas.config import WarmupConfig
from schemas.errors import ArtifactError, ModelError, StageError
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import IGNORE_LABEL, pack_schema
from tasks.graph import MODELS
from tasks.stage import execute
from tests.run_fixtures import finish_stage, make_config
from tests.tasks.test_loss import reference_kl
from tests.tasks.training_runs import (
    metrics,
    random_packs,
    train_rounds,
    trained_weights,
    training_run,
)


def reference_loss(student: Path, packs: pa.Table, form: str, shift: int = 0) -> tuple[float, float]:
    """Mean CE and KD over all response tokens in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    ce, kd, tokens = 0.0, 0.0, 0
    for row in packs.to_pylist():
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            ids, labels = torch.tensor([row["input_ids"][part]]), torch.tensor(row["labels"][part])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0]
            places = (labels != IGNORE_LABEL).nonzero()[:, 0]
            predicting = logits[places - 1]
            ce -= predicting.log_softmax(-1).gather(1, labels[places, None]).sum().item()
            topk_ids = torch.tensor([row["teacher_topk_ids"][start + int(p)] for p in places])
            topk = torch.tensor([row["teacher_topk_logprobs"][start + int(p)] for p in places], dtype=torch.float64)
            topk_ids, topk = topk_ids.roll(shift, 0), topk.roll(shift, 0)
            kd += reference_kl(predicting, topk_ids, topk, form).sum().item()  # type: ignore[arg-type]
            tokens += len(places)
            start += length
    return ce / tokens, kd / tokens


@pytest.mark.parametrize("form", ["truncated", "tail", "renormalized"])
def test_first_step_has_the_loss_of_each_sequence_alone(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, form: str
) -> None:
    """Packed training equals unpacked float64: no leak between sequences, targets on the right tokens."""
    packs = random_packs(packs=2)
    store, config = training_run(
        tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=packs, kd_form=form, kd_weight=0.7
    )
    execute(store, config, StageKey("train", 0))
    ce, kd = reference_loss(student_dir, packs, form)
    first = metrics(store, 0).to_pylist()[0]
    assert first["ce"] == pytest.approx(ce, abs=1e-5)
    assert first["kd"] == pytest.approx(kd, abs=1e-5)
    assert first["loss"] == pytest.approx(0.3 * ce + 0.7 * kd, abs=1e-5)
    _, shifted = reference_loss(student_dir, packs, form, shift=1)
    assert abs(shifted - kd) > 1e-2


def step_loss(model: Any, packs: pa.Table, weight: float) -> Any:
    """The loss of all packs as one step: a mean over their response tokens, one sequence at a time."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in packs.to_pylist():
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            labels = torch.tensor(row["labels"][part])
            places = (labels != IGNORE_LABEL).nonzero()[:, 0]
            logits = model(input_ids=torch.tensor([row["input_ids"][part]]), use_cache=False).logits[0][places - 1]
            ids, logprobs = (
                torch.tensor([row[f"teacher_topk_{name}"][start + int(place)] for place in places])
                for name in ("ids", "logprobs")
            )
            ce = torch.nn.functional.cross_entropy(logits, labels[places], reduction="sum")
            kd = reference_kl(logits, ids, logprobs.double(), "tail").sum()
            total, tokens = total + (1 - weight) * ce + weight * kd, tokens + len(places)
            start += length
    return total / tokens


def test_optimizer_steps_are_adamw_clipped_and_on_schedule(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    """Four steps on the same two packs against AdamW written out in float64."""
    packs, peak, floor, decay, clip = random_packs(packs=2), 1e-3, 1e-4, 0.3, 0.5
    store, config = training_run(
        tmp_path,
        teacher_dir,
        student_dir,
        rounds=1,
        epochs=4,
        packs=packs,
        weight_decay=decay,
        max_grad_norm=clip,
        warmup_ratio=0.5,
        learning_rate=peak,
        min_learning_rate=floor,
    )
    execute(store, config, StageKey("train", 0))
    # A linear rise from 0 over half of the four steps, then a cosine.
    rates = [0.0, 0.5 * peak, peak, floor + 0.5 * (peak - floor)]
    model: Any = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float64)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    first, second = ({name: torch.zeros_like(weight) for name, weight in start.items()} for _ in range(2))
    norms = []
    for step, rate in enumerate(rates, 1):
        model.zero_grad()
        step_loss(model, packs, 0.9).backward()
        norms.append(math.sqrt(sum(float(weight.grad.square().sum()) for weight in model.parameters())))
        for name, weight in model.named_parameters():
            gradient = weight.grad * min(1.0, clip / norms[-1])
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient.square()
            change = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            # Norms keep their size.
            weight.data -= rate * (change + (0.0 if "norm" in name else decay * weight.data))
    assert min(norms) > clip
    table = metrics(store, 0)
    assert table.column("learning_rate").to_pylist() == pytest.approx(rates, rel=1e-9)
    assert table.column("grad_norm").to_pylist() == pytest.approx(norms, rel=1e-4)
    trained = trained_weights(store, 0)
    assert trained.keys() == start.keys()
    for name, weight in model.named_parameters():
        moved = weight.data - start[name]
        assert (trained[name] - start[name] - moved).norm() < 5e-3 * moved.norm(), name


def test_loss_is_a_mean_over_the_tokens_of_the_step(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    """Two packs of very different size in one step weigh as their tokens do, as if they were one pack."""
    packs = pa.concat_tables([random_packs(1, sequences=1, seed=1), random_packs(1, sequences=9, seed=2)])
    packs = packs.set_column(0, packs.schema.field("pack_id"), pa.array([0, 1]))
    store, config = training_run(tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=packs)
    execute(store, config, StageKey("train", 0))
    ce, kd = reference_loss(student_dir, packs, "tail")
    assert metrics(store, 0).to_pylist()[0]["loss"] == pytest.approx(0.1 * ce + 0.9 * kd, abs=1e-5)


def test_bf16_and_checkpointing_change_the_loss_by_rounding_only(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    """Tolerance: bf16 has 8 bits, 2^-8 relative a rounding; a two-layer model rounds a handful of times in a row."""
    packs = random_packs(packs=2)
    losses = {}
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "bf16": {"precision": "bf16"},
    }
    for name, settings in variants.items():
        store, config = training_run(
            tmp_path / name, teacher_dir, student_dir, rounds=1, epochs=1, packs=packs, **settings
        )
        execute(store, config, StageKey("train", 0))
        losses[name] = metrics(store, 0).to_pylist()[0]["loss"]
    assert losses["checkpointing"] == pytest.approx(losses["plain"], abs=1e-6)
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=8 * 2**-8)
    assert losses["bf16"] != losses["plain"]


def test_non_finite_weights_stop_before_the_first_step(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = training_run(tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=random_packs())
    weights = store.path(MODELS, "student", "model.safetensors")
    tensors = load_file(weights)
    tensors["model.norm.weight"].fill_(math.inf)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="logits are not finite"):
        execute(store, config, StageKey("train", 0))
    assert store.manifest(StageKey("train", 0)) is None


def test_training_that_diverges_names_the_step(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = training_run(
        tmp_path, teacher_dir, student_dir, rounds=1, epochs=2, packs=random_packs(), learning_rate=1e30
    )
    with pytest.raises(StageError, match=r"optimizer step 2 is not finite.*lower `train.learning_rate`$"):
        execute(store, config, StageKey("train", 0))
    assert store.manifest(StageKey("train", 0)) is None


def test_a_warmup_that_diverges_names_its_own_setting(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    packs = random_packs()
    store, config = training_run(tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=packs)
    finish_stage(store, StageKey("pack", WARMUP), pack_schema(None), [packs.select(pack_schema(None).columns.names)])
    warm = config.model_copy(update={"warmup": WarmupConfig(epochs=2, learning_rate=1e30)})
    with pytest.raises(StageError, match=r"lower `warmup.learning_rate` or set `warmup.precision: fp32`$"):
        execute(store, warm, StageKey("train", WARMUP))


def test_warmup_learns_labels_alone(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    packs = random_packs()
    store, _ = training_run(tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=packs)
    warm = make_config(
        tmp_path,
        teacher={"model": str(teacher_dir)},
        student={"model": str(student_dir)},
        warmup={"epochs": 6, "learning_rate": 3e-3, "min_learning_rate": 1e-4, "precision": "fp32"},
        # Of the rounds alone.
        train={"lora": {"r": 3}},
    )
    labels_only = packs.select(pack_schema(None).columns.names)
    finish_stage(store, StageKey("pack", WARMUP), pack_schema(None), [labels_only])
    execute(store, warm, StageKey("train", WARMUP))
    table = metrics(store, WARMUP)
    assert table.column("kd").null_count == table.num_rows
    assert table.column("policy_kl").null_count == table.num_rows
    ce = table.column("ce").to_pylist()
    assert ce[-1] < ce[0] - 0.1
    assert table.column("loss").to_pylist() == pytest.approx(ce, abs=1e-5)
    checkpoint = store.checkpoint(StageKey("train", WARMUP))
    assert load_file(checkpoint / "model.safetensors").keys() == load_file(student_dir / "model.safetensors").keys()


def test_a_kd_that_is_not_computed_is_not_said_to_be_nothing(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    store, config = training_run(
        tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=random_packs(), kd_weight=0
    )
    train_rounds(store, config)
    table = metrics(store, 0)
    assert table.column("kd").null_count == table.num_rows == 2
    assert table.column("loss").to_pylist() == pytest.approx(table.column("ce").to_pylist(), abs=1e-5)
    card = store.path(StageKey("export", 0), "model", "README.md").read_text(encoding="utf-8")
    assert "| KL from the teacher's top k (nats per token) | not measured |" in card


def test_metrics_hold_no_times(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    packs = random_packs(packs=2)
    files = []
    for name in ("a", "b"):
        store, config = training_run(tmp_path / name, teacher_dir, student_dir, rounds=1, epochs=1, packs=packs)
        execute(store, config, StageKey("train", 0))
        files.append(store.path(StageKey("train", 0), "metrics.parquet"))
        assert store.finished(StageKey("train", 0)).counters["tokens_per_second"] > 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert pq.read_table(files[0]).num_rows == 1


def test_a_damaged_pack_file_is_named(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = training_run(tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=random_packs())
    path = store.part(StageKey("pack", 0), 0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=f"{path.name}: not a readable Parquet file"):
        execute(store, config, StageKey("train", 0))


def attention_of_16_bits(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Stand in for flash attention: float32 is computed in autocast's type, and taken in no other."""
    if query.dtype == torch.float32:
        if not torch.is_autocast_enabled(query.device.type):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        kind = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    return sdpa_attention_forward(module, query, key, value, *args, **options)


def test_an_attention_that_takes_16_bits_only_trains_with_autocast(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    AttentionInterface.register("of_16_bits", attention_of_16_bits)
    AttentionMaskInterface.register("of_16_bits", sdpa_mask)
    options: dict[str, Any] = {"rounds": 1, "epochs": 1, "packs": random_packs(), "attention": "of_16_bits"}
    store, config = training_run(tmp_path, teacher_dir, student_dir, precision="bf16", **options)
    execute(store, config, StageKey("train", 0))
    losses = metrics(store, 0).column("loss").to_pylist()
    assert losses
    assert np.isfinite(losses).all()
