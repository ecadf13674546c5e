"""Config files, and `--set`."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from schemas.config import RunConfig, apply_overrides, load_config, parse_config
from schemas.manifest import hash_json
from tests.fuzz.harness import Reader, Record, try_reader
from tests.fuzz.mutations import ODD_TEXT, ODD_VALUES, changed, damaged

pytestmark = [pytest.mark.usefixtures("forkserver"), pytest.mark.xdist_group("children")]

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MINIMAL: dict[str, Any] = {
    "name": "fuzz",
    "teacher": {"model": "t"},
    "student": {"model": "s"},
    "prompts": {"sources": [{"type": "jsonl", "path": "p.jsonl"}]},
}
PROCEDURAL = MINIMAL | {
    "prompts": {"sources": [{"type": "reasoning_gym", "tasks": ["a"], "options": {"a": {"x": [1, {"y": 2}]}}}]},
    "warmup": {"epochs": 1},
    "filter": {"max_delta_ifd": {"quantile": 0.9}},
}

HOSTILE_YAML = (
    "!!python/object/apply:os.system ['true']",
    "!!python/name:os.system ''",
    "!!binary '/w=='",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!int ''",
    "!!int []",
    "!!bool maybe",
    "!!float x",
    "!!null x",
    "!mine 1",
    "!<tag:yaml.org,2002:int> z",
    "&a [*a]",
    "&a {a: *a}",
    "*missing",
    "{<<: {a: 1}, a: 2}",
    "{<<: [1]}",
    "{a: 1, a: 2}",
    "{1: 2}",
    "{null: 2}",
    "{[1]: 2}",
    "{? {a: 1} : 2}",
    "2001-13-45",
    "2001-01-01T99:99:99Z",
    "0x_",
    "0x" + "f" * 5_000,
    "9" * 5_000,
    "0b",
    "1:60:99999999999999999999",
    "1" + ":59" * 300 + ".5",
    ".nan",
    "-.inf",
    "1e9999",
    "=",
    "~",
    "yes",
    "[" * 400,
    "[" * 60 + "]" * 60,
    "{a: " * 400,
    '"\\ud800"',
    '"\\0"',
    '"\\e[2J"',
    "|\n  x",
    "- ",
    ": ",
    "? ",
    "@",
    "`",
    "%TAG",
    "\t",
    "---\n",
    "...\n",
    "#",
)


def bombs() -> st.SearchStrategy[str]:
    """Return documents whose aliases stand for aliases: up to 9 ** 20 values."""

    def bomb(levels: int, width: int, merge: bool) -> str:
        lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x]"]
        for level in range(1, levels + 1):
            aliases = ", ".join([f"*a{level - 1}"] * width)
            lines.append(f"a{level}: &a{level} {{<<: [{aliases}]}}" if merge else f"a{level}: &a{level} [{aliases}]")
        return "\n".join(lines)

    return st.builds(bomb, st.integers(1, 60), st.integers(1, 9), st.booleans())


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    if draw(st.integers(0, 19)) == 0:
        return draw(bombs()).encode()
    snippets = draw(st.lists(st.sampled_from(HOSTILE_YAML), max_size=2))
    places = [f"@{index}@" for index in range(len(snippets))] or ODD_VALUES
    values = draw(changed([MINIMAL, PROCEDURAL], places))
    text = json.dumps(values, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    for index, snippet in enumerate(snippets):
        text = text.replace(f'"@{index}@"', snippet)
    text = draw(st.sampled_from(["", "", "", "\ufeff", "---\n", "%YAML 9.1\n---\n", "\x00"])) + text
    return text.encode(draw(st.sampled_from(["utf-8"] * 8 + ["utf-16", "utf-32"])), "surrogatepass")


def overrides() -> st.SearchStrategy[bytes]:
    names = ["prompts", "sources", "0", "00", "-1", "9" * 5_000, "٣", "²", "options", "a", "x", "train", "seed", "name"]
    name = st.one_of(st.sampled_from(names), st.sampled_from(names), st.sampled_from(ODD_TEXT))
    path = st.lists(name, max_size=6).map(".".join) | st.integers(40, 3_000).map(
        lambda count: "prompts.sources.0.options.a" + ".b" * count
    )
    value = st.sampled_from(HOSTILE_YAML) | st.sampled_from(ODD_TEXT) | st.sampled_from(ODD_VALUES).map(json.dumps)
    equals = st.sampled_from(["=", "=", "=", "=", "", "=="])
    return st.tuples(path, equals, value).map(lambda parts: "".join(parts).encode(errors="surrogatepass"))


def _check(config: RunConfig) -> None:
    """A config that loads can be recorded, read again, and fingerprinted."""
    values = config.model_dump(mode="json")
    assert parse_config(json.loads(json.dumps(values))) == config
    assert config.model_dump_json().encode()
    assert hash_json(config.fingerprinted())


def read_file(data: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(data)
    _check(load_config(path))


def read_override(data: bytes, folder: Path) -> None:
    _check(parse_config(apply_overrides(PROCEDURAL, [data.decode(errors="surrogatepass")])))


def originals() -> list[bytes]:
    return [path.read_bytes() for path in CONFIGS] + [yaml.safe_dump(PROCEDURAL).encode()]


TOKENS = [snippet.encode() for snippet in HOSTILE_YAML if len(snippet) < 100] + [
    b"\xef\xbb\xbf",
    b"\xff",
    b"\x00",
    b"\t",
]

READERS = (
    Reader("config, values", 800, documents, read_file, ("config.yaml",), 3_000),
    Reader("config, bytes", 700, lambda: damaged(originals(), TOKENS), read_file, ("config.yaml",), 3_000),
    Reader("config, --set", 800, overrides, read_override, ("--set", "config:"), 3_000),
)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_every_config_loads_or_is_refused(reader: Reader, record_property: Record) -> None:
    record_property("fuzzed inputs", try_reader(__name__, reader))
