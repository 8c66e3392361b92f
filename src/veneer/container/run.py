"""Running a command on a lazily mounted image, in one process: the mount lives as long as the container.

Whatever ends the run (the command, a signal, an error), the container is deleted, the root is unmounted and
what was written is thrown away; after kill -9 of this process the next veneer command does it.
"""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import trio

from veneer.container.options import ContainerOptions
from veneer.container.runtime import delete_container, find_runtime
from veneer.container.spec import runtime_spec, write_bundle
from veneer.container.users import ContainerUser, find_user
from veneer.errors import MountError, NotFound, UsageError
from veneer.events import Reporter, silent
from veneer.image import Image, open_image
from veneer.image.files import read_file
from veneer.mount.backends import Subject, open_mounter
from veneer.mount.base import Choice
from veneer.mount.fuse import FuseStats
from veneer.mount.overlay import private_upper
from veneer.mount.session import mounted
from veneer.mount.state import MountRecord, claim, detach, directory_of, release, this_process
from veneer.settings import Settings
from veneer.source.tasks import open_nursery, run_all
from veneer.store.spanstore import SpanStore, open_store
from veneer.store.stats import StoreStats
from veneer.transport import TransportStats

__all__ = ["RunRequest", "RunResult", "run_image", "write_image_bundle"]

#: Account files beyond this are no account files.
MAX_ACCOUNT_FILE = 4 << 20
#: Signals passed on to the container's process.
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
#: A terminal sends these to its whole foreground group, the runtime included.
FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
#: The command may ignore requests to end; whoever repeats them so often means it.
REQUESTS_BEFORE_KILL = 3


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One container to run.

    Args:
        image: reference of the image.
        options: how the container differs from what the image says.
        runtime: name of the OCI runtime; None for the first that is installed.
        timing: note when the first output comes; output then goes through this process.
    """

    image: str
    options: ContainerOptions
    runtime: str | None = None
    timing: bool = False


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run went.

    Args:
        exit_code: of the command; 128 + n when signal n ended it.
        mounted_s: seconds from the request to the mount.
        first_output_s: seconds from the request to the first byte of output; None without --timing or output.
        total_s: seconds from the request to the end of the command.
        transport: HTTP requests and what they brought, the index included.
        store: what became of reads.
        fuse: what the kernel asked.
        backend: how the image was mounted.
    """

    exit_code: int
    mounted_s: float
    first_output_s: float | None
    total_s: float
    transport: TransportStats
    store: StoreStats
    fuse: FuseStats
    backend: Choice

    @property
    def requests(self) -> int:
        """Requests over the network, or of data when the image is an OCI layout on this machine."""
        return self.transport.requests or self.store.requests

    @property
    def bytes_fetched(self) -> int:
        """What they brought."""
        return self.transport.bytes_received or self.store.bytes_fetched

    def to_json(self) -> dict[str, object]:
        """The facts by name."""
        return asdict(self) | {"requests": self.requests, "bytes_fetched": self.bytes_fetched}


async def run_image(request: RunRequest, settings: Settings, *, report: Reporter = silent) -> RunResult:
    """Run a command in a container on an image and wait for it.

    A signal that comes before the command runs ends this process as usual, after everything is cleaned up.

    Raises:
        VeneerError: it could not be started; a command that fails is a result.
    """
    if os.geteuid() != 0:
        raise MountError(
            "running containers needs root", hint="mount the image instead: veneer mount IMAGE DIR"
        )
    if request.options.terminal and not sys.stdin.isatty():
        raise UsageError("standard input is not a terminal", hint="leave out -t")
    container = _Container(request, find_runtime(request.runtime))
    record = _new_record(request.image, container, settings)
    await trio.to_thread.run_sync(claim, settings.run_dir, record)
    try:
        async with open_nursery() as nursery:
            await nursery.start(container.follow_signals, nursery.cancel_scope)
            result = await _run(request, settings, container, record, report)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_clean_up, settings.run_dir, record)
    if container.interrupted is not None:
        signal.raise_signal(container.interrupted)
        raise KeyboardInterrupt
    return result


async def write_image_bundle(
    image_text: str,
    directory: Path,
    options: ContainerOptions,
    settings: Settings,
    *,
    report: Reporter = silent,
) -> None:
    """Write ``config.json`` for an image and an empty ``rootfs`` to mount it on; the directory is made.

    Raises:
        UsageError: there is a bundle already.
        VeneerError: the image cannot be opened.
    """
    if (directory / "config.json").exists():
        raise UsageError(f"{directory} has a config.json already")
    async with open_store(settings) as store, open_image(image_text, settings, report=report) as image:
        user = await _user(image, store, options)
    spec = runtime_spec(image.config, options, user, root="rootfs", name=directory.name)
    try:
        (directory / "rootfs").mkdir(parents=True, exist_ok=True)
        write_bundle(directory, spec)
    except OSError as error:
        raise UsageError(f"cannot write the bundle {directory}: {error.strerror}") from error


async def _run(
    request: RunRequest, settings: Settings, container: "_Container", record: MountRecord, report: Reporter
) -> RunResult:
    began = trio.current_time()
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(settings))
        image = await stack.enter_async_context(open_image(request.image, settings, report=report))
        attached = [store.attach(d, s) for d, s in zip(image.index.devices, image.sources, strict=True)]
        bundle = directory_of(settings.run_dir, record.id)
        users: list[ContainerUser] = []

        async def look_up_user() -> None:
            users.append(await _user(image, store, request.options))

        # Looking up the user waits for the network, making the metadata image for the processor.
        async with open_nursery() as nursery:
            nursery.start_soon(look_up_user)
            mounter = await open_mounter(
                settings.backend,
                Subject(image.name, image.index, image.index_descriptor.digest, store, attached),
                cache_dir=settings.cache_dir,
                devices=bundle / "devices",
                report=report,
            )
        root = os.fspath(record.mountpoint)
        spec = runtime_spec(image.config, request.options, users[0], root=root, name=record.id)
        await trio.to_thread.run_sync(_make_bundle, bundle, record, spec)
        await stack.enter_async_context(
            mounted(mounter, record.mountpoint, lower=record.lower, upper=record.upper)
        )
        mounted_s = trio.current_time() - began
        exit_code = await container.run(record.id, bundle)
        return RunResult(
            exit_code=exit_code,
            mounted_s=mounted_s,
            first_output_s=None if container.first_output is None else container.first_output - began,
            total_s=trio.current_time() - began,
            transport=image.transport_stats,
            store=store.stats,
            fuse=mounter.stats,
            backend=mounter.choice,
        )


class _Container:
    """One run of the runtime, and the signals that are meant for what it runs."""

    def __init__(self, request: RunRequest, runtime: Path) -> None:
        options = request.options
        self.runtime = runtime
        self.first_output: float | None = None
        #: The signal that came before there was a container.
        self.interrupted: signal.Signals | None = None
        self._stdin = None if options.interactive or options.terminal else subprocess.DEVNULL
        # A runtime in a process group of its own could not read from our terminal.
        self._shares_group = self._stdin is None and sys.stdin.isatty()
        self._watch_output = request.timing and not options.terminal
        self._name = ""
        self._process: trio.Process | None = None

    async def run(self, name: str, bundle: Path) -> int:
        """Run the bundle as container ``name``; returns the exit code of its command."""
        self._name = name
        process = await trio.lowlevel.open_process(
            [os.fspath(self.runtime), "run", "--bundle", os.fspath(bundle), name],
            stdin=self._stdin,
            stdout=subprocess.PIPE if self._watch_output else None,
            process_group=None if self._shares_group else 0,
        )
        self._process = process
        try:
            if process.stdout is not None:
                async with process.stdout:
                    await self._forward(process.stdout)
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
        return code if code >= 0 else 128 - code

    async def _forward(self, output: trio.abc.ReceiveStream) -> None:
        async for chunk in output:
            if self.first_output is None:
                self.first_output = trio.current_time()
            try:
                await trio.to_thread.run_sync(_write_all, sys.stdout.fileno(), chunk)
            except BrokenPipeError:
                return  # closing our end tells the command what happened to ours

    async def follow_signals(
        self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Pass signals on; one that comes before there is a container ends the attempt."""
        requests = 0
        with trio.open_signal_receiver(*FORWARDED) as signals:
            task_status.started()
            async for number in signals:
                process = self._process
                if process is None:
                    self.interrupted = signal.Signals(number)
                    scope.cancel()
                    return
                if not (self._shares_group and number in FROM_TERMINAL):
                    process.send_signal(number)
                requests += number in (signal.SIGINT, signal.SIGTERM)
                if requests >= REQUESTS_BEFORE_KILL:
                    kill = [os.fspath(self.runtime), "kill", self._name, "KILL"]
                    await trio.run_process(kill, check=False, capture_stderr=True)


async def _user(image: Image, store: SpanStore, options: ContainerOptions) -> ContainerUser:
    async def account_file(path: bytes) -> bytes:
        data = bytearray()
        try:
            async for piece in read_file(image, store, path):
                data += piece
                if len(data) > MAX_ACCOUNT_FILE:
                    raise UsageError(
                        f"/{path.decode()} of the image is too large", hint="give --user by number"
                    )
        except NotFound:
            return b""
        return bytes(data)

    files = (b"etc/passwd", b"etc/group")
    passwd, group = await run_all([partial(account_file, path) for path in files])
    return find_user(options.user or image.config.user, passwd, group)


def _new_record(image: str, container: _Container, settings: Settings) -> MountRecord:
    name = secrets.token_hex(8)
    directory = Path(os.path.realpath(settings.run_dir)) / "mounts" / name
    return MountRecord(
        id=name,
        kind="run",
        image=image,
        mountpoint=directory / "root",
        process=this_process(),
        lower=directory / "lower",
        devices=directory / "devices",
        upper=private_upper(settings.cache_dir.absolute() / "uppers" / name),
        container=(os.fspath(container.runtime), name),
    )


def _make_bundle(bundle: Path, record: MountRecord, spec: Mapping[str, object]) -> None:
    for directory in (record.mountpoint, record.lower):
        if directory is not None:
            directory.mkdir()
    write_bundle(bundle, spec)


def _clean_up(run_dir: Path, record: MountRecord) -> None:
    if record.container is not None:
        delete_container(*record.container)
    detach(record)
    release(run_dir, record)


def _write_all(fd: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
