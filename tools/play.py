"""A page to play with a model: captions in, music out while it is made, earlier takes to compare it with.

    pip install starlette uvicorn
    python -m tools.play out/demo/best.pt       # then open http://127.0.0.1:8000

    GET /            the page, play.html
    GET /about       JSON: which checkpoints the folder has, and what one of them can be given
    POST /generate   options and audio as JSON -> events, a line of JSON each, as they happen: {"wait": requests before
                     it}, {"start": what is made}, {"pcm": samples} ..., or {"error": text}

The options, their checks and what is said of them are sample.py's. What is wrong before the first event is answered by
status 4xx and one line. Samples are signed 16-bit little-endian, the channels interleaved, in base64.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import re
import socket
import tempfile
from pathlib import Path

import soundfile

import common
import sample
from codec import decode_stream, file_name
from common import UserError
from generate import stream

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

LONGEST = 120  # seconds of a take
UPLOAD_MB = 20  # the audio of one request
UPLOAD_SECONDS, UPLOAD_SAMPLES = 600, 60_000_000  # of one file once it is decoded: few bytes may hold hours of silence
NUMBERS = {"seed": int, "duration": float, "cfg": float, "temperature": float}
FOLDER = "nanomusicgen_play_"  # what the name of one for uploads begins with
AUDIO = {"continue": "prompt", "melody": "melody", "style": "style"}  # in a request: in sample.py's options


def read_options(asked, defaults):
    """A request -> sample.py's options, but for the checkpoint and the audio; raises UserError."""
    args = argparse.Namespace(**vars(defaults))
    for key, kind in NUMBERS.items():
        try:
            if asked.get(key) is not None:
                setattr(args, key, kind(asked[key]))
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{key} {str(asked[key])[:40]}: must be a number") from None
    args.captions = [str(asked.get("caption") or "")]
    if len(args.captions[0]) > 1000:
        raise UserError("caption: longer than 1,000 letters; shorten it")
    args.captions = sample.read_captions(args)
    sample.check_arguments(args)
    if args.duration > LONGEST:
        raise UserError(f"duration {args.duration:g}: at most {LONGEST} s here; sample.py makes longer music")
    return args


def save_audio(asked, key, folder):
    """Writes a request's audio into `folder` for sample.py to read, and returns the path; raises UserError."""
    try:
        path = Path(folder, f"{key}_" + re.sub(r"[^\w.-]+", "_", asked[key]["name"])[-60:])
        path.write_bytes(base64.b64decode(asked[key]["content"]))
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{key}: needs a name, and content in base64") from None
    with contextlib.suppress(soundfile.LibsndfileError):  # what is no audio, sample.py will say
        info = soundfile.info(path)
        frames = info.frames or path.stat().st_size  # of a header without a length, what follows is read
        if frames > UPLOAD_SECONDS * info.samplerate or frames * info.channels > UPLOAD_SAMPLES:
            raise UserError(f"{key} {path}: longer than {UPLOAD_SECONDS // 60} minutes; cut it")
    return str(path)


class Studio:
    """One model in memory, the newest that was asked for, with which one take is made at a time."""

    def __init__(self, defaults):
        """defaults: sample.py's options."""
        self.defaults, self.folder = defaults, Path(defaults.checkpoint).parent
        self.turn, self.requests, self.loaded = asyncio.Lock(), 0, None
        self.load(defaults)
        self.sample_rate = self.codec.sample_rate

    def load(self, args):
        """Has `args.checkpoint` in memory as it is on disk now, and no other."""
        path = Path(args.checkpoint)
        wanted = path, path.stat().st_mtime_ns if path.exists() else None
        if self.loaded != wanted:
            self.loaded = self.model = self.s = self.codec = None
            self.model, self.s, self.codec = sample.load(args)
            self.loaded = wanted

    def names(self):
        return sorted(path.name for path in self.folder.glob("*.pt"))

    def find(self, name):
        """The path of the checkpoint that a request names; without a name, of the one that the program was given."""
        if name and name not in self.names():
            raise UserError(f"checkpoint {str(name)[:80]}: not in {self.folder}; there is {', '.join(self.names())}")
        return str(self.folder / name) if name else self.defaults.checkpoint

    def make(self, asked, args):
        """Yields the events of a take that has its turn: what it is, then its samples."""
        said = io.StringIO()
        with tempfile.TemporaryDirectory(prefix=FOLDER) as folder, contextlib.redirect_stdout(said):
            for key in filter(asked.get, AUDIO):
                setattr(args, AUDIO[key], save_audio(asked, key, folder))
            self.load(args)
            model, s, codec = self.model, self.s, self.codec
            options = sample.generation_options(args, model, s, codec)
            others = sample.other_conditions(args, model, s, codec)
            sample.say_what_is_heard(args.captions, model.conditioner.text, others)
        (caption,) = args.captions
        yield {"start": {
            "checkpoint": Path(args.checkpoint).name, "caption": caption, "seed": args.seed, "cfg": options["cfg"],
            "temperature": options["temperature"], "said": for_the_page(said.getvalue()).splitlines(),
            "audio": [f"{key} {asked[key]['name']}" for key in AUDIO if asked.get(key)],
            "file": file_name(caption, args.seed), "samples": options["frames"] * codec.hop,
            "sample_rate": codec.sample_rate, "channels": codec.channels,
        }}  # fmt: skip
        codes = stream(model, [{"text": caption, **others}], seeds=[args.seed], **options)
        for wav in decode_stream(codec, codes):
            yield {"pcm": base64.b64encode(sample.to_pcm(wav[0])).decode()}

    async def events(self, asked):
        """Yields a request's events, once it has its turn; raises UserError. To close it ends the take."""
        args = read_options(asked, self.defaults)
        args.checkpoint = self.find(asked.get("checkpoint"))
        self.requests += 1
        try:
            if self.requests > 1:
                yield {"wait": self.requests - 1}
            async with self.turn:
                take = self.make(asked, args)
                while event := await run_in_threadpool(next, take, None):
                    yield event
        finally:
            self.requests -= 1


def for_the_page(text):
    """sample.py's words, without the -- of a terminal and the folder of the uploads."""
    return re.sub(rf"--(?=\w)|\S*{FOLDER}\w+.({'|'.join(AUDIO)})_", "", text)


def page(request):
    return FileResponse(Path(__file__).with_name("play.html"), headers={"Cache-Control": "no-cache"})


def about(request):
    studio = request.app.state.studio
    path = studio.find(request.query_params.get("checkpoint"))
    settings = common.load_checkpoint(path)["settings"]
    return JSONResponse({
        "checkpoints": studio.names(), "checkpoint": Path(path).name, "longest": LONGEST, "cfg": settings["cfg"],
        "temperature": settings["temperature"], "sample_rate": studio.sample_rate,
        "conditions": [key for key in ("melody", "style") if settings[key]],
    })  # fmt: skip


async def read_json(request):
    """A request's body, a dict; raises UserError. One too long is read to its end, or no browser hears the answer."""
    media_type = request.headers.get("content-type", "").partition(";")[0]
    if media_type.strip().lower() != "application/json":  # which no page of another site may send here
        raise UserError("the request must be of type application/json")
    body, size, most = bytearray(), 0, UPLOAD_MB * 4_000_000 // 3 + 10_000  # base64 is longer by a third
    async for part in request.stream():
        size += len(part)
        body += part if size <= most else b""
    if size > most:
        raise HTTPException(413, f"the audio is larger than {UPLOAD_MB} MB; cut it, or send an mp3 or ogg")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise UserError("the request must be a JSON object")
    return asked


async def generate(request):
    events = request.app.state.studio.events(await read_json(request))
    first = await anext(events)  # nothing is sent yet, so that an error can still be an answer of its own
    lines = write_lines(first, events)
    return StreamingResponse(lines, media_type="application/x-ndjson", background=BackgroundTask(events.aclose))


async def write_lines(first, events):
    try:
        yield json.dumps(first) + "\n"
        async for event in events:
            yield json.dumps(event) + "\n"
    except UserError as error:
        yield json.dumps({"error": for_the_page(str(error))}) + "\n"


async def refuse(request, error):
    return PlainTextResponse(for_the_page(str(error)), 400)


def make_app(studio):
    routes = [Route("/", page), Route("/about", about), Route("/generate", generate, methods=["POST"])]
    app = Starlette(routes=routes, exception_handlers={UserError: refuse, ClientDisconnect: refuse})
    app.state.studio = studio
    return app


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a best.pt, or any other of a run; the page offers those beside it too")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default 8000)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the accelerator, if there is one)")
    parser.add_argument("--codec_weights", help="file, where the codec's own are elsewhere than in training")
    args = parser.parse_args()
    if uvicorn is None:
        raise UserError("needs starlette and uvicorn; install them with: pip install starlette uvicorn")
    defaults = sample.parse_arguments([args.checkpoint])
    defaults.device, defaults.codec_weights = args.device, args.codec_weights
    app = make_app(Studio(defaults))
    try:
        listening = socket.create_server((args.host, args.port))
    except (OSError, OverflowError, TypeError) as error:
        raise UserError(f"--host {args.host} --port {args.port}: {common.first_line(error)}; choose another") from None
    print(f"open http://{args.host}:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run(sockets=[listening])


if __name__ == "__main__":
    common.run(main)
