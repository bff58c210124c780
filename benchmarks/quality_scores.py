"""Scores, table and plot of quality.py: from sets of images in files to numbers that can be compared."""

import functools
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from marks import label_of, write_json
from speed import processor

from ddpm_jax.config import DataConfig
from ddpm_jax.data import ImageSet, load_images
from ddpm_jax.evaluation.features import collect, set_parts
from ddpm_jax.evaluation.networks import Outputs
from ddpm_jax.evaluation.samples import SampleOptions, wanted_outputs
from ddpm_jax.evaluation.scores import Reference, score
from ddpm_jax.files import cache_folder

CONFIGURED = "configured"  # begins the label of our run with the config's own number of steps
METRICS = {"fd_efficientnet_lite0": "FD", "kid_efficientnet_lite0": "KID"}
NETWORK = "efficientnet_lite0"


def image_file(folder: Path, label: str, num_images: int, steps: int) -> Path:
    """Where the images of a mark lie."""
    return folder / f"{label}-{num_images}x{steps}.npz"


class Scorer:
    """Scores of sets of images beside all the packaged ones."""

    def __init__(self) -> None:
        self._wanted = wanted_outputs(list(METRICS), SampleOptions())
        self._real = self._features(load_images(DataConfig()).images)
        network = self._wanted[0].network
        self.protocol = {
            "network": network.name, "network_sha256": network.sha256, "resize": network.resize,
            "reference": f"the {len(self._real['pool'])} images that were learned from",
        }  # fmt: skip

    def of_images(self, images: np.ndarray) -> dict[str, float]:
        """Scores of uint8 images [N, 28, 28, 1]."""
        return self._scores(self._features(images), self._real)

    def of_real(self, num_images: int) -> dict[str, float]:
        """Scores of so many real images beside all the others."""
        order = np.random.default_rng(0).permutation(len(self._real["pool"]))
        chosen, others = order[:num_images], order[num_images:]
        return self._scores(*({"pool": self._real["pool"][rows]} for rows in (chosen, others)))

    def _features(self, images: np.ndarray) -> Outputs:
        parts = set_parts(ImageSet(images), len(images))
        return collect(parts, len(images), self._wanted, cache_folder("features"))[NETWORK]

    @staticmethod
    def _scores(drawn: Outputs, real: Outputs) -> dict[str, float]:
        reference = Reference({}, {NETWORK: real}, {})
        return {name: float(score(name, drawn, reference)["value"]) for name in METRICS}


def score_all(
    out: Path, labels: Mapping[str, Sequence[str]], num_images: int, steps: int, scorer: Callable[[], Scorer]
) -> dict[str, Any]:
    """Score the images of each label and as many real ones, into quality.json; what is there is not scored again.

    Args:
        out: the folder of quality.json, and of the contestants' folders.
        labels: of the images by contestant.
        num_images: images of each label.
        steps: that they were drawn with.
        scorer: makes the scorer, or gives the one that it made; it is not called where there is nothing to score.

    Returns:
        What quality.json holds, with those rows alone.
    """
    path = out / "quality.json"
    kept = json.loads(path.read_text()) if path.exists() else {"rows": []}
    machine = {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()}
    settings = {"num_images": num_images, "sampling_steps": steps}
    rows = {tuple(row[name] for name in ("contestant", "label", *settings)): row for row in kept["rows"]}
    result = {"machine": machine} | kept
    wanted = {("real images", "", num_images, steps): None}
    wanted |= {(name, label, num_images, steps): out / name for name in labels for label in labels[name]}
    for key, folder in wanted.items():
        if key in rows:
            continue
        row: dict[str, Any] = dict(zip(("contestant", "label", *settings), key, strict=True))
        if folder is None:
            row |= scorer().of_real(num_images)
        else:
            with np.load(image_file(folder, key[1], num_images, steps), allow_pickle=False) as arrays:
                row |= scorer().of_images(arrays["images"])
            row |= json.loads((folder / f"{key[1]}.json").read_text())
        rows[key] = row
        result |= {"protocol": scorer().protocol, "rows": list(rows.values())}
        write_json(path, result)
    return result | {"rows": [rows[key] for key in wanted]}


def title(row: dict[str, Any]) -> str:
    """What tables and plots call a row's contestant."""
    return f"{row['contestant']} as configured" if row["label"].startswith(CONFIGURED) else row["contestant"]


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table, and the protocol underneath."""
    lines = ["| contestant | parameters | minutes | start s | steps | images seen | FD | 1000 KID |", "|" + "---|" * 8]
    for row in result["rows"]:
        fd, kid = (row[name] for name in METRICS)
        cells = ["real images", "", "", "", "", ""]
        if "steps" in row:
            planned = f" of {row['planned_steps']}" if row.get("planned_steps", row["steps"]) > row["steps"] else ""
            cells = [title(row), f"{row['parameters']:,}", f"{row['seconds'] / 60:.2f}", f"{row['start_seconds']:.0f}"]
            cells += [f"{row['steps']:,}{planned}", f"{row['images']:,}"]
        lines.append(f"| {' | '.join(cells)} | {fd:.3f} | {1e3 * kid:.3f} |")
    return "\n".join([*lines, "", *protocol_lines(result)])


def protocol_lines(result: dict[str, Any]) -> list[str]:
    """What the numbers were made with."""
    row, machine, used = result["rows"][0], result["machine"], result["protocol"]
    versions: dict[str, str] = functools.reduce(lambda a, b: a | b, (row.get("versions", {}) for row in result["rows"]), {})
    return [
        f"- {row['num_images']} images of each, DDIM of {row['sampling_steps']} steps, seed 0, rounded to uint8, 28x28x1",
        f"- features of {used['network']} (SHA-256 {used['network_sha256'][:16]}...), {used['resize']}",
        f"- beside {used['reference']}",
        f"- {machine['cores']} cores, {machine['processor']}, {machine['system']}",
        f"- {', '.join(f'{name} {version}' for name, version in versions.items())}",
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Both scores over the minutes of training, on logarithmic scales."""
    figure = matplotlib.figure.Figure(figsize=(11, 4.6), layout="constrained")
    rows = [row for row in result["rows"] if "steps" in row]
    names = list(dict.fromkeys(title(row) for row in rows))
    ticks = sorted({row["minutes"] for row in rows})
    for axes, (metric, short) in zip(figure.subplots(1, 2), METRICS.items(), strict=True):
        for number, name in enumerate(names):
            some = sorted((row for row in rows if title(row) == name), key=lambda row: row["seconds"])
            style = "*" if title(some[0]) != some[0]["contestant"] else "o-"
            axes.plot(
                [row["seconds"] / 60 for row in some], [row[metric] for row in some], style, color=f"C{number}", label=name,
                markersize=10 if style == "*" else 5,
            )  # fmt: skip
        real = next(row[metric] for row in result["rows"] if "steps" not in row)
        if real > 0:  # the unbiased estimate may fall below
            axes.axhline(real, color="black", linestyle=":", label="real images")
        axes.set(xscale="log", yscale="log", xlabel="minutes of training, imports and compilation included", ylabel=short)
        axes.set_xticks(ticks, [label_of(tick) for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
