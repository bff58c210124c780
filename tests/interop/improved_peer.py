"""The network of improved-diffusion (Nichol & Dhariwal 2021) in PyTorch, written from its description for the tests alone.

Its state dict has the names and shapes that openai/improved-diffusion's has; layers without weights keep their numbers.
"""

import math

import peers
import torch.nn.functional as F
from peers import torch
from torch import nn

GROUPS = 32


class Residual(nn.Module):
    """norm - silu - conv, time, norm - silu - conv, and a shortcut."""

    def __init__(self, before, width, time_width, scale_shift):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, before), nn.SiLU(), nn.Conv2d(before, width, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, 2 * width if scale_shift else width))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Dropout(0.3), nn.Conv2d(width, width, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if before == width else nn.Conv2d(before, width, 1)
        self.scale_shift = scale_shift

    def forward(self, x, time):
        norm, *rest = self.out_layers
        h, time = self.in_layers(x), self.emb_layers(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + time)
        return self.skip_connection(x) + nn.Sequential(*rest)(h)


class Attention(nn.Module):
    """Of the 3 C channels of qkv, each head has C / heads of its queries, then of its keys, then of its values."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(GROUPS, width), heads
        self.qkv, self.proj_out = nn.Conv1d(width, 3 * width, 1), nn.Conv1d(width, width, 1)

    def forward(self, x, time):
        batch, width, height, length = x.shape
        flat = self.qkv(self.norm(x).flatten(2)).view(batch, self.heads, 3, width // self.heads, height * length)
        query, key, value = flat.transpose(3, 4).unbind(2)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(2, 3).reshape(batch, width, height * length)
        return x + self.proj_out(mixed).view_as(x)


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x, time):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, time):
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class First(nn.Conv2d):
    def forward(self, x, time):
        return super().forward(x)


class UNet(nn.Module):
    """(x [B, C, H, W], t [B], classes [B]) -> [B, O, H, W]; attention at the levels whose number is in `attended`."""

    def __init__(self, width, multipliers, blocks, attended, heads, out, classes=None, scale_shift=True):
        super().__init__()
        self.width, time_width = width, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        if classes is not None:
            self.label_emb = nn.Embedding(classes, time_width)

        def level_block(before, level):
            now = width * multipliers[level]
            layers = [Residual(before, now, time_width, scale_shift)]
            return nn.ModuleList([*layers, Attention(now, heads)] if level in attended else layers), now

        self.input_blocks = nn.ModuleList([nn.ModuleList([First(3, width, 3, padding=1)])])
        skips, now, last = [width], width, len(multipliers) - 1
        for level in range(last + 1):
            for _ in range(blocks):
                block, now = level_block(now, level)
                self.input_blocks.append(block)
                skips.append(now)
            if level < last:
                self.input_blocks.append(nn.ModuleList([Down(now)]))
                skips.append(now)
        self.middle_block = nn.ModuleList(
            [Residual(now, now, time_width, scale_shift), Attention(now, heads), Residual(now, now, time_width, scale_shift)]
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(last + 1)):
            for index in range(blocks + 1):
                block, now = level_block(now + skips.pop(), level)
                if level and index == blocks:
                    block.append(Up(now))
                self.output_blocks.append(block)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, now), nn.SiLU(), nn.Conv2d(now, out, 3, padding=1))

    def forward(self, x, t, classes=None):
        half = self.width // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000) / half * torch.arange(half))
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        time = time if classes is None else time + self.label_emb(classes)
        skips = []
        for block in self.input_blocks:
            x = through(block, x, time)
            skips.append(x)
        x = through(self.middle_block, x, time)
        for block in self.output_blocks:
            x = through(block, torch.cat([x, skips.pop()], dim=1), time)
        return self.out(x)


def through(layers, x, time):
    for layer in layers:
        x = layer(x, time)
    return x


def random_unet(**settings):
    """One with random weights."""
    torch.set_num_threads(1)
    return peers.randomise(UNet(**settings))
