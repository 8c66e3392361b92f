"""Whatever is killed, the daemon goes on."""

import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.daemon.supervised import ADOPTS, READY, STANDBY, TAKES_OVER, WORKER, Daemon, Manager, running
from tests.daemon.supervised_program import MODE, PROGRAM
from veneer.daemon import children, primary
from veneer.daemon.children import Worker
from veneer.daemon.held import Held
from veneer.daemon.process import Process
from veneer.mount import fanotify

pytestmark = pytest.mark.root


def say(*arguments: str | Path, mode: str = "") -> tuple[int, dict[str, object]]:
    """What a daemon that does not stay says, and its exit code."""
    command = [*PROGRAM, "supervisor", *[os.fspath(word) for word in arguments]]
    done = subprocess.run(command, env={**os.environ, MODE: mode}, capture_output=True, check=False)
    answer: dict[str, object] = json.loads(done.stdout)
    return done.returncode, answer


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / ("long" * 30) / "run"


@pytest.fixture
def daemon(run_dir: Path) -> Iterator[Daemon]:
    with running(run_dir) as daemon:
        yield daemon


# Beginning and end


def test_a_life(run_dir: Path) -> None:
    with running(run_dir) as daemon:
        assert json.loads(daemon.said.readline()) == {"type": "ready"}
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((run_dir / "daemon.sock").stat().st_mode) == 0o600
        assert daemon.pids["restarts"] == 0
        assert len({daemon.pids[role] for role in ("supervisor", "standby", "worker")}) == 3
        daemon.kill("supervisor", number=signal.SIGTERM)
        assert daemon.process.wait() == 0
        daemon.until_gone()
        assert sorted(path.name for path in run_dir.iterdir()) == ["daemon.lock"]


def test_one_a_run_directory(daemon: Daemon, run_dir: Path) -> None:
    assert say(run_dir) == (0, {"type": "running"})
    daemon.kill("supervisor")
    assert say(run_dir) == (0, {"type": "running"})


def test_in_the_background_it_lets_go(run_dir: Path) -> None:
    command = [*PROGRAM, "supervisor", os.fspath(run_dir), "--background"]
    # Returns, because nothing that stays has the pipes open.
    done = subprocess.run(command, capture_output=True, check=True)
    supervisor = os.pidfd_open(json.loads((run_dir / "daemon.json").read_bytes())["supervisor"])
    assert json.loads(done.stdout) == {"type": "ready"}
    assert done.stderr == b""
    signal.pidfd_send_signal(supervisor, signal.SIGTERM)
    with open(supervisor) as ended:
        select.select([ended], [], [])
    assert "ended code=0" in (run_dir / "daemon.log").read_text()


def test_a_run_directory_of_somebody_else(run_dir: Path) -> None:
    run_dir.mkdir(parents=True)
    run_dir.chmod(0o770)
    code, answer = say(run_dir)
    assert code == answer["code"] == 40
    assert "another user" in str(answer["message"])
    run_dir.chmod(0o700)
    os.chown(run_dir, 1234, -1)
    assert say(run_dir)[0] == 40


@pytest.mark.parametrize(
    ("mode", "message", "hint"),
    [
        ("fail", "there is no cheese", "buy some"),
        ("die", "the daemon's worker ended before it was ready: signal SIGKILL", None),
    ],
)
def test_a_daemon_that_cannot_start_says_why(run_dir: Path, mode: str, message: str, hint: str | None) -> None:
    assert say(run_dir, mode=mode) == (40, {"type": "error", "code": 40, "message": message, "hint": hint})
    assert sorted(path.name for path in run_dir.iterdir()) == ["daemon.lock"]


def test_a_worker_that_ends_ends_the_daemon(daemon: Daemon) -> None:
    daemon.order("exit 0")
    assert daemon.process.wait() == 0


def test_a_client_that_comes_as_the_worker_ends_is_served(daemon: Daemon) -> None:
    first = daemon.ask("who").pid
    os.kill(first, signal.SIGSTOP)
    with daemon.connection() as one, daemon.connection() as other:
        one.sendall(b"exit 0")
        other.sendall(b"who")
        os.kill(first, signal.SIGCONT)
        assert json.loads(other.recv(4096))["pid"] != first


def test_no_end_before_the_worker_can_hear_of_it(run_dir: Path) -> None:
    with running(run_dir, environment={MODE: "late"}, ready=False) as daemon:
        daemon.expect(WORKER)
        daemon.ask("who")
        daemon.kill("supervisor", number=signal.SIGTERM)
        daemon.expect("stopping")
        daemon.order("ready")
        daemon.expect("worker got SIGTERM")
        assert daemon.process.wait() == 0


def test_asking_twice_for_the_end_is_passed_on(daemon: Daemon) -> None:
    daemon.ask("stubborn")
    for _ in range(2):
        daemon.kill("supervisor", number=signal.SIGTERM)
        daemon.expect("worker got SIGTERM")
    assert daemon.process.wait() == 0


# Deaths


def test_of_the_worker(daemon: Daemon) -> None:
    fresh = daemon.ask("who")
    assert "--fresh-group" in fresh.arguments
    daemon.kill("worker")
    (died,) = daemon.expect(r"worker ended pid=(\d+) status='signal SIGKILL'.*again_in=0$")
    assert int(died[1]) == fresh.pid
    second = daemon.ask("who")
    assert second.pid != fresh.pid
    assert second.arguments == [x for x in fresh.arguments if x != "--fresh-group"]
    assert daemon.pids["restarts"] == 1
    for code, delay in ((3, " again_in=0.1"), (75, ""), (254, " again_in=0.2")):
        daemon.expect(READY)
        daemon.order(f"exit {code}")
        daemon.expect(rf"exit code {code}' events_failed=0{delay}$")
    assert daemon.pids["restarts"] == 3


def test_of_the_standby(daemon: Daemon) -> None:
    before, worker = daemon.pids["standby"], daemon.ask("who").pid
    daemon.kill("standby")
    assert int(daemon.expect(STANDBY)[0][1]) != before
    assert daemon.ask("who").pid == worker


def test_of_the_primary(daemon: Daemon) -> None:
    worker, standby = daemon.ask("who").pid, daemon.pids["standby"]
    daemon.kill("supervisor")
    taken, _ = daemon.expect(TAKES_OVER, STANDBY)
    assert int(taken[1]) == standby
    assert daemon.ask("who").pid == worker
    # It is no child of this supervisor, which knows nevertheless how it ended.
    daemon.order("exit 0")
    daemon.expect("status='exit code 0'", "ended code=0")
    daemon.until_gone()


def test_of_both_supervisors(daemon: Daemon) -> None:
    worker = daemon.ask("who").pid
    daemon.kill("supervisor", "standby")
    daemon.expect(ADOPTS, STANDBY)
    assert daemon.ask("who").pid == worker
    daemon.kill("supervisor")
    daemon.expect(TAKES_OVER, STANDBY)
    daemon.kill("supervisor", number=signal.SIGTERM)
    daemon.expect("worker got SIGTERM", "ended code=0")
    daemon.until_gone()


def test_of_worker_and_primary(daemon: Daemon) -> None:
    daemon.kill("worker", "supervisor")
    daemon.expect(TAKES_OVER, "worker ended .* status='signal SIGKILL'", WORKER, STANDBY, READY)
    assert daemon.ask("who").pid == daemon.pids["worker"]


def test_reading_the_end_of_the_primary_only_once(daemon: Daemon) -> None:
    """The standby lives on in the place of the primary as often as it has to."""
    worker = daemon.ask("who").pid
    for _ in range(3):
        daemon.kill("supervisor")
        daemon.expect(TAKES_OVER, STANDBY)
    assert daemon.ask("who").pid == worker


def test_a_stopped_standby_is_replaced_when_it_is_needed(daemon: Daemon) -> None:
    stopped = os.pidfd_open(daemon.pids["standby"])
    signal.pidfd_send_signal(stopped, signal.SIGSTOP)
    daemon.kill("supervisor", number=signal.SIGTERM)
    assert daemon.process.wait() == 0  # which killed it
    with open(stopped) as ended:
        select.select([ended], [], [])


def test_memory_is_taken_from_others_first(daemon: Daemon) -> None:
    ours = int(Path("/proc/self/oom_score_adj").read_text())
    assert daemon.ask("who").oom_score_adj == ours
    daemon.kill("supervisor", "standby")
    daemon.expect(ADOPTS, STANDBY)
    daemon.ask("who")
    # Some containers may not ask for less than they have (CAP_SYS_RESOURCE).
    refused = subprocess.run(["sh", "-c", "echo -900 > /proc/self/oom_score_adj"], check=False).returncode
    for role in ("supervisor", "standby"):
        found = int(Path(f"/proc/{daemon.pids[role]}/oom_score_adj").read_text())
        assert found == (ours if refused else -900)
    daemon.kill("worker")
    assert daemon.ask("who").oom_score_adj == ours


# Silence


def test_a_silent_worker_is_replaced(run_dir: Path) -> None:
    with running(run_dir, "--watchdog", "1") as daemon:
        hung = daemon.ask("hush").pid
        daemon.expect(f"worker hangs, killing it pid={hung}", READY)
        assert daemon.ask("nonsense").pid != hung
        daemon.expect("worker says nonsense")


def test_time_in_which_nothing_ran_is_no_silence(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(primary, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(children, "time", SimpleNamespace(monotonic=lambda: now))
    supervisor = primary.Supervisor(os.fspath(run_dir), Held(-1, -1))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        worker = supervisor._worker = Worker(Process.of_child(process.pid), ours)
        now += 10_000
        for _ in range(primary.TICKS):
            supervisor._tick()
            now += supervisor._tick_s
        assert process.poll() is None
        supervisor._tick()
        assert process.wait() == -signal.SIGKILL
        worker.forget()


# Reload


def test_reload_is_a_new_program_with_the_same_descriptors(daemon: Daemon, run_dir: Path) -> None:
    before = daemon.pids
    daemon.kill("supervisor", number=signal.SIGHUP)
    daemon.expect("worker got SIGHUP", "exit code 75", STANDBY, WORKER, READY)
    answer = daemon.ask("who")
    after = daemon.pids
    assert after["supervisor"] == before["supervisor"]
    assert b"--resume" in Path(f"/proc/{after['supervisor']}/cmdline").read_bytes()
    assert answer.pid == after["worker"] != before["worker"]
    assert after["standby"] != before["standby"]
    assert not Path(f"/proc/{before['standby']}").exists()
    assert "--fresh-group" not in answer.arguments
    assert after["restarts"] == 0
    assert say(run_dir) == (0, {"type": "running"})
    daemon.kill("supervisor")
    daemon.expect(TAKES_OVER, STANDBY)
    assert daemon.ask("who").pid == after["worker"]
    # Nothing was said a second time to whoever started it.
    daemon.kill("supervisor", number=signal.SIGTERM)
    daemon.until_gone()
    assert daemon.said.read() == '{"type": "ready"}\n'


def test_an_end_that_is_asked_for_during_a_reload(daemon: Daemon) -> None:
    for number in (signal.SIGSTOP, signal.SIGHUP, signal.SIGTERM, signal.SIGCONT):
        daemon.kill("supervisor", number=number)
    assert daemon.process.wait() == 0


# The service manager


@pytest.fixture(params=["abstract", "path"])
def manager(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Manager]:
    manager = Manager(tmp_path / "run", abstract=request.param == "abstract")
    yield manager
    manager.close()


def test_under_a_service_manager(tmp_path: Path, manager: Manager) -> None:
    run_dir = tmp_path / "run"
    with running(run_dir, environment=manager.environment("control"), fds=[manager.control.fileno()]) as daemon:
        manager.expect("FDSTORE=1", "READY=1", "WATCHDOG=1")
        daemon.kill("supervisor")
        taken, _ = daemon.expect(TAKES_OVER, STANDBY)
        manager.expect(f"MAINPID={taken[1]}", "WATCHDOG=1")
        daemon.kill("supervisor", "standby")
        adopts, _ = daemon.expect(ADOPTS, STANDBY)
        manager.expect(f"MAINPID={adopts[1]}", "WATCHDOG=1")
        daemon.ask("who")
        daemon.kill("supervisor", number=signal.SIGHUP)
        daemon.expect(READY)
        manager.expect("RELOADING=1", "READY=1", "WATCHDOG=1")
        daemon.kill("supervisor", number=signal.SIGTERM)
        manager.expect("STOPPING=1", "FDSTOREREMOVE=1")
        daemon.until_gone()
    assert (run_dir / "daemon.sock").exists()  # it is not ours to remove


def test_without_a_group(tmp_path: Path) -> None:
    """Where the kernel gives no group, the daemon serves what needs none."""
    code = (
        "import sys; from veneer.mount import fanotify; from veneer.daemon.supervisor import main\n"
        "def refused(): raise PermissionError(1, 'Operation not permitted')\n"
        "fanotify.open_group = refused\n"
        f"worker = {(*PROGRAM, 'worker')!r}\n"
        "sys.exit(main(sys.argv[1:], worker_program=worker))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, os.fspath(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    daemon = Daemon(tmp_path / "run", process)
    try:
        daemon.expect("no fanotify group.*cause='Operation not permitted'", READY)
        arguments = daemon.ask("who").arguments
        assert arguments[arguments.index("--group") + 1] == "none"
        daemon.kill("worker")
        daemon.order("exit 0")
        daemon.until_gone()
    finally:
        daemon.clean_up()


def test_what_a_supervisor_loads() -> None:
    """The less there is in the process, the less memory it takes and the less can go wrong in it."""
    code = "import sys, json, veneer.daemon.supervisor; print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"]
    modules = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    ours = {name for name in modules if name.partition(".")[0] == "veneer"}
    small = ("children", "held", "instance", "myself", "primary", "process", "supervisor", "systemd")
    assert ours == {
        *("veneer", "veneer.daemon", "veneer.mount", "veneer.mount.fanotify"),
        *(f"veneer.daemon.{name}" for name in small),
    }
    others = {name.partition(".")[0] for name in modules} - {"veneer", "__main__"}
    assert others <= sys.stdlib_module_names
    assert not others & {"asyncio", "subprocess", "threading", "logging", "argparse", "dataclasses", "inspect"}


def test_the_sweep_covers_all_numbers_that_events_can_have() -> None:
    assert fanotify.raise_descriptor_limit() <= fanotify.MAX_DESCRIPTORS
