"""What a report says in words, below the headings of its sections."""

__all__ = ["AGAIN", "BYTES", "DISTANCE", "FAILURES", "LIMITS", "REPEAT", "SHORT", "STARTS"]

SHORT = (
    "Time from the shell to readiness, caches and state cold. Ratios are of the two runs in one block, so "
    "what slows the machine meets both; brackets are 95 % bootstrap intervals of the median."
)
AGAIN = (
    "To the last byte that the program in the container writes, or to a server's first answer: the same event "
    "for both. With cleaning up, it is to the end of the command: veneer has unmounted then, and local-warm "
    "leaves that to be done."
)
DISTANCE = (
    "Medians with their intervals. The dashed line is the limit of the model: round trips that must "
    "follow each other, needed bytes over bandwidth, and the run time of the program in a warm tree. "
    "Bandwidth differs between the distances, too."
)
BYTES = (
    "What came through the line in the run with the median time of each system. Needed is what the model "
    "takes a start to need: pack and indexes. What a curve has above that line is waste, as far as this "
    "start is concerned."
)
STARTS = (
    "One start each, from its timing record: a waterfall of phases and requests, which bytes have come "
    "and been read, and where on the devices. Point at a bar for its numbers."
)
LIMITS = (
    "round trips x RTT + needed bytes / bandwidth + warm run time. To the right: how many times that the "
    "start with a recorded profile takes."
)
FAILURES = "They have no time and are in no figure above."
REPEAT = (
    "All raw events are in the result directory beside its environment. The first command measured them; "
    "the second does the same again, with the same seed; below each figure is the command for its part."
)
