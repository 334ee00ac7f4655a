"""The frozen EnCodec (arXiv:2210.13438): encodes a wav as K streams of integers, and decodes them.

    codec = load_codec("tiny")                      # ships with the repository, no network
    codes = codec.encode(wav)                       # [B, channels, samples] -> int64 [B, K, T]
    wav = codec.decode(codes)                       # [B, K, T] -> [B, channels, T * hop]

    name            rate     frames/s  K                card   weights
    tiny            16 kHz   50        4                512    demo/tiny.pt
    encodec_24khz   24 kHz   75        2, 4, 8 or 16    1024   published; downloaded, or from a file
    musicgen_32khz  32 kHz   50        4                2048   published; from a file written by tools/convert.py

All are mono. With ':stereo' after the name, the same codec encodes the left and the right channel. Their codes
interleave as in MusicGen's stereo models: left and right of the first codebook, then of the second, and so on.

Letters: B batch, K codebooks of all channels together, T frames; `card` is the codebook size.
"""

import hashlib
import importlib.util
import itertools
import sys
import warnings
from pathlib import Path

import safetensors
import torch

from common import UserError, first_line

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):
    # encodec imports torchaudio, but the code used here never calls it: an empty module is enough.
    placeholder = importlib.util.spec_from_loader("torchaudio", None)
    sys.modules["torchaudio"] = importlib.util.module_from_spec(placeholder)

warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)  # encodec calls it

from encodec import EncodecModel  # noqa: E402
from encodec.modules import SEANetDecoder, SEANetEncoder  # noqa: E402
from encodec.quantization import ResidualVectorQuantizer  # noqa: E402

from demo import tiny  # noqa: E402

# (K, card, frames/s, width of the latents) of one channel
CODECS = {"tiny": (4, 512, 50, 64), "encodec_24khz": (8, 1024, 75, 128), "musicgen_32khz": (4, 2048, 50, 128)}
BANDWIDTHS = {"1.5": 2, "3": 4, "6": 8, "12": 16}  # encodec_24khz: kbps -> K


class Codec:
    """A frozen codec in float32 and eval mode, also under autocast.

    name                 the name that `load_codec` takes
    id                   names the codec and its weights; stored in data sets and checkpoints, which must agree
    sample_rate, hop     in Hz; samples per frame
    frame_rate           in frames/s
    channels, K, dim     number of channels; codebooks and width of the latents, of all channels together
    past, future         frames before and after a frame that affect its decoded samples, as used by `decode_stream`
    period               frames after which the decoder's oscillators repeat; `decode_stream` cuts at multiples of it
    """

    def __init__(self, name, model, K, past, future, period=1, channels=1):
        self.name, self.past, self.future, self.period = name, past, future, period
        self.model = model.float().eval().requires_grad_(False)
        self.sample_rate, self.channels, self.frame_rate = model.sample_rate, channels, model.frame_rate
        self.mono_K, self.K, self.card = K, K * channels, model.quantizer.bins
        self.dim = model.quantizer.dimension * channels
        self.hop = self.sample_rate // self.frame_rate
        digest = hashlib.sha256(getattr(model, "pad_mode", "").encode())
        for key, tensor in sorted(model.state_dict().items()):
            digest.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
        self.id = f"{name.split(':')[0]}{'-stereo' * (channels - 1)}-K{self.K}-{digest.hexdigest()[:8]}"

    def info(self):
        """Return the dict that data sets and checkpoints store."""
        return {key: getattr(self, key) for key in ("name", "id", "K", "card", "frame_rate", "dim", "channels")}

    def to(self, device):
        self.model.to(device)
        return self

    @property
    def device(self):
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode(self, wav):
        """Encode wav [B, channels, samples] at `sample_rate` as codes int64 [B, K, ceil(samples / hop)].

        A wav with a peak above 1 is first scaled to a peak of 1, because many published tracks would clip.
        """
        with torch.autocast(self.device.type, enabled=False):
            wav = wav.to(self.device, torch.float32)
            wav = wav / wav.abs().amax((1, 2), keepdim=True).clamp(min=1)
            latents = self.model.encoder(wav.flatten(0, 1)[:, None])
            codes = self.model.quantizer.vq.encode(latents, n_q=self.mono_K).transpose(0, 1)
            return codes.unflatten(0, (-1, self.channels)).transpose(1, 2).flatten(1, 2)

    @torch.no_grad()
    def latents(self, codes):
        """Return the summed codebook vectors of codes [B, K, T], float32 [B, dim, T]: left channel, then right."""
        with torch.autocast(self.device.type, enabled=False):
            mono = codes.to(self.device).unflatten(1, (-1, self.channels)).permute(1, 0, 2, 3).flatten(1, 2)
            return self.model.quantizer.decode(mono).unflatten(0, (-1, self.channels)).flatten(1, 2)

    @torch.no_grad()
    def decode(self, codes):
        """Decode codes [B, K, T] to wav float32 [B, channels, T * hop]."""
        latents = self.latents(codes)
        with torch.autocast(self.device.type, enabled=False):
            wav = self.model.decoder(latents.unflatten(1, (self.channels, -1)).flatten(0, 1))
            return wav.unflatten(0, (-1, self.channels))[:, :, 0]

    def vectors(self):
        """Return the vector that each code adds to the latents, float32 [K, card, dim]."""
        mono = torch.stack([layer.codebook for layer in self.model.quantizer.vq.layers[: self.mono_K]])
        is_same_channel = torch.eye(self.channels, device=self.device)[:, None, :, None]
        return (mono[:, None, :, None] * is_same_channel).flatten(3).flatten(0, 1)


def windows(blocks, step, context):
    """Cut a wav, given in blocks [channels, any], into windows of `step` samples, and yield (before, window).

    A window [channels, any] also includes up to `context` samples before and after the `step` samples.
    before: the number of context samples before.
    """
    wav, before = None, 0
    for block in itertools.chain(blocks, [None]):
        is_end = block is None
        if not is_end:
            wav = block if wav is None else torch.cat([wav, block], dim=1)
        while wav.shape[1] >= before + step + context or (is_end and wav.shape[1] > before):
            yield before, wav[:, : before + step + context]
            dropped = max(0, before + step - context)
            wav, before = wav[:, dropped:], before + step - dropped


def encode_long(codec, wav, chunk=30.0, context=1.0):
    """Encode wav [channels, samples] of any length as codes [K, T], in chunks of `chunk` seconds to bound the memory.

    Each chunk is encoded with `context` seconds before and after it, whose codes are dropped, to avoid audible seams.
    """
    step, context = (round(seconds * codec.frame_rate) for seconds in (chunk, context))
    chunks = windows([wav / wav.abs().max().clamp(min=1)], step * codec.hop, context * codec.hop)
    codes = [codec.encode(window[None])[0, :, before // codec.hop :][:, :step] for before, window in chunks]
    return torch.cat(codes, dim=1)


def decode_stream(codec, parts, n=25):
    """Decode a stream of codes, parts [B, K, any], and yield wavs [B, channels, n * hop]; the last has another length.

    Joined, the wavs equal `codec.decode` of all codes. Each wav is decoded with the frames before and after it that
    its samples depend on, so a wav is yielded `codec.future` frames late.
    """
    codes, decoded = None, 0  # codes still needed; how many of their frames are already decoded
    for part in parts:
        codes = part if codes is None else torch.cat([codes, part], dim=2)
        while codes.shape[2] >= decoded + n + codec.future:
            wav = codec.decode(codes[:, :, : decoded + n + codec.future])
            yield wav[:, :, decoded * codec.hop : (decoded + n) * codec.hop]
            dropped = max(0, decoded + n - codec.past) // codec.period * codec.period
            codes, decoded = codes[:, :, dropped:], decoded + n - dropped
    yield codec.decode(codes)[:, :, decoded * codec.hop :]


# -------------------------------------------------------------------------------------------------------- loading


def codec_info(name):
    """Return `Codec.info()` without the id, by the codec's name alone. Raises UserError for an invalid name."""
    base, *options = name.split(":")
    channels = 1 + (options[-1:] == ["stereo"])
    kbps = ":".join(options[: len(options) - channels + 1])
    if base == "encodec_48khz":
        raise UserError(f"codec '{name}': not supported, because it normalizes loudness. Use encodec_24khz:stereo")
    if base not in CODECS or (kbps and base != "encodec_24khz"):
        raise UserError(f"unknown codec '{name}': choose tiny, encodec_24khz[:1.5|3|6|12] or musicgen_32khz,"
                        " optionally followed by :stereo")  # fmt: skip
    if kbps and kbps not in BANDWIDTHS:
        raise UserError(f"codec '{name}': bandwidth must be one of {', '.join(BANDWIDTHS)} kbps")
    K, card, frame_rate, dim = CODECS[base]
    K = BANDWIDTHS.get(kbps, K) * channels
    return dict(name=name, K=K, card=card, frame_rate=frame_rate, dim=dim * channels, channels=channels)


def load_codec(name, weights=""):
    """Load a codec by its name: 'tiny', 'encodec_24khz', 'encodec_24khz:KBPS' or 'musicgen_32khz', and ':stereo'.

    weights: a file. Raises UserError for an invalid name, file or bandwidth.
    """
    info = codec_info(name)
    channels, K = info["channels"], info["K"] // info["channels"]
    if name.startswith("tiny"):
        model = tiny.load_tiny(weights or tiny.WEIGHTS)
        return Codec(name, model, K, model.reach, model.reach, tiny.PERIOD, channels)
    if name.startswith("encodec_24khz"):
        # It is causal, except for the padding at the start. Its LSTM has no limit; 2 s of context are enough.
        return Codec(name, load_encodec_24khz(weights), K, past=150, future=7, channels=channels)
    model = load_musicgen_32khz(weights)
    return Codec(name, model, model.quantizer.n_q, past=100, future=6, channels=channels)


def download(url):
    """Return the path of torch hub's copy of a file whose name ends in "-" and its hash. Download it if necessary."""
    path, expected = Path(torch.hub.get_dir(), "checkpoints", Path(url).name), Path(url).stem.split("-")[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), expected)
        except RuntimeError as error:  # another hash
            raise UserError(f"{url}: damaged download ({first_line(error)}); run the command again") from None
    if not (digest := hashlib.sha256(path.read_bytes()).hexdigest()).startswith(expected):
        raise UserError(f"{path}: damaged (its SHA-256 starts with {digest[:8]}, not {expected}); remove it to download"
                        " it again")  # fmt: skip
    return path


def load_encodec_24khz(weights):
    url = "https://dl.fbaipublicfiles.com/encodec/v0/encodec_24khz-d7cc33bc.th"
    model = EncodecModel.encodec_model_24khz(pretrained=False)
    try:
        model.load_state_dict(torch.load(weights or download(url), map_location="cpu", weights_only=True))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{weights}: no such file. Download {url}") from None
    except OSError as error:
        raise UserError(f"encodec_24khz cannot be downloaded ({error}). Download {url} on another machine"
                        " and pass --codec_weights=FILE, or use --codec=tiny") from None  # fmt: skip
    except Exception as error:
        source = weights or download(url)
        raise UserError(f"{source}: not the weights of encodec_24khz ({first_line(error)}). Download {url} and pass"
                        " --codec_weights=FILE") from None  # fmt: skip
    return model


def load_musicgen_32khz(path):
    """Load MusicGen's codec from the safetensors file that `python -m tools.convert codec` writes."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            state, pad_mode = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["pad_mode"]
        return build_musicgen_32khz(state, pad_mode)
    except Exception as error:
        raise UserError(f"codec musicgen_32khz: {path or 'no weights'} ({first_line(error)}). Write the weights with:"
                        " python -m tools.convert codec PUBLISHED FILE.safetensors, and pass"
                        " --codec_weights=FILE.safetensors") from None  # fmt: skip


def build_musicgen_32khz(state, pad_mode):
    """Build MusicGen's codec, which is not causal (arXiv:2306.05284, section 3.1), from a state dict."""
    codebooks = [tensor for name, tensor in state.items() if name.endswith("_codebook.embed")]
    card, dimension = codebooks[0].shape
    sizes = dict(n_filters=len(state["encoder.model.0.conv.conv.weight_v"]), dimension=dimension, ratios=[8, 5, 4, 4],
                 lstm=2, causal=False, true_skip=True, norm="weight_norm", pad_mode=pad_mode)  # fmt: skip
    quantizer = ResidualVectorQuantizer(dimension=dimension, n_q=len(codebooks), bins=card)
    model = EncodecModel(SEANetEncoder(**sizes), SEANetDecoder(**sizes), quantizer, [2.2], 32_000, 1)
    model.pad_mode = pad_mode
    model.load_state_dict(state)
    return model
