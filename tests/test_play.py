"""Test the page to play with: the server gives the music of sample.py, errors are one line, and a browser runs it."""

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
from conftest import finish, lines, load, start

import sample
from codec import decode_stream
from dataprep import shards
from demo import tiny
from generate import stream
from tools import play
from tools.output import to_pcm

pytestmark = pytest.mark.skipif(play.uvicorn is None, reason="needs starlette and uvicorn")
OPTIONS = {"caption": "slow bells", "seed": 3, "duration": 1.4, "cfg": 2, "temperature": 0.8}
RATE = 16_000


class Server:
    """Run the page's server for a folder of checkpoints in a thread of this process."""

    def __init__(self, checkpoint):
        self.engine = play.Engine(sample.parse_arguments([str(checkpoint), "--device", "cpu"]))
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        config = play.uvicorn.Config(play.make_app(self.engine), log_config=None, timeout_graceful_shutdown=1)
        self.server = play.uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs=dict(sockets=[listener]))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def open(self, method, path, body=None, media_type="application/json"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body, {"Content-Type": media_type})
        return connection.getresponse()

    def post(self, options, **kwargs):
        """Post a request and return (status, events), or (status, message)."""
        body = options if isinstance(options, (str, bytes)) else json.dumps(options)
        response = self.open("POST", "/generate", body, **kwargs)
        text = response.read().decode()
        return response.status, [json.loads(line) for line in text.splitlines()] if response.status == 200 else text

    def error(self, options, expected=400, **kwargs):
        """Post a request that must fail with one line, and return the line."""
        status, text = self.post(options, **kwargs)
        assert status == expected and len(text.splitlines()) == 1 and "Traceback" not in text, (status, text)
        return text

    def is_idle(self):
        """Wait up to 60 s until no request is left, and return whether that happened."""
        for _ in range(3000):
            if not self.engine.requests and not self.engine.turn.locked():
                return True
            time.sleep(0.02)
        return False


@pytest.fixture(scope="module")
def folder(toy_run, tmp_path_factory):
    """Return a folder with best.pt and last.pt of a toy run, and with another checkpoint outside it."""
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


def test_the_samples_equal_those_of_generate_and_sample(server, folder, command, tmp_path):
    status, events = server.post({**OPTIONS, "checkpoint": "best.pt", "caption": "slow bells with a kazoo"})
    clip = events[0]["start"]
    assert status == 200 and len(events) > 2 and all("pcm" in event for event in events[1:])
    assert {key: clip[key] for key in ("seed", "cfg", "temperature")} == {"seed": 3, "cfg": 2, "temperature": 0.8}
    assert clip["checkpoint"] == "best.pt" and clip["samples"] == round(1.4 * RATE) == len(samples(events))
    assert clip["sample_rate"] == RATE and clip["channels"] == 1 and clip["file"] == "slow_bells_with_a_kazoo_3"
    assert "words that no training caption contains: kazoo" in clip["messages"]
    assert "1.4 s is longer than the 1 s of training" in clip["messages"][0]
    model, s, codec = server.engine.model, server.engine.s, server.engine.codec
    options = dict(cfg=2.0, temperature=0.8, top_k=s.top_k, top_p=s.top_p)
    codes = stream(model, [{"text": "slow bells with a kazoo"}], 70, seeds=[3], **options)
    wav = np.concatenate([to_pcm(part[0]) for part in decode_stream(codec, codes)])[:, 0]
    np.testing.assert_array_equal(samples(events), wav)
    args = ("--duration", 1.4, "--seed", 3, "--cfg", 2, "--temperature", 0.8, "--loudness", "none")
    status, output = command(sample, folder / "best.pt", "slow bells with a kazoo", *args, "--out", tmp_path)
    assert status == 0, output
    written = soundfile.read(tmp_path / "slow_bells_with_a_kazoo_3.wav", dtype="int16")[0]
    np.testing.assert_allclose(samples(events), written, atol=1)


def test_audio_is_continued(server, folder, command, tmp_path):
    soundfile.write(tmp_path / "beginning.wav", tone(0.3), RATE)
    content = base64.b64encode((tmp_path / "beginning.wav").read_bytes()).decode()
    status, events = server.post({**OPTIONS, "duration": 0.9, "continue": dict(name="beginning.wav", content=content)})
    args = ("--duration", 0.9, "--seed", 3, "--cfg", 2, "--temperature", 0.8, "--loudness", "none", "--out", tmp_path)
    assert command(sample, folder / "best.pt", "slow bells", "--continue", tmp_path / "beginning.wav", *args)[0] == 0
    written = soundfile.read(tmp_path / "slow_bells_3.wav", dtype="int16")[0]
    assert events[0]["start"]["audio"] == ["continue beginning.wav"]
    np.testing.assert_allclose(samples(events), written, atol=1)


def test_other_checkpoints_of_the_folder_can_be_chosen(server):
    info = json.loads(server.open("GET", "/info").read())
    assert info["checkpoints"] == ["best.pt", "last.pt"] and info["checkpoint"] == "best.pt"
    (server.engine.folder / "codec.pt").write_bytes(tiny.WEIGHTS.read_bytes())  # as demo/tiny.pt beside demo/demo.pt
    assert server.engine.names() == ["best.pt", "last.pt"]
    assert info["caption"] and info["caption"] not in server.open("GET", "/").read().decode()
    assert info["conditions"] == [] and info["cfg"] == 3 and info["sample_rate"] == RATE
    first = server.engine.model
    assert json.loads(server.open("GET", "/info?checkpoint=last.pt").read())["checkpoint"] == "last.pt"
    assert server.post({**OPTIONS, "checkpoint": "last.pt"})[1][0]["start"]["checkpoint"] == "last.pt"
    assert server.engine.model is not first
    assert server.post(OPTIONS)[1][0]["start"]["checkpoint"] == "best.pt"


def test_a_bad_request_gets_one_line(server):
    for name in ("none.pt", "../outside.pt", "../run/best.pt", "/etc/passwd", "best.pt\0", ["best.pt"], "x" * 9999):
        message = server.error({**OPTIONS, "checkpoint": name})
        assert "choose from best.pt, last.pt" in message and len(message) < 300
    assert "choose from best.pt, last.pt" in server.open("GET", "/info?checkpoint=../outside.pt").read().decode()
    for duration, message in ((0, "above 0 seconds"), (-1, "above 0 seconds"), (121, "at most 120 s here"),
                           (float("nan"), "above 0 seconds"), (float("inf"), "above 0 seconds")):  # fmt: skip
        assert message in server.error({**OPTIONS, "duration": duration})
    assert "cfg nan: must be a number" in server.error({**OPTIONS, "cfg": float("nan")})
    assert "temperature -1.0: must be a number from 0 to 1,000,000" in server.error({**OPTIONS, "temperature": -1})
    for seed in ("x", [], -1, 2**62, float("inf")):
        assert server.error({**OPTIONS, "seed": seed}).startswith("seed ")
    assert "longer than 1,000 characters" in server.error({**OPTIONS, "caption": "bell " * 300})
    for text in ("", "{", "[1]", "[" * 100_000, b"\xff"):
        assert "must be a JSON object" in server.error(text)
    assert "must be of type application/json" in server.error("{}", media_type="text/plain")  # other sites can send it
    assert "application/json" not in server.error("{", media_type="Application/JSON; charset=utf-8")
    for caption in ("", "\ud800 \0 \n", None, 5):
        assert server.post({"caption": caption, "duration": 0.3})[0] == 200
    assert server.is_idle()


def test_bad_audio_gets_one_line(server, fake_ffmpeg, tmp_path):
    good, text = upload(tone(1)), base64.b64encode(b"not audio").decode()
    message = server.error({**OPTIONS, "continue": dict(name="../../a/text.wav", content=text)})
    assert message.endswith("a_text.wav: cannot be read as audio (Format not recognised.)") and "/" not in message
    for name in ("", ".", "..", "/", "\0", "ü" * 300, "a\nb"):
        assert "cannot be read as audio" in server.error({**OPTIONS, "continue": dict(name=name, content=text)})
    for broken in ("x", 5, [1], dict(name="a.wav"), dict(name=5, content=text), dict(name="a.wav", content=5)):
        message = server.error({**OPTIONS, "continue": broken})
        assert message == "continue: must be an object with a name, and content in base64"
    cut = server.post({**OPTIONS, "duration": 1, "continue": good})[1][0]["start"]["messages"]
    assert "continue a_tune.wav: cut to 0.5 s, from 0 on, because duration 1 includes the prompt" in cut
    for key in ("melody", "style"):
        assert "was not trained with it; its conditions are text" in server.error({**OPTIONS, key: good})
    hours = upload(np.zeros(20_000), rate=20)
    assert "longer than 10 minutes; cut it" in server.error({**OPTIONS, "continue": hours})
    soundfile.write(tmp_path / "hours.au", np.zeros(20_000), 20, format="AU")
    content = base64.b64encode((tmp_path / "hours.au").read_bytes()).decode()
    hours = dict(name="hours.m4a", content=content)
    assert "longer than 10 minutes; cut it" in server.error({**OPTIONS, "continue": hours})
    for name, sizes in (("a.wav", {4: bytes(4), 40: bytes(4)}), ("a.flac", {21: b"\xf0" + bytes(4)})):
        soundfile.write(tmp_path / name, tone(1), RATE)
        content = bytearray((tmp_path / name).read_bytes())
        for first, size in sizes.items():  # as recorded from a pipe
            content[first : first + len(size)] = size
        audio = dict(name=name, content=base64.b64encode(content).decode())
        status, reply = server.post({**OPTIONS, "continue": audio})
        assert status == 200 if name == "a.wav" else "a.flac: its header has no length" in reply and "WAV" in reply
    large = dict(name="a.wav", content="A" * (play.UPLOAD_MB * 4_000_000 // 3 + 20_000))
    assert "is larger than 20 MB" in server.error({**OPTIONS, "continue": large}, expected=413)


def test_two_requests_are_served_in_turn(server):
    long, short = {**OPTIONS, "duration": 3}, {**OPTIONS, "duration": 0.5}
    alone = samples(server.post(long)[1]), samples(server.post(short)[1])
    response = server.open("POST", "/generate", json.dumps(long))
    first = [json.loads(response.readline())]  # generation has begun
    results = []
    second = threading.Thread(target=lambda: results.append(server.post(short)))
    second.start()
    first += [json.loads(line) for line in response]
    second.join(60)
    (status, events), *_ = results
    assert status == 200 and events[0] == {"wait": 1} and "start" in events[1]
    np.testing.assert_array_equal(samples(first), alone[0])
    np.testing.assert_array_equal(samples(events), alone[1])


def ask_and_read_nothing(server, options):
    """Send a request on a connection with small buffers, and return it."""
    body, connection = json.dumps(options).encode(), socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    head = f"POST /generate HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {len(body)}\n\n"
    connection.sendall(head.replace("\n", "\r\n").encode() + body)
    return connection


@pytest.mark.parametrize("stalled_seconds", [0.2, 1000])
def test_a_client_that_reads_nothing_delays_no_other(folder, request, monkeypatch, stalled_seconds):
    """It loses its turn, or its clip is complete in memory before the next begins."""
    monkeypatch.setattr(play, "STALLED_SECONDS", stalled_seconds)
    server, n = Server(folder / "best.pt"), []
    request.addfinalizer(server.stop)
    large = base64.b64encode(bytes(2_000_000)).decode()  # more than the buffers of the connection hold

    def generate(options, args):
        yield {"start": {}}
        for _ in range(20):
            time.sleep(0.05)
            n.append(options["seed"])
            yield {"pcm": large if options["seed"] == 1 else ""}

    monkeypatch.setattr(server.engine, "generate", generate)
    with ask_and_read_nothing(server, {**OPTIONS, "seed": 1}):
        while not n:
            time.sleep(0.01)
        status, events = server.post({**OPTIONS, "seed": 2})
        assert status == 200 and events[0] == {"wait": 1} and len(events) == 22
        assert (n.count(1) == 20) == (stalled_seconds == 1000)
    assert server.is_idle()


def test_an_error_after_waiting_is_an_event(server):
    response = server.open("POST", "/generate", json.dumps({**OPTIONS, "duration": 3}))
    response.readline()
    status, events = server.post({**OPTIONS, "melody": upload(tone(1))})
    assert status == 200 and events[0] == {"wait": 1} and "was not trained with it" in events[1]["error"]
    response.read()


def test_a_closed_connection_ends_its_clip(server, caplog, monkeypatch):
    decoded = []
    monkeypatch.setattr(play, "decode_stream", lambda *args: (decoded.append(x) or x for x in decode_stream(*args)))
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        head = "POST /generate HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 9\n\n{"
        half.sendall(head.replace("\n", "\r\n").encode())
    for seed in range(3):  # the first is served, the others wait
        response = server.open("POST", "/generate", json.dumps({**OPTIONS, "duration": 120, "seed": seed}))
        response.readline()
        response.close()
    assert server.is_idle() and len(decoded) < 240, "0.5 s each: a complete clip would be 240"
    assert server.post(OPTIONS)[0] == 200 and not caplog.records, "no traceback is logged"


def test_a_melody_and_a_style_if_the_model_has_them(all_conditions, request):
    conditions = Server(all_conditions)
    request.addfinalizer(conditions.stop)
    assert json.loads(conditions.open("GET", "/info").read())["conditions"] == ["melody", "style"]
    options = {**OPTIONS, "melody": upload(tone(2)), "style": upload(tone(1, 880), name="style.wav")}
    status, events = conditions.post(options)
    assert status == 200 and events[0]["start"]["audio"] == ["melody a tune.wav", "style style.wav"]
    assert "melody a_tune.wav: cut to 1.4 s" in events[0]["start"]["messages"]
    assert len(samples(events)) == round(1.4 * RATE)
    assert "melody a_tune.wav: is silent" in conditions.error({**OPTIONS, "melody": upload(tone(1) * 1e-5)})


def test_missing_packages_are_named(toy_run):
    program = (
        "import runpy, sys; sys.modules['starlette.applications'] = None; sys.argv = ['play.py', sys.argv[1]];"
        " runpy.run_module('tools.play', run_name='__main__', alter_sys=True)"
    )
    message = finish(start("-c", program, toy_run[0] / "best.pt"), status=2)
    assert message == "play.py: error: needs starlette and uvicorn; install them with: pip install starlette uvicorn\n"


def test_the_page_begins_with_a_caption_of_the_models_own_data(dataset, folder, tmp_path):
    saved, (path, *_) = load(folder / "best.pt"), sorted(dataset.glob("valid_*.jsonl"))
    texts = [shards.text_of(track) for track in lines(path)]
    assert play.example_caption({**saved, "words": []}) == texts[0]
    assert play.example_caption(saved) in texts and shards.words_of([play.example_caption(saved)]) <= {*saved["words"]}
    other = {**saved, "words": ["a", "tango"]}  # the folder holds other data now
    assert play.example_caption(other) == ""
    for data in ("gone", "", "a\0"):
        moved = {**saved, "settings": {**saved["settings"], "data": data}}
        assert play.example_caption(moved) in ("", play.CAPTION)
        assert play.example_caption({**moved, "words": ["tango"]}) == ""
        assert play.example_caption({**moved, "words": []}) == play.CAPTION
    (tmp_path / "valid_000.jsonl").write_text("{")
    damaged = {**saved, "settings": {**saved["settings"], "data": str(tmp_path)}, "words": []}
    assert play.example_caption(damaged) == play.CAPTION


def test_a_port_in_use_or_a_missing_checkpoint_gets_one_line(server, folder, command):
    status, message = command(play, folder / "best.pt", "--port", server.port)
    assert status == 2 and "Address already in use" in message
    assert "choose another" in message and message.count("\n") == 1
    assert "no such checkpoint" in command(play, folder / "none.pt")[1]


def test_the_page_loads_nothing_from_other_sites(server):
    page = server.open("GET", "/").read().decode()
    assert "<title>nanoMusicGen" in page and "://" not in page and "src=" not in page and "@import" not in page


@pytest.fixture(scope="module")
def browser():
    if not importlib.util.find_spec("playwright"):
        pytest.skip("needs playwright")
    from playwright.sync_api import Error, sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"needs chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_generating_and_saving_in_a_browser(browser, server, tmp_path, width):
    page = browser.new_page(viewport=dict(width=width, height=800))
    errors = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    home = f"http://127.0.0.1:{server.port}/"
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(home)
    page.wait_for_selector("#generate:enabled")
    assert page.get_by_label("Audio for the melody").is_hidden()
    for number, caption in enumerate(("slow <b>bells</b>", "a kazoo"), 1):
        page.get_by_label("Caption").fill(caption)
        page.get_by_label("Duration").fill("1.4")
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector(f"article:nth-last-child({number}) audio")
        clip = page.locator("article").first
        assert clip.get_attribute("data-samples") == str(round(1.4 * RATE))
        assert caption in clip.inner_text() and f"seed {number - 1} · 1.4 s · cfg 3" in clip.inner_text()
    assert "words that no training caption contains: kazoo" in clip.inner_text()
    assert page.locator("article").count() == 2 and page.locator("b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    drawn = page.evaluate("[...document.querySelectorAll('canvas')].map(c => new Set(c.getContext('2d')"
                          ".getImageData(c.width - 2, 0, 2, c.height).data).size)")  # fmt: skip
    assert min(drawn) > 10, "the last columns have many colours"
    with page.expect_download() as saved:
        clip.get_by_role("link").click()
    saved.value.save_as(tmp_path / "clip.wav")
    assert saved.value.suggested_filename == "a_kazoo_1.wav"
    wav, rate = soundfile.read(tmp_path / "clip.wav", dtype="int16")
    options = {"caption": "a kazoo", "seed": 1, "duration": 1.4}
    assert rate == RATE and np.array_equal(wav, samples(server.post(options)[1]))
    page.locator("audio").last.evaluate("audio => audio.play()")
    page.wait_for_function("document.querySelectorAll('audio')[1].currentTime > 0.05")
    assert not errors and all(url.startswith((home, "blob:", "data:")) for url in requests)
    page.evaluate("document.querySelector('form').noValidate = true")
    page.get_by_label("Duration").fill("500")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("text=at most 120 s here")
    assert page.locator("article").count() == 2 and page.locator("#generate:enabled").count() == 1
    page.close()


@pytest.fixture
def open_page(browser, server):
    """Return a function that opens the page in a new tab and waits until it is ready."""
    pages = []

    def open_one(server=server):
        page = browser.new_page()
        pages.append(page)
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector("#generate:enabled")
        return page

    yield open_one
    for page in pages:
        page.close()


def generate(page, seconds):
    page.get_by_label("Duration").fill(str(seconds))
    page.get_by_role("button", name="Generate").click()


def test_stop_in_a_browser_ends_the_clip_and_keeps_its_beginning(open_page, server):
    page = open_page()
    generate(page, 120)
    page.wait_for_selector("article[data-samples]")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("article audio")
    assert page.inner_text("#status") == "stopped" and server.is_idle()
    assert 0 < int(page.locator("article").get_attribute("data-samples")) < 120 * RATE


def test_a_second_browser_waits_and_is_served(open_page):
    first, second = open_page(), open_page()
    generate(first, 120)
    first.wait_for_selector("article[data-samples]")
    generate(second, 1)
    second.wait_for_selector("text=waiting for 1 earlier request")
    first.close()
    second.wait_for_selector("article audio")
    assert "1.0 s generated at" in second.inner_text("#status")


def test_an_earlier_clip_can_be_played_while_another_is_generated(open_page):
    page = open_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    generate(page, 1)
    page.wait_for_selector("article audio")
    generate(page, 6)
    page.wait_for_selector("article[data-samples] >> nth=1")
    page.locator("audio").last.evaluate("audio => audio.play()")
    page.wait_for_function("document.querySelectorAll('audio').length === 2")
    assert page.locator("article").first.get_attribute("data-samples") == str(6 * RATE) and not errors
    assert page.inner_text("#error") == ""


def test_audio_is_chosen_in_the_page_and_errors_are_shown_there(open_page, all_conditions, request, tmp_path):
    conditions = Server(all_conditions)
    request.addfinalizer(conditions.stop)
    page = open_page(conditions)
    for label in ("Audio for the melody", "Audio for the style"):
        assert page.get_by_label(label).is_visible()
    tune = base64.b64decode(upload(tone(2))["content"])
    large = bytes(21_000_000)
    for content, message in ((large, "larger than 20 MB"), (b"text", "tune.wav: cannot be read"), (tune, "")):
        (tmp_path / "tune.wav").write_bytes(content)
        page.get_by_label("Audio for the melody").set_input_files(tmp_path / "tune.wav")
        generate(page, 1)
        page.wait_for_selector(f"#error:has-text('{message}')" if message else "article audio")
    assert "melody tune.wav" in page.inner_text("article") and page.inner_text("#error") == ""
    page.get_by_role("button", name="Remove the audio").click()
    generate(page, 1)
    page.wait_for_selector("article:nth-child(2)")
    assert "tune.wav" not in page.locator("article").first.inner_text()
