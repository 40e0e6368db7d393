"""Weight methods: each a file of its own, which registers itself; whatever lies in this folder is known by its name."""

from importlib import import_module
from pkgutil import iter_modules

from modiff.calibration.weights.methods import WeightMethod, register, weight_method, weight_methods

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["WeightMethod", "register", "weight_method", "weight_methods"]
