"""A shortened crash matrix, and that the matrix notices what it is there to notice."""

import json
import sys
from pathlib import Path

import pytest
from crashes.content import Content, make_content
from crashes.readers import Pool, ReadError, WrongBytes
from crashes.verdict import UNEXPLAINED, Window, explain

from tests.system.programs import ROOT, run

SHORT = {
    "erofs-fanotify": (
        "worker",
        "worker+supervisor",
        "supervisor+standby",
        "worker-offline",
        "wrong-bytes",
        "disk-full",
        "unmount",
        "reboot",
    ),
    "erofs-fuse": ("worker", "unmount"),
}
LINE = (
    "ts=2026-01-01 level=ERROR logger=veneer.mount.failures read failed image=a/b path='/d/f' "
    "offset=0 length=4096 device=0 spans=0..1 error=Unavailable cause='no answer'"
)
ORDER = {"d/f": (0, 0), "d/g": (0, 1), "e/f": (1, 1)}


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("backend", SHORT)
def test_readers_get_right_bytes_or_an_explained_error_whatever_breaks(backend: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    size = ("--rounds", "1", "--size", "12", "--readers", "4")
    place = ("--backend", backend, "--directory", tmp_path / "matrix", "--json", result)
    run(sys.executable, ROOT / "scripts/crash_matrix.py", *size, *place, *SHORT[backend])
    outcomes = json.loads(result.read_text())
    assert [outcome["scenario"] for outcome in outcomes] == list(SHORT[backend])
    for outcome in outcomes:
        assert outcome["faults"] > 0
        assert outcome["reads"] > 100
        assert outcome["wrong"] == 0
    assert not (tmp_path / "matrix").exists()


def _content(directory: Path) -> Content:
    return make_content(directory, 200_000, 1)


@pytest.mark.parametrize("zeros", [True, False])
def test_one_wrong_byte_stops_the_readers(tmp_path: Path, *, zeros: bool) -> None:
    content = _content(tmp_path)
    right = make_content(tmp_path / "mounted", 200_000, 1).plain
    pool = Pool(content, right, tmp_path / "notes", 2)
    pool.sweep("1")
    assert pool.reads == len(content.files)
    path, size = content.files[3]
    with open(right / path, "r+b") as file:
        file.seek(size // 2)
        byte = file.read(1)
        file.seek(size // 2)
        file.write(b"\0" if zeros else bytes([byte[0] ^ 1]))
    try:
        with pytest.raises(WrongBytes, match=path):
            pool.sweep("2")
    finally:
        pool.kill()


def test_errors_are_noted_with_their_file_and_errno(tmp_path: Path) -> None:
    content = _content(tmp_path)
    pool = Pool(content, tmp_path / "nothing", tmp_path / "notes", 2)
    pool.sweep("1")
    assert {(error.path, error.name) for error in pool.errors()} == {
        (path, "ENOENT") for path, _ in content.files
    }


def _error(path: str, doing: str = "reading", at: float = 5.0) -> ReadError:
    return ReadError(at, "12:00:00", path, 0, 5, doing)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (_error("d/f"), "Unavailable"),
        (_error("d/g"), "Unavailable"),  # the kernel asks for whole pages, which begin in the file before
        (_error("e/f"), f"{UNEXPLAINED}: nothing in the log"),
        (_error("d/f", "sweep"), f"{UNEXPLAINED}: everything is well again"),
    ],
)
def test_an_error_needs_a_line_about_its_file(error: ReadError, cause: str) -> None:
    assert explain(error, LINE, [], frozenset({"Unavailable"}), ORDER) == cause


def test_a_cause_that_the_scenario_cannot_have_explains_nothing() -> None:
    assert explain(_error("d/f"), LINE, [], frozenset({"CacheError"}), ORDER).startswith(UNEXPLAINED)


def test_a_restart_explains_errors_while_it_lasts_only() -> None:
    log = "ts=2026-01-01 level=ERROR logger=veneer.daemon.supervisor pid=1 worker ended pid=2 status='SIGKILL'"
    window = Window("restart", frozenset(), 1.0, 6.0)
    assert explain(_error("d/f"), log, [window], frozenset(), ORDER) == "restart"
    assert explain(_error("d/f"), "", [window], frozenset(), ORDER).startswith(UNEXPLAINED)
    assert explain(_error("d/f", at=9.0), log, [window], frozenset(), ORDER).startswith(UNEXPLAINED)
