"""Where credentials may go, and what a message may show."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import RegistryError
from veneer.transport.address import (
    is_loopback,
    origin_of,
    redact_text,
    redact_url,
    redirect_target,
    same_origin,
)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("https://store.example/blob?sig=1", "https://store.example/blob?sig=1"),
        ("/v2/app/blobs/uploads/1?_state=x", "https://reg.example/v2/app/blobs/uploads/1?_state=x"),
        ("uploads/2", "https://reg.example/v2/uploads/2"),
        ("//other.example/x", "https://other.example/x"),
    ],
)
def test_redirects_are_resolved(location: str, expected: str) -> None:
    assert redirect_target("https://reg.example/v2/app", location, "app") == expected


@pytest.mark.parametrize(
    "location",
    [
        "",
        "http://reg.example/v2/app",
        "ftp://reg.example/",
        "file:///etc/passwd",
        "https://user:secret@store.example/",
        "https://user@store.example/",
        "https://a.example\\@b.example/",
        "https://a.example:99999/",
        "https://a.example/ x",
        "https://a.example/\r\nX: y",
        "https://a.example/" + "x" * 9000,
    ],
)
def test_unsafe_redirects_are_refused_without_showing_them(location: str) -> None:
    with pytest.raises(RegistryError) as caught:
        redirect_target("https://reg.example/v2/app", location, "app")
    assert "secret" not in caught.value.message


def test_plain_http_may_redirect_to_either() -> None:
    for location in ("http://b.example/x", "https://b.example/x"):
        assert redirect_target("http://a.example/", location, "app") == location


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://Registry.example/v2/", "registry.example"),
        ("https://registry.example:443/", "registry.example"),
        ("http://registry.example:443/", "registry.example:443"),
        ("http://[::1]:5000/", "[::1]:5000"),
    ],
)
def test_messages_name_a_port_that_is_not_the_usual_one(url: str, address: str) -> None:
    assert origin_of(url).address == address


def test_origin_is_scheme_host_and_port() -> None:
    assert same_origin("https://A.example/x", "https://a.example:443/y?z")
    for other in (
        "http://a.example/",
        "https://a.example:444/",
        "https://b.a.example/",
        "https://a.example.b/",
    ):
        assert not same_origin("https://a.example/", other)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST:5000", True),
        ("127.0.0.1:5000", True),
        ("127.8.9.1", True),
        ("[::1]:5000", True),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com:5000", False),
        ("registry.example", False),
        ("10.0.0.1", False),
        ("[::2]:80", False),
    ],
)
def test_loopback_is_told_by_the_name(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_messages_of_servers_are_cut() -> None:
    shown = redact_text("long " * 20_000, 60)
    assert len(shown) == 60
    assert shown.startswith("long long")
    assert shown.endswith("...")


def test_messages_show_urls_without_their_secrets() -> None:
    url = "https://user:pw@store.example:8443/a/b?X-Amz-Signature=abc#frag"
    assert redact_url(url) == "https://store.example:8443/a/b?..."
    assert redact_text(f"see {url}\n\x1b[31m now") == "see https://store.example:8443/a/b?... [31m now"


SECRET = st.text("abcdefghijklmnopqrstuvwxyz0123456789%-._~", min_size=12, max_size=40)


@settings(deadline=None, max_examples=100)
@given(
    before=st.text(max_size=400), host=st.sampled_from(["s.example", "s.example:8443", "[::1]"]), secret=SECRET
)
def test_no_secret_of_a_url_survives_in_text(before: str, host: str, secret: str) -> None:
    text = f"{before} https://u:{secret}@{host}/p?X-Sig={secret}&b=1#{secret}"
    assert secret not in redact_text(text) or secret in before


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
def test_any_location_is_safe_or_refused(location: str) -> None:
    try:
        target = redirect_target("https://reg.example/v2/", location, "app")
    except RegistryError:
        return
    assert origin_of(target).scheme == "https"
    assert "@" not in target.split("/")[2]
