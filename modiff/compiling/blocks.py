"""The blocks of diffusers that are fused: residual blocks, attention, and transformer blocks of UNets and of DiT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from modiff.compiling.fusion import (
    NOTHING,
    Fused,
    attend,
    call,
    call_together,
    group_norm,
    kept_dtype,
    layer_norm,
    plain,
)
from modiff.kernels.fused import After, Before
from modiff.operators.quantized import QuantizedOperator


class FusedResnet(Fused):
    """``ResnetBlock2D``: two group norms with SiLU, the time embedding, and the sum with the shortcut."""

    fuses = {"conv1": "after group norm and SiLU", "conv2": "after group norm and SiLU, before the residual sum"}

    @override
    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if not plain(module.nonlinearity, nn.SiLU):
            return f"its activation is {type(module.nonlinearity).__name__}"
        if not (plain(module.norm1, nn.GroupNorm) and plain(module.norm2, nn.GroupNorm)):
            return "its norms are not plain group norms"
        if module.upsample is not None or module.downsample is not None:
            return "it changes the size of the image"
        if module.time_embedding_norm != "default":
            return f"its time embedding is used as {module.time_embedding_norm!r}"
        return None

    @override
    def fits(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        return x.ndim == 4 and len(args) == 1 and not kwargs and not (self.module.training and self.module.dropout.p)

    @override
    def run(self, x: Tensor, temb: Tensor | None) -> Tensor:
        module, shift = self.module, None
        hidden = call(module.conv1, x, group_norm(module.norm1, "silu"))
        if module.time_emb_proj is not None and temb is not None:
            temb = temb if module.skip_time_act else module.nonlinearity(temb)
            shift = module.time_emb_proj(temb)
        elif temb is not None:
            shift = temb
        shift = None if shift is None else shift.float().expand(x.shape[0], -1).contiguous()
        shortcut = module.conv_shortcut
        if shortcut is None:
            residual = x
        elif isinstance(shortcut, QuantizedOperator) and self.fusion.advances(shortcut, x.dtype):
            residual = call(shortcut, x)
        else:
            residual = shortcut(x)
        before = group_norm(module.norm2, "silu", shift)
        return call(module.conv2, hidden, before, After(residual, None, 1 / module.output_scale_factor, x.dtype))


class FusedAttention(Fused):
    """``Attention`` of a UNet: group norm, projections that share codes, residual sum."""

    fuses = {
        "to_q": "after group norm",
        "to_k": "after group norm",
        "to_v": "after group norm",
        "to_out.0": "before the residual sum",
    }

    @override
    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if not plain(module.group_norm, nn.GroupNorm):
            return "it has no group norm"
        return _attention_obstacle(module)

    @override
    def fits(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        given = [value for name, value in kwargs.items() if name != "temb"]
        return x.ndim == 4 and not args and all(value is None for value in given)

    @override
    def run(self, x: Tensor, **_: Any) -> Tensor:
        module = self.module
        batch, channels, height, width = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        operators = [module.to_q, module.to_k, module.to_v]
        projected = call_together(operators, tokens, group_norm(module.group_norm, None), kept_dtype(x))
        found = attend(module, projected)
        residual = tokens if module.residual_connection else None
        after = After(residual, None, 1 / module.rescale_output_factor, x.dtype)
        out = call(module.to_out[0], found, NOTHING, after)
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


class FusedTransformer(Fused):
    """``BasicTransformerBlock`` of DiT: modulated layer norms, attention, gated sums, feed-forward with GELU."""

    fuses = {
        "attn1.to_q": "after the modulated layer norm",
        "attn1.to_k": "after the modulated layer norm",
        "attn1.to_v": "after the modulated layer norm",
        "attn1.to_out.0": "before the gated residual sum",
        "ff.net.0.proj": "after the modulated layer norm",
        "ff.net.2": "after GELU, before the gated residual sum",
    }

    @override
    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if module.norm_type != "ada_norm_zero" or module.attn2 is not None or module.pos_embed is not None:
            return f"its norms are {module.norm_type!r}, or it has cross-attention or position embeddings"
        if not (plain(module.norm1.norm, nn.LayerNorm) and plain(module.norm3, nn.LayerNorm)):
            return "its norms are not plain layer norms"
        if type(module.ff.net[0]).__name__ != "GELU" or module.ff.net[0].approximate not in GELUS:
            return f"its feed-forward net begins with {type(module.ff.net[0]).__name__}"
        return _inner_attention_obstacle(module)

    @override
    def fits(self, x: Tensor, timestep: Any = None, class_labels: Any = None, *args: Any, **kwargs: Any) -> bool:
        rest = not args and not any(value is not None and value != {} for value in kwargs.values())
        return x.ndim == 3 and rest and self.module._chunk_size is None and not self.module.training

    @override
    def run(self, x: Tensor, timestep: Any = None, class_labels: Any = None, **_: Any) -> Tensor:
        module, norm, attention = self.module, self.module.norm1, self.module.attn1
        emb = norm.emb(timestep, class_labels, hidden_dtype=x.dtype)
        parts = norm.linear(norm.silu(emb)).float().chunk(6, dim=1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (part.contiguous() for part in parts)
        operators = [attention.to_q, attention.to_k, attention.to_v]
        projected = call_together(operators, x, layer_norm(norm.norm, scale, shift), kept_dtype(x))
        found = attend(attention, projected)
        factor = 1 / attention.rescale_output_factor
        x = call(attention.to_out[0], found, NOTHING, After(x, gate * factor, 1.0, x.dtype))
        hidden = call(module.ff.net[0].proj, x, layer_norm(module.norm3, scale_ff, shift_ff))
        gelu = Before(activation=GELUS[module.ff.net[0].approximate])
        return call(module.ff.net[2], hidden, gelu, After(x, gate_ff, 1.0, x.dtype))


class FusedCrossTransformer(Fused):
    """``BasicTransformerBlock`` of Stable Diffusion: layer norms, self- and cross-attention, feed-forward with GEGLU.

    Keys and values of the cross-attention read a prompt, which is the same in all evaluations: they stay as they are.
    """

    fuses = {
        "attn1.to_q": "after the layer norm",
        "attn1.to_k": "after the layer norm",
        "attn1.to_v": "after the layer norm",
        "attn1.to_out.0": "before the residual sum",
        "ff.net.0.proj": "after the layer norm",
        "ff.net.2": "after GEGLU, before the residual sum",
    }
    cross = {"attn2.to_q": "after the layer norm", "attn2.to_out.0": "before the residual sum"}

    @override
    @classmethod
    def fused_operators(cls, module: Any) -> dict[str, str]:
        last = {} if _gated(module) else {"ff.net.2": "after GELU, before the residual sum"}
        return {**cls.fuses, **({} if module.attn2 is None else cls.cross), **last}

    @override
    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if module.pos_embed is not None or module.only_cross_attention:
            return "it has position embeddings, or cross-attention alone"
        norms = [module.norm1, module.norm3, *([] if module.attn2 is None else [module.norm2])]
        if not all(plain(norm, nn.LayerNorm) for norm in norms):
            return "its norms are not plain layer norms"
        if not _gated(module) and _activation(module) is None:
            return f"its feed-forward net begins with {type(module.ff.net[0]).__name__}"
        if module.attn2 is not None and not module.attn2.is_cross_attention:
            return "its second attention is not to a prompt"
        if any(a is not None and a.rescale_output_factor != 1 for a in (module.attn1, module.attn2)):
            return "its attention is rescaled"
        return _inner_attention_obstacle(module)

    @override
    def fits(self, x: Tensor, *args: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> bool:
        if self.module.attn2 is not None and encoder_hidden_states is None:
            return False
        rest = not args and not any(
            value is not None and value != {}
            for name, value in kwargs.items()
            if name not in ("timestep", "class_labels", "added_cond_kwargs")  # which these norms do not read
        )
        return x.ndim == 3 and rest and self.module._chunk_size is None and not self.module.training

    @override
    def run(self, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        module, attention, cross = self.module, self.module.attn1, self.module.attn2
        operators = [attention.to_q, attention.to_k, attention.to_v]
        projected = call_together(operators, x, layer_norm(module.norm1), kept_dtype(x))
        x = call(attention.to_out[0], attend(attention, projected), NOTHING, After(x, dtype=x.dtype))
        if cross is not None:
            query = call(cross.to_q, x, layer_norm(module.norm2), kept_dtype(x))
            projected = [query, *(to(encoder_hidden_states).to(x.dtype) for to in (cross.to_k, cross.to_v))]
            x = call(cross.to_out[0], attend(cross, projected), NOTHING, After(x, dtype=x.dtype))
        hidden = call(module.ff.net[0].proj, x, layer_norm(module.norm3))
        activation = Before(activation="geglu" if _gated(module) else _activation(module))
        return call(module.ff.net[2], hidden, activation, After(x, dtype=x.dtype))


class FusedSpatialTransformer(Fused):
    """``Transformer2DModel`` of a UNet: group norm and projection of an image, blocks, projection, residual sum."""

    fuses = {"proj_in": "after group norm", "proj_out": "before the residual sum"}

    @override
    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if not module.is_input_continuous:
            return "its input is no image of channels"
        return None if plain(module.norm, nn.GroupNorm) else "it has no plain group norm"

    @override
    def fits(self, x: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> bool:
        masks = (kwargs.get("attention_mask"), kwargs.get("encoder_attention_mask"))
        return x.ndim == 4 and not args and not return_dict and masks == (None, None) and not kwargs.keys() - PASSED

    @override
    def run(self, x: Tensor, **given: Any) -> tuple[Tensor]:
        module, linear = self.module, self.module.use_linear_projection
        batch, channels, height, width = x.shape
        image = x.permute(0, 2, 3, 1)
        source = image.reshape(batch, height * width, channels) if linear else x
        hidden = call(module.proj_in, source, group_norm(module.norm, None), After(dtype=x.dtype))
        hidden = hidden if linear else hidden.permute(0, 2, 3, 1).reshape(batch, height * width, -1)
        passed = {name: value for name, value in given.items() if name not in ("return_dict", "added_cond_kwargs")}
        for block in module.transformer_blocks:
            hidden = block(hidden, **passed)
        if linear:
            out = call(module.proj_out, hidden, NOTHING, After(source, dtype=x.dtype))
        else:
            hidden = hidden.reshape(batch, height, width, -1).permute(0, 3, 1, 2)
            return (call(module.proj_out, hidden, NOTHING, After(x, dtype=x.dtype)),)
        return (out.view(batch, height, width, -1).permute(0, 3, 1, 2),)


PASSED = {
    "encoder_hidden_states", "timestep", "added_cond_kwargs", "class_labels", "cross_attention_kwargs",
    "attention_mask", "encoder_attention_mask",
}  # fmt: skip
GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
KINDS: dict[str, type[Fused]] = {
    "ResnetBlock2D": FusedResnet,
    "Attention": FusedAttention,
    "BasicTransformerBlock": FusedTransformer,
    "Transformer2DModel": FusedSpatialTransformer,
}


def kind_of(module: Any) -> type[Fused] | None:
    """What a block of diffusers may be, by the name of its class and, of transformer blocks, its norms."""
    name = type(module).__name__
    if name == "BasicTransformerBlock" and module.norm_type == "layer_norm":
        return FusedCrossTransformer
    return KINDS.get(name)


def _gated(module: Any) -> bool:
    """Whether the feed-forward net of a transformer block begins with GEGLU."""
    return type(module.ff.net[0]).__name__ == "GEGLU"


def _activation(module: Any) -> str | None:
    first = module.ff.net[0]
    return GELUS.get(first.approximate) if type(first).__name__ == "GELU" else None


def _inner_attention_obstacle(module: Any) -> str | None:
    """Of the attentions of a transformer block."""
    if getattr(module, "fuser", None) is not None:
        return "its attention is gated"
    for attention in (module.attn1, module.attn2):
        if attention is None:
            continue
        if attention.group_norm is not None or attention.residual_connection:
            return "its attention has a norm or a residual sum of its own"
        reason = _attention_obstacle(attention)
        if reason is not None:
            return reason
    return None


def _attention_obstacle(module: Any) -> str | None:
    if type(module.processor).__name__ not in ("AttnProcessor2_0", "AttnProcessor"):
        return f"its processor is {type(module.processor).__name__}"
    for name in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
        if getattr(module, name, None) is not None and getattr(module, name) is not False:
            return f"it has {name}"
    if module.inner_kv_dim != module.inner_dim:
        return "its keys have fewer heads than its queries"
    if module.scale != (module.inner_dim // module.heads) ** -0.5:
        return "its attention is scaled otherwise"
    if module.training and module.to_out[1].p:
        return "it drops out"
    return None
