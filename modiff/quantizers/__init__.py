"""One tensor at a time: ranges, scales, codes. Pure arithmetic, no state."""
