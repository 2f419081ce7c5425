"""Sizes of published models by name, from `sizes.toml`."""

import tomllib
from pathlib import Path

from gpt.runtime.fields import check_choice

SIZES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def named_size(name: str, family: str = "gpt") -> dict[str, int]:
    """Returns `num_layers`, `num_heads` and `embed_dim` of a published model.

    Args:
      name: a key of the table of the family, "gpt" or "vit".

    Raises:
      UserError: the table has no such name.
    """
    check_choice("size", name, SIZES[family])
    return dict(zip(("num_layers", "num_heads", "embed_dim"), SIZES[family][name], strict=True))
