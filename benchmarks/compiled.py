"""What a training step is made of once it is compiled: operations, bytes, memory, and what its devices tell each other.

A program can be compiled for devices that are not there: for a TPU slice with the `libtpu` wheel and no TPU, for any number
of CPU devices without anything. Nothing is executed. `scaling.py --compile` writes the figures to compiled.json. Compiled for
CPU devices, the program is the one that accelerators get as far as operations and exchanges go; how much of it passes through
memory depends on the compiler, and is left out.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from ddpm_jax.checkpoint import abstract_like
from ddpm_jax.config import Config, load_config
from ddpm_jax.data.pipeline import Batch
from ddpm_jax.inference import make_network
from ddpm_jax.models import num_params
from ddpm_jax.parallel import batch_sharding, compile_for, make_mesh, replicated
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.state import init_state, state_shardings
from ddpm_jax.training.step import make_train_step, make_train_steps
from ddpm_jax.validation import config_schedule

CONFIGS = Path(__file__).parents[1] / "configs"
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16} | {f"{kind}{bits}": bits for kind in "suf" for bits in (4, 8, 16, 32, 64)}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between the devices of a group."""

    kind: str
    """One of KINDS."""
    bytes: int
    """Size of the whole array, or of all that it exchanges together: before it is scattered, or after it is gathered."""
    group: int
    """Devices that take part."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step to compile."""

    config: str
    """File in configs/."""
    per_chip: int
    """Images of a step on each device."""
    fsdp: int = 1
    """Devices among which the state is split."""
    dtype: str = "float32"
    """Compute dtype."""


PROGRAMS = {
    "default": Program("fashion_mnist.py", 16),
    "cifar10": Program("cifar10.py", 16),
    "cifar10, large batch": Program("cifar10.py", 128, dtype="bfloat16"),
    "256x256": Program("lsun256.py", 8, dtype="bfloat16"),
    "256x256, fsdp 4": Program("lsun256.py", 8, fsdp=4, dtype="bfloat16"),
}


def collectives(hlo: str, devices: int) -> list[Collective]:
    """The exchanges in the text of a compiled program for that many devices.

    One in two halves (-start and -done) counts once, and so does one in the body of a loop.
    """
    found = []
    pattern = rf"= (?P<shapes>.+?) (?P<kind>{'|'.join(KINDS)})(?P<half>-start)?\("
    for line in hlo.splitlines():
        match = re.search(pattern, line)
        if match is None:
            continue
        kind, size, group = match["kind"], _num_bytes(match["shapes"]), _group_size(line, devices)
        if match["half"] and kind in ("all-gather", "collective-permute"):  # its result holds the operands too
            size = size * group // (group + 1) if kind == "all-gather" else size // 2
        found.append(Collective(kind, size * group if kind == "reduce-scatter" else size, group))
    return found


def measure(program: Program, topology: str) -> dict[str, Any]:
    """The figures of a training step compiled for a topology: "cpu:8", or one of libtpu's such as "v5e:2x4"."""
    platform, _, number = topology.partition(":")
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", int(number))
        devices = jax.devices()
    else:
        devices = list(topologies.get_topology_desc(topology, platform="tpu").devices)
    values = {"train.batch_size": program.per_chip * len(devices), "train.fsdp": program.fsdp, "model.dtype": program.dtype}
    config = load_config(CONFIGS / program.config, values | {"data.image_shape": _image_shape(program.config)})
    compiled = _compile(config, devices)
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    text = compiled.as_text()
    return {
        **dataclasses.asdict(program), "topology": topology, "devices": len(devices), "jax": jax.__version__,
        "parameters": _num_params(config), "flops": cost["flops"],
        "memory_bytes": None if platform == "cpu" else cost["bytes accessed"], "state_bytes": memory.argument_size_in_bytes,
        "collectives": [{**dataclasses.asdict(c), "count": n} for c, n in _grouped(collectives(text, len(devices)))],
    }  # fmt: skip


def _compile(config: Config, devices: list[jax.Device]) -> Any:
    """The training step as the loop compiles it, for one step in a dispatch; on CPU devices too as accelerators get it."""
    assert config.data.image_shape is not None
    mesh, unet = make_mesh(devices, config.train.fsdp), make_network(config)
    optimizer = make_optimizer(config.optim, config.train.num_steps)
    # The network has layers of its own for CPUs, and looks at where the program is traced.
    with mock.patch("jax.default_backend", return_value="tpu"):
        shapes = jax.eval_shape(lambda: init_state(config, unet, optimizer))
        shardings = state_shardings(mesh, shapes)
        step = make_train_steps(make_train_step(config, config_schedule(config), unet, optimizer, mesh), 1)
        step = compile_for(mesh, step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
        images = (1, config.train.batch_size, *config.data.image_shape)
        batch = Batch(jax.ShapeDtypeStruct(images, jnp.uint8, sharding=batch_sharding(mesh, axis=1)))
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
        lowered = step.lower(abstract_like(shapes, shardings), batch, count)
    if devices[0].platform == "cpu":  # whose compiler would gather once for both passes and keep the arrays, unlike others
        return lowered.compile({"xla_disable_hlo_passes": "cse_barrier_expander"})
    return lowered.compile()


def _num_params(config: Config) -> int:
    unet, optimizer = make_network(config), make_optimizer(config.optim, config.train.num_steps)
    return num_params(jax.eval_shape(lambda: init_state(config, unet, optimizer)).params)


def _image_shape(config: str) -> tuple[int, int, int]:
    return load_config(CONFIGS / config).data.image_shape or (28, 28, 1)


def _num_bytes(shapes: str) -> int:
    """Bytes of a shape such as f32[3,3,128]{2,1,0:T(8,128)}, or of a tuple of them."""
    arrays = re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", shapes)
    return sum(BITS[dtype] * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in arrays if dtype in BITS) // 8


def _group_size(line: str, devices: int) -> int:
    """Devices of a group, from {{0,1},{2,3}}, [2,2]<=[4] or mesh['data'=2,'fsdp'=4] {'fsdp'}; all where none are given."""
    listed = re.search(r"replica_groups=\{\{([0-9,]+)\}", line)
    counted = re.search(r"replica_groups=\[[0-9]+,([0-9]+)\]", line)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    if named:
        lengths = dict(axis.split("=") for axis in named[1].split(","))
        return math.prod(int(lengths[name]) for name in named[2].split(","))
    return int(counted[1]) if counted else devices


def _grouped(found: Iterable[Collective]) -> list[tuple[Collective, int]]:
    """Exchanges of one kind and group as one with the sum of their bytes, and how many they are."""
    found = list(found)
    heads = sorted({(c.kind, c.group) for c in found})
    return [
        (Collective(kind, sum(sizes), group), len(sizes))
        for kind, group in heads
        for sizes in [[c.bytes for c in found if (c.kind, c.group) == (kind, group)]]
    ]
