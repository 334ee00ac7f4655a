"""The frozen EnCodec (arXiv:2210.13438): a wav becomes K streams of integers, and integers a wav again.

    codec = load_codec("tiny")                      # ships with the repository, no network
    codes = codec.encode(wav)                       # [B, channels, samples] -> int64 [B, K, T]
    wav = codec.decode(codes)                       # [B, K, T] -> [B, channels, T * hop]; decode_stream: bit by bit

    name            rate     frames/s  K                card   weights
    tiny            16 kHz   50        4                512    tiny/codec.pt, made by train_codec.py
    encodec_24khz   24 kHz   75        2, 4, 8 or 16    1024   published, from the network, a file or a folder
    musicgen_32khz  32 kHz   50        4                2048   published, from a file, a folder or a hub (weights.py)

All are mono. With ':stereo' after the name, left and right pass through the same codec, and their codes interleave:
2K streams, left and right of the first codebook, of the second, and so on, as in MusicGen's stereo models.

Letters: B batch, K codebooks, T frames, D latent width, F frequency bins.
"""

import contextlib
import hashlib
import importlib.machinery
import math
import os
import re
import sys
import types
import urllib.error
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from torch import nn

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):
    # encodec imports torchaudio, yet nothing used here calls it; an empty module stands in where no build fits torch.
    placeholder = types.ModuleType("torchaudio")
    placeholder.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = placeholder

from encodec import EncodecModel  # noqa: E402
from encodec.modules import SEANetDecoder, SEANetEncoder  # noqa: E402
from encodec.quantization import ResidualVectorQuantizer  # noqa: E402

from config import UserError, first_line  # noqa: E402
from weights import read_codec  # noqa: E402

TINY_WEIGHTS = Path(__file__).parent / "tiny" / "codec.pt"
CODEC_FORMAT = 1
# Codebooks, codes in each, frames a second, width of the latents.
CODECS = {"tiny": (4, 512, 50, 64), "encodec_24khz": (8, 1024, 75, 128), "musicgen_32khz": (4, 2048, 50, 128)}
BANDWIDTHS = {"1.5": 2, "3": 4, "6": 8, "12": 16}  # of encodec_24khz, in kbps: codebooks
SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus"}
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}  # that are written, libsndfile's names


def load_audio(path, sample_rate, channels=1):
    """An audio file as float32 [channels, samples] at `sample_rate`; raises UserError if it cannot be read."""
    try:
        wav, rate = soundfile.read(os.fsencode(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path}: cannot be read as audio ({str(error).split(': ')[-1].strip()})") from None
    if not len(wav):
        raise UserError(f"{path}: holds no samples")
    if not np.isfinite(wav).all():
        raise UserError(f"{path}: holds samples that are not numbers")
    if channels == 1:
        wav = wav.mean(1, keepdims=True)
    elif wav.shape[1] != channels:
        wav = wav[:, :1].repeat(channels, 1)
    wav = soxr.resample(wav, rate, sample_rate).T
    if not wav.size:
        raise UserError(f"{path}: too short, not one sample long at {sample_rate} Hz")
    if not np.isfinite(wav).all():
        raise UserError(f"{path}: holds samples too large to be music")
    return torch.from_numpy(np.ascontiguousarray(wav, dtype=np.float32))


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
    """A name, without suffix, for the clip of this caption and seed: letters and digits of any script."""
    slug = re.sub(r"\W+", "_", caption.lower())[:60].encode(errors="ignore")[:200].decode(errors="ignore")
    return f"{slug.strip('_') or 'no_caption'}_{seed}"


def write_wav(folder, caption, seed, wav, sample_rate, suffix=""):
    """wav [channels, samples] -> folder/CAPTION_SEED.wav, any `suffix` before the dot; returns the path."""
    return write_audio(Path(folder, f"{file_name(caption, seed)}{suffix}.wav"), wav, sample_rate)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a pointwise MLP, on [B, D, T] (ConvNeXt, arXiv:2201.03545)."""

    def __init__(self, dim, hidden, layers):
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.scale = nn.Parameter(torch.full((dim,), 1 / layers))

    def forward(self, x):
        h = self.norm(self.depthwise(x).transpose(1, 2))
        return x + (self.scale * self.down(F.gelu(self.up(h)))).transpose(1, 2)


class TinyEncoder(nn.Module):
    """Log-magnitude STFT frames -> latents: [B, 1, samples] -> [B, D, T]. Only the magnitude is heard."""

    def __init__(self, n_fft, hop, dim, hidden, layers, latent):
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.inp = nn.Conv1d(n_fft // 2 + 1, dim, 3, padding=1)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(dim, hidden, layers) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, latent)

    def forward(self, wav):
        wav = F.pad(wav[:, 0], (0, -wav.shape[-1] % self.hop))
        side = (self.n_fft - self.hop) // 2  # so that frame t is centred on its own hop and T = samples / hop
        wav = F.pad(wav, (side, side))
        stft = torch.stft(wav, self.n_fft, self.hop, window=self.window, center=False, return_complex=True)
        x = self.inp(stft.abs().clamp(min=1e-4).log())
        return self.out(self.norm(self.blocks(x).transpose(1, 2))).transpose(1, 2)


class TinyDecoder(nn.Module):
    """Latents -> magnitude and phase -> inverse STFT (Vocos, arXiv:2306.00814): [B, D, T] -> [B, 1, T * hop]."""

    def __init__(self, n_fft, hop, dim, hidden, layers, latent):
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.inp = nn.Conv1d(latent, dim, 7, padding=3)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(dim, hidden, layers) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, n_fft + 2)

    def forward(self, latents):
        x = self.norm(self.blocks(self.inp(latents)).transpose(1, 2))
        log_magnitude, phase = self.out(x).transpose(1, 2).chunk(2, dim=1)
        spectrum = torch.polar(log_magnitude.clamp(max=7).exp(), phase)
        frames = torch.fft.irfft(spectrum, self.n_fft, dim=1) * self.window[:, None]
        length = self.n_fft + self.hop * (frames.shape[-1] - 1)
        weight = self.window.square()[:, None].expand(-1, frames.shape[-1])[None]
        fold = dict(output_size=(1, length), kernel_size=(1, self.n_fft), stride=(1, self.hop))
        wav = F.fold(frames, **fold) / F.fold(weight, **fold).clamp(min=1e-8)
        side = (self.n_fft - self.hop) // 2
        return wav[:, :, 0, side:-side]


class TinyCodec(nn.Module):
    """Frames in, frames out, with encodec's own residual VQ between; the same three parts as `EncodecModel`."""

    sample_rate, channels, frame_rate = 16_000, 1, 50

    def __init__(self, n_fft=1024, hop=320, dim=192, hidden=576, encoder_layers=4, decoder_layers=6,
                 latent=64, K=4, card=512):  # fmt: skip
        super().__init__()
        self.config = dict(n_fft=n_fft, hop=hop, dim=dim, hidden=hidden, encoder_layers=encoder_layers,
                           decoder_layers=decoder_layers, latent=latent, K=K, card=card)  # fmt: skip
        self.encoder = TinyEncoder(n_fft, hop, dim, hidden, encoder_layers, latent)
        # A batch holds about 1.5 frames per code, so encodec's default threshold of 2 would expire codes in use.
        self.quantizer = ResidualVectorQuantizer(latent, n_q=K, bins=card, kmeans_iters=10, threshold_ema_dead_code=0.1)
        self.decoder = TinyDecoder(n_fft, hop, dim, hidden, decoder_layers, latent)
        self.reach = 3 * (1 + decoder_layers) + math.ceil((n_fft - hop) / (2 * hop))  # frames heard on either side


class Codec:
    """A frozen codec in float32 and eval mode, whatever autocast surrounds it.

    Attributes: name (as `load_codec` takes it), sample_rate (Hz), frame_rate (frames/s), hop (samples per frame),
    channels, K (of all channels together), card, dim (width of the latents, likewise), and id, which goes into shards
    and checkpoints so that codes never meet a model of another codec.
    behind and ahead: the frames before and after one that its samples depend on, as far as `decode_stream` looks.
    """

    def __init__(self, name, model, books, behind, ahead, channels=1):
        self.name, self.behind, self.ahead = name, behind, ahead
        self.model = model.float().eval().requires_grad_(False)
        self.sample_rate, self.channels, self.frame_rate = model.sample_rate, channels, model.frame_rate
        self.books, self.K, self.card = books, books * channels, model.quantizer.bins
        self.dim = model.quantizer.dimension * channels
        self.hop = self.sample_rate // self.frame_rate
        digest = hashlib.sha256(getattr(model, "pad_mode", "").encode())
        for key, tensor in sorted(model.state_dict().items()):
            digest.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
        self.id = f"{name.split(':')[0]}{'-stereo' * (channels - 1)}-K{self.K}-{digest.hexdigest()[:8]}"

    def about(self):
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
            codes = self.model.quantizer.vq.encode(latents, n_q=self.books).transpose(0, 1)
            return codes.unflatten(0, (-1, self.channels)).transpose(1, 2).flatten(1, 2)

    def mono(self, codes):
        """codes [B, K, T] -> those of each channel, [books, B * channels, T]."""
        return codes.to(self.device).unflatten(1, (-1, self.channels)).permute(1, 0, 2, 3).flatten(1, 2)

    @torch.no_grad()
    def latents(self, codes):
        """codes [B, K, T] -> the sum of their codebook vectors, float32 [B, dim, T], one channel's after another's."""
        with torch.autocast(self.device.type, enabled=False):
            return self.model.quantizer.decode(self.mono(codes)).unflatten(0, (-1, self.channels)).flatten(1, 2)

    def vectors(self):
        """float32 [K, card, dim]: what each code adds to the latents."""
        books = torch.stack([layer.codebook for layer in self.model.quantizer.vq.layers[: self.books]])
        ours = torch.eye(self.channels, device=self.device)[:, None, :, None]  # a channel's place in the latents
        return (books[:, None, :, None] * ours).flatten(3).flatten(0, 1)

    @torch.no_grad()
    def decode(self, codes):
        """codes [B, K, T] -> wav float32 [B, channels, T * hop]."""
        latents = self.latents(codes)
        with torch.autocast(self.device.type, enabled=False):
            wav = self.model.decoder(latents.unflatten(1, (self.channels, -1)).flatten(0, 1))
            return wav.unflatten(0, (-1, self.channels))[:, :, 0]


def encode_long(codec, wav, piece=30.0, context=1.0):
    """wav [channels, samples] of any length -> codes [K, T]."""
    return encode_many(codec, [wav], piece, context)[0]


def encode_many(codec, wavs, piece=30.0, context=1.0, batch=16):
    """wavs [channels, samples], each of any length -> codes [K, T] of each, in pieces of `piece` seconds.

    Each piece is encoded with `context` seconds on either side, whose codes are dropped, so that no seam is heard.
    Pieces of one length go through the codec together, at most `batch` of them, so that no padding is heard either.
    """
    hop, step, side = codec.hop, round(piece * codec.frame_rate), round(context * codec.frame_rate)
    wavs = [wav / wav.abs().max().clamp(min=1) for wav in wavs]
    lengths = [math.ceil(wav.shape[1] / hop) for wav in wavs]
    places = [(i, start) for i, T in enumerate(lengths) for start in range(0, T, step)]
    heard = {(i, start): wavs[i][:, max(0, start - side) * hop : (start + step + side) * hop] for i, start in places}
    alike, codes = {}, {}
    for place in places:
        alike.setdefault(heard[place].shape[1], []).append(place)
    for group in alike.values():
        for first in range(0, len(group), batch):
            together = group[first : first + batch]
            codes.update(zip(together, codec.encode(torch.stack([heard[place] for place in together]))))
    for i, start in places:
        before = start - max(0, start - side)
        codes[i, start] = codes[i, start][:, before : before + min(step, lengths[i] - start)]
    return [torch.cat([codes[i, start] for start in range(0, T, step)], dim=1) for i, T in enumerate(lengths)]


def decode_stream(codec, parts, n=25):
    """Codes [B, K, any], bit by bit -> wav [B, channels, n * hop], bit by bit; together they are `decode` of all codes.

    Each is decoded with the frames around it that it depends on, so that no seam is heard: it comes once `codec.ahead`
    frames more than its own are known. The last one has what is left. Pieces that grew would let a player run dry where
    music is made hardly faster than it plays.
    """
    codes, behind = None, 0  # what is still needed, of which `behind` frames are decoded already
    for part in parts:
        codes = part if codes is None else torch.cat([codes, part], dim=2)
        while codes.shape[2] >= behind + n + codec.ahead:
            wav = codec.decode(codes[:, :, : behind + n + codec.ahead])
            yield wav[:, :, behind * codec.hop : (behind + n) * codec.hop]
            kept = min(behind + n, codec.behind)
            codes, behind = codes[:, :, behind + n - kept :], kept
    yield codec.decode(codes)[:, :, behind * codec.hop :]


def describe_codec(name):
    """A codec's name -> what `Codec.about` says of it but for its id: name, K, card, frame_rate, dim, channels.

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
    books, card, frame_rate, dim = CODECS[base]
    if kbps:
        if kbps not in BANDWIDTHS:
            raise UserError(f"codec '{name}': bandwidth must be one of {', '.join(BANDWIDTHS)} kbps")
        books = BANDWIDTHS[kbps]
    return dict(name=name, K=books * channels, card=card, frame_rate=frame_rate, dim=dim * channels, channels=channels)


def load_codec(name, weights=""):
    """The codec called `name`: 'tiny', 'encodec_24khz' with an optional bandwidth in kbps, 'encodec_24khz:3', or
    'musicgen_32khz'; any of them with ':stereo' after it.

    `weights` is a file, or a folder that holds the file, for when the network is out of reach.
    Raises UserError for a name, a file or a bandwidth that will not do, saying what would.
    """
    about = describe_codec(name)
    channels = about["channels"]
    books = about["K"] // channels
    if name.startswith("tiny"):
        model = load_tiny(weights or TINY_WEIGHTS)
        return Codec(name, model, books, behind=model.reach, ahead=model.reach, channels=channels)
    if name.startswith("encodec_24khz"):
        # It is causal, but for the reflection at the start. Its LSTM hears all that was; two seconds are taken for all.
        return Codec(name, load_encodec_24khz(weights), books, behind=150, ahead=7, channels=channels)
    if not weights:
        raise UserError(
            "codec musicgen_32khz: give its published weights, --codec_weights=PATH to compression_state_dict.bin of"
            " facebook/musicgen-small or to the safetensors of facebook/encodec_32khz; or hf:facebook/encodec_32khz"
            " for PATH, where huggingface_hub is installed and can reach it"
        )
    model = read_codec(weights, build_musicgen_32khz)
    return Codec(name, model, model.quantizer.n_q, behind=100, ahead=6, channels=channels)


def build_musicgen_32khz(n_filters=64, dimension=128, card=2048, K=4, pad_mode="reflect"):
    """MusicGen's codec of encodec's own modules, not causal, with random weights (arXiv:2306.05284, section 3.1)."""
    sizes = dict(n_filters=n_filters, dimension=dimension, ratios=[8, 5, 4, 4], lstm=2, causal=False, true_skip=True,
                 norm="weight_norm", pad_mode=pad_mode)  # fmt: skip
    quantizer = ResidualVectorQuantizer(dimension=dimension, n_q=K, bins=card)
    model = EncodecModel(SEANetEncoder(**sizes), SEANetDecoder(**sizes), quantizer, [2.2], 32_000, 1)
    model.pad_mode = pad_mode
    return model


def load_tiny(path):
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("codec_format") != CODEC_FORMAT:
            raise UserError("not a tiny codec")
        model = TinyCodec(**saved["config"])
        model.load_state_dict({key: value.float() for key, value in saved["model"].items()})
    except FileNotFoundError:
        raise UserError(f"{path}: no such codec file; train one with train_codec.py") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a tiny codec ({first_line(error)})") from None
    return model


def save_tiny(model, path, **about):
    """In half precision, and without the codebooks' running averages, which only training needs: zeros stand there."""
    state = {key: value.half() for key, value in model.state_dict().items()}
    for key in state:
        if key.endswith(("embed_avg", "cluster_size")):
            state[key] = torch.zeros(1, dtype=torch.half).expand_as(state[key])
    torch.save({"codec_format": CODEC_FORMAT, "config": model.config, "model": state, "about": about}, path)


def load_encodec_24khz(weights):
    url = "https://dl.fbaipublicfiles.com/encodec/v0/"
    filename = "encodec_24khz-d7cc33bc.th"
    model = EncodecModel.encodec_model_24khz(pretrained=False)
    try:
        if weights:
            path = Path(weights) / filename if Path(weights).is_dir() else Path(weights)
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(url + filename, map_location="cpu", check_hash=True)
        model.load_state_dict(state)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; it should be {url + filename}") from None
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"encodec_24khz cannot be downloaded ({error}); fetch {url + filename} on another machine"
            f" and pass --codec_weights=FILE, or use --codec=tiny"
        ) from None
    except Exception as error:
        raise UserError(f"{weights}: not the weights of encodec_24khz ({first_line(error)})") from None
    return model


def mel_filters(sample_rate, n_fft, n_mels):
    """Triangular filters on the HTK mel scale, float32 [n_mels, n_fft // 2 + 1]."""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    hertz = 700 * (10 ** (torch.linspace(0, top, n_mels + 2) / 2595) - 1)
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    rise = (bins - hertz[:-2, None]) / (hertz[1:-1] - hertz[:-2])[:, None]
    fall = (hertz[2:, None] - bins) / (hertz[2:] - hertz[1:-1])[:, None]
    return torch.minimum(rise, fall).clamp(min=0)


def mel_spectrogram(wav, sample_rate, n_fft=1024, hop=320, n_mels=80):
    """wav [..., samples] -> magnitude mel spectrogram [..., n_mels, 1 + samples // hop]."""
    shape = wav.shape[:-1]
    window = torch.hann_window(n_fft, device=wav.device)
    stft = torch.stft(wav.reshape(-1, wav.shape[-1]), n_fft, hop, window=window, return_complex=True)
    mel = mel_filters(sample_rate, n_fft, n_mels).to(wav.device) @ stft.abs()
    return mel.reshape(*shape, n_mels, -1)
