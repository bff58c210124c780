"""What programs of others need: one device, as that many copies of a network would take eight times as long, and operators."""

import sys

import jax
import pytest

from ddpm_jax import inference
from ddpm_jax.parallel import make_mesh


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "local_mesh", lambda: make_mesh(jax.local_devices()[:1]))
        yield


def supply_operators():
    """torchvision, which the peers import, may be built for another PyTorch, and can't be imported without its operators."""
    try:
        import torch
    except ImportError:
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")


supply_operators()
