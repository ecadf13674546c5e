"""The card beside exported weights: what they were made from, how training ended, and how to use them."""

from collections.abc import Sequence

_USE = (
    "```python",
    "from transformers import pipeline",
    "",
    'chat = pipeline("text-generation", model="THIS FOLDER")',
    'reply = chat([{"role": "user", "content": "Hello!"}], max_new_tokens=64)',
    'print(reply[0]["generated_text"][-1]["content"])',
    "```",
    "",
)


def model_card(
    title: str,
    about: str,
    *,
    tags: Sequence[str],
    lineage: Sequence[tuple[str, str]],
    last_step: Sequence[tuple[str, float | None]],
    notes: Sequence[str] = (),
) -> str:
    """Return the card in Markdown. What comes from outside must be escaped, and must not be among ``tags``.

    Args:
        title: The heading.
        about: One sentence.
        tags: Of the front matter.
        lineage: What the weights were made from: description and Markdown.
        last_step: What the last training step was like: description and number.
        notes: Paragraphs below the tables.
    """
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            f"tags: [{', '.join(tags)}]",
            "---",
            "",
            f"# {title}",
            "",
            about,
            "",
            "| lineage | |",
            "|---|---|",
            *(f"| {what} | {value} |" for what, value in lineage),
            "",
            "| last training step | |",
            "|---|---|",
            *(f"| {what} | {_number(value)} |" for what, value in last_step),
            "",
            *(line for note in notes for line in (note, "")),
            *_USE,
        ]
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
