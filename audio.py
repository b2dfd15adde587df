"""Sound and latents: recordings -> latents, latent blocks -> audio without seams -> a WAV.

A recording is encoded piece by piece; the pieces overlap by what the encoder sees, so the result is that of
the whole. `StreamingDecoder` does the same for the decoder: block after block, together they equal decoding
everything at once. """
import math
import os
import struct
import sys
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from torch import nn

import controls
from common import UserError, reason_of, speed, uninterrupted
from model import ResidualUnit
from recordings import PIECE, overlapped, read_audio


# -------------------------------------------------------------------------------- audio to latents
def encoder_margin(config):
    """Latent frames of audio on each side that one latent frame depends on."""
    reach = 1                                               # frames: the last convolution
    for stride in reversed(config.ae_strides):              # from the latent side outwards
        reach = reach * stride + stride + 3 * (1 + 3 + 9)
    return math.ceil((reach + 3) / config.hop)


def encode_chunks(model, audio_chunks, frames=None):
    """Audio tensors (2, n) -> latents (channels, n) float32 on the CPU, piece by piece, as if encoded whole.

    frames: of a piece, but for the last; None: some seconds. A piece comes as soon as the audio has reached
    `encoder_margin` frames beyond it."""
    config = model.config
    if speed:
        speed.lay_out(model.autoencoder)
    device = next(model.autoencoder.parameters()).device
    margin = encoder_margin(config)
    size = frames or max(margin, round(PIECE * config.frame_rate))
    for piece, left, keep in overlapped(audio_chunks, size * config.hop, margin * config.hop):
        if keep >= config.hop:
            with torch.no_grad():
                latents = controls.encode(model, piece[None].to(device))[0]    # (channels, frames)
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

    A convolution that looks ahead gives its output that much later. Zeros go in before the first input and
    after the last, as padding does for a whole. So all pieces together equal decoding everything at once, and
    nothing is decoded twice."""

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
    return decoded_pieces(streaming_decoder(autoencoder, compile), latent_blocks)


def streaming_decoder(autoencoder, compile=False):
    """One of two decoders of the same results: the one above, or a faster one where there is speed.py."""
    return speed.StreamingDecoder(autoencoder, compile) if speed else StreamingDecoder(autoencoder)


def decoder_state(decoder):
    """What a streaming decoder's layers keep, by the layers' names: {name: tensor}."""
    names = {layer: name for name, layer in decoder.layers.named_modules()}
    return {names[layer]: kept.clone() for layer, kept in decoder.kept.items()}


def restore_decoder(decoder, state):
    """The inverse of `decoder_state`, for a decoder that has not decoded anything yet."""
    layers = dict(decoder.layers.named_modules())
    weight = decoder.layers[0].weight
    decoder.kept = {layers[name]: kept.to(weight.device) for name, kept in state.items()}
    decoder.keepers = list(decoder.kept)                    # the faster one's order


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
    """16-bit PCM WAV to an open binary file, a pipe included. Where the file is seekable, its header is
    corrected at the end."""

    def __init__(self, file, rate, channels, samples=None):
        """samples: how many will come, or None."""
        self.file = file
        self.rate = rate
        self.channels = channels
        self.promised = samples
        self.written = 0                                    # bytes of samples
        self.start = file.tell() if file.seekable() else None
        self.header(samples)

    def header(self, samples):
        frame = 2 * self.channels                           # bytes
        size = frame * samples if samples is not None else 2 ** 32
        riff, data = (min(n, 2 ** 32 - 1) for n in (size + 36, size))   # all ones: the convention for streams
        self.file.write(struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", riff, b"WAVE", b"fmt ", 16, 1,
                                    self.channels, self.rate, frame * self.rate, frame, 16, b"data", data))

    def write(self, samples):                               # int16 (n, channels)
        data = memoryview(samples.tobytes())
        while data:                                         # a disk that fills takes only the first part
            taken = self.file.write(data) or 0
            self.written += taken
            data = data[taken:]
        self.file.flush()

    @uninterrupted()                                        # Ctrl-C pressed twice
    def close(self):
        samples = self.written // (2 * self.channels)
        if self.start is not None and samples != self.promised:
            self.file.seek(self.start)
            self.header(samples)
            self.file.seek(0, os.SEEK_END)
        self.file.flush()


def open_output(path, rate, channels, samples):
    """A writer of int16 (n, channels) with write and close: stdout (None), .wav or .flac. Raises
    UserError."""
    if path is None and (sys.stdout is None or sys.stdout.isatty()):
        raise UserError(f"standard output is {'a terminal' if sys.stdout else 'closed'}: "
                        "send the audio to a file (> out.wav), a player, or --out FILE")
    if path is not None and Path(path).suffix.lower() not in (".wav", ".flac"):
        raise UserError(f"--out {path}: the name must end in .wav or .flac")
    try:
        # unbuffered: what does not fit on a full disk must not wait in front of the corrected header
        place = sys.stdout.fileno() if path is None else path
        file = open(place, "wb", buffering=0, closefd=path is not None)
        if path is None or Path(path).suffix.lower() == ".wav":
            return WavWriter(file, rate, channels, samples)
        file.close()
        return soundfile.SoundFile(path, "w", rate, channels, "PCM_16")
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"cannot write {path or 'to standard output'}: {reason_of(error, path)}") from None


def pcm(audio):
    """Audio (1, 2, n) in [-1, 1] -> int16 (n, 2)."""
    return (audio[0].T.float().clamp(-1, 1) * 32767).round().to(torch.int16).cpu().numpy()
