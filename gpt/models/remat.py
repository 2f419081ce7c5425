"""Rematerialization: what the forward pass keeps for the backward pass, chosen by `model.remat`.

The backward pass computes again what is not kept. A block always keeps its input; `model.remat` is one of

- `none`: keeps everything; no rematerialization.
- `full`: keeps nothing else, so that the whole block is computed twice.
- `dots`: keeps the outputs of all linear layers and of the attention kernels, and computes the rest again.
- names out of `OUTPUTS`, separated by commas: keeps these outputs. `NAME@host` moves the output to the memory of the
  host in the meantime, which accelerators can do; `input@host` moves the input of the block as well.
"""

from collections.abc import Callable
from typing import Any

from jax.ad_checkpoint import Offloadable, Recompute, Saveable

from gpt.runtime.fields import check_names

# The outputs of a block that have a name: of its linear layers, and of the attention kernels (`cudnn`, `splash`).
OUTPUTS = ("qkv", "attention", "out", "gate", "up", "down")
PRESETS: dict[str, tuple[str, ...]] = {"none": OUTPUTS, "dots": OUTPUTS, "full": ()}


def kept(remat: str) -> dict[str, bool]:
    """Returns the names of the outputs that are kept, and for each whether it is moved to the host."""
    names = PRESETS[remat] if remat in PRESETS else remat.split(",")
    return {name.removesuffix("@host"): name.endswith("@host") for name in names}


def check(remat: str) -> None:
    """Raises UserError unless `remat` has one of the forms above."""
    if remat not in PRESETS:
        check_names("model.remat", ",".join(kept(remat)), ["input", *OUTPUTS], "none, dots, full, or ")


def policy(remat: str) -> Callable[..., Any]:
    """Returns the policy of `jax.checkpoint` for a value of `model.remat` other than "none"."""
    names = kept(remat)

    def decide(primitive: Any, *operands: Any, **parameters: Any) -> Any:
        name = parameters.get("name") if primitive.name == "name" else None  # of `jax.ad_checkpoint.checkpoint_name`
        if primitive.name.startswith("dot_product_attention_fwd"):  # cuDNN's, inside which no value can have a name
            name = "attention"
        if name not in names:
            return Recompute
        return Offloadable(src="device", dst="pinned_host") if names[name] else Saveable

    return decide
