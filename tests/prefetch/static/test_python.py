"""What Python reads when it starts: as the one that runs these tests does, and as its rules say."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.prefetch.static.images import HostFiles, file, image, link, profile_of, program
from veneer.prefetch.static.command import Program
from veneer.prefetch.static.files import File, ImageFiles
from veneer.prefetch.static.python import python_files
from veneer.prefetch.static.python_imports import Alternatives, Import, imports_of
from veneer.testing.tars import TarItem

#: The Python that this one's environment was made of.
PYTHON = Path(os.path.realpath(sys.executable))

FROZEN = (
    *(
        "abc",
        "codecs",
        "io",
        "os",
        "site",
        "stat",
        "_collections_abc",
        "_sitebuiltins",
        "genericpath",
        "posixpath",
    ),
    *("ntpath", "zipimport", "importlib.__init__", "importlib._bootstrap", "importlib._bootstrap_external"),
    *("importlib.util", "importlib.machinery"),
)

LIST = """
import sys
print(*(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)), sep='\\n')
"""


def told(code: str) -> set[str]:
    """The modules that we say code imports, without what it is compiled to."""
    files = HostFiles(Path("/"))
    found = files.file(os.fsencode(PYTHON))
    assert found is not None
    command = Program(found, os.fsencode(PYTHON), (b"python3", b"-I", b"-S", b"-c", code.encode()))
    out = set()
    for one in python_files(files, command, {}, b"/"):
        path = "/" + one.path.decode()
        if "__pycache__" in path:
            head, _, name = path.rpartition("/__pycache__/")
            path = f"{head}/{name.partition('.')[0]}.py"
        if path.endswith((".py", ".so")):
            out.add(path)
    return out


@pytest.mark.parametrize(
    "names", ["", "json, ssl, urllib.request, email", "asyncio, sqlite3", "xml.dom.minidom, csv"]
)
def test_the_imports_of_a_program_are_those_that_happen(names: str) -> None:
    code = f"import {names}" if names else "pass"
    # Without the site's directories: what runs there is this machine's own affair.
    command: list[str | Path] = [PYTHON, "-I", "-S", "-c", code + "\n" + LIST]
    done = subprocess.run(command, cwd="/", env={}, capture_output=True, text=True, check=True)
    # Parts of the interpreter are read from it, though they say where their source is.
    ends = tuple(f"/{name.replace('.', '/')}.py" for name in FROZEN)
    real = {line for line in done.stdout.splitlines() if "/" in line and not line.endswith(ends)}
    ours = told(code)
    # What is imported by a function that runs on import, such as hashlib's, is not seen.
    assert len(real - ours) <= len(real) // 50, f"not told: {sorted(real - ours)}"
    needless = len(ours - real)
    assert needless <= max(2, len(real) // 10), f"told in vain: {sorted(ours - real)}"


def compiled(source: TarItem, *, flags: int = 0, mtime_s: int | None = None) -> TarItem:
    """Byte code of a module, good for its source unless it says another time."""
    directory, _, name = source.path.rpartition(b"/")
    stated = source.mtime_ns // 1_000_000_000 if mtime_s is None else mtime_s
    head = struct.pack("<4sIII", b"\xa7\r\r\n", flags, stated, len(source.content))
    path = directory + b"/__pycache__/" + name.removesuffix(b"py") + b"cpython-311.pyc"
    return file(path.decode(), head + bytes(50))


def read_of(
    *items: TarItem, words: tuple[str, ...] = ("-c", "import m"), env: dict[bytes, bytes] | None = None
) -> list[str]:
    """What the Python of an image reads."""
    base = [program("usr/bin/python3.11", b"\x7fELF"), file("usr/lib/python3.11/os.py", b"x")]
    index, read = image([*base, *items])
    files = ImageFiles(index, read)
    found = files.file(b"usr/bin/python3.11")
    assert found is not None
    called = b"/usr/bin/python3.11"
    if words and words[0].startswith("/venv"):
        called, words = words[0].encode(), words[1:]
    encoded = tuple(word.encode() for word in words)
    out: list[File] = list(python_files(files, Program(found, called, (called, *encoded)), env or {}, b"/srv"))
    return [one.path.decode().removeprefix("usr/lib/python3.11/") for one in out]


def test_byte_code_is_read_alone_if_it_is_of_this_source() -> None:
    source = file("usr/lib/python3.11/m.py", b"pass", mtime_s=7)
    assert read_of(source) == ["m.py"]
    assert read_of(source, compiled(source)) == ["__pycache__/m.cpython-311.pyc"]
    both = ["__pycache__/m.cpython-311.pyc", "m.py"]
    assert read_of(source, compiled(source, mtime_s=8)) == both
    assert read_of(source, compiled(source, flags=1, mtime_s=8)) == both[:1], "found by hash, unchecked"
    assert read_of(source, compiled(source, flags=3)) == both, "found by hash, checked"


def test_a_package_comes_before_an_extension_and_that_before_source() -> None:
    name = "usr/lib/python3.11/lib-dynload/m"
    source = file(f"{name}.py", b"pass")
    extension = file(f"{name}.cpython-311-x86_64-linux-gnu.so", b"x")
    package = file(f"{name}/__init__.py", b"from .deep import thing\nfrom . import other, missing\n")
    assert read_of(source, extension) == ["lib-dynload/m.cpython-311-x86_64-linux-gnu.so"]
    more = (file(f"{name}/deep.py", b"from ..... import x"), file(f"{name}/other.py", b"import json"))
    assert read_of(source, extension, package, *more) == [
        f"lib-dynload/m/{one}.py" for one in ("__init__", "deep", "other")
    ]


def test_a_directory_without_init_is_a_namespace_over_the_whole_path() -> None:
    found = read_of(
        file("usr/lib/python3.11/ns/a.py", b"x"),
        file("usr/lib/python3/dist-packages/ns/b.py", b"x"),
        words=("-c", "import ns.a, ns.b"),
    )
    assert found == ["ns/a.py", "usr/lib/python3/dist-packages/ns/b.py"]


def test_a_script_has_its_directory_in_front() -> None:
    items = (
        file("app/main.py", b"import m\nif __name__ == '__main__':\n    import n\n"),
        file("app/m.py", b"x"),
        file("app/n.py", b"x"),
    )
    assert read_of(*items, file("usr/lib/python3.11/m.py", b"x"), words=("-W", "ignore", "/app/main.py")) == [
        "app/main.py",
        "app/m.py",
        "app/n.py",
    ]
    assert read_of(*items, words=("-m", "main"), env={b"PYTHONPATH": b"/app"}) == [
        "app/main.py",
        "app/m.py",
        "app/n.py",
    ]
    assert read_of(*items, words=("-I", "-c", "import m"), env={b"PYTHONPATH": b"/app"}) == []
    assert read_of(file("srv/m.py", b"x")) == ["srv/m.py"]


def test_a_package_is_run_by_its_main() -> None:
    items = (
        file("srv/p/__init__.py", b""),
        file("srv/p/__main__.py", b"from . import q"),
        file("srv/p/q.py", b"x"),
    )
    assert read_of(*items, words=("-m", "p")) == ["srv/p/__init__.py", "srv/p/__main__.py", "srv/p/q.py"]


def test_site_packages_and_their_pth_files_count_unless_told_otherwise() -> None:
    site = "usr/lib/python3/dist-packages"
    items = (
        file(f"{site}/x.pth", b"# no\nimport hook; hook.run()\n/opt/more\n"),
        file(f"{site}/hook.py", b"x"),
        file("opt/more/m.py", b"x"),
    )
    assert read_of(*items) == [f"{site}/x.pth", f"{site}/hook.py", "opt/more/m.py"]
    assert read_of(*items, words=("-S", "-c", "import m")) == []


def test_a_virtual_environment_has_packages_of_its_own() -> None:
    items = (
        link("venv/bin/python", "/usr/bin/python3.11"),
        file("venv/pyvenv.cfg", b"home = /usr/bin\ninclude-system-site-packages = false\n"),
        file("venv/lib/python3.11/site-packages/m.py", b"import z"),
        file("usr/lib/python3/dist-packages/z.py", b"x"),
        file("usr/lib/python3.11/encodings/__init__.py", b"x"),
    )
    found = read_of(*items, words=("/venv/bin/python", "-c", "import m"))
    assert found == ["encodings/__init__.py", "venv/lib/python3.11/site-packages/m.py"]


def test_what_cannot_happen_is_not_followed() -> None:
    source = b"""
import sys, os
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import a1
if sys.platform == "win32":
    import a2
elif os.name == "nt":
    import a3
else:
    import b1
if sys.version_info >= (3, 12):
    import a4
if sys.version_info[:2] > (3, 8) and unknown():
    import b2
try:
    import b3
except ImportError:
    import c1
def later():
    import a5
class Now:
    import b4
if __name__ == "__main__":
    import a6
mod = importlib.import_module("b5")
from .. import b6 as x, b7
"""
    found = imports_of(source, (3, 11))
    assert Alternatives((Import("b3"),), (Import("c1"),)) in found
    names = [one.module or one.names for one in found if isinstance(one, Import)]
    assert names == ["sys", "os", "typing", "b1", "b2", "b4", "b5", ("b6", "b7")]
    assert Import("a6") in imports_of(source, (3, 11), main=True)


def test_what_is_missing_is_replaced_by_what_comes_instead() -> None:
    source = file("usr/lib/python3.11/m.py", b"try:\n    import gone\nexcept ImportError:\n    import there\n")
    there = file("usr/lib/python3.11/there.py", b"x")
    assert read_of(source, there) == ["m.py", "there.py"]
    assert read_of(source, there, file("usr/lib/python3.11/gone.py", b"x")) == ["m.py", "gone.py"]


def test_the_profile_names_whole_modules() -> None:
    layers = [
        [
            program("usr/bin/python3.11", Path("/bin/busybox").read_bytes()),
            file("usr/lib/python3.11/os.py", b"x"),
            file("usr/lib/python3.11/m.py", b"#" * 9000),
        ]
    ]
    _, files = profile_of(layers, "python3.11", "-c", "import m", env=["PATH=/usr/bin"])
    assert files["usr/lib/python3.11/m.py"] == 9000
    assert "usr/lib/python3.11/os.py" not in files, "it is part of the interpreter"
