"""The bundle of an image: what its config and the user say, the user looked up in the image's own files."""

from functools import partial
from pathlib import Path

from veneer.container.options import ContainerOptions
from veneer.container.spec import runtime_spec, write_bundle
from veneer.container.users import ContainerUser, find_user
from veneer.errors import NotFound, UsageError
from veneer.events import Reporter, silent
from veneer.image import Image, open_image
from veneer.image.files import ACCOUNT_FILES, read_file
from veneer.mount.packed import Packed
from veneer.settings import Settings
from veneer.source.tasks import run_all
from veneer.store.spanstore import SpanStore, open_store

__all__ = ["image_user", "write_image_bundle"]

#: Account files beyond this are no account files.
MAX_ACCOUNT_FILE = 4 << 20


async def image_user(
    image: Image, store: SpanStore, options: ContainerOptions, packed: Packed | None = None
) -> ContainerUser:
    """Who the container's process is. Raises UsageError when the image does not know the user."""

    async def account_file(path: bytes) -> bytes:
        data = bytearray()
        try:
            async for piece in read_file(image, store, path, packed):
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
