"""Registries: the distribution API 1.1 as a :class:`~veneer.source.base.Repository`."""
