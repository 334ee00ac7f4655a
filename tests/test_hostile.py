"""Hostile input, drawn by hypothesis: each program works, or refuses it with one line, never with a traceback.

25 examples of each kind are tried by default, 1000 by: pytest tests/test_hostile.py --hypothesis-profile=long
"""

import functools
import html.parser
import io
import json
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, TOY
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from models import make_stub

import config
import data
import prepare
import sample
import train
from audio import file_name, load_audio
from codec import load_codec
from common import UserError, load_checkpoint, save_checkpoint
from conditioning import TextEmbedder, merge_text
from config import Settings
from dataprep import shards
from dataprep.report import find_damage
from dataprep.tracks import find_tracks
from generate import load_model
from model import MusicLM
from patterns import make_pattern
from tools import report

same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # for all examples of a test
MAX_MESSAGE = 400  # characters, including the paths of tests


def call_or_refuse(function):
    """Return the result of the function, or None if it raises UserError, whose message must be one line."""
    try:
        return function()
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and 10 < len(str(error)) < MAX_MESSAGE, str(error)
        event("refused")


# --------------------------------------------------------------------------------------------------- patterns


@st.composite
def patterns(draw):
    K, T = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    name = draw(st.sampled_from(["delay", "parallel", "unrolled"]))
    delays = draw(st.none() | st.lists(st.integers(0, 12), min_size=K, max_size=K)) if name == "delay" else None
    return make_pattern(name, K, T, delays, training=draw(st.booleans()))


@given(patterns(), st.integers(0, 2**32))
def test_revert_undoes_build_and_each_kept_code_has_one_position_after_the_first(pattern, seed):
    codes = torch.randint(50, (2, pattern.K, pattern.T), generator=torch.Generator().manual_seed(seed))
    sequence = pattern.build(codes, special=50)
    assert torch.equal(pattern.revert(sequence, special=50), codes.masked_fill(~pattern.frame_mask, 50))
    assert sequence.shape == (2, pattern.K, pattern.S) and (sequence[:, :, 0] == 50).all()
    assert torch.equal((sequence != 50).sum(2), pattern.frame_mask.sum(1).expand(2, -1))
    assert (pattern.position[:, 1:] > pattern.position[:, :-1]).all()


@given(
    st.text(max_size=8), st.integers(1, 5), st.lists(st.integers(-2, 6) | st.floats() | st.text(max_size=2), max_size=6)
)
def test_any_delays_are_accepted_or_refused(name, K, delays):
    call_or_refuse(lambda: make_pattern(name, K, 5, delays))
    pattern = call_or_refuse(lambda: make_pattern("delay", K, 5, delays))
    assert (pattern is None) == (len(delays) != K or any(type(delay) is not int or delay < 0 for delay in delays))


# ------------------------------------------------------------------------------------------------------- loss


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    s = Settings(dim=16, heads=2, layers=1, text_dim=16, text_heads=2, text_layers=1, segment=0.2)
    return MusicLM(s, dict(K=4, card=8, frame_rate=50, dim=8), prepare.train_tokenizer([], 300)).eval()


@given(st.data(), st.integers(1, 3), st.integers(1, 12), st.integers(0, 2**32))
@torch.no_grad()
def test_the_loss_of_any_mask_equals_that_of_aligned_logits(model, drawn, B, T, seed):
    flags = st.lists(st.booleans(), min_size=B * T, max_size=B * T)
    not_padding, in_loss = (torch.tensor(drawn.draw(flags)).view(B, T) for _ in range(2))
    in_loss &= not_padding
    codes = torch.randint(8, (B, 4, T), generator=torch.Generator().manual_seed(seed))
    tensors, pattern = model.conditioner.tokenize([{}] * B), model.pattern(T, training=True)
    ce_sum = model(codes, not_padding, in_loss, tensors)
    logits = model.aligned_logits(codes.masked_fill(~not_padding[:, None], model.special), tensors)
    mask = in_loss[:, None] & pattern.frame_mask
    assert torch.equal(data.count_targets(in_loss, pattern), mask.sum((0, 2)).float())
    ce = torch.logsumexp(logits, -1) - logits.gather(-1, codes[..., None])[..., 0]
    expected = torch.where(mask, ce, 0.0).sum((0, 2))
    torch.testing.assert_close(ce_sum, expected, atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- settings

WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(sorted(config.FIELDS)).flatmap(
        lambda key: st.text(max_size=12).map(lambda text: f"--{key}={text}")
    ),
    st.sampled_from(sorted(config.FIELDS)).flatmap(
        lambda key: st.one_of(st.integers(), st.floats(), st.lists(st.integers(), max_size=3), st.booleans()).map(
            lambda value: f"--{key}={value}"
        )
    ),
)


@given(st.lists(WORDS, max_size=4))
def test_any_command_line_is_accepted_or_refused(words):
    assume(not {"-h", "--help"} & set(words))
    s = call_or_refuse(lambda: config.load(words, ""))
    assert s is None or all(type(getattr(s, key)) is field.type for key, field in config.FIELDS.items())


@same_folder
@given(st.text(max_size=60) | st.sampled_from(["dim = ", "lr = '1'", "import os\nseed = 1", "raise SystemExit"]))
def test_any_config_file_is_accepted_or_refused(tmp_path, text):
    path = tmp_path / "c.py"
    path.write_text(text, encoding="utf-8", errors="ignore")
    call_or_refuse(lambda: config.load([str(path)], ""))


# ------------------------------------------------------------------------------------------------------- music

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["path", "caption", "attributes", "melody_from", "genre"])
ENTRIES = st.dictionaries(KEYS, JSON | st.just("a.wav"), max_size=4).map(lambda entry: json.dumps(entry).encode())
TEXTS = st.one_of(st.binary(max_size=80), ENTRIES, JSON.map(lambda value: json.dumps(value).encode()))


def make_music(folder):
    folder.mkdir(exist_ok=True)
    for name in "ab":
        soundfile.write(folder / f"{name}.wav", np.zeros(100), 16_000)
    return folder


@same_folder
@given(st.lists(TEXTS, max_size=3))
def test_any_manifest_is_accepted_or_refused(tmp_path, lines):
    manifest = make_music(tmp_path / "m") / "manifest.jsonl"
    manifest.write_bytes(b"\n".join(lines))
    tracks = call_or_refuse(lambda: find_tracks(manifest)) or []
    assert all(type(track["caption"]) is str and type(track["metadata"]) is dict for track in tracks)
    for track in tracks:
        merge_text(track["caption"], track["metadata"], np.random.default_rng(0))
        json.dumps(track)


@same_folder
@given(TEXTS, TEXTS)
def test_any_sidecar_file_is_accepted_or_refused(tmp_path, metadata, caption):
    folder = make_music(tmp_path / "m")
    (folder / "a.json").write_bytes(metadata)
    (folder / "b.txt").write_bytes(caption)
    tracks = call_or_refuse(lambda: find_tracks(folder))
    assert tracks is None or len(tracks) == 2


@st.composite
def audio(draw):
    """Draw (name, bytes): an audio file of any kind, possibly damaged."""
    rate, channels = draw(st.sampled_from([8000, 11025, 16000, 44100, 48000, 96000, 192000])), draw(st.integers(1, 8))
    samples = draw(st.sampled_from([0, 1, 2, rate // 100, rate // 4]))
    wav = np.random.default_rng(draw(st.integers(0, 99))).uniform(-1, 1, (samples, channels)).astype(np.float32)
    if samples and draw(st.booleans()):
        wav[draw(st.integers(0, samples - 1))] = draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e38, 1e-40]))
    kind, subtype = draw(st.sampled_from([("WAV", "FLOAT"), ("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")]))
    file = io.BytesIO()
    try:
        soundfile.write(file, wav, rate, format=kind, subtype=subtype)
    except (soundfile.LibsndfileError, ValueError, AssertionError):  # the format does not support it
        return draw(st.sampled_from(["a.wav", "a.mp3"])), draw(st.binary(max_size=60))
    suffix = draw(st.sampled_from([kind.lower(), "wav", "mp3", "opus"]))
    return f"a.{suffix}", damaged(draw, file.getvalue())


def damaged(draw, content):
    """Draw a damaged copy of `content`: cut off, with a flipped bit, with inserted bytes, or unchanged."""
    damage = draw(st.sampled_from(["cut", "flip", "insert", "none"]))
    if not content or damage == "none":
        return content
    at = draw(st.integers(0, len(content) - 1) | st.integers(0, min(200, len(content) - 1)))
    if damage == "cut":
        return content[:at]
    if damage == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:]
    return content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]


@same_folder
@given(audio())
def test_any_audio_file_is_decoded_or_refused(tmp_path, file):
    name, content = file
    (tmp_path / name).write_bytes(content)
    for channels in (1, 2):
        wav = call_or_refuse(functools.partial(load_audio, tmp_path / name, 16_000, channels))
        if wav is not None:
            assert wav.dtype == torch.float32 and wav.shape[0] == channels and wav.shape[1] > 0
            assert torch.isfinite(wav).all()
            codes = load_codec_once().encode(wav[None, :1, :16_000])
            assert 0 <= codes.min() and codes.max() < 512


@functools.cache
def load_codec_once():
    return load_codec("tiny")


# ------------------------------------------------------------------------------------------------------ shards


@same_folder
@given(st.data())
def test_a_damaged_data_set_is_refused_or_gives_valid_batches(dataset, tmp_path, drawn):
    folder = tmp_path / "data"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(dataset, folder)
    path = drawn.draw(st.sampled_from(sorted(folder.iterdir())))
    content = path.read_bytes()
    damage = drawn.draw(st.sampled_from(["bytes", "array", "json", "missing"]))
    if damage == "missing":
        path.unlink()
    elif damage == "array" and path.suffix == ".npy":
        dtype = drawn.draw(st.sampled_from([np.float32, np.int64, np.uint8, np.int16, object, "U3"]))
        shape = drawn.draw(st.sampled_from([(), (0, 4), (50, 4), (50, 3), (50,), np.load(path).shape]))
        np.save(path, np.zeros(shape, dtype), allow_pickle=True)
    elif damage == "json" and content and path.suffix in (".json", ".jsonl"):
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        entry = json.loads(lines[0])
        entry[drawn.draw(st.sampled_from(sorted(entry)))] = drawn.draw(JSON)
        path.write_text("\n".join([json.dumps(entry), *lines[1:]]))
    else:
        path.write_bytes(damaged(drawn.draw, content))
    s, model = Settings(batch_size=4, valid_items=0), make_stub(50)

    def read_batches():
        find_damage(folder)
        train_data, valid_data = (data.TokenDataset(folder, split) for split in ("train", "valid"))
        unigram = shards.unigram_ce(folder)
        assert unigram.shape == (4,) and np.isfinite(unigram).all() and (unigram >= 0).all()
        TextEmbedder(8, shards.read_tokenizer(folder), 8, 2, 1, 16).tokenize(["fast bells"])
        held_out = [batch for batch, _ in data.valid_batches(valid_data, model, 4, s)]
        return [*data.TrainingBatches(train_data, model, s)[0], *held_out]

    for batch in call_or_refuse(read_batches) or []:
        assert batch.codes.min() >= 0 and batch.codes.max() < 512


# -------------------------------------------------------------------------------------------------- checkpoints


class Bomb:
    def __reduce__(self):
        return exec, ("import sys; sys.exploded = True",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    state = {"heads": torch.randn(40, 30), "step": torch.tensor(3)}
    save_checkpoint(path, "best", model=state, settings={"dim": 32}, codec={}, tokenizer=b"abc", step=3)
    return path.read_bytes(), state


@same_folder
@given(st.data())
def test_a_damaged_checkpoint_is_refused_or_keeps_its_names(saved, tmp_path, drawn):
    content, _ = saved
    path = tmp_path / "best.pt"
    path.write_bytes(damaged(drawn.draw, content))
    loaded = call_or_refuse(lambda: load_checkpoint(path, ["best"]))
    assert loaded is None or loaded.keys() >= {"kind", "nanomusicgen"}  # a flipped bit in a weight is not detected


@pytest.mark.parametrize("tenth", range(10))
def test_a_truncated_checkpoint_is_refused(saved, tmp_path, tenth):
    (tmp_path / "best.pt").write_bytes(saved[0][: len(saved[0]) * tenth // 10])
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint(tmp_path / "best.pt", ["best"])


def test_a_pickle_instead_of_a_checkpoint_is_never_run(tmp_path):
    path = tmp_path / "best.pt"
    for write in (
        lambda: path.write_bytes(pickle.dumps(Bomb())),
        lambda: torch.save({"nanomusicgen": 3, "kind": "best", "model": Bomb()}, path),
        lambda: torch.save(torch.nn.Linear(1, 1), path),
        lambda: torch.save({"other": "content"}, path),
        lambda: torch.save([1], path),
        lambda: zipfile.ZipFile(path, "w").close(),
    ):
        write()
        with pytest.raises(UserError):
            load_checkpoint(path, ["best"])
    assert not hasattr(sys, "exploded")


def test_a_checkpoint_with_an_unknown_setting_is_refused_by_its_name(dataset, tmp_path, command):
    saved = dict(settings={**vars(Settings()), "colour": 3}, codec={}, tokenizer=b"abc", step=2)
    for kind in ("best", "last"):
        save_checkpoint(tmp_path / f"{kind}.pt", kind, **saved)
    with pytest.raises(UserError, match="best.pt: unknown settings colour; use the code that trained it"):
        load_model(tmp_path / "best.pt")
    status, output = command(train, *TOY, f"--data={dataset}", f"--out={tmp_path}")
    assert status == 2 and "last.pt: unknown settings colour; use the code that trained it" in output


# --------------------------------------------------------------------------------------------------- captions

CAPTIONS = st.one_of(
    st.text(max_size=60),
    st.sampled_from(["", "\x00\x1b[31m", "אבג هذا", "<script>alert(1)</script>", "'\"><img src=x onerror=alert(1)>",
                     "</script><script>alert(1)</script>", "a" * 100_000, "../../etc/passwd", "\u202egnp.exe"]),
)  # fmt: skip


@same_folder
@given(CAPTIONS)
def test_any_caption_can_be_tokenized_and_used_as_a_file_name(tmp_path, model, caption):
    ids, mask = model.conditioner.text.tokenize([caption])
    assert ids.shape == mask.shape and ids.shape[1] <= model.conditioner.text.max_tokens
    path = tmp_path / f"{file_name(caption, 7)}.wav"
    path.write_bytes(b"")
    assert path.parent == tmp_path and [file.name for file in tmp_path.iterdir()] == [path.name]
    path.unlink()


class Page(html.parser.HTMLParser):
    """The tags of a page, and its attributes that run code."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.handlers = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attributes if name.startswith("on")]


@same_folder
@given(CAPTIONS.filter(lambda caption: len(caption) < 1000))
def test_any_caption_is_only_text_on_the_page_of_a_run(tmp_path, caption):
    def page(caption):
        clip = dict(caption=caption, seed=0, free="a.wav", continued="a.wav", prompt_seconds=1.0, reference=None,
                    codec="a.wav")  # fmt: skip
        line = dict(step=1, epoch=1, stage="generate", clips=[clip])
        (tmp_path / "history.jsonl").write_text(json.dumps(line) + "\n")
        (tmp_path / "metrics.jsonl").write_text("")
        (tmp_path / "config.json").write_text(json.dumps(vars(Settings(out=caption))))
        if not (tmp_path / "a.wav").exists():
            soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16_000)
        report.write(tmp_path)
        return Page((tmp_path / "index.html").read_text(encoding="utf-8"))

    plain, hostile = page("music" if caption else ""), page(caption)
    assert hostile.tags == plain.tags and hostile.handlers == plain.handlers


@same_folder
@given(TEXTS)
def test_any_log_is_accepted_or_refused(tmp_path, content):
    for name in ("metrics.jsonl", "history.jsonl"):
        (tmp_path / name).write_bytes(content + b"\n")
    call_or_refuse(lambda: report.write(tmp_path))


# ------------------------------------------------------------------------------------------------------- limits


def test_training_and_sampling_open_no_connection_and_write_only_to_their_folders(
    dataset, tmp_path, command, monkeypatch
):
    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    def files(folder):
        return {path for path in folder.rglob("*") if "__pycache__" not in path.parts and ".git" not in path.parts}

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    working, temporary = tmp_path / "working", tmp_path / "temporary"
    working.mkdir(), temporary.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = files(ROOT), files(Path(dataset))
    status, output = command(train, *TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--evaluate_clips=2")
    assert status == 0, output
    best, clips = tmp_path / "out" / "best.pt", tmp_path / "clips"
    status, output = command(sample, best, "bells", "--duration", 1, "--out", clips)
    assert status == 0, output
    assert (files(ROOT), files(Path(dataset))) == before and not any(working.iterdir())
    assert {path.name.partition("_")[0] for path in temporary.iterdir()} <= {"torchinductor"}
    assert len(list(clips.iterdir())) == 2


@pytest.mark.skipif(not shutil.which("prlimit"), reason="needs prlimit")
def test_data_larger_than_memory_can_be_trained_on(dataset, tmp_path):
    """32 GB of codes with 2 GB of memory."""
    folder = Path(shutil.copytree(dataset, tmp_path / "large"))
    frames, n_tracks = 2**32, 512
    for name, dtype, shape in (("", np.uint16, (frames, 4)), ("_melody", np.uint8, (frames,))):
        np.lib.format.open_memmap(folder / f"train_000{name}.npy", "w+", dtype, shape)  # a sparse file, all zeros
    size = frames // n_tracks
    tracks = [dict(name=f"{i}", path=f"{i}.wav", caption="bells", metadata={}, first=i * size, frames=size)
              for i in range(n_tracks)]  # fmt: skip
    (folder / "train_000.jsonl").write_text("".join(json.dumps(track) + "\n" for track in tracks))
    meta = json.loads((folder / "meta.json").read_text())
    meta["train"]["frames"] = frames
    (folder / "meta.json").write_text(json.dumps(meta))
    assert (folder / "train_000.npy").stat().st_size > 32e9
    args = [*TOY, f"--data={folder}", f"--out={tmp_path / 'out'}", "--samples=0"]
    process = subprocess.run(["prlimit", f"--data={2 * 2**30}", sys.executable, "train.py", *args], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert process.returncode == 0 and "listen:" in process.stdout, process.stdout + process.stderr
