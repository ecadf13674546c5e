"""Configs that are hostile, or only unlucky: each loads or says in one line what is wrong and where."""

from pathlib import Path
from typing import Any

import pytest

from schemas.config import apply_overrides, load_config, parse_config
from schemas.errors import ConfigError

BASE = (
    "name: a\nteacher: {model: t}\nstudent: {model: s}\n"
    "prompts: {sources: [{type: reasoning_gym, tasks: [x], options: {x: {y: 1}}}]}\n"
)
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 40))

REFUSED = [
    (
        "python object",
        BASE + "seed: !!python/object/apply:os.system [ls]",
        r"could not determine .* \(line 5, column 7\)",
    ),
    ("other tag", BASE + "seed: !!binary aGk=", "could not determine a constructor"),
    ("key twice", BASE + "name: b", r"the key `name` is there twice \(line 5, column 1\)"),
    ("key that is no text", BASE + "on: 1", "the key `on` is not text; put it into quotes"),
    ("tab", BASE + "train:\n\tkd_weight: 1", r"a tab, where YAML takes spaces alone \(line 6, column 1\)"),
    ("no space", BASE + "seed:0\nrounds: 1", r"expected `: ` \(colon and space\) after the key \(line 5, column 1\)"),
    ("empty", "# later\n", "a config is a mapping of keys to values, found nothing"),
    ("list as key", BASE + "[1]: 2", "the key is not text"),
    ("digits without end", BASE + "seed: " + "9" * 5_000, "is not what its tag says"),
    ("hex without end", BASE + "seed: 0x" + "f" * 5_000, "seed: is a number beyond 64 bits"),
    ("hex without digits", BASE + "seed: 0x_", "`0x_` is not what its tag says"),
    ("boolean that is none", BASE + "overlap: !!bool maybe", "`maybe` is not what its tag says"),
    ("nan in options", BASE.replace("y: 1", "y: .nan"), "prompts.sources.0.options.x.y: nan is not a finite number"),
    ("date", BASE + "seed: 2001-13-45", "seed: Input should be a valid integer"),
    ("alias of itself", BASE + "seed: &a [*a]", "an alias inside the value it stands for"),
    ("bomb of aliases", BASE + BOMB, "holds more than 20000 values"),
    ("bomb of merges", BASE + MERGES, "nested more than 50 deep|holds more than 20000 values"),
    ("deep", BASE + "seed: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
    ("very deep", BASE + "seed: " + "[" * 5_000, "nested more than 50 deep"),
    ("NUL", BASE.replace("model: t", 'model: "a\\0b"'), "teacher.model: holds a NUL character"),
    ("half a surrogate pair", BASE.replace("model: t", 'model: "\\ud800"'), "teacher.model: holds half of a surrogate"),
    ("key of control characters", BASE + '"\\e[2J": 1', r"\\x1b\[2J: unknown key"),
    ("home of nobody", BASE.replace("model: t", 'model: "~no-such-user/x"'), "a path in it cannot be looked up"),
    ("path too long", BASE.replace("model: t", f"model: {'x' * 5_000}"), "a path in it cannot be looked up"),
    ("too long", BASE + "#" * 300_000, "is longer than 262144 bytes"),
    ("many problems", BASE + "".join(f"k{n}: 1\n" for n in range(50)), "and 42 more"),
]


@pytest.mark.parametrize(("text", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 3_000


def test_dates_are_text_and_a_byte_order_mark_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("\ufeff" + BASE.replace("name: a", "name: 2026-01-01"), encoding="utf-8")
    assert load_config(path).name == "2026-01-01"


def test_an_override_of_a_shared_section_leaves_the_other_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE + "warmup: &rates {learning_rate: 1e-4}\ntrain: *rates\n")
    config = load_config(path, ["train.learning_rate=2e-4"])
    assert config.warmup is not None
    assert (config.train.learning_rate, config.warmup.learning_rate) == (2e-4, 1e-4)
    path.write_text(BASE + "warmup: &rates {learning_rate: 1e-4}\ntrain: {<<: *rates, kd_weight: 0.5}\n")
    assert load_config(path).train.learning_rate == 1e-4


@pytest.mark.parametrize(
    "override",
    [
        "seed=" + "9" * 5_000,
        "prompts.sources." + "9" * 5_000 + "=1",
        "prompts.sources.0.options" + ".a" * 2_000 + "=1",
        "seed=" + "[" * 5_000,
        "seed=\ud800",
        "\ud800=1",
        "\x1b[2J=1",
        "name=&a [*a]",
    ],
)
def test_hostile_overrides(override: str) -> None:
    values: dict[str, Any] = {
        "name": "a",
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "prompts": {"sources": [{"type": "reasoning_gym", "tasks": ["x"]}]},
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(apply_overrides(values, [override]))
    assert len(str(caught.value)) < 1_000
    assert all(line.isprintable() for line in str(caught.value).split("\n"))
