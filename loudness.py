"""How loud a wav is, and making it as loud as wanted (ITU-R BS.1770-4).

    lufs = loudness(wav, 16_000)                    # integrated, behind the two gates
    dbtp = true_peak(wav, 16_000)                   # dB of full scale
    wav, about = level(wav, 16_000, target=-23.0)

Letters: C channels, N samples. Every wav is float [C, N] in numpy, full scale 1.
"""

import math

import numpy as np
import soxr

PEAK_LIMIT = -1.0  # dBTP: what comes after, lossy coding and resampling, adds some tenths


def k_weighting(hertz):
    """What the K filter multiplies these frequencies by: a shelf, for the head, then a high-pass.

    They are the standard's two biquads for 48 kHz, and are read off at their frequencies whatever the wav's own rate.
    """
    z = np.exp(-2j * np.pi * hertz / 48_000)
    shelf = 1.53512485958697 - 2.69169618940638 * z + 1.19839281085285 * z**2
    shelf /= 1 - 1.69065929318241 * z + 0.73248077421585 * z**2
    return shelf * (1 - 2 * z + z**2) / (1 - 1.99004745483398 * z + 0.99007225036621 * z**2)


def loudness(wav, sample_rate):
    """Integrated loudness in LUFS, -inf for silence: blocks of 400 ms, each 100 ms after the last, behind both gates.

    What is shorter than a block is padded to one with silence. No channel is taken for a surround one.
    """
    hop = round(sample_rate / 10)
    N = max(wav.shape[1], 4 * hop)
    room = N + sample_rate  # so that the filters' ringing does not come round to the beginning
    spectrum = np.fft.rfft(wav.astype(np.float64), room) * k_weighting(np.fft.rfftfreq(room, 1 / sample_rate))
    heard = np.fft.irfft(spectrum, room)
    power = np.square(heard[:, : N // hop * hop]).sum(0).reshape(-1, hop).mean(1)
    blocks = np.convolve(power, np.full(4, 0.25), "valid")
    blocks = blocks[blocks > 10 ** ((-70 + 0.691) / 10)]
    if not len(blocks):
        return -math.inf
    return -0.691 + 10 * math.log10(blocks[blocks > blocks.mean() / 10].mean())


def true_peak(wav, sample_rate):
    """The highest peak between and on the samples, found at four times the rate, in dBTP; -inf for silence."""
    peak = max(np.abs(wav).max(), np.abs(soxr.resample(wav.T, sample_rate, 4 * sample_rate)).max())
    return 20 * math.log10(peak) if peak > 0 else -math.inf


def level(wav, sample_rate, target):
    """wav -> (the wav at `target` LUFS, what was found and done: loudness, true_peak, gain in dB, reached, limited).

    The gain is lowered where a true peak would pass PEAK_LIMIT, so that nothing clips. Silence stays silence, and its
    levels are None.
    """
    lufs, peak = loudness(wav, sample_rate), true_peak(wav, sample_rate)
    wanted = target - lufs if math.isfinite(lufs) else 0.0
    gain = min(wanted, PEAK_LIMIT - peak)
    about = dict(loudness=lufs, true_peak=peak, gain=gain, reached=lufs + gain)
    about = {key: round(value, 2) if math.isfinite(value) else None for key, value in about.items()}
    about["limited"] = gain < wanted - 0.05
    return wav * np.float32(10 ** (gain / 20)), about
