"""Who a container's process is: the ``user`` of an image looked up in the image's own passwd and group files.

The rules are those of Docker and runc (``user.GetExecUser``): names before numbers, a number needs no entry,
supplementary groups come from the group file unless a group was named. The host's users play no part.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from veneer.errors import UsageError

__all__ = ["ContainerUser", "find_user"]

#: What the kernel can represent, without -1.
_MAX_ID = 2**32 - 2


@dataclass(frozen=True, slots=True)
class ContainerUser:
    """Numeric identity of a process."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


@dataclass(frozen=True, slots=True)
class _Account:
    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True, slots=True)
class _Group:
    name: str
    gid: int
    members: tuple[str, ...]


def find_user(text: str, passwd: bytes, group: bytes) -> ContainerUser:
    """The user that ``text`` (``user[:group]`` by name or number, "" for root) means.

    Args:
        text: as the image config or the command line has it.
        passwd: contents of ``/etc/passwd``; b"" when there is none.
        group: contents of ``/etc/group``.

    Raises:
        UsageError: a name that no entry has, or a number that no user can have.
    """
    user_text, _, group_text = text.partition(":")
    account = _account(user_text, passwd)
    groups = list(_groups(group))
    if not group_text:
        extra = tuple(found.gid for found in groups if account.name and account.name in found.members)
        return ContainerUser(account.uid, account.gid, extra, account.home)
    named = next((found for found in groups if found.name == group_text), None)
    gid = named.gid if named else _number(group_text, "group", "/etc/group")
    return ContainerUser(account.uid, gid, (), account.home)


def _account(text: str, passwd: bytes) -> _Account:
    accounts = list(_accounts(passwd))
    named = next((found for found in accounts if found.name == text), None)
    if text and named:
        return named
    uid = _number(text, "user", "/etc/passwd") if text else 0
    return next((found for found in accounts if found.uid == uid), _Account("", uid, 0, "/"))


def _number(text: str, kind: str, file: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{kind} {text!r} is not in {file} of the image", hint="give its number instead")
    if int(text) > _MAX_ID:
        raise UsageError(f"{kind} {text} is not a valid number")
    return int(text)


def _accounts(data: bytes) -> Iterator[_Account]:
    for fields in _entries(data, 7):
        if (uid := _valid(fields[2])) is not None and (gid := _valid(fields[3])) is not None:
            yield _Account(fields[0], uid, gid, fields[5] or "/")


def _groups(data: bytes) -> Iterator[_Group]:
    for fields in _entries(data, 4):
        if (gid := _valid(fields[2])) is not None:
            yield _Group(fields[0], gid, tuple(fields[3].split(",")))


def _entries(data: bytes, count: int) -> Iterator[list[str]]:
    """Lines with at least ``count`` fields and a name; others are passed over, as libc does."""
    for line in data.decode("utf-8", "surrogateescape").splitlines():
        fields = line.strip().split(":")
        if len(fields) >= count and fields[0] and fields[0][0] not in "#+-":
            yield fields


def _valid(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and int(text) <= _MAX_ID else None
