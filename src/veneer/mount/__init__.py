"""Showing an ImageIndex as a mounted file system: the FUSE tree, and an overlay on top of it."""
