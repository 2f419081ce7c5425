"""LoRA: the training of low-rank adapters in place of a model's weights (arXiv 2106.09685).

Beside the kernel W of a linear layer, `layers.Linear` has two matrices: y = x·W + scale·(x·a)·b, with a: [in, rank]
and b: [rank, out]. They are variables of a collection of their own, "lora", with the names of the kernels' places.
W stays as it is, so that a run has to save the adapters alone; merged into W, they cost nothing when the model is used.
"""

from typing import Any

import jax


def merge(params: Any, adapters: Any, scale: float) -> Any:
    """The parameters with what the adapters add to their kernels; arrays of NumPy or JAX, layers stacked or not."""
    if "a" in adapters:
        return params | {"kernel": params["kernel"] + scale * product(adapters, params["kernel"].shape)}
    return params | {name: merge(params[name], part, scale) for name, part in adapters.items()}


def product(adapter: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """a·b in the shape of the kernel."""
    a, b = adapter["a"], adapter["b"]
    layers = a.shape[: a.ndim + b.ndim - len(shape) - 2]  # () where they are not stacked
    rank = a.shape[-1]
    with jax.default_matmul_precision("highest"):  # an accelerator would round to bfloat16
        return (a.reshape(*layers, -1, rank) @ b.reshape(*layers, rank, -1)).reshape(shape)
