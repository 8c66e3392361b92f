"""Results of a sweep: what was tried, what came of it, and what would repeat it. One JSON document."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from veneer.errors import NotFound, UnsupportedFormat
from veneer.lab.decode import decode
from veneer.lab.records import Network
from veneer.oci.canonical import parse_json

__all__ = ["SWEEP_SCHEMA", "Sweep", "Trial", "read_sweep", "write_sweep"]

#: A reader refuses others.
SWEEP_SCHEMA = 1
_MAX_SIZE = 8 << 20


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to do it.

    Args:
        group: what varies, such as ``frame size``; everything else is as it is by default.
        name: of the value, for people.
        value: the same as a number, to draw; None for what is no number.
        default: it is what veneer does.
        spans: how many.
        size: plain bytes.
        stored: bytes as stored; of sampled trials an estimate.
        sampled: part of the plain bytes that was compressed to know ``stored``; 1 for all.
        compress_s: processor time for all of it, estimated alike.
        decode_s: processor time to decode the spans that the trace touches.
        decoded: stored bytes of those.
        starts: what a start takes by the model, by network: seconds, wait_s, waits, requests, bytes.
    """

    group: str
    name: str
    value: float | None
    default: bool
    spans: int
    size: int
    stored: int
    sampled: float
    compress_s: float
    decode_s: float
    decoded: int
    starts: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep over one image and one profile.

    Args:
        schema: version of the format.
        began: UTC time as in RFC 3339.
        command: the exact command line.
        commit: of the checkout that veneer runs from; None outside of one.
        machine: processor and kernel.
        image: the reference.
        digest: of the manifest.
        workload: of the profile.
        uses: how many ranges the profile has.
        needed: bytes of them.
        think_s: pauses that the trace has.
        size: plain bytes of the layers that were tried.
        networks: that the model was asked about.
        versions: of what compresses.
        trials: in the order tried.
    """

    schema: int
    began: str
    command: tuple[str, ...]
    commit: str | None
    machine: str
    image: str
    digest: str
    workload: str
    uses: int
    needed: int
    think_s: float
    size: int
    networks: tuple[Network, ...]
    versions: Mapping[str, str]
    trials: tuple[Trial, ...]

    @property
    def groups(self) -> dict[str, list[Trial]]:
        """The trials by what varies."""
        found: dict[str, list[Trial]] = {}
        for trial in self.trials:
            found.setdefault(trial.group, []).append(trial)
        return found


def write_sweep(path: Path, sweep: Sweep) -> None:
    """Write a sweep to a file. Raises OSError."""
    path.write_text(json.dumps(asdict(sweep), indent=1) + "\n", encoding="utf-8")


def read_sweep(path: Path) -> Sweep:
    """Read one. Raises NotFound, IntegrityError, UnsupportedFormat."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SIZE + 1)
    except OSError as error:
        raise NotFound(f"cannot read the sweep {path}: {error.strerror}") from error
    document = parse_json(data, str(path), limit=_MAX_SIZE)
    if not isinstance(document, dict) or document.get("schema") != SWEEP_SCHEMA:
        raise UnsupportedFormat(f"{path} is no sweep of schema {SWEEP_SCHEMA}")
    return decode(Sweep, document, str(path))
