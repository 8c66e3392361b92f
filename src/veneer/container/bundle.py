"""The bundle of an image: what its config and the user say, the user looked up in the image's own files."""

from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from veneer.container.options import ContainerOptions
from veneer.container.spec import runtime_spec, write_bundle
from veneer.container.users import ContainerUser, find_user
from veneer.errors import NotFound, UsageError
from veneer.events import Reporter, silent
from veneer.image import Image, open_image
from veneer.image.files import read_file
from veneer.index.paths import ACCOUNT_FILES
from veneer.settings import Settings
from veneer.source.tasks import run_all
from veneer.store.spanstore import AttachedDevice, SpanStore, open_store

__all__ = ["Whereabouts", "image_user", "write_image_bundle"]

#: Where files are, by path: device, offset and length of each piece.
Whereabouts = Mapping[bytes, Sequence[tuple[AttachedDevice, int, int]]]

#: Account files beyond this are no account files.
MAX_ACCOUNT_FILE = 4 << 20


async def image_user(
    image: Image, store: SpanStore, options: ContainerOptions, known: Whereabouts | None = None
) -> ContainerUser:
    """Who the container's process is. Raises UsageError when the image does not know the user.

    Where account files are ``known``, the tree is not asked.
    """

    async def account_file(path: bytes) -> bytes:
        data = bytearray()
        places = None if known is None else known.get(path)
        try:
            async for piece in read_file(image, store, path) if places is None else _pieces(store, places):
                data += piece
                if len(data) > MAX_ACCOUNT_FILE:
                    raise UsageError(
                        f"/{path.decode()} of the image is too large", hint="give --user by number"
                    )
        except NotFound:
            return b""
        return bytes(data)

    passwd, group = await run_all([partial(account_file, path) for path in ACCOUNT_FILES])
    return find_user(options.user or image.config.user, passwd, group)


async def _pieces(store: SpanStore, places: Sequence[tuple[AttachedDevice, int, int]]) -> AsyncIterator[bytes]:
    for attached, offset, length in places:
        if length > MAX_ACCOUNT_FILE:
            yield bytes(MAX_ACCOUNT_FILE + 1)  # the reader wants no more to refuse it
            return
        yield await store.read(attached, offset, length)


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
    async with (
        open_store(settings) as store,
        open_image(image_text, settings, keeper=store, report=report) as image,
    ):
        user = await image_user(image, store, options)
    spec = runtime_spec(image.config, options, user, root="rootfs", name=directory.name)
    try:
        (directory / "rootfs").mkdir(parents=True, exist_ok=True)
        write_bundle(directory, spec)
    except OSError as error:
        raise UsageError(f"cannot write the bundle {directory}: {error.strerror}") from error
