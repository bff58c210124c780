"""How long scoring many drawn images takes, from the start of evaluate.py to its numbers, with nothing kept from before.

    python benchmarks/scoring.py --ckpt runs/demo                      10,000 images of the run; drawing them takes longer
    python benchmarks/scoring.py --ckpt runs/demo --num-images 1000

First the images are drawn with the run's own settings into samples-N.npz in --out, and kept. Then evaluate.py scores them in a
process of its own beside the data of the run, with an empty cache: what is timed are imports, compilation, the features of
the drawn and of the real images, and the distances.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speed import processor

from ddpm_jax.checkpoint import run_folder
from ddpm_jax.evaluation.samples import Drawing, SampleOptions
from ddpm_jax.images import save_npz
from ddpm_jax.inference import load
from ddpm_jax.parallel import keep_compiled

EVALUATE = Path(__file__).parents[1] / "evaluate.py"
METRICS = ("fd_efficientnet_lite0", "kid_efficientnet_lite0")
SEED = 0


def draw(ckpt: Path, num_images: int, out: Path) -> dict[str, Any]:
    """Draw the images unless they are there; how, and how long it took."""
    images, facts = out / f"samples-{num_images}.npz", out / f"samples-{num_images}.json"
    if not facts.exists():
        model, began = load(ckpt), time.perf_counter()
        save_npz(images, model.sample(num_images, SEED))
        seconds = time.perf_counter() - began
        drawing = Drawing.of(model, run_folder(ckpt), SampleOptions(), SEED, None)
        about = drawing.about() | {"seconds": seconds, "data": model.config.data.source}
        facts.write_text(json.dumps(about, indent=1))
    return json.loads(facts.read_text()) | {"file": str(images)}


def score(images: str, data: str) -> tuple[float, dict[str, Any]]:
    """Seconds that evaluate.py takes, and what it prints."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, EVALUATE, "--images", images, "--data", data, "--metrics", ",".join(METRICS)]
        began = time.perf_counter()
        done = subprocess.run(
            command, env=os.environ | {"XDG_CACHE_HOME": cache}, stdout=subprocess.PIPE, text=True, check=True
        )
        return time.perf_counter() - began, json.loads(done.stdout)


def table(drawn: Mapping[str, Any], seconds: float, found: Mapping[str, Any]) -> str:
    """The numbers as a Markdown table, and the protocol underneath."""
    lines = ["| metric | value |", "|---|---|"]
    lines += [f"| {name} | {found[name]['value']:.6g} |" for name in METRICS]
    protocol = found[METRICS[0]]["protocol"]
    images, reference = protocol["images"], protocol["reference"]
    how = f"{drawn['sampler']} of {drawn['num_steps']} steps, {drawn['spacing']} spacing, eta {drawn['eta']:g}"
    shape = "x".join(map(str, reference["image_shape"]))
    lines += [
        "",
        f"- scored in {seconds:.0f} s: imports, compilation, both sets' features, distances; drawn in {drawn['seconds']:.0f} s",
        f"- {images['num_images']} images of the {drawn['weights']} weights of step {drawn['step']}, seed {drawn['seed']}",
        f"- {how}; {drawn['rounding']}",
        f"- beside {reference['num_images']} images of {reference['data']} ({reference['split']}), {shape}",
        f"- features of {protocol['network']} (SHA-256 {protocol['network_sha256']}), {protocol['resize']}",
        f"- {os.cpu_count()} cores, {processor()}, {platform.system()}, Python {platform.python_version()}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, draw, score, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="run folder, or one of its checkpoints/STEP folders")
    parser.add_argument("--num-images", type=int, default=10_000, help="images to draw and to score")
    parser.add_argument("--out", type=Path, default=Path("runs/scoring"), help="folder for the images and the table")
    options = parser.parse_args()
    keep_compiled()
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = draw(options.ckpt, options.num_images, options.out)
    seconds, found = score(drawn["file"], drawn["data"])
    (options.out / "scoring.json").write_text(json.dumps({"drawn": drawn, "seconds": seconds} | found, indent=1))
    (options.out / "scoring.md").write_text(table(drawn, seconds, found) + "\n")
    print(table(drawn, seconds, found))


if __name__ == "__main__":
    main()
