"""What the PyTorch peers do when it is their turn; run by speed.py, never imported beside JAX.

python benchmarks/worker_torch.py PEER CASE TASK BATCH
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import CASES, DDIM_STEPS, Case
from turns import serve

Run = Callable[[], int]


class PatchNet(torch.nn.Module):
    """diffusers' UNet behind the same pixel shuffle as the network it is compared with."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        height, _, channels = case.network_shape
        down = ["AttnDownBlock2D" if attention else "DownBlock2D" for attention in case.attention_levels]
        self.block = case.space_to_depth
        self.unet = UNet2DModel(
            sample_size=height, in_channels=channels, out_channels=channels, layers_per_block=case.num_res_blocks,
            block_out_channels=tuple(case.channels * m for m in case.multipliers), down_block_types=tuple(down),
            up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)), norm_num_groups=case.num_groups,
            norm_eps=1e-6, dropout=case.dropout, attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False,
            freq_shift=1,
        )  # fmt: skip

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The network's output for noisy images [B, C, H, W]."""
        if self.block == 1:
            return self.unet(x, t).sample
        return F.pixel_shuffle(self.unet(F.pixel_unshuffle(x, self.block), t).sample, self.block)


def make_network(peer: str, case: Case) -> torch.nn.Module:
    """The peer's network, in training mode."""
    if peer == "lucidrains":
        from denoising_diffusion_pytorch import Unet

        return Unet(case.channels, dim_mults=case.multipliers, channels=case.image_shape[2], dropout=case.dropout)
    network = PatchNet(case)
    if peer == "diffusers-channels-last":
        network = network.to(memory_format=torch.channels_last)
    return torch.compile(network) if peer == "diffusers-compile" else network


def make_batch(peer: str, case: Case, batch_size: int) -> torch.Tensor:
    """Noise of the shape of a batch of images, in the memory format that the peer works in."""
    height, width, channels = case.image_shape
    x = torch.randn(batch_size, channels, height, width)
    return x.to(memory_format=torch.channels_last) if peer == "diffusers-channels-last" else x


def make_train(peer: str, case: Case, batch_size: int) -> tuple[Run, int]:
    """One training step: noise, loss, gradient, clip, Adam, moving average; and the number of parameters."""
    network = make_network(peer, case)
    parameters = list(network.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=case.learning_rate, fused=True)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
    x0 = make_batch(peer, case, batch_size)

    def run() -> int:
        t = torch.randint(0, 1000, (batch_size,))
        eps = torch.randn_like(x0)
        ab = alpha_bar[t][:, None, None, None]
        loss = F.mse_loss(network(ab.sqrt() * x0 + (1 - ab).sqrt() * eps, t), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - 0.999)
        loss.item()
        return batch_size

    return run, sum(p.numel() for p in parameters)


def make_forward(peer: str, case: Case, batch_size: int) -> tuple[Run, int]:
    """One denoising pass."""
    network = make_network(peer, case).eval()
    x, t = make_batch(peer, case, batch_size), torch.full((batch_size,), 500)

    def run() -> int:
        with torch.inference_mode():
            network(x, t)
        return batch_size

    return run, sum(p.numel() for p in network.parameters())


def make_ddim(peer: str, case: Case, batch_size: int) -> tuple[Run, int]:
    """DDIM from noise to images, by the peer's own sampler."""
    network = make_network(peer, case).eval()
    count = sum(p.numel() for p in network.parameters())
    height, width, channels = case.image_shape
    if peer == "lucidrains":
        from denoising_diffusion_pytorch import GaussianDiffusion, denoising_diffusion_pytorch

        denoising_diffusion_pytorch.tqdm = lambda steps, **_: steps
        process = GaussianDiffusion(network, image_size=height, timesteps=1000, sampling_timesteps=DDIM_STEPS)

        def run_lucidrains() -> int:
            with torch.inference_mode():
                process.ddim_sample((batch_size, channels, height, width))
            return batch_size

        return run_lucidrains, count
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(DDIM_STEPS)

    def run() -> int:
        with torch.inference_mode():
            x = make_batch(peer, case, batch_size)
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t.expand(batch_size)), t, x).prev_sample
            ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return batch_size

    return run, count


def main(peer: str, case_name: str, task: str, batch: str) -> None:
    """Build what the task needs and take turns."""
    torch.manual_seed(0)
    case, batch_size = CASES[case_name], int(batch)
    if peer == "lucidrains" and case.space_to_depth > 1:
        sys.exit("lucidrains' network has no space-to-depth")
    make = {"train": make_train, "forward": make_forward, "ddim": make_ddim}[task]
    run, num_params = make(peer, case, batch_size)
    versions = {name: __import__(name).__version__ for name in ("torch", *(["diffusers"] if "diffusers" in peer else []))}
    serve(run, num_params, versions)


if __name__ == "__main__":
    main(*sys.argv[1:])
