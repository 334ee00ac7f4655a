"""Codebook patterns (MusicGen, arXiv:2306.05284, section 2.2): at which step each code is predicted.

    python patterns.py          # prints the three grids

A pattern is one integer table, `step[k, t]`: the sequence step at which frame t of codebook k stands. Step 0 is all
special tokens. Two tokens of one codebook never share a step, and steps rise with t; the rest follows from the table.

Letters: B batch, K codebooks, T frames, S sequence steps; `card`, one past the last code, is the special token.
"""

from functools import cached_property

import torch

from common import UserError


def delay_steps(K, T, delays=None):
    """step[k, t] = 1 + t + delays[k], by default delays[k] = k; stereo interleaves as 0,0,1,1,2,2,3,3."""
    delays = list(range(K) if delays is None else delays)
    if len(delays) != K or any(type(delay) is not int or delay < 0 for delay in delays):
        raise UserError(f"delays {delays}: {K} whole numbers are needed, one for each codebook, none below 0")
    return 1 + torch.arange(T) + torch.tensor(delays)[:, None]


def parallel_steps(K, T):
    """step[k, t] = 1 + t: all codebooks of a frame at once."""
    return 1 + torch.arange(T).expand(K, T)


def unrolled_steps(K, T):
    """step[k, t] = 1 + t * K + k: one code at a time."""
    return 1 + torch.arange(T) * K + torch.arange(K)[:, None]


def make_pattern(name, K, T, delays=None, training=False):
    """The `Pattern` called 'delay', 'parallel' or 'unrolled' for K codebooks of T frames.

    In training the last max-delay steps are cut off, so that codebook k loses its last delays[k] frames.
    """
    if name == "delay":
        step = delay_steps(K, T, delays)
        return Pattern(step, S=T + 1 if training else T + int(step[:, 0].max()))
    if name == "parallel":
        return Pattern(parallel_steps(K, T), S=T + 1)
    if name == "unrolled":
        return Pattern(unrolled_steps(K, T), S=T * K + 1)
    raise UserError(f"unknown pattern '{name}': choose 'delay', 'parallel' or 'unrolled'")


class Pattern:
    """`step` int64 [K, T] and the number of steps S that are kept."""

    def __init__(self, step, S):
        self.step, self.S = step, S
        self.K, self.T = step.shape

    def to(self, device):
        return Pattern(self.step.to(device), self.S)

    @cached_property
    def frame_mask(self):
        """bool [K, T]: the frames that the kept steps reach; the loss counts these."""
        return self.step < self.S

    @cached_property
    def step_mask(self):
        """bool [K, S]: the steps that hold a code; elsewhere stands the special token."""
        return self.build(torch.zeros_like(self.step)[None], special=1)[0] == 0

    def build(self, codes, special):
        """codes [B, K, T] -> sequence [B, K, S], `special` where no code stands. One scatter."""
        sequence = codes.new_full((len(codes), self.K, self.S + 1), special)  # the last column takes what is cut off
        return sequence.scatter(2, self.step.clamp(max=self.S).expand_as(codes), codes)[:, :, : self.S]

    def revert(self, sequence, special):
        """sequence [B, K, S] -> codes [B, K, T], `special` where a frame's step was cut off. One gather."""
        index = self.step.clamp(max=self.S - 1).expand(len(sequence), -1, -1)
        return sequence.gather(2, index).masked_fill(~self.frame_mask, special)

    def align_logits(self, logits):
        """logits [B, K, S, card], whose step s predicts step s + 1 -> [B, K, T, card] in the order of the codes.

        NaN stands where a frame's step was cut off, so that a logit that must not be read is loud when it is.
        """
        index = (self.step - 1).clamp(max=self.S - 1)[None, :, :, None].expand(len(logits), -1, -1, logits.shape[-1])
        return logits.gather(2, index).masked_fill(~self.frame_mask[:, :, None], float("nan"))


if __name__ == "__main__":
    for name in ("delay", "parallel", "unrolled"):
        pattern = make_pattern(name, K=4, T=5)
        grid = pattern.build(torch.arange(1, 6).expand(1, 4, 5), special=0)[0]
        print(f"{name}: {pattern.T} frames of {pattern.K} codebooks in {pattern.S} steps (a number is a frame's)")
        for k, row in enumerate(grid.tolist()):
            print(f"  codebook {k + 1}  " + " ".join(f"{frame or '·':>2}" for frame in row))
