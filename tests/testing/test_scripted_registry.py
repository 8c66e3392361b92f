"""Each fault does on the wire what its name says, to the requests it is meant for and to no others."""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trio
from trio.testing import MockClock

from tests.serve.clients import connect, image, push_image, push_referrer
from veneer.oci.descriptor import Descriptor
from veneer.oci.digest import Digest
from veneer.serve.auth import TokenAuth
from veneer.source.layout import OCILayout
from veneer.testing.actions import (
    Action,
    Delay,
    DropHeader,
    ExpireToken,
    FlipBit,
    Hold,
    IgnoreRange,
    Rate,
    Reset,
    SetHeader,
    Stall,
    Status,
    Truncate,
    WrongRange,
    expired_xml,
    html_page,
    rate_limited,
)
from veneer.testing.registry import ObjectStore, ScriptedRegistry, scripted_registry

DATA = bytes(range(256)) * 400
DIGEST = str(Digest.of(DATA))
BLOB = f"/v2/app/blobs/{DIGEST}"


@asynccontextmanager
async def registry(
    directory: Path, store: ObjectStore | None = None
) -> AsyncIterator[tuple[ScriptedRegistry, httpx.AsyncClient]]:
    # Not pushed through the registry: it would hash and write in threads, which a mock clock does not wait for.
    descriptor = Descriptor("application/octet-stream", Digest.of(DATA), len(DATA))
    await OCILayout(directory / "app", create=True).push_blob(descriptor, lambda: io.BytesIO(DATA))
    async with (
        scripted_registry(directory, page_size=2, object_store=store) as registry,
        connect(registry.host) as client,
    ):
        yield registry, client


async def received(client: httpx.AsyncClient, path: str = BLOB) -> tuple[bytes, Exception | None]:
    """What arrives of a body, and what ended it."""
    data = b""
    try:
        async with client.stream("GET", path) as response:
            async for piece in response.aiter_raw():
                data += piece
    except httpx.TransportError as error:
        return data, error
    return data, None


async def test_rules_choose_by_method_path_occurrence_and_count(tmp_path: Path) -> None:
    async with registry(tmp_path) as (scripted, client):
        rule = scripted.faults.add(Status(503), method="GET", path="/blobs/", nth=2, count=2)
        codes = []
        for method, path in [("HEAD", BLOB), ("GET", "/v2/"), *[("GET", BLOB)] * 4]:
            codes.append((await client.request(method, path)).status_code)
        assert codes == [200, 200, 200, 503, 503, 200]
        assert (rule.seen, rule.hits) == (4, 2)
        scripted.faults.clear()
        scripted.faults.add(
            Status(500), when=lambda request: "," in (request.header("range") or ""), count=None
        )
        for wanted, code in (("bytes=0-1", 206), ("bytes=0-1,4-5", 500), ("bytes=0-1,4-5", 500)):
            assert (await client.get(BLOB, headers={"Range": wanted})).status_code == code


async def test_resets(tmp_path: Path) -> None:
    async with registry(tmp_path) as (scripted, client):
        scripted.faults.add(Reset())
        scripted.faults.add(Reset(after=1000), nth=2)
        data, error = await received(client)
        assert data == b""
        assert isinstance(error, httpx.ReadError)
        data, error = await received(client)
        assert DATA.startswith(data)
        assert len(data) <= 1000
        assert isinstance(error, httpx.ReadError)
        assert await received(client) == (DATA, None)


async def test_truncation_keeps_the_promise_of_the_length(tmp_path: Path) -> None:
    async with registry(tmp_path) as (scripted, client):
        scripted.faults.add(Truncate(after=1000))
        data, error = await received(client)
        assert data == DATA[:1000]
        assert isinstance(error, httpx.RemoteProtocolError)
        assert scripted.requests[-1].bytes_sent == 1000


async def test_a_stall_sends_so_much_and_then_nothing(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with registry(tmp_path) as (scripted, client):
        scripted.faults.add(Stall(after=1000))
        data, error = await received(client)
        assert data == DATA[:1000]
        assert isinstance(error, httpx.ReadTimeout)


async def test_delay_and_rate_take_the_time_they_say(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with registry(tmp_path) as (scripted, client):
        client.timeout = httpx.Timeout(1000)
        scripted.faults.add(Delay(seconds=7))
        scripted.faults.add(Rate(bytes_per_s=1024), nth=2)
        for seconds in (7, len(DATA) / 1024):
            start = trio.current_time()
            assert await received(client) == (DATA, None)
            assert trio.current_time() - start == pytest.approx(seconds)


async def test_hold_waits_for_the_test(tmp_path: Path) -> None:
    async with registry(tmp_path) as (scripted, client), trio.open_nursery() as nursery:
        hold = Hold()
        scripted.faults.add(hold)
        bodies: list[bytes] = []

        async def fetch() -> None:
            bodies.append((await client.get(BLOB)).content)

        nursery.start_soon(fetch)
        await hold.arrived.wait()
        assert bodies == []
        hold.release.set()
    assert bodies == [DATA]


@pytest.mark.parametrize("wanted", [None, "bytes=300-399", "bytes=0-9,300-309,400-"])
async def test_a_flipped_bit_is_at_its_offset_of_the_blob(tmp_path: Path, wanted: str | None) -> None:
    async with registry(tmp_path) as (scripted, client):
        headers = {"Range": wanted} if wanted else {}
        good = (await client.get(BLOB, headers=headers)).content
        scripted.faults.add(FlipBit(at=305, bit=3), path="/blobs/")
        elsewhere = await client.get(BLOB, headers={"Range": "bytes=306-999"})
        assert elsewhere.content == DATA[306:1000]
        bad = (await client.get(BLOB, headers=headers)).content
    # The boundary of a multipart body is new each time: compare what is behind the headers.
    wrong = bytes([DATA[305] ^ 8])
    assert bad.count(DATA[300:305] + wrong + DATA[306:310]) >= 1
    assert good.count(DATA[300:310]) == bad.count(DATA[300:310]) + 1
    assert len(bad) == len(good)


async def test_faults_combine(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with registry(tmp_path) as (scripted, client):
        for action in (Delay(3), Truncate(500), FlipBit(at=0), Rate(1 << 20)):
            scripted.faults.add(action)
        data, error = await received(client)
        assert data == bytes([DATA[0] ^ 1]) + DATA[1:500]
        assert isinstance(error, httpx.RemoteProtocolError)


@pytest.mark.parametrize(
    ("action", "status", "content_range", "start"),
    [
        (IgnoreRange(), 200, None, 0),
        (WrongRange(shift=10), 206, "bytes 90-189/102400", 90),
        (WrongRange(shift=10, lie="range"), 206, "bytes 100-199/102400", 90),
        (WrongRange(lie="total"), 206, "bytes 100-199/102401", 100),
    ],
)
async def test_ranges_that_are_not_those_asked_for(
    tmp_path: Path, action: Action, status: int, content_range: str | None, start: int
) -> None:
    async with registry(tmp_path) as (scripted, client):
        scripted.faults.add(action)
        assert (await client.get(BLOB)).content == DATA  # without a range there is nothing to do wrong
        got = await client.get(BLOB, headers={"Range": "bytes=100-199"})
        assert (got.status_code, got.headers.get("content-range")) == (status, content_range)
        assert got.content == (DATA if status == 200 else DATA[start : start + 100])


async def test_statuses_and_headers(tmp_path: Path) -> None:
    async with registry(tmp_path) as (scripted, client):
        for action in (rate_limited("7"), expired_xml(), html_page(), DropHeader("Docker-Content-Digest")):
            scripted.faults.add(action, nth=1)
            scripted.faults.rules[:-1] = []
            got = await client.get(BLOB)
            match action:
                case Status(status=429):
                    assert (got.status_code, got.headers["retry-after"]) == (429, "7")
                case Status(status=400):
                    assert b"<Code>ExpiredToken</Code>" in got.content
                case Status():
                    assert (got.status_code, got.headers["content-type"]) == (200, "text/html")
                case _:
                    assert "docker-content-digest" not in got.headers
                    assert got.content == DATA
        scripted.faults.add(SetHeader("Docker-Content-Digest", str(Digest.of(b""))))
        assert (await client.get(BLOB)).headers["docker-content-digest"] == str(Digest.of(b""))


async def test_tokens_can_be_made_to_expire_after_some_uses(tmp_path: Path) -> None:
    auth = TokenAuth({"ann": "secret"})
    async with scripted_registry(tmp_path, auth=auth) as scripted, connect(scripted.host) as client:
        scripted.faults.add(ExpireToken(auth), path="^/v2/", nth=3)
        got = await client.get("/token", auth=("ann", "secret"))
        headers = {"Authorization": f"Bearer {got.json()['token']}"}
        assert [(await client.get("/v2/", headers=headers)).status_code for _ in range(4)] == [
            200,
            200,
            401,
            401,
        ]


async def test_referrers_can_be_missing(tmp_path: Path) -> None:
    async with registry(tmp_path) as (scripted, client):
        pushed = image()
        await push_image(client, "app", "v1", pushed)
        await push_referrer(client, "app", pushed, "application/x-note")
        rule = scripted.faults.add(Status(404), path="/referrers/", count=None)
        assert (await client.get(f"/v2/app/referrers/{pushed.digest}")).status_code == 404
        scripted.faults.rules.remove(rule)
        assert len((await client.get(f"/v2/app/referrers/{pushed.digest}")).json()["manifests"]) == 1


async def test_down_and_up_again_on_the_same_port(tmp_path: Path) -> None:
    store = ObjectStore()
    async with registry(tmp_path, store) as (scripted, client):
        url = (await client.get(BLOB)).headers["location"]
        async with scripted.down():
            for address in (BLOB, url):
                with pytest.raises(httpx.ConnectError):
                    await client.get(address)
        assert (await client.get(BLOB, follow_redirects=True)).content == DATA


async def test_transfers_end_when_it_goes_down(tmp_path: Path) -> None:
    async with registry(tmp_path) as (scripted, client):
        scripted.faults.add(Stall(after=10))
        async with client.stream("GET", BLOB) as response:
            pieces = response.aiter_raw()
            assert await anext(pieces) == DATA[:10]
            async with scripted.down():
                with pytest.raises(httpx.RemoteProtocolError):
                    await anext(pieces)


async def test_redirects_to_presigned_urls_of_another_host(tmp_path: Path, mock_clock: MockClock) -> None:
    store = ObjectStore(max_uses=2, lifetime_s=60)
    async with registry(tmp_path, store) as (scripted, client):
        redirect = await client.get(BLOB, headers={"Range": "bytes=5-9"})
        assert redirect.status_code == 307
        url = redirect.headers["location"]
        assert url.startswith(f"http://{store.host}/")
        assert store.host != scripted.host
        got = await client.get(url, headers={"Range": "bytes=5-9"})
        assert (got.status_code, got.content) == (206, DATA[5:10])
        assert (await client.head(url)).status_code == 403  # signed for GET
        assert (await client.get(url)).status_code == 200
        assert (await client.get(url)).status_code == 403  # used up
        assert store.leaks == []
        await client.get(url, headers={"Authorization": "Bearer secret"})
        assert [record.method for record in store.leaks] == ["GET"]
        url = (await client.get(BLOB)).headers["location"]
        mock_clock.jump(60)
        assert (await client.get(url)).status_code == 403  # too late
        store.expired = expired_xml()
        url = (await client.get(BLOB)).headers["location"]
        store.expire()
        assert (await client.get(url)).status_code == 400
        assert (await client.get("/v2/app/blobs/" + str(Digest.of(b"no")))).status_code == 404  # no redirect
