"""The frozen EnCodec (arXiv:2210.13438): a wav becomes K streams of integers, and integers a wav again.

    codec = load_codec("tiny")                      # ships with the repository, no network
    codes = codec.encode(wav)                       # [B, channels, samples] -> int64 [B, K, T]
    wav = codec.decode(codes)                       # [B, K, T] -> [B, channels, T * hop]

    name            rate     frames/s  K                card   weights
    tiny            16 kHz   50        4                512    demo/tiny.pt
    encodec_24khz   24 kHz   75        2, 4, 8 or 16    1024   published, from the network or a file
    musicgen_32khz  32 kHz   50        4                2048   published, from a file that tools/convert.py makes

All are mono. With ':stereo' after the name, left and right pass through the same codec, and their codes interleave:
2K streams, left and right of the first codebook, of the second, and so on, as in MusicGen's stereo models.

Letters: B batch, K codebooks, T frames.
"""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import math
import mmap
import os
import re
import sys
from pathlib import Path

import numpy as np
import safetensors
import soundfile
import soxr
import torch

from common import UserError, first_line, write_file

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):
    # encodec imports torchaudio, yet nothing used here calls it; an empty module stands in where no build fits torch.
    placeholder = importlib.util.spec_from_loader("torchaudio", None)
    sys.modules["torchaudio"] = importlib.util.module_from_spec(placeholder)

from encodec import EncodecModel  # noqa: E402
from encodec.modules import SEANetDecoder, SEANetEncoder  # noqa: E402
from encodec.quantization import ResidualVectorQuantizer  # noqa: E402

from demo import tiny  # noqa: E402

# Codebooks, codes in each, frames a second, width of the latents.
CODECS = {"tiny": (4, 512, 50, 64), "encodec_24khz": (8, 1024, 75, 128), "musicgen_32khz": (4, 2048, 50, 128)}
BANDWIDTHS = {"1.5": 2, "3": 4, "6": 8, "12": 16}  # of encodec_24khz, in kbps: codebooks
SUFFIXES = set(".wav .wave .flac .mp3 .ogg .oga .opus .aiff .aif .aifc .au .caf .w64".split())  # libsndfile's
OTHER_SUFFIXES = set(".m4a .aac .mp4 .wma .webm .mka .ape .wv .alac .dsf .mid .midi".split())  # listed as skipped
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}  # that are written, libsndfile's names


# ------------------------------------------------------------------------------------------------------ the codec


class Codec:
    """A frozen codec in float32 and eval mode, whatever autocast surrounds it.

    Attributes: name (as `load_codec` takes it), sample_rate (Hz), frame_rate (frames/s), hop (samples per frame),
    channels, K (of all channels together), card, dim (width of the latents, likewise), and id, which goes into shards
    and checkpoints so that codes never meet a model of another codec.
    behind and ahead: the frames before and after one that its samples depend on, as far as `decode_stream` looks.
    period: the frames after which its oscillators, if any, are in phase again; a part of a stream begins at a multiple.
    """

    def __init__(self, name, model, K, behind, ahead, period=1, channels=1):
        self.name, self.behind, self.ahead, self.period = name, behind, ahead, period
        self.model = model.float().eval().requires_grad_(False)
        self.sample_rate, self.channels, self.frame_rate = model.sample_rate, channels, model.frame_rate
        self.mono_K, self.K, self.card = K, K * channels, model.quantizer.bins
        self.dim = model.quantizer.dimension * channels
        self.hop = self.sample_rate // self.frame_rate
        digest = hashlib.sha256(getattr(model, "pad_mode", "").encode())
        for key, tensor in sorted(model.state_dict().items()):
            digest.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
        self.id = f"{name.split(':')[0]}{'-stereo' * (channels - 1)}-K{self.K}-{digest.hexdigest()[:8]}"

    def describe(self):
        """What a data set and a checkpoint hold of it."""
        keys = ("name", "id", "K", "card", "frame_rate", "dim", "channels")
        return {key: getattr(self, key) for key in keys}

    def to(self, device):
        self.model.to(device)
        return self

    @property
    def device(self):
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode(self, wav):
        """wav [B, channels, samples] at `sample_rate` -> codes int64 [B, K, ceil(samples / hop)].

        A wav that peaks above 1 is scaled down to 1 first, as many published tracks clip the codec otherwise.
        """
        with torch.autocast(self.device.type, enabled=False):
            wav = wav.to(self.device, torch.float32)
            wav = wav / wav.abs().amax((1, 2), keepdim=True).clamp(min=1)
            latents = self.model.encoder(wav.flatten(0, 1)[:, None])
            codes = self.model.quantizer.vq.encode(latents, n_q=self.mono_K).transpose(0, 1)
            return codes.unflatten(0, (-1, self.channels)).transpose(1, 2).flatten(1, 2)

    @torch.no_grad()
    def latents(self, codes):
        """codes [B, K, T] -> the sum of their codebook vectors, float32 [B, dim, T], one channel's after another's."""
        with torch.autocast(self.device.type, enabled=False):
            mono = codes.to(self.device).unflatten(1, (-1, self.channels)).permute(1, 0, 2, 3).flatten(1, 2)
            return self.model.quantizer.decode(mono).unflatten(0, (-1, self.channels)).flatten(1, 2)

    @torch.no_grad()
    def decode(self, codes):
        """codes [B, K, T] -> wav float32 [B, channels, T * hop]."""
        latents = self.latents(codes)
        with torch.autocast(self.device.type, enabled=False):
            wav = self.model.decoder(latents.unflatten(1, (self.channels, -1)).flatten(0, 1))
            return wav.unflatten(0, (-1, self.channels))[:, :, 0]

    def vectors(self):
        """float32 [K, card, dim]: what each code adds to the latents."""
        mono = torch.stack([layer.codebook for layer in self.model.quantizer.vq.layers[: self.mono_K]])
        ours = torch.eye(self.channels, device=self.device)[:, None, :, None]  # a channel's place in the latents
        return (mono[:, None, :, None] * ours).flatten(3).flatten(0, 1)


def windows(blocks, step, side):
    """Blocks [channels, any] of one wav, as they come -> (samples before, [channels, any]) for every `step` samples.

    Each comes with up to `side` samples on either side; `before` says how many stand before its own.
    """
    wav, before = None, 0
    for block in itertools.chain(blocks, [None]):
        ended = block is None
        if not ended:
            wav = block if wav is None else torch.cat([wav, block], dim=1)
        while wav.shape[1] >= before + step + side or (ended and wav.shape[1] > before):
            yield before, wav[:, : before + step + side]
            dropped = max(0, before + step - side)
            wav, before = wav[:, dropped:], before + step - dropped


def encode_long(codec, wav, piece=30.0, context=1.0):
    """wav [channels, samples] of any length -> codes [K, T], in pieces of `piece` seconds, to bound the memory.

    Each piece is encoded with `context` seconds on either side, whose codes are dropped, so that no seam is heard.
    """
    step, side = (round(seconds * codec.frame_rate) for seconds in (piece, context))
    pieces = windows([wav / wav.abs().max().clamp(min=1)], step * codec.hop, side * codec.hop)
    codes = [codec.encode(wav[None])[0, :, before // codec.hop :][:, :step] for before, wav in pieces]
    return torch.cat(codes, dim=1)


def decode_stream(codec, parts, n=25):
    """Codes [B, K, any], as they come -> wav [B, channels, n * hop], as it comes; all together `decode` of all codes.

    Each part is decoded with the frames around it that it depends on, so that no seam is heard: it comes once
    `codec.ahead` frames more than its own are known. The last one has what is left.
    """
    codes, decoded = None, 0  # the codes still needed, of which the first `decoded` frames were yielded
    for part in parts:
        codes = part if codes is None else torch.cat([codes, part], dim=2)
        while codes.shape[2] >= decoded + n + codec.ahead:
            wav = codec.decode(codes[:, :, : decoded + n + codec.ahead])
            yield wav[:, :, decoded * codec.hop : (decoded + n) * codec.hop]
            dropped = max(0, decoded + n - codec.behind) // codec.period * codec.period
            codes, decoded = codes[:, :, dropped:], decoded + n - dropped
    yield codec.decode(codes)[:, :, decoded * codec.hop :]


# -------------------------------------------------------------------------------------------------------- loading


def describe_codec(name):
    """A codec's name -> what `Codec.describe` says of it but for its id: name, K, card, frame_rate, dim, channels.

    Raises UserError for a name or a bandwidth that will not do, saying what would.
    """
    base, *options = name.split(":")
    channels = 1 + (options[-1:] == ["stereo"])
    kbps = ":".join(options[: len(options) - channels + 1])
    if base == "encodec_48khz":
        raise UserError(f"codec '{name}': renormalises loudness, for which the language model has no place; take 24khz")
    if base not in CODECS or (kbps and base != "encodec_24khz"):
        raise UserError(
            f"unknown codec '{name}': choose tiny, encodec_24khz[:1.5|3|6|12] or musicgen_32khz, maybe with :stereo"
        )
    if kbps and kbps not in BANDWIDTHS:
        raise UserError(f"codec '{name}': bandwidth must be one of {', '.join(BANDWIDTHS)} kbps")
    K, card, frame_rate, dim = CODECS[base]
    K = BANDWIDTHS[kbps] if kbps else K
    return dict(name=name, K=K * channels, card=card, frame_rate=frame_rate, dim=dim * channels, channels=channels)


def load_codec(name, weights=""):
    """The codec called `name`: 'tiny', 'encodec_24khz' with an optional bandwidth in kbps, 'encodec_24khz:3', or
    'musicgen_32khz'; any of them with ':stereo' after it.

    `weights` is a file. Raises UserError for a name, a file or a bandwidth that will not do, saying what would.
    """
    description = describe_codec(name)
    channels = description["channels"]
    K = description["K"] // channels
    if name.startswith("tiny"):
        model = tiny.load_tiny(weights or tiny.WEIGHTS)
        return Codec(name, model, K, model.reach, model.reach, tiny.PERIOD, channels)
    if name.startswith("encodec_24khz"):
        # It is causal, but for the reflection at the start. Its LSTM hears all that was; two seconds are taken for all.
        return Codec(name, load_encodec_24khz(weights), K, behind=150, ahead=7, channels=channels)
    model = load_musicgen_32khz(weights)
    return Codec(name, model, model.quantizer.n_q, behind=100, ahead=6, channels=channels)


def load_encodec_24khz(weights):
    url = "https://dl.fbaipublicfiles.com/encodec/v0/encodec_24khz-d7cc33bc.th"
    model = EncodecModel.encodec_model_24khz(pretrained=False)
    try:
        if weights:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        model.load_state_dict(state)
    except FileNotFoundError:
        raise UserError(f"{weights}: no such file; it should be {url}") from None
    except OSError as error:
        raise UserError(
            f"encodec_24khz cannot be downloaded ({error}); fetch {url} on another machine"
            f" and pass --codec_weights=FILE, or use --codec=tiny"
        ) from None
    except Exception as error:
        raise UserError(f"{weights}: not the weights of encodec_24khz ({first_line(error)})") from None
    return model


def load_musicgen_32khz(path):
    """MusicGen's codec from the safetensors that `python -m tools.convert codec` writes of the published weights."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            state, pad_mode = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["pad_mode"]
        return build_musicgen_32khz(state, pad_mode)
    except Exception as error:
        raise UserError(
            f"codec musicgen_32khz: {path or 'no weights'} ({first_line(error)}); make them with:"
            f" python -m tools.convert codec PUBLISHED FILE.safetensors, and give --codec_weights=FILE.safetensors"
        ) from None


def build_musicgen_32khz(state, pad_mode):
    """MusicGen's codec of encodec's own modules, not causal (arXiv:2306.05284, section 3.1), from its state dict."""
    codebooks = [tensor for name, tensor in state.items() if name.endswith("_codebook.embed")]
    card, dimension = codebooks[0].shape
    sizes = dict(n_filters=len(state["encoder.model.0.conv.conv.weight_v"]), dimension=dimension, ratios=[8, 5, 4, 4],
                 lstm=2, causal=False, true_skip=True, norm="weight_norm", pad_mode=pad_mode)  # fmt: skip
    quantizer = ResidualVectorQuantizer(dimension=dimension, n_q=len(codebooks), bins=card)
    model = EncodecModel(SEANetEncoder(**sizes), SEANetDecoder(**sizes), quantizer, [2.2], 32_000, 1)
    model.pad_mode = pad_mode
    model.load_state_dict(state)
    return model


# ---------------------------------------------------------------------------------------------------- audio files


def load_audio(path, sample_rate, channels=1, samples=None):
    """An audio file, or its first `samples`, as float32 [channels, samples] at `sample_rate`.

    Raises UserError if it cannot be read.
    """
    blocks, read = [], 0
    for block in read_blocks(path, sample_rate, channels):
        blocks.append(block)
        read += block.shape[1]
        if samples and read >= samples:
            break
    return torch.cat(blocks, dim=1)[:, :samples]


def read_blocks(path, sample_rate, channels=1, seconds=10):
    """`load_audio` in blocks of ten seconds, so that a file of any length needs little memory."""
    samples = heard = 0
    try:
        with open_audio(path) as file:
            rate, ended = file.samplerate, False
            resampler = soxr.ResampleStream(rate, sample_rate, channels, dtype="float32")
            while not ended:
                wav = file.read(seconds * rate, dtype="float32", always_2d=True)
                ended = len(wav) < seconds * rate
                heard += len(wav)
                if not np.isfinite(wav).all():
                    raise UserError(f"{path}: holds samples that are not numbers")
                wav = resampler.resample_chunk(to_channels(wav, channels), last=ended)
                if not np.isfinite(wav).all():
                    raise UserError(f"{path}: holds samples too large to be music")
                samples += len(wav)
                if len(wav):
                    yield torch.from_numpy(wav.T.copy())
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path}: cannot be read as audio ({str(error).split(': ')[-1].strip()})") from None
    if not heard:
        raise UserError(f"{path}: holds no samples")
    if not samples:
        raise UserError(f"{path}: too short, not one sample long at {sample_rate} Hz")
    if Path(path).suffix.lower() == ".mp3" and (whole := mp3_seconds(path)) > 1.02 * heard / rate + 0.2:
        raise UserError(f"{path}: its header tells of {heard / rate:.1f} s, and it holds {whole:.1f} s; convert it")


def open_audio(path):
    """A SoundFile. A WAV whose header tells of 0 bytes, as a pipe or a recording that broke off leaves it, has all."""
    file = soundfile.SoundFile(os.fsencode(path))
    if file.frames:
        return file
    with open(path, "rb") as raw:
        content = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)  # what is changed in it stays out of the file
    data = content.find(b"data", 12)
    if content[:4] != b"RIFF" or data < 0 or content[data + 4 : data + 8] != bytes(4):
        return file
    for at in (4, data + 4):
        content[at : at + 4] = min(len(content) - at - 4, 2**32 - 1).to_bytes(4, "little")
    return soundfile.SoundFile(content)


def mp3_seconds(path):
    """What the frames of an MP3 add up to (ISO 11172-3, 13818-3): libsndfile goes by its header, which may be wrong.

    After what is no frame, such as a tag, only two frames in a row are taken for frames: pictures hold such bytes too.
    """
    with open(path, "rb") as file:
        content, at, seconds, in_sync = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), 0, 0.0, False
    if content[:3] == b"ID3":
        a, b, c, d = content[6:10]  # seven bits of the tag's length each
        at = 10 + (a << 21 | b << 14 | c << 7 | d)
    while 0 <= at < len(content) - 3:
        frame = mp3_frame(content[at : at + 3])
        if frame and (in_sync or mp3_frame(content[at + frame[1] : at + frame[1] + 3])):
            seconds, at, in_sync = seconds + frame[0], at + frame[1], True
        else:
            at, in_sync = content.find(b"\xff", at + 1), False
    return seconds


def mp3_frame(header):
    """The first three bytes of an MP3's frame -> (seconds, bytes); None if they are none of one."""
    kbps = {3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
            2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}  # fmt: skip
    mark, second, third = header if len(header) == 3 else (0, 0, 0)
    version, layer, rate, bitrate = second >> 3 & 3, second >> 1 & 3, third >> 2 & 3, third >> 4
    if mark != 255 or second < 224 or version == 1 or layer != 1 or rate == 3 or bitrate in (0, 15):
        return None
    hertz = (44_100, 48_000, 32_000)[rate] >> (2, 0, 1, 0)[version]
    samples = 1152 if version == 3 else 576
    length = samples // 8 * 1000 * kbps[3 if version == 3 else 2][bitrate] // hertz + (third >> 1 & 1)
    return samples / hertz, length


def to_channels(wav, channels):
    """wav [samples, any] -> [samples, channels]."""
    if wav.shape[1] > 2:
        wav = downmix(wav)
    if channels == 1:
        return wav.mean(1, keepdims=True)
    return wav.repeat(channels, 1) if wav.shape[1] == 1 else wav


def downmix(wav):
    """wav [samples, 3 or more channels], in the order of WAV files -> stereo [samples, 2], after ITU-R BS.775.

    The centre and the surrounds count -3 dB, the channel for low frequencies is left out, and nothing can clip.
    """
    n, half = wav.shape[1], 0.5**0.5
    gains = {"L": (1, 0), "R": (0, 1), "C": (half, half), "-": (0, 0), "l": (half, 0), "r": (0, half), "c": (0.5, 0.5)}
    layout = {3: "LRC", 4: "LRlr", 5: "LRClr", 6: "LRC-lr", 7: "LRC-clr", 8: "LRC-lrlr"}.get(n, "LR" * n)[:n]
    matrix = np.array([gains[channel] for channel in layout], dtype=wav.dtype)
    return wav @ (matrix / matrix.sum(0))


def write_audio(path, wav, sample_rate):
    """wav [channels, samples] -> a file of the format that its suffix names, one of FORMATS, whole or not at all.

    Raises UserError if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    samples, kind = wav.clamp(-1, 1).T.cpu().numpy(), FORMATS[path.suffix.lower()]
    try:
        with soundfile.SoundFile(temporary, "w", sample_rate, samples.shape[1], format=kind) as file:
            for start in range(0, len(samples), sample_rate):  # libsndfile's Vorbis overflows its stack on long writes
                file.write(samples[start : start + sample_rate])
        temporary.replace(path)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(
            f"{path}: cannot be written ({first_line(error)}); make room, or choose another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def file_name(caption, seed):
    """A name, without suffix, for the sample of this caption and seed: letters and digits of any script."""
    slug = re.sub(r"\W+", "_", caption.lower())[:60].encode(errors="ignore")[:200].decode(errors="ignore")
    return f"{slug.strip('_') or 'no_caption'}_{seed}"


def mel_spectrogram(wav, sample_rate, n_fft=1024, hop=320, n_mels=80):
    """wav [..., samples] -> magnitude mel spectrogram [..., n_mels, 1 + samples // hop], on the HTK mel scale."""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    hertz = 700 * (10 ** (torch.linspace(0, top, n_mels + 2, device=wav.device) / 2595) - 1)
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, device=wav.device)
    rise = (bins - hertz[:-2, None]) / (hertz[1:-1] - hertz[:-2])[:, None]
    fall = (hertz[2:, None] - bins) / (hertz[2:] - hertz[1:-1])[:, None]
    triangles = torch.minimum(rise, fall).clamp(min=0)  # [n_mels, n_fft // 2 + 1]
    window = torch.hann_window(n_fft, device=wav.device)
    stft = torch.stft(wav.reshape(-1, wav.shape[-1]), n_fft, hop, window=window, return_complex=True)
    return (triangles @ stft.abs()).reshape(*wav.shape[:-1], n_mels, -1)


def draw_spectrogram(path, picture, sample_rate):
    """A log-mel picture of an audio file, low frequencies at the bottom, from -80 to 0 dB of full scale.

    Raises ImportError where Pillow is not installed.
    """
    from PIL import Image, ImageOps

    wav, n_fft = load_audio(path, sample_rate)[0], sample_rate * 64 // 1000
    wav = torch.nn.functional.pad(wav, (0, max(0, n_fft - len(wav))))
    mel = mel_spectrogram(wav, sample_rate, n_fft, hop=sample_rate // 50)
    mel = torch.nn.functional.adaptive_max_pool1d(mel, min(400, mel.shape[1]))
    level = 1 + (mel / (n_fft / 4)).clamp(min=1e-9).log10() / 4  # n_fft / 4: a full-scale sine's
    grey = Image.fromarray((255 * level.clamp(0, 1)).byte().flip(0).numpy())
    image = ImageOps.colorize(grey, black="#000004", mid="#b73779", white="#fcfdbf")
    write_file(Path(picture), functools.partial(image.save, format="png"))
