"""What took how long in one start: noted while it happens, and as a document afterwards."""

from veneer.timing.recorder import UNTIMED, DeviceRanges, RangeLog, RangeTimes, Timing, answered, timed_range

__all__ = ["UNTIMED", "DeviceRanges", "RangeLog", "RangeTimes", "Timing", "answered", "timed_range"]
