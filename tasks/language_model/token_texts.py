"""What a token id stands for, where the student's tokenizer can be read without loading a model library."""

from typing import Any

from schemas.errors import ArtifactError
from schemas.run_store import RunStore
from tasks.graph import MODELS


class TokenTexts:
    """Texts of token ids, by the tokenizer of the student the run starts from; all students of a run share it.

    Args:
        store: The run.
    """

    def __init__(self, store: RunStore) -> None:
        self._tokenizer: Any = None
        path = store.path(MODELS, "student", "tokenizer.json")
        try:
            store.fetch(path)
        except ArtifactError:
            return
        if path.is_file():
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(path))

    def of(self, token: int) -> str | None:
        """Return a token's text, or its name in the vocabulary where it is no whole text; None if unknown."""
        if self._tokenizer is None:
            return None
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        if text and "\N{REPLACEMENT CHARACTER}" not in text:
            return text
        name: str | None = self._tokenizer.id_to_token(token)
        return name
