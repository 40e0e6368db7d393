"""modiff: training-free quantization of diffusion models."""
