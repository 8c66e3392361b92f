"""What a bench leaves behind: one environment file and one line of JSON for each event.

A result directory is the raw material of tables and reports. Everything that a figure rests on is in it, so
that a second reader can compute the figure again, or measure it again with the command line that is in it.
Events are appended when they happen and never changed: a bench that is interrupted leaves what it has
measured.

Not for: derived figures. Those are made from the events by :mod:`veneer.lab.statistics`, each time anew.

The format is documented in docs/reference/lab-results.md.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from veneer.errors import IntegrityError, NotFound, UnsupportedFormat
from veneer.lab.decode import decode
from veneer.oci.canonical import canonical_json, parse_json

__all__ = [
    "ENVIRONMENT_FILE",
    "EVENTS_FILE",
    "Environment",
    "Event",
    "ImageEvent",
    "LimitEvent",
    "Machine",
    "Network",
    "NetworkEvent",
    "ResultWriter",
    "RunEvent",
    "SetupEvent",
    "SystemEvent",
    "read_environment",
    "read_events",
]

#: Of both files; a reader refuses others.
SCHEMA = 1
ENVIRONMENT_FILE = "environment.json"
EVENTS_FILE = "events.jsonl"
#: A line has at most a mount's report and a timing record.
_MAX_LINE = 8 << 20
_MAX_ENVIRONMENT = 1 << 20


@dataclass(frozen=True, slots=True)
class Network:
    """A distance to the registry.

    Args:
        name: what it is called in results, such as ``10ms-1gbit``.
        rtt_ms: round-trip time that is added to loopback's, in milliseconds.
        mbit: downstream bandwidth that all connections share, in 10^6 bits a second; 0 is unlimited.
    """

    name: str
    rtt_ms: float
    mbit: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What the figures were measured on.

    Args:
        kernel: release and version of the kernel.
        architecture: of the machine, as ``uname -m`` says.
        cpu: model name.
        cpus: how many the bench could use.
        memory: bytes.
        file_system: of the work directory: type, device.
        read_ahead_kb: of the work directory's block device; None when it has none.
        settings: other facts of the kernel that change figures: scheduler, governor, transparent huge pages.
    """

    kernel: str
    architecture: str
    cpu: str
    cpus: int
    memory: int
    file_system: str
    read_ahead_kb: int | None
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Environment:
    """Where, when, by what and how a bench was run.

    Args:
        schema: version of the format.
        began: UTC time as in RFC 3339.
        command: the exact command line.
        working_directory: where it was run.
        commit: of the checkout that veneer runs from; None outside of one.
        modified: the checkout had changes on top of the commit.
        seed: of the order of the blocks.
        blocks: how many blocks were asked for, by network name.
        images: names, in the order asked for.
        systems: names, in the order asked for.
        networks: in the order asked for.
        versions: of every program that took part, by name.
        machine: what it ran on.
        variables: environment variables that veneer reads and that were set.
    """

    schema: int
    began: str
    command: tuple[str, ...]
    working_directory: str
    commit: str | None
    modified: bool
    seed: int
    blocks: Mapping[str, int]
    images: tuple[str, ...]
    systems: tuple[str, ...]
    networks: tuple[Network, ...]
    versions: Mapping[str, str]
    machine: Machine
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageEvent:
    """An image takes part.

    Args:
        name: in results.
        digest: of the manifest of the ordinary image.
        command: what is run in it.
        probe: how it is known to be ready: ``exit``, ``http``, ``redis``, ``postgres``.
        layers: how many.
        stored: bytes of its layers as registries have them (gzip).
        size: bytes of its layers' tars.
        at_s: seconds since the bench began.
    """

    EVENT: ClassVar[str] = "image"
    name: str
    digest: str
    command: tuple[str, ...]
    probe: str
    layers: int
    stored: int
    size: int
    at_s: float


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """A system takes part.

    Args:
        name: in results.
        about: what it is, in a sentence.
        lazy: it is meant to start before the image is there.
        reference: ratios are to this one.
        command: of a system that the user gave, as he gave it.
        at_s: seconds since the bench began.
    """

    EVENT: ClassVar[str] = "system"
    name: str
    about: str
    lazy: bool
    reference: bool
    command: str | None
    at_s: float


@dataclass(frozen=True, slots=True)
class NetworkEvent:
    """A distance was checked before it was used.

    Args:
        name: of the :class:`Network`.
        rtt_ms: measured for a request on an open connection, median, less what it takes without the proxy.
        connect_ms: the same, connection included.
        mbit: measured for one connection over long enough, in 10^6 bits a second.
        mbit_shared: the same for four connections at once, all together.
        cpu_s_per_gb: processor time of the proxy for 10^9 bytes.
        at_s: seconds since the bench began.
    """

    EVENT: ClassVar[str] = "network"
    name: str
    rtt_ms: float
    connect_ms: float
    mbit: float
    mbit_shared: float
    cpu_s_per_gb: float
    at_s: float


@dataclass(frozen=True, slots=True)
class SetupEvent:
    """Something was made before anything was measured: an image converted, a profile recorded, a tree unpacked.

    Args:
        image: which.
        step: which variant of the image: ``plain``, ``lazy``, ``recorded``, ``static``, ``sidecar``, ``tree``.
        seconds: how long it took; for information, it is not repeated.
        facts: numbers about the result, such as ``pack_stored``, ``index_size``, in bytes where they are sizes.
        at_s: seconds since the bench began.
    """

    EVENT: ClassVar[str] = "setup"
    image: str
    step: str
    seconds: float
    facts: Mapping[str, float]
    at_s: float


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One start was measured, or failed.

    Args:
        image: which.
        system: how.
        network: from where.
        block: which one of this image and network, from 0; runs of one block are paired. -1 is a start for
            its timing record, which takes time itself, and not for its time.
        position: in the block, from 0.
        outcome: ``ok``, ``failed``, ``died`` or ``timeout``.
        seconds: from spawning the command to its end, or to the first success of the readiness probe; None
            unless the outcome is ``ok``.
        command: what was spawned, shortened where it holds whole programs.
        began_s: seconds from the beginning of the bench to the spawning.
        first_output_s: from spawning to the first byte on standard output; None without.
        last_output_s: the same to the last byte, with which the program in the container ends; None without.
        exit_code: of the command; None when it was a server, or was ended.
        network_bytes: bytes that came through the proxy.
        network_bytes_up: bytes that went.
        connections: how many were made through the proxy.
        cpu_s: processor time of the machine that was not idle, from spawning to the end, over all processors.
        proxy_cpu_s: the proxy's part of it.
        requests: HTTP requests, as the registry's clients count them; None when nobody knows.
        checks: what had to hold for the run to count, by name, and whether it did; all do when it is ok.
        error: why it is not ok.
        report: what ``veneer run --report`` wrote.
        timing: the timing record of the start.
        arrival_s: when bytes came through the line, in seconds from spawning; at most 200 points.
        arrival_bytes: how many had come until then.
        at_s: seconds since the bench began, at the end of the run.
    """

    EVENT: ClassVar[str] = "run"
    image: str
    system: str
    network: str
    block: int
    position: int
    outcome: str
    seconds: float | None
    command: tuple[str, ...]
    began_s: float
    first_output_s: float | None
    exit_code: int | None
    network_bytes: int
    network_bytes_up: int
    connections: int
    cpu_s: float
    proxy_cpu_s: float
    requests: int | None
    checks: Mapping[str, bool]
    error: str | None
    report: Mapping[str, object] | None
    timing: Mapping[str, object] | None
    at_s: float
    arrival_s: tuple[float, ...] = ()
    arrival_bytes: tuple[int, ...] = ()
    last_output_s: float | None = None


@dataclass(frozen=True, slots=True)
class LimitEvent:
    """What the model says that a start from a distance takes at least.

    ``seconds = round_trips * rtt + needed_bytes / bandwidth + warm_run_s``.

    Args:
        image: which.
        network: from where.
        seconds: the limit.
        round_trips: that follow each other.
        needed_bytes: of the pack and the indexes.
        warm_run_s: median of the local warm floor in this bench.
        at_s: seconds since the bench began.
    """

    EVENT: ClassVar[str] = "limit"
    image: str
    network: str
    seconds: float
    round_trips: int
    needed_bytes: int
    warm_run_s: float
    at_s: float


Event = ImageEvent | SystemEvent | NetworkEvent | SetupEvent | RunEvent | LimitEvent
_EVENTS: Mapping[str, type[Event]] = {
    kind.EVENT: kind for kind in (ImageEvent, SystemEvent, NetworkEvent, SetupEvent, RunEvent, LimitEvent)
}


class ResultWriter:
    """Appends events to a new result directory. Used by one thread.

    Args:
        directory: is made when it is missing; must not hold results.
        environment: written at once.

    Raises:
        FileExistsError: there are results.
    """

    def __init__(self, directory: Path, environment: Environment) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ENVIRONMENT_FILE).open("x") as file:
            file.write(json.dumps(asdict(environment), indent=2, ensure_ascii=False) + "\n")
        self._events = (directory / EVENTS_FILE).open("xb")

    def write(self, event: Event) -> None:
        """Append an event; it is in the file when this returns."""
        self._events.write(canonical_json({"event": event.EVENT} | asdict(event)) + b"\n")
        self._events.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()


def read_environment(directory: Path) -> Environment:
    """The environment of a result directory. Raises NotFound, IntegrityError, UnsupportedFormat."""
    path = directory / ENVIRONMENT_FILE
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_ENVIRONMENT + 1)
    except FileNotFoundError as error:
        raise NotFound(
            f"{directory} has no {ENVIRONMENT_FILE}", hint="results are made by veneer lab bench"
        ) from error
    document = parse_json(data, str(path), limit=_MAX_ENVIRONMENT)
    if isinstance(document, dict) and document.get("schema") != SCHEMA:
        raise UnsupportedFormat(f"{path} has schema {document.get('schema')!r}, only {SCHEMA} can be read")
    return decode(Environment, document, str(path))


def read_events(directory: Path) -> Iterator[Event]:
    """The events of a result directory in their order. Raises NotFound, IntegrityError."""
    path = directory / EVENTS_FILE
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise NotFound(
            f"{directory} has no {EVENTS_FILE}", hint="results are made by veneer lab bench"
        ) from error
    with file:
        number = 0
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            yield _event(line, f"{path}:{number}")


def _event(line: bytes, what: str) -> Event:
    document = parse_json(line, what, limit=_MAX_LINE)
    if not isinstance(document, dict):
        raise IntegrityError(f"{what} is no event")
    kind = _EVENTS.get(str(document.pop("event", None)))
    if kind is None:
        raise IntegrityError(f"{what} is no event that this version knows")
    return decode(kind, document, what)
