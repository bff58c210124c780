"""Ho et al.'s UNet in NumPy float64, written from the description of its blocks, with loops where the library has kernels.

A network is (parameters by name, settings); convolution weights are [3, 3, in, out], linear ones [in, out]. Nothing in
this file imports the library.
"""

import numpy as np
from reference import sinusoidal_embedding


def silu(x):
    return x / (1 + np.exp(-x))


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def convolution(p, x, stride=1, pad=((1, 1), (1, 1))):
    """Every output pixel is the sum over the window that starts at stride times its position."""
    kernel = p["kernel"]
    x = np.pad(x, ((0, 0), *pad, (0, 0)))
    height, width = ((size - 3) // stride + 1 for size in x.shape[1:3])
    out = np.empty((len(x), height, width, kernel.shape[3]))
    for i in range(height):
        for j in range(width):
            window = x[:, stride * i : stride * i + 3, stride * j : stride * j + 3]
            out[:, i, j] = np.tensordot(window, kernel, axes=3)
    return out + p["bias"]


def group_norm(p, x, num_groups, eps=1e-6):
    """With num_groups groups, or with the largest number that divides it and the channels."""
    channels = x.shape[-1]
    groups = max(n for n in range(1, num_groups + 1) if num_groups % n == 0 and channels % n == 0)
    out, size = np.empty(x.shape), channels // groups
    for first in range(0, channels, size):
        group = x[..., first : first + size]
        mean = group.mean(axis=(1, 2, 3), keepdims=True)
        variance = ((group - mean) ** 2).mean(axis=(1, 2, 3), keepdims=True)
        out[..., first : first + size] = (group - mean) / np.sqrt(variance + eps)
    return out * p["scale"] + p["bias"]


def attention(p, x, num_groups):
    """For each image and each position: the values of all positions, weighted by softmax(q . k / sqrt(C))."""
    h = group_norm(p["norm"], x, num_groups)
    out = np.empty(x.shape)
    for b, image in enumerate(h):
        rows = image.reshape(-1, image.shape[-1])
        q, k, v = (linear(p[name], rows) for name in ("query", "key", "value"))
        logits = q @ k.T / np.sqrt(rows.shape[1])
        weights = np.exp(logits - logits.max(1, keepdims=True))
        out[b] = linear(p["out"], weights / weights.sum(1, keepdims=True) @ v).reshape(image.shape)
    return x + out


def res_block(p, x, temb, num_groups):
    h = convolution(p["conv1"], silu(group_norm(p["norm1"], x, num_groups)))
    h = h + linear(p["time"], silu(temb))[:, None, None, :]
    h = convolution(p["conv2"], silu(group_norm(p["norm2"], h, num_groups)))
    return (linear(p["shortcut"], x) if "shortcut" in p else x) + h


def space_to_depth(x, block):
    """Channels of the block's pixels in reading order."""
    return np.concatenate([x[:, i::block, j::block] for i in range(block) for j in range(block)], axis=-1)


def depth_to_space(x, block):
    channels = x.shape[-1] // block**2
    out = np.empty((len(x), x.shape[1] * block, x.shape[2] * block, channels))
    for n in range(block**2):
        out[:, n // block :: block, n % block :: block] = x[..., n * channels : (n + 1) * channels]
    return out


def unet(params, xt, t, *, channels, levels, num_res_blocks, attention_resolutions, num_groups, labels=None, block=1):
    """Skips are pushed after conv_in, every block with its attention, and every downsampling; each up block pops one."""

    def step(name, h):
        h = res_block(params[name], h, temb, num_groups)
        if h.shape[1] in attention_resolutions:
            h = attention(params[f"{name}_attention"], h, num_groups)
        return h

    temb = linear(params["time2"], silu(linear(params["time1"], sinusoidal_embedding(t, channels))))
    if labels is not None:
        temb = temb + params["classes"]["embedding"][labels]

    h = convolution(params["conv_in"], space_to_depth(xt, block))
    skips = [h]
    for level in range(levels):
        for index in range(num_res_blocks):
            h = step(f"down{level}_block{index}", h)
            skips.append(h)
        if level < levels - 1:
            h = convolution(params[f"down{level}_downsample"], h, stride=2, pad=((0, 1), (0, 1)))
            skips.append(h)

    h = res_block(params["middle_block0"], h, temb, num_groups)
    h = attention(params["middle_attention"], h, num_groups)
    h = res_block(params["middle_block1"], h, temb, num_groups)

    for level in reversed(range(levels)):
        for index in range(num_res_blocks + 1):
            h = step(f"up{level}_block{index}", np.concatenate([h, skips.pop()], axis=-1))
        if level > 0:
            h = convolution(params[f"up{level}_upsample"], np.kron(h, np.ones((1, 2, 2, 1))))
    assert not skips

    h = silu(group_norm(params["norm_out"], h, num_groups))
    return depth_to_space(convolution(params["conv_out"], h), block)


def parameter_sizes(channels, multipliers, num_res_blocks, attention_sizes, size, image_channels):
    """Number of scalars of every weight and bias, block by block; `size` is the edge of the image in pixels."""
    sizes = []

    def conv(inputs, outputs, edge=3):
        sizes.extend([edge * edge * inputs * outputs, outputs])

    def norm(width):
        sizes.extend([width, width])

    def attend(width):
        norm(width)
        for _ in ("query", "key", "value", "out"):
            conv(width, width, 1)

    def res(inputs, outputs):
        norm(inputs)
        conv(inputs, outputs)
        conv(4 * channels, outputs, 1)
        norm(outputs)
        conv(outputs, outputs)
        if inputs != outputs:
            conv(inputs, outputs, 1)

    conv(channels, 4 * channels, 1)
    conv(4 * channels, 4 * channels, 1)
    conv(image_channels, channels)
    width, skips = channels, [channels]
    for level, multiplier in enumerate(multipliers):
        for _ in range(num_res_blocks):
            res(width, channels * multiplier)
            width = channels * multiplier
            if size in attention_sizes:
                attend(width)
            skips.append(width)
        if level < len(multipliers) - 1:
            conv(width, width)
            size //= 2
            skips.append(width)
    res(width, width)
    attend(width)
    res(width, width)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for _ in range(num_res_blocks + 1):
            res(width + skips.pop(), channels * multiplier)
            width = channels * multiplier
            if size in attention_sizes:
                attend(width)
        if level > 0:
            conv(width, width)
            size *= 2
    norm(width)
    conv(width, image_channels)
    return sizes
