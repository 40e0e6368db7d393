"""Images inside of pages: encoded, and told apart by how well they show pixels."""

from __future__ import annotations

import base64
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from modiff.lit.report.image_grids import to_pixels
from modiff.metrics.pairwise import psnr_db

LOSSLESS = 128
"""Side in pixels up to which images are embedded without loss; larger ones would make a page of tens of MiB."""
QUALITY = 92


def data_uri(image: Tensor) -> str:
    """One image ``[C, H, W]`` in [0, 1] as a ``data:`` address: PNG up to 128 pixels, beyond that JPEG."""
    picture = Image.fromarray(to_pixels(image.detach().cpu().clamp(0, 1)))
    stream, kind = BytesIO(), "png" if max(picture.size) <= LOSSLESS else "jpeg"
    picture.save(stream, kind.upper(), **({"optimize": True} if kind == "png" else {"quality": QUALITY}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def is_lossless(images: Tensor) -> bool:
    """Whether images ``[N, C, H, W]`` are embedded without loss."""
    return max(images.shape[-2:]) <= LOSSLESS


def psnr_of(student: Tensor, teacher: Tensor) -> list[float | None]:
    """PSNR of each pair in dB, None where both are identical; for captions."""
    values = psnr_db(student, teacher)
    return [None if torch.isinf(v) else float(v) for v in values]
