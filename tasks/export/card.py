"""The exported model's card: what it is and where it comes from."""

from schemas.config import RunConfig
from schemas.stage_key import StageKey


def model_card(config: RunConfig, key: StageKey, *, run_id: str, config_hash: str, step: int, inputs: str) -> str:
    """Return the card in Markdown.

    Args:
        config: The run's config.
        key: The export stage.
        run_id: Of the run.
        config_hash: Of the resolved config.
        step: Optimizer steps of the near-policy run in these weights.
        inputs: Fingerprint of what the weights were made from.
    """
    student = config.student.model or f"layers of {config.teacher.model}"
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [near-policy-distillation, distillation]",
            "---",
            "",
            f"# {config.name}, {key.label.split(' · ')[0]}",
            "",
            "A student distilled by Near-Policy Distillation (arXiv 2605.05940).",
            "",
            "| lineage | |",
            "|---|---|",
            f"| teacher | `{_code(config.teacher.model)}` |",
            f"| student | `{_code(student)}` |",
            f"| run id | `{run_id}` |",
            f"| config hash | `{config_hash}` |",
            f"| optimizer steps | {step} |",
            f"| trained from (fingerprint) | `{inputs}` |",
            "",
            "```python",
            "from transformers import pipeline",
            "",
            'chat = pipeline("text-generation", model="THIS FOLDER")',
            'reply = chat([{"role": "user", "content": "Hello!"}], max_new_tokens=64)',
            'print(reply[0]["generated_text"][-1]["content"])',
            "```",
            "",
        ]
    )


def _code(text: str) -> str:
    return text.replace("`", "'").replace("|", "\\|").replace("\n", " ")
