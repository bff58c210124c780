"""How good the samples of a trained run are, by sampler and number of network evaluations.

    python benchmarks/sampler_quality.py --ckpt runs/demo                                   all samplers, seed 0
    python benchmarks/sampler_quality.py --ckpt runs/demo --samplers ddpm --evaluations 1000 --seeds 0 1 2 --minutes 5

The measure is the Frechet distance, in the features of a small classifier, between the drawn images and real ones; smaller is
better. The classifier learns from one half of the packaged garments, the other half is the reference, which the classifier
has never seen and the diffusion model may have. The distance is too large for few images, so that it compares sets of one
size: the row "real images" tells what as many real ones have.

Drawing and scoring are apart. Every set of images is a file in the folder of --out, which a later call finds and doesn't draw
again, so that a table can grow over several calls (--minutes ends one early); then all the sets there are scored.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm_jax.data.sources import load_packaged
from ddpm_jax.diffusion.samplers import SAMPLERS
from ddpm_jax.evaluation.classifier import TrainedClassifier, train_classifier
from ddpm_jax.evaluation.distance import frechet_distance
from ddpm_jax.images import save_npz
from ddpm_jax.inference import Model, load
from ddpm_jax.parallel import keep_compiled

EVALUATIONS = (5, 10, 20, 50, 100, 250)
BATCH_SIZE = 125


class Cell(NamedTuple):
    """One set of images; its file is named by these."""

    sampler: str
    spacing: str
    evaluations: int
    seed: int


def find_cells(options: argparse.Namespace, total_steps: int) -> list[Cell]:
    """The sets that were asked for: those whose evaluations are whole steps of the sampler, no more than total_steps."""
    return [
        Cell(sampler, spacing, evaluations, seed)
        for seed in options.seeds
        for evaluations in options.evaluations
        for sampler in options.samplers
        for spacing in options.spacings
        if evaluations % SAMPLERS[sampler].evaluations == 0 and evaluations <= total_steps * SAMPLERS[sampler].evaluations
    ]


def draw(model: Model, cells: list[Cell], num_images: int, folder: Path, deadline: float) -> None:
    """Draw the sets that are missing until the deadline; one that begins before it is finished."""
    for cell in cells:
        path = folder / ("_".join(map(str, cell)) + ".npz")
        if path.exists() or time.monotonic() > deadline:
            continue
        began = time.monotonic()
        steps = cell.evaluations // SAMPLERS[cell.sampler].evaluations
        settings = {"sampler": cell.sampler, "num_steps": steps, "spacing": cell.spacing, "batch_size": BATCH_SIZE}
        save_npz(path, model.sample(num_images, cell.seed, **settings))
        print(f"{path.stem}: {time.monotonic() - began:.0f} s", flush=True)


def score(folder: Path, num_images: int) -> dict[str, list[float]]:
    """Distances by "sampler_spacing_evaluations", one for each seed; those of real images under "real"."""
    image_set = load_packaged("fashion_mnist")
    order = np.random.default_rng(0).permutation(len(image_set.images))
    learned, held_out = np.split(order, 2)
    classifier = train_classifier(image_set.images[learned], image_set.labels[learned])
    right = classifier.classes(image_set.images[held_out]) == image_set.labels[held_out]
    print(f"the classifier knows {right.mean():.1%} of the held-out images")
    reference = classifier.features(image_set.images[held_out])
    parts = [np.arange(num_images * i, num_images * (i + 1)) for i in range(len(reference) // num_images)]
    distances = {"real": [frechet_distance(reference[part], np.delete(reference, part, axis=0)) for part in parts]}
    for path in sorted(folder.glob("*_*_*_*.npz")):
        name, _, _ = path.stem.rpartition("_")
        distances.setdefault(name, []).append(frechet_distance(_features(classifier, path, num_images), reference))
    return distances


def _features(classifier: TrainedClassifier, path: Path, num_images: int) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        images = arrays["images"]
    if len(images) != num_images:
        raise SystemExit(f"error: {path} holds {len(images)} images, not {num_images}: choose another --out, or remove it")
    return classifier.features(images)


def table(distances: dict[str, list[float]]) -> str:
    """Markdown: a row for each sampler and spacing, a column for each number of evaluations, mean +- deviation over seeds."""
    cells = {tuple(name.rsplit("_", 2)): values for name, values in distances.items() if name != "real"}
    columns = sorted({int(evaluations) for _, _, evaluations in cells})
    rows = sorted({(sampler, spacing) for sampler, spacing, _ in cells}, key=lambda row: (list(SAMPLERS).index(row[0]), row[1]))
    lines = [f"| sampler | spacing | {' | '.join(map(str, columns))} |", "|---|---|" + "---|" * len(columns)]
    for sampler, spacing in rows:
        row = [_text(cells.get((sampler, spacing, str(column)), [])) for column in columns]
        lines.append(f"| {sampler} | {spacing} | {' | '.join(row)} |")
    return "\n".join([*lines, "", f"real images: {_text(distances['real'])}"])


def _text(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}" if values else ""


def main() -> None:
    """Parse the command line, draw, score, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="run folder or checkpoint of the packaged garments")
    parser.add_argument("--out", type=Path, help="folder for the images and the table; sampler_quality in the run folder")
    parser.add_argument("--num-images", type=int, default=1000, help="images of a set")
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--spacings", nargs="+", default=["uniform"])
    parser.add_argument("--evaluations", nargs="+", type=int, default=EVALUATIONS, help="of the network, for each image")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="several tell the noise of repeated draws")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no further set is begun after so many")
    parser.add_argument("--draw-only", action="store_true", help="leave scoring to a later call")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    keep_compiled()
    model = load(options.ckpt)
    folder = options.out or options.ckpt / "sampler_quality"
    draw(model, find_cells(options, model.schedule.num_steps), options.num_images, folder, deadline)
    if options.draw_only:
        return
    distances = score(folder, options.num_images)
    result = {"step": model.step, "weights": model.weights, "num_images": options.num_images, "distances": distances}
    (folder / "sampler_quality.json").write_text(json.dumps(result, indent=1))
    (folder / "sampler_quality.md").write_text(table(distances) + "\n")
    print(table(distances))


if __name__ == "__main__":
    main()
