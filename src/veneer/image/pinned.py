"""The index that a mount was made with, for whoever serves that mount again.

The kernel reads the devices of that index and no others. So nothing is looked for then: neither a better index,
which may have been published since, nor one in place of an index that has been refuted meanwhile.
"""

from dataclasses import dataclass

from veneer.errors import IntegrityError
from veneer.formats.base import IndexLocation
from veneer.image.image import Image
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest

__all__ = ["PinnedIndex"]


@dataclass(frozen=True, slots=True)
class PinnedIndex:
    """One index.

    Args:
        origin: how it was found.
        descriptor: of its blob; None when this host made it of the layers.
        identity: digest of all that it says.
    """

    origin: str
    descriptor: Descriptor | None
    identity: Digest

    @classmethod
    def of(cls, image: Image) -> "PinnedIndex":
        """That of an open image."""
        return cls(image.index_origin, image.index_descriptor, image.identity)

    @property
    def location(self) -> IndexLocation | None:
        """Where it is; None if it has to be found, as it is no blob."""
        if self.descriptor is None:
            return None
        return IndexLocation(self.origin, self.descriptor, pinned=True)

    def check(self, identity: Digest, what: str) -> None:
        """Raise IntegrityError unless this is the index that was found."""
        if identity != self.identity:
            raise IntegrityError(f"{what} was mounted with index {self.identity}, and {identity} was found")

    def to_json(self) -> dict[str, object]:
        """As a JSON object."""
        descriptor = self.descriptor and self.descriptor.to_json()
        return {"origin": self.origin, "descriptor": descriptor, "identity": str(self.identity)}

    @classmethod
    def from_json(cls, value: object) -> "PinnedIndex":
        """Read what :meth:`to_json` wrote. Raises IntegrityError."""
        match value:
            case {"origin": str(origin), "descriptor": descriptor, "identity": str(identity)}:
                blob = descriptor and Descriptor.from_json(descriptor, "index of a mount")
                return cls(origin, blob, Digest.parse(identity))
        raise IntegrityError("this names no index")
