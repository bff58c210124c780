"""The networks and batches that the benchmarks run; known to every worker, so it imports neither JAX nor PyTorch."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """One network with the batch sizes that it is timed at."""

    title: str
    """What tables call it."""
    image_shape: tuple[int, int, int]
    """Height, width and channels of the images."""
    channels: int
    """Channels of the first level."""
    multipliers: tuple[int, ...]
    """Channels of each level, as multiples of the first."""
    num_res_blocks: int
    """Residual blocks of a level on the way down."""
    attention_resolutions: tuple[int, ...]
    """Heights of feature maps with attention after every block; the middle always has it."""
    num_groups: int
    """Groups of GroupNorm."""
    dropout: float
    """Dropout rate."""
    batch_size: int
    """Images of a training step, and of a timed forward pass."""
    space_to_depth: int = 1
    """Edge of the patches that become one pixel in front of the network."""
    steps_per_dispatch: int = 10
    """Training steps that ddpm_jax makes in one go."""
    learning_rate: float = 2e-4
    """Adam's learning rate."""

    @property
    def network_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what the first convolution sees."""
        height, width, channels = self.image_shape
        return height // self.space_to_depth, width // self.space_to_depth, channels * self.space_to_depth**2

    @property
    def attention_levels(self) -> tuple[bool, ...]:
        """For each level, whether its blocks have attention."""
        height = self.network_shape[0]
        return tuple(height // 2**level in self.attention_resolutions for level in range(len(self.multipliers)))


CASES = {
    "small": Case("32x32x1, 32 x (1,2,2) channels", (32, 32, 1), 32, (1, 2, 2), 2, (16,), 32, 0.1, 64),
    "cifar": Case("DDPM CIFAR-10", (32, 32, 3), 128, (1, 2, 2, 2), 2, (16,), 32, 0.1, 8),
    "default": Case(
        "default config",
        (28, 28, 1),
        32,
        (1, 2),
        1,
        (),
        8,
        0.0,
        16,
        space_to_depth=2,
        learning_rate=3e-3,
    ),
}
DDIM_STEPS = 50
