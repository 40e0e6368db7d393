"""The original networks, rebuilt in plain PyTorch from the papers and the published key layouts, for parity tests."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, norms and zero-initialized layers included, so that no part is invisible."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = noise * scale + (1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0)
    return module.eval()


def sinusoids(t: torch.Tensor, size: int, shift: int, cosine_first: bool) -> torch.Tensor:
    half = size // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half) / (half - shift))
    angle = t[:, None].float() * frequency
    parts = [angle.cos(), angle.sin()] if cosine_first else [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1)


class HoResnet(nn.Module):
    """Residual block of DDPM; without a time embedding, that of CompVis' autoencoders."""

    def __init__(self, channels: int, out: int, embedding: int | None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        if embedding:
            self.temb_proj = nn.Linear(embedding, out)
        self.norm2 = nn.GroupNorm(32, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x, embedding=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if embedding is not None:
            h = h + self.temb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class HoAttention(nn.Module):
    """One head over all channels, projections as 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))
        weight = torch.einsum("bci,bcj->bij", q, k).mul(x.shape[1] ** -0.5).softmax(dim=-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weight, v).view_as(x))


class HoSample(nn.Module):
    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x):
        if self.down:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution under the names ``block``, ``attn`` and ``downsample`` / ``upsample``."""

    def __init__(self, blocks, attentions, sample=None, down: bool = True) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attentions)
        if sample is not None:
            setattr(self, "downsample" if down else "upsample", sample)

    def one(self, j, x, embedding=None):
        x = self.block[j](x, embedding)
        return self.attn[j](x) if len(self.attn) else x


class Middle(nn.Module):
    def __init__(self, channels: int, embedding: int | None) -> None:
        super().__init__()
        self.block_1 = HoResnet(channels, channels, embedding)
        self.attn_1 = HoAttention(channels)
        self.block_2 = HoResnet(channels, channels, embedding)

    def forward(self, x, embedding=None):
        return self.block_2(self.attn_1(self.block_1(x, embedding)), embedding)


class DDPM(nn.Module):
    """UNet of Ho et al. (2020), appendix B."""

    def __init__(self, width=32, multipliers=(1, 2), layers=2, attention=(1,), channels=3) -> None:
        super().__init__()
        self.width, e = width, 4 * width
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(width, e), nn.Linear(e, e)])
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        now, skips, last = width, [width], len(multipliers) - 1
        self.down = nn.ModuleList()
        for i, m in enumerate(multipliers):
            blocks = []
            for _ in range(layers):
                blocks.append(HoResnet(now, m * width, e))
                now = m * width
                skips.append(now)
            heads = [HoAttention(now) for _ in range(layers)] if i in attention else []
            sample = HoSample(now, down=True) if i < last else None
            if sample is not None:
                skips.append(now)
            self.down.append(Level(blocks, heads, sample))
        self.mid = Middle(now, e)
        up = []
        for i, m in reversed(list(enumerate(multipliers))):
            blocks = []
            for _ in range(layers + 1):
                blocks.append(HoResnet(now + skips.pop(), m * width, e))
                now = m * width
            heads = [HoAttention(now) for _ in range(layers + 1)] if i in attention else []
            up.insert(0, Level(blocks, heads, HoSample(now, down=False) if i else None, down=False))
        self.up = nn.ModuleList(up)
        self.norm_out = nn.GroupNorm(32, now, eps=1e-6)
        self.conv_out = nn.Conv2d(now, channels, 3, padding=1)

    def forward(self, x, t):
        e = self.temb.dense[1](F.silu(self.temb.dense[0](sinusoids(t, self.width, shift=1, cosine_first=False))))
        x = self.conv_in(x)
        skips = [x]
        for level in self.down:
            for j in range(len(level.block)):
                x = level.one(j, x, e)
                skips.append(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
                skips.append(x)
        x = self.mid(x, e)
        for level in reversed(self.up):
            for j in range(len(level.block)):
                x = level.one(j, torch.cat([x, skips.pop()], dim=1), e)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class HoEncoder(nn.Module):
    def __init__(self, width, multipliers, layers, attention, out, channels=3) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        now, last = width, len(multipliers) - 1
        for i, m in enumerate(multipliers):
            blocks = []
            for _ in range(layers):
                blocks.append(HoResnet(now, m * width, None))
                now = m * width
            heads = [HoAttention(now) for _ in range(layers)] if i in attention else []
            self.down.append(Level(blocks, heads, HoSample(now, down=True) if i < last else None))
        self.mid = Middle(now, None)
        self.norm_out = nn.GroupNorm(32, now, eps=1e-6)
        self.conv_out = nn.Conv2d(now, out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for j in range(len(level.block)):
                x = level.one(j, x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class HoDecoder(nn.Module):
    def __init__(self, width, multipliers, layers, attention, latent, channels=3) -> None:
        super().__init__()
        now = multipliers[-1] * width
        self.conv_in = nn.Conv2d(latent, now, 3, padding=1)
        self.mid = Middle(now, None)
        up = []
        for i, m in reversed(list(enumerate(multipliers))):
            blocks = []
            for _ in range(layers + 1):
                blocks.append(HoResnet(now, m * width, None))
                now = m * width
            heads = [HoAttention(now) for _ in range(layers + 1)] if i in attention else []
            up.insert(0, Level(blocks, heads, HoSample(now, down=False) if i else None, down=False))
        self.up = nn.ModuleList(up)
        self.norm_out = nn.GroupNorm(32, now, eps=1e-6)
        self.conv_out = nn.Conv2d(now, channels, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for j in range(len(level.block)):
                x = level.one(j, x)
            x = level.upsample(x) if hasattr(level, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))


class FirstStage(nn.Module):
    """Autoencoder of Rombach et al. (2022): with a codebook (VQ) or a Gaussian posterior (KL)."""

    def __init__(self, codes=None, width=32, multipliers=(1, 2), layers=1, attention=(), latent=4, embedding=4) -> None:
        super().__init__()
        double = 1 if codes else 2
        self.encoder = HoEncoder(width, multipliers, layers, attention, double * latent)
        self.decoder = HoDecoder(width, multipliers, layers, attention, latent)
        self.quant_conv = nn.Conv2d(double * latent, double * embedding, 1)
        self.post_quant_conv = nn.Conv2d(embedding, latent, 1)
        if codes:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(codes, embedding)

    def encode(self, x):
        return self.quant_conv(self.encoder(x))

    def decode(self, z):
        if hasattr(self, "quantize"):
            table = self.quantize.embedding.weight
            distance = (z.movedim(1, -1)[..., None, :] - table).square().sum(dim=-1)
            z = table[distance.argmin(dim=-1)].movedim(-1, 1)
        return self.decoder(self.post_quant_conv(z))
