"""What scripts/crash-matrix is made of: an image, a registry that misbehaves, readers that compare, faults."""
