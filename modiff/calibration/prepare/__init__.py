"""What changes in a teacher before weights are rounded: splits, and divisors of channels."""
