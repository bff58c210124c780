"""The UNets in NumPy float64, written from the description of their blocks, with loops where the library has kernels.

`improved` is Nichol & Dhariwal's instead of Ho et al.'s: time scales and shifts what the second norm gives, GroupNorm's epsilon
is 1e-5, strided convolutions are padded on all sides, and the time embedding is cos before sin at frequencies of its own.

A network is (parameters by name, settings); convolution weights are [3, 3, in, out], linear ones [in, out]. Nothing in
this file imports the library.
"""

import math

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


def softmax(row):
    """exp(row) over its sum."""
    powers = [math.exp(value - max(row)) for value in row]
    return np.array(powers) / math.fsum(powers)


def attention(p, x, num_groups, num_heads=1, eps=1e-6):
    """Each head h has the channels h D ... (h + 1) D - 1: the values of all positions, weighted by softmax(q . k / sqrt(D))."""
    h = group_norm(p["norm"], x, num_groups, eps)
    out = np.empty(x.shape)
    for b, image in enumerate(h):
        rows = image.reshape(-1, image.shape[-1])
        q, k, v = (linear(p[name], rows) for name in ("query", "key", "value"))
        width = rows.shape[1] // num_heads
        heads = np.empty(rows.shape)
        for head in range(num_heads):
            own = slice(head * width, (head + 1) * width)
            for i in range(len(rows)):
                weights = softmax([q[i, own] @ k[j, own] / math.sqrt(width) for j in range(len(rows))])
                heads[i, own] = weights @ v[:, own]
        out[b] = linear(p["out"], heads).reshape(image.shape)
    return x + out


def res_block(p, x, temb, num_groups, improved=False):
    eps = 1e-5 if improved else 1e-6
    h = convolution(p["conv1"], silu(group_norm(p["norm1"], x, num_groups, eps)))
    time = linear(p["time"], silu(temb))[:, None, None, :]
    if improved:
        scale, shift = time[..., : h.shape[-1]], time[..., h.shape[-1] :]
        h = group_norm(p["norm2"], h, num_groups, eps)
        h = h + scale * h + shift
    else:
        h = group_norm(p["norm2"], h + time, num_groups, eps)
    h = convolution(p["conv2"], silu(h))
    return (linear(p["shortcut"], x) if "shortcut" in p else x) + h


def cosine_embedding(t, dim):
    """cos, then sin, of t / 10000^(k / half); an odd dim ends in a zero."""
    half = dim // 2
    rows = [[f(step / 10000.0 ** (k / half)) for f in (math.cos, math.sin) for k in range(half)] for step in t]
    return np.array([row + [0.0] * (dim % 2) for row in rows])


def space_to_depth(x, block):
    """Channels of the block's pixels in reading order."""
    return np.concatenate([x[:, i::block, j::block] for i in range(block) for j in range(block)], axis=-1)


def depth_to_space(x, block):
    channels = x.shape[-1] // block**2
    out = np.empty((len(x), x.shape[1] * block, x.shape[2] * block, channels))
    for n in range(block**2):
        out[:, n // block :: block, n % block :: block] = x[..., n * channels : (n + 1) * channels]
    return out


def unet(
    params, xt, t, *, channels, levels, num_res_blocks, attention_resolutions, num_groups, labels=None, block=1,
    improved=False, num_heads=1,
):  # fmt: skip
    """Skips are pushed after conv_in, every block with its attention, and every downsampling; each up block pops one."""

    eps = 1e-5 if improved else 1e-6

    def res(name, h):
        return res_block(params[name], h, temb, num_groups, improved)

    def attend(name, h):
        return attention(params[name], h, num_groups, num_heads, eps)

    def step(name, h):
        h = res(name, h)
        return attend(f"{name}_attention", h) if h.shape[1] in attention_resolutions else h

    embedding = cosine_embedding(t, channels) if improved else sinusoidal_embedding(t, channels)
    temb = linear(params["time2"], silu(linear(params["time1"], embedding)))
    if labels is not None:
        temb = temb + params["classes"]["embedding"][labels]

    h = convolution(params["conv_in"], space_to_depth(xt, block))
    skips = [h]
    for level in range(levels):
        for index in range(num_res_blocks):
            h = step(f"down{level}_block{index}", h)
            skips.append(h)
        if level < levels - 1:
            h = convolution(params[f"down{level}_downsample"], h, stride=2, pad=((improved, 1), (improved, 1)))
            skips.append(h)

    h = res("middle_block0", h)
    h = attend("middle_attention", h)
    h = res("middle_block1", h)

    for level in reversed(range(levels)):
        for index in range(num_res_blocks + 1):
            h = step(f"up{level}_block{index}", np.concatenate([h, skips.pop()], axis=-1))
        if level > 0:
            h = convolution(params[f"up{level}_upsample"], np.kron(h, np.ones((1, 2, 2, 1))))
    assert not skips

    h = silu(group_norm(params["norm_out"], h, num_groups, eps))
    return depth_to_space(convolution(params["conv_out"], h), block)


def parameter_sizes(
    channels, multipliers, num_res_blocks, attention_sizes, size, image_channels, out_channels, scale_and_shift=False
):
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
        conv(4 * channels, 2 * outputs if scale_and_shift else outputs, 1)
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
    conv(width, out_channels)
    return sizes
