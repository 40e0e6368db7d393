"""Weight methods: each a file of its own, which registers itself, so that whatever lies in this folder is known.

``nearest`` and ``lp`` need no data. ``gptq``, ``adaround`` (operator by operator) and ``brecq`` (block by block, single
operators where there is no block) round on the scales of ``nearest``: clipped ranges, which lose less in the norm of a
weight or an output, shrink outputs, and that adds up over steps. Scales and biases are then tuned on the denoiser's
output (:func:`modiff.calibration.tuning.tune`).
"""

from importlib import import_module
from pkgutil import iter_modules

from modiff.calibration.weights.methods import WeightMethod, register, weight_method, weight_methods

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["WeightMethod", "register", "weight_method", "weight_methods"]
