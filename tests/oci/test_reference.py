"""References as users type them."""

from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from veneer.errors import UsageError
from veneer.oci.digest import Digest
from veneer.oci.reference import LayoutReference, RegistryReference, parse_reference

DIGEST = Digest.of(b"x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("debian", ("docker.io", "library/debian", "latest", None)),
        ("debian:12", ("docker.io", "library/debian", "12", None)),
        ("team/app", ("docker.io", "team/app", "latest", None)),
        ("docker.io/debian", ("docker.io", "library/debian", "latest", None)),
        ("index.docker.io/team/app", ("docker.io", "team/app", "latest", None)),
        ("localhost/app", ("localhost", "app", "latest", None)),
        ("localhost:5000/team/app:v1.0", ("localhost:5000", "team/app", "v1.0", None)),
        ("ghcr.io/a/b/c/d:T_1-x.y", ("ghcr.io", "a/b/c/d", "T_1-x.y", None)),
        ("Host/app", ("Host", "app", "latest", None)),
        ("127.0.0.1:5000/app", ("127.0.0.1:5000", "app", "latest", None)),
        ("[::1]/app", ("[::1]", "app", "latest", None)),
        ("[2001:db8::1]:5000/app:1", ("[2001:db8::1]:5000", "app", "1", None)),
        (f"debian@{DIGEST}", ("docker.io", "library/debian", "", DIGEST)),
        (f"r.example/app:1@{DIGEST}", ("r.example", "app", "1", DIGEST)),
        ("r.example/a__b/c---d/e.f_g", ("r.example", "a__b/c---d/e.f_g", "latest", None)),
        ("r.example/" + "a" * 255, ("r.example", "a" * 255, "latest", None)),
        ("r.example/a:" + "t" * 128, ("r.example", "a", "t" * 128, None)),
    ],
)
def test_registry_references(text: str, expected: tuple[str, str, str, Digest | None]) -> None:
    reference = parse_reference(text)
    assert reference == RegistryReference(*expected)
    assert parse_reference(str(reference)) == reference


def test_digest_wins_over_the_tag() -> None:
    reference = parse_reference(f"app:1@{DIGEST}")
    assert isinstance(reference, RegistryReference)
    assert reference.reference == str(DIGEST)
    assert str(reference) == f"docker.io/library/app:1@{DIGEST}"
    assert str(parse_reference("app")) == "docker.io/library/app:latest"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "/app",
        "app/",
        "a//b",
        "App",
        "r.example/App",
        "-app",
        "app-",
        "a..b",
        "a___b",
        "app:",
        "app:.tag",
        "app:-tag",
        "app:" + "t" * 129,
        "app:tag:tag",
        "app ",
        " app",
        "app\n",
        "app:tag\n",
        "äpp",
        "r.example/" + "a" * 256,
        "r.example:/app",
        "r.example:0/app",
        "r.example:65536/app",
        "r.example:x/app",
        "r..example/app",
        "-r.example/app",
        "[::1/app",
        "[::1]x/app",
        "[:::1]/app",
        "[1.2.3.4]/app",
        "[]/app",
        "::1/app",
        "../etc/passwd",
        "./app",
        "r.example/../../x",
        "app@",
        "app@sha256:abc",
        "app@md5:" + "0" * 32,
        f"app@{str(DIGEST).upper()}",
        f"app@{DIGEST}\n",
        f"app@{DIGEST}@{DIGEST}",
        "f" * 64,
        "a" * 5000,
        "docker-archive:/tmp/image.tar",
        "\0",
    ],
)
def test_invalid_registry_references(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    assert len(caught.value.message) < 2_000


def test_hints_say_what_to_write() -> None:
    for text, hint in [
        ("docker://r.example/app:1", "write it as r.example/app:1"),
        ("https://user:secret@r.example/app", "write it as r.example/app"),
        ("r.example/Team/App", "repository names are lower case: team/app"),
        ("f" * 64, "registries know images by REPOSITORY@sha256:..."),
    ]:
        with pytest.raises(UsageError) as caught:
            parse_reference(text)
        assert caught.value.hint == hint


def test_credentials_in_a_reference_are_not_repeated() -> None:
    plain = ("user:secret@r.example/app", "user:p@secret@r.example/app:1")
    for text in (*plain, "https://user:secret@r.example/app"):
        with pytest.raises(UsageError) as caught:
            parse_reference(text)
        assert text not in plain or "credentials belong into" in str(caught.value.hint)
        assert "secret" not in f"{caught.value.message} {caught.value.hint}"


# Layouts.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oci:dir", ("dir", "", None)),
        ("oci:/srv/images:v1", ("/srv/images", "v1", None)),
        ("oci:.:v1", (".", "v1", None)),
        (f"oci:dir@{DIGEST}", ("dir", "", DIGEST)),
        (f"oci:dir:v1@{DIGEST}", ("dir", "v1", DIGEST)),
        ("oci:/a:b/c", ("/a:b/c", "", None)),
        ("oci:/a:b/c:v1", ("/a:b/c", "v1", None)),
        ("oci:/mail@host/c", ("/mail@host/c", "", None)),
        ("oci:a b/c:v1", ("a b/c", "v1", None)),
    ],
)
def test_layout_references(text: str, expected: tuple[str, str, Digest | None]) -> None:
    path, tag, digest = expected
    reference = parse_reference(text)
    assert reference == LayoutReference(Path(path), tag, digest)
    assert str(reference) == text


def test_existing_directory_wins_over_a_tag(tmp_path: Path) -> None:
    directory = tmp_path / "images:v1"
    text = f"oci:{directory}"
    assert parse_reference(text) == LayoutReference(tmp_path / "images", "v1")
    directory.mkdir()
    assert parse_reference(text) == LayoutReference(directory, "")
    assert parse_reference(f"{text}:v2") == LayoutReference(directory, "v2")
    assert parse_reference(f"{text}@{DIGEST}") == LayoutReference(directory, "", DIGEST)
    odd = tmp_path / f"images@{DIGEST}"
    odd.mkdir()
    assert parse_reference(f"oci:{odd}") == LayoutReference(odd, "")


@pytest.mark.parametrize(
    "text",
    [
        "oci:",
        "oci::v1",
        "oci:dir:",
        "oci:dir:-v",
        "oci:dir:" + "t" * 129,
        "oci:dir@sha256:0",
        "oci:a\0b",
        f"oci:@{DIGEST}",
    ],
)
def test_invalid_layout_references(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


@settings(deadline=None, max_examples=300)
@given(
    st.text(max_size=40)
    | st.text(alphabet="aA0:/@[].-_ ", max_size=30)
    | st.from_regex(r"(oci:)?[a-z.]*(:[0-9]+)?/[a-z/_-]*(:[a-z]*)?(@sha256:[0-9a-f]*)?", fullmatch=True)
)
def test_any_text_is_a_reference_or_a_usage_error(text: str) -> None:
    try:
        reference = parse_reference(text)
    except UsageError:
        return
    assert parse_reference(str(reference)) == reference


@settings(deadline=None)
@given(st.from_regex(r"[a-z0-9]+(\.[a-z]+)+(:[1-9][0-9]{0,3})?/[a-z0-9]+(/[a-z0-9]+){0,2}", fullmatch=True))
def test_full_names_are_their_own_canonical_form(name: str) -> None:
    assume(len(name) < 200)  # longer ones are refused
    for text in (f"{name}:1", f"{name}@{DIGEST}", f"{name}:1@{DIGEST}"):
        if not name.startswith(("docker.io/", "index.docker.io/")):
            assert str(parse_reference(text)) == text
