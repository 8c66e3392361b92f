"""Which files a command line leads to."""

from pathlib import Path

import pytest

from tests.prefetch.static.images import file, image, link, profile_of, program
from veneer.prefetch.static.command import programs
from veneer.prefetch.static.files import ImageFiles
from veneer.testing.tars import TarItem, whiteout

ELF = b"\x7fELF" + bytes(60)
BASE = (
    program("usr/bin/dash", ELF),
    link("usr/bin/sh", "dash"),
    link("bin", "/usr/bin"),
    program("usr/bin/env", ELF),
    program("usr/bin/tini", ELF),
    program("usr/bin/gosu", ELF),
    program("usr/bin/python3.11", ELF),
    link("usr/bin/python3", "python3.11"),
    program("usr/bin/x86_64-linux-gnu-gcc-12", ELF),
    link("usr/bin/cc", "x86_64-linux-gnu-gcc-12"),
    program("usr/lib/gcc/x86_64-linux-gnu/12/cc1", ELF),
    program("usr/bin/as", ELF),
    program("opt/app/start", b"#!/usr/bin/env python3\nimport os\n"),
)


def found(
    *words: str, more: tuple[TarItem, ...] = (), path: str = "/opt/app:/usr/bin", cwd: str = "/"
) -> list[str]:
    index, read = image(BASE, more)
    encoded = [word.encode() for word in words]
    out = programs(ImageFiles(index, read), encoded, {b"PATH": path.encode()}, cwd.encode())
    return [one.file.path.decode() for one in out]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("python3", "-V"), ["usr/bin/python3.11"]),
        (("/bin/python3",), ["usr/bin/python3.11"]),
        (("start",), ["opt/app/start", "usr/bin/env", "usr/bin/python3.11"]),
        (("tini", "-g", "--", "start"), ["usr/bin/tini", "opt/app/start", "usr/bin/env", "usr/bin/python3.11"]),
        (("tini", "-e", "143", "sh"), ["usr/bin/tini", "usr/bin/dash"]),
        (("env", "-u", "X", "A=1", "sh"), ["usr/bin/env", "usr/bin/dash"]),
        (("gosu", "nobody", "sh"), ["usr/bin/gosu", "usr/bin/dash"]),
        (("sh", "-c", "exec python3 -m app --x=$Y"), ["usr/bin/dash", "usr/bin/python3.11"]),
        (
            ("sh", "-ec", "A=1 start | tee x"),
            ["usr/bin/dash", "opt/app/start", "usr/bin/env", "usr/bin/python3.11"],
        ),
        (("sh", "-c", "'unfinished"), ["usr/bin/dash"]),
        (
            ("sh", "-c", "tini -V >/dev/null && exec python3 -V"),
            ["usr/bin/dash", "usr/bin/tini", "usr/bin/python3.11"],
        ),
        (
            ("cc", "x.c"),
            ["usr/bin/x86_64-linux-gnu-gcc-12", "usr/lib/gcc/x86_64-linux-gnu/12/cc1", "usr/bin/as"],
        ),
        (("missing",), []),
        (("/opt/app",), []),
        ((), []),
    ],
)
def test_a_command_leads_to_programs(words: tuple[str, ...], expected: list[str]) -> None:
    assert found(*words) == expected


def test_an_entry_point_that_hands_over_leads_to_its_arguments() -> None:
    script = program("entry.sh", b'#!/bin/sh\nset -e\nif true; then\n  exec gosu app "$@"\nfi\n')
    assert found("/entry.sh", "python3", more=(script,)) == ["entry.sh", "usr/bin/dash", "usr/bin/python3.11"]
    other = program("entry.sh", b'#!/bin/sh\n# exec "$@"\necho "$@"\n')
    assert found("/entry.sh", "python3", more=(other,)) == ["entry.sh", "usr/bin/dash"]


def test_what_cannot_be_executed_is_passed_over_on_the_path() -> None:
    more = (file("opt/app/python3", b"#!/bin/sh\n"), TarItem(b"opt/app/sh", "dir", 0o755))
    assert found("python3", more=more) == ["usr/bin/python3.11"]
    assert found("sh", more=more) == ["usr/bin/dash"]


def test_what_an_upper_layer_hides_is_not_found() -> None:
    assert found("start", more=(whiteout(b"opt/app/start"),)) == []
    assert found("sh", more=(whiteout(b"usr/bin/dash"),)) == []


def test_relative_names_are_looked_for_where_the_command_is_run() -> None:
    assert found("./start", cwd="/opt/app")[0] == "opt/app/start"
    assert found("start", path=":/usr/bin", cwd="/opt/app")[0] == "opt/app/start"
    assert found("./start", cwd="/") == []


def test_links_do_not_lead_out_of_the_image() -> None:
    assert found("up", more=(link("opt/app/up", "../../../../../../usr/bin/dash"),)) == ["usr/bin/dash"]


def test_scripts_that_run_each_other_come_to_an_end() -> None:
    circle = (program("opt/app/a", b"#!/opt/app/b\n"), program("opt/app/b", b"#!/opt/app/a\n"))
    assert 2 < len(found("a", more=circle)) < 40


def test_env_s_takes_a_command_apart() -> None:
    script = program("opt/app/split", b"#!/usr/bin/env -S python3 -u -X dev\n")
    assert found("split", more=(script,)) == ["opt/app/split", "usr/bin/env", "usr/bin/python3.11"]


def test_the_profile_has_what_the_command_leads_to() -> None:
    profile, files = profile_of([BASE], "start", env=["PATH=/opt/app:/usr/bin"])
    assert list(files) == ["opt/app/start"], "the programs of this image are no whole ELF files"
    assert profile.static
    assert profile.command == ("start",)


def test_files_that_arguments_name_and_those_of_a_language_are_read() -> None:
    real = Path("/bin/busybox").read_bytes()
    home = "usr/lib/jvm/java-17"
    layer = [
        program("usr/sbin/server", real),
        program(f"{home}/bin/java", real),
        link("usr/bin/java", f"/{home}/bin/java"),
        program("usr/bin/node", real),
        file("app/config", b"x"),
        file("app/other", b"x"),
        file("app/large", bytes(2 << 20)),
        file(f"{home}/lib/server/classes.jsa", b"x" * 5_000_000),
        file(f"{home}/lib/modules", b"x" * 100),
        file("usr/share/nodejs/undici/undici-fetch.js", b"x"),
    ]
    env = ["PATH=/usr/bin:/usr/sbin"]
    _, files = profile_of([layer], "server", "-c", "/app/config", "--data=/app/large", "app/other", env=env)
    assert set(files) == {"usr/sbin/server", "app/config"}
    _, files = profile_of([layer], "java", "-version", env=env)
    assert files == {f"{home}/bin/java": files[f"{home}/bin/java"], f"{home}/lib/server/classes.jsa": 5_000_000}
    _, files = profile_of([layer], "node", env=env)
    assert set(files) == {"usr/bin/node", "usr/share/nodejs/undici/undici-fetch.js"}
