"""Which file a range of a device is of."""

from tests.mount.images import file, image
from veneer.mount.filetable import FileTable

PAGE = 4096


def widened(offset: int, length: int) -> tuple[int, int]:
    """The range as the kernel asks for it: whole pages of the device."""
    start = offset - offset % PAGE
    return start, offset + length + -(offset + length) % PAGE - start


def test_a_range_widened_to_pages_is_of_the_file_that_was_read() -> None:
    names = [b"%02d" % number for number in range(40)]
    sizes = [200 if number % 2 else 20_000 for number in range(40)]
    index, _ = image({name: file(bytes(size)) for name, size in zip(names, sizes, strict=True)})
    table, key = FileTable(lambda: index), index.devices[0].key
    nodes = dict(index.walk())
    for name, size in zip(names, sizes, strict=True):
        if size > PAGE:
            start = index.data[nodes[name]]
            assert table.at(key, *widened(start, size)) == (nodes[name], start)
            assert table.at(key, *widened(start, 16384)) == (nodes[name], start), "its first pages"
            assert table.window(key, *widened(start, 16384)) == (start, start + size), "worth having whole"


def test_a_range_without_a_file_is_of_the_root() -> None:
    index, _ = image({b"only": file(b"x")})
    table, key = FileTable(lambda: index), index.devices[0].key
    assert table.at(key, 100_000, 10) == (index.root, 0)
