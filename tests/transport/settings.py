"""Settings for tests that talk to servers."""

from dataclasses import replace
from pathlib import Path

from veneer.settings import Settings


def settings_in(
    directory: Path,
    *,
    authfile: Path | None = None,
    ca_file: Path | None = None,
    insecure: frozenset[str] = frozenset(),
    read_deadline_s: float = 30.0,
) -> Settings:
    """Settings that touch nothing outside ``directory``; without ``authfile`` there are no credentials."""
    if authfile is None:
        authfile = directory / "no-credentials.json"
        authfile.write_text("{}")
    return replace(
        Settings.from_environment(),
        cache_dir=directory / "cache",
        run_dir=directory / "run",
        authfile=authfile,
        ca_file=ca_file,
        insecure=insecure,
        read_deadline_s=read_deadline_s,
    )
