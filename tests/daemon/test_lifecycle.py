"""The beginning of a daemon where there has been one, whatever is left of that."""

import fcntl
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.daemon.test_daemon import kill, mount, nothing_mounted, pending_signals, processes
from tests.processes import stop_at_once
from tests.waiting import eventually
from veneer.daemon import lifecycle, mounts
from veneer.daemon.ask import Request, Unanswered, ask
from veneer.errors import MountError
from veneer.events import Reporter, silent
from veneer.settings import Settings

pytestmark = [pytest.mark.root]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return replace(settings, backend="erofs-fanotify")


def test_what_is_left_of_a_dead_daemon_for_a_moment_does_not_keep_another_one_from_starting(
    workplace: Path, settings: Settings, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that has not executed its program yet has the lock, and the socket, of who forked it."""
    mount(image, workplace / "mnt", settings)
    lock = os.open(settings.run_dir / "daemon.lock", os.O_RDWR)
    kill(settings, "worker", "supervisor", "standby")
    fcntl.flock(lock, fcntl.LOCK_EX)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        if not pauses:
            os.close(lock)
        pauses.append(seconds)

    with (workplace / "mnt/large").open("rb"):  # or it would be gone with the first look
        monkeypatch.setattr(time, "sleep", pause)
        (found,) = mounts.list_mounts(settings.run_dir).mounts
        assert pauses
        assert found.record.kind == "detached", "another daemon has given it up"
        monkeypatch.undo()
    nothing_mounted(settings)


def test_a_question_that_died_with_the_worker_is_asked_again(
    workplace: Path, settings: Settings, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(image, workplace / "mnt", settings)
    asked: list[str] = []

    class Broken(Request):
        def answer(self, timeout_s: float | None = None, report: Reporter = silent) -> dict[str, object]:
            asked.append(self._what)
            if len(asked) == 1:
                self._socket.close()
                raise Unanswered("closed the connection without an answer")
            return super().answer(timeout_s, report)

    monkeypatch.setattr(lifecycle, "Request", Broken)
    lifecycle.restore(settings.run_dir)
    assert len(asked) == 2
    monkeypatch.undo()
    mounts.umount(workplace / "mnt", settings.run_dir)


def test_a_worker_that_ends_after_its_answer_keeps_nobody_from_unmounting(
    workplace: Path, settings: Settings, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(image, workplace / "mnt", settings)
    answers: list[object] = []

    def answered(run_dir: Path, op: str) -> dict[str, object]:
        answer = lifecycle.ask_started(run_dir, op)
        if not answers:
            kill(settings, "worker")
        answers.append(answer["worker"])
        return answer

    monkeypatch.setattr(mounts, "ask_started", answered)
    mounts.umount(workplace / "mnt", settings.run_dir)
    assert len(set(answers)) == 2
    nothing_mounted(settings)


def test_a_daemon_whose_worker_ends_while_it_is_asked_can_be_stopped(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lifecycle.start_daemon(settings.run_dir)
    asked: list[str] = []

    def ask_first(run_dir: Path, name: str, op: str) -> dict[str, object]:
        asked.append(op)
        if len(asked) == 1:
            raise Unanswered("closed the connection without an answer")
        return ask(run_dir, name, op)

    monkeypatch.setattr(lifecycle, "ask", ask_first)
    assert lifecycle.stop_daemon(settings.run_dir)
    assert not lifecycle.stop_daemon(settings.run_dir)


def test_a_supervisor_that_is_killed_before_it_is_signalled_has_a_successor_that_is(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lifecycle.start_daemon(settings.run_dir)
    send, sent = signal.pidfd_send_signal, []

    def send_to_one_that_has_gone(process: int, number: signal.Signals) -> None:
        if number not in sent:
            sent.append(number)
            supervisor = processes(settings)["supervisor"]
            eventually(lambda: processes(settings)["standby"] is not None)
            os.kill(supervisor, signal.SIGKILL)
            eventually(lambda: not Path(f"/proc/{supervisor}").exists())
        send(process, number)

    monkeypatch.setattr(signal, "pidfd_send_signal", send_to_one_that_has_gone)
    worker = processes(settings)["worker"]
    lifecycle.restart_daemon(settings.run_dir)
    assert processes(settings)["worker"] != worker
    assert lifecycle.stop_daemon(settings.run_dir)
    assert not lifecycle.stop_daemon(settings.run_dir)
    assert sent == [signal.SIGHUP, signal.SIGTERM]


def test_a_restart_asks_the_successor_of_a_supervisor_that_is_killed_over_it(settings: Settings) -> None:
    lifecycle.start_daemon(settings.run_dir)
    eventually(lambda: processes(settings)["standby"] is not None)
    supervisor, worker = processes(settings)["supervisor"], processes(settings)["worker"]
    stop_at_once([supervisor])
    with ThreadPoolExecutor(1) as pool:
        restarting = pool.submit(lifecycle.restart_daemon, settings.run_dir)
        # It never learns of the request that it has got.
        eventually(lambda: "SIGHUP" in pending_signals(supervisor))
        os.kill(supervisor, signal.SIGKILL)
        restarting.result()
    assert processes(settings)["worker"] != worker
    assert lifecycle.stop_daemon(settings.run_dir)


def test_a_daemon_that_cannot_be_had_is_an_error_in_time(
    workplace: Path, settings: Settings, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(image, workplace / "mnt", settings)
    kill(settings, "worker", "supervisor", "standby")
    with (settings.run_dir / "daemon.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(lifecycle, "STOP_TIMEOUT_S", 0.1)
        with pytest.raises(MountError, match="no other can be started") as caught:
            mounts.list_mounts(settings.run_dir)
        assert "daemon.log" in str(caught.value.hint)
    monkeypatch.undo()
    assert mounts.list_mounts(settings.run_dir).daemon is not None
    nothing_mounted(settings)


def test_a_daemon_that_somebody_else_is_starting_is_waited_for(
    workplace: Path, settings: Settings, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is faster has the lock some milliseconds before it listens."""
    settings.run_dir.mkdir(mode=0o700)
    lock = os.open(settings.run_dir / "daemon.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        if not pauses:
            os.close(lock)
        pauses.append(seconds)

    monkeypatch.setattr(time, "sleep", pause)
    mount(image, workplace / "mnt", settings)
    monkeypatch.undo()
    assert pauses
    mounts.umount(workplace / "mnt", settings.run_dir)


def test_a_restart_costs_nobody_who_mounts_or_unmounts_meanwhile(
    workplace: Path, settings: Settings, image: str
) -> None:
    lifecycle.start_daemon(settings.run_dir)
    restarts = 0
    with ThreadPoolExecutor(1) as pool:
        restarting = pool.submit(lifecycle.restart_daemon, settings.run_dir)
        while restarts < 2:
            mount(image, workplace / "mnt", settings)
            assert (workplace / "mnt/etc/hello").read_bytes() == b"hello\n"
            mounts.umount(workplace / "mnt", settings.run_dir)
            if restarting.done():
                restarting.result()
                restarts += 1
                restarting = pool.submit(lifecycle.restart_daemon, settings.run_dir)
        restarting.result()
