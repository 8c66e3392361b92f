"""veneer as a system: with packs of several origins, without, and warm.

The report is written when the container has ended, and costs the time to the end of its program nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from veneer.errors import Unavailable
from veneer.lab.distance import Counters
from veneer.lab.systems import Facts, Launch, System
from veneer.lab.variants import Variants
from veneer.lab.workplace import Subject, Workplace, veneer_program

__all__ = ["VENEERED", "Veneered"]


class Veneered(System):
    """``veneer run``, with a resident daemon and an empty cache.

    Args:
        place: where.
        variants: of images.
        name: one of :data:`VENEERED`.
    """

    lazy = True

    def __init__(self, place: Workplace, variants: Variants, name: str) -> None:
        super().__init__(place, variants)
        self.name = name
        self.variant, self._warm, self._packed, self.about = VENEERED[name]
        # What is unpacked on this machine asks no registry what a tag names, either.
        self._options = ("--pull", "missing") if name == "veneer-warm" else ()
        self._cache = place.directory / "veneer-cache"
        self._report = place.directory / "report.json"
        self._first_report = place.directory / "first-report.json"
        self._timing = place.directory / "timing.json"

    def wipe(self, subject: Subject) -> None:
        """Nothing of it on this machine."""
        self.place.fresh("veneer-cache")
        self._report.unlink(missing_ok=True)
        self._first_report.unlink(missing_ok=True)
        self._timing.unlink(missing_ok=True)

    def launch(self, subject: Subject, port: int) -> Launch:
        """What a user would type."""
        return self._launch(subject, port, self._report)

    def _launch(self, subject: Subject, port: int, report: Path) -> Launch:
        image = subject.reference(port, self.variant)
        argv = (veneer_program(), "run", "--report", str(report), *self._options, image)
        return Launch(argv, self._environment())

    def _environment(self) -> dict[str, str]:
        return dict(self.place.environment) | {"VENEER_CACHE_DIR": str(self._cache)}

    def timed(self, launch: Launch) -> Launch | None:
        """With a record of when what happened."""
        program, command, *rest = launch.argv
        argv = (program, command, "--timing-record", str(self._timing), *rest)
        return Launch(argv, launch.environment)

    def finish(self, subject: Subject) -> None:
        """Nothing is left, but for who is to start again: what is kept takes memory, and holds its devices.

        veneer run does not wait for all that is cleaned up after it. Either command does, so that it is not in
        the next start, as little as unmounting is in that of a local tree.
        """
        words = ("status",) if self._warm else ("cache", "gc")
        self.place.run([veneer_program(), *words], self._environment())

    def prepare_rehearsal(self, subject: Subject) -> None:
        """The same for all of them."""
        self.variants.need(subject, "lazy")

    def rehearsal(self, subject: Subject) -> Launch:
        """A start that brings the programs into memory."""
        own = {"VENEER_CACHE_DIR": str(self.place.directory / "rehearsal-cache")}
        argv = (veneer_program(), "run", subject.reference(self.place.registry, "lazy"))
        return Launch(argv, dict(self.place.environment) | own)

    def warm_up(self, subject: Subject, port: int) -> Launch | None:
        """One start, if it is to be warm."""
        return self._launch(subject, port, self._first_report) if self._warm else None

    def facts(self, subject: Subject, counters: Counters) -> Facts:
        """What its counters say."""
        try:
            document: dict[str, object] = json.loads(self._report.read_bytes())
        except FileNotFoundError:
            return Facts({"it wrote a report": False})
        report = document.get("report")
        if not isinstance(report, dict):
            raise Unavailable("a mount ended without a report; its process died")
        fetched, requests = document["bytes_fetched"], document["requests"]
        if not isinstance(fetched, int) or not isinstance(requests, int):
            raise Unavailable("the report of veneer run has no counters")
        checks = {}
        if self._warm:
            first: dict[str, object] = json.loads(self._first_report.read_bytes())
            checks["nothing was fetched again"] = not _spans_fetched_again(first, document)
        elif self.variant != "plain":
            checks["it fetched less than the image"] = fetched < subject.built.stored
        if self._packed:
            pack = report.get("pack")
            checks["it used the pack"] = isinstance(pack, Mapping) and bool(pack.get("mapped"))
        timing = json.loads(self._timing.read_bytes()) if self._timing.exists() else None
        return Facts(checks, requests, document, timing)


def _spans_fetched_again(first: Mapping[str, object], second: Mapping[str, object]) -> int:
    """Spans that a second start fetched although the first one had.

    A program does not read the same in every start, so what was fetched has to be new: there are as many more
    spans in the cache. ``first`` and ``second`` are reports of ``veneer run``.
    """
    fetched = _member(second, "report", "store", "spans_fetched")
    if not isinstance(fetched, int):
        raise Unavailable("the report of veneer run has no counters")
    return max(0, fetched - (_cached_spans(second) - _cached_spans(first)))


def _cached_spans(document: Mapping[str, object]) -> int:
    layers = _member(document, "report", "layers")
    if not isinstance(layers, list):
        raise Unavailable("the report of veneer run has no layers")
    return sum(layer["cached_spans"] for layer in layers)


def _member(value: object, *names: str) -> object:
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


#: Name -> variant of the image, warm, with a pack, what it is.
VENEERED: Mapping[str, tuple[str, bool, bool, str]] = {
    "veneer-recorded": ("recorded", False, True, "converted, with a pack of what starts were seen to read"),
    "veneer-static": ("static", False, True, "converted, with a pack of what a start must read"),
    "veneer-none": ("lazy", False, False, "converted, nothing known of starts"),
    "veneer-plain": ("plain", False, False, "the ordinary gzip image, no index anywhere"),
    "veneer-sidecar": ("sidecar", False, True, "the ordinary gzip image, with an index and a pack beside it"),
    "veneer-warm": (
        "recorded",
        True,
        True,
        "the same as recorded, started a second time with --pull missing: the registry is asked nothing",
    ),
    "veneer-warm-always": ("recorded", True, True, "the same, and the registry is asked what the tag names"),
}
