"""Audio files: read in blocks at the codec's sample rate and channels, write, name, and draw as spectrograms."""

import contextlib
import functools
import io
import math
import mmap
import os
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from mutagen.mp3 import HeaderNotFoundError, MPEGFrame, MPEGInfo

from common import UserError, first_line, write_file

SUFFIXES = set(".wav .wave .flac .mp3 .ogg .oga .opus .aiff .aif .aifc .au .caf .w64".split())  # read by libsndfile
FFMPEG_SUFFIXES = set(".m4a .aac .mp4 .wma .webm .mka .ape .wv .alac .dsf".split())  # read by ffmpeg, if installed
FFMPEG_FORMATS = "mov,aac,asf,matroska,ape,wv,dsf,caf"  # the demuxers of these suffixes
OTHER_SUFFIXES = FFMPEG_SUFFIXES | {".mid", ".midi"}  # listed in skipped.jsonl if they cannot be read
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}  # suffix: libsndfile's name, for writing


def load_audio(path, sample_rate, channels=1, samples=None, first=0):
    """Load an audio file as float32 [channels, samples] at `sample_rate`: at most `samples`, from sample `first` on.

    Raises UserError if the file cannot be read, or ends before sample `first`.
    """
    blocks, end = [], 0
    for block in read_blocks(path, sample_rate, channels):
        end += block.shape[1]
        if end > first:
            blocks.append(block[:, first - end :])  # the complete block, if it starts after `first`
        if samples and end >= first + samples:
            break
    if not blocks:
        raise UserError(f"{path}: only {end / sample_rate:.1f} s long, but reading starts at {first / sample_rate:g} s."
                        " Choose an earlier start (--from)")  # fmt: skip
    return torch.cat(blocks, dim=1)[:, :samples]


def read_blocks(path, sample_rate, channels=1, seconds=10):
    """Yield an audio file in blocks of about 10 s, so that a file of any length needs little memory.

    The blocks are float32 [channels, any] at `sample_rate`. Raises UserError if the file cannot be read.
    """
    read = yielded = 0  # samples, before and after resampling
    try:
        side = uncancelled_channel(path) if channels == 1 else None
        with open_audio(path) as file:
            rate, is_last = file.samplerate, False
            resampler = soxr.ResampleStream(rate, sample_rate, channels, dtype="float32")
            while not is_last:
                wav = file.read(seconds * rate, dtype="float32", always_2d=True)
                is_last = len(wav) < seconds * rate
                read += len(wav)
                if not np.isfinite(wav).all():
                    raise UserError(f"{path}: contains samples that are not numbers. Export it again")
                wav = resampler.resample_chunk(to_channels(wav, channels, side), last=is_last)
                if not np.isfinite(wav).all():
                    raise UserError(f"{path}: contains samples that are too large. Export it again")
                yielded += len(wav)
                if len(wav):
                    yield torch.from_numpy(wav.T.copy())
    except (soundfile.LibsndfileError, OSError) as error:
        reason = str(error).split(": ")[-1].strip()
        if "does not exist" in reason and Path(path).exists():
            reason = "not audio, or damaged"  # libsndfile reports such an MP3 as missing
        raise UserError(f"{path}: cannot be read as audio ({reason})") from None
    if not read:
        raise UserError(f"{path}: contains no samples")
    if not yielded:
        raise UserError(f"{path}: too short, less than one sample at {sample_rate} Hz")
    if Path(path).suffix.lower() == ".mp3" and (stream := mp3_seconds(path)) > 1.02 * read / rate + 0.2:
        raise UserError(f"{path}: the header says {read / rate:.1f} s but the stream has {stream:.1f} s."
                        " Convert it to WAV or FLAC")  # fmt: skip


def open_audio(path):
    """Open a SoundFile, in a `with` statement. ffmpeg decodes the formats that libsndfile cannot read.

    A pipe or an interrupted recording leaves a WAV header with a size that is too small: correct it in memory.
    """
    if Path(path).suffix.lower() in FFMPEG_SUFFIXES:
        return open_by_ffmpeg(path)
    file = soundfile.SoundFile(os.fsencode(path))
    if file.frames > 2**40:  # a FLAC that was written to a pipe: its length is unknown, and seeking fails at its end
        file.seekable = lambda: False
    with open(path, "rb") as raw:
        content = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)  # changes are not written to the file
    data = content.find(b"data", 12)
    if content[:4] != b"RIFF" or data < 0:
        return file
    size = int.from_bytes(content[data + 4 : data + 8], "little")
    if size and not has_more_samples(content, data + 8 + size, size / max(1, file.frames) * file.samplerate):
        return file
    for start in (4, data + 4):
        content[start : start + 4] = min(len(content) - start - 4, 2**32 - 1).to_bytes(4, "little")
    return soundfile.SoundFile(content)


def has_more_samples(content, end, bytes_per_second):
    """Return whether a WAV file continues after `end`, where its data should end, by 0.5 s that look like samples.

    Chunks and tags begin with letters, and padding with zeros.
    """
    first = content[end : end + 5]
    is_other = re.match(rb".?[ -~]{4}|ID3|\0{4}", first, re.DOTALL) is not None
    return len(content) - end > 0.5 * bytes_per_second and not is_other


@contextlib.contextmanager
def open_by_ffmpeg(path):
    """Decode with ffmpeg and read its output as a SoundFile: in AU format, whose header needs no length.

    Raises UserError without ffmpeg, or if ffmpeg reports an error before the end of the file.
    """
    # "file:" stops names such as "a:b.m4a" from being URLs; the whitelists stop files that refer to other files or URLs
    command = ["ffmpeg", "-v", "error", "-protocol_whitelist", "file", "-format_whitelist", FFMPEG_FORMATS,
               "-i", f"file:{path}", "-f", "au", "-c:a", "pcm_f32be", "-"]  # fmt: skip
    with contextlib.ExitStack() as stack:
        errors, file = stack.enter_context(tempfile.TemporaryFile()), None
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        except FileNotFoundError:
            raise UserError(f"{path}: {Path(path).suffix} files are read by ffmpeg, which is not installed. Install it,"
                            " or convert the file to WAV or FLAC") from None  # fmt: skip
        stack.enter_context(process)
        stack.callback(process.kill)  # before Popen waits, because the caller may have stopped early
        with contextlib.suppress(soundfile.LibsndfileError):  # ffmpeg has written nothing
            file = stack.enter_context(soundfile.SoundFile(process.stdout.fileno(), closefd=False))
        if file:
            yield file
        if process.stdout.read(1):  # the caller needed only the beginning
            return
        status = process.wait()
        errors.seek(0)
        line = re.sub(r"\[[^]]* @ [^]]*\] ", "", errors.readline().decode(errors="replace")).strip()
        if status or line or not file:
            raise UserError(f"{path}: cannot be read as audio (ffmpeg: {line or f'status {status}'}). Replace it, or"
                            " convert it to WAV or FLAC")  # fmt: skip


def mp3_seconds(path):
    """Return the length of an MP3 by its frames.

    libsndfile uses the header, so it drops the second of two joined files. Without a header it extrapolates from the
    first bitrate, which is wrong if the bitrate varies.
    """
    seconds, end = 0.0, 0
    with open(path, "rb") as file:
        while end < os.path.getsize(path):
            try:
                start = MPEGInfo(file, end).frame_offset  # skips tags and pictures to several frames in a row
            except HeaderNotFoundError:
                end += 2**14  # MPEGInfo gives up after 1 MiB, or 1,500 bytes that look like the start of a frame
                continue
            file.seek(start)
            end, run = start + 1, []  # seconds of each frame
            with contextlib.suppress(HeaderNotFoundError):
                while True:
                    frame = MPEGFrame(file)
                    samples = {1: 384, 2: 1152, 3: 1152 if frame.version == 1 else 576}[frame.layer]
                    run.append(samples / frame.sample_rate)
                    end = file.tell()
            seconds += sum(run) if len(run) >= 8 else 0  # bytes of a picture can look like a few frames
    return seconds


def uncancelled_channel(path):
    """Return the louder channel, 0 or 1, of a file whose channels cancel each other in a mono mix, otherwise None.

    They cancel if the mix has below 10 % of their mean power in 20 excerpts of 1 s, as with one channel inverted.
    """
    power = np.zeros(3)  # left, right, mix
    with contextlib.suppress(soundfile.LibsndfileError, UserError), open_audio(path) as file:  # damaged, or no seeking
        can_seek = file.seekable() and file.frames < 2**40  # the length is unknown if the file was written to a pipe
        places = np.linspace(0, max(0, file.frames - file.samplerate), 20).astype(int) if can_seek else [0]
        for place in places if file.channels > 1 else ():
            if place:
                file.seek(place)
            wav = file.read(file.samplerate * (20 // len(places)), dtype="float32", always_2d=True)
            wav = downmix(wav) if wav.shape[1] > 2 else wav
            power += (np.column_stack([wav, wav.mean(1)]).astype(float) ** 2).sum(0)
    return int(power[1] > power[0]) if power[2] < 0.1 * power[:2].mean() else None


def to_channels(wav, channels, side=None):
    """Convert wav [samples, any] to [samples, channels], for 1 or 2 channels. side: the channel to use as mono."""
    if wav.shape[1] > 2:
        wav = downmix(wav)
    if side is not None:
        wav = wav[:, side : side + 1]
    if channels == 1:
        return wav.mean(1, keepdims=True)
    return wav.repeat(channels, 1) if wav.shape[1] == 1 else wav


def downmix(wav):
    """Mix wav [samples, 3 or more channels], in the order of WAV files, to stereo [samples, 2] (ITU-R BS.775).

    Centre and surround channels count -3 dB, the low-frequency channel is dropped, and the gains of a side add up to 1.
    """
    n, half = wav.shape[1], 0.5**0.5  # below, "l r c" are surround channels and "-" is the low-frequency channel
    gains = {"L": (1, 0), "R": (0, 1), "C": (half, half), "-": (0, 0), "l": (half, 0), "r": (0, half), "c": (0.5, 0.5)}
    layout = {3: "LRC", 4: "LRlr", 5: "LRClr", 6: "LRC-lr", 7: "LRC-clr", 8: "LRC-lrlr"}.get(n, "LR" * n)[:n]
    matrix = np.array([gains[channel] for channel in layout], dtype=wav.dtype)
    return wav @ (matrix / matrix.sum(0))


def write_audio(path, wav, sample_rate):
    """Write wav [channels, samples] in the format of the path's suffix, one of FORMATS, and return the path.

    Raises UserError if the file cannot be written.
    """
    path, samples, content = Path(path), wav.clamp(-1, 1).T.cpu().numpy(), io.BytesIO()
    kind = FORMATS[path.suffix.lower()]
    try:
        with soundfile.SoundFile(content, "w", sample_rate, samples.shape[1], format=kind) as file:
            for start in range(0, len(samples), sample_rate):  # long writes overflow the stack of libsndfile's Vorbis
                file.write(samples[start : start + sample_rate])
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path}: cannot be encoded as {kind} ({first_line(error)}). Choose another format") from None
    write_file(path, content.getvalue())
    return path


def file_name(caption, seed):
    """Return a file name, without suffix, for a caption and a seed: letters and digits of any script."""
    slug = re.sub(r"\W+", "_", caption.lower())[:60].encode(errors="ignore")[:200].decode(errors="ignore")
    return f"{slug.strip('_') or 'no_caption'}_{seed}"


def mel_spectrogram(wav, sample_rate, n_fft=1024, hop=320, n_mels=80):
    """Return the magnitudes [..., n_mels, 1 + samples // hop] of wav [..., samples] on the HTK mel scale."""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    hertz = 700 * (10 ** (torch.linspace(0, top, n_mels + 2, device=wav.device) / 2595) - 1)
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, device=wav.device)
    rise = (bins - hertz[:-2, None]) / (hertz[1:-1] - hertz[:-2])[:, None]
    fall = (hertz[2:, None] - bins) / (hertz[2:] - hertz[1:-1])[:, None]
    triangles = torch.minimum(rise, fall).clamp(min=0)  # [n_mels, n_fft // 2 + 1]
    window = torch.hann_window(n_fft, device=wav.device)
    stft = torch.stft(wav.reshape(-1, wav.shape[-1]), n_fft, hop, window=window, return_complex=True)
    return (triangles @ stft.abs()).reshape(*wav.shape[:-1], n_mels, -1)


def draw_spectrogram(path, picture, sample_rate):
    """Draw an audio file as a log-mel PNG, low frequencies at the bottom, from -80 to 0 dB of full scale.

    Raises ImportError without Pillow.
    """
    from PIL import Image, ImageOps

    wav, n_fft = load_audio(path, sample_rate)[0], sample_rate * 64 // 1000
    wav = torch.nn.functional.pad(wav, (0, max(0, n_fft - len(wav))))
    mel = mel_spectrogram(wav, sample_rate, n_fft, hop=sample_rate // 50)
    mel = torch.nn.functional.adaptive_max_pool1d(mel, min(400, mel.shape[1]))
    level = 1 + (mel / (n_fft / 4)).clamp(min=1e-9).log10() / 4  # a full-scale sine has magnitude n_fft / 4
    grey = Image.fromarray((255 * level.clamp(0, 1)).byte().flip(0).numpy())
    image = ImageOps.colorize(grey, black="#000004", mid="#b73779", white="#fcfdbf")
    write_file(Path(picture), functools.partial(image.save, format="png"))
