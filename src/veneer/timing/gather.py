"""The timing record of a start, gathered by whoever serves the mount."""

from collections.abc import Mapping

from veneer.timing.record import TimedDevice, TimedMark, TimedPhase, TimedRange, TimedRead, TimingRecord
from veneer.timing.recorder import RangeLog, Timing

__all__ = ["record_of"]


def record_of(
    timing: Timing,
    log: RangeLog,
    devices: Mapping[str, TimedDevice],
    *,
    image: str,
    digest: str,
    backend: str,
) -> TimingRecord:
    """The record of a start, as whoever serves it knows it; zero is when it was asked for.

    Args:
        timing: phases and marks of the mount.
        log: requests of the store that it reads from.
        devices: of the mount, by the names that the log has.
        image: the reference.
        digest: of the manifest.
        backend: how it is mounted.
    """
    zero = timing.began
    numbers = {name: number for number, name in enumerate(devices)}
    # What is downloaded whole has no device yet, and goes by its blob.
    numbers |= {device.blob: number for number, device in enumerate(devices.values())}
    ranges, reads = log.since(zero, numbers.keys())

    def ms(at: float) -> float:
        return round(1e3 * (at - zero), 3)

    def known(at: float | None) -> float | None:
        return None if at is None else ms(at)

    return TimingRecord(
        image=image,
        digest=digest,
        backend=backend,
        command=(),
        zero_s=zero,
        phases=tuple(TimedPhase("daemon", one.name, ms(one.began), known(one.ended)) for one in timing.phases),
        marks=tuple(TimedMark("daemon", one.name, ms(one.at)) for one in timing.marks),
        devices=tuple(devices.values()),
        ranges=tuple(
            TimedRange(
                device=numbers[one.device],
                offset=one.offset,
                length=one.length,
                plain_offset=one.plain_offset,
                plain_length=one.plain_length,
                spans=one.spans,
                priority=one.priority,
                queued=ms(one.queued),
                sent=ms(one.sent),
                first_byte=known(one.first_byte),
                last_byte=known(one.last_byte),
                ready=known(one.ready),
                busy=round(1e3 * one.busy_s, 3),
                error=one.error,
            )
            for one in ranges
        ),
        reads=tuple(
            TimedRead(ms(one.at), numbers[one.device], one.offset, one.length, round(1e3 * one.wait_s, 3))
            for one in reads
        ),
        lost_ranges=log.sent - len(log.ranges),
        lost_reads=log.answered - len(log.reads),
    )
