"""How lazily loadable images are recognised. Nothing above this package knows a format's name."""
