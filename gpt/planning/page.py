"""Writes plans as an HTML page, which needs no network and no library. `page.html` holds the script that draws it."""

import json
from pathlib import Path
from typing import Any

from gpt.models.kernels import KERNELS
from gpt.planning.report import ASSUMPTIONS, BOTTLENECKS, MEMORY_PARTS, Report


def html(plans: list[Report], placement: dict[str, Any], price: float | None = None) -> str:
    """Returns a page with the first plan in detail and a comparison of all plans.

    Args:
      placement: `compiling.placement` of the first plan.
      price: price of one device for an hour.
    """
    data: dict[str, Any] = {"plans": plans, "placement": placement, "price": price, "assumptions": ASSUMPTIONS}
    data |= {"memory_parts": MEMORY_PARTS, "bottlenecks": BOTTLENECKS, "kernels": list(KERNELS)}
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # A "<" in a text could end the script.
    return template.replace("PLANS", json.dumps(data).replace("<", "\\u003c"))
