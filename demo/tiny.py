"""The network of the `tiny` codec: encodec's residual VQ between a ConvNeXt encoder and a decoder like Vocos.

While the codes stay the same, a decoder of spectra repeats one frame, so a held tone becomes a multiple of the frame
rate: 450 Hz instead of 440. This decoder therefore adds oscillators, which continue from frame to frame.

demo/train_tiny.py trains it. The weights are demo/tiny.pt, with demo/README.md as their model card.

Letters: B batch, T frames, D width, K codebooks, N tones.
"""

import io
import math
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from encodec.quantization import ResidualVectorQuantizer
from torch import nn

from common import UserError, first_line, write_file

WEIGHTS = Path(__file__).parent / "tiny.pt"
CODEC_FORMAT = 2
SAMPLE_RATE, FRAME_RATE = 16_000, 50
HOP = SAMPLE_RATE // FRAME_RATE
# Quarter tones from a double bass's lowest note to 2.5 kHz, in Hz, rounded to even numbers: after PERIOD frames, half a
# second, every phase repeats, so a stream can be decoded from any multiple of PERIOD.
TONES = (41.2 * 2 ** (torch.arange(143) / 24) / 2).round().unique() * 2
PERIOD = FRAME_RATE // 2


def log_stft(wav, n_fft, bins=slice(None)):
    """Return the log-magnitudes [B, bins, T] of wav [B, T * HOP]. Frame t is centred on hop t."""
    side, window = (n_fft - HOP) // 2, torch.hann_window(n_fft, device=wav.device)
    stft = torch.stft(F.pad(wav, (side, side)), n_fft, HOP, window=window, center=False, return_complex=True)
    return stft[:, bins].abs().clamp(min=1e-4).log()


def tone_levels(wav, n_fft=4096):
    """Return the log-amplitude of a sinusoid at each of TONES, [B, N, T], in wav [B, T * HOP]."""
    bins = (TONES * n_fft / SAMPLE_RATE).round().long()
    return log_stft(wav, n_fft, bins) - math.log(n_fft / 4)


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
    """wav [B, 1, samples] -> latents [B, D, T], from log-magnitude STFT frames and tone levels. It ignores phase."""

    def __init__(self, n_fft, dim, hidden, layers, latent):
        super().__init__()
        self.n_fft = n_fft
        self.inp = nn.Conv1d(n_fft // 2 + 1, dim, 3, padding=1)
        self.tones = nn.Conv1d(len(TONES), dim, 1)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(dim, hidden, layers) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, latent)

    def forward(self, wav):
        wav = F.pad(wav[:, 0], (0, -wav.shape[-1] % HOP))
        x = self.inp(log_stft(wav, self.n_fft)) + self.tones(tone_levels(wav))
        return self.out(self.norm(self.blocks(x).transpose(1, 2))).transpose(1, 2)


class TinyDecoder(nn.Module):
    """Latents [B, D, T] -> magnitude and phase -> inverse STFT (Vocos, arXiv:2306.00814) -> wav [B, 1, T * HOP].

    It adds a bank of oscillators (DDSP, arXiv:2001.04643), one for each of TONES, with an amplitude for each frame.
    """

    def __init__(self, n_fft, dim, hidden, layers, latent):
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("radians", 2 * math.pi * TONES / SAMPLE_RATE, persistent=False)  # per sample, [N]
        within = torch.arange(n_fft)[:, None] * self.radians
        self.register_buffer("waves", torch.cat([within.cos(), within.sin()], dim=1), persistent=False)  # [n_fft, 2 N]
        self.inp = nn.Conv1d(latent, dim, 7, padding=3)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(dim, hidden, layers) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, n_fft + 2)
        self.tones = nn.Linear(dim, len(TONES))

    def forward(self, latents):
        return self.synthesize(self.features(latents))

    def features(self, latents):
        """latents [B, D, T] -> features [B, T, dim]."""
        return self.norm(self.blocks(self.inp(latents)).transpose(1, 2))

    def synthesize(self, x):
        """features x [B, T, dim] -> wav [B, 1, T * HOP]."""
        log_magnitude, phase = self.out(x).transpose(1, 2).chunk(2, dim=1)
        spectrum = torch.polar(log_magnitude.clamp(max=7).exp(), phase)
        window = self.window[:, None]
        frames = (torch.fft.irfft(spectrum, self.n_fft, dim=1) + window * self.oscillators(self.tones(x))) * window
        length = self.n_fft + HOP * (frames.shape[-1] - 1)
        weight = window.square().expand(-1, frames.shape[-1])[None]
        fold = dict(output_size=(1, length), kernel_size=(1, self.n_fft), stride=(1, HOP))
        wav = F.fold(frames, **fold) / F.fold(weight, **fold).clamp(min=1e-8)
        side = (self.n_fft - HOP) // 2
        return wav[:, :, 0, side:-side]

    def oscillators(self, levels):
        """Log-amplitudes [B, T, N] -> frames [B, n_fft, T], using cos(a + b) = cos a cos b - sin a sin b."""
        amplitude = levels.clamp(max=1).exp()
        start = torch.arange(levels.shape[1], device=levels.device)[:, None] % PERIOD * HOP * self.radians
        return self.waves @ torch.cat([amplitude * start.cos(), -amplitude * start.sin()], dim=2).transpose(1, 2)


class TinyCodec(nn.Module):
    """TinyEncoder, encodec's residual VQ and TinyDecoder, under the names that `EncodecModel` has for its parts."""

    sample_rate, channels, frame_rate = SAMPLE_RATE, 1, FRAME_RATE

    def __init__(self, n_fft=1024, dim=192, hidden=576, encoder_layers=4, decoder_layers=6,
                 latent=64, K=4, card=512):  # fmt: skip
        super().__init__()
        self.config = dict(n_fft=n_fft, dim=dim, hidden=hidden, encoder_layers=encoder_layers,
                           decoder_layers=decoder_layers, latent=latent, K=K, card=card)  # fmt: skip
        self.encoder = TinyEncoder(n_fft, dim, hidden, encoder_layers, latent)
        # A training batch has about 1.5 frames per code, so encodec's default threshold of 2 would replace used codes.
        self.quantizer = ResidualVectorQuantizer(latent, n_q=K, bins=card, kmeans_iters=10, threshold_ema_dead_code=0.1)
        self.decoder = TinyDecoder(n_fft, dim, hidden, decoder_layers, latent)
        self.reach = 3 * (1 + decoder_layers) + math.ceil((n_fft - HOP) / (2 * HOP))  # context, in frames


def load_tiny(path):
    """Load the TinyCodec that `save_tiny` wrote. Raises UserError for a missing, damaged or other file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("codec_format") != CODEC_FORMAT:
            raise UserError("not a tiny codec of this version")
        model = TinyCodec(**saved["config"])
        model.load_state_dict({key: value.float() for key, value in saved["model"].items()})
    except FileNotFoundError:
        raise UserError(f"{path}: no such codec file. Train one with: python -m demo.train_tiny train MUSIC") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a tiny codec ({first_line(error)})") from None
    return model


def save_tiny(model, path, **info):
    """Write a TinyCodec in half precision, compressed. The codebooks' running averages, for training only, become 0."""
    state = {key: value.half() for key, value in model.state_dict().items()}
    for key in state:
        if key.endswith(("embed_avg", "cluster_size")):
            state[key] = torch.zeros(1, dtype=torch.half).expand_as(state[key])
    uncompressed, compressed = io.BytesIO(), io.BytesIO()
    torch.save({"codec_format": CODEC_FORMAT, "config": model.config, "model": state, "about": info}, uncompressed)
    with zipfile.ZipFile(uncompressed) as source, zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    write_file(path, compressed.getvalue())
