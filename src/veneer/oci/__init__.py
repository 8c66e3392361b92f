"""The nouns of the OCI specifications as strict value types. Pure: no I/O, neither trio nor httpx."""
