"""What every config section shares: strictness, docstrings as descriptions, and what a stage's fingerprint reads."""

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

PLACEMENT: dict[str, Any] = {"fingerprint": False}
"""``json_schema_extra`` of fields that say where or how visibly work runs, not what comes out of it: changing one
does not re-run a stage."""

SOURCE: dict[str, Any] = {"fingerprint": False}
"""``json_schema_extra`` of fields that say where content lies: ``source_fingerprints`` of the stage that reads it
stand for the content, so that moving it does not re-run a stage."""


class Section(BaseModel):
    """A strict config section: unknown keys are errors, and the docstring under a field is its description."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        # A value that is wrong may be a secret in the wrong place.
        hide_input_in_errors=True,
    )

    def fingerprinted(self) -> dict[str, Any]:
        """Return the section as JSON values, without the fields that cannot change what a stage writes."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            if _is_placement(field):
                values.pop(name, None)
            else:
                values[name] = _fingerprinted(getattr(self, name), values[name])
        return values


def _fingerprinted(value: Any, dumped: Any) -> Any:
    """Return a field's value as JSON, its sections fingerprinted; ``dumped``: what a value without sections is."""
    if isinstance(value, Section):
        return value.fingerprinted()
    if isinstance(value, list):
        return [_fingerprinted(*pair) for pair in zip(value, dumped, strict=True)]
    return dumped


def _is_placement(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and extra.get("fingerprint") is False
