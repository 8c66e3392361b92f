"""Who runs in a container: the rules of Docker, on files that anyone may have written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.container.users import ContainerUser, find_user
from veneer.errors import UsageError

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
# comment
bob:x:1000:1001:Bob:/home/bob:/bin/sh
1000:x:7:8::/odd:/bin/sh
broken:x:abc:1::/:
short:x:5
+nis::::::
anon:x:2000:2001:::
"""
GROUP = b"""root:x:0:
users:x:1001:
wheel:x:10:alice,bob
audio:x:29:bob
odd:x:not-a-number:bob
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ContainerUser(0, 0, (), "/root")),
        ("root", ContainerUser(0, 0, (), "/root")),
        ("bob", ContainerUser(1000, 1001, (10, 29), "/home/bob")),
        ("bob:wheel", ContainerUser(1000, 10, (), "/home/bob")),
        ("bob:4711", ContainerUser(1000, 4711, (), "/home/bob")),
        # A name that looks like a number is a name.
        ("1000", ContainerUser(7, 8, (), "/odd")),
        # A number takes group and home from its entry, and needs none.
        ("2000", ContainerUser(2000, 2001, (), "/")),
        ("4242", ContainerUser(4242, 0, (), "/")),
        ("4242:29", ContainerUser(4242, 29, (), "/")),
        (":wheel", ContainerUser(0, 10, (), "/root")),
        ("4294967294", ContainerUser(4294967294, 0, (), "/")),
    ],
)
def test_users(text: str, expected: ContainerUser) -> None:
    assert find_user(text, PASSWD, GROUP) == expected


@pytest.mark.parametrize(
    "text", ["nobody", "broken", "short", "+nis", "-1", "1.5", "4294967295", "bob:nogroup", "¹"]
)
def test_users_that_are_not_there(text: str) -> None:
    with pytest.raises(UsageError):
        find_user(text, PASSWD, GROUP)


def test_an_image_without_accounts() -> None:
    assert find_user("", b"", b"") == ContainerUser(0, 0, (), "/")
    assert find_user("5:6", b"", b"") == ContainerUser(5, 6, (), "/")


@given(st.text(max_size=20), st.binary(max_size=300), st.binary(max_size=300))
def test_no_file_breaks_the_look_up(text: str, passwd: bytes, group: bytes) -> None:
    try:
        user = find_user(text, passwd, group)
    except UsageError:
        return
    assert all(0 <= number < 2**32 - 1 for number in (user.uid, user.gid, *user.groups))
