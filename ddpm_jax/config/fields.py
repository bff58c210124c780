"""The fields of a config: frozen dataclasses, a section each, with defaults and what each of them means."""

import dataclasses
from typing import Literal

from ddpm_jax.diffusion.losses import Loss, LossWeight
from ddpm_jax.diffusion.process import Prediction, Variance
from ddpm_jax.diffusion.schedule import ScheduleKind, Spacing

Framing = Literal["center", "random", "pad"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The images to learn from."""

    source: str = "fashion_mnist"
    """Packaged set ("fashion_mnist"), the path of an .npy or .npz file, of a folder with images, arrays or what prepare.py has
    made, "tfds:NAME" (or just the name) for TensorFlow Datasets, or "hf:NAME" for Hugging Face datasets."""
    split: str = "train"
    """Which part of a set of TensorFlow Datasets or Hugging Face, such as "train", "test" or "train[:90%]"."""
    image_shape: tuple[int, int, int] | None = None
    """Height, width and channels; taken from the data where not given. Images of other sizes are framed to it."""
    framing: Framing = "center"
    """How an image is brought to image_shape: the largest piece of its shape from the middle, one of 0.8 to 1 times that size
    from a random place, or the whole image on a white background; then resized."""
    flip: bool = False
    """Whether each image is mirrored left to right with probability 1/2."""
    sampling: Literal["natural", "balanced"] = "natural"
    """Whether each image is seen once an epoch, or each class equally often."""
    class_names: tuple[str, ...] = ()
    """Names of the classes; taken from the data where not given."""
    max_unusable: float = 0.01
    """Share of files in a folder that may be unusable, and are skipped; if there are more, training doesn't start."""
    num_workers: int = 2
    """Threads that read and decode images ahead of the devices."""
    device_megabytes: int = 512
    """Sets up to this size are kept on the device whole; larger ones are sent batch by batch."""


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process and what the network predicts of it."""

    schedule: ScheduleKind = "linear"
    """Noise schedule."""
    num_steps: int = 1000
    """T, the number of noising steps."""
    beta_start: float = 1e-4
    """First beta of the linear and scaled_linear schedules, for T = 1000; scaled by 1000/T."""
    beta_end: float = 0.02
    """Last beta of the same."""
    prediction: Prediction = "eps"
    """What the network predicts: the noise, the clean image, or v = sqrt(ab) eps - sqrt(1 - ab) x0."""
    variance: Variance = "fixed_large"
    """Variance of the reverse steps of the ddpm sampler: beta, that of the posterior, or one between them that is learned."""
    zero_terminal_snr: bool = False
    """Whether the schedule is rescaled so that the last xt is nothing but noise; for prediction v and x0."""
    loss: Loss = "simple"
    """The squared error, the variational bound, or their sum, in which the bound trains the learned variance alone."""
    loss_weight: LossWeight = "constant"
    """Weight of the squared error by t: 1, or what makes min(snr, min_snr_gamma) or max(snr, 1) the weight of x0's error."""
    min_snr_gamma: float = 5.0
    """Limit of the weight min_snr."""
    timesteps: Literal["uniform", "stratified", "importance"] = "uniform"
    """How training draws t: independently, one from each of B equal parts of 0 ... T-1, or large losses more often."""
    label_dropout: float = 0.1
    """Share of training images whose class is left open, so that the network can be guided; of no effect without classes."""


ModelStyle = Literal["ddpm", "improved"]
Threshold = Literal["static", "dynamic", "none"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The UNet; the defaults are Ho et al.'s CIFAR-10 network."""

    channels: int = 128
    """Channels of the first level."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, as multiples of the first; each level halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks of each level on the way down; one more on the way up."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Feature map heights, in pixels, that have attention after every block."""
    middle_attention: bool = True
    """Whether the middle has attention, whatever its height."""
    num_heads: int = 1
    """Heads of attention."""
    head_channels: int | None = None
    """Channels of each head, so that wider levels have more of them; None: num_heads at all levels."""
    dropout: float = 0.1
    """Dropout rate of the residual blocks."""
    num_groups: int = 32
    """Groups of GroupNorm."""
    num_classes: int | None = None
    """Number of classes to condition on; None for an unconditional network."""
    style: ModelStyle = "ddpm"
    """Details of the network as in Ho et al. (2020), or in Nichol & Dhariwal (2021): how blocks are told the time, padding,
    GroupNorm's epsilon, initial zeros. The next five change single details, for networks of other programs."""
    cos_first: bool | None = None
    """Whether the embedding of t has its cosines in front of its sines; None, here and below: as in the style."""
    frequency_shift: int | None = None
    """Taken from half the embedding's channels in the exponents of its frequencies."""
    scale_and_shift: bool | None = None
    """Whether time scales and shifts what a block's second norm gives, instead of being added in front of it."""
    pad_all_sides: bool | None = None
    """Whether convolutions of stride 2 pad on all sides, instead of on the right and at the bottom only."""
    norm_eps: float | None = None
    """GroupNorm's epsilon."""
    space_to_depth: int = 1
    """Edge of the patches of pixels that the network sees as one pixel; 1 for Ho et al.'s networks."""
    remat: bool = False
    """Whether blocks are recomputed in the backward pass, which saves memory and costs time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters, statistics and the loss stay float32."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimiser and the moving average of the weights."""

    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or Adam with decoupled weight decay."""
    learning_rate: float = 2e-4
    """Learning rate after warm-up."""
    b1: float = 0.9
    """Decay of Adam's first moment."""
    b2: float = 0.999
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Weight decay of adamw."""
    warmup_steps: int = 5000
    """Steps over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or falling to 0 at train.num_steps along a half cosine."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; longer ones are scaled down. None: no limit."""
    accumulate_steps: int = 1
    """Parts into which a batch is split, one after the other, to save memory; their gradients are averaged."""
    ema_decay: float = 0.9999
    """Decay of the exponential moving average (EMA) of the weights."""
    ema_warmup: bool = True
    """Whether the decay of update n is at most (1 + n) / (10 + n), so that early averages forget the initial weights."""
    ema_decays: tuple[float, ...] = ()
    """Decays of further averages like it, with the same warm-up, to choose from afterwards as decay:VALUE."""
    ema_lengths: tuple[float, ...] = ()
    """Lengths of power function averages, relative to the run: two such as 0.05 0.1, with train.snapshot_every_steps, let any
    other length be put together after training as ema:LENGTH."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    batch_size: int = 128
    """Images of one step, over all devices."""
    num_steps: int = 800_000
    """Steps to train in all, counted from the first start of the run."""
    fsdp: int = 1
    """Devices among which weights, moving averages and the optimiser's state are split, for networks too large for one: fully
    sharded data parallelism. It divides the number of devices, and should divide that of each host."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is NaN or infinite does: it ends the run, or its update is left out and counted."""
    storage_timeout: int = 600
    """Seconds that reading or writing a checkpoint may take; after them the run ends with an error, as the storage hangs."""
    steps_per_dispatch: int = 1
    """Steps that the device makes in one go where nothing is written between them; pays where a step takes milliseconds, or
    on a CPU. Ctrl-C takes effect after them."""
    log_every_steps: int = 100
    """Steps between two lines of metrics, which hold the mean over these steps; where a run went on in between, over those made
    since."""
    checkpoint_every_steps: int = 5000
    """Steps between two checkpoints; the last step has one too."""
    keep_last: int = 3
    """How many of the newest checkpoints are kept."""
    keep_every_steps: int | None = 100_000
    """Checkpoints at multiples of this are kept for good; None: none are."""
    snapshot_every_steps: int | None = None
    """Steps between two snapshots of the averages of optim.ema_lengths, all kept for good; None: none are made."""
    preview_every_steps: int | None = 10_000
    """Steps between two grids of samples from the same noise; None: none are made."""
    preview_images: int = 64
    """Images of such a grid."""
    evaluate_every_steps: int | None = None
    """Steps between two scores of drawn images, in scores.jsonl and TensorBoard; None: none are made."""
    evaluate_metrics: str = "fd_efficientnet_lite0"
    """Which scores, separated by commas: evaluate.py's metrics of drawn images."""
    evaluate_images: int = 1000
    """Images drawn for a score."""
    evaluate_reference_images: int = 10_000
    """Real images that they are compared with, at most."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How samples are drawn unless sample.py is told otherwise."""

    sampler: str = "ddim"
    """Sampling algorithm; `python sample.py --list-samplers` shows them."""
    num_steps: int | None = 100
    """Steps from noise to image, 1 to T; None: T. Most samplers evaluate the network once for each."""
    eta: float = 0.0
    """Noise of ddim: 0 is deterministic, 1 as random as ddpm."""
    spacing: Spacing = "uniform"
    """Which timesteps are visited."""
    threshold: Threshold = "static"
    """What is done with an x0 outside [-1, 1]: clipped, clipped at a high quantile of the image and scaled, or nothing."""
    guidance: float = 1.0
    """Scale of classifier-free guidance: 1 is the class as learnt, above 1 more strongly so, 0 no class. Other than 1 it costs
    a second evaluation of the network in each step."""
    guidance_interval: tuple[float, float] | None = None
    """Guidance acts where low < sigma <= high, sigma^2 = (1 - ab) / ab; None: at every noise level."""
    guidance_rescale: float = 0.0
    """How far guided outputs are brought back to the standard deviation of unguided ones, 0 to 1."""
    batch_size: int = 64
    """Images that each device draws at once; has no influence on the images."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    seed: int = 0
    """Seed of everything random in the run: weights, data order, noise, dropout."""
