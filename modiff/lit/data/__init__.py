"""Data modules: images, noise by index, conditions, reference images."""
