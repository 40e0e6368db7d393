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
