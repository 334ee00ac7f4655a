"""Serve a web page that generates music and plays it while it is generated, and keeps the clips for comparison.

    pip install starlette uvicorn
    python -m tools.play out/demo               # then open http://127.0.0.1:8000

    GET /            the page, play.html
    GET /info        JSON: the checkpoints of the folder, and the defaults and conditions of one (?checkpoint=NAME)
    POST /generate   JSON with options and audio -> events, one line of JSON each: {"wait": number of earlier requests},
                     {"start": description of the clip}, {"pcm": samples} ..., or {"error": message}

sample.py defines the options, checks them and writes the messages. An error before the first event is answered with
status 4xx and one line. Samples are signed 16-bit little-endian, the channels interleaved, in base64.
"""

import argparse
import asyncio
import base64
import contextlib
import functools
import io
import json
import re
import socket
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import soundfile

import common
import sample
from audio import FFMPEG_SUFFIXES, file_name, load_audio
from codec import decode_stream
from common import UserError
from dataprep import shards
from generate import stream
from tools.output import to_pcm

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route
except ImportError:
    uvicorn = None

CAPTION = "a slow piano melody in a minor key, with drums"  # if the model's data are gone, and it contains these words
MAX_SECONDS = 120  # of a clip
STALLED_SECONDS = 5  # after which a client that reads nothing loses its turn, if others wait
UPLOAD_MB = 20  # of all audio in a request
UPLOAD_SECONDS, UPLOAD_SAMPLES = 600, 60_000_000  # of one decoded file: a few bytes can contain hours of silence
NUMBERS = {"seed": int, "duration": float, "cfg": float, "temperature": float}
UPLOAD_PREFIX = "nanomusicgen_play_"  # of the names of temporary folders
AUDIO = {"continue": "prompt", "melody": "melody", "style": "style"}  # key in a request: option of sample.py


def read_options(request, defaults):
    """Return sample.py's options for a request, without its checkpoint and audio. Raises UserError."""
    args = argparse.Namespace(**vars(defaults))
    for key, number in NUMBERS.items():
        try:
            if request.get(key) is not None:
                setattr(args, key, number(request[key]))
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{key} {str(request[key])[:40]}: must be a number") from None
    args.captions = [str(request.get("caption") or "")]
    if len(args.captions[0]) > 1000:
        raise UserError("caption: longer than 1,000 characters; shorten it")
    args.captions = sample.read_captions(args)
    sample.check_arguments(args)
    if args.duration > MAX_SECONDS:
        raise UserError(f"duration {args.duration:g}: at most {MAX_SECONDS} s here; use sample.py for longer music")
    return args


def save_audio(request, key, folder):
    """Write the audio of a request to a file in `folder` and return its path. Raises UserError."""
    try:
        path = Path(folder, f"{key}_" + re.sub(r"[^\w.-]+", "_", request[key]["name"])[-60:])
        path.write_bytes(base64.b64decode(request[key]["content"]))
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{key}: must be an object with a name, and content in base64") from None
    if is_too_long(path):
        raise UserError(f"{key} {path}: longer than {UPLOAD_SECONDS // 60} minutes; cut it")
    return str(path)


def is_too_long(path):
    if path.suffix.lower() not in FFMPEG_SUFFIXES:
        try:
            info = soundfile.info(path)
        except soundfile.LibsndfileError:  # sample.py reports files that are not audio
            return False
        if info.frames >= 2**62:  # libsndfile cannot decode them to their end
            raise UserError(f"{path}: its header has no length, as in a recording from a pipe; convert it to WAV")
        if info.frames:
            return info.frames > UPLOAD_SECONDS * info.samplerate or info.frames * info.channels > UPLOAD_SAMPLES
    # the length is known only after decoding
    return load_audio(path, 8000, samples=UPLOAD_SECONDS * 8000 + 1).shape[1] > UPLOAD_SECONDS * 8000


@functools.lru_cache(maxsize=1000)
def is_checkpoint(path, version):
    """Return whether a file is a checkpoint, and not a codec. version: size and mtime, so that a new file is read."""
    with contextlib.suppress(UserError):
        return bool(common.load_checkpoint(path))
    return False


class Engine:
    """Keep one model in memory, the last that was requested, and generate one clip at a time."""

    def __init__(self, defaults):
        """defaults: sample.py's options."""
        self.defaults, self.folder = defaults, Path(defaults.checkpoint).parent
        self.turn, self.requests, self.loaded = asyncio.Lock(), 0, None
        self.load(defaults)
        self.sample_rate = self.codec.sample_rate

    def load(self, args):
        """Load `args.checkpoint`, unless it is in memory and unchanged on disk."""
        version = args.checkpoint, common.size_and_mtime(args.checkpoint)
        if self.loaded != version:
            self.loaded = self.model = self.s = self.codec = None  # free the memory of the other model first
            self.model, self.s, self.codec = sample.load(args)
            self.loaded = version

    def names(self):
        paths = sorted(self.folder.glob("*.pt"))
        return [path.name for path in paths if is_checkpoint(path, common.size_and_mtime(path))]

    def checkpoint_path(self, name):
        """Return the path of a checkpoint in the folder. Without a name: of the program's argument."""
        if name and name not in self.names():
            raise UserError(f"checkpoint {str(name)[:80]}: not in {self.folder}; choose from {', '.join(self.names())}")
        return str(self.folder / name) if name else self.defaults.checkpoint

    def generate(self, request, args):
        """Yield the events of a clip: its description, then its samples."""
        messages = io.StringIO()
        with tempfile.TemporaryDirectory(prefix=UPLOAD_PREFIX) as folder, contextlib.redirect_stdout(messages):
            for key in filter(request.get, AUDIO):
                setattr(args, AUDIO[key], save_audio(request, key, folder))
            self.load(args)
            model, s, codec = self.model, self.s, self.codec
            options = sample.generation_options(args, model, s, codec)
            others = sample.other_conditions(args, model, s, codec)
            sample.report_captions(args.captions, model.conditioner.text, others)
        (caption,) = args.captions
        yield {"start": {
            "checkpoint": Path(args.checkpoint).name, "caption": caption, "seed": args.seed, "cfg": options["cfg"],
            "temperature": options["temperature"], "messages": for_the_page(messages.getvalue()).splitlines(),
            "audio": [f"{key} {request[key]['name']}" for key in AUDIO if request.get(key)],
            "file": file_name(caption, args.seed), "samples": options["frames"] * codec.hop,
            "sample_rate": codec.sample_rate, "channels": codec.channels,
        }}  # fmt: skip
        codes = stream(model, [{"text": caption, **others}], seeds=[args.seed], **options)
        for wav in decode_stream(codec, codes):
            yield {"pcm": base64.b64encode(to_pcm(wav[0])).decode()}

    async def events(self, request):
        """Yield the events of a request. Closing this generator ends the clip."""
        args = read_options(request, self.defaults)
        args.checkpoint = self.checkpoint_path(request.get("checkpoint"))
        client = SimpleNamespace(events=asyncio.Queue(), last_read=time.monotonic(), is_gone=False)
        task = asyncio.create_task(self.serve(client, request, args))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # read here if the client is gone
        try:
            while event := await client.events.get():
                client.last_read = time.monotonic()
                yield event
            await task  # raises its error
        finally:
            client.is_gone = True

    async def serve(self, client, request, args):
        """Put the events of a request into a queue, when its turn comes, so that slow clients do not delay others."""
        self.requests += 1
        try:
            if self.requests > 1:
                client.events.put_nowait({"wait": self.requests - 1})
            async with self.turn:
                clip, client.last_read = self.generate(request, args), time.monotonic()
                while not client.is_gone and (event := await run_in_threadpool(next, clip, None)):
                    client.events.put_nowait(event)
                    is_stalled = time.monotonic() - client.last_read > STALLED_SECONDS
                    if is_stalled and client.events.qsize() > 1 and self.requests > 1:
                        raise UserError("stopped, because this page did not read its music while others waited")
        finally:
            self.requests -= 1
            client.events.put_nowait(None)


def for_the_page(text):
    """Remove the -- of options and the folder of uploads from sample.py's messages."""
    return re.sub(rf"--(?=\w)|\S*{UPLOAD_PREFIX}\w+.({'|'.join(AUDIO)})_", "", text)


def example_caption(saved):
    """Return a held-out caption of a checkpoint's data or, if they are gone, CAPTION. "" if its words are not known."""
    captions, words = [CAPTION], set(saved.get("words", ()))
    with contextlib.suppress(UserError, StopIteration):
        path = next(iter(sorted(Path(saved["settings"]["data"]).glob("valid_*.jsonl"))))
        captions = [shards.text_of(track)[:1000] for track in shards.read_tracks(path, 2**62)]
    return next((text for text in captions if text and (not words or shards.words_of([text]) <= words)), "")


def get_page(http):
    return FileResponse(Path(__file__).with_name("play.html"), headers={"Cache-Control": "no-cache"})


def get_info(http):
    engine = http.app.state.engine
    path = engine.checkpoint_path(http.query_params.get("checkpoint"))
    saved = common.load_checkpoint(path)
    settings = saved["settings"]
    return JSONResponse({
        "checkpoints": engine.names(), "checkpoint": Path(path).name, "max_seconds": MAX_SECONDS,
        "cfg": settings["cfg"], "temperature": settings["temperature"], "sample_rate": engine.sample_rate,
        "caption": example_caption(saved), "conditions": [key for key in ("melody", "style") if settings[key]],
    })  # fmt: skip


async def read_json(http):
    """Return the body of a request, a dict. Raises UserError."""
    media_type = http.headers.get("content-type", "").partition(";")[0]
    if media_type.strip().lower() != "application/json":  # browsers let no other site send this type
        raise UserError("the request must be of type application/json")
    body, size, max_size = bytearray(), 0, UPLOAD_MB * 4_000_000 // 3 + 10_000  # base64 is longer by a third
    async for part in http.stream():  # to its end, because browsers ignore an earlier answer
        size += len(part)
        body += part if size <= max_size else b""
    if size > max_size:
        raise HTTPException(413, f"the audio is larger than {UPLOAD_MB} MB; cut it, or send an mp3 or ogg")
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise UserError("the request must be a JSON object")
    return request


async def post_generate(http):
    events = http.app.state.engine.events(await read_json(http))
    first = await anext(events)  # before the status is sent, so that an error can still set it
    lines = write_lines(first, events)
    return StreamingResponse(lines, media_type="application/x-ndjson", background=BackgroundTask(events.aclose))


async def write_lines(first, events):
    try:
        yield json.dumps(first) + "\n"
        async for event in events:
            yield json.dumps(event) + "\n"
    except UserError as error:
        yield json.dumps({"error": for_the_page(str(error))}) + "\n"


async def refuse(http, error):
    return PlainTextResponse(for_the_page(str(error)), 400)


def make_app(engine):
    routes = [Route("/", get_page), Route("/info", get_info), Route("/generate", post_generate, methods=["POST"])]
    app = Starlette(routes=routes, exception_handlers={UserError: refuse, ClientDisconnect: refuse})
    app.state.engine = engine
    return app


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's folder or a checkpoint; the page offers all of the folder")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 accepts other machines (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port (default 8000)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the accelerator, if there is one)")
    parser.add_argument("--codec_weights", help="the codec's weights, if they have moved since training")
    parser.add_argument("--text_encoder_weights", help="T5's weights, if they have moved since training")
    args = parser.parse_args()
    if uvicorn is None:
        raise UserError("needs starlette and uvicorn; install them with: pip install starlette uvicorn")
    defaults = sample.parse_arguments([args.checkpoint])
    for name in ("device", "codec_weights", "text_encoder_weights"):
        setattr(defaults, name, getattr(args, name))
    app = make_app(Engine(defaults))
    try:
        listener = socket.create_server((args.host, args.port))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)  # to notice soon that a client stopped reading
    except (OSError, OverflowError, TypeError) as error:
        raise UserError(f"--host {args.host} --port {args.port}: {common.first_line(error)}; choose another") from None
    print(f"open http://{args.host}:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run(sockets=[listener])


if __name__ == "__main__":
    common.run(main)
