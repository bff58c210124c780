"""The layers of a network, found by tracing it, each as programs of its own; used by floor.py."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ddpm_jax.config import Config
from ddpm_jax.models import make_unet
from ddpm_jax.models.layers import Attention, Dropout

Function = Callable[..., PyTree]


class Layer(NamedTuple):
    """A layer of the network, with the shapes that it is called with."""

    kind: str
    """convolution, dense, GroupNorm, attention or dropout."""
    apply: Function
    """(params, *inputs) -> output."""
    params: PyTree
    """Its parameters; of dropout, the bits of its key."""
    inputs: tuple[Any, ...]
    output: Any


def trace_layers(config: Config, batch: int) -> list[Layer]:
    """The layers that hold the network's parameters, and dropout, in the order of their calls in training on such a batch."""
    assert config.data.image_shape is not None
    unet = make_unet(config.model, config.data.image_shape[2])
    xt, t = jnp.zeros((batch, *config.data.image_shape)), jnp.zeros((batch,), jnp.int32)
    layers: list[Layer] = []
    inside = False

    def intercept(call: Function, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        nonlocal inside
        params = context.module.variables.get("params", {})
        kind = kind_of(context.module, params)
        if inside or kind is None or context.method_name != "__call__":
            return call(*args, **kwargs)
        inside = True
        output = call(*args, **kwargs)
        inside = False
        module = context.module.clone(parent=None, name=None)
        inputs = tuple(arg for arg in args if hasattr(arg, "shape"))
        rest = args[len(inputs) :]  # such as whether dropout is off

        def apply(params: PyTree, *inputs: Any) -> Any:
            return module.apply({"params": params}, *inputs, *rest, **kwargs)

        def drop(key: Any, *inputs: Any) -> Any:
            return module.apply({}, *inputs, *rest, **kwargs, rngs={"dropout": jax.random.wrap_key_data(key)})

        if kind == "dropout":
            apply, params = drop, jax.random.key_data(jax.random.key(0))
        layers.append(Layer(kind, apply, *jax.tree.map(abstract, (params, inputs, output))))
        return output

    key = jax.random.key(0)
    variables = jax.eval_shape(unet.init, key, xt, t)
    with nn.intercept_methods(intercept):
        jax.eval_shape(lambda variables: unet.apply(variables, xt, t, train=True, rngs={"dropout": key}), variables)
    return layers


def kind_of(module: nn.Module, params: PyTree) -> str | None:
    """What a module is by its own parameters or its class; None where it is made of others or does nothing."""
    if isinstance(module, Dropout):
        return "dropout" if module.rate > 0 else None
    ranks = {leaf.ndim for leaf in params.values() if hasattr(leaf, "ndim")}
    if isinstance(module, Attention):
        return "attention"
    return {4: "convolution", 2: "dense", 1: "GroupNorm", 0: None}[max(ranks, default=0)]


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def programs(layer: Layer, first: bool) -> Iterator[tuple[str, Function, tuple[PyTree, ...], int, int]]:
    """For each phase of a layer, (name, function, shapes of its arguments, operations, bytes moved at least once).

    `first` says whether the layer is the first convolution: nothing asks for the gradient of the images.
    """
    apply, params, inputs, output = layer.apply, layer.params, layer.inputs, layer.output
    positions = math.prod(output.shape[:-1])
    operations = 2 * positions * sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    if layer.kind == "attention":
        batch, height, width, channels = output.shape
        operations += 4 * batch * (height * width) ** 2 * channels
    x, w, y = nbytes(inputs), nbytes(params), nbytes(output)

    def by_params(dy: Any, params: PyTree, *inputs: Any) -> PyTree:
        return jax.vjp(lambda params: apply(params, *inputs), params)[1](dy)

    def by_inputs(dy: Any, params: PyTree, *inputs: Any) -> PyTree:
        return jax.vjp(lambda *inputs: apply(params, *inputs), *inputs)[1](dy)

    def both(dy: Any, params: PyTree, *inputs: Any) -> PyTree:
        value, gradient = jax.vjp(apply, params, *inputs)
        return value, gradient(dy)

    def both_by_inputs(dy: Any, params: PyTree, *inputs: Any) -> PyTree:
        value, gradient = jax.vjp(lambda *inputs: apply(params, *inputs), *inputs)
        return value, gradient(dy)

    everything = (output, params, *inputs)
    if layer.kind == "convolution":
        yield "convolutions, values", apply, (params, *inputs), operations, x + w + y
        yield "convolutions, weight gradient", by_params, everything, operations, x + w + y
        if not first:
            yield "convolutions, input gradient", by_inputs, everything, operations, x + w + y
    elif layer.kind == "dropout":
        yield "dropout, values and gradients", both_by_inputs, everything, 0, 2 * (x + y)
    else:  # values read x and w and write y; gradients read x, w and dy and write dx and dw
        yield f"{layer.kind}, values and gradients", both, everything, 3 * operations, 3 * x + 3 * w + 2 * y


def nbytes(tree: PyTree) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
