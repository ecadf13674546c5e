"""A program of its own: makes reasoning-gym's prompts, in a process whose string hashes are fixed.

Some of its tasks walk through sets of strings, whose order follows the process's hash seed. Only a process started
with PYTHONHASHSEED set repeats them, so ``tasks.prompts.sources`` starts this file by path; it imports nothing of
this project.

Input: one JSON object on stdin, ``{"tasks": [...], "size": n, "seed": s, "options": {task: {...}}}``. Output: JSON
lines ``{"task", "row", "question", "answer", "entry"}``, rows from 1 within each task, or one last ``{"error"}``.
``entry`` is what the task's verifier needs; null if it is not plain JSON.
"""

import difflib
import json
import sys
from collections.abc import Iterator
from typing import Any


def rows(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every task's questions and answers, after a check of all tasks and options.

    Raises:
        ValueError: a task is unknown (names the nearest one) or refuses its options.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    made = []
    for task in request["tasks"]:
        if task not in DATASETS:
            nearest = difflib.get_close_matches(task, sorted(DATASETS), n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown task `{task}`; did you mean `{nearest}`?")
        options = {**request["options"].get(task, {}), "size": request["size"], "seed": request["seed"]}
        try:
            made.append((task, reasoning_gym.create_dataset(task, **options)))
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"task `{task}` refuses its `options`: {error}") from error
    for task, dataset in made:
        for index in range(request["size"]):
            entry = dataset[index]
            yield {
                "task": task,
                "row": index + 1,
                "question": entry["question"],
                "answer": entry["answer"],
                "entry": plain_entry(entry),
            }


def plain_entry(entry: dict[str, Any]) -> dict[str, Any] | None:
    """Return question, answer and metadata as ``tagged``, or None if JSON cannot hold them."""
    kept = {name: tagged(entry[name]) for name in ("question", "answer", "metadata")}
    try:
        json.dumps(kept)
    except (TypeError, ValueError):
        return None
    return kept


def tagged(value: Any) -> Any:
    """Mark what JSON would change and a verifier may look at; ``tasks/verification/worker.py`` undoes it.

    >>> tagged([(1, 2), {3: "c"}])
    [{'__tuple__': [1, 2]}, {'__pairs__': [[3, 'c']]}]
    """
    if isinstance(value, tuple):
        return {"__tuple__": [tagged(each) for each in value]}
    if isinstance(value, list):
        return [tagged(each) for each in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: tagged(each) for key, each in value.items()}
        return {"__pairs__": [[tagged(key), tagged(each)] for key, each in value.items()]}
    return value


def main() -> int:
    """Answer the request on stdin; exit code 2 with a last line ``{"error"}`` if it cannot be met."""
    lines, sys.stdout = sys.stdout, sys.stderr
    try:
        for row in rows(json.load(sys.stdin)):
            lines.write(json.dumps(row) + "\n")
    except ValueError as error:
        lines.write(json.dumps({"error": str(error)}) + "\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
