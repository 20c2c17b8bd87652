"""What is refused before it is read."""

import asyncio

import pytest

from spa3r_hf.upload_guard import UploadGuard


def answer(guard: UploadGuard, **request) -> tuple[int, str]:
    """Status and text that a request gets."""
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": [], **request}
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        raise AssertionError("a refused request was read")

    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"let through"})


@pytest.fixture
def guard(tmp_path):
    return UploadGuard(app, tmp_path, max_upload_bytes=5_000_000, max_stored_bytes=1000, max_other_bytes=100_000)


def sized(size) -> list[tuple[bytes, bytes]]:
    return [(b"content-length", str(size).encode())]


@pytest.mark.parametrize(
    "request_",
    [
        {"headers": sized(5_000_000)},
        {"path": "/gradio_api/queue/join", "headers": sized(100_000)},
        {"method": "GET"},
        {"method": "HEAD", "path": "/"},
        {"type": "lifespan"},
    ],
)
def test_what_is_within_the_bounds_goes_through(guard, request_):
    assert answer(guard, **request_) == (200, "let through")


@pytest.mark.parametrize(("request_", "status", "message"), [
    ({"headers": sized(5_100_000)}, 413, "5.1 MB at once; expected at most 5 MB"),
    ({"path": "/gradio_api/upload/", "headers": sized(10**12)}, 413, "1000000.0 MB"),
    ({"path": "/gradio_api/queue/join", "headers": sized(200_000)}, 413, "0.2 MB at once; expected at most 0.1 MB"),
    ({}, 411, "does not say its size"),
    ({"headers": sized("-5")}, 411, "does not say its size"),
    ({"headers": [(b"transfer-encoding", b"chunked")]}, 411, "does not say its size"),
    ({"method": "PUT", "headers": sized(200_000), "path": "/"}, 413, "0.2 MB"),
])  # fmt: skip
def test_what_is_beyond_them_is_not_read(guard, request_, status, message):
    found, text = answer(guard, **request_)
    assert found == status and message in text


def test_a_full_disk_takes_no_more_files(guard, tmp_path):
    (tmp_path / "someone" / "else").mkdir(parents=True)
    for number, size in enumerate((600, 400)):
        (tmp_path / "someone" / "else" / f"{number}.jpg").write_bytes(bytes(size))
    assert answer(guard, headers=sized(10))[0] == 200
    (tmp_path / "one more").write_bytes(b"1")
    assert answer(guard, headers=sized(10)) == (507, "No more files can be stored now; try again in some minutes.")
    assert answer(guard, headers=sized(10), path="/gradio_api/queue/join")[0] == 200  # questions are answered
