"""Sizes of published models, by name: numbers of layers and heads, and width."""

from gpt.runtime.fields import check_choice

# The GPT-2 family is from Radford et al. 2019, gopher-44m from arXiv 2112.11446, and the three smallest are from
# minGPT.
GPT: dict[str, tuple[int, int, int]] = {
    "openai-gpt": (12, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
    "gopher-44m": (8, 16, 512),
    "gpt-mini": (6, 6, 192),
    "gpt-micro": (4, 4, 128),
    "gpt-nano": (3, 3, 48),
}

# S and Ti are from arXiv 2012.12877, the others from arXiv 2010.11929.
VIT: dict[str, tuple[int, int, int]] = {
    "Ti": (12, 3, 192),
    "S": (12, 6, 384),
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "H": (32, 16, 1280),
}


def named_size(name: str, sizes: dict[str, tuple[int, int, int]] = GPT) -> dict[str, int]:
    """Returns `num_layers`, `num_heads` and `embed_dim` of a published model.

    Args:
      name: a key of `sizes`.
      sizes: the table of the model family.

    Raises:
      UserError: the table has no such name.
    """
    check_choice("size", name, sizes)
    return dict(zip(("num_layers", "num_heads", "embed_dim"), sizes[name], strict=True))
