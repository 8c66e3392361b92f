"""The faults, one function each: called with readers at work, they return with the cause of trouble gone."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from crashes import reboot
from crashes.machine import RESIDENT
from crashes.readers import Failure
from crashes.rounds import Round

__all__ = ["SCENARIOS", "Scenario"]

_BOTH = ("erofs-fanotify", "erofs-fuse")
#: What readers of a tree get that is not mounted at the moment, or whose process has gone.
_UNMOUNTED = ("ENOENT", "ENOTDIR", "ESTALE")
_SERVER_GONE = ("EIO", "ENOTCONN", "ECONNABORTED", "ENODEV", *_UNMOUNTED)
#: Causes that the log names: classes of errors.
_NO_REGISTRY = frozenset({"Unavailable", "RegistryError"})
_BAD_REGISTRY = _NO_REGISTRY | {"IntegrityError", "NotFound", "Unauthorized"}
_NO_DISK = frozenset({"CacheError"})
_MAX_FAULTS = 3
_EVICTION_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One way for things to go wrong.

    Args:
        act: does it.
        about: one line for people.
        backends: those that it makes sense for.
        causes: classes of errors in the log that it may lead to.
        quota: of the cache, as a share of the content; None for plenty.
        disk: size of the cache's disk, as a multiple of the content; None for the usual one.
        hasty: whether spans may be evicted soon after their last use.
        damages: whether the cache is damaged on purpose.
    """

    act: Callable[[Round], None]
    about: str
    backends: tuple[str, ...] = _BOTH
    causes: frozenset[str] = frozenset()
    quota: float | None = None
    disk: float | None = None
    hasty: bool = False
    damages: bool = False


def _kill(*roles: str) -> Callable[[Round], None]:
    def act(round_: Round) -> None:
        for _ in range(round_.rng.randint(1, _MAX_FAULTS)):
            round_.pause()
            if round_.machine.resident:
                with round_.fault("restart"):
                    order = round_.rng.sample(roles, len(roles))
                    hit = round_.machine.signal(*order)
                    round_.machine.wait_until_whole(hit)
            else:
                _kill_and_remount(round_)

    return act


def _kill_and_remount(round_: Round) -> None:
    """The process of the mount is the mount: without it there are errors until it is mounted again."""
    with round_.fault("process of the mount killed", *_SERVER_GONE):
        round_.machine.signal("worker")
        if not round_.pool.wait_for_errors(1, 20.0):
            raise Failure("readers do not notice that nobody serves the mount")
        round_.machine.unmount()
        round_.mount()
        round_.well_again()


def _worker_offline(round_: Round) -> None:
    """What is cached must come back without the registry."""
    round_.pause()
    with round_.fault("restart"):
        round_.registry.down()
        round_.pause(0.2)
        round_.machine.wait_until_whole(round_.machine.signal("worker"))
        round_.well_again(1)
        round_.registry.up()


def _upgrade(round_: Round) -> None:
    for _ in range(round_.rng.randint(1, _MAX_FAULTS)):
        round_.pause()
        with round_.fault("restart"):
            before = round_.machine.signal("supervisor", number=signal.SIGHUP)
            worker = {"worker": before["worker"]} if "worker" in before else round_.machine.processes()
            round_.machine.wait_until_whole({"worker": worker["worker"]})


def _registry_cut(round_: Round) -> None:
    for _ in range(round_.rng.randint(1, _MAX_FAULTS)):
        round_.pause()
        with round_.fault("registry cut off"):
            round_.registry.down()
            if round_.rng.random() < 0.5:
                round_.pause()
            else:
                # Longer than a read may wait; unless everything is there already.
                round_.pool.wait_for_errors(1, 5.0)
            round_.registry.up()


def _wrong_bytes(round_: Round) -> None:
    for _ in range(round_.rng.randint(1, _MAX_FAULTS)):
        round_.pause()
        with round_.fault("wrong bytes served"):
            round_.registry.wrong(round_.rng.randrange(1 << 30))
            round_.pause(2.0)
            round_.registry.well()


def _disk_full(round_: Round) -> None:
    assert round_.disk is not None
    for _ in range(round_.rng.randint(1, _MAX_FAULTS)):
        round_.pause()
        with round_.fault("disk full"):
            round_.disk.fill()
            round_.pause(2.0)
            round_.disk.relieve()
            round_.well_again()


def _unmount(round_: Round) -> None:
    machine = round_.machine
    for _ in range(round_.rng.randint(1, _MAX_FAULTS)):
        round_.pause()
        with round_.fault("unmounted", *_UNMOUNTED):
            lazy = round_.rng.random() < 0.5
            unmounted = machine.unmount(lazy=lazy)
            round_.outcome.notes["lazy" if lazy else "not lazy" if unmounted else "in use"] += 1
            if unmounted:
                round_.pause(0.3)
                round_.mount()
        round_.well_again()


def _reboot(round_: Round) -> None:
    """Power off at a random moment; damage what a disk may damage; come back."""
    round_.pause(2.0)
    round_.pool.stop()
    round_.machine.power_off()
    round_.outcome.faults += 1
    damage = reboot.as_before_a_boot(round_.machine.cache_dir, round_.rng)
    round_.outcome.notes.update(damage)
    round_.mount()
    round_.read()


def _evict(round_: Round) -> None:
    before = _evicted(round_)
    until = time.monotonic() + _EVICTION_DEADLINE_S
    while _evicted(round_) == before:
        if time.monotonic() > until:
            raise Failure(f"nothing was evicted in {_EVICTION_DEADLINE_S:g} s")
        round_.pause(2.0)
        round_.well_again()
    round_.outcome.faults += 1
    round_.well_again(50)
    round_.outcome.notes["spans evicted"] += _evicted(round_) - before


def _evicted(round_: Round) -> int:
    return sum(int(mount["report"]["store"]["evicted"]) for mount in round_.machine.status())


SCENARIOS = {
    "worker": Scenario(_kill("worker"), "kill -9 of the worker"),
    "supervisor": Scenario(_kill("supervisor"), "kill -9 of the supervisor", (RESIDENT,)),
    "standby": Scenario(_kill("standby"), "kill -9 of the standby", (RESIDENT,)),
    "worker+supervisor": Scenario(_kill("worker", "supervisor"), "kill -9 of both", (RESIDENT,)),
    "worker+standby": Scenario(_kill("worker", "standby"), "kill -9 of both", (RESIDENT,)),
    "supervisor+standby": Scenario(_kill("supervisor", "standby"), "kill -9 of both", (RESIDENT,)),
    "worker-offline": Scenario(
        _worker_offline, "kill -9 of the worker without a registry", (RESIDENT,), _NO_REGISTRY
    ),
    "upgrade": Scenario(_upgrade, "SIGHUP: worker and supervisor replace themselves", (RESIDENT,)),
    "registry-cut": Scenario(_registry_cut, "registry cut off, and back", causes=_NO_REGISTRY),
    "wrong-bytes": Scenario(_wrong_bytes, "registry serves wrong bytes", causes=_BAD_REGISTRY),
    "disk-full": Scenario(_disk_full, "no space left for the cache", causes=_NO_DISK, disk=1.5),
    "unmount": Scenario(_unmount, "unmount under load, lazily or not, and mount again"),
    "reboot": Scenario(_reboot, "power off, damaged cache, other boot id", damages=True),
    "evict": Scenario(_evict, "eviction under load, quota a third of the image", quota=1 / 3, hasty=True),
}
