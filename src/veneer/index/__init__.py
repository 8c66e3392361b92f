"""Device, span, tree: what an image looks like, whatever format it came in. Pure: no I/O, no trio."""
