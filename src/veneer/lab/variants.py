"""What is made of an image before anything is measured: pushed as it is, converted, recorded, unpacked.

Each variant is made once in a bench, when the first system asks for it, and always anew: a conversion that
was kept could be one of another version.
"""

import json
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from veneer.errors import Unavailable
from veneer.lab.servers import find_program
from veneer.lab.start import start
from veneer.lab.workplace import Subject, Workplace, timed, veneer_program

__all__ = ["Variants"]

#: Told of each step: image, step, seconds, facts.
Told = Callable[[str, str, float, Mapping[str, float]], None]

#: Threads run in another order each time; what any run used is in the pack then.
_RECORDINGS = 2
_RECORD_DEADLINE_S = 120.0
#: Variants that others are made of. The bundle of an unpacked tree needs the index, which says who a user is.
_MADE_OF: Mapping[str, tuple[str, ...]] = {"recorded": ("lazy",), "sidecar": ("recorded",), "tree": ("lazy",)}


class Variants:
    """The variants that exist. Used by one thread.

    Args:
        place: where.
        profiles: directory that keeps the profiles that were recorded.
        tell: told of each step.
    """

    def __init__(self, place: Workplace, profiles: Path, tell: Told) -> None:
        self._place = place
        self._profiles = profiles
        self._tell = tell
        self._made: set[tuple[str, str]] = set()
        self._facts: dict[str, dict[str, float]] = {}
        self._makers: dict[str, Callable[[Subject], dict[str, float]]] = {
            "plain": self._push_plain,
            "lazy": self._convert,
            "recorded": self._record,
            "static": self._tell_files,
            "sidecar": self._index,
            "tree": self._unpack,
        }

    def need(self, subject: Subject, variant: str) -> None:
        """Make a variant unless it is there. Raises VeneerError."""
        if (subject.name, variant) in self._made:
            return
        for other in _MADE_OF.get(variant, ()):
            self.need(subject, other)
        began = time.monotonic()
        facts = self._makers[variant](subject)
        self._made.add((subject.name, variant))
        self._facts.setdefault(subject.name, {}).update(facts)
        self._tell(subject.name, variant, timed(began), facts)

    def facts(self, subject: Subject) -> Mapping[str, float]:
        """What is known of an image's variants so far."""
        return self._facts.get(subject.name, {})

    def bundle(self, subject: Subject) -> Path:
        """The runtime bundle of the ``tree`` variant: ``config.json``, ``lower``, and an empty ``rootfs``."""
        return self._place.directory / "bundles" / subject.name

    def _near(self, subject: Subject, variant: str) -> str:
        return subject.reference(self._place.registry, variant)

    def _environment(self) -> dict[str, str]:
        """Caches that no measurement sees."""
        return dict(self._place.environment) | {
            "VENEER_CACHE_DIR": str(self._place.directory / "prepare-cache")
        }

    def _veneer(self, *arguments: str | Path) -> bytes:
        return self._place.run([veneer_program(), *arguments], self._environment())

    def _push_plain(self, subject: Subject, variant: str = "plain") -> dict[str, float]:
        source = f"oci:{subject.layout}:{subject.name}"
        target = f"docker://{self._near(subject, variant)}"
        copy = [find_program("skopeo"), "copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false"]
        self._place.run([*copy, source, target])
        return {"stored": float(subject.built.stored)}

    def _convert(self, subject: Subject) -> dict[str, float]:
        source = f"oci:{subject.layout}:{subject.name}"
        result = json.loads(
            self._veneer("convert", "--json", "--no-static", source, self._near(subject, "lazy"))
        )
        index = sum(image["index"]["size"] for image in result["images"])
        return {"lazy_stored": result["size_after"], "index_size": index, "convert_s": result["seconds"]}

    def _tell_files(self, subject: Subject) -> dict[str, float]:
        """A pack of what the image's files tell, which only a conversion makes, and no copy of one."""
        source = f"oci:{subject.layout}:{subject.name}"
        result = json.loads(self._veneer("convert", "--json", source, self._near(subject, "static")))
        packs = result["images"][0]["packs"]
        if not packs:
            raise Unavailable(f"no pack was made of what the files of {subject.name} tell")
        return {"static_size": packs[0]["size"], "static_stored": packs[0]["stored_size"]}

    def _index(self, subject: Subject) -> dict[str, float]:
        """The image as it is, in a repository of its own, with an index and the recorded pack beside it."""
        self._push_plain(subject, "sidecar")
        began = time.monotonic()
        profile = self._profiles / f"{subject.name}.json"
        self._veneer("index", "--push", "--profile", profile, self._near(subject, "sidecar"))
        return {"sidecar_s": timed(began)}

    def _record(self, subject: Subject) -> dict[str, float]:
        self._profiles.mkdir(parents=True, exist_ok=True)
        profile = self._profiles / f"{subject.name}.json"
        for number in range(_RECORDINGS):
            self._record_once(subject, profile, merge=number > 0)
        recorded = self._near(subject, "recorded")
        argv = ["convert", "--json", "--profile", str(profile), self._near(subject, "lazy"), recorded]
        result = json.loads(self._veneer(*argv))
        pack = result["images"][0]["packs"][0]
        return {"pack_size": pack["size"], "pack_stored": pack["stored_size"], "pack_s": result["seconds"]}

    def _record_once(self, subject: Subject, profile: Path, *, merge: bool) -> None:
        """Record one start. A server is interrupted when it is ready; its exit status does not matter then."""
        argv = [veneer_program(), "profile", "record", *(["--merge"] if merge else []), "-o", str(profile)]
        log = self._place.directory / f"record-{subject.name}.log"
        result = start(
            [*argv, self._near(subject, "lazy")],
            subject.spec.probe,
            environment=self._environment(),
            deadline_s=_RECORD_DEADLINE_S,
            log=log,
            ending=signal.SIGINT,
        )
        if result.outcome != "ok" or not profile.exists():
            raise Unavailable(f"no profile of {subject.name} was recorded: {result.error}", hint=f"see {log}")

    def _unpack(self, subject: Subject) -> dict[str, float]:
        bundle = self.bundle(subject)
        self._veneer("bundle", self._near(subject, "lazy"), bundle)
        image = f"{subject.layout}:{subject.name}"
        self._place.run([find_program("umoci"), "raw", "unpack", "--image", image, bundle / "lower"])
        return {"size": float(subject.built.size)}
