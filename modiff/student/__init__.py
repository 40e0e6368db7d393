"""A denoiser made of operators, and back."""
