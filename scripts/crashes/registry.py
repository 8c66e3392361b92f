"""A registry whose faults are switched by lines on its standard input: crashes/registry.py DIRECTORY.

A process of its own, so that nothing that happens to it or in it stops the readers. Each command is answered
with a line on standard output when it is in force:

    down, up          nothing listens, all connections are gone; and back
    pace S BYTES      every request for a blob waits S seconds first, and gets so many bytes a second (0: all)
    wrong SEED        every blob comes back changed, in ways drawn with the seed
    well              no more faults (a registry that is down stays down)
"""

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import trio

from veneer.serve.message import Handler, Request, Response, Sink, Stream, body_length, push_body
from veneer.testing.actions import Delay, Rate, Reset, Truncate, WrongRange
from veneer.testing.registry import ScriptedRegistry, scripted_registry

__all__ = ["SwitchedRegistry", "switched_registry"]

_BLOBS = "/blobs/"


class SwitchedRegistry:
    """The other end of the process: where it listens, and its switches. They block until they are in force."""

    def __init__(self, process: "subprocess.Popen[str]", host: str) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.host = host
        self._stdin: IO[str] = process.stdin
        self._stdout: IO[str] = process.stdout

    def down(self) -> None:
        """Nothing listens any more."""
        self._command("down")

    def up(self) -> None:
        """It listens again."""
        self._command("up")

    def pace(self, seconds: float, bytes_per_s: float = 0) -> None:
        """Make every blob request take longer, so that the cache stays cold for a while."""
        self._command(f"pace {seconds} {bytes_per_s}")

    def wrong(self, seed: int) -> None:
        """Serve wrong bytes from now on."""
        self._command(f"wrong {seed}")

    def well(self) -> None:
        """No more faults."""
        self._command("well")

    def _command(self, line: str) -> None:
        self._stdin.write(line + "\n")
        self._stdin.flush()
        if self._stdout.readline() != "done\n":
            sys.exit(f"the registry did not do {line!r}")


@contextmanager
def switched_registry(directory: Path) -> Iterator[SwitchedRegistry]:
    """Run the registry until the end of the block."""
    argv: list[str | Path] = [sys.executable, __file__, directory]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        host = process.stdout.readline().strip()
        if not host:
            sys.exit("the registry did not start")
        try:
            yield SwitchedRegistry(process, host)
        finally:
            process.stdin.close()
            process.wait()


class Garble:
    """Changes what blobs look like: a flipped bit, zeros, other bytes, bytes of elsewhere, too few of them."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def concerns(self, request: Request) -> bool:
        """Every download."""
        return request.method == "GET"

    async def respond(self, request: Request, proceed: Handler) -> Response:
        """Answer wrongly."""
        kind = self._rng.randrange(7)
        if kind == 0:
            return await Truncate(self._rng.randrange(100_000)).respond(request, proceed)
        if kind == 1:
            return await Reset(self._rng.randrange(100_000)).respond(request, proceed)
        shifted = WrongRange(self._rng.choice((1, 512, 4096, 65536)), "range")
        if kind == 2 and shifted.concerns(request):
            return await shifted.respond(request, proceed)
        response = await proceed(request)
        body = response.body

        async def push(sink: Sink) -> None:
            async def changed(data: bytes | memoryview) -> None:
                await sink(self._change(bytearray(data), kind))

            await push_body(body, changed)

        return replace(response, body=Stream(push, body_length(body)))

    def _change(self, data: bytearray, kind: int) -> bytes:
        """One piece of a body, wrong in one place at least."""
        start = self._rng.randrange(len(data))
        if kind <= 4:
            data[start] ^= 1 << self._rng.randrange(8)
        elif kind == 5:
            data[start:] = bytes(len(data) - start)
        else:
            data[start:] = self._rng.randbytes(len(data) - start)
        return bytes(data)


class _Switches:
    """The commands, in the registry's own process."""

    def __init__(self, registry: ScriptedRegistry, stack: AsyncExitStack) -> None:
        self._registry = registry
        self._stack = stack
        self._pace = self._rate = 0.0

    async def do(self, command: str, *arguments: str) -> None:
        """Carry one command out."""
        if command == "down":
            await self._stack.enter_async_context(self._registry.down())
        elif command == "up":
            await self._stack.aclose()
        elif command == "pace":
            self._pace, self._rate = map(float, arguments)
            self._script(None)
        elif command in ("wrong", "well"):
            self._script(int(arguments[0]) if arguments else None)
        else:
            raise ValueError(command)

    def _script(self, wrong: int | None) -> None:
        faults = self._registry.faults
        faults.clear()
        if self._pace:
            faults.add(Delay(self._pace), method="GET", path=_BLOBS, count=None)
        if self._rate:
            faults.add(Rate(self._rate), method="GET", path=_BLOBS, count=None)
        if wrong is not None:
            faults.add(Garble(wrong), method="GET", path=_BLOBS, count=None)


async def _main(directory: Path) -> None:
    async with scripted_registry(directory) as registry, AsyncExitStack() as stack:
        switches = _Switches(registry, stack)
        print(registry.host, flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            await switches.do(*line.split())
            print("done", flush=True)
            registry.requests.clear()


if __name__ == "__main__":
    trio.run(_main, Path(sys.argv[1]))
