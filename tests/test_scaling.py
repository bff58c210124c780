"""benchmarks/scaling.py: its formula against arithmetic by hand, its bytes against programs whose exchanges are known."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, load_script
from jax.sharding import PartitionSpec as P

from ddpm_jax.parallel import make_mesh

scaling, compiled = load_script("benchmarks/scaling.py"), load_script("benchmarks/compiled.py")
FIGURES = json.loads((ROOT / "benchmarks/compiled.json").read_text())
V5E, V5P, H100 = (scaling.CHIPS[name] for name in ("TPU v5e", "TPU v5p", "H100"))
PLAIN = {
    "flops": 1e12, "memory_bytes": 0.0, "dtype": "bfloat16", "devices": 8, "fsdp": 1,
    "collectives": [{"kind": "all-reduce", "bytes": 100e6, "group": 8, "count": 1}],
}  # fmt: skip
ALONE = scaling.Spread(1, 1)


def seconds(kind, size, chip, chips, count=1):
    return scaling.exchange_seconds(kind, size, count, chip, scaling.Spread(chips, 1))


@pytest.mark.parametrize(
    ("chip", "chips", "expected"),
    [
        # 16 x 16 closed: 200 GB/s out of each chip; 2 x (15 + 15) hops of 1 us.
        (V5E, 256, 2 * (255 / 256 * 100e6 / 200e9 + 30e-6)),
        # 2 x 4 open: half of that; (1 + 3) hops.
        (V5E, 8, 2 * (7 / 8 * 100e6 / 100e9 + 4e-6)),
        # Four slices of 256: a 256th of the bytes over 3.125 GB/s each, two halvings of 50 us.
        (V5E, 1024, 2 * (255 / 256 * 100e6 / 200e9 + 30e-6 + 3 / 4 * 100e6 / 256 / 3.125e9 + 100e-6)),
        # 4 x 4 x 4 closed, 600 GB/s; 9 hops.
        (V5P, 64, 2 * (63 / 64 * 100e6 / 600e9 + 9e-6)),
        # One switch of eight, seven steps.
        (H100, 8, 2 * (7 / 8 * 100e6 / 450e9 + 7 * 3.4e-6)),
        # Two of them: an eighth of the bytes out of each GPU's card.
        (H100, 16, 2 * (7 / 8 * 100e6 / 450e9 + 7 * 3.4e-6 + 1 / 2 * 100e6 / 8 / 50e9 + 14e-6)),
    ],
)
def test_an_all_reduce_takes_what_is_worked_out_by_hand(chip, chips, expected):
    assert seconds("all-reduce", 100e6, chip, chips) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
@pytest.mark.parametrize("chip", [V5E, V5P, H100])
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(kind, chip):
    assert seconds("all-reduce", 1e9, chip, 512) == pytest.approx(2 * seconds(kind, 1e9, chip, 512), rel=1e-12)


@pytest.mark.parametrize("chip", scaling.CHIPS.values())
def test_one_chip_exchanges_nothing(chip):
    assert scaling.exchange_seconds("all-reduce", 1e9, 5, chip, ALONE) == 0
    assert scaling.predict(PLAIN, chip, 1, scaling.Assumptions()).efficiency == 1


@pytest.mark.parametrize("chips", scaling.COUNTS)
@pytest.mark.parametrize("chip", scaling.CHIPS.values())
def test_networks_without_limits_cost_nothing(chip, chips):
    ideal = dataclasses.replace(chip, fast=math.inf, slow=math.inf, fast_step=0.0, slow_step=0.0)
    assert scaling.predict(PLAIN, ideal, chips, scaling.Assumptions()).efficiency == 1


@pytest.mark.parametrize("chip", scaling.CHIPS.values())
def test_tiny_exchanges_cost_their_steps_each(chip):
    one, ten = (scaling.exchange_seconds("all-reduce", 0, n, chip, scaling.Spread(4096, 1)) for n in (1, 10))
    assert ten == pytest.approx(10 * one) and one > 0


def test_computation_is_bound_by_arithmetic_or_by_memory():
    assumed = scaling.Assumptions(utilisation=0.5)
    assert scaling.predict(PLAIN, H100, 8, assumed).compute == pytest.approx(1e12 / (0.5 * 989e12))
    assert scaling.predict(PLAIN | {"dtype": "float32"}, H100, 8, assumed).compute == pytest.approx(1e12 / (0.5 * 494.5e12))
    assert scaling.predict(PLAIN | {"memory_bytes": 1e12}, H100, 8, assumed).compute == pytest.approx(1e12 / 3.35e12)


@pytest.mark.parametrize(
    ("compute", "exchange", "plain", "overlapped"), [(3.0, 1.0, 0.75, 1.0), (3.0, 3.0, 0.5, 0.75), (3.0, 0.0, 1.0, 1.0)]
)
def test_the_backward_pass_hides_two_thirds_of_the_computation(compute, exchange, plain, overlapped):
    prediction = scaling.Prediction(compute, exchange)
    assert prediction.efficiency == pytest.approx(plain)
    assert prediction.overlapped == pytest.approx(overlapped)


def test_fsdp_groups_stay_where_they_are_and_the_others_grow():
    assert scaling.spread_of(4, 8, 4, 1024) == scaling.Spread(4, 1)
    assert scaling.spread_of(2, 8, 4, 1024) == scaling.Spread(256, 4)
    assert scaling.spread_of(8, 8, 4, 1024) == scaling.Spread(1024, 1)


def test_groups_that_lie_across_a_domain_leave_it_with_their_share():
    # Every 4th GPU of 64: two of a group in each of eight nodes, so that a half of the bytes leaves through each card.
    expected = 2 * (1 / 2 * 1e8 / 450e9 + 7 * 3.4e-6 + 7 / 8 * 1e8 / 2 / 50e9 + 3 * 14e-6)
    assert scaling.exchange_seconds("all-reduce", 1e8, 1, H100, scaling.Spread(16, 4)) == pytest.approx(expected)


@pytest.mark.parametrize("chips", scaling.COUNTS)
@pytest.mark.parametrize("chip", [V5E, V5P])
def test_a_torus_has_all_chips_and_is_as_square_as_can_be(chip, chips):
    lengths = scaling.sides(chip, chips)
    assert len(lengths) == chip.axes
    assert math.prod(lengths) == chips
    assert max(lengths) <= 2 * min(lengths)


HLO = [
    # Results in tuples and TPU layouts; groups as lists and as counts; none: all devices.
    ("%a = f32[128]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add", ("all-reduce", 512, 2)),
    ("%a = (f32[3,3,4,32]{3,2,1,0:T(4,128)S(1)}, f32[]{:T(128)}) all-reduce(%x, %y), to_apply=%add", ("all-reduce", 4612, 4)),
    (
        "ROOT %a = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=[2,2]<=[4], dimensions={0}",
        ("all-gather", 256, 2),
    ),
    ("%a = f32[2,16]{1,0} reduce-scatter(%x), replica_groups=[1,4]<=[4], dimensions={0}", ("reduce-scatter", 512, 4)),
    ("%a = (f32[2,16]{1,0}, f32[8,16]{1,0}) all-gather-start(%x), replica_groups=[1,4]<=[4]", ("all-gather", 512, 4)),
    ("%a = f32[128]{0} all-reduce-start(%x), replica_groups={}, to_apply=%add", ("all-reduce", 512, 4)),
    # Second halves, uses and names of exchanges are none.
    ("%d = f32[128]{0} all-reduce-done(%all-reduce-start.1)", None),
    ("%g = f32[64]{0} get-tuple-element(%all-reduce.102), index=3", None),
    ("%f = f32[64]{0} fusion(%all-gather.1, %p), kind=kLoop, calls=%all-reduce_fusion", None),
]


@pytest.mark.parametrize(("line", "expected"), HLO)
def test_exchanges_are_read_from_a_programs_text(line, expected):
    found = [(c.kind, c.bytes, c.group) for c in compiled.collectives(line, devices=4)]
    assert found == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("function", "out", "expected"),
    [
        (lambda x: jax.lax.psum(x, ("data", "fsdp")), P(), ("all-reduce", 4 * 16 * 5, 8)),
        (lambda x: jax.lax.psum(x, "data"), P("fsdp"), ("all-reduce", 4 * 16 * 5, 2)),
        (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P("data"), ("all-gather", 4 * 4 * 16 * 5, 4)),
        (lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), P(("data", "fsdp")), ("reduce-scatter", 4 * 16 * 5, 4)),
    ],
)
def test_exchanges_of_a_real_program_have_the_bytes_of_its_arrays(function, out, expected):
    mesh = make_mesh(fsdp=4)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=out, check_vma=False)
    text = jax.jit(mapped).lower(jnp.zeros((8 * 16, 5))).compile().as_text()
    assert [(c.kind, c.bytes, c.group) for c in compiled.collectives(text, devices=8)] == [expected]


PARAMETERS = {"fashion_mnist.py": 652_772, "cifar10.py": 35_746_307, "lsun256.py": 113_673_219}


@pytest.mark.parametrize("name", FIGURES)
def test_the_gradient_is_what_the_devices_exchange(name):
    figures = FIGURES[name]
    count = PARAMETERS[figures["config"]]
    assert figures["parameters"] == count
    sizes = dict.fromkeys(compiled.KINDS, 0)
    for c in figures["collectives"]:
        sizes[c["kind"]] += c["bytes"]
    if figures["fsdp"] == 1:
        # A gradient that two arrays share, as biases of layers that are added to each other do, is sent once.
        assert sizes.pop("all-reduce") == pytest.approx(4 * count, rel=0.005)
        assert set(sizes.values()) == {0}
    else:
        assert sizes["reduce-scatter"] == pytest.approx(4 * count, rel=0.01)
        assert sizes["all-gather"] == pytest.approx(2 * 4 * count, rel=0.01)  # forward and backward


@pytest.mark.parametrize("name", [name for name in FIGURES if name.startswith("cifar10")])
def test_operations_are_three_forward_passes(name):
    # 12.1 GFLOP for the forward pass of an image is PyTorch's count (docs/performance.md).
    assert FIGURES[name]["flops"] == pytest.approx(3 * 12.1e9 * FIGURES[name]["per_chip"], rel=0.1)


def test_the_documents_table_is_the_one_that_is_printed():
    assert scaling.table(FIGURES, scaling.Assumptions()) in (ROOT / "docs/scaling.md").read_text()
