"""The page to play with: its server beside sample.py, what it refuses, and the page itself in a browser."""

import base64
import contextlib
import http.client
import importlib.util
import json
import shutil
import socket
import threading
import time

import numpy as np
import pytest
import soundfile
from conftest import finish, start

import sample
from codec import decode_stream
from generate import stream
from tools import play

pytestmark = pytest.mark.skipif(play.uvicorn is None, reason="needs starlette and uvicorn")
ASKED = {"caption": "slow bells", "seed": 3, "duration": 1.4, "cfg": 2, "temperature": 0.8}
RATE = 16_000


class Server:
    """The page's server over a folder of checkpoints, in a thread of this process."""

    def __init__(self, checkpoint):
        self.studio = play.Studio(sample.parse_arguments([str(checkpoint), "--device", "cpu"]))
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        config = play.uvicorn.Config(play.make_app(self.studio), log_config=None, timeout_graceful_shutdown=1)
        self.server = play.uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs=dict(sockets=[listening]))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def open(self, method, path, body=None, kind="application/json"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body, {"Content-Type": kind})
        return connection.getresponse()

    def ask(self, asked, **how):
        """-> (status, events), or (status, the line that refuses)."""
        body = asked if isinstance(asked, (str, bytes)) else json.dumps(asked)
        answer = self.open("POST", "/generate", body, **how)
        text = answer.read().decode()
        return answer.status, [json.loads(line) for line in text.splitlines()] if answer.status == 200 else text

    def refusal(self, asked, expected=400, **how):
        status, text = self.ask(asked, **how)
        assert status == expected and len(text.splitlines()) == 1 and "Traceback" not in text, (status, text)
        return text

    def idle(self):
        """Waits until no request is left."""
        for _ in range(3000):
            if not self.studio.requests and not self.studio.turn.locked():
                return True
            time.sleep(0.02)
        return False


@pytest.fixture(scope="module")
def folder(toy_run, tmp_path_factory):
    """A toy run's best.pt and last.pt; one folder up there is another."""
    folder = tmp_path_factory.mktemp("play") / "run"
    folder.mkdir()
    for name in ("best.pt", "last.pt"):
        shutil.copy(toy_run[0] / name, folder)
    shutil.copy(folder / "best.pt", folder.parent / "outside.pt")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder / "best.pt")
    yield server
    server.stop()


def samples(events):
    parts = [base64.b64decode(event["pcm"]) for event in events if "pcm" in event]
    return np.frombuffer(b"".join(parts), "<i2")


def upload(wav, rate=RATE, name="a tune.wav"):
    with contextlib.closing(play.io.BytesIO()) as file:
        soundfile.write(file, wav, rate, format="WAV")
        return dict(name=name, content=base64.b64encode(file.getvalue()).decode())


def tone(seconds, hertz=440):
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)


def test_the_samples_are_those_of_generate_and_sample(server, folder, command, tmp_path):
    status, events = server.ask({**ASKED, "checkpoint": "best.pt", "caption": "slow bells with a kazoo"})
    about = events[0]["start"]
    assert status == 200 and len(events) > 2 and all("pcm" in event for event in events[1:])
    assert {key: about[key] for key in ("seed", "cfg", "temperature")} == {"seed": 3, "cfg": 2, "temperature": 0.8}
    assert about["checkpoint"] == "best.pt" and about["samples"] == round(1.4 * RATE) == len(samples(events))
    assert about["sample_rate"] == RATE and about["channels"] == 1 and about["file"] == "slow_bells_with_a_kazoo_3"
    assert "in no caption that the model was trained with: kazoo" in about["said"]
    assert "1.4 s is past the 1 s of training" in about["said"][0]
    model, s, codec = server.studio.model, server.studio.s, server.studio.codec
    options = dict(cfg=2.0, temperature=0.8, top_k=s.top_k, top_p=s.top_p)
    codes = stream(model, [{"text": "slow bells with a kazoo"}], 70, seeds=[3], **options)
    wav = np.concatenate([sample.to_pcm(part[0]) for part in decode_stream(codec, codes)])[:, 0]
    np.testing.assert_array_equal(samples(events), wav)
    args = ("--duration", 1.4, "--seed", 3, "--cfg", 2, "--temperature", 0.8, "--loudness", "none")
    status, output = command(sample, folder / "best.pt", "slow bells with a kazoo", *args, "--out", tmp_path)
    assert status == 0, output
    written = soundfile.read(tmp_path / "slow_bells_with_a_kazoo_3.wav", dtype="int16")[0]
    np.testing.assert_allclose(samples(events), written, atol=1)


def test_a_beginning_is_continued(server, folder, command, tmp_path):
    soundfile.write(tmp_path / "beginning.wav", tone(0.3), RATE)
    content = base64.b64encode((tmp_path / "beginning.wav").read_bytes()).decode()
    status, events = server.ask({**ASKED, "duration": 0.9, "continue": dict(name="beginning.wav", content=content)})
    args = ("--duration", 0.9, "--seed", 3, "--cfg", 2, "--temperature", 0.8, "--loudness", "none", "--out", tmp_path)
    assert command(sample, folder / "best.pt", "slow bells", "--continue", tmp_path / "beginning.wav", *args)[0] == 0
    written = soundfile.read(tmp_path / "slow_bells_3.wav", dtype="int16")[0]
    assert events[0]["start"]["audio"] == ["continue beginning.wav"]
    np.testing.assert_allclose(samples(events), written, atol=1)


def test_other_checkpoints_of_the_folder_can_be_chosen(server):
    about = json.loads(server.open("GET", "/about").read())
    assert about["checkpoints"] == ["best.pt", "last.pt"] and about["checkpoint"] == "best.pt"
    assert about["conditions"] == [] and about["cfg"] == 3 and about["sample_rate"] == RATE
    first = server.studio.model
    assert json.loads(server.open("GET", "/about?checkpoint=last.pt").read())["checkpoint"] == "last.pt"
    assert server.ask({**ASKED, "checkpoint": "last.pt"})[1][0]["start"]["checkpoint"] == "last.pt"
    assert server.studio.model is not first
    assert server.ask(ASKED)[1][0]["start"]["checkpoint"] == "best.pt"


def test_what_will_not_do_gets_one_line(server):
    for name in ("none.pt", "../outside.pt", "../run/best.pt", "/etc/passwd", "best.pt\0", ["best.pt"], "x" * 9999):
        said = server.refusal({**ASKED, "checkpoint": name})
        assert "there is best.pt, last.pt" in said and len(said) < 300
    assert "there is best.pt, last.pt" in server.open("GET", "/about?checkpoint=../outside.pt").read().decode()
    for duration, said in ((0, "above 0 seconds"), (-1, "above 0 seconds"), (121, "at most 120 s here"),
                           (float("nan"), "above 0 seconds"), (float("inf"), "above 0 seconds")):  # fmt: skip
        assert said in server.refusal({**ASKED, "duration": duration})
    assert "cfg nan: must be a number" in server.refusal({**ASKED, "cfg": float("nan")})
    assert "temperature must be 0 or above" in server.refusal({**ASKED, "temperature": -1})
    for seed in ("x", [], -1, 2**62, float("inf")):
        assert server.refusal({**ASKED, "seed": seed}).startswith("seed ")
    assert "longer than 1,000 letters" in server.refusal({**ASKED, "caption": "bell " * 300})
    for text in ("", "{", "[1]", "[" * 100_000, b"\xff"):
        assert "must be a JSON object" in server.refusal(text)
    assert "must be of type application/json" in server.refusal("{}", kind="text/plain"), "as other sites may send"
    assert "application/json" not in server.refusal("{", kind="Application/JSON; charset=utf-8")
    for caption in ("", "\ud800 \0 \n", None, 5):
        assert server.ask({"caption": caption, "duration": 0.3})[0] == 200
    assert server.idle()


def test_audio_that_will_not_do_gets_one_line(server):
    good, text = upload(tone(1)), base64.b64encode(b"not audio").decode()
    said = server.refusal({**ASKED, "continue": dict(name="../../a/text.wav", content=text)})
    assert said.endswith("a_text.wav: cannot be read as audio (Format not recognised.)") and "/" not in said
    for name in ("", ".", "..", "/", "\0", "ü" * 300, "a\nb"):
        assert "cannot be read as audio" in server.refusal({**ASKED, "continue": dict(name=name, content=text)})
    for broken in ("x", 5, [1], dict(name="a.wav"), dict(name=5, content=text), dict(name="a.wav", content=5)):
        assert server.refusal({**ASKED, "continue": broken}) == "continue: needs a name, and content in base64"
    long = server.refusal({**ASKED, "duration": 1, "continue": good})
    assert long == "continue a_tune.wav: 1.0 s long, and duration is 1 s in all; make duration longer"
    for key in ("melody", "style"):
        assert "was not trained with it; its conditions are text" in server.refusal({**ASKED, key: good})
    hours = upload(np.zeros(20_000), rate=20)
    assert "longer than 10 minutes; cut it" in server.refusal({**ASKED, "continue": hours})
    large = dict(name="a.wav", content="A" * (play.UPLOAD_MB * 4_000_000 // 3 + 20_000))
    assert "is larger than 20 MB" in server.refusal({**ASKED, "continue": large}, expected=413)


def test_two_requests_are_served_in_turn(server):
    long, short = {**ASKED, "duration": 3}, {**ASKED, "duration": 0.5}
    alone = samples(server.ask(long)[1]), samples(server.ask(short)[1])
    answer = server.open("POST", "/generate", json.dumps(long))
    first = [json.loads(answer.readline())]  # it has begun
    found = []
    second = threading.Thread(target=lambda: found.append(server.ask(short)))
    second.start()
    first += [json.loads(line) for line in answer]
    second.join(60)
    (status, events), *_ = found
    assert status == 200 and events[0] == {"wait": 1} and "start" in events[1]
    np.testing.assert_array_equal(samples(first), alone[0])
    np.testing.assert_array_equal(samples(events), alone[1])


def test_an_error_after_waiting_is_an_event(server):
    answer = server.open("POST", "/generate", json.dumps({**ASKED, "duration": 3}))
    answer.readline()
    status, events = server.ask({**ASKED, "melody": upload(tone(1))})
    assert status == 200 and events[0] == {"wait": 1} and "was not trained with it" in events[1]["error"]
    answer.read()


def test_a_client_that_goes_away_ends_its_take(server, caplog, monkeypatch):
    made = []
    monkeypatch.setattr(play, "decode_stream", lambda *args: (made.append(wav) or wav for wav in decode_stream(*args)))
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        head = "POST /generate HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 9\n\n{"
        half.sendall(head.replace("\n", "\r\n").encode())
    for asked in range(3):  # the first is served, the others wait
        answer = server.open("POST", "/generate", json.dumps({**ASKED, "duration": 120, "seed": asked}))
        answer.readline()
        answer.close()
    assert server.idle() and len(made) < 240, "half a second each: a whole take would be 240"
    assert server.ask(ASKED)[0] == 200 and not caplog.records, "and no traceback is logged"


def test_a_melody_and_a_style_where_the_model_has_them(of_all_conditions, request):
    conditions = Server(of_all_conditions)
    request.addfinalizer(conditions.stop)
    assert json.loads(conditions.open("GET", "/about").read())["conditions"] == ["melody", "style"]
    asked = {**ASKED, "melody": upload(tone(2)), "style": upload(tone(1, 880), name="style.wav")}
    status, events = conditions.ask(asked)
    assert status == 200 and events[0]["start"]["audio"] == ["melody a tune.wav", "style style.wav"]
    assert "melody a_tune.wav: cut to 1.4 s" in events[0]["start"]["said"]
    assert len(samples(events)) == round(1.4 * RATE)
    assert "melody a_tune.wav: is silent" in conditions.refusal({**ASKED, "melody": upload(tone(1) * 1e-5)})


def test_without_the_packages_it_says_what_to_install(toy_run):
    program = (
        "import runpy, sys; sys.modules['starlette.applications'] = None; sys.argv = ['play.py', sys.argv[1]];"
        " runpy.run_module('tools.play', run_name='__main__', alter_sys=True)"
    )
    said = finish(start("-c", program, toy_run[0] / "best.pt"), status=2)
    assert said == "play.py: error: needs starlette and uvicorn; install them with: pip install starlette uvicorn\n"


def test_a_port_in_use_or_a_missing_checkpoint_gets_one_line(server, folder, command):
    status, said = command(play, folder / "best.pt", "--port", server.port)
    assert status == 2 and "Address already in use" in said and "choose another" in said and said.count("\n") == 1
    assert "no such checkpoint" in command(play, folder / "none.pt")[1]


def test_the_page_needs_nothing_from_elsewhere(server):
    page = server.open("GET", "/").read().decode()
    assert "<title>nanoMusicGen" in page and "://" not in page and "src=" not in page and "@import" not in page


@pytest.fixture(scope="module")
def browser():
    if not importlib.util.find_spec("playwright"):
        pytest.skip("needs playwright")
    from playwright.sync_api import Error, sync_playwright

    ours = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=ours, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"needs chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser(browser, server, tmp_path, width):
    page = browser.new_page(viewport=dict(width=width, height=800))
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    here = f"http://127.0.0.1:{server.port}/"
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(here)
    page.wait_for_selector("#make:enabled")
    assert page.get_by_label("A melody to follow").is_hidden()
    for number, caption in enumerate(("slow <b>bells</b>", "a kazoo"), 1):
        page.get_by_label("Caption").fill(caption)
        page.get_by_label("Duration").fill("1.4")
        page.get_by_role("button", name="Make music").click()
        page.wait_for_selector(f"article:nth-last-child({number}) audio")
        take = page.locator("article").first
        assert take.get_attribute("data-samples") == str(round(1.4 * RATE))
        assert caption in take.inner_text() and f"seed {number - 1} · 1.4 s · cfg 3" in take.inner_text()
    assert "in no caption that the model was trained with: kazoo" in take.inner_text()
    assert page.locator("article").count() == 2 and page.locator("b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    drawn = page.evaluate("[...document.querySelectorAll('canvas')].map(c => new Set(c.getContext('2d')"
                          ".getImageData(c.width - 2, 0, 2, c.height).data).size)")  # fmt: skip
    assert min(drawn) > 10, "the last columns have many colours"
    with page.expect_download() as saved:
        take.get_by_role("link").click()
    saved.value.save_as(tmp_path / "take.wav")
    assert saved.value.suggested_filename == "a_kazoo_1.wav"
    wav, rate = soundfile.read(tmp_path / "take.wav", dtype="int16")
    asked = {"caption": "a kazoo", "seed": 1, "duration": 1.4}
    assert rate == RATE and np.array_equal(wav, samples(server.ask(asked)[1]))
    page.locator("audio").last.evaluate("audio => audio.play()")
    page.wait_for_function("document.querySelectorAll('audio')[1].currentTime > 0.05")
    assert not wrong and all(url.startswith((here, "blob:", "data:")) for url in requests)
    page.evaluate("document.querySelector('form').noValidate = true")
    page.get_by_label("Duration").fill("500")
    page.get_by_role("button", name="Make music").click()
    page.wait_for_selector("text=at most 120 s here")
    assert page.locator("article").count() == 2 and page.locator("#make:enabled").count() == 1
    page.close()


@pytest.fixture
def open_page(browser, server):
    """Opens the page, ready: -> its tab."""
    pages = []

    def open_one(server=server):
        page = browser.new_page()
        pages.append(page)
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("#make:enabled")
        return page

    yield open_one
    for page in pages:
        page.close()


def make(page, seconds):
    page.get_by_label("Duration").fill(str(seconds))
    page.get_by_role("button", name="Make music").click()


def test_stop_in_a_browser_ends_the_take_and_keeps_what_there_is(open_page, server):
    page = open_page()
    make(page, 120)
    page.wait_for_selector("article[data-samples]")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("article audio")
    assert page.inner_text("#status") == "stopped" and server.idle()
    assert 0 < int(page.locator("article").get_attribute("data-samples")) < 120 * RATE


def test_a_second_browser_is_told_that_it_waits_and_is_served(open_page):
    first, second = open_page(), open_page()
    make(first, 120)
    first.wait_for_selector("article[data-samples]")
    make(second, 1)
    second.wait_for_selector("text=waiting for 1 other")
    first.close()
    second.wait_for_selector("article audio")
    assert "1.0 s made at" in second.inner_text("#status")


def test_an_earlier_take_may_be_heard_while_another_is_made(open_page):
    page = open_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    make(page, 1)
    page.wait_for_selector("article audio")
    make(page, 6)
    page.wait_for_selector("article[data-samples] >> nth=1")
    page.locator("audio").last.evaluate("audio => audio.play()")
    page.wait_for_function("document.querySelectorAll('audio').length === 2")
    assert page.locator("article").first.get_attribute("data-samples") == str(6 * RATE) and not wrong
    assert page.inner_text("#error") == ""


def test_audio_is_chosen_in_the_page_and_what_is_refused_is_said_there(open_page, of_all_conditions, request, tmp_path):
    conditions = Server(of_all_conditions)
    request.addfinalizer(conditions.stop)
    page = open_page(conditions)
    for label in ("A melody to follow", "A style to take after"):
        assert page.get_by_label(label).is_visible()
    tune = base64.b64decode(upload(tone(2))["content"])
    for content, said in ((bytes(21_000_000), "larger than 20 MB"), (b"text", "tune.wav: cannot be read"), (tune, "")):
        (tmp_path / "tune.wav").write_bytes(content)
        page.get_by_label("A melody to follow").set_input_files(tmp_path / "tune.wav")
        make(page, 1)
        page.wait_for_selector(f"#error:has-text('{said}')" if said else "article audio")
    assert "melody tune.wav" in page.inner_text("article") and page.inner_text("#error") == ""
    page.get_by_role("button", name="Without this audio").click()
    make(page, 1)
    page.wait_for_selector("article:nth-child(2)")
    assert "tune.wav" not in page.locator("article").first.inner_text()
