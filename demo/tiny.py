"""The network of the `tiny` codec: encodec's residual VQ between a ConvNeXt encoder and a Vocos-like decoder.

Made by demo/train_tiny.py; the weights are demo/tiny.pt, and demo/README.md is their card.

Letters: B batch, T frames, D width, K codebooks.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from encodec.quantization import ResidualVectorQuantizer
from torch import nn

from common import UserError, first_line

WEIGHTS = Path(__file__).parent / "tiny.pt"
CODEC_FORMAT = 1


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


def load_tiny(path):
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("codec_format") != CODEC_FORMAT:
            raise UserError("not a tiny codec")
        model = TinyCodec(**saved["config"])
        model.load_state_dict({key: value.float() for key, value in saved["model"].items()})
    except FileNotFoundError:
        raise UserError(f"{path}: no such codec file; train one with: python -m demo.train_tiny train MUSIC") from None
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
