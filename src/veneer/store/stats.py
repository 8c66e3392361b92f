"""Counters of one store. Tests and ``veneer stats`` read these: what happened is counted, never timed."""

from dataclasses import asdict, dataclass

__all__ = ["StoreStats"]


@dataclass(slots=True)
class StoreStats:
    """Plain integers that only grow. Only ``evicted`` and ``over_quota`` are changed by other threads too.

    Args:
        reads: reads that ended, with bytes or with an error.
        hits: reads answered at once.
        misses: reads that had to wait for a fetch, a local copy or a verification.
        bytes_read: bytes handed to readers.
        requests: range requests sent to sources.
        bytes_fetched: bytes that came back, bridged gaps included.
        spans_fetched: spans that became available from a source.
        spans_decoded: spans that were checked and decoded, from a source or from stored form on disk.
        verify_failures: spans whose bytes were not what their digest promises, at any time.
        retries: spans asked for again after an error.
        copied: spans taken from an identical span of a local device.
        replaced: spans of copies that their source did not give, made of what they are copies of.
        reverified: spans verified again after a boot, and right.
        dropped: spans found damaged on disk, dropped and fetched again.
        evicted: spans given up for the quota or for want of disk space.
        uncached: spans that could not be written to the cache, and were served from memory.
        over_quota: writes to mounted devices beyond the quota, because nothing could be evicted for them.
        bulk_started: times that the rest of a device began to be fetched, because most of it seems to be read.
        bulk_bytes: bytes asked for on that account.
        entrusted: spans of those that a process of its own has verified, decoded and written.
        errors: reads that ended with an error.
    """

    reads: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    requests: int = 0
    bytes_fetched: int = 0
    spans_fetched: int = 0
    spans_decoded: int = 0
    verify_failures: int = 0
    retries: int = 0
    copied: int = 0
    replaced: int = 0
    reverified: int = 0
    dropped: int = 0
    evicted: int = 0
    uncached: int = 0
    over_quota: int = 0
    bulk_started: int = 0
    bulk_bytes: int = 0
    entrusted: int = 0
    errors: int = 0

    def to_json(self) -> dict[str, int]:
        """The counters by name."""
        return asdict(self)
