"""Running a mounted image: the OCI bundle, and the runtime that executes it."""
