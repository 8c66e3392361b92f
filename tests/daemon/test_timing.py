"""The timing record of a start, from the command line and from the mount that it is about."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_commands import veneer
from veneer.settings import Settings
from veneer.timing.record import TimingRecord

pytestmark = [pytest.mark.root, pytest.mark.fuse]

#: Of every mount, whoever serves it.
SERVED = {
    "resolve",
    "config",
    "index",
    "pack index",
    "store",
    "attach",
    "bundle",
    "metadata",
    "show",
    "overlay",
}


@pytest.mark.parametrize("backend", ["erofs-fanotify", "fuse"])
def test_a_run_has_a_record_of_all_of_it(workplace: Path, settings: Settings, image: str, backend: str) -> None:
    record_file, report_file = workplace / "record.json", workplace / "report.json"
    files = ("--timing-record", str(record_file), "--report", str(report_file))
    done = veneer(settings, "run", "--backend", backend, *files, image)
    assert (done.returncode, done.stdout) == (0, "hello\n")
    record = TimingRecord.parse(record_file.read_bytes())
    report: dict[str, Any] = json.loads(report_file.read_text())
    assert record.backend == backend
    assert record.command == ("sh", "-c", "cat /etc/hello")
    assert record.digest == report["mount"]["digest"]

    names = {phase.name for phase in record.phases}
    own = {"guard", "tail", "mount"} if backend == "erofs-fanotify" else set()
    assert names == SERVED | own | {"start-up", "ask", "spawn"}
    ask = next(phase for phase in record.phases if phase.name == "ask")
    for phase in record.phases:
        assert phase.ended is not None
        assert phase.began <= phase.ended
        if phase.process == "daemon":
            assert ask.ended is not None
            assert ask.began <= phase.began <= phase.ended <= ask.ended
    moments = [record.mark(name) for name in ("mounted", "first output", "end")]
    assert moments == sorted(moment or -1.0 for moment in moments)

    store = report["report"]["store"]
    assert len(record.ranges) == store["requests"] > 0
    assert record.bytes_fetched == store["bytes_fetched"]
    assert sum(read.length for read in record.reads) == store["bytes_read"]
    assert len([read for read in record.reads if read.wait > 0]) == store["misses"]
    for one in record.ranges:
        assert one.first_byte is not None
        assert one.last_byte is not None
        assert one.ready is not None
        assert one.queued <= one.sent <= one.first_byte <= one.last_byte <= one.ready


def test_a_mount_tells_of_itself_at_once_and_later(workplace: Path, settings: Settings, image: str) -> None:
    mountpoint, drawing = workplace / "mnt", workplace / "mount.svg"
    done = veneer(
        settings, "mount", image, str(mountpoint), "--timing", "--timing-record", str(drawing), "--json"
    )
    assert done.returncode == 0
    identifier = json.loads(done.stdout)["id"]
    assert "resolve" in "".join(ET.parse(drawing).getroot().itertext())
    assert (mountpoint / "large").read_bytes()

    by_place = json.loads(veneer(settings, "trace", "show", str(mountpoint), "--json").stdout)
    assert by_place["bytes_fetched"] > 0
    assert veneer(settings, "trace", "show", identifier).stdout.count("demand") >= 1

    saved, again = workplace / "later.json", workplace / "later.svg"
    assert veneer(settings, "trace", "show", identifier, "-o", str(saved)).returncode == 0
    assert veneer(settings, "trace", "draw", str(saved), str(again)).returncode == 0
    assert ET.parse(again).getroot().tag.endswith("svg")
    assert veneer(settings, "umount", str(mountpoint)).returncode == 0


def test_what_cannot_be_timed_is_said(workplace: Path, settings: Settings, image: str) -> None:
    done = veneer(settings, "run", "--timing-record", "record.png", image)
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2,
        "error: record.png ends neither with .json nor with .svg",
    )
    assert veneer(settings, "mount", image, "/mnt", "--foreground", "--timing").returncode == 2
    assert veneer(settings, "trace", "show", str(workplace)).returncode == 2
    broken = workplace / "broken.json"
    broken.write_text("{}")
    assert veneer(settings, "trace", "draw", str(broken), str(workplace / "x.svg")).returncode == 20
    done = veneer(settings, "trace", "show", str(broken))
    assert (done.returncode, done.stderr.splitlines()[1]) == (
        2,
        f"hint: to draw a timing record: veneer trace draw {broken} NAME.svg",
    )
