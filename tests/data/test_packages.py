"""Folders of real images, from packages that the ordinary clients fetch: `make test-data`."""

import json
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from helpers import run_script
from PIL import Image, ImageDraw, ImageFont

from ddpm_jax import DataConfig
from ddpm_jax.data import load_images

pytestmark = pytest.mark.packages
NUM_RENDERED = 300


def fetch(folder, *command):
    """Run a package client in a folder; skip where there is none or it reaches nothing."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} here")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{' '.join(command)} took more than 300 seconds")
    if done.returncode != 0:
        pytest.skip(f"{' '.join(command)} failed: {(done.stderr.strip() or done.stdout.strip())[-200:]}")


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """Twitter's emoji of 64x64 pixels, in a folder for each category, and the categories' counts."""
    folder = tmp_path_factory.mktemp("emoji")
    fetch(folder, "npm", "pack", "--silent", "emoji-datasource-twitter")
    (archive,) = folder.glob("emoji-datasource-twitter-*.tgz")
    counts = {}
    with tarfile.open(archive) as files:
        for record in json.load(files.extractfile("package/emoji.json")):
            if record["has_img_twitter"]:
                category = record["category"]
                data = files.extractfile(f"package/img/twitter/64/{record['image']}").read()
                (folder / "set" / category).mkdir(parents=True, exist_ok=True)
                (folder / "set" / category / record["image"]).write_bytes(data)
                counts[category] = counts.get(category, 0) + 1
    return folder / "set", counts


def test_emoji_by_category(emoji):
    folder, counts = emoji
    image_set = load_images(DataConfig(source=str(folder), image_shape=(64, 64, 3)))
    assert image_set.class_names == tuple(sorted(counts)) and len(counts) > 8
    assert dict(zip(image_set.class_names, np.bincount(image_set.labels).tolist(), strict=True)) == counts
    images = image_set.images[:]
    modes = set()
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            modes.add(image.mode)
    assert len(images) == sum(counts.values()) > 1500 and modes & {"P", "RGBA"}
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]  # transparent in nearly all of them
    assert (corners == 255).mean() > 0.8
    assert images.std(axis=(1, 2, 3)).min() > 1  # no empty picture


def test_training_on_emoji_with_classes(emoji, tmp_path):
    folder, counts = emoji
    options = {"--workdir": tmp_path / "run", "--data.source": folder, "--model.num-classes": len(counts),
               "--model.channels": 16, "--model.num-groups": 4, "--train.num-steps": 6, "--train.steps-per-dispatch": 2,
               "--train.log-every-steps": 2, "--train.preview-images": 4, "--optim.warmup-steps": 1,
               "--sample.num-steps": 4}  # fmt: skip
    arguments = [value for pair in options.items() for value in pair]
    run_script("train.py", *arguments, "--data.image-shape", "32", "32", "3", cwd=tmp_path)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 6 and np.isfinite([record["loss"] for record in records]).all()


def test_a_font_rendered(tmp_path):
    fetch(tmp_path, "apt-get", "download", "fonts-noto-color-emoji")
    fetch(tmp_path, "dpkg-deb", "-x", next(tmp_path.glob("*.deb")).name, "font")
    font = ImageFont.truetype(str(next(tmp_path.glob("font/**/NotoColorEmoji.ttf"))), 109)  # its only size
    (tmp_path / "set").mkdir()
    for code in range(0x1F400, 0x1F400 + NUM_RENDERED):
        picture = Image.new("RGBA", (136, 128), (255, 255, 255, 0))
        ImageDraw.Draw(picture).text((0, 0), chr(code), font=font, embedded_color=True)
        picture.save(tmp_path / "set" / f"{code:x}.png")
    images = load_images(DataConfig(source=str(tmp_path / "set"), image_shape=(32, 32, 3))).images[:]
    assert images.shape == (NUM_RENDERED, 32, 32, 3)
    assert (images.std(axis=(1, 2, 3)) > 5).mean() > 0.95 and (images.std(axis=3) > 5).mean() > 0.1  # there, and in colour
