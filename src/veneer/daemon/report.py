"""What the process of a mount tells about itself, as it goes over the control socket."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

__all__ = ["HintReport", "LayerReport", "MountReport", "PackReport"]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer: how many of its ``size`` bytes, and ``spans``, are in the cache.

    ``complete`` says that it is there as a whole and has the diffID that the image promises, ``direct`` that
    the kernel reads it from the cache without asking whoever serves the mount.
    """

    digest: str
    size: int
    cached: int
    spans: int
    cached_spans: int
    complete: bool
    direct: bool = False

    @property
    def percent(self) -> float:
        """The part that is in the cache."""
        return 100 * self.cached / self.size if self.size else 100.0


@dataclass(frozen=True, slots=True)
class PackReport:
    """The pack that a mount uses: how many of its ``size`` bytes are in the cache.

    Args:
        workload: what it is for.
        origin: who names it: ``annotation`` (the image's manifest) or ``local`` (this host).
        digest: of its index.
        mapped: files are mapped to it; otherwise it only tells what to fetch first.
        complete: it is there as a whole and has been proven; reads of it need no daemon.
        static: nothing was run for it.
        image: digest of the manifest that this host made it for, if that is another one; "" otherwise.
    """

    workload: str
    origin: str
    digest: str
    size: int
    cached: int
    mapped: bool
    complete: bool
    static: bool = False
    image: str = ""


@dataclass(frozen=True, slots=True)
class HintReport:
    """What is fetched first because it is known of the layers, when there is no recorded pack.

    Args:
        workload: what it is for.
        origin: ``host`` (known here) or ``attached`` (refers to the image).
        images: manifests that it was recorded for.
        layers: how many of the image's layers it is about.
        size: bytes that it names.
        static: nothing was run for it.
    """

    workload: str
    origin: str
    images: tuple[str, ...]
    layers: int
    size: int
    static: bool


@dataclass(frozen=True, slots=True)
class MountReport:
    """One mount.

    Args:
        digest: of the image manifest.
        backend: how it is mounted.
        backend_reason: why by that one.
        index_origin: how the index was found.
        writable: whether it has a writable layer.
        uptime_s: seconds since it was asked for.
        inodes: in the image.
        layers: lowest first.
        pack: of the start that the mount was made for, if there is one.
        hint: what else is known of that start.
        store: counters of the store since the mount was made; mounts of the daemon share one.
        kernel: counters of what the kernel asked of whoever serves the mount; shared in the daemon, too.
        transport: counters of HTTP, of all mounts of the image.
    """

    digest: str
    backend: str
    backend_reason: str
    index_origin: str
    writable: bool
    uptime_s: float
    inodes: int
    layers: tuple[LayerReport, ...]
    store: Mapping[str, int]
    kernel: Mapping[str, int]
    transport: Mapping[str, int]
    pack: PackReport | None = None
    hint: HintReport | None = None

    @property
    def complete(self) -> int:
        """How many layers are complete."""
        return sum(layer.complete for layer in self.layers)

    @property
    def direct(self) -> int:
        """How many layers the kernel reads by itself."""
        return sum(layer.direct for layer in self.layers)

    def to_json(self) -> dict[str, object]:
        """The facts by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, object]) -> "MountReport":
        """Read what :meth:`to_json` wrote."""
        layers, pack, hint = value["layers"], value.get("pack"), value.get("hint")
        if not isinstance(layers, list) or not all(isinstance(one, dict | None) for one in (pack, hint)):
            raise TypeError("not a mount report")
        parts = {
            "layers": tuple(LayerReport(**layer) for layer in layers),
            "pack": PackReport(**pack) if isinstance(pack, dict) else None,
            "hint": HintReport(**hint | {"images": tuple(hint["images"])}) if isinstance(hint, dict) else None,
        }
        return cls(**value | parts)  # type: ignore[arg-type] # fields of a report
