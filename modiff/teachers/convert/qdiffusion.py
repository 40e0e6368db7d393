"""Quantized checkpoints of Q-Diffusion (``*_w4a8_ckpt.pth``): network and AdaRound weights.

Written from the layout that the published code saves, and tested on synthetic files of that layout; it has not been
tried on a published file. :meth:`QDiffusionModel.student` installs the file's codes as they are, packed::

    model = convert_qdiffusion(read_checkpoint("cifar_w4a8_ckpt.pth"), bits=4, sample_size=32)
    student = model.student("w4a8-modiff")
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from modiff.config.quant import QuantConfig, QuantSpec, Split
from modiff.errors import CheckpointError, ConfigError
from modiff.quantizers.packing import PackedWeight
from modiff.quantizers.rounding import QuantizedWeight
from modiff.student.swap import convert
from modiff.teachers.convert.checkpoints import Source, State, require, strip
from modiff.teachers.convert.ddpm import convert_ddpm, ddpm_sources
from modiff.teachers.convert.ldm import convert_ldm_unet, ldm_sources

QUANTIZERS = ("weight_quantizer", "weight_quantizer_0")
"""Of a whole weight, or of the first input channels of a split shortcut; and of the remaining ones."""


@dataclass(frozen=True)
class QDiffusionModel:
    """What a Q-Diffusion checkpoint holds.

    Args:
        denoiser: The network with its full-precision weights, in evaluation mode.
        weights: By the name of each Linear and Conv in ``denoiser``: codes, scales and zero points. A split shortcut
            has one scale per output channel and half, so its scale is as wide as its input.
        bits: Of the weights.
        splits: By the name of each split shortcut, the number of input channels of its first half.
    """

    denoiser: UNet2DModel
    weights: dict[str, QuantizedWeight]
    bits: int
    splits: dict[str, int]

    @property
    def spec(self) -> QuantSpec:
        """The quantizer of every weight, and of each half of a split one: asymmetric, per output channel."""
        return QuantSpec(self.bits, "channel", symmetric=False)

    def packed(self) -> dict[str, PackedWeight]:
        """Return the codes of every operator as a student holds them, 2 to 8 bits each.

        Those of a split shortcut are two operators, named ``<name>.first`` and ``<name>.second``.
        """
        found: dict[str, PackedWeight] = {}
        for name, weight in self.weights.items():
            at = self.splits.get(name)
            if at is None:
                found[name] = PackedWeight.pack(weight, self.spec)
                continue
            for part, columns in (("first", slice(None, at)), ("second", slice(at, None))):
                one = (weight.scale[:, columns][:, :1], weight.zero_point[:, columns][:, :1], len(weight.codes))
                half = QuantizedWeight(weight.codes[:, columns], *one)
                found[f"{name}.{part}"] = PackedWeight.pack(half, self.spec)
        return found

    def student(self, config: QuantConfig | str, keep_teacher: bool = True) -> nn.Module:
        """Make the denoiser a student that multiplies the file's own codes, in place; returns it.

        Activations and modulation are the config's. Its weight specs only say which operators have quantized weights;
        scales, zero points and codes are the file's, nothing is rounded again. A split shortcut becomes two operators
        (:attr:`QuantConfig.splits`), each with activation scales and state of its own, as in Q-Diffusion.

        Args:
            config: What else to quantize, or a preset's name. Its weights, and those of its rules, have the file's
                bits; a rule with ``weight: null`` or ``skip`` keeps an operator's full-precision weight. A rule that
                names a split shortcut holds for both halves.
            keep_teacher: As for :func:`modiff.quantize`.

        Raises:
            ConfigError: The config asks for weights in full precision altogether or of other bits, splits what the
                file does not, or :func:`modiff.quantize` would refuse it.
        """
        config = QuantConfig.preset(config) if isinstance(config, str) else config
        return convert(self.denoiser, self._with_own_weights(config), keep_teacher, self.packed())

    def _with_own_weights(self, config: QuantConfig) -> QuantConfig:
        """Return the config with the file's quantizers as its weight specs, and the file's splits."""
        for where, given in (("config", config.weight), *((f"rule {r.pattern!r}", r.weight) for r in config.rules)):
            if (given is None and where == "config") or (isinstance(given, QuantSpec) and given.bits != self.bits):
                said = "leaves weights in full precision" if given is None else f"asks for weights of {given.bits} bits"
                raise ConfigError(
                    f"The {where} {said}, but the file holds weights of {self.bits} bits. Give weights of "
                    f"{self.bits} bits, such as preset 'w{self.bits}a8-modiff'."
                )
        for split in config.splits:
            if self.splits.get(split.name) != split.at:
                own = self.splits.get(split.name)
                raise ConfigError(
                    f"The config splits {split.name!r} at channel {split.at}, but in the file it is "
                    f"{'one operator' if own is None else f'split at channel {own}'}. Leave splits empty: those of "
                    "the file are used."
                )
        rules = tuple(replace(r, weight=self.spec) if isinstance(r.weight, QuantSpec) else r for r in config.rules)
        splits = tuple(Split(name, at) for name, at in self.splits.items())
        return replace(config, weight=self.spec, rules=rules, splits=splits)

    def simulate(self) -> UNet2DModel:
        """Write the quantized values into the denoiser's parameters, in place; returns the denoiser."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.denoiser.get_submodule(name).weight.copy_(weight.dequantize())
        return self.denoiser


def convert_qdiffusion(
    state: State,
    bits: int,
    sample_size: int,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
) -> QDiffusionModel:
    """Import a Q-Diffusion checkpoint of a DDPM UNet (CIFAR-10) or of an unconditional CompVis UNet (LSUN).

    Codes are ``floor(w / delta) + [alpha >= 0] + zero point`` (Li et al. 2023; Nagel et al. 2020), asymmetric, per
    output channel. Activation quantizers in the file are left out: the student's own config quantizes activations.

    Args:
        state: Of :func:`modiff.teachers.convert.checkpoints.read_checkpoint`; keys start with ``model.``.
        bits: Of the weights, 2 to 8; the file does not hold them (its name does: ``w4``).
        sample_size: As for :func:`modiff.teachers.convert.ddpm.convert_ddpm`.
        num_heads: For a CompVis UNet, as for :func:`modiff.teachers.convert.ldm.convert_ldm`.
        num_head_channels: For a CompVis UNet, as for :func:`modiff.teachers.convert.ldm.convert_ldm`.

    Raises:
        CheckpointError: The state dict is of another kind, an operator has no or another quantizer, the bits do not fit
            the zero points, or keys are missing, left over or of another shape.
    """
    if not 2 <= bits <= 8:
        raise CheckpointError(
            f"bits is {bits}; allowed is 2 to 8. Take the weight bits from the file's name (w4a8: 4)."
        )
    state = strip(state, "model.")
    plain = {key: value for key, value in state.items() if "_quantizer" not in key}
    latent = "input_blocks.0.0.weight" in plain
    if not latent:
        require(plain, ["conv_in.weight"], "a Q-Diffusion checkpoint (keys under 'model.') of a DDPM or CompVis UNet")
    if latent:
        denoiser = convert_ldm_unet(plain, sample_size, num_heads, num_head_channels)
        sources = ldm_sources(denoiser)
    else:
        denoiser = convert_ddpm(plain, sample_size)
        sources = ddpm_sources(denoiser)
    weights: dict[str, QuantizedWeight] = {}
    used: set[str] = set()
    splits: dict[str, int] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            source = sources[f"{name}.weight"]
            weights[name], split = _weight(state, source, module.weight.ndim, bits)
            splits |= {name: split} if split else {}
            used.add(source.key.removesuffix(".weight"))
    quantizers = {key for key in state if "weight_quantizer" in key}
    left = sorted(key for key in quantizers if key.partition(".weight_quantizer")[0] not in used)
    if left:
        raise CheckpointError(
            f"{len(left)} weight quantizers belong to no operator, the first {', '.join(map(repr, left[:10]))}. Give "
            "the checkpoint of a DDPM or an unconditional CompVis UNet."
        )
    return QDiffusionModel(denoiser, weights, bits, splits)


def _weight(state: State, source: Source, ndim: int, bits: int) -> tuple[QuantizedWeight, int | None]:
    """Return the codes of one operator in the shape it has in diffusers, split halves joined, and where it is split."""
    operator = source.key.removesuffix(".weight")
    weight = state[source.key].float()
    first = state.get(f"{operator}.{QUANTIZERS[0]}.alpha")
    split = weight.shape[1] if first is None else first.shape[1]
    names = QUANTIZERS if f"{operator}.{QUANTIZERS[1]}.delta" in state else QUANTIZERS[:1]
    if (split < weight.shape[1]) != (len(names) == 2):
        raise CheckpointError(
            f"{operator}.{QUANTIZERS[0]}.alpha covers {split} of {weight.shape[1]} input channels, and the file holds "
            f"{len(names)} weight quantizer{'s' if len(names) == 2 else ''} of that operator. The file is damaged or "
            "of another version: take the one that Q-Diffusion wrote."
        )
    parts = [weight] if len(names) == 1 else [weight[:, :split], weight[:, split:]]
    done = [_round(state, f"{operator}.{name}", part, bits) for name, part in zip(names, parts, strict=True)]
    # Each half keeps its own scale: its columns hold it.
    joined = [torch.cat(tensors, dim=1) if len(done) > 1 else tensors[0] for tensors in zip(*done, strict=True)]
    codes, scale, zero_point = (source.take(tensor, ndim) for tensor in joined)
    return QuantizedWeight(codes, scale, zero_point, len(codes) * len(done)), split if len(done) > 1 else None


def _round(state: State, quantizer: str, weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scale and zero point of one quantizer; the latter two as wide as the input for a split half."""
    missing = [key for key in (f"{quantizer}.delta", f"{quantizer}.zero_point") if key not in state]
    if missing:
        raise CheckpointError(
            f"{missing[0]!r} is missing: this operator's weights are not quantized in the file. Give the checkpoint "
            "that Q-Diffusion writes after weight calibration."
        )
    delta, zero_point = state[f"{quantizer}.delta"].float(), state[f"{quantizer}.zero_point"].float()
    alpha = state.get(f"{quantizer}.alpha")
    per_channel = (weight.shape[0], *[1] * (weight.ndim - 1))
    shapes = {"delta": (delta, per_channel), "zero_point": (zero_point, per_channel)}
    if alpha is not None:
        shapes["alpha"] = (alpha, tuple(weight.shape))
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{quantizer}.{name} has shape {list(tensor.shape)}, but its weight needs {list(shape)} (one scale for "
                "each output channel). Give a checkpoint of Q-Diffusion's channel-wise weight quantizers."
            )
    top = 2**bits - 1
    whole = (zero_point >= 0) & (zero_point <= top) & (zero_point == zero_point.round())
    if not bool((delta > 0).all()) or not bool(whole.all()):
        raise CheckpointError(
            f"{quantizer} has scales from {delta.min():g} and zero points from {zero_point.min():g} to "
            f"{zero_point.max():g}; {bits} bits allow positive scales and whole zero points 0 to {top}. "
            "Set bits to those of the file."
        )
    ratio = weight / delta
    # AdaRound learned whether to round up; quantizers that were not reconstructed round to nearest.
    rounded = ratio.round() if alpha is None else ratio.floor() + (alpha >= 0)
    codes = (rounded + zero_point).clamp_(0, top)
    if quantizer.endswith(QUANTIZERS[0]) and quantizer[: -len(QUANTIZERS[0])] + f"{QUANTIZERS[1]}.delta" not in state:
        return codes, delta, zero_point
    wide = (len(codes), codes.shape[1], *delta.shape[2:])
    return codes, delta.expand(wide).contiguous(), zero_point.expand(wide).contiguous()
