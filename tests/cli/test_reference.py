"""The documentation says what the commands say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_command_reference_is_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/cli_reference.py"], capture_output=True, text=True, check=True
    )
    page = (ROOT / "docs/reference/cli.md").read_text()
    assert page == result.stdout, "run scripts/docs"


def test_every_decision_is_reachable_and_titled() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    numbers = [page.name[:4] for page in pages]
    assert len(set(numbers)) == len(numbers)
    overview = (ROOT / "docs/decisions/README.md").read_text()
    for page in pages:
        assert f"({page.name})" in overview
        assert page.read_text().startswith(f"# {page.name[:4]}: ")
