"""What is wrong with a config, of what pydantic found: the key, what it should be, and where a strange key belongs."""

import difflib
import reprlib
from collections.abc import Sequence
from typing import get_args

from pydantic_core import ErrorDetails

from schemas.config.base import Section, sections_in
from schemas.config.elsewhere import hint
from schemas.config.secrets import holds_secret
from schemas.config.settings import FOLDER_NAME
from schemas.untrusted_text import readable

_KINDS_OF_SOURCE = {"csv": "dataset", "tsv": "dataset", "hf": "dataset", "hub": "dataset", "huggingface": "dataset"}
"""What those who write such a `type` of a source mean."""


def explain(detail: ErrorDetails, kind: type[Section]) -> str:
    """Return one line on one thing that is wrong with a config of ``kind``: its key, what to do, and what was there."""
    location = [part for part, tag in _parts(detail["loc"]) if not tag]
    key = readable(".".join(str(part) for part in location), 80) or "config"
    match detail["type"]:
        case "union_tag_not_found":
            return f"{key}.type: missing; it has no default"
        case "missing":
            return f"{key}: missing; it has no default"
        case "extra_forbidden":
            known = _known_keys(detail["loc"][:-1], kind)
            meant = hint(str(location[-1]), known, kind)
            return f"{key}: unknown key{f'; {meant}' if meant else '.'} Known here: {', '.join(known)}"
    message, given = _message(detail), detail["input"]
    if not location:
        return message if detail["type"] == "value_error" else f"{key}: {message}"
    if detail["type"] == "value_error" and isinstance(given, dict):
        # It names the values that do not go together.
        return f"{key}: {message}"
    shown = "not shown" if holds_secret(repr(given)) else readable(reprlib.repr(given), 80)
    null = ""
    if isinstance(given, str) and given.lower() == "none" and detail["type"] != "list_type":
        null = "; nothing is written `null` in YAML"
    return f"{key}: {message} (got {shown}{null})"


def _message(detail: ErrorDetails) -> str:
    """Return what a value should be; pydantic's own words where they say that to whoever writes YAML."""
    match detail["type"]:
        case "union_tag_invalid":
            # pydantic's own words quote the value whole, however long it is.
            tags = str(detail["ctx"]["expected_tags"])
            return (
                f"its {detail['ctx']['discriminator']} is none of {tags}{_nearest_tag(str(detail['ctx']['tag']), tags)}"
            )
        case "model_type" | "model_attributes_type":
            return "should be a section, that is keys with values below it" + (
                "; without any, leave it out" if detail["input"] is None else ""
            )
        case "list_type":
            return "should be a list, in brackets or with a dash before each of its values"
        case "string_pattern_mismatch" if detail["ctx"]["pattern"] == FOLDER_NAME:
            return "should be the name of a folder: letters, digits, `-`, `_` and `.`, the first a letter or digit"
    return detail["msg"].removeprefix("Value error, ")


def _nearest_tag(given: str, tags: str) -> str:
    known = tags.replace("'", "").split(", ")
    near = [*difflib.get_close_matches(given.lower(), known, n=1), *filter(None, [_KINDS_OF_SOURCE.get(given.lower())])]
    return f"; did you mean `{near[0]}`?" if near else ""


_SOURCES = {"jsonl", "parquet", "dataset", "reasoning_gym"}
_TYPES = {"float", "Quantile", "int", "list[int]", "str", "list[str]"}


def _parts(location: Sequence[int | str]) -> list[tuple[int | str, bool]]:
    """Return the parts of a place, each with whether it only says which member of a union pydantic tried there.

    A source's type stands behind the source's number: elsewhere, as in `prompts.sources.0.dataset`, it is a key.
    """
    return [
        (part, part in _TYPES or (part in _SOURCES and isinstance(before, int)))
        for before, part in zip([None, *location], location)
    ]


def _known_keys(location: Sequence[int | str], kind: type[Section]) -> list[str]:
    """Return the field names of the section at ``location`` in ``kind``, following lists, names and tagged unions."""
    candidates: list[type[Section]] = [kind]
    for part, tag in _parts(location):
        if isinstance(part, int):
            continue
        if tag:
            tagged = [c for c in candidates if _is_tagged(c, str(part))]
            candidates = tagged or candidates
            continue
        annotations = [c.model_fields[part].annotation for c in candidates if part in c.model_fields]
        if not annotations:
            # A name that users choose, of a mapping of sections.
            continue
        candidates = [section for annotation in annotations for section in sections_in(annotation)]
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def _is_tagged(section: type[Section], tag: str) -> bool:
    field = section.model_fields.get("type")
    return section.__name__ == tag or (field is not None and tag in get_args(field.annotation))
