"""Integer products on NVIDIA GPUs, written in Triton.

Only the modules ``products``, ``encoding``, ``launch`` and ``proof`` import Triton, and only ``backend`` imports those,
when an operator is prepared for it: everything else of ``modiff`` runs without Triton.
"""
