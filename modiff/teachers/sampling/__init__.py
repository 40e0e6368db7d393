"""From noise to image: the loop, the schedulers, noise by index."""
