"""Devices: the mesh, how arrays lie on it, and how programs are compiled for it. The one place that knows of devices.

Every program is a `jax.jit` over one mesh of all devices with the axes "data" and "fsdp". Batches are split over both. The
state is whole along "data" and split along "fsdp", whose devices are neighbours: those of one host where they go into it.
The same program runs on one device and on many, and random numbers, drawn by position in the global batch, are the same on
both.

What one device does in a train step is written out (`jax.shard_map`), with the sums and gathers between devices in three
functions, for arrays split by the rule of `split_sharding`: `gather`, `reduce_gradients` and `tree_norm`.
"""

import ctypes
import functools
import math
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from ddpm_jax.errors import InputError
from ddpm_jax.files import cache_folder
from ddpm_jax.processes import wait_for_all

# XLA's CPU compiler gives some operations to a library that is several times slower than XLA's own code for the weight
# gradients of convolutions. This keeps it to reductions; the numbers are the same up to rounding.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}

BATCH_AXES = ("data", "fsdp")
SPLIT_SIZE = 1024  # arrays with fewer elements than this are not worth being split


def make_mesh(devices: list[jax.Device] | None = None, fsdp: int = 1) -> Mesh:
    """A mesh with the axes "data" and "fsdp" over the given devices, or all there are, as `arrange` lays them out.

    Args:
        devices: by default those of all processes.
        fsdp: devices among which the state is split.

    Raises:
        InputError: no device, or a number of them that fsdp doesn't divide.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names a platform that is not there
        reason = str(error).partition("\n")[0] or "check JAX_PLATFORMS"
        raise InputError(f"JAX finds no device: {reason}") from error
    if len(devices) % fsdp:
        divisors = [count for count in range(1, len(devices) + 1) if len(devices) % count == 0]
        raise InputError(f"train.fsdp = {fsdp}: {len(devices)} devices can't be divided so: use one of {divisors}")
    return Mesh(arrange(devices, fsdp), BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def arrange(devices: Sequence[jax.Device], fsdp: int) -> np.ndarray:
    """The devices as [data, fsdp]: host by host, and on each in the given order.

    So where fsdp divides a host's devices, each group that splits a state lies on one host, and what crosses the network is
    the gradients' sum over "data"; and where fsdp is a multiple of them, a group is a number of whole hosts.
    """
    by_host = sorted(devices, key=lambda device: device.process_index)
    return np.asarray(by_host).reshape(-1, fsdp)


def local_mesh() -> Mesh:
    """make_mesh over the devices of this process."""
    return make_mesh(make_mesh().local_devices)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis split over all devices, by default the first."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def split_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """How an array of the state lies: its longest axis that "fsdp" divides is split along it, the last of equally long ones.

    Arrays below SPLIT_SIZE elements, and those without such an axis, are whole on every device.
    """
    parts = mesh.shape["fsdp"]
    axes = [axis for axis, length in enumerate(shape) if length % parts == 0]
    if parts == 1 or not axes or math.prod(shape) < SPLIT_SIZE:
        return replicated(mesh)
    longest = max(axes, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))


def split_specs(mesh: Mesh, tree: PyTree) -> PyTree:
    """For each array of a tree, or each shape, how `split_sharding` lays it out, as `jax.shard_map` wants to know it."""
    return jax.tree.map(lambda leaf: split_sharding(mesh, leaf.shape).spec, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def on_each_device(mesh: Mesh, function: Callable[..., Any], in_specs: PyTree, out_specs: PyTree) -> Callable[..., Any]:
    """function as what each device does with its pieces: nothing is sent but by the collectives that it calls itself.

    JAX's own bookkeeping of which values differ between devices is off: it would add sums to the gradient where it sees fit.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def gather(pieces: PyTree, specs: PyTree) -> PyTree:
    """Within `on_each_device`: the whole arrays of which each device holds pieces, by one all-gather for each split array.

    Its gradient is the reduce-scatter: the sum over "fsdp" of the devices' gradients, of which each device gets its piece.
    """

    def one(piece: Array, spec: PartitionSpec) -> Array:
        if "fsdp" not in spec:
            return piece
        return jax.lax.all_gather(piece, "fsdp", axis=spec.index("fsdp"), tiled=True)

    return jax.tree.map(one, pieces, specs)


def free_gathered(function: Callable[..., Any], arrays: PyTree, specs: PyTree) -> Callable[..., Any]:
    """function, whose backward pass gathers arrays a second time rather than hold them whole since the forward pass.

    All else that the backward pass needs is held, but for whole arrays in another dtype, which are made again as well.
    """
    pairs = zip(jax.tree.leaves(arrays), jax.tree.leaves(specs), strict=True)
    shapes = {array.shape for array, spec in pairs if "fsdp" in spec}

    def is_held(primitive: Any, *inputs: Any, **_: Any) -> bool:
        cast = primitive.name == "convert_element_type" and inputs[0].shape in shapes
        return primitive.name != "all_gather" and not cast

    return jax.checkpoint(function, policy=is_held) if shapes else function


def reduce_gradients(grads: PyTree, specs: PyTree) -> PyTree:
    """Within `on_each_device`: the sums over all devices of the gradients by what `gather` was given, in their own dtype.

    Those of split arrays have been summed over "fsdp" by its gradient, and lack the sum over "data".
    """
    return jax.tree.map(lambda grad, spec: sum_over(("data",) if "fsdp" in spec else BATCH_AXES, grad), grads, specs)


def sum_over(axes: tuple[str, ...], x: Array) -> Array:
    """Within `on_each_device`: the sum over devices along axes; along a single device no program, which would copy x."""
    return jax.lax.psum(x, axes) if jax.lax.axis_size(axes) > 1 else x


def tree_norm(mesh: Mesh, tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of all arrays of a tree together, split by `split_sharding`: one sum of one number over "fsdp"."""
    specs = split_specs(mesh, tree)

    def of_pieces(pieces: PyTree) -> Float[Array, ""]:
        squares = jax.tree.map(lambda piece: jnp.sum(jnp.square(piece)), pieces)
        pairs = list(zip(jax.tree.leaves(squares), jax.tree.leaves(specs), strict=True))
        split = sum(square for square, spec in pairs if "fsdp" in spec)
        whole = sum(square for square, spec in pairs if "fsdp" not in spec)
        return jnp.sqrt(whole + sum_over(("fsdp",), jnp.asarray(split, jnp.float32)))

    return on_each_device(mesh, of_pieces, (specs,), PartitionSpec())(tree)


def check_batch_size(batch_size: int, mesh: Mesh, accumulate_steps: int = 1) -> None:
    """Raise InputError unless every device gets the same number of images in each part of the batch."""
    share = mesh.size * accumulate_steps
    if batch_size % share:
        parts = f" x {accumulate_steps} accumulation steps" if accumulate_steps > 1 else ""
        below, above = batch_size // share * share, -(-batch_size // share) * share
        choice = f"{below} or {above}" if below else f"{above}"
        raise InputError(f"train.batch_size = {batch_size} can't be divided among {mesh.size} devices{parts}: use {choice}")


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The smallest multiple of the number of devices that is not below batch_size."""
    return -(-batch_size // mesh.size) * mesh.size


def compile_for(mesh: Mesh, function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit(function, **options)` with the compiler options of the mesh's platform."""
    return jax.jit(function, compiler_options=_compiler_options(mesh.devices.flat[0].platform), **options)


def run_once(mesh: Mesh, function: Callable[[], Any], shardings: PyTree = None) -> Any:
    """function() as one program, by default whole on each device; on a CPU compiled quickly rather than to run quickly."""
    quick = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    shardings = replicated(mesh) if shardings is None else shardings
    return jax.jit(function, out_shardings=shardings, compiler_options=quick)()


def compile_at_first_call(program: Any) -> Callable[..., Any]:
    """A jitted program as a function for arguments like those of its first call, with less memory in use than jit's own.

    Of several processes none runs it before all have compiled it: in its first exchange Gloo waits 30 seconds for the others.
    """
    compiled: Callable[..., Any] | None = None

    def call(*arguments: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            _release_memory()
            lowered = program.lower(*arguments)
            _release_memory()
            compiled = lowered.compile()
            _release_memory()
            wait_for_all("the program is compiled")
        return compiled(*arguments)

    return call


def _release_memory() -> None:
    """Give the system back what tracing and compiling have used; glibc would keep it. Elsewhere nothing."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def keep_compiled() -> None:
    """Keep compiled programs in the user's cache folder, so that the next start of a program needn't compile it again.

    JAX's own variables decide where (JAX_COMPILATION_CACHE_DIR) and whether at all (JAX_ENABLE_COMPILATION_CACHE=false).
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled")))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Host arrays as device arrays that lie as the sharding says; with several processes, each gives the same whole arrays."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def parts(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(np.shape(array), sharding, lambda index: np.asarray(array)[index])

    return jax.tree.map(parts, tree)


def rows_held(mesh: Mesh, batch_size: int, devices: Collection[jax.Device] | None = None) -> Int[np.ndarray, " R"]:
    """The rows of a batch, split over the mesh, that some of its devices hold; by default those of this process."""
    held = mesh.local_devices if devices is None else devices
    places = batch_sharding(mesh).devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[places[device]] for device in held]))


def put_rows(local: np.ndarray, sharding: NamedSharding, shape: tuple[int, ...]) -> jax.Array:
    """The device array of this shape, lying as the sharding says, of which each process gives the rows that it holds."""
    if sharding.is_fully_addressable:
        return put(local, sharding)
    return jax.make_array_from_process_local_data(sharding, local, shape)


def weights_here(mesh: Mesh, weights: PyTree) -> tuple[Mesh, PyTree]:
    """A mesh of this process's devices, and weights that lie on a mesh of all of them whole on each; all processes must ask.

    Where there is one process, both as they are.
    """
    if mesh.is_multi_process:
        here = make_mesh(list(mesh.local_devices))
        whole = jax.jit(_as_it_is, out_shardings=replicated(mesh))(weights)
        return here, jax.tree.map(lambda leaf: jax.device_put(leaf.addressable_data(0), replicated(here)), whole)
    return mesh, weights


def _as_it_is(tree: PyTree) -> PyTree:
    return tree


@functools.cache
def _compiler_options(platform: str) -> dict[str, str] | None:
    """CPU_OPTIONS on a CPU whose jaxlib knows them, otherwise none."""
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda x: x + 1, compiler_options=CPU_OPTIONS).lower(jnp.zeros(())).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return CPU_OPTIONS
