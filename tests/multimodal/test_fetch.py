"""What may be fetched for a client: public addresses alone, also behind redirects and names; no bombs are decoded."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vision_support import picture, png

from phloem.core.errors import BadRequest
from phloem.multimodal import _fetch
from phloem.multimodal._fetch import Rules, fetch, routable
from phloem.multimodal._pixels import MOST_PIXELS, decode, resized

PNG = png(picture(3, 8, 8))


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/")
            if name.startswith("to/"):
                self.send_response(302)
                self.send_header("Location", name.removeprefix("to/"))
                self.end_headers()
            elif name == "a.png":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(PNG)
            else:
                self.send_response(404)
                self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


HERE = Rules(urls=True, routable=lambda address: address == "127.0.0.1")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.3.4", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
        "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
        "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1", "255.255.255.255", "no address",
    ],
)  # fmt: skip
def test_inner_addresses_are_not_dialled(address: str) -> None:
    assert not routable(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are(address: str) -> None:
    assert routable(address)


def test_nothing_is_fetched_unasked(site: str) -> None:
    with pytest.raises(BadRequest, match="enable-mm-urls"):
        fetch(f"{site}/a.png", "x", Rules())


def test_an_address_inside_is_refused_before_anything_is_sent(site: str) -> None:
    with pytest.raises(BadRequest, match="not fetched") as found:
        fetch(f"{site}/a.png", "x", Rules(urls=True))
    assert found.value.code == "refused_address"


def test_a_picture_comes_also_behind_redirects(site: str) -> None:
    assert fetch(f"{site}/a.png", "x", HERE) == PNG
    assert fetch(f"{site}/to//a.png", "x", HERE) == PNG
    assert fetch(f"{site}/to/to/to/a.png".replace("to/to/to/", "to//to//to//"), "x", HERE) == PNG


def test_redirects_keep_to_the_rules(site: str) -> None:
    with pytest.raises(BadRequest, match="not fetched"):
        fetch(f"{site}/to/http://169.254.169.254/latest/meta-data", "x", HERE)
    with pytest.raises(BadRequest, match="no address"):
        fetch(f"{site}/to/file:///etc/passwd", "x", HERE)
    with pytest.raises(BadRequest, match="redirects"):
        fetch(f"{site}/to//to//to//to//a.png", "x", HERE)


def test_a_name_with_any_inner_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is looked up once: the address that was judged is the one that is dialled."""
    looked: list[str] = []
    dialled: list[Any] = []

    def look(host: str, port: int, **_: Any) -> list[Any]:
        looked.append(host)
        inner = "10.0.0.1" if host == "two.example" else "8.8.8.8"
        return [(socket.AF_INET, 1, 6, "", ("8.8.8.8", port)), (socket.AF_INET, 1, 6, "", (inner, port))]

    def dial(address: Any, *_: Any) -> Any:
        dialled.append(address)
        raise OSError

    monkeypatch.setattr(_fetch.socket, "getaddrinfo", look)
    monkeypatch.setattr(_fetch.socket, "create_connection", dial)
    with pytest.raises(BadRequest, match="that address is not fetched"):
        fetch("http://two.example/a", "x", Rules(urls=True))
    assert dialled == []
    with pytest.raises(BadRequest, match="gave nothing"):
        fetch("http://one.example/a", "x", Rules(urls=True))
    assert dialled == [("8.8.8.8", 80)]
    assert looked == ["two.example", "one.example"]


@pytest.mark.parametrize("url", ["http://", "http://user:word@8.8.8.8/", "http://[::1", "http://8.8.8.8:99999/"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(BadRequest):
        fetch(url, "x", Rules(urls=True))


def test_a_missing_picture_says_so(site: str) -> None:
    with pytest.raises(BadRequest, match="answered 404"):
        fetch(f"{site}/none.png", "x", HERE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Image size")
def test_a_bomb_is_refused_by_its_header() -> None:
    """A PNG of a hundred million pixels: nothing of it is decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    with pytest.raises(BadRequest, match="pixels are more") as found:
        decode(bomb, "images[0]")
    assert (found.value.code, found.value.param) == ("too_large", "images[0]")


@pytest.fixture
def raw() -> Iterator[Any]:
    """A server that sends what it is given, piece by piece, to whoever asks."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:

        def serve(pieces: Iterable[bytes]) -> str:
            def run() -> None:
                with contextlib.suppress(OSError), listening.accept()[0] as connection:
                    connection.recv(1 << 16)
                    for piece in pieces:
                        connection.sendall(piece)
                        time.sleep(0.05)

            pool.submit(run)
            return f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"

        yield serve


@pytest.mark.slow
@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 200 OK\r\n", *[b"X"] * 60],
        [b"HTTP/1.1 100 Continue\r\n\r\n"] * 60,
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"0"] * 60],
        [b"HTTP/1.1 200 OK\r\n\r\n", *[b"\x89"] * 60],
    ],
    ids=["headers", "statuses", "chunks", "body"],
)
def test_the_time_is_that_of_everything(raw: Any, pieces: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends a byte now and then is given up as one that sends none."""
    monkeypatch.setattr(_fetch, "WHOLE_SECONDS", 0.4)
    began = time.monotonic()
    with pytest.raises(BadRequest, match="too slow"):
        fetch(raw(pieces), "x", HERE)
    assert time.monotonic() - began < 2


def test_a_redirect_to_what_is_no_address_is_refused(raw: Any) -> None:
    with pytest.raises(BadRequest, match="to no address"):
        fetch(raw([b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n"]), "x", HERE)


def test_letters_that_addresses_lack_are_quoted(raw: Any) -> None:
    url = raw([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"])
    assert fetch(url.replace("a.png", "Zürich bei Nacht.png?größe=1%20a"), "x", HERE) == b"ok"


def test_base64_is_taken_with_line_breaks_and_where_it_looks_like_a_path() -> None:
    """Every JPEG begins with a slash."""
    buffer = io.BytesIO()
    picture(3, 8, 8).save(buffer, "JPEG")
    data = buffer.getvalue()
    assert fetch(base64.b64encode(data).decode(), "x", Rules()) == data
    assert fetch(base64.encodebytes(data).decode(), "x", Rules()) == data
    assert fetch(f"data:image/jpeg;base64,{base64.encodebytes(data).decode()}", "x", Rules()) == data


def test_files_are_named_as_addresses_name_them(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(PNG)
    assert fetch(f"file://{tmp_path}/a%20b.png", "x", Rules(root=tmp_path)) == PNG
    for name in ("~nobody-of-this-name/a.png", "file://~nobody-of-this-name/a.png", "./none.png", "./a\0b.png"):
        with pytest.raises(BadRequest, match="no such file"):
            fetch(name, "x", Rules(root=tmp_path))


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_a_narrow_picture_takes_no_gigabytes_on_its_way(size: tuple[int, int]) -> None:
    from PIL import Image

    narrow, asked = Image.new("RGB", size, (9, 8, 7)), []
    real = Image.Image.resize

    def resize(image: Any, to: tuple[int, int], *args: Any, **more: Any) -> Any:
        asked.append(max(to[0] * image.size[1], to[0] * to[1]))
        return real(image, to, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        assert resized(narrow, 896, 896, {}).getpixel((5, 5)) == (9, 8, 7)
    assert max(asked) <= MOST_PIXELS
    with pytest.raises(ValueError, match="would be read as"):
        resized(narrow, MOST_PIXELS + 1, 1, {})


def test_the_filter_that_settings_name_is_taken_also_if_its_number_is_nought() -> None:
    assert resized(picture(3, 8, 8), 4, 4, {"resample": 0}) == picture(3, 8, 8).resize((4, 4), 0)
