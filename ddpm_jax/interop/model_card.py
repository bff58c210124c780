"""The README.md of an exported folder: what the model is, what it was trained with, how it measured, and the licences."""

import json
from pathlib import Path
from typing import Any

from ddpm_jax.config import Config, to_json
from ddpm_jax.json_lines import read_records
from ddpm_jax.models import num_params

DATA_LICENCES = {"fashion_mnist": "Fashion-MNIST, Zalando SE, MIT licence"}

USE_DIFFUSERS = """```python
import diffusers

pipeline = diffusers.DDPMPipeline.from_pretrained("FOLDER")
image = pipeline(num_inference_steps={steps}).images[0]
```

or, in JAX, `ddpm_jax.load("FOLDER")`."""

WITH_CLASSES = """The network has {classes} classes, which `DDPMPipeline` doesn't ask for: call
`pipeline.unet(xt, t, class_labels=labels)` in a loop over `pipeline.scheduler.timesteps`. Leaving the class open, as `ddpm_jax`
can for guidance, is not in this format."""

USE_SAMPLER = """```
python load_sampler.py 16 images.npz
```

draws 16 images, {sampler}; see `load_sampler.py`, which needs JAX and flatbuffers."""


def model_card(config: Config, params: Any, weights: str, step: int, run: Path | None, kind: str) -> str:
    """The card's text.

    Args:
        config: of the model.
        params: its weights.
        weights: which of the run's weights they are.
        step: training steps behind them; 0 stands for a number that isn't known.
        run: the run folder, of whose evaluations.jsonl the newest numbers of these weights are quoted.
        kind: "diffusers" or "stablehlo".
    """
    height, width, channels = config.data.image_shape or (0, 0, 0)
    steps = f"{step:,} steps" if step else "a number of steps that isn't recorded"
    shown = {name: value for name, value in to_json(config).items() if name != "data.class_names"}
    library = "diffusers" if kind == "diffusers" else "jax"
    tags = "ddpm" if config.model.num_classes else "ddpm, unconditional-image-generation"
    licence = DATA_LICENCES.get(config.data.source, "that of its source, see there")
    parts = [
        f"---\nlibrary_name: {library}\ntags: [{tags}]\n---",
        f"# A diffusion model of {height}x{width}x{channels} images",
        f"Denoising diffusion (Ho et al. 2020), {num_params(params):,} parameters, trained with ddpm_jax for {steps}; the "
        f"weights are `{weights}`.",
        "## Use",
        _use(config, kind),
        "## Data",
        f"`{config.data.source}`" + (f", split `{config.data.split}`" if ":" in config.data.source else "") + ".",
        "## Measured",
        _measured(run, weights, step),
        "## Licence",
        f"Data: {licence}. Weights: not stated; whoever publishes them states it here.",
        "## Config",
        f"```json\n{json.dumps(shown, indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _use(config: Config, kind: str) -> str:
    settings = config.sample
    steps = settings.num_steps or config.diffusion.num_steps
    if kind == "stablehlo":
        return USE_SAMPLER.format(sampler=f"{steps} steps of {settings.sampler}, {settings.batch_size} at once")
    text = USE_DIFFUSERS.format(steps=config.diffusion.num_steps)
    classes = config.model.num_classes
    return text if classes is None else f"{text}\n\n{WITH_CLASSES.format(classes=classes)}"


def _measured(run: Path | None, weights: str, step: int) -> str:
    """The newest numbers of each metric that evaluate.py has found for these weights, without their long lists."""
    found: dict[str, Any] = {}
    for result in [] if run is None else read_records(run / "evaluations.jsonl"):
        if (result.get("weights"), result.get("step")) == (weights, step):
            found |= {name: value for name, value in result.items() if isinstance(value, dict)}  # those of metrics
    if not found:
        return "Nothing yet: `python evaluate.py --ckpt RUN` measures it."
    return f"```json\n{json.dumps(_short(found), indent=2)}\n```"


def _short(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: _short(value) for name, value in values.items() if not (isinstance(value, list) and len(value) > 8)}
