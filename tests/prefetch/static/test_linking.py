"""Which libraries are loaded: as glibc's own linker says, in a root file system of its own."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from tests.prefetch.static.images import HostFiles
from veneer.prefetch.static.linking import Linker

pytestmark = [pytest.mark.root]

LINKER = Path("/lib64/ld-linux-x86-64.so.2")
Build = Callable[..., None]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root file system with the C library of this machine, and no cache."""
    root = tmp_path / "root"
    (root / "lib64").mkdir(parents=True)
    shutil.copy(LINKER, root / "lib64")
    home = root / "lib/x86_64-linux-gnu"
    home.mkdir(parents=True)
    shutil.copy("/lib/x86_64-linux-gnu/libc.so.6", home)
    (root / "etc").mkdir()
    return root


@pytest.fixture
def build(root: Path, tmp_path: Path) -> Build:
    """Makes libraries, and programs, that need others."""
    source = tmp_path / "source.c"
    source.write_text("int main(void) { return 0; }\n")

    def make(path: str, *needed: str, options: tuple[str, ...] = (), soname: str = "") -> None:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shared = [] if path.startswith("bin/") else ["-shared", "-fPIC"]
        names = [f"-Wl,-soname,{soname}"] if soname else []
        paths = [os.fspath(root / one) for one in needed]
        command = ["gcc", "-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined", *shared, *names]
        subprocess.run([*command, "-o", target, source, *paths, *options], check=True)

    return make


def oracle(root: Path, program: str, env: Mapping[str, str]) -> list[str]:
    """What glibc loads, in order, paths as it found them."""

    def enter() -> None:
        os.chroot(root)
        os.chdir("/")

    listing = [os.fspath(LINKER), "--list", program]
    run = partial(subprocess.run, capture_output=True, text=True, check=False, preexec_fn=enter)
    done = run(listing, env=dict(env))
    if done.returncode:
        # It lists nothing when something is missing; tracing does, but knows no $ORIGIN without /proc.
        traced = {**env, "LD_TRACE_LOADED_OBJECTS": "1"}
        done = run([program], env=traced)
        assert "not found" in done.stdout
    found = re.findall(r"(?:=> )?(/\S+) \(0x", done.stdout)
    return [path for path in found if "ld-linux" not in path]


def ours(root: Path, program: str, env: Mapping[str, str]) -> list[str]:
    files = HostFiles(root)
    environment = {name.encode(): value.encode() for name, value in env.items()}
    file = files.file(program.encode())
    assert file is not None
    loaded = Linker(files, environment, levels=()).load(file)
    return [one.name.decode() for one in loaded[1:] if b"ld-linux" not in one.name]


def agree(root: Path, program: str, **env: str) -> list[str]:
    """What both find."""
    expected = oracle(root, program, env)
    assert ours(root, program, env) == expected
    return expected


def test_the_usual_directories(root: Path, build: Build) -> None:
    build("lib/x86_64-linux-gnu/libb.so", soname="libb.so")
    build("usr/lib/liba.so", "lib/x86_64-linux-gnu/libb.so", soname="liba.so")
    build("bin/program", "usr/lib/liba.so")
    assert agree(root, "/bin/program") == [
        "/usr/lib/liba.so",
        "/lib/x86_64-linux-gnu/libc.so.6",
        "/lib/x86_64-linux-gnu/libb.so",
    ]


def test_an_rpath_is_inherited_and_a_runpath_is_not(root: Path, build: Build) -> None:
    rpath = ("-Wl,--disable-new-dtags", "-Wl,-rpath,/opt/x")
    runpath = ("-Wl,--enable-new-dtags", "-Wl,-rpath,/opt/x")
    build("opt/x/libb.so", soname="libb.so")
    build("opt/x/liba.so", "opt/x/libb.so", soname="liba.so")
    build("bin/old", "opt/x/liba.so", options=rpath)
    build("bin/new", "opt/x/liba.so", options=runpath)
    assert "/opt/x/libb.so" in agree(root, "/bin/old")
    assert "/opt/x/libb.so" not in agree(root, "/bin/new")


def test_a_runpath_hides_the_rpath_of_whoever_came_before(root: Path, build: Build) -> None:
    build("opt/x/libb.so", soname="libb.so")
    build("opt/y/libc2.so", soname="libc2.so")
    build(
        "opt/x/liba.so",
        "opt/x/libb.so",
        options=("-Wl,--enable-new-dtags", "-Wl,-rpath,/opt/y"),
        soname="liba.so",
    )
    build("bin/program", "opt/x/liba.so", options=("-Wl,--disable-new-dtags", "-Wl,-rpath,/opt/x"))
    assert "/opt/x/libb.so" not in agree(root, "/bin/program")


def test_the_environment_comes_between_rpath_and_runpath(root: Path, build: Build) -> None:
    for directory in ("env", "own"):
        build(f"opt/{directory}/liba.so", soname="liba.so")
    build("bin/old", "opt/own/liba.so", options=("-Wl,--disable-new-dtags", "-Wl,-rpath,/opt/own"))
    build("bin/new", "opt/own/liba.so", options=("-Wl,--enable-new-dtags", "-Wl,-rpath,/opt/own"))
    assert agree(root, "/bin/old", LD_LIBRARY_PATH="/opt/env")[0] == "/opt/own/liba.so"
    assert agree(root, "/bin/new", LD_LIBRARY_PATH="/none:/opt/env")[0] == "/opt/env/liba.so"
    assert agree(root, "/bin/new", LD_LIBRARY_PATH="/none")[0] == "/opt/own/liba.so"


def test_origin_is_the_directory_of_whoever_says_so(root: Path, build: Build) -> None:
    build("opt/app/lib/deep/libb.so", soname="libb.so")
    build(
        "opt/app/lib/liba.so",
        "opt/app/lib/deep/libb.so",
        options=("-Wl,-rpath,$ORIGIN/deep",),
        soname="liba.so",
    )
    build("bin/program", "opt/app/lib/liba.so", options=("-Wl,-rpath,${ORIGIN}/../opt/app/lib",))
    assert "/bin/../opt/app/lib/deep/libb.so" in agree(root, "/bin/program")


def test_files_of_another_class_are_passed_over(root: Path, build: Build) -> None:
    build("usr/lib/liba.so", soname="liba.so")
    build("bin/program", "usr/lib/liba.so")
    wrong = root / "lib/x86_64-linux-gnu/liba.so"
    data = bytearray((root / "usr/lib/liba.so").read_bytes())
    data[4] = 1
    wrong.write_bytes(data)
    assert "/usr/lib/liba.so" in agree(root, "/bin/program")
    wrong.write_text("/* GNU ld script */")
    assert ours(root, "/bin/program", {})[0] == "/usr/lib/liba.so"


def test_a_library_is_loaded_once_by_whatever_name(root: Path, build: Build) -> None:
    build("usr/lib/liba.so.1", soname="liba.so.1")
    (root / "usr/lib/other.so").symlink_to("liba.so.1")
    build("usr/lib/libb.so", "usr/lib/liba.so.1", soname="libb.so")
    build("bin/program", "usr/lib/liba.so.1", "usr/lib/libb.so")
    assert agree(root, "/bin/program", LD_PRELOAD="other.so").count("/usr/lib/liba.so.1") == 0


def test_what_is_preloaded_comes_first(root: Path, build: Build) -> None:
    for name in ("liba", "libp", "libq"):
        build(f"usr/lib/{name}.so", soname=f"{name}.so")
    build("bin/program", "usr/lib/liba.so")
    (root / "etc/ld.so.preload").write_text("/usr/lib/libq.so\n")
    assert agree(root, "/bin/program", LD_PRELOAD="libp.so")[:3] == [
        "/usr/lib/libp.so",
        "/usr/lib/libq.so",
        "/usr/lib/liba.so",
    ]


def test_the_cache_has_other_directories(root: Path, build: Build) -> None:
    build("opt/x/liba.so", soname="liba.so")
    build("bin/program", "opt/x/liba.so")
    (root / "etc/ld.so.conf").write_text("/opt/x\n")
    assert "/opt/x/liba.so" not in agree(root, "/bin/program"), "nobody but ldconfig reads ld.so.conf"
    subprocess.run(["ldconfig", "-r", root], check=True)
    assert "/opt/x/liba.so" in agree(root, "/bin/program")


def test_better_processors_have_subdirectories(root: Path, build: Build) -> None:
    build("usr/lib/glibc-hwcaps/x86-64-v2/liba.so", soname="liba.so")
    build("usr/lib/liba.so", soname="liba.so")
    build("bin/program", "usr/lib/liba.so")
    files = HostFiles(root)
    file = files.file(b"bin/program")
    assert file is not None
    for ready in (lambda: None, lambda: subprocess.run(["ldconfig", "-r", root], check=True)):
        ready()
        loaded = Linker(files, {}, levels=(b"x86-64-v3", b"x86-64-v2")).load(file)
        # Every processor that runs these tests can do that much.
        assert oracle(root, "/bin/program", {})[0] == "/usr/lib/glibc-hwcaps/x86-64-v2/liba.so"
        assert b"/usr/lib/glibc-hwcaps/x86-64-v2/liba.so" in [one.name for one in loaded]
        assert "/usr/lib/liba.so" in ours(root, "/bin/program", {})


@pytest.mark.parametrize(
    "program", ["/bin/bash", "/usr/bin/skopeo", "/usr/bin/git", "/usr/bin/fio", "/usr/sbin/runc"]
)
def test_programs_of_this_machine(program: str) -> None:
    assert agree(Path("/"), os.path.realpath(program))
