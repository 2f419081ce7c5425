"""LoRA: trains low-rank adapters instead of a model's weights (Hu et al. 2021, arXiv 2106.09685).

An adapter adds scale·(x·a)·b to the output of a linear layer, with a: [in, rank] and b: [rank, out]. The matrices are
the variables `a` and `b` in the Flax collection "lora", at the path of the layer whose kernel they adapt. The kernel
stays frozen, so a checkpoint contains only the adapters. Merged into the kernel, an adapter costs nothing at inference.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt.models.layers import Linear, split
from gpt.models.mesh import merged_rows


def adapted(call: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Decorates the `__call__` of a model so that the linear layers in `config.lora_targets` have adapters.

    An interceptor adds them, so that neither the layers nor the blocks contain code for LoRA.
    """

    @functools.wraps(call)
    def call_adapted(model: Any, *args: Any, **kwargs: Any) -> jax.Array:
        if not model.config.lora_rank:
            return call(model, *args, **kwargs)
        with nn.intercept_methods(functools.partial(_add_adapter, model.config)):
            return call(model, *args, **kwargs)

    return call_adapted


def _add_adapter(config: Any, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    """Returns the result of a method call, plus the adapter's output if the method applies one of the target layers."""
    y, layer = call(*args, **kwargs), context.module
    is_target = isinstance(layer, Linear) and layer.name in config.lora_targets.split(",")
    if not is_target or not (layer.is_initializing() or layer.has_variable("lora", "a")):
        return y  # not a layer with an adapter, or the adapters are merged and the collection is absent
    (x, *parts), width, inputs = args, math.prod(layer.in_shape), len(layer.in_shape)

    def matrix(name: str, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
        boxed: Callable[..., Any] = nn.with_logical_partitioning(init, axes)
        return layer.variable("lora", name, lambda: boxed(layer.make_rng("params"), shape)).value.astype(layer.dtype)

    a_shape, a_axes = (*layer.in_shape, config.lora_rank), (*layer.axes[:inputs], "rank")
    b_shape, b_axes = (config.lora_rank, *layer.out_shape), ("rank", *layer.axes[inputs:])
    a = matrix("a", nn.initializers.normal(width**-0.5), a_shape, a_axes)
    b = matrix("b", nn.initializers.zeros, b_shape, b_axes)  # zeros, so that training starts from the frozen model
    rows = x.shape[: x.ndim - inputs]
    x = merged_rows(x.reshape(*rows, width).astype(layer.dtype))
    adapter = config.lora_scale * (x @ a.reshape(width, -1)) @ b.reshape(config.lora_rank, -1)
    adapter = adapter.reshape(*rows, *layer.out_shape)
    return jax.tree.map(jnp.add, y, split(adapter, *parts) if parts else adapter)


def merge(params: Any, adapters: Any, scale: float) -> Any:
    """Returns the parameters with the product of each adapter added to its kernel.

    Args:
      params: nested dictionaries of NumPy or JAX arrays, layers stacked or not.
      adapters: the collection "lora" of the same model.
      scale: `ModelConfig.lora_scale`.
    """
    if "a" in adapters:
        return params | {"kernel": params["kernel"] + scale * product(adapters, params["kernel"].shape)}
    return params | {name: merge(params[name], part, scale) for name, part in adapters.items()}


def product(adapter: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """Returns a·b, reshaped to the shape of the kernel, for an adapter {"a": …, "b": …}."""
    a, b = adapter["a"], adapter["b"]
    layers = a.shape[: a.ndim + b.ndim - len(shape) - 2]  # () if the layers are not stacked
    rank = a.shape[-1]
    with jax.default_matmul_precision("highest"):  # an accelerator would otherwise round the operands to bfloat16
        return (a.reshape(*layers, -1, rank) @ b.reshape(*layers, rank, -1)).reshape(shape)
