"""Codebook patterns (MusicGen, arXiv:2306.05284, section 2.2): at which sequence position each code is predicted.

    python patterns.py          # prints the three grids

A pattern is one integer table, `position[k, t]`: the sequence position of frame t of codebook k. Position 0 is all
special tokens. Two codes of one codebook never share a position, and positions increase with t.

Letters: B batch, K codebooks, T frames, S sequence positions; `card` is the codebook size and the special token.
"""

from functools import cached_property

import torch

from common import UserError


def delay_positions(K, T, delays=None):
    """position[k, t] = 1 + t + delays[k]. By default delays[k] = k; stereo uses 0,0,1,1,2,2,3,3."""
    delays = list(range(K) if delays is None else delays)
    if len(delays) != K or any(type(delay) is not int or delay < 0 for delay in delays):
        raise UserError(f"delays {delays}: pass {K} integers of 0 or above, one for each codebook")
    return 1 + torch.arange(T) + torch.tensor(delays)[:, None]


def parallel_positions(K, T):
    """position[k, t] = 1 + t: all codebooks of a frame together."""
    return 1 + torch.arange(T).expand(K, T)


def unrolled_positions(K, T):
    """position[k, t] = 1 + t * K + k: one code after another."""
    return 1 + torch.arange(T) * K + torch.arange(K)[:, None]


def make_pattern(name, K, T, delays=None, training=False):
    """Make the `Pattern` called 'delay', 'parallel' or 'unrolled' for K codebooks of T frames.

    In training the last max-delay positions are cut off, so codebook k loses its last delays[k] frames.
    """
    if name == "delay":
        position = delay_positions(K, T, delays)
        return Pattern(position, S=T + 1 if training else T + int(position[:, 0].max()))
    if name == "parallel":
        return Pattern(parallel_positions(K, T), S=T + 1)
    if name == "unrolled":
        return Pattern(unrolled_positions(K, T), S=T * K + 1)
    raise UserError(f"unknown pattern '{name}': choose 'delay', 'parallel' or 'unrolled'")


class Pattern:
    """`position` int64 [K, T], and the number of positions S that are kept."""

    def __init__(self, position, S):
        self.position, self.S = position, S
        self.K, self.T = position.shape

    def to(self, device):
        return Pattern(self.position.to(device), self.S)

    @cached_property
    def frame_mask(self):
        """bool [K, T]: True for codes whose position is kept. The loss counts these."""
        return self.position < self.S

    def build(self, codes, special):
        """codes [B, K, T] -> sequence [B, K, S], with `special` at positions that hold no code. One scatter."""
        sequence = codes.new_full(
            (len(codes), self.K, self.S + 1), special
        )  # the last column collects the codes cut off
        return sequence.scatter(2, self.position.clamp(max=self.S).expand_as(codes), codes)[:, :, : self.S]

    def revert(self, sequence, special):
        """sequence [B, K, S] -> codes [B, K, T], with `special` where a code's position was cut off. One gather."""
        index = self.position.clamp(max=self.S - 1).expand(len(sequence), -1, -1)
        return sequence.gather(2, index).masked_fill(~self.frame_mask, special)

    def align_logits(self, logits):
        """logits [B, K, S, card], where position s predicts position s + 1 -> [B, K, T, card] in code order.

        Codes whose position was cut off get NaN, so that reading such a logit by mistake shows immediately.
        """
        index = (self.position - 1).clamp(max=self.S - 1)[None, :, :, None]
        index = index.expand(len(logits), -1, -1, logits.shape[-1])
        return logits.gather(2, index).masked_fill(~self.frame_mask[:, :, None], float("nan"))


if __name__ == "__main__":
    for name in ("delay", "parallel", "unrolled"):
        pattern = make_pattern(name, K=4, T=5)
        grid = pattern.build(torch.arange(1, 6).expand(1, 4, 5), special=0)[0]
        print(f"{name}: {pattern.T} frames of {pattern.K} codebooks at {pattern.S} positions (numbers are frames)")
        for k, row in enumerate(grid.tolist()):
            print(f"  codebook {k + 1}  " + " ".join(f"{frame or '·':>2}" for frame in row))
