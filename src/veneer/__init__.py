"""veneer: mount a container image in the time it takes to fetch its index."""

__all__ = ["__version__"]

__version__ = "0.1.0"
