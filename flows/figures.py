"""A report's figures in Prefect's UI."""

from collections.abc import Iterable

from prefect.artifacts import create_image_artifact

from flows.progress import artifact_key
from tasks.report.drawing import Figure
from tasks.report.images import image_url


def publish_figures(name: str, figures: Iterable[Figure]) -> None:
    """Make an image artifact of each figure of a run or comparison, in place of an earlier one of its key."""
    for figure in figures:
        key = artifact_key(name, "figure", figure.key)
        create_image_artifact(image_url(figure), key=key, description=figure.title)
