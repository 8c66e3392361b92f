"""Which images are named for a layer: the latest few, those that know most of the layers first."""

from pathlib import Path

from veneer.image.by_layer import images_knowing, layer_notes, note_layers
from veneer.oci.digest import Digest

A, B, C = (Digest.of(name) for name in (b"layer a", b"layer b", b"layer c"))
IMAGES = [Digest.of(b"image %d" % number) for number in range(6)]


def test_who_knows_most_layers_comes_first_whatever_came_last(tmp_path: Path) -> None:
    note_layers(tmp_path, [A, B], "web", IMAGES[0])
    note_layers(tmp_path, [A], "web", IMAGES[1])
    note_layers(tmp_path, [A, B, C], "job", IMAGES[2])
    assert images_knowing(tmp_path, [A, B, C], "web") == [IMAGES[0], IMAGES[1]]
    assert images_knowing(tmp_path, [A], "web") == [IMAGES[1], IMAGES[0]], "else the latest one"
    assert images_knowing(tmp_path, [C], "web") == []


def test_the_latest_few_are_remembered_each_once(tmp_path: Path) -> None:
    for image in [*IMAGES, IMAGES[4]]:
        note_layers(tmp_path, [A], "web", image)
    assert images_knowing(tmp_path, [A], "web") == [IMAGES[4], IMAGES[5], IMAGES[3], IMAGES[2]]


def test_a_damaged_note_names_nobody_and_is_replaced(tmp_path: Path) -> None:
    note_layers(tmp_path, [A], "web", IMAGES[0])
    (note,) = layer_notes(tmp_path, [A], "web")
    note.write_bytes(b"\xff no digest\n")
    assert images_knowing(tmp_path, [A], "web") == []
    note_layers(tmp_path, [A], "web", IMAGES[1])
    assert images_knowing(tmp_path, [A], "web") == [IMAGES[1]]
