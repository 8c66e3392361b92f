"""Waiting without an event loop: for what comes, not longer, and with an ear for signals."""

import os
import select
import signal
import subprocess
import sys
import threading

import pytest

from veneer.waiting import wait_readable

#: Prints a dot at the start and for each SIGUSR1, until its input ends.
COUNTING = """
import os, signal
from veneer.waiting import wait_readable
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"."))
os.write(1, b".")
wait_readable(0)
"""


def test_no_signal_waits_for_the_next_one() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", COUNTING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # Each is sent while the handler of the one before ends, which is when one can be lost.
            for _ in range(10_000):
                assert select.select([process.stdout], [], [], 20)[0], "a signal was lost"
                assert process.stdout.read(1) == b"."
                process.send_signal(signal.SIGUSR1)
            process.stdin.close()
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_what_a_handler_raises_ends_it() -> None:
    reader, writer = os.pipe()
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        wait_readable(reader)
    timer.join()
    assert signal.set_wakeup_fd(-1) == -1, "as it was"
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_it_waits_for_bytes_and_for_the_end(elsewhere: bool) -> None:
    found: list[bool] = []

    def wait() -> None:
        reader, writer = os.pipe()
        found.append(wait_readable(reader, 0))
        found.append(wait_readable(reader, 0.01))
        os.write(writer, b"!")
        found.append(wait_readable(reader))
        os.read(reader, 1)
        os.close(writer)
        found.append(wait_readable(reader))
        os.close(reader)

    if elsewhere:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
    else:
        wait()
    assert found == [False, False, True, True]
