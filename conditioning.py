"""What the music is conditioned on: how each condition is embedded, dropped in training, and fused.

    name     a sample gives                                        fused by
    text     a caption                                             cross-attention
    melody   pitch classes, 8 a second                             rows that are prepended to the sequence
    style    codes of an excerpt, and how many codebooks to keep   rows that are prepended to the sequence

A sample's conditions are a dict, {"text": "slow piano"}; a missing one, or None, is null. So dropping a condition in
training and leaving it out at inference are the same thing, and the null is one learned vector for each name. It
starts at zero: cross-attention to it gives zero, as in MusicGen's unconditional path.

To add a condition: here an embedder like MelodyEmbedder, with `prepare`, `forward` and `rows`, its line in Conditioner,
its place in `Conditioner.positions`, and its draw in `draw_conditions` and `all_conditions`; its value in data.py's
`Tokens.collate`; a setting that switches it on, which SAME_MODEL in train.py names too; an option in sample.py.

Letters: B batch, L condition length in tokens, D model width, T frames, T' chroma frames, M rows of melody, N frames of
an excerpt, P rows prepended.
"""

import math

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import UserError

CHROMA_RATE = 8  # chroma frames a second
SILENCE = 12  # in the place of a pitch class
INFERENCE_CODEBOOKS = 3  # of a style by default, once trained (arXiv:2407.12563)


# ------------------------------------------------------------------------------------------------------ dropping


def merge_text(caption, metadata, rng):
    """The caption, if there is one, and then the other metadata, 'genre: jazz. bpm: 120', in random order."""
    parts = rng.permutation([f"{key}: {value}" for key, value in metadata.items()])
    return ". ".join([caption, *parts] if caption else parts)


def excerpt(frames, seconds, place, codebooks, frame_rate):
    """The style excerpt of an item of so many frames -> (first frame, end, codebooks); at most half of the item.

    place in [0, 1) is where between the item's beginning and the last frame at which it can begin.
    """
    length = max(1, min(round(seconds * frame_rate), frames // 2))
    first = int(place * (frames - length + 1))
    return first, first + length, codebooks


def draw_conditions(caption, metadata, frames, frame_rate, rng, s):
    """Which conditions one training item of so many frames is given, by its own draws from `rng` (numpy Generator).

    With probability `merge_text_p` the metadata joins the caption, and always where there is none; each word is dropped
    with `word_dropout`; text, melody and style are dropped each by its own probability; and all together with
    `cfg_dropout` (classifier-free guidance, arXiv:2207.12598). -> {"text": str or None, "melody": bool, "style": None
    or an `excerpt`, whose length, place and number of codebooks are uniform}.
    """
    merge, drop_all, drop_text = rng.random(3)
    if merge < s.merge_text_p or not caption:
        caption = merge_text(caption, metadata, rng)
    if s.word_dropout:
        words = caption.split()
        caption = " ".join(word for word, draw in zip(words, rng.random(len(words))) if draw >= s.word_dropout)
    drop_melody, drop_style, place, longer = rng.random(4)
    seconds = np.interp(longer, (0, 1), s.style_seconds)
    style = excerpt(frames, seconds, place, int(rng.integers(s.style_codebooks)) + 1, frame_rate)
    kept = drop_all >= s.cfg_dropout
    return {
        "text": caption if kept and drop_text >= s.text_dropout else None,
        "melody": s.melody and kept and drop_melody >= s.melody_dropout,
        "style": style if s.style and kept and drop_style >= s.style_dropout else None,
    }


def all_conditions(caption, frames, frame_rate, s):
    """As `draw_conditions`, but nothing is dropped, and the excerpt is the middle one of mean length."""
    codebooks = min(INFERENCE_CODEBOOKS, s.style_codebooks)
    style = excerpt(frames, np.mean(s.style_seconds), 0.5, codebooks, frame_rate)
    return {"text": caption, "melody": s.melody, "style": style if s.style else None}


# ---------------------------------------------------------------------------------------------------------- text


class TextEmbedder(nn.Module):
    """SentencePiece tokens -> embedding -> a small bidirectional transformer -> [B, L, D] for cross-attention.

    tokenizer: the bytes of a SentencePiece model, trained on the captions of the data set.
    """

    def __init__(self, D, tokenizer, dim, heads, layers, max_tokens):
        super().__init__()
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
        self.max_tokens = max_tokens
        self.embed = nn.Embedding(self.tokenizer.vocab_size(), dim)
        self.positions = nn.Embedding(max_tokens, dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, D)
        self.null = nn.Parameter(torch.zeros(D))
        self.words = frozenset()  # of the captions it was trained with, where they are known

    def prepare(self, texts):
        """B strings or None -> ids int64 [B, L] and mask bool [B, L], True where a token counts.

        None and the empty string have no token that counts, which makes them null. Longer texts are cut off.
        """
        tokens = [self.tokenizer.encode(text or "")[: self.max_tokens] for text in texts]
        L = max([2, *map(len, tokens)])  # torch.compile would make code of its own for 1
        ids = torch.tensor([sample + [0] * (L - len(sample)) for sample in tokens])
        mask = torch.arange(L) < torch.tensor([[len(sample)] for sample in tokens])
        return ids, mask

    def forward(self, ids, mask):
        """ids, mask [B, L] -> states [B, L, D] and the mask to attend with; a null row has one state, `null`."""
        is_null = ~mask.any(1, keepdim=True)
        mask = mask | (is_null & (torch.arange(ids.shape[1], device=ids.device) == 0))
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        states = self.out(self.norm(x))
        return torch.where(is_null[..., None], self.null.to(states.dtype), states), mask


# -------------------------------------------------------------------------------------------------------- melody


def chromagram(wav, sample_rate):
    """wav [B, samples], full scale 1 -> each pitch class's share of a frame's energy, C first: [B, 12, T'].

    8 frames a second, each centred on its own hop of sample_rate // 8 samples: T' = ceil(samples / hop). The window is
    that of MusicGen's melody conditioning (arXiv:2306.05284, section 2.3), 2^14 samples at 32 kHz or 0.512 s: two of
    its bins make a semitone at C2. The bins from C2 to B7 count for the pitch nearest to them, A4 at 440 Hz. A frame
    that is below -60 dB of full scale there is silence: all zeros.
    """
    hop, n_fft = sample_rate // CHROMA_RATE, 2 * round(0.256 * sample_rate)
    side = (n_fft - hop + 1) // 2
    wav = F.pad(wav, (side, side + -wav.shape[1] % hop))
    window = torch.hann_window(n_fft, device=wav.device)
    spectrum = torch.fft.rfft(wav.unfold(1, n_fft, hop) * window)  # [B, T', bins]
    power = spectrum.real.square() + spectrum.imag.square()
    hertz = torch.arange(n_fft // 2 + 1, device=wav.device) * (sample_rate / n_fft)
    pitch = (69 + 12 * (hertz.clamp(min=1) / 440).log2()).round()  # in MIDI's numbers: C2 is 36, C8 108
    fold = (pitch % 12 == torch.arange(12, device=wav.device)[:, None]) & (pitch >= 36) & (pitch < 108)
    energy = (power @ fold.float().T).transpose(1, 2)
    total = energy.sum(1, keepdim=True)
    mean_square = 2 * total / (n_fft * window.square().sum())  # Parseval's theorem
    return torch.where(mean_square > 1e-6, energy / total, 0.0)


def strongest(chroma):
    """Chroma [12, T'] -> the strongest pitch class of each frame, uint8 [T'], or SILENCE."""
    return torch.where(chroma.sum(0) > 0, chroma.argmax(0), SILENCE).to(torch.uint8)


class MelodyEmbedder(nn.Module):
    """Pitch classes -> [B, M, D], to be prepended. A linear map of one-hot chroma is an embedding."""

    def __init__(self, D, rows, frame_rate):
        super().__init__()
        self.rows, self.stride = rows, frame_rate / CHROMA_RATE
        self.embed = nn.Embedding(SILENCE + 1, D)
        nn.init.normal_(self.embed.weight, std=0.5**0.5)  # as large as the positions
        self.null = nn.Parameter(torch.zeros(D))

    def prepare(self, melodies):
        """B rows of pitch classes, C = 0, 12 being silence, or None -> int64 [B, M], -1 where null.

        Rows are cut to M, and filled up with silence.
        """
        notes = torch.full((len(melodies), self.rows), -1)
        for row, melody in enumerate(melodies):
            if melody is not None:
                notes[row] = SILENCE
                notes[row, : len(melody)] = torch.as_tensor(melody)[: self.rows]
        return (notes,)

    def forward(self, notes):
        """notes [B, M] -> [B, M, D]."""
        return torch.where(notes[..., None] < 0, self.null, self.embed(notes.clamp(min=0)))


# --------------------------------------------------------------------------------------------------------- style


class ResidualVQ(nn.Module):
    """Batch norm without affine, then residual vector quantisation (SoundStream's, arXiv:2107.03312, section III-C).

    Neither has parameters. Both follow sums over the vectors of training, which fade by `decay` at each step: a code is
    the mean of the vectors that chose it (arXiv:1711.00937, appendix A.1). `forward` uses the sums as they are, and in
    training collects new ones, which `update` adds once per optimizer step. So a sample does not depend on its
    neighbours, nor a run on its micro-batches and ranks.
    """

    decay = 0.99
    dead = 0.1  # of a fair share of the vectors; a code below is replaced, 230 steps after the last vector chose it
    spares = 8  # vectors of each sample, evenly spaced in time, that may replace dead codes

    def __init__(self, dim, codebooks, bins):
        super().__init__()
        self.register_buffer("moments", torch.tensor([1e-3, 0, 1e-3])[:, None].repeat(1, dim))  # sums of 1, x, x^2
        self.register_buffer("counts", torch.zeros(codebooks, bins))  # of the vectors that chose a code
        self.register_buffer("sums", torch.zeros(codebooks, bins, dim))
        self.discard()

    def discard(self):
        """Forgets what was collected since the last update."""
        self.collected, self.spare_vectors, self.spare_is_real = [0, 0, 0], [], []

    def forward(self, x, mask, codebooks):
        """x [B, N, dim], mask bool [B, N], codebooks int64 [B] -> float32 [B, N, dim]: x, normalised and quantised.

        A sample gets the first `codebooks` of all codebooks. The gradient passes straight through (arXiv:1308.3432),
        from the quantised to the normalised vector.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            mean, square = self.moments[1:] / self.moments[0]
            normal = (x - mean) / (square - mean.square()).clamp(min=1e-5).sqrt()
            residual, quantised, residuals, choices = normal.detach(), 0, [], []
            for number, codes in enumerate(self.sums / self.counts.clamp(min=1e-9)[..., None]):
                choice = (codes.square().sum(1) - 2 * residual @ codes.T).argmin(-1)  # the nearest code
                residuals.append(residual)
                choices.append(choice)
                quantised = quantised + codes[choice] * (number < codebooks)[:, None, None]
                residual = residual - codes[choice]
            if self.training:
                self.collect(x.detach(), mask, residuals, choices)
            return normal + (quantised - normal).detach()

    def collect(self, x, mask, residuals, choices):
        """Keeps sums for `update`. Every codebook learns from every sample, however few the sample was given."""
        counts = mask.flatten()[:, None].float()  # 1 for a frame, 0 for padding
        x, bins = x.flatten(0, 1), torch.arange(self.counts.shape[1], device=x.device)
        chosen = [((choice.flatten()[:, None] == bins) * counts).T for choice in choices]  # [bins, B N] each
        moments = torch.stack([counts.expand_as(x), x * counts, x.square() * counts]).sum(1)
        sums = [one @ residual.flatten(0, 1) for one, residual in zip(chosen, residuals)]
        new = [moments, torch.stack([one.sum(1) for one in chosen]), torch.stack(sums)]
        self.collected = [total + more for total, more in zip(self.collected, new)]
        rows = torch.arange(len(mask), device=mask.device)[:, None]
        frames = torch.arange(self.spares, device=mask.device) * mask.sum(1, keepdim=True) // self.spares
        self.spare_vectors.append(torch.stack([residual[rows, frames] for residual in residuals], 2).flatten(0, 1))
        self.spare_is_real.append(mask.any(1).repeat_interleave(self.spares))

    @torch.no_grad()
    def update(self):
        """Takes in what `forward` has collected; every rank must call it. The host does not wait for the device."""
        new = [common.sum_over_ranks(part) for part in self.collected]
        spare = common.concat_over_ranks(torch.cat(self.spare_vectors))  # [n, codebooks, dim], in the batch's order
        is_real = common.concat_over_ranks(torch.cat(self.spare_is_real))
        self.discard()
        any_style = new[0][0, 0] > 0  # without any, nothing changes
        for old, more in zip((self.moments, self.counts, self.sums), new):
            old.mul_(torch.where(any_style, self.decay, 1.0)).add_(more)
        fair_share = self.moments[0, 0] / self.counts.shape[1]
        is_dead = any_style & (self.counts < self.dead * fair_share)
        number = is_dead.cumsum(1) - 1  # a codebook's n-th dead code becomes the n-th spare vector, if there is one
        replaced = is_dead & (number < is_real.sum())
        spare = spare[torch.argsort(~is_real, stable=True)].transpose(0, 1)  # the real ones first
        index = number.clamp(0, spare.shape[1] - 1)[..., None].expand_as(self.sums)
        self.counts.copy_(torch.where(replaced, fair_share, self.counts))
        self.sums.copy_(torch.where(replaced[..., None], fair_share * spare.gather(1, index), self.sums))


class StyleEmbedder(nn.Module):
    """An excerpt's codes -> latents -> a small transformer -> ResidualVQ -> prefix [B, P, D], about 5 rows a second.

    MusicGen-Style's conditioner (arXiv:2407.12563, section 3), its features being the codec's own latents.

    codec: a dict with K, card, frame_rate (Hz) and dim (of the latents). The vectors of its codes come by `set_codec`,
    and are part of every checkpoint from then on. max_seconds: of an excerpt; the rest of a longer one is cut off.
    """

    def __init__(self, D, codec, dim, heads, layers, codebooks, bins, max_seconds, every_hz=5):
        super().__init__()
        self.frames, self.stride = round(max_seconds * codec["frame_rate"]), round(codec["frame_rate"] / every_hz)
        if self.frames < 1:
            raise UserError(f"style_seconds: at most {max_seconds:g} s, less than a frame of the codec; lengthen them")
        self.rows, self.codebooks = math.ceil(self.frames / self.stride), codebooks
        self.register_buffer("tables", torch.zeros(codec["K"], codec["card"], codec["dim"]))
        self.inp = nn.Linear(codec["dim"], dim)
        self.positions = nn.Parameter(torch.zeros(self.frames, dim))  # zero: the quantiser is to learn the sound first
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.vq = ResidualVQ(dim, codebooks, bins)
        self.out = nn.Linear(dim, D)
        nn.init.normal_(self.out.bias, std=0.5**0.5)  # as large as the positions: a mark to find its rows by
        self.null = nn.Parameter(torch.zeros(D))

    def set_codec(self, codec):
        """codec: a codec.Codec, whose latents are the sum of one vector of each codebook."""
        self.tables.copy_(codec.vectors())

    def prepare(self, styles):
        """B entries, None or (codes int [K, n], number of codebooks or None for all) -> what `forward` takes.

        That is codes int64 [B, K, N], N being the longest n; mask bool [B, N], True where a frame counts; and
        codebooks int64 [B]. None has no frame that counts, which makes it null.
        """
        excerpts = [torch.as_tensor(style[0])[:, : self.frames] if style else None for style in styles]
        N = max([1, *(excerpt.shape[1] for excerpt in excerpts if excerpt is not None)])
        codes = torch.zeros(len(styles), len(self.tables), N, dtype=torch.int64)
        mask = torch.zeros(len(styles), N, dtype=torch.bool)
        codebooks = torch.full((len(styles),), self.codebooks)
        for row, excerpt in enumerate(excerpts):
            if excerpt is not None:
                codes[row, :, : excerpt.shape[1]] = excerpt
                mask[row, : excerpt.shape[1]] = True
                codebooks[row] = styles[row][1] or self.codebooks
        return codes, mask, codebooks

    def forward(self, codes, mask, codebooks):
        """codes [B, K, N], mask [B, N], codebooks [B] -> [B, P, D]: style at each `stride`-th frame, else `null`."""
        x = sum(F.embedding(codes[:, k], table) for k, table in enumerate(self.tables))
        x = self.inp(x) + self.positions[: codes.shape[2]]
        ignored = ~mask
        ignored[:, 0] = False  # a row that attends to nothing would be NaN
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=ignored)
        rows = self.out(self.vq(x, mask, codebooks)[:, :: self.stride])
        rest = self.rows - rows.shape[1]
        is_style = F.pad(mask[:, :: self.stride], (0, rest))[..., None]
        return torch.where(is_style, F.pad(rows, (0, 0, 0, rest)), self.null.to(rows.dtype))


# ----------------------------------------------------------------------------------------------------------- all


class Conditioner(nn.Module):
    """Every embedder that the model has, and how each is fused: text by cross-attention, the others prepended."""

    def __init__(self, s, codec, tokenizer):
        super().__init__()
        self.text = TextEmbedder(s.dim, tokenizer, s.text_dim, s.text_heads, s.text_layers, s.text_max_tokens)
        self.prepended = nn.ModuleDict()
        if s.melody:
            self.prepended["melody"] = MelodyEmbedder(s.dim, round(s.segment * CHROMA_RATE), codec["frame_rate"])
        if s.style:
            self.prepended["style"] = StyleEmbedder(s.dim, codec, s.style_dim, s.style_heads, s.style_layers,
                                                    s.style_codebooks, s.style_bins, s.style_seconds[1])  # fmt: skip
        self.rows = sum(embedder.rows for embedder in self.prepended.values())  # P

    def prepare(self, conditions):
        """A list of B dicts of conditions -> {name: tensors} on the CPU, for `forward`.

        Raises UserError for a condition that the model was not trained with.
        """
        embedders = {"text": self.text, **self.prepended}
        unknown = {name for sample in conditions for name in sample} - embedders.keys()
        if unknown:
            raise UserError(f"the model was not trained with '{unknown.pop()}'; it takes {', '.join(embedders)}")
        return {name: embedder.prepare([sample.get(name) for sample in conditions])
                for name, embedder in embedders.items()}  # fmt: skip

    def positions(self, device):
        """Where the prepended rows stand, float [P], in frames of the music: a row of the melody is found where its own
        frame is. A style has no place in time; its rows all stand at 0 (NOTES.md).
        """
        places = [torch.zeros(0, device=device)]
        for name, embedder in self.prepended.items():
            row = torch.arange(embedder.rows, device=device)
            places.append((row + 0.5) * embedder.stride if name == "melody" else 0.0 * row)
        return torch.cat(places)

    def forward(self, inputs):
        """-> cross-attention states [B, L, D], their mask bool [B, L], and the rows to prepend [B, P, D]."""
        prefix = [embedder(*inputs[name]) for name, embedder in self.prepended.items()]
        states, mask = self.text(*inputs["text"])
        return states, mask, torch.cat(prefix, dim=1) if prefix else states[:, :0]

    def update(self):
        """After a step of the optimizer: what learns by other means than gradients. Every rank must call it."""
        if "style" in self.prepended:
            self.prepended["style"].vq.update()

    def discard(self):
        """In the place of `update`, after a step that was skipped."""
        if "style" in self.prepended:
            self.prepended["style"].vq.discard()


def to_device(inputs, device):
    """What `Conditioner.prepare` makes, on its way to the device; pinned tensors are not waited for."""
    return {name: tuple(tensor.to(device, non_blocking=True) for tensor in of) for name, of in inputs.items()}
