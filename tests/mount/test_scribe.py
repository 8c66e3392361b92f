"""The process that writes metadata images: the same images, whatever becomes of the process."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.index.trees import unpack_index
from veneer.erofs.writer import write_erofs
from veneer.errors import IntegrityError, VeneerError
from veneer.index.merge import merge
from veneer.mount.metadata import MetadataImage
from veneer.mount.scribe import Scribe
from veneer.mount.scribe_main import Commission
from veneer.oci.digest import Digest

ARTIFACT = bytes.fromhex((Path(__file__).parents[1] / "index/vectors/artifact.hex").read_text())


@asynccontextmanager
async def working() -> AsyncIterator[Scribe]:
    scribe = Scribe()
    try:
        yield scribe
    finally:
        await scribe.aclose()


def commission(cache_dir: Path, artifact: bytes = ARTIFACT) -> Commission:
    return Commission(artifact, Digest.of(artifact), len(unpack_index(ARTIFACT)[0]), cache_dir, [])


def expected() -> bytes:
    return write_erofs(merge(*unpack_index(ARTIFACT))).data


async def test_it_writes_what_would_be_written_here(tmp_path: Path) -> None:
    async with working() as scribe:
        await scribe.start()
        pid = scribe.pid
        assert pid not in (None, os.getpid())
        written = await scribe.write(commission(tmp_path))
        assert written.path.read_bytes() == expected()
        assert written == commission(tmp_path).carry_out(), "what is known about it, too"
        assert scribe.pid == pid


@pytest.mark.root
async def test_it_goes_before_threads_that_nobody_waits_for(tmp_path: Path) -> None:
    async with working() as scribe:
        await scribe.write(commission(tmp_path))
        assert scribe.pid is not None
        assert os.getpriority(os.PRIO_PROCESS, scribe.pid) < os.getpriority(os.PRIO_PROCESS, 0)


async def test_its_death_costs_no_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with working() as scribe:
        await scribe.start()
        assert scribe.pid is not None
        os.kill(scribe.pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                assert (await scribe.write(commission(tmp_path / "a"))).path.read_bytes() == expected()

            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            os.kill(scribe.pid, signal.SIGKILL)
        assert "has died" in caplog.text
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert (await scribe.write(commission(tmp_path / "b"))).path.read_bytes() == expected()
            assert not caplog.text, "another process has taken its place"
            assert scribe.pid is not None
            idle = os.pidfd_open(scribe.pid)
            os.kill(scribe.pid, signal.SIGKILL)
            await trio.lowlevel.wait_readable(idle)
            os.close(idle)
            assert (await scribe.write(commission(tmp_path / "c"))).path.read_bytes() == expected()
        assert not caplog.text, "one that has died idle is noticed before it is asked"


async def test_errors_are_those_of_the_work(tmp_path: Path) -> None:
    damaged = ARTIFACT[:-1] + bytes([ARTIFACT[-1] ^ 1])
    async with working() as scribe:
        await scribe.start()
        pid = scribe.pid
        with pytest.raises(IntegrityError):
            await scribe.write(commission(tmp_path, damaged))
        assert (await scribe.write(commission(tmp_path))).path.read_bytes() == expected()
        assert scribe.pid == pid, "it lives through them"


async def test_ctrl_c_in_the_terminal_of_a_daemon_is_not_meant_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with working() as scribe:
        await scribe.write(commission(tmp_path / "a"))
        assert scribe.pid is not None
        os.kill(scribe.pid, signal.SIGINT)
        assert (await scribe.write(commission(tmp_path / "b"))).path.read_bytes() == expected()
    assert not caplog.text


async def test_who_stops_waiting_leaves_no_answer_to_the_next(tmp_path: Path) -> None:
    damaged = ARTIFACT[:-1] + bytes([ARTIFACT[-1] ^ 1])
    async with working() as scribe:
        await scribe.start()
        assert scribe.pid is not None
        os.kill(scribe.pid, signal.SIGSTOP)
        with trio.move_on_after(0.05) as scope:
            await scribe.write(commission(tmp_path, damaged))
        assert scope.cancelled_caught
        with trio.fail_after(60):
            assert (await scribe.write(commission(tmp_path))).path.read_bytes() == expected()


async def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    program = (
        "import trio, sys, os\nfrom veneer.mount.scribe import Scribe\nscribe = Scribe()\n"
        "trio.run(scribe.start)\nprint(scribe.pid, flush=True)\nsys.stdin.read()"
    )
    parent = await trio.lowlevel.open_process(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child = os.pidfd_open(int(await parent.stdout.receive_some()))
    parent.kill()
    await parent.wait()
    with trio.fail_after(60):
        await trio.lowlevel.wait_readable(child)
    os.close(child)
    await parent.stdout.aclose()
    assert parent.stdin is not None
    await parent.stdin.aclose()


async def test_an_image_that_is_being_written_is_not_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with working() as scribe:
        carried_out = count(scribe, monkeypatch)
        written = []

        async def write() -> None:
            written.append(await scribe.write(commission(tmp_path)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(scribe.write_ahead, commission(tmp_path))
            nursery.start_soon(write)
            nursery.start_soon(write)
        assert len(carried_out) == 1
        assert [one.path.read_bytes() for one in written] == [expected()] * 2
        await scribe.write_ahead(commission(tmp_path))
        assert len(carried_out) == 1, "it is there"


async def test_who_waits_is_served_when_the_first_who_asked_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with working() as scribe:
        await scribe.start()
        assert scribe.pid is not None
        os.kill(scribe.pid, signal.SIGSTOP)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                first = trio.CancelScope()

                async def ask_and_go_away() -> None:
                    with first:
                        await scribe.write(commission(tmp_path))

                async def wait() -> None:
                    assert (await scribe.write(commission(tmp_path))).path.read_bytes() == expected()

                nursery.start_soon(ask_and_go_away)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                first.cancel()


async def test_what_fails_ahead_is_told_to_who_asks_for_it(tmp_path: Path) -> None:
    damaged = ARTIFACT[:-1] + bytes([ARTIFACT[-1] ^ 1])
    async with working() as scribe:
        await scribe.write_ahead(commission(tmp_path, damaged))
        with pytest.raises(IntegrityError):
            await scribe.write(commission(tmp_path, damaged))


def count(scribe: Scribe, monkeypatch: pytest.MonkeyPatch) -> list[Commission]:
    """The commissions that are carried out."""
    carried_out: list[Commission] = []
    have_written = scribe._have_written

    async def counting(commission: Commission) -> MetadataImage | VeneerError:
        carried_out.append(commission)
        return await have_written(commission)

    monkeypatch.setattr(scribe, "_have_written", counting)
    return carried_out
