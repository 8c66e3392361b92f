"""The embedded registry: the distribution API over OCI layouts on disk, on a small HTTP/1.1 server."""
