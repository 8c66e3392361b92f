"""Writers of lazily loadable images; nothing that only reads images imports this package."""
