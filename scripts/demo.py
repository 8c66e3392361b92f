"""The main job, start to end: serve an image, convert it, mount it, run it; next to a full pull and unpack."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from servers import VENEER, server

BUILD = Path("build")
DEMO = BUILD / "demo"
COMMAND = ("python3", "-c", "import json, ssl, urllib.request, email; print('hello from Python')")


def say(text: str = "") -> None:
    """One line of the story."""
    print(text, flush=True)


def veneer(*arguments: str | Path) -> str:
    """Show a veneer command, run it, and return what it printed."""
    say("$ veneer " + " ".join(map(str, arguments)))
    argv = [VENEER, *arguments]
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, env=environment()).stdout


def environment() -> dict[str, str]:
    """A cache of the demo's own, so that it starts cold and leaves nothing behind."""
    own = {"VENEER_CACHE_DIR": str(DEMO.absolute() / "cache"), "VENEER_RUN_DIR": str(DEMO.absolute() / "run")}
    # Modules are compiled once, as they are where veneer is installed.
    return os.environ | own | {"PYTHONDONTWRITEBYTECODE": ""}


def first_output(argv: Sequence[str | Path]) -> tuple[float, float]:
    """Seconds until the first byte of output, and until the end."""
    began = time.monotonic()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        at = time.monotonic() - began
        rest = process.stdout.read()
        code = process.wait()
    if code or not first:
        sys.exit(f"{argv[0]} failed with exit status {code}")
    say((first + rest).decode().strip())
    return at, time.monotonic() - began


def full_pull(reference: str) -> tuple[float, int]:
    """Pull with skopeo, unpack with tar, run in a chroot: seconds to the first output, bytes pulled."""
    image, root = DEMO / "pulled", DEMO / "unpacked"
    root.mkdir()
    began = time.monotonic()
    argv = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", f"docker://{reference}", f"dir:{image}"]
    subprocess.run(argv, check=True)
    manifest: dict[str, Any] = json.loads((image / "manifest.json").read_text())
    for layer in manifest["layers"]:
        blob = image / layer["digest"].partition(":")[2]
        subprocess.run(["tar", "-xpzf", blob, "-C", root, "--exclude=.wh.*", "--numeric-owner"], check=True)
    setup = time.monotonic() - began
    at, _ = first_output(["chroot", root, *COMMAND])
    return setup + at, sum(layer["size"] for layer in manifest["layers"])


def mib(size: float) -> str:
    """A size in MiB."""
    return f"{size / (1 << 20):.1f} MiB"


def main() -> None:
    """Tell the story."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--rtt-ms", type=float, default=10, help="emulated round-trip time (default 10)")
    parser.add_argument("--mbit", type=float, default=1000, help="emulated bandwidth in Mb/s (default 1000)")
    options = parser.parse_args()
    os.chdir(Path(__file__).parents[1])
    shutil.rmtree(DEMO, ignore_errors=True)
    shutil.copytree(BUILD / "sample", DEMO / "registry/debian/python")

    with server(VENEER, "registry", "serve", DEMO / "registry", "--port", "0") as near:
        distance = ["--rtt-ms", str(options.rtt_ms), "--mbit", str(options.mbit)]
        target = ["--target", near.rpartition(":")[2]]
        with server(sys.executable, "-m", "veneer.testing.delay", *target, *distance) as far:
            network = f"{options.rtt_ms:g} ms, {options.mbit:g} Mb/s"
            say(f"# A registry at {near}, and the same one at {far}, at a distance of {network}.")
            try:
                story(f"{near}/debian/python", f"{far}/debian/python", network)
            finally:
                veneer("daemon", "stop", "--force")


def story(near: str, far: str, network: str) -> None:
    """Convert near the registry; mount and run far from it."""
    say("\n# Convert: same files, same config and diffIDs, layers cut so that pieces can be fetched alone.")
    began = time.monotonic()
    say(veneer("convert", f"{near}:python", f"{near}:lazy").strip())
    say(f"({time.monotonic() - began:.1f} s)")

    say("\n# Look into it from afar, without pulling it.")
    say(veneer("cat", f"{far}:lazy", "/etc/debian_version").strip())

    say("\n# Mount it: manifest, config, index and the pack of what its command reads are fetched.")
    shutil.rmtree(DEMO / "cache")
    mountpoint = DEMO / "mnt"
    info = json.loads(veneer("mount", "--json", f"{far}:lazy", mountpoint))
    fetched = f"{info['requests']} requests, {info['bytes_received'] / 1024:.0f} KiB"
    say(f"mounted after {info['seconds']:.2f} s: {fetched}")
    say(f"/usr/bin has {len(os.listdir(mountpoint / 'usr/bin'))} entries, and the mount can be written to")
    (mountpoint / "written").write_text("into the upper directory\n")
    veneer("umount", mountpoint)

    say("\n# Run Python in a container, from an empty cache; then once more.")
    shutil.rmtree(DEMO / "cache")
    rows = []
    for name in ("lazy, cold", "lazy, again"):
        report = DEMO / "report.json"
        argv: list[str | Path] = [VENEER, "run", "--report", report, f"{far}:lazy", "--", *COMMAND]
        say("$ veneer run " + " ".join(map(str, argv[2:5])) + " ... python3 -c '...'")
        at, _ = first_output(argv)
        facts = json.loads(report.read_text())
        rows.append((name, at, facts["bytes_fetched"], str(facts["requests"])))

    say("\n# The same image, pulled and unpacked completely before it runs.")
    at, size = full_pull(f"{far}:python")
    rows.append(("full pull, unpack", at, size, "-"))

    say(f"\n{network:20}{'first output':>14}{'fetched':>14}{'requests':>10}")
    for name, at, size, requests in rows:
        say(f"{name:20}{at:>12.2f} s{mib(size):>14}{requests:>10}")
    say(f"\nimage: {mib(size)} compressed; what was made is in {DEMO} and may be deleted")


if __name__ == "__main__":
    main()
