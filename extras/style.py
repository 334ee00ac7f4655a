"""The style condition (MusicGen-Style, arXiv:2407.12563, section 3): music that sounds like a given excerpt.

Imported only if the setting `style` is on.

Letters: B batch, K codebooks of the codec, N frames of the excerpt, D model width, P prefix positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import distributed
from common import UserError

RATE = 5  # prefix positions per second, about


class ResidualVQ(nn.Module):
    """Batch norm without affine parameters, then residual vector quantization (SoundStream, arXiv:2107.03312).

    Neither has trained parameters. Both use running sums over the training vectors, which decay by `decay` per step: a
    code is the mean of the vectors that chose it (arXiv:1711.00937, appendix A.1). `forward` reads the sums, and in
    training collects new ones. `update` adds them once per optimizer step. So a sample never depends on its neighbours,
    nor a run on its micro-batches and ranks.
    """

    decay = 0.99
    dead = 0.1  # a code whose count is below this share of the mean is replaced, about 230 steps after its last vector
    spares = 8  # vectors of each sample, evenly spaced in time, that may replace dead codes

    def __init__(self, dim, codebooks, bins):
        super().__init__()
        self.register_buffer("moments", torch.tensor([1e-3, 0, 1e-3])[:, None].repeat(1, dim))  # sums of 1, x, x^2
        self.register_buffer("counts", torch.zeros(codebooks, bins))  # vectors that chose each code
        self.register_buffer("sums", torch.zeros(codebooks, bins, dim))
        self.discard()

    def discard(self):
        """Discard the statistics collected since the last update."""
        self.collected, self.spare_vectors, self.spare_is_real = [0, 0, 0], [], []

    def forward(self, x, mask, codebooks):
        """x [B, N, dim], mask bool [B, N], codebooks int64 [B] -> x normalized and quantized, float32 [B, N, dim].

        Sample b uses the first codebooks[b] codebooks. The gradient passes straight through (arXiv:1308.3432).
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            mean, square = self.moments[1:] / self.moments[0]
            normal = (x - mean) / (square - mean.square()).clamp(min=1e-5).sqrt()
            residual, quantized, residuals, choices = normal.detach(), 0, [], []
            for codebook, vectors in enumerate(self.sums / self.counts.clamp(min=1e-9)[..., None]):
                choice = (vectors.square().sum(1) - 2 * residual @ vectors.T).argmin(-1)  # the nearest code
                residuals.append(residual)
                choices.append(choice)
                quantized = quantized + vectors[choice] * (codebook < codebooks)[:, None, None]
                residual = residual - vectors[choice]
            if self.training:
                self.collect(x.detach(), mask, residuals, choices)
            return normal + (quantized - normal).detach()

    def collect(self, x, mask, residuals, choices):
        """Collect sums for `update`. Every codebook learns from every sample, even if the sample does not use it."""
        counts = mask.flatten()[:, None].float()  # 1 for a frame, 0 for padding
        x, bins = x.flatten(0, 1), torch.arange(self.counts.shape[1], device=x.device)
        chosen = [((choice.flatten()[:, None] == bins) * counts).T for choice in choices]  # [bins, B N] each
        moments = torch.stack([counts.expand_as(x), x * counts, x.square() * counts]).sum(1)
        sums = [one_hot @ residual.flatten(0, 1) for one_hot, residual in zip(chosen, residuals)]
        new = [moments, torch.stack([one_hot.sum(1) for one_hot in chosen]), torch.stack(sums)]
        self.collected = [total + more for total, more in zip(self.collected, new)]
        samples = torch.arange(len(mask), device=mask.device)[:, None]
        frames = torch.arange(self.spares, device=mask.device) * mask.sum(1, keepdim=True) // self.spares
        self.spare_vectors.append(torch.stack([residual[samples, frames] for residual in residuals], 2).flatten(0, 1))
        self.spare_is_real.append(mask.any(1).repeat_interleave(self.spares))

    @torch.no_grad()
    def update(self):
        """Add the collected sums of all ranks and replace dead codes. Every rank must call this. No host sync."""
        new = [distributed.sum_over_ranks(part) for part in self.collected]
        spare = distributed.concat_over_ranks(torch.cat(self.spare_vectors))  # [n, codebooks, dim] in batch order
        is_real = distributed.concat_over_ranks(torch.cat(self.spare_is_real))
        self.discard()
        any_style = new[0][0, 0] > 0  # a batch without styles changes nothing
        for old, more in zip((self.moments, self.counts, self.sums), new):
            old.mul_(torch.where(any_style, self.decay, 1.0)).add_(more)
        fair_share = self.moments[0, 0] / self.counts.shape[1]
        is_dead = any_style & (self.counts < self.dead * fair_share)
        number = is_dead.cumsum(1) - 1  # the n-th dead code of a codebook becomes the n-th spare vector
        replaced = is_dead & (number < is_real.sum())
        spare = spare[torch.argsort(~is_real, stable=True)].transpose(0, 1)  # real vectors first
        index = number.clamp(0, spare.shape[1] - 1)[..., None].expand_as(self.sums)
        self.counts.copy_(torch.where(replaced, fair_share, self.counts))
        self.sums.copy_(torch.where(replaced[..., None], fair_share * spare.gather(1, index), self.sums))


class StyleEmbedder(nn.Module):
    """Codes of an excerpt -> codec latents -> small transformer -> ResidualVQ -> prefix [B, P, D], about 5 per second.

    codec_info: from `Codec.info`. `set_codec` copies the codec's codebook vectors, which are part of every checkpoint.
    max_seconds: longer excerpts are cut off.
    """

    def __init__(self, D, codec_info, dim, n_heads, n_layers, codebooks, bins, max_seconds):
        super().__init__()
        self.frames, self.stride = round(max_seconds * codec_info["frame_rate"]), round(codec_info["frame_rate"] / RATE)
        if self.frames < 1:
            raise UserError(f"style_seconds: {max_seconds:g} s is shorter than one frame of the codec; use longer ones")
        self.length, self.codebooks, self.K = math.ceil(self.frames / self.stride), codebooks, codec_info["K"]
        self.register_buffer("tables", torch.zeros(codec_info["K"], codec_info["card"], codec_info["dim"]))
        self.inp = nn.Linear(codec_info["dim"], dim)
        self.positions = nn.Parameter(torch.zeros(self.frames, dim))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, n_heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(n_layers)
        )
        self.vq = ResidualVQ(dim, codebooks, bins)
        self.out = nn.Linear(dim, D)
        nn.init.normal_(self.out.bias, std=0.5**0.5)  # as large as the positions, to mark the prefix
        self.null = nn.Parameter(torch.zeros(D))

    def set_codec(self, codec):
        """Copy the codebook vectors of a codec.Codec, whose latents are a sum of one vector per codebook."""
        self.tables.copy_(codec.vectors())

    def tokenize(self, styles):
        """B pairs (codes int [K, n], number of codebooks or None for all), or None -> tensors for `forward`.

        Returns codes int64 [B, K, N], N being the largest n; mask bool [B, N], True for frames; codebooks int64 [B].
        A None sample has no frames, which makes it null.
        """
        excerpts = [torch.as_tensor(style[0])[:, : self.frames] if style else None for style in styles]
        N = max([1, *(excerpt.shape[1] for excerpt in excerpts if excerpt is not None)])
        codes = torch.zeros(len(styles), self.K, N, dtype=torch.int64)
        mask = torch.zeros(len(styles), N, dtype=torch.bool)
        codebooks = torch.full((len(styles),), self.codebooks)
        for row, excerpt in enumerate(excerpts):
            if excerpt is not None:
                codes[row, :, : excerpt.shape[1]] = excerpt
                mask[row, : excerpt.shape[1]] = True
                codebooks[row] = styles[row][1] or self.codebooks
        return codes, mask, codebooks

    def forward(self, codes, mask, codebooks):
        """codes [B, K, N], mask [B, N], codebooks [B] -> [B, P, D]: every `stride`-th frame's style, then `null`."""
        x = sum(F.embedding(codes[:, k], table) for k, table in enumerate(self.tables))
        x = self.inp(x) + self.positions[: codes.shape[2]]
        ignored = ~mask
        ignored[:, 0] = False  # a sample that attends to nothing would be NaN
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=ignored)
        prefix = self.out(self.vq(x, mask, codebooks)[:, :: self.stride])
        rest = self.length - prefix.shape[1]
        is_style = F.pad(mask[:, :: self.stride], (0, rest))[..., None]
        return torch.where(is_style, F.pad(prefix, (0, 0, 0, rest)), self.null.to(prefix.dtype))

    def prefix_positions(self, device):
        """Return zeros, float [P]: a style has no place in time."""
        return torch.zeros(self.length, device=device)
