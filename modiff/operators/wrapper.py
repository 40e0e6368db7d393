"""A module in the place of another one, which it holds."""

from __future__ import annotations

from typing import Any

from torch import nn


class ModuleWrapper(nn.Module):
    """Holds another module as ``module``; what attributes it lacks, such as ``in_channels``, are the other's."""

    module: Any

    def __getattr__(self, name: str) -> Any:
        """An attribute of its own, else the original's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(super().__getattr__("module"), name)
