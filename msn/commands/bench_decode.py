"""`python -m msn bench what=decode`: images/s of one core for what happens before the views."""

from typing import Any

from rich.console import Console

from msn.commands.bench_views import DECODING, measure_and_show


def run(settings: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    """Measure decoding and a worker's whole task beside the PIL recipe.

    Args:
        settings: as of `msn bench what=views`.
        console: where the table is shown.

    Returns:
        Rows with name, images_per_s, ratio_to_pil and milliseconds an image.

    Raises:
        UserError: a setting is wrong, or the folder holds no readable image.
    """
    return measure_and_show(settings, console, only=DECODING)
