"""What PyTorch's DataLoader reads when it is its turn; run by data.py, never imported beside JAX.

python benchmarks/worker_data_torch.py CANDIDATE FOLDER SIZE BATCH WORKERS

torch-pillow: ImageFolder, Resize and CenterCrop on Pillow images (bilinear with antialiasing), PILToTensor.
torch-tensor: the same, but decoded by torchvision.io and resized as tensors.
A turn is whole epochs, from nothing read ahead to the last batch: uint8 [BATCH, 3, SIZE, SIZE].
"""

import platform
import sys

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from turns import serve


def read_tensor(path: str) -> torch.Tensor:
    """The image of a file, uint8 [3, H, W]."""
    return decode_image(path, ImageReadMode.RGB)


def main(candidate: str, folder: str, size: str, batch_size: str, workers: str) -> None:
    """Build what reads and take turns."""
    frame = [v2.Resize(int(size), antialias=True), v2.CenterCrop(int(size))]
    if candidate == "torch-tensor":
        images = ImageFolder(folder, v2.Compose(frame), loader=read_tensor)
    else:
        images = ImageFolder(folder, v2.Compose([*frame, v2.PILToTensor()]))
    loader = DataLoader(
        images, int(batch_size), shuffle=True, drop_last=True, num_workers=int(workers), persistent_workers=True
    )

    def run() -> int:
        return sum(len(batch) for batch, _ in loader)

    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    serve(run, 0, {"Python": platform.python_version()} | versions)


if __name__ == "__main__":
    main(*sys.argv[1:])
