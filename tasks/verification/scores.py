"""One score a response."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.errors import ArtifactError
from schemas.untrusted_text import readable
from tasks.verification import processes
from tasks.verification.answers import LONGEST_TEXT, final_answer, is_text, marked_answer


def verify(prompts: pa.Table, responses: Sequence[str]) -> NDArray[np.float64]:
    """Score responses against what their prompts can be checked with.

    `exact` compares texts. `math` takes an equal text as right and asks `math-verify` about every other; a prompt whose
    answer is prose has nothing to check against. `reasoning_gym` asks the task's own verifier, which may give part
    of a point. A response that a verifier cannot read, or not within its limits of time and memory, is wrong.

    Args:
        prompts: Columns `answer` and `verification`, both nullable strings; row i belongs to response i.
        responses: As many texts.

    Returns:
        One score in [0, 1] a row, 1 for right; NaN where the prompt has nothing to check against.

    Raises:
        ArtifactError: a row's `verification` is not what the table PROMPTS holds.
        StageError: a verifier's package is not installed.
        ValueError: not as many responses as prompts.
    """
    if prompts.num_rows != len(responses):
        raise ValueError(f"{prompts.num_rows} prompts, {len(responses)} responses")
    scores = np.full(len(responses), np.nan)
    answers = prompts.column("answer").to_pylist()
    asked: dict[processes.Kind, list[tuple[int, dict[str, Any]]]] = {"math": [], "reasoning_gym": []}
    read = _reader()
    for row, text in enumerate(prompts.column("verification").to_pylist()):
        if text is None:
            continue
        check = read(text, row)
        kind, answer, response = check["type"], answers[row], responses[row]
        if kind == "reasoning_gym":
            asked["reasoning_gym"].append((row, _task_request(check, response)))
            continue
        if answer is None:
            continue
        reference = final_answer(answer, answer)
        if not reference:
            # Else whoever says nothing would be right.
            continue
        equal = final_answer(response, reference) == reference
        if kind == "exact":
            scores[row] = float(equal)
        elif equal and not _is_prose(reference):
            scores[row] = 1.0
        else:
            asked["math"].append((row, _math_request(reference, response)))
    for name, requests in asked.items():
        if requests:
            scores[[row for row, _ in requests]] = processes.scores(name, [request for _, request in requests])
    for row, request in asked["math"]:
        if np.isnan(scores[row]) and not _is_prose(request["reference"]):
            # Nothing mathematical in it, so texts were compared, and differ.
            scores[row] = 0.0
    return scores


def _is_prose(reference: str) -> bool:
    return len(reference) > LONGEST_TEXT and is_text(reference)


def _math_request(reference: str, response: str) -> dict[str, Any]:
    marked = marked_answer(response)
    return {
        "reference": reference,
        "reference_is_text": is_text(reference),
        "response": response if marked is None else marked,
        "marked": marked is not None and not is_text(marked),
    }


def _task_request(check: dict[str, Any], response: str) -> dict[str, Any]:
    answer = final_answer(response, str(check["entry"].get("answer") or ""))
    return {"task": check["task"], "options": check.get("options", {}), "entry": check["entry"], "answer": answer}


def _reader() -> Callable[[str, int], dict[str, Any]]:
    """Return what parses a row's `verification`, once for every text that repeats in rows that follow each other."""
    last: tuple[str, dict[str, Any]] | None = None

    def read(text: str, row: int) -> dict[str, Any]:
        nonlocal last
        if last is None or last[0] != text:
            last = text, _checked(text, row)
        return last[1]

    return read


def _checked(text: str, row: int) -> dict[str, Any]:
    try:
        check = json.loads(text)
    except (ValueError, RecursionError):
        check = None
    wanted = {"reasoning_gym": {"task": str, "entry": dict}, "math": {}, "exact": {}}
    kind = check.get("type") if isinstance(check, dict) else None
    if not isinstance(kind, str) or kind not in wanted:
        raise ArtifactError(f"prompts: row {row}: column `verification` is no known check: '{readable(text, 60)}'")
    for name, dtype in wanted[kind].items():
        if not isinstance(check.get(name), dtype):
            raise ArtifactError(
                f"prompts: row {row}: column `verification`: `{name}` is missing or no {dtype.__name__}"
            )
    found: dict[str, Any] = check
    return found
