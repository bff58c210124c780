"""Weak scaling on paper: how much of its speed a chip keeps when there are 8 ... 4096 of them, each with the same batch.

    python benchmarks/scaling.py                                 the table, from compiled.json; no accelerator, no libtpu
    python benchmarks/scaling.py --plot docs/scaling.png
    python benchmarks/scaling.py --compile v5e:2x4               compiled.json again; needs `pip install libtpu`
    python benchmarks/scaling.py --utilisation 0.2 --links 1.0   other assumptions

Time of a step's computation on one chip, the roofline of Williams et al. (2009), doi 10.1145/1498765.1498785:

    C = max(F / (u P), M / H)         F operations, M bytes of memory traffic of the compiled step; P, H the chip's peaks

Time of an exchange of V bytes between n chips, m = min(n, D) of each fast domain and h = n / m domains: along rings inside, in
halves along trees across, each chip with the m-th part (Patarasuk & Yuan 2009, doi 10.1016/j.jpdc.2008.09.002, for the
bound 2 (n - 1)/n V, which rings reach; Cho et al. 2017, arXiv 1708.02188, for the hierarchy):

    A = k [(m - 1)/m V / (e W)  +  (h - 1)/h (V / m) / (e X)  +  s(m) a  +  log2(h) b]

k is 2 for an all-reduce, 1 for an all-gather or a reduce-scatter. W and X are the bytes a second that a chip sends inside and
across; a mesh of sides that don't close to rings has half of W. s(m) is the sum of a torus's sides, less one each, or m - 1 at
a switch, and a and b what one of its steps costs whatever is sent. Together, and with what the backward pass (2/3 of C) hides,

    efficiency = C / (C + sum A)    and, if the compiler lets the exchanges overlap,    C / (C + max(0, sum A - 2/3 C))

u, the share of the peak that the arithmetic reaches, and e, the share of a link's, are assumptions: options. A high u is the
hard case, since a slow chip hides its network. Not in it: reading images, checkpoints, waiting for the slowest chip.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.figure

FIGURES = Path(__file__).with_suffix("").with_name("compiled.json")
COUNTS = tuple(2**power for power in range(3, 13))
BACKWARD = 2 / 3  # of a step: two products for each one of the forward pass


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip and its networks; bytes and operations a second, seconds."""

    name: str
    peak: dict[str, float]
    """Operations by the compute dtype, at JAX's default precision: float32 arrays multiply as bfloat16 on a TPU and as TF32
    on a GPU (docs.jax.dev, jax.lax.Precision)."""
    memory: float
    """Bytes between the chip and its memory."""
    domain: int
    """Chips that the fast network joins, at most."""
    fast: float
    """Bytes that a chip sends over all its fast links together."""
    slow: float
    """Bytes that a chip sends out of its domain: its share of the host's network cards."""
    fast_step: float
    slow_step: float
    axes: int = 0
    """Dimensions of the torus; 0: a switch."""
    closed: int = 1
    """Sides of a torus from which they are rings; shorter ones are open."""


# What a maker says of both directions together is halved here. Steps: "about 1 us" a hop of ICI, the scaling book's section on
# sharding (jax-ml.github.io/scaling-book/sharding, secondary); NCCL's own constants for Simple over NVLink, 3.4 us, and over a
# network, 14 us (github.com/NVIDIA/nccl, src/graph/tuning.cc, by way of a port of it: secondary); between slices no figure is
# published, and 50 us are assumed. When sides close: the scaling book's "How to Think About TPUs" (secondary).
CHIPS = {
    chip.name: chip
    for chip in (
        # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 819 GBps, ICI 400 GBps both ways, 256 chips, 6.4 Tbps a pod of DCN.
        Chip("TPU v5e", {"bfloat16": 197e12, "float32": 197e12}, 819e9, 256, 200e9, 3.125e9, 1e-6, 50e-6, axes=2, closed=16),
        # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 2765 GBps, ICI 1200 GBps both ways, DCN 50 Gbps a chip; up to 6144.
        Chip("TPU v5p", {"bfloat16": 459e12, "float32": 459e12}, 2765e9, 4096, 600e9, 6.25e9, 1e-6, 50e-6, axes=3, closed=4),
        # www.nvidia.com/en-us/data-center/h100: SXM 1979 TFLOPS in bfloat16 and 989 in TF32 with sparsity, half of it without,
        # 3.35 TB/s; developer.nvidia.com/blog/introducing-nvidia-hgx-h100...: NVLink 900 GB/s both ways, 8 at a switch; one
        # 400 Gb/s card for each (docs.nvidia.com/dgx-superpod/reference-architecture-scalable-infrastructure-h100).
        Chip("H100", {"bfloat16": 989e12, "float32": 494.5e12}, 3.35e12, 8, 450e9, 50e9, 3.4e-6, 14e-6),
    )
}


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What no data sheet says."""

    utilisation: float = 0.5
    """u: share of the peak that the arithmetic reaches."""
    links: float = 0.8
    """e: share of a link's bytes a second that an exchange reaches; 370 of 450 GB/s were measured over NVLink (the scaling
    book's "How to Think About GPUs", secondary)."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step on n chips; seconds."""

    compute: float
    exchange: float

    @property
    def efficiency(self) -> float:
        """Share of one chip's speed that each keeps if nothing overlaps."""
        return self.compute / (self.compute + self.exchange)

    @property
    def overlapped(self) -> float:
        """The same if the backward pass hides what it can."""
        return self.compute / (self.compute + max(0.0, self.exchange - BACKWARD * self.compute))


def predict(figures: dict[str, Any], chip: Chip, chips: int, assumed: Assumptions) -> Prediction:
    """A compiled program's step on that many chips, each with the batch that it was compiled for."""
    arithmetic = figures["flops"] / (assumed.utilisation * chip.peak[figures["dtype"]])
    exchange = 0.0
    for c in figures["collectives"]:
        spread = spread_of(c["group"], figures["devices"], figures["fsdp"], chips)
        exchange += exchange_seconds(c["kind"], c["bytes"], c["count"], chip, spread, assumed.links)
    return Prediction(max(arithmetic, (figures["memory_bytes"] or 0.0) / chip.memory), exchange)


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the chips of an exchange lie."""

    chips: int
    """Chips that exchange with each other."""
    stride: int
    """Chips from one to the next of them: as many such groups share the links."""


def spread_of(group: int, devices: int, fsdp: int, chips: int) -> Spread:
    """A group of the program compiled for `devices`, as it is on more: the fsdp groups stay, the others grow."""
    if group == devices or chips == 1:
        return Spread(chips, 1)
    if group == fsdp:
        return Spread(fsdp, 1)
    assert group * fsdp == devices, f"a group of {group} of {devices} devices is neither data nor fsdp"
    return Spread(max(1, chips // fsdp), fsdp)


def exchange_seconds(kind: str, size: float, count: int, chip: Chip, spread: Spread, links: float = 1.0) -> float:
    """A of the module's docstring: `count` exchanges of `size` bytes together."""
    inside = min(spread.chips, max(1, chip.domain // spread.stride))
    across = spread.chips // inside
    span = min(spread.chips * spread.stride, chip.domain)
    rounds = 2 if kind == "all-reduce" else 1
    sent = (inside - 1) / inside * size / (links * chip.fast * openness(chip, span))
    sent += (across - 1) / across * size / inside / (links * chip.slow)
    steps = num_steps(chip, span) * chip.fast_step * (inside > 1) + math.ceil(math.log2(across)) * chip.slow_step
    return rounds * (sent + count * steps)


def sides(chip: Chip, chips: int) -> list[int]:
    """Sides of the torus of that many chips, a power of 2, as equal as can be: 32 -> 4 x 8 or 2 x 4 x 4."""
    power = round(math.log2(chips))
    return [2 ** ((power + axis) // chip.axes) for axis in range(chip.axes)]


def openness(chip: Chip, chips: int) -> float:
    """Share of the fast links that a torus of that many chips can use: half where a side is no ring."""
    return 1.0 if chip.axes == 0 or min(sides(chip, chips)) >= chip.closed else 0.5


def num_steps(chip: Chip, chips: int) -> int:
    """Steps from the first to the last chip of a domain along its rings."""
    return chips - 1 if chip.axes == 0 else sum(side - 1 for side in sides(chip, chips))


def table(programs: dict[str, dict[str, Any]], assumed: Assumptions) -> str:
    """The predictions as a Markdown table; efficiencies without overlap, and with it."""
    shown = (8, 64, 256, 1024, 4096)
    lines = [
        f"| program | chip | images a chip | compute ms | exchanged MB | {' | '.join(f'{n} chips' for n in shown)} |",
        "|---|---|---|---|---|" + "---|" * len(shown),
    ]
    for name, figures in programs.items():
        size = sum(c["bytes"] for c in figures["collectives"]) / 1e6
        for chip in CHIPS.values():
            row = [predict(figures, chip, n, assumed) for n in shown]
            cells = [f"{p.efficiency:.3f}, {p.overlapped:.3f}" for p in row]
            start = f"| {name} | {chip.name} | {figures['per_chip']} | {1e3 * row[0].compute:.3g} | {size:.3g} |"
            lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(programs: dict[str, dict[str, Any]], assumed: Assumptions, path: Path) -> None:
    """Efficiency over the number of chips, one panel for each program; dashed: with overlap."""
    figure = matplotlib.figure.Figure(figsize=(3.4 * len(programs), 3.6), layout="constrained")
    panels = figure.subplots(1, len(programs), sharey=True, squeeze=False)[0]
    for panel, (name, figures) in zip(panels, programs.items(), strict=True):
        for number, chip in enumerate(CHIPS.values()):
            row = [predict(figures, chip, n, assumed) for n in COUNTS]
            panel.plot(COUNTS, [p.efficiency for p in row], "o-", ms=3, color=f"C{number}", label=chip.name)
            panel.plot(COUNTS, [p.overlapped for p in row], "--", color=f"C{number}")
        panel.set(
            xscale="log", xlabel="chips", ylim=(0, 1.03), title=f"{name}\n{figures['per_chip']} a chip, {figures['dtype']}"
        )
        panel.set_xticks(COUNTS[::3], [str(n) for n in COUNTS[::3]])
        panel.set_xticks([], minor=True)
        panel.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("efficiency (dashed: with overlap)")
    panels[-1].legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse the command line; compile, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", metavar="TOPOLOGY", help="cpu:8, or one of libtpu's such as v5e:2x4")
    parser.add_argument("--programs", nargs="+", help="which of compiled.py's programs to compile; by default all")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw the plot")
    parser.add_argument("--utilisation", type=float, default=Assumptions.utilisation, help="u (%(default)s)")
    parser.add_argument("--links", type=float, default=Assumptions.links, help="e (%(default)s)")
    options = parser.parse_args()
    programs = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if options.compile:
        from compiled import PROGRAMS, measure  # not needed for the table

        for name in options.programs or PROGRAMS:
            programs[name] = measure(PROGRAMS[name], options.compile)
            ordered = {name: programs[name] for name in PROGRAMS if name in programs}
            FIGURES.write_text(json.dumps(ordered, indent=1) + "\n")
        programs = ordered
    assumed = Assumptions(options.utilisation, options.links)
    print(table(programs, assumed))
    if options.plot:
        plot(programs, assumed, options.plot)


if __name__ == "__main__":
    main()
