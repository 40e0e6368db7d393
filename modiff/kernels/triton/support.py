"""What keeps Triton's kernels from running, in words. Nothing here imports Triton."""

from __future__ import annotations

import functools
import os
import re
from importlib import metadata, util

import torch

from modiff.kernels.backend import OperatorShape, Quantizer
from modiff.kernels.triton.tables import architecture_of

LEAST_TRITON = (3, 6)
LEAST_TORCH = (2, 11)
CHANNEL_MULTIPLE = 16
"""Of channels: int8 tensor cores read 16 codes at a time."""
DEPTH = 2**31 // 127**2
"""Products of the largest codes that an int32 sum holds: 133144 of 127 * 127."""
ROW = 8192
"""Most channels that one program holds, of a token or in powers of two, without spilling registers."""


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for, which runs the kernels on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def version_of(text: str) -> tuple[int, int]:
    """Major and minor of a version.

    >>> version_of("2.13.0+cu130"), version_of("3.6.0"), version_of("4")
    ((2, 13), (3, 6), (4, 0))
    """
    numbers = [int(n) for n in re.findall(r"\d+", text)[:2]]
    return (numbers[0], numbers[1] if len(numbers) > 1 else 0)


@functools.cache
def missing() -> str | None:
    """What is missing for Triton's kernels in this installation, whatever the device; None where nothing is."""
    if version_of(torch.__version__) < LEAST_TORCH:
        return f"PyTorch {torch.__version__} is too old for the Triton kernels; install 2.11 or later"
    if util.find_spec("triton") is None:
        return "Triton is not installed; CUDA builds of PyTorch for Linux bring it"
    installed = metadata.version("triton")
    if version_of(installed) < LEAST_TRITON:
        return f"Triton {installed} is too old; install 3.6 or later"
    return None


def device_obstacle(device: torch.device) -> str | None:
    """Why a device cannot run the kernels; None where it can."""
    if device.type == "cpu" and interpreted():
        return missing()
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA devices, and this operator is on {device.type}"
    if torch.version.hip is not None:
        return "the Triton kernels are tuned for NVIDIA GPUs, and this PyTorch is built for AMD's"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if architecture_of(capability) is None:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; the Triton kernels need 8.0 or later"
    return missing()


def shape_obstacle(shape: OperatorShape, quantizer: Quantizer) -> str | None:
    """Why no kernel computes an operator; None where one does."""
    if shape.kind == "conv_transpose":
        return "there is no integer transposed convolution on GPUs"
    if len(shape.kernel) > 2:
        return "there is no integer Conv3d"
    if shape.groups != 1:
        return f"it has {shape.groups} groups, and the Triton kernels have no grouped convolution"
    if any(d != 1 for d in shape.dilation):
        return "the Triton kernels have no dilated convolution"
    if len(set(shape.stride)) > 1:
        return f"its stride {shape.stride} is not the same in both directions"
    if shape.padding_mode != "zeros" and any(any(pads) for pads in shape.padding):
        return f"borders are padded by {shape.padding_mode!r}, not by zeros"
    for name, channels in (("input", shape.in_channels), ("output", shape.out_channels)):
        if channels % CHANNEL_MULTIPLE:
            return f"its {channels} {name} channels are not a multiple of {CHANNEL_MULTIPLE}"
    depth = shape.in_channels
    for size in shape.kernel:
        depth *= size
    if depth >= DEPTH:
        return f"its sums have {depth} terms; int32 holds fewer than {DEPTH}"
    if quantizer.spec.granularity == "token" and shape.in_channels > ROW:
        return f"its tokens have {shape.in_channels} channels; the range of at most {ROW} is found at once"
    if quantizer.spec.scales == "power_of_two" and shape.in_channels > ROW:
        return f"its samples have scales of {shape.in_channels} channels; those of at most {ROW} are found at once"
    return None
