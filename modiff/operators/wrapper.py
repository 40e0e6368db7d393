"""A module in the place of another one, which it holds."""

from __future__ import annotations

from typing import Any

from torch import nn


class ModuleWrapper(nn.Module):
    """Holds another module as ``module``; what attributes it lacks, such as ``in_channels``, are the other's."""

    module: Any
    _complete = False  # a subclass sets it when its own attributes are there

    def __getattr__(self, name: str) -> Any:
        """An attribute of its own, else the original's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(super().__getattr__("module"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute that the other module has and this one lacks there: here it would have no effect."""
        owns = name in self.__dict__ or hasattr(type(self), name) or name == "module"
        if self.__dict__.get("_complete") and not owns and hasattr(self.module, name):
            setattr(self.module, name, value)
        else:
            super().__setattr__(name, value)
