"""Text and melody conditions: tokenize, embed, drop in training, fuse. extras/style.py adds the style.

    name     a sample's condition                                  fused by
    text     a caption                                             cross-attention
    melody   pitch classes, 8 per second                           prepended to the sequence
    style    (codes of an excerpt, number of codebooks to keep)    prepended to the sequence

The conditions of a sample are a dict, {"text": "slow piano"}. A missing condition, or None, becomes a learned null
vector. So dropping a condition in training equals leaving it out at inference. The null starts at zero, because
cross-attention to zero gives zero, as in MusicGen's unconditional path. With T5 the null is always zero, as published.

To add a condition, write an embedder like MelodyEmbedder and add it to Conditioner. Draw it in `draw_conditions` and
`all_conditions`, read its value in `TokenDataset.collate` of data.py, add a setting that switches it on to config and
its MODEL_SETTINGS, and an option to sample.py.

Letters: B batch, L condition length in tokens, D model width, T frames, T' chroma frames, P prefix positions.
"""

import copy
import functools

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn

from common import UserError

CHROMA_RATE = 8  # chroma frames per second
SILENCE = 12  # the melody token of a silent frame; 0 to 11 are pitch classes, C = 0
INFERENCE_CODEBOOKS = 3  # style codebooks kept at inference, MusicGen-Style's default (arXiv:2407.12563)


# ------------------------------------------------------------------------------------------------------ dropping


def merge_text(caption, metadata, rng):
    """Join the caption, if any, and the metadata in random order: 'A song. genre: jazz. bpm: 120'."""
    parts = rng.permutation([f"{key}: {value}" for key, value in metadata.items()])
    return join_sentences([caption, *parts] if caption else parts)


def join_sentences(parts):
    """Join texts with ". ", or with a blank after a text that ends with a punctuation mark."""
    text = ""
    for part in parts:
        ends = text.rstrip("\"')]}”’»")[-1:] in (*".!?…,;:。！？、，；：।؟،؛",)
        text = f"{text}{' ' if ends else '. '}{part}" if text else str(part)
    return text


def style_excerpt(frames, seconds, place, frame_rate):
    """Return the style excerpt of an item of `frames` frames: (first frame, end), at most half of the item.

    place in [0, 1): where the excerpt starts, from the item's start to the last possible frame.
    """
    length = max(1, min(round(seconds * frame_rate), frames // 2))
    first = int(place * (frames - length + 1))
    return first, first + length


def draw_conditions(caption, metadata, frames, frame_rate, rng, s):
    """Draw which conditions a training item gets, from the item's numpy Generator `rng`.

    The metadata joins the caption with probability `merge_text_p`, and always if there is no caption. Each word is
    dropped with `word_dropout`. Attribute dropout drops text, melody and style each by its own probability. CFG dropout
    drops all of them together with `cfg_dropout` (classifier-free guidance, arXiv:2207.12598). The style excerpt's
    length, place and number of codebooks are uniform.
    Returns {"text": str or None, "melody": bool, "style": (first frame, end, codebooks) or None}.
    """
    draw_merge, draw_all, draw_text = rng.random(3)
    if draw_merge < s.merge_text_p or not caption:
        caption = merge_text(caption, metadata, rng)
    if s.word_dropout:
        words = caption.split()
        caption = " ".join(word for word, draw in zip(words, rng.random(len(words))) if draw >= s.word_dropout)
    draw_melody, draw_style, place, draw_seconds = rng.random(4)
    seconds, codebooks = np.interp(draw_seconds, (0, 1), s.style_seconds), int(rng.integers(s.style_codebooks)) + 1
    style = (*style_excerpt(frames, seconds, place, frame_rate), codebooks)
    keep = draw_all >= s.cfg_dropout
    return {
        "text": caption if keep and draw_text >= s.text_dropout else None,
        "melody": s.melody and keep and draw_melody >= s.melody_dropout,
        "style": style if s.style and keep and draw_style >= s.style_dropout else None,
    }


def all_conditions(caption, frames, frame_rate, s):
    """Return what `draw_conditions` does, but drop nothing and take the middle excerpt of mean length."""
    excerpt = style_excerpt(frames, np.mean(s.style_seconds), 0.5, frame_rate)
    style = (*excerpt, min(INFERENCE_CODEBOOKS, s.style_codebooks))
    return {"text": caption, "melody": s.melody, "style": style if s.style else None}


# ---------------------------------------------------------------------------------------------------------- text


class TextEmbedder(nn.Module):
    """SentencePiece tokens -> embedding -> small bidirectional transformer -> [B, L, D] for cross-attention.

    tokenizer: the bytes of a SentencePiece model, trained on the data set's captions.
    """

    def __init__(self, D, tokenizer, dim, n_heads, n_layers, max_tokens):
        super().__init__()
        self.tokenizer_model = tokenizer  # bytes, for checkpoints
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
        self.max_tokens = max_tokens
        self.embed = nn.Embedding(self.tokenizer.vocab_size(), dim)
        self.positions = nn.Embedding(max_tokens, dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, n_heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, D)
        self.null = nn.Parameter(torch.zeros(D))
        self.words = frozenset()  # words of the training captions, if known; sample.py warns of others

    def tokenize(self, texts):
        """B strings or None -> ids int64 [B, L] and mask bool [B, L], True for tokens. Longer texts are cut off.

        None and "" have no tokens, which makes them null.
        """
        return pad_tokens([self.encode(text or "")[: self.max_tokens] for text in texts])

    def encode(self, text):
        """Return all tokens of a text, a list of ids."""
        return self.tokenizer.encode(text)

    def forward(self, ids, mask):
        """ids, mask [B, L] -> states [B, L, D] and their mask [B, L]. A null sample has one state, `null`."""
        is_null, mask = null_mask(mask)
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        states = self.out(self.norm(x))
        return torch.where(is_null[..., None], self.null.to(states.dtype), states), mask


class T5Embedder(nn.Module):
    """Tokens of the published T5 -> states of its frozen encoder -> linear projection -> [B, L, D].

    The encoder is shared by all copies of the model and part of none: see extras/t5.py. As in the published models, the
    null is zero and not learned, and there is no projection if T5 has the width D.
    tokenizer: the bytes of spiece.model or tokenizer.json.
    """

    def __init__(self, D, tokenizer, weights):
        super().__init__()
        from extras import t5
        from extras.t5_tokenizer import load_tokenizer

        self.encoder, self.max_tokens, self.end = t5.load_encoder(weights), t5.MAX_TOKENS, [t5.END]
        self.encode_words, n_tokens = load_tokenizer(tokenizer)
        if n_tokens > (n_rows := len(self.encoder.weights["shared.weight"])):
            raise UserError(f"{weights}: T5 has {n_rows} tokens, but its tokenizer {n_tokens}; use its own tokenizer")
        self.tokenizer_model = tokenizer  # bytes, for checkpoints
        self.out = nn.Linear(self.encoder.dim, D) if self.encoder.dim != D else nn.Identity()
        self.words = frozenset()  # unseen words are not reported, because T5 was trained on general text

    def tokenize(self, texts):
        """B strings or None -> ids int64 [B, L] and mask bool [B, L]. Longer texts are cut off before </s>.

        None and "" become [1], the id of </s>, with a mask of False, which marks a null sample.
        """
        tokens = [self.encode(text or "") for text in texts]
        ids, mask = pad_tokens([sample[:-1][: self.max_tokens - 1] + self.end for sample in tokens])
        return ids, mask & torch.tensor([[sample != self.end] for sample in tokens])

    def encode(self, text):
        """Return all tokens of a text, a list of ids that ends with </s>."""
        return [*self.encode_words(text), *self.end]

    def forward(self, ids, mask):
        """ids, mask [B, L] -> states [B, L, D] and their mask [B, L]. A null sample has one state, zero."""
        is_null, mask = null_mask(mask)
        return self.out(self.encoder(ids, mask)).masked_fill(is_null[..., None], 0), mask


def pad_tokens(tokens):
    """B lists of ids -> ids int64 [B, L], padded with 0, and mask bool [B, L], True for tokens."""
    L = max([2, *map(len, tokens)])  # at least 2, because torch.compile would specialize on length 1
    ids = torch.tensor([sample + [0] * (L - len(sample)) for sample in tokens])
    return ids, torch.arange(L) < torch.tensor([[len(sample)] for sample in tokens])


def null_mask(mask):
    """mask [B, L] -> is_null, bool [B, 1], for samples without tokens, and the mask with their first state enabled."""
    is_null = ~mask.any(1, keepdim=True)
    return is_null, mask | (is_null & (torch.arange(mask.shape[1], device=mask.device) == 0))


# -------------------------------------------------------------------------------------------------------- melody


def chromagram(wav, sample_rate):
    """wav [B, samples] -> share of each pitch class in a frame's energy, C first: float32 [B, 12, T'].

    8 frames per second, each centred on a hop of sample_rate // 8 samples: T' = ceil(samples / hop). The window has
    MusicGen's length, 2^14 samples at 32 kHz or 0.512 s (arXiv:2306.05284, section 2.3), so two bins make a semitone at
    C2. Bins from C2 to B7 count for the nearest pitch, A4 = 440 Hz. Frames below -60 dBFS from C2 to B7 are all zeros.
    """
    hop, n_fft = sample_rate // CHROMA_RATE, 2 * round(0.256 * sample_rate)
    side = (n_fft - hop + 1) // 2
    wav = F.pad(wav, (side, side + -wav.shape[1] % hop))
    window = torch.hann_window(n_fft, device=wav.device)
    spectrum = torch.fft.rfft(wav.unfold(1, n_fft, hop) * window)  # [B, T', bins]
    power = spectrum.real.square() + spectrum.imag.square()
    hertz = torch.arange(n_fft // 2 + 1, device=wav.device) * (sample_rate / n_fft)
    pitch = (69 + 12 * (hertz.clamp(min=1) / 440).log2()).round()  # MIDI numbers: C2 is 36, C8 is 108
    fold = (pitch % 12 == torch.arange(12, device=wav.device)[:, None]) & (pitch >= 36) & (pitch < 108)
    energy = (power @ fold.float().T).transpose(1, 2)
    total = energy.sum(1, keepdim=True)
    mean_square = 2 * total / (n_fft * window.square().sum())  # Parseval's theorem
    return torch.where(mean_square > 1e-6, energy / total, 0.0)


def strongest(chroma):
    """Chroma [12, T'] -> the strongest pitch class of each frame, or SILENCE: uint8 [T']."""
    return torch.where(chroma.sum(0) > 0, chroma.argmax(0), SILENCE).to(torch.uint8)


class MelodyEmbedder(nn.Module):
    """Pitch classes -> prefix [B, P, D]. The embedding equals a linear map of one-hot chroma.

    length: P, the number of pitch classes of an item.
    """

    def __init__(self, D, length, frame_rate):
        super().__init__()
        self.length, self.stride = length, frame_rate / CHROMA_RATE
        self.embed = nn.Embedding(SILENCE + 1, D)
        nn.init.normal_(self.embed.weight, std=0.5**0.5)  # the RMS of sinusoidal positions
        self.null = nn.Parameter(torch.zeros(D))

    def tokenize(self, melodies):
        """B sequences of pitch classes, or None -> (int64 [B, P],), -1 for null. Cut, or padded with silence, to P."""
        notes = torch.full((len(melodies), self.length), -1)
        for row, melody in enumerate(melodies):
            if melody is not None:
                notes[row] = SILENCE
                notes[row, : len(melody)] = torch.as_tensor(melody)[: self.length]
        return (notes,)

    def forward(self, notes):
        """notes [B, P] -> [B, P, D]."""
        return torch.where(notes[..., None] < 0, self.null, self.embed(notes.clamp(min=0)))

    def prefix_positions(self, device):
        """Return the frame at the centre of each pitch class, float [P], so that a note shares its frame's position."""
        return (torch.arange(self.length, device=device) + 0.5) * self.stride


# --------------------------------------------------------------------------------------------------- conditioner


class Conditioner(nn.Module):
    """All embedders of a model. Text is fused by cross-attention, the others are prepended to the sequence."""

    def __init__(self, s, codec_info, tokenizer):
        super().__init__()
        if s.text_encoder == "t5":
            self.text = T5Embedder(s.dim, tokenizer, s.text_encoder_weights)
        else:
            self.text = TextEmbedder(s.dim, tokenizer, s.text_dim, s.text_heads, s.text_layers, s.text_max_tokens)
        self.text_encoder_id = self.text.encoder.id if s.text_encoder == "t5" else None
        self.prepended = nn.ModuleDict()
        if s.melody:
            self.prepended["melody"] = MelodyEmbedder(s.dim, round(s.segment * CHROMA_RATE), codec_info["frame_rate"])
        if s.style:
            from extras.style import StyleEmbedder

            self.prepended["style"] = StyleEmbedder(s.dim, codec_info, s.style_dim, s.style_heads, s.style_layers,
                                                    s.style_codebooks, s.style_bins, s.style_seconds[1])  # fmt: skip
        self.prefix_length = sum(embedder.length for embedder in self.prepended.values())  # P
        embedders = {"text": self.text, **self.prepended}
        tokenizers = {name: without_weights(embedder).tokenize for name, embedder in embedders.items()}
        self.tokenize = functools.partial(tokenize, tokenizers)  # a data worker gets it without the model's weights

    def prefix_positions(self, device):
        """Return the positions of the prefix, float [P], in frames of the music."""
        positions = [embedder.prefix_positions(device) for embedder in self.prepended.values()]
        return torch.cat([torch.zeros(0, device=device), *positions])

    def forward(self, condition_tensors):
        """Return text states [B, L, D], their mask bool [B, L], and the prefix [B, P, D]."""
        prefix = [embedder(*condition_tensors[name]) for name, embedder in self.prepended.items()]
        states, mask = self.text(*condition_tensors["text"])
        return states, mask, torch.cat(prefix, dim=1) if prefix else states[:, :0]

    def update(self):
        """Update the style codebooks, after an optimizer step. Every rank must call this."""
        if "style" in self.prepended:
            self.prepended["style"].vq.update()

    def discard(self):
        """Discard the statistics for `update`, after a skipped step."""
        if "style" in self.prepended:
            self.prepended["style"].vq.discard()


def tokenize(tokenizers, conditions):
    """B dicts of conditions -> {name: tensors} on the CPU, for `Conditioner.forward`.

    Raises UserError for a condition that the model was not trained with.
    """
    unknown = {name for sample in conditions for name in sample} - tokenizers.keys()
    if unknown:
        raise UserError(f"the model was not trained with '{unknown.pop()}'; it supports {', '.join(tokenizers)}")
    return {name: function([sample.get(name) for sample in conditions]) for name, function in tokenizers.items()}


def without_weights(embedder):
    """Return a shallow copy of an embedder that can only `tokenize`. Pickling it copies no weights."""
    light = copy.copy(embedder)
    vars(light).update(_parameters={}, _buffers={}, _modules={})
    vars(light).pop("encoder", None)  # T5's, which is not a module
    return light


def to_device(condition_tensors, device):
    """Copy what `Conditioner.tokenize` returned to a device, without waiting for pinned tensors."""
    return {name: tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
            for name, tensors in condition_tensors.items()}  # fmt: skip
