"""How the PyTorch contestants of quality.py train and draw; never imported beside JAX.

python benchmarks/worker_quality_torch.py train PEER FOLDER IMAGES BEGAN MINUTES...
python benchmarks/worker_quality_torch.py draw PEER FOLDER NUM_IMAGES STEPS SUFFIX MINUTES...

IMAGES is a folder of PNG files of SIDE x SIDE pixels, BEGAN the time.time() at which the process was started. Training writes
MINUTES.pt and MINUTES.json into FOLDER, drawing MINUTES-SUFFIX.npz with uint8 "images" [N, H, W, 1], their padding cut off.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from marks import Marks, label_of
from PIL import Image

SIDE, PADDING = 32, 2
BATCH_SIZE = 50  # of drawing

Save = Callable[[str], None]
Draw = Callable[[int], torch.Tensor]
"""Number of images -> images in [0, 1], [N, 1, SIDE, SIDE]."""


def make_lucidrains(sampling_steps: int) -> Any:
    """Network and process of the README's example, for one channel."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    network = Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=1, flash_attn=True)
    return GaussianDiffusion(network, image_size=SIDE, timesteps=1000, sampling_timesteps=sampling_steps)


def train_lucidrains(folder: Path, images: Path, began: float, minutes: list[float]) -> None:
    """Train with the settings of the README's example, in float32, unmirrored, and without pictures and scores on the way."""
    import denoising_diffusion_pytorch.version
    from denoising_diffusion_pytorch import Trainer

    never = 700_000
    trainer = Trainer(
        make_lucidrains(250), str(images), train_batch_size=32, train_lr=8e-5, train_num_steps=never,
        gradient_accumulate_every=2, ema_decay=0.995, amp=False, calculate_fid=False, augment_horizontal_flip=False,
        save_and_sample_every=never + 1, results_folder=str(folder),
    )  # fmt: skip

    def save(label: str) -> None:
        torch.save(trainer.ema.ema_model.state_dict(), folder / f"{label}.pt")

    versions = {"denoising-diffusion-pytorch": denoising_diffusion_pytorch.version.__version__}
    marks = Marks(folder, minutes, began, 2 * 32, about(trainer.model, versions), save)
    update = trainer.ema.update

    def update_and_mark() -> None:  # the last thing that the trainer does in each step
        update()
        if marks.step():
            trainer.train_num_steps = trainer.step

    trainer.ema.update = update_and_mark
    trainer.train()


def draw_lucidrains(weights: Path, steps: int) -> Draw:
    """Its own DDIM, from the averaged weights."""
    process = make_lucidrains(steps)
    process.load_state_dict(torch.load(weights, weights_only=True))
    return process.eval().sample


def make_diffusers() -> Any:
    """The tutorial's network, for one channel and SIDE x SIDE pixels."""
    from diffusers import UNet2DModel

    down, attention = "DownBlock2D", "AttnDownBlock2D"
    up, up_attention = "UpBlock2D", "AttnUpBlock2D"
    return UNet2DModel(
        sample_size=SIDE, in_channels=1, out_channels=1, layers_per_block=2,
        block_out_channels=(128, 128, 256, 256, 512, 512), down_block_types=(down, down, down, down, attention, down),
        up_block_types=(up, up_attention, up, up, up, up),
    )  # fmt: skip


def train_diffusers(folder: Path, images: Path, began: float, minutes: list[float]) -> None:
    """Train with the tutorial's settings, in float32, unmirrored, from images in memory, and without pictures on the way."""
    import diffusers
    from diffusers.optimization import get_cosine_schedule_with_warmup

    batch_size, num_epochs = 16, 50
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(images.glob("*.png"))])
    data = torch.from_numpy(pixels)[:, None].float() / 127.5 - 1
    loader = torch.utils.data.DataLoader(data, batch_size=batch_size, shuffle=True)  # type: ignore[arg-type]
    network, scheduler = make_diffusers(), diffusers.DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 500, num_epochs * len(loader))

    def save(label: str) -> None:
        torch.save(network.state_dict(), folder / f"{label}.pt")

    marks = Marks(folder, minutes, began, batch_size, about(network, {"diffusers": diffusers.__version__}), save)
    for _ in range(num_epochs):
        for x0 in loader:
            eps, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),))
            loss = F.mse_loss(network(scheduler.add_noise(x0, eps, t), t).sample, eps)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss.item()
            if marks.step():
                return
    sys.exit(f"{num_epochs} epochs were over before the last mark")


def draw_diffusers(weights: Path, steps: int) -> Draw:
    """Its DDIMPipeline with the tutorial's process, from the weights as they are: there is no average of them."""
    from diffusers import DDIMPipeline, DDPMScheduler

    network = make_diffusers()
    network.load_state_dict(torch.load(weights, weights_only=True))
    pipeline = DDIMPipeline(network.eval(), DDPMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)

    def draw(count: int) -> torch.Tensor:
        images = pipeline(batch_size=count, num_inference_steps=steps, eta=0.0, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    return draw


def about(network: torch.nn.Module, versions: dict[str, str]) -> dict[str, Any]:
    """Facts of a contestant for its files."""
    count = sum(p.numel() for p in network.parameters())
    return {"parameters": count, "versions": versions | {"torch": torch.__version__}}


def draw_all(
    make: Callable[[Path, int], Draw], folder: Path, num_images: int, steps: int, suffix: str, minutes: list[float]
) -> None:
    """Draw the images of each mark, the same noise for all of them."""
    for label in map(label_of, minutes):
        torch.manual_seed(0)
        draw, pieces = make(folder / f"{label}.pt", steps), []
        for start in range(0, num_images, BATCH_SIZE):
            with torch.inference_mode():
                x = draw(min(BATCH_SIZE, num_images - start))
            pieces.append((x.clamp(0, 1) * 255).round().to(torch.uint8)[..., PADDING:-PADDING, PADDING:-PADDING])
            print(f"{label}: image {start + len(x)}/{num_images}", file=sys.stderr, flush=True)
        path = folder / f"{label}-{suffix}.npz"
        temporary = path.with_name(f".{path.name}")
        np.savez(temporary, images=torch.cat(pieces).permute(0, 2, 3, 1).numpy())
        temporary.replace(path)


TRAIN = {"lucidrains": train_lucidrains, "diffusers": train_diffusers}
DRAW = {"lucidrains": draw_lucidrains, "diffusers": draw_diffusers}


def main(task: str, peer: str, folder: str, *rest: str) -> None:
    """Train or draw."""
    torch.manual_seed(0)
    if task == "train":
        images, began, *minutes = rest
        TRAIN[peer](Path(folder), Path(images), float(began), [float(each) for each in minutes])
    else:
        num_images, steps, suffix, *minutes = rest
        draw_all(DRAW[peer], Path(folder), int(num_images), int(steps), suffix, [float(each) for each in minutes])


if __name__ == "__main__":
    main(*sys.argv[1:])
