"""The original networks of latent diffusion and DiT, rebuilt like those of originals.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from originals import sinusoids
from torch import nn


class OpenAIResnet(nn.Module):
    """Residual block of Dhariwal & Nichol (2021): optional scale-shift norm and resampling inside."""

    def __init__(self, channels, out, embedding, scale_shift=False, resample=None) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1)
        )
        if channels != out:
            self.skip_connection = nn.Conv2d(channels, out, 1)
        self.scale_shift, self.resample = scale_shift, resample

    def forward(self, x, embedding):
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resample == "up":
            h, x = (F.interpolate(z, scale_factor=2.0, mode="nearest") for z in (h, x))
        elif self.resample == "down":
            h, x = (F.avg_pool2d(z, 2) for z in (h, x))
        h = self.in_layers[2](h)
        e = self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return h + (self.skip_connection(x) if hasattr(self, "skip_connection") else x)


class OpenAIAttention(nn.Module):
    """Projections in one 1x1 convolution, head by head (the "legacy" order)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, embedding=None):
        b, c, n = x.shape[0], x.shape[1], x[0, 0].numel()
        parts = self.qkv(self.norm(x).flatten(2)).view(b, self.heads, 3, c // self.heads, n)
        q, k, v = parts.unbind(dim=2)
        weight = torch.einsum("bhci,bhcj->bhij", q, k).mul((c // self.heads) ** -0.5).softmax(dim=-1)
        h = torch.einsum("bhij,bhcj->bhci", weight, v).reshape(b, c, n)
        return x + self.proj_out(h).view_as(x)


class OpenAISample(nn.Module):
    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        if down:
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, embedding=None):
        return self.op(x) if hasattr(self, "op") else self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class LatentUNet(nn.Module):
    """Unconditional UNet of Rombach et al. (2022)."""

    def __init__(
        self,
        width=32,
        multipliers=(1, 2),
        layers=1,
        attention=(1,),
        channels=4,
        heads=None,
        head_channels=None,
        scale_shift=False,
        by_blocks=False,
    ) -> None:
        super().__init__()
        e, self.width = 4 * width, width

        def residual(a, b, resample=None):
            return OpenAIResnet(a, b, e, scale_shift, resample)

        def attend(c):
            return OpenAIAttention(c, heads or c // head_channels)

        def sample(c, down):
            return residual(c, c, "down" if down else "up") if by_blocks else OpenAISample(c, down)

        self.time_embed = nn.Sequential(nn.Linear(width, e), nn.SiLU(), nn.Linear(e, e))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, width, 3, padding=1)])])
        now, skips, last = width, [width], len(multipliers) - 1
        for i, m in enumerate(multipliers):
            for _ in range(layers):
                block = [residual(now, m * width)]
                now = m * width
                self.input_blocks.append(nn.ModuleList(block + ([attend(now)] if i in attention else [])))
                skips.append(now)
            if i < last:
                self.input_blocks.append(nn.ModuleList([sample(now, down=True)]))
                skips.append(now)
        self.middle_block = nn.ModuleList([residual(now, now), attend(now), residual(now, now)])
        self.output_blocks = nn.ModuleList()
        for i, m in reversed(list(enumerate(multipliers))):
            for j in range(layers + 1):
                block = [residual(now + skips.pop(), m * width)]
                now = m * width
                block += [attend(now)] if i in attention else []
                block += [sample(now, down=False)] if i and j == layers else []
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, channels, 3, padding=1))

    def forward(self, x, t):
        e = self.time_embed(sinusoids(t, self.width, shift=0, cosine_first=True))
        skips = []
        for i, block in enumerate(self.input_blocks):
            for layer in block:
                x = layer(x) if i == 0 else layer(x, e)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, e)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in block:
                x = layer(x, e)
        return self.out(x)


class DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def attend(self, x):
        b, n, c = x.shape
        q, k, v = self.attn.qkv(x).view(b, n, 3, self.heads, c // self.heads).unbind(dim=2)
        weight = torch.einsum("bihc,bjhc->bhij", q, k).mul((c // self.heads) ** -0.5).softmax(dim=-1)
        return self.attn.proj(torch.einsum("bhij,bjhc->bihc", weight, v).reshape(b, n, c))

    def forward(self, x, condition):
        s1, m1, g1, s2, m2, g2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + g1 * self.attend(plain_norm(x) * (1 + m1) + s1)
        h = F.gelu(self.mlp.fc1(plain_norm(x) * (1 + m2) + s2), approximate="tanh")
        return x + g2 * self.mlp.fc2(h)


def plain_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def grid_embedding(width: int, side: int) -> torch.Tensor:
    """Sine and cosine of the column in the first half of the channels, of the row in the second."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    place = torch.arange(side, dtype=torch.float64)[:, None] * omega
    one = torch.cat([place.sin(), place.cos()], dim=1)
    column, row = one[None].expand(side, side, -1), one[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(1, side * side, width).float()


class DiT(nn.Module):
    """Peebles & Xie (2023), adaLN-Zero."""

    def __init__(self, width=48, heads=4, depth=2, side=4, patch=2, channels=4, out=8, classes=10) -> None:
        super().__init__()
        self.patch, self.side, self.out = patch, side, out
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.pos_embed = nn.Parameter(grid_embedding(width, side), requires_grad=False)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList([DiTBlock(width, heads) for _ in range(depth)])
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, patch * patch * out)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, t, y):
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        condition = self.t_embedder.mlp(sinusoids(t, 256, shift=0, cosine_first=True))
        condition = condition + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.final_layer.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        x = self.final_layer.linear(plain_norm(x) * (1 + scale) + shift)
        p, n = self.patch, self.side
        return x.view(-1, n, n, p, p, self.out).permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out, n * p, n * p)
