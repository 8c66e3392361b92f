"""What a start will read, found by looking at the image's files as data: nothing of the image is run."""
