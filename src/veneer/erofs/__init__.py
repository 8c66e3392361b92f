"""EROFS metadata images of our own profile: written from an index, and read back for checks."""
