"""Sound in: a file -> pieces at the model's rate -> latents. Sound out: latent blocks -> audio without seams
-> a WAV.

A file of any length is decoded, resampled and encoded piece by piece, so an hour takes no more memory than a
minute. The pieces overlap by what the filters see, so the result is that of the whole file.
`StreamingDecoder` does the same for the decoder: block after block, together they equal decoding everything
at once. """
import math
import os
import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, speed
from model import ResidualUnit

PIECE = 5                                                   # seconds of audio held and encoded at once


# -------------------------------------------------------------------------------- files in
def overlapped(chunks, size, margin):
    """Regroup a stream of tensors (..., n): pieces of `size`, with up to `margin` of their neighbours on both
    sides.

    Yields (piece, left, keep): its own samples are piece[..., left:left + keep]. Neighbours are missing only
    at the stream's ends, so a filter that sees no further than `margin` gives for the pieces what it gives
    for the whole."""
    held, left = None, 0
    for chunk in chunks:
        held = chunk if held is None else torch.cat([held, chunk], dim=-1)
        while held.shape[-1] >= left + size + margin:
            yield held[..., :left + size + margin], left, size
            held, left = held[..., max(0, left + size - margin):], min(margin, left + size)
    while held is not None and held.shape[-1] > left:
        yield held[..., :left + size + margin], left, min(size, held.shape[-1] - left)
        held, left = held[..., max(0, left + size - margin):], min(margin, left + size)


def resampled(chunks, rate, new_rate):
    """A stream of (2, n) at `rate` -> the same at `new_rate`: whole periods of the filter at a time."""
    ratio = Fraction(rate, new_rate).limit_denominator(1000)    # an odd rate would need gigabytes of filters
    p, q = ratio.numerator, ratio.denominator
    if p == q:
        yield from chunks
        return
    from torchaudio.transforms import Resample              # here, because importing it takes a second
    resample = Resample(p, q)
    margin, size = (resample.width // p + 1) * p, max(1, rate // p) * p
    for piece, left, keep in overlapped(chunks, size, margin):
        start = left // p * q
        yield resample(piece.contiguous())[..., start:start - (-keep * q // p)]     # up to ceil(keep * q / p)


def decoded(file, f, channels):
    """An open SoundFile -> float32 tensors (channels, n) at its own rate. Mono is doubled; of more, the first
    two."""
    done = 0
    while len(audio := f.read(PIECE * f.samplerate, dtype="float32", always_2d=True)):
        if not np.isfinite(audio).all():
            raise UserError(f"{file}: holds samples that are not numbers, after {done / f.samplerate:.0f} s")
        done += len(audio)
        yield torch.from_numpy(audio.T[:channels].copy()).expand(channels, -1)
    # where others raise, Ogg readers just stop at a hole; sound files in the wild promise a little too much
    if f.format == "OGG" and done < f.frames - f.samplerate / 4:
        raise UserError(
            f"{file}: damaged, {done / f.samplerate:.1f} of {f.frames / f.samplerate:.1f} s are readable"
        )


def read_audio(file, config):
    """File -> float32 tensors (2, n) at the model's rate, a few seconds each. UserError naming file and
    reason."""
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file, or a broken link")
    if file.stat().st_size == 0:
        raise UserError(f"{file}: empty file")
    try:
        with soundfile.SoundFile(file) as f:
            if not 1000 <= f.samplerate <= 1000000:         # a damaged header
                raise UserError(f"{file}: a sample rate of {f.samplerate} Hz")
            yield from resampled(decoded(file, f, config.audio_channels), f.samplerate, config.sample_rate)
    except soundfile.SoundFileError as error:
        reason = error.error_string if isinstance(error, soundfile.LibsndfileError) else error
        if "not exist" in str(reason):    # which it does, as was seen above: what MP3 readers say of nonsense
            reason = "damaged, or of another kind than its name says"
        raise UserError(f"{file}: not readable as audio ({str(reason).strip(' .')})") from None


# -------------------------------------------------------------------------------- audio to latents
def encoder_margin(config):
    """Latent frames of audio on each side that one latent frame depends on."""
    reach = 1                                               # frames: the last convolution
    for stride in reversed(config.ae_strides):              # from the latent side outwards
        reach = reach * stride + stride + 3 * (1 + 3 + 9)
    return math.ceil((reach + 3) / config.hop)


def encode_chunks(model, audio_chunks):
    """Audio tensors (2, n) -> latents (channels, n) float32 on the CPU, piece by piece, as if encoded
    whole."""
    config = model.config
    if speed:
        speed.lay_out(model.autoencoder)
    device = next(model.autoencoder.parameters()).device
    margin = encoder_margin(config)
    size = max(margin, round(PIECE * config.frame_rate))
    for piece, left, keep in overlapped(audio_chunks, size * config.hop, margin * config.hop):
        if keep >= config.hop:
            with torch.no_grad():
                latents = model.encode(piece[None].to(device))[0]    # (channels, frames)
            yield latents[:, left // config.hop:(left + keep) // config.hop].float().cpu()


def last_samples(chunks, hop, frames):
    """Of a stream of tensors (2, n) the end, from the start of a frame on, with at most `frames` whole
    ones."""
    end = torch.empty(0)
    for chunk in chunks:
        end = torch.cat([end, chunk], dim=-1) if len(end) else chunk
        end = end[:, max(0, end.shape[-1] // hop - frames) * hop:]
    return end


def encode_file(model, file, last=None):
    """File -> latents (C, T) float32 on the CPU, or only the `last` frames. UserError when it is unreadable
    or shorter than a frame."""
    c, chunks = model.config, read_audio(file, model.config)
    if last:
        # the last frames hear so much before them
        chunks = [last_samples(chunks, c.hop, last + encoder_margin(c))]
    latents = list(encode_chunks(model, chunks))
    if not latents:
        raise UserError(f"{file}: too short, less than one latent frame")
    return torch.cat(latents, dim=1)[:, -(last or 0):]


# -------------------------------------------------------------------------------- latents to audio
def decoder_margin(config):
    """Latent frames on each side that one frame's audio depends on."""
    reach = 3                                               # audio samples: the last convolution
    for stride in config.ae_strides:                        # from the audio side inwards
        reach = math.ceil((reach + 3 * (1 + 3 + 9) + stride) / stride)
    return reach + 3


class StreamingDecoder:
    """The autoencoder's decoder fed block by block: each layer keeps the end of its input until more comes.

    A convolution that looks ahead gives its output that much later. What its padding is to a whole, zeros at
    the start and the end are to a stream. So all pieces together equal decoding everything at once, and no
    block is decoded twice."""

    def __init__(self, autoencoder):
        self.layers = autoencoder.decoder
        self.kept = {}                                      # layer -> the end of its input so far

    @torch.no_grad()
    def __call__(self, latents, last=False):
        """(B, C, T) -> the audio (B, 2, n) that they settle; with `last` also all that is still inside."""
        x = latents[:, :self.layers[0].in_channels]    # what is beside the latents is not for the decoder
        for layer in self.layers:
            x = self.run(layer, x, last)
        return x

    def run(self, layer, x, last):
        if isinstance(layer, ResidualUnit):
            return self.residual(layer, x, last)
        if isinstance(layer, nn.ConvTranspose1d):
            return self.upsample(layer, x, last)
        if isinstance(layer, nn.Conv1d):
            return self.convolve(layer, x, last)
        return layer(x)                                     # a snake looks at one sample alone

    def with_past(self, layer, x, first, after):
        """What the layer kept (at the start of the stream: `first` zeros), then x, then `after` zeros."""
        past = self.kept.get(layer, x.new_zeros(*x.shape[:2], first))
        return torch.cat([past, x, x.new_zeros(*x.shape[:2], after)], dim=-1)

    def convolve(self, conv, x, last):                      # an output looks `padding` samples ahead
        pad = conv.padding[0]
        x = self.with_past(conv, x, pad, pad if last else 0)
        self.kept[conv] = x[..., max(0, x.shape[-1] - 2 * pad):]
        if x.shape[-1] <= 2 * pad:
            return x.new_zeros(len(x), conv.out_channels, 0)
        return F.conv1d(x, conv.weight, conv.bias, dilation=conv.dilation)

    def upsample(self, conv, x, last):    # a frame reaches its own samples and those of the next
        stride = conv.stride[0]
        pad = conv.padding[0]
        begins = conv not in self.kept
        x = self.with_past(conv, x, 1, 1 if last else 0)
        if x.shape[-1] < 2:
            return x.new_zeros(len(x), conv.out_channels, 0)
        self.kept[conv] = x[..., -1:]
        # the settled part
        y = F.conv_transpose1d(x, conv.weight, conv.bias, conv.stride)[..., stride:-stride]
        return y[..., pad if begins else 0:y.shape[-1] - (pad if last else 0)]

    def residual(self, unit, x, last):
        y = x
        for layer in unit.layers:
            y = self.run(layer, y, last)
        # input whose output is still to come
        waiting = torch.cat([self.kept.get(unit, x[..., :0]), x], dim=-1)
        settled = y.shape[-1]
        self.kept[unit] = waiting[..., settled:]
        return waiting[..., :settled] + y


def decode_stream(autoencoder, latent_blocks, compile=False):
    """Latent blocks (B, C, n) -> audio pieces (B, 2, m), together equal to decoding everything at once.

    A piece is what its block settles; the rest, for which the decoder must know what follows, comes with the
    next. compile: see `speed.StreamingDecoder`; where that does not work its UserError comes here, not with
    the first piece."""
    decoder = speed.StreamingDecoder(autoencoder, compile) if speed else StreamingDecoder(autoencoder)
    return decoded_pieces(decoder, latent_blocks)


def decoded_pieces(decoder, latent_blocks):
    block = None
    for block in latent_blocks:
        audio = decoder(block)
        if audio.shape[-1]:
            yield audio
    if block is not None:
        yield decoder(block[..., :0], last=True)


# -------------------------------------------------------------------------------- files out
class WavWriter:
    """16-bit PCM WAV to an open binary file, a pipe included. samples: the length, or None; mended at close
    where the file is seekable."""

    def __init__(self, file, rate, channels, samples=None):
        self.file, self.rate, self.channels, self.promised, self.written = file, rate, channels, samples, 0
        self.start = file.tell() if file.seekable() else None
        self.header(samples)

    def header(self, samples):
        size = 2 * self.channels * samples if samples is not None else 2 ** 32
        riff, data = (min(n, 2 ** 32 - 1) for n in (size + 36, size))   # all ones: the convention for streams
        self.file.write(struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", riff, b"WAVE", b"fmt ", 16, 1,
                                    self.channels, self.rate, 2 * self.channels * self.rate,
                                    2 * self.channels, 16, b"data", data))

    def write(self, samples):                               # int16 (n, channels)
        self.file.write(samples.tobytes())
        self.file.flush()
        self.written += len(samples)

    def close(self):
        if self.start is not None and self.written != self.promised:
            self.file.seek(self.start)
            self.header(self.written)
            self.file.seek(0, os.SEEK_END)
        self.file.flush()


def open_output(path, rate, channels, samples):
    """A writer of int16 (n, channels) with write and close: stdout (None), .wav or .flac. Raises
    UserError."""
    if path is None and (sys.stdout is None or sys.stdout.isatty()):
        raise UserError(
            f"standard output is {'a terminal' if sys.stdout else 'closed'}: send the audio to a file (> out.wav), a player, or --out FILE"
        )
    if path is not None and Path(path).suffix.lower() not in (".wav", ".flac"):
        raise UserError(f"--out {path}: the name must end in .wav or .flac")
    try:
        if path is None:
            return WavWriter(sys.stdout.buffer, rate, channels, samples)
        if Path(path).suffix.lower() == ".wav":
            return WavWriter(open(path, "wb"), rate, channels, samples)
        return soundfile.SoundFile(path, "w", rate, channels, "PCM_16")
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(
            f"cannot write {path or 'to standard output'}: {getattr(error, 'strerror', None) or error}"
        ) from None


def pcm(audio):
    """Audio (1, 2, n) in [-1, 1] -> int16 (n, 2)."""
    return (audio[0].T.float().clamp(-1, 1) * 32767).round().to(torch.int16).cpu().numpy()
