"""What the music is conditioned on, and when it is dropped.

A sample's conditions are a dict, {"text": "slow piano"}; a missing one, or None, is null. Dropping a condition in
training and leaving it out at inference are therefore the same thing, and the null is one learned vector per
attribute. It starts at zero: attention to it gives zero, as in MusicGen's unconditional path.

To add an attribute: an embedder with `prepare` and `forward` like TextEmbedder's, a line in Conditioner, its draw in
`draw_conditions`, and its value wherever a caller gives {"text": ...}.

Letters: B batch, L condition length in tokens, D model width, T' chroma frames.
"""

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn


def merge_text(caption, metadata, rng):
    """The caption followed by its other metadata, 'genre: jazz. bpm: 120', in random order."""
    parts = [f"{key}: {value}" for key, value in metadata.items()]
    return ". ".join([caption, *rng.permutation(parts)] if caption else rng.permutation(parts))


def draw_conditions(caption, metadata, rng, settings):
    """The conditions of one sample in training, with its own dropout draws from `rng` (numpy Generator).

    With probability `merge_text_p` the metadata joins the caption; each word is dropped with `word_dropout`; the text
    is dropped with `text_dropout`; and everything together with `cfg_dropout` (classifier-free guidance,
    arXiv:2207.12598).
    """
    merge, drop_all, drop_text = rng.random(3)
    if merge < settings.merge_text_p:
        caption = merge_text(caption, metadata, rng)
    if settings.word_dropout:
        words = caption.split()
        caption = " ".join(word for word, draw in zip(words, rng.random(len(words))) if draw >= settings.word_dropout)
    dropped = drop_all < settings.cfg_dropout or drop_text < settings.text_dropout
    return {"text": None if dropped else caption}


def chromagram(wav, sample_rate):
    """wav [B, samples], full scale 1 -> each pitch class's share of a frame's energy, C first: [B, 12, T'].

    8 frames a second, each centred on its own hop of sample_rate // 8 samples: T' = ceil(samples / hop). The window is
    that of MusicGen's melody conditioning (arXiv:2306.05284, section 2.3), 2^14 samples at 32 kHz or 0.512 s: two of
    its bins make a semitone at C2. The bins from C2 to B7 count for the pitch nearest to them, A4 at 440 Hz. A frame
    that is below -60 dB of full scale there is silence: all zeros.
    """
    hop, n_fft = sample_rate // 8, 2 * round(0.256 * sample_rate)
    side = (n_fft - hop + 1) // 2
    wav = F.pad(wav, (side, side + -wav.shape[1] % hop))
    window = torch.hann_window(n_fft, device=wav.device)
    power = torch.stft(wav, n_fft, hop, window=window, center=False, return_complex=True).abs().square()
    hertz = torch.arange(n_fft // 2 + 1, device=wav.device) * (sample_rate / n_fft)
    pitch = (69 + 12 * (hertz.clamp(min=1) / 440).log2()).round()  # in MIDI's numbers: C2 is 36, C8 108
    fold = (pitch % 12 == torch.arange(12, device=wav.device)[:, None]) & (pitch >= 36) & (pitch < 108)
    energy = fold.float() @ power
    total = energy.sum(1, keepdim=True)
    mean_square = 2 * total / (n_fft * window.square().sum())  # Parseval's theorem
    return torch.where(mean_square > 1e-6, energy / total, 0.0)


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

    def prepare(self, texts, device):
        """B strings or None -> ids int64 [B, L] and mask bool [B, L], True where a token counts.

        None and the empty string have no token that counts, which makes them null. Longer texts are cut off.
        """
        tokens = [self.tokenizer.encode(text or "")[: self.max_tokens] for text in texts]
        L = max([1, *map(len, tokens)])
        ids = torch.zeros(len(tokens), L, dtype=torch.int64)
        mask = torch.zeros(len(tokens), L, dtype=torch.bool)
        for row, sample in enumerate(tokens):
            ids[row, : len(sample)] = torch.tensor(sample)
            mask[row, : len(sample)] = True
        return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)

    def forward(self, ids, mask):
        """ids, mask [B, L] -> states [B, L, D] and the mask to attend with; a null row has one state, `null`."""
        is_null = ~mask.any(1, keepdim=True)
        mask = mask | (is_null & (torch.arange(ids.shape[1], device=ids.device) == 0))
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        states = self.out(self.norm(x))
        return torch.where(is_null[..., None], self.null.to(states.dtype), states), mask


class Conditioner(nn.Module):
    """Every embedder, and how each is fused: text by cross-attention."""

    def __init__(self, settings, tokenizer):
        super().__init__()
        self.text = TextEmbedder(settings.dim, tokenizer, settings.text_dim, settings.text_heads,
                                 settings.text_layers, settings.text_max_tokens)  # fmt: skip

    def prepare(self, conditions, device):
        """A list of B dicts of conditions -> {attribute: tensors}, ready for `forward`."""
        return {"text": self.text.prepare([sample.get("text") for sample in conditions], device)}

    def forward(self, inputs):
        """-> cross-attention states [B, L, D] and their mask bool [B, L]."""
        return self.text(*inputs["text"])
