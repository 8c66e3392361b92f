"""The least that a start from a distance takes, by a model with three terms.

``round trips + needed bytes / bandwidth + warm run``: a connection, the manifest, and then at once everything
that the manifest names and a start needs; those bytes over the line; and what the same program takes on this
machine with everything in memory. Nothing overlaps in the model, though a program may well run while its last
bytes come: what is compared with it may be a little faster.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence

from veneer.lab.records import Event, LimitEvent, Network, RunEvent, SetupEvent

__all__ = ["ROUND_TRIPS", "limits"]

#: A new connection, the manifest, and what it names.
ROUND_TRIPS = 3
_FLOOR = "local-warm"


def limits(events: Iterable[Event], networks: Sequence[Network], at_s: float) -> Iterator[LimitEvent]:
    """The limit of each image and network for which the floor was measured and the pack's size is known.

    Args:
        events: of a bench.
        networks: of the bench.
        at_s: for the events.
    """
    floors: dict[str, list[float]] = {}
    facts: dict[str, dict[str, float]] = {}
    for event in events:
        if isinstance(event, RunEvent) and event.system == _FLOOR and event.seconds is not None:
            floors.setdefault(event.image, []).append(event.seconds)
        elif isinstance(event, SetupEvent):
            facts.setdefault(event.image, {}).update(event.facts)
    for image, seconds in floors.items():
        known = facts.get(image, {})
        if "pack_stored" not in known or "index_size" not in known:
            continue
        needed, floor = int(known["pack_stored"] + known["index_size"]), statistics.median(seconds)
        for network in networks:
            line_s = ROUND_TRIPS * network.rtt_ms / 1000
            if network.mbit:
                line_s += needed * 8 / (network.mbit * 1e6)
            yield LimitEvent(image, network.name, line_s + floor, ROUND_TRIPS, needed, floor, at_s)
