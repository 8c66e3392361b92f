"""A timing record with one of everything."""

from veneer.timing.record import TimedDevice, TimedMark, TimedPhase, TimedRange, TimedRead, TimingRecord

__all__ = ["a_range", "a_record"]

HOSTILE = "</text><script>alert(1)</script>&\x00\x1b\ud800\"'"


def a_range(**changes: object) -> TimedRange:
    facts: dict[str, object] = {
        "device": 0,
        "offset": 4096,
        "length": 3 << 20,
        "plain_offset": 8192,
        "plain_length": 9 << 20,
        "spans": 7,
        "priority": "demand",
        "queued": 100.0,
        "sent": 110.0,
        "first_byte": 160.0,
        "last_byte": 190.0,
        "ready": 200.0,
        "busy": 25.0,
        "error": None,
    }
    return TimedRange(**facts | changes)  # type: ignore[arg-type] # fields of a range


def a_record(*ranges: TimedRange, image: str = "localhost:5000/app:1") -> TimingRecord:
    return TimingRecord(
        image=image,
        digest="sha256:" + "ab" * 32,
        backend="erofs-fanotify",
        command=("python3", "-c", "print(1)"),
        zero_s=1234.5,
        phases=(
            TimedPhase("cli", "start-up", 0.0, 40.0),
            TimedPhase("daemon", "resolve", 41.0, 92.125),
            TimedPhase("daemon", "bundle", 92.5, None),
        ),
        marks=(TimedMark("daemon", "mounted", 95.0), TimedMark("cli", "end", 250.0)),
        devices=(
            TimedDevice("sha256:" + "12" * 32, "layer", 50 << 20, 20 << 20),
            TimedDevice("sha256:" + "34" * 32, "pack", 9 << 20, 3 << 20),
        ),
        ranges=ranges or (a_range(), a_range(device=1, priority="profile", error="it broke", ready=None)),
        reads=(TimedRead(200.5, 0, 8192, 4096, 90.5), TimedRead(201.0, 0, 8192, 4096, 0.0)),
        lost_ranges=2,
        lost_reads=3,
    )
