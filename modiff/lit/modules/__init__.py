"""Lightning modules: the full-precision teacher and the quantized student."""
