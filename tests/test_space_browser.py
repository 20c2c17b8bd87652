"""The Space in a real, headless Chromium, as visitors have it; and over HTTP, as others may."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image


pytest.importorskip("gradio", reason='the Space needs pip install "spa3r_hf[space]"')
playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser is driven by playwright: pip install it"
)
from space_scenes import SPACE, SVG, photographs, scenes  # noqa: E402


CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SOFTWARE_3D = ["--enable-unsafe-swiftshader"]
PATIENCE = 120_000  # milliseconds, on a machine that has other things to do
MOST_MEMORY = 3e9  # bytes, as the card says
expect = playwright_api.expect
expect.set_options(timeout=PATIENCE)


class Server:
    """The Space as it is out of the box, on CPU with the nano models, in a process of its own."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.files = folder / "gradio"
        self.log = folder / "log.txt"
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SPA3R_")},
            "SPA3R_DEVICE": "cpu",
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_TEMP_DIR": str(self.files),
            "GRADIO_IS_E2E_TEST": "1",  # sessions end a second after their page was closed, not an hour
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(SPACE.parents[1]), os.environ.get("PYTHONPATH", "")]),
        }
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([sys.executable, "app.py"], cwd=SPACE, env=env, stdout=log, stderr=log)

    def wait(self) -> None:
        for _ in range(3000):
            assert self.process.poll() is None, self.log.read_text()
            try:
                urllib.request.urlopen(self.url, timeout=10).read()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise AssertionError(f"the Space does not answer: {self.log.read_text()}")

    def memory(self, key: str) -> int:
        """Bytes: VmRSS now, VmHWM at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(rf"{key}:\s*(\d+) kB", status)[1])

    def sessions(self) -> set[str]:
        return {path.name for path in self.files.glob("scene_*")}

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, str]:
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("space"))
    try:
        server.wait()
        yield server
    finally:
        server.process.send_signal(signal.SIGINT)
        try:
            server.process.wait(30)
        except subprocess.TimeoutExpired:
            server.process.kill()


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS + SOFTWARE_3D)
        yield browser
        browser.close()


class Visitor:
    """A browser with a page of the Space, which shows the first example."""

    def __init__(self, browser, url: str):
        self.context = browser.new_context(viewport={"width": 1400, "height": 900})
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.elsewhere: list[str] = []
        self.page.on("request", self._note)
        self.page.goto(url)
        expect(self.page.locator("#predicted img")).to_be_visible()
        expect(self.page.locator("#found")).to_contain_text("Cosine similarity")

    def _note(self, request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.elsewhere.append(request.url)

    def picture(self, part: str) -> str:
        return self.page.locator(f"#{part} img").get_attribute("src")

    def pictures(self, part: str) -> list[str]:
        return [image.get_attribute("src") for image in self.page.locator(f"#{part} img").all()]

    def set_slider(self, name: str, value: float) -> None:
        number = self.page.locator(f"#{name} input[type=number]")
        number.fill(str(value))
        number.press("Enter")

    def upload(self, *paths: Path) -> None:
        self.page.locator("#upload input[type=file], input[type=file]").first.set_input_files(list(paths))

    def expect_error(self, message: str) -> None:
        expect(self.page.locator(".toast-body").filter(has_text=message).first).to_be_visible()


@pytest.fixture
def visitor(server, browser):
    visitor = Visitor(browser, server.url)
    yield visitor
    visitor.context.close()
    assert visitor.elsewhere == []  # nothing is loaded from, or sent to, elsewhere


@needs_chromium
def test_the_first_screen_shows_an_example_and_the_camera_moves(visitor):
    page = visitor.page
    expect(page.locator("#views img")).to_have_count(12)
    expect(page.locator("#maps img")).to_have_count(4)
    expect(page.locator("#status")).to_contain_text("Bedroom, 12 views. The 4 framed ones are context")
    expect(page.locator("#name")).to_have_text("View 3")
    expect(page.locator("#orbit img")).to_be_visible()  # drawn unasked
    before = {part: visitor.picture(part) for part in ("seen", "predicted", "true")}
    assert len(set(before.values())) == 3

    visitor.set_slider("yaw", -20)
    expect(page.locator("#name")).to_have_text("The point cloud from there")
    expect(page.locator("#place input")).to_have_value("the sliders")
    expect(page.locator("#true img")).to_have_count(0)
    moved = {part: visitor.picture(part) for part in ("seen", "predicted")}
    assert all(moved[part] != before[part] for part in moved)
    visitor.set_slider("forward", 0.3)
    expect(page.locator("#predicted img")).not_to_have_attribute("src", moved["predicted"])

    page.locator("#place input").click()
    page.get_by_role("option", name="view 6 (held out)").click()
    expect(page.locator("#name")).to_have_text("View 6")
    expect(page.locator("#true img")).to_be_visible()
    assert page.locator("#forward input[type=number]").input_value() != "0.3"  # the sliders follow
    shown = visitor.picture("predicted")
    page.locator("#kind").get_by_text("Semantics").click()
    expect(page.locator("#predicted img")).not_to_have_attribute("src", shown)
    expect(page.locator("#name")).to_have_text("View 6")

    orbit = visitor.picture("orbit")
    page.locator("#circle").click()
    expect(page.locator("#orbit img")).not_to_have_attribute("src", orbit)
    assert visitor.picture("orbit").endswith(".gif")


@needs_chromium
def test_views_are_clicked_to_be_context(visitor):
    page = visitor.page
    expect(page.locator("#orbit img")).to_be_visible()
    thumbnails, predicted = visitor.pictures("views"), visitor.picture("predicted")
    page.locator("#views button").nth(2).click()
    expect(page.locator("#status")).to_contain_text("The 5 framed ones")
    expect(page.locator("#maps img")).to_have_count(5)
    expect(page.locator("#predicted img")).not_to_have_attribute("src", predicted)
    now = visitor.pictures("views")
    assert [view for view in range(12) if thumbnails[view] != now[view]] == [2]
    page.locator("#views button").nth(2).click()  # and back, the same one again
    expect(page.locator("#status")).to_contain_text("The 4 framed ones")
    page.locator("#views button").nth(0).click()
    visitor.expect_error("The first view is always context")
    expect(page.locator("#status")).to_contain_text("The 4 framed ones")


@needs_chromium
def test_another_example_its_points_and_its_answers(visitor):
    page = visitor.page
    expect(page.locator("#orbit img")).to_be_visible()
    before = visitor.pictures("views")
    page.locator("#examples button").nth(2).click()
    expect(page.locator("#status")).to_contain_text("Kitchen")
    expect(page.locator("#views img").first).not_to_have_attribute("src", before[0])
    assert not set(visitor.pictures("views")) & set(before)

    with page.expect_response(lambda answer: answer.url.endswith(".glb")) as got:
        page.get_by_role("tab", name="Walk around").click()
    assert got.value.ok and got.value.body()[:4] == b"glTF"
    expect(page.locator("#cloud canvas")).to_be_visible()
    with page.expect_response(lambda answer: answer.url.endswith(".glb")) as other:
        page.locator("#colours").get_by_text("Geometry").click()
    assert other.value.url != got.value.url

    page.get_by_role("tab", name="3. Ask").click()
    kitchen = scenes.list_examples()[2]["questions"]
    rows = page.locator("#questions tbody tr")
    expect(rows).to_have_count(10)
    rows.nth(7).click()
    expect(page.locator("#question textarea")).to_have_value(kitchen[7]["text"])
    expect(page.locator("#truth textarea")).to_have_value(kitchen[7]["answer"])
    page.locator("#ask").click()
    for part in ("without", "with"):
        expect(page.locator(f"#{part} textarea")).to_have_value(re.compile(r"\S"))
    page.locator("#question textarea").fill("Is there a table?")
    page.locator("#ask").click()
    expect(page.locator("#truth textarea")).to_have_value("not known")
    page.locator("#question textarea").fill("  ")
    page.locator("#ask").click()
    visitor.expect_error("the prompt is empty; expected a question")
    # No more than is allowed can be typed.
    page.locator("#question textarea").fill("x" * 100_000)
    assert len(page.locator("#question textarea").input_value()) == scenes.LIMITS.max_prompt_characters


@needs_chromium
def test_bad_uploads_show_an_error_and_the_app_lives_on(visitor, tmp_path):
    page, good = visitor.page, photographs(tmp_path, 4)
    expect(page.locator("#orbit img")).to_be_visible()
    torn, drawing = tmp_path / "torn.jpg", tmp_path / "drawing.jpg"
    torn.write_bytes(good[0].read_bytes()[:-300])
    drawing.write_bytes(SVG)
    for path, message in ((torn, "'torn.jpg' is damaged"), (drawing, "'drawing.jpg' is no picture; expected JPEG")):
        visitor.upload(path)
        visitor.expect_error(message)
        expect(page.locator("#status")).to_contain_text("Bedroom")
    visitor.upload(*photographs(tmp_path / "many", 17))
    visitor.expect_error("17 files; expected at most 16 photographs")

    # As large as is allowed, for the memory that is measured at the end.
    large = [tmp_path / f"large_{number}.png" for number in range(2)]
    for path in large:
        Image.new("RGB", (6000, 4100), (90, 120, 150)).save(path)
    visitor.upload(*large)
    expect(page.locator("#status")).to_contain_text("Your photographs, 2 views")

    predicted = visitor.picture("predicted")
    visitor.upload(*good)
    expect(page.locator("#status")).to_contain_text("Your photographs, 4 views. The 3 framed ones")
    expect(page.locator("#predicted img")).not_to_have_attribute("src", predicted)
    expect(page.locator("#views img")).to_have_count(4)
    page.get_by_role("tab", name="3. Ask").click()
    expect(page.locator("#questions tbody tr")).to_have_count(10)
    page.locator("#questions tbody tr").first.click()
    expect(page.locator("#truth textarea")).to_have_value("not known")


@needs_chromium
def test_two_visitors_do_not_see_each_others_scenes_and_leave_nothing(server, browser, tmp_path):
    assert_gone(server)
    one, other = Visitor(browser, server.url), Visitor(browser, server.url)
    for visitor in (one, other):
        expect(visitor.page.locator("#orbit img")).to_be_visible()
    assert len(server.sessions()) == 2
    assert visitor.picture("orbit") != one.picture("orbit")
    one.upload(*photographs(tmp_path / "one", 3, seed=1))
    other.page.locator("#examples button").nth(1).click()
    expect(one.page.locator("#status")).to_contain_text("Your photographs, 3 views")
    expect(other.page.locator("#status")).to_contain_text("Living room, 12 views")
    one.page.locator("#views button").nth(2).click()
    expect(one.page.locator("#status")).to_contain_text("The 3 framed ones")
    expect(other.page.locator("#status")).to_contain_text("The 4 framed ones")
    assert not set(one.pictures("views")) & set(other.pictures("views"))
    other.set_slider("yaw", 30)
    expect(other.page.locator("#place input")).to_have_value("the sliders")
    expect(one.page.locator("#place input")).not_to_have_value("the sliders")
    for visitor in (one, other):
        expect(visitor.page.locator("#orbit img")).to_be_visible()
    folders = [re.search(r"scene_\w+", visitor.picture("orbit"))[0] for visitor in (one, other)]
    assert len(set(folders)) == 2
    one.context.close()
    assert_gone(server, folders[0])
    assert folders[1] in server.sessions()  # the other one's stays
    expect(other.page.locator("#status")).to_contain_text("Living room")
    other.context.close()
    assert_gone(server)


def assert_gone(server: Server, *folders: str) -> None:
    """These folders of sessions, or all, go within a minute."""
    for _ in range(600):
        left = server.sessions() & set(folders) if folders else server.sessions()
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"{left} are left of sessions that were closed")


# --- without a browser


def form(names: list[str], content: bytes) -> tuple[bytes, dict[str, str]]:
    """Files of one content as browsers send them."""
    parts = [
        f'--frontier\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode() + content
        for name in names
    ]
    return b"\r\n".join([*parts, b"--frontier--\r\n"]), {"Content-Type": "multipart/form-data; boundary=frontier"}


@pytest.mark.parametrize("name", ["../../../evil.jpg", "/etc/evil.jpg", "..\\..\\evil.jpg", "%2e%2e/evil.jpg"])
def test_names_lead_nowhere_else(server, name):
    body, headers = form([name], name.encode())
    status, text = server.post("/gradio_api/upload", body, **headers)
    assert status == 200
    (stored,) = json.loads(text)
    assert Path(stored).resolve().is_relative_to(server.files.resolve()) and Path(stored).read_bytes() == name.encode()
    for place in (server.files.parent / "evil.jpg", server.files.parents[1] / "evil.jpg", Path("/etc/evil.jpg")):
        assert not place.exists()


def test_ten_thousand_files_at_once_are_refused(server):
    before = set(server.files.rglob("*.jpg"))
    body, headers = form([f"{number}.jpg" for number in range(10_000)], b"x")
    try:
        status, text = server.post("/gradio_api/upload", body, **headers)
        assert status == 400 and "Too many files" in text
    except (urllib.error.URLError, ConnectionError):  # it did not listen to the end
        pass
    assert set(server.files.rglob("*.jpg")) == before  # what had come is gone
    assert urllib.request.urlopen(server.url, timeout=60).status == 200


@pytest.mark.parametrize(
    ("path", "size", "most"), [("upload", 5_000_000_000, "200 MB"), ("queue/join", 1_200_000, "1 MB")]
)
def test_too_much_is_refused_before_it_is_read(server, path, size, most):
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(f"POST /gradio_api/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
        answer = b""
        while b"MB." not in answer and (more := connection.recv(1000)):
            answer += more
    assert b" 413 " in answer and f"expected at most {most}".encode() in answer


def test_files_of_the_machine_are_not_given_away(server):
    for path in ("/etc/passwd", str(SPACE / "app.py"), str(server.files.parent / "log.txt"), "../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}/gradio_api/file={path}", timeout=60)
        assert refused.value.code in (403, 404)


@needs_chromium
def test_after_all_this_memory_is_as_the_card_says(server):
    """The last one: of the process that served all of the above."""
    assert server.memory("VmRSS") <= server.memory("VmHWM") < MOST_MEMORY
    log = server.log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
    card = (SPACE / "README.md").read_text()
    assert f"stays below {MOST_MEMORY / 1e9:g} GB" in card
