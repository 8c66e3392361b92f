"""What notices the ends of mounts; that it does is tested with mounts."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.root]

PROGRAM = """
from veneer.errors import MountError
from veneer.mount.superblocks import Superblocks
try:
    Superblocks()
except MountError as error:
    print(error.message, error.hint, sep="; ")
"""


def test_who_has_no_more_instances_of_inotify_is_told_what_to_do() -> None:
    # The limit is that of a user namespace, so that nobody else is bothered.
    script = 'echo 0 > /proc/sys/user/max_inotify_instances && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh", sys.executable, "-c", PROGRAM]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "cannot watch for the ends of mounts" in told
    assert "Too many open files" in told
    assert "max_user_instances" in told
