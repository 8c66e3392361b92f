"""Whatever is killed, nobody reads a hole: EROFS over a sparse file that a worker fills, and readers."""

import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from tests.daemon.supervised import ADOPTS, READY, STANDBY, TAKES_OVER, WORKER, Manager, running
from tests.daemon.supervised_program import BLOCK, DEVICE, PROGRAM, READERS, block
from veneer.erofs.writer import write_erofs
from veneer.mount import kernel
from veneer.mount.erofs import mount_erofs, one_file

pytestmark = pytest.mark.root

BLOCKS, READER_COUNT = 16384, 3


class Mounted:
    """EROFS over a sparse file, which must be marked before."""

    def __init__(self, directory: Path) -> None:
        self.device, self.image = directory / "device", directory / f"image{kernel.EROFS_SUFFIX}"
        self.place = directory / "place"
        self.place.mkdir()
        self.device.touch()
        os.truncate(self.device, BLOCKS * BLOCK)
        self.image.write_bytes(write_erofs(one_file(b"".join(map(block, range(BLOCKS))))).data)
        self.readers: list[subprocess.Popen[str]] = []
        self.environment = {DEVICE: os.fspath(self.device), READERS: str(READER_COUNT)}

    def start(self) -> None:
        mount_erofs(self.image, [self.device], self.place)
        for seed in range(READER_COUNT):
            command = [*PROGRAM, "reader", os.fspath(self.place / "file"), str(seed)]
            reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.readers.append(reader)

    def finish(self) -> dict[str, int]:
        """What the readers found."""
        total: dict[str, int] = {}
        for reader in self.readers:
            for name, count in json.loads(reader.communicate()[0]).items():
                total[name] = total.get(name, 0) + count
        self.readers.clear()
        return total

    def close(self) -> None:
        for reader in self.readers:
            reader.kill()
            reader.communicate()
        kernel.unmount_ours(self.place, lazy=True)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounted]:
    mounted = Mounted(tmp_path)
    yield mounted
    mounted.close()


def test_no_death_lets_anybody_read_a_hole(tmp_path: Path, mounted: Mounted) -> None:
    run_dir = tmp_path / "run"
    roles = ("worker", "supervisor", "standby")
    rounds = [list(killed) for count in (1, 2) for killed in combinations(roles, count)] * 3
    choose = random.Random(5)
    choose.shuffle(rounds)
    with running(run_dir, environment=mounted.environment) as daemon:
        mounted.start()
        for killed in rounds:
            choose.shuffle(killed)
            # Every reader waits for a hole, in an event that the worker has read and not answered.
            daemon.ask("hold")
            daemon.kill(*killed)
            texts = []
            if "worker" in killed:
                texts += [rf"events_failed={READER_COUNT}", WORKER, READY]
            if "supervisor" in killed:
                texts.append(ADOPTS if "standby" in killed else TAKES_OVER)
            if "supervisor" in killed or "standby" in killed:
                texts.append(STANDBY)
            daemon.expect(*texts)
            if "worker" not in killed:
                daemon.ask("release")
        daemon.ask("hold")
        daemon.ask("release")
        found = mounted.finish()
        assert found["wrong"] == 0
        assert found["right"] > 0
        # The kernel repeats a read that failed for want of a worker, and the next worker answers that.
        assert found["failed"] <= READER_COUNT * len(rounds)
        kernel.unmount_ours(mounted.place)
        daemon.kill("supervisor", number=signal.SIGTERM)
        daemon.until_gone()


def test_a_service_manager_keeps_readers_waiting_when_all_are_dead(tmp_path: Path, mounted: Mounted) -> None:
    run_dir = tmp_path / "run"
    manager = Manager(run_dir, abstract=True)
    environment = mounted.environment | manager.environment("control")
    with running(run_dir, environment=environment, fds=[manager.control.fileno()]) as daemon:
        manager.expect("FDSTORE=1", "READY=1")
        mounted.start()
        daemon.ask("hold")
        daemon.kill("worker", "standby", "supervisor")
        daemon.until_gone()
    assert manager.group is not None
    environment = mounted.environment | manager.environment("control", "group")
    with running(run_dir, environment=environment, fds=[manager.control.fileno(), manager.group]) as daemon:
        assert f"events_failed={READER_COUNT}" in "".join(daemon.lines)
        assert "--fresh-group" not in daemon.ask("hold").arguments
        daemon.ask("release")
        found = mounted.finish()
        assert found["wrong"] == 0
        assert found["right"] > 0
        kernel.unmount_ours(mounted.place)
    manager.close()
