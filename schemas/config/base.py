"""What every config section shares: strictness, docstrings as descriptions, and what a stage's fingerprint reads."""

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

PLACEMENT: dict[str, Any] = {"fingerprint": False}
"""``json_schema_extra`` of fields that say where or how visibly work runs, not what comes out of it: changing one
does not re-run a stage."""


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
                child = getattr(self, name)
                if isinstance(child, Section):
                    values[name] = child.fingerprinted()
        return values


def _is_placement(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and extra.get("fingerprint") is False
