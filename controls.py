"""What a player can tell the model beside the prompt: a beat, and a sketch of pitch and loudness.

A beat is tempo and place in the bar, added (`DiT.beat_in`) to each frame of the new block, or as in nano.pt
to its timestep token. From a single token the frames hardly learn where in the bar they lie: all of
them read the same of it, and each knows its own place only relative to others.

A sketch is plain pitch and loudness of audio, one column a latent frame, which can be read, drawn, hummed and
given. A model that makes such channels beside its latents can be given those of one recording and asked for
the rest (for pictures: arXiv 2504.16064). Log energies of 60 semitones, relative to each other, become
`Config.pitch_channels`; those of 12 bands of mid and of side become `Config.level_channels`: pitch and
loudness apart, so that one can be given without the other."""
import math
import re
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import add_noise

WINDOW = 8192                                               # samples, centred on the latent frame
SEMITONES = 60
LOWEST = 36                                                 # MIDI number of the lowest
BANDS = 12
BEATS_A_BAR = 4
SKETCH_NOISE = 0.3                                          # of its noise, what is given of a block
PITCH, LEVEL = slice(0, SEMITONES), slice(SEMITONES, SEMITONES + 2 * BANDS)     # rows of features


# -------------------------------------------------------------------------------- a beat
BEAT_FEATURES = 18


def beat_features(bpm, bar):
    """Tempo in beats a minute and place in the bar in [0, 1), tensors of one shape -> (..., 18), what
    `beat_in` reads.

    A 1, the tempo on a log scale, and the place as circles of a bar, its halves, thirds, ... sixteenths."""
    angles = 2 * math.pi * bar[..., None] * torch.tensor([1, 2, 3, 4, 6, 8, 12, 16], device=bar.device)
    steady = torch.stack([torch.ones_like(bpm), torch.log2(bpm / 100)], dim=-1)
    return torch.cat([steady, angles.sin(), angles.cos()], dim=-1).float()


def beat_of(beat, config, batch, device):
    """What holds where a block begins -> `beat_features` of its frames (batch, block, 18).

    beat: tempo in bpm, place in the bar and, if it is not 4, how many beats a bar has, numbers or tensors
    (batch,); None: zeros, nothing is told."""
    if beat is None:
        return torch.zeros(batch, config.block, BEAT_FEATURES, device=device)
    told = [torch.as_tensor(x, dtype=torch.float64, device=device).expand(batch)[:, None] for x in beat]
    bpm, bar, beats_per_bar = (*told, BEATS_A_BAR)[:3]
    minutes = torch.arange(config.block, dtype=torch.float64, device=device) / config.frame_rate / 60
    return beat_features(bpm.expand(-1, config.block), bar + minutes * bpm / beats_per_bar)


def takes_tempo(config):
    """Whether a tempo means anything to such a model: as a beat, or to time written chords."""
    return config.beats or config.pitch_channels > 0


def steady_beat(config, bpm, beats_per_bar=BEATS_A_BAR):
    """For `stream`: a tempo that stays, the first block beginning a bar."""
    bars_a_block = config.block / config.frame_rate * bpm / 60 / beats_per_bar
    return lambda number: (bpm, number * bars_a_block % 1, beats_per_bar)


# -------------------------------------------------------------------------------- a sketch
class Given(NamedTuple):
    """What is known of a block before it is made: channels that are not the model's to choose, as in
    inpainting.

    values (B, channels, T); mask (channels, 1): True where they are given; until (channels, 1), or one for
    all: the noise level down to which they are. At 0 the block gets just these values, above it the model may
    stray in its last steps."""
    values: torch.Tensor
    mask: torch.Tensor
    until: torch.Tensor

    def hold(self, x, t, noise, objective):
        """x at level t with the given channels in place, under less of this noise.

        Of few steps the first decide which notes are played; under all of the noise, what is given could not
        be read yet in these."""
        given = add_noise(self.values, noise, SKETCH_NOISE * t, objective)
        return torch.where(self.mask & (t >= self.until), given, x)


@lru_cache
def filters(sample_rate, device):
    """Weights of the spectrum's bins: (60, bins) for semitones, (12, bins) for bands."""
    bins = torch.arange(WINDOW // 2 + 1, device=device)
    number = 69 + 12 * torch.log2((bins * sample_rate / WINDOW).clamp(min=1) / 440)    # MIDI, of each bin
    centre = torch.arange(LOWEST, LOWEST + SEMITONES, device=device)[:, None]
    semitones = torch.exp(-0.5 * ((number - centre) / 0.35) ** 2)
    edges = torch.exp(torch.linspace(math.log(4), math.log(0.8 * len(bins)), BANDS + 1, device=device)).long()
    bands = ((bins >= edges[:-1, None]) & (bins < edges[1:, None])).float()
    return semitones / semitones.sum(1, keepdim=True), bands / bands.sum(1, keepdim=True)


def features(audio, config):
    """(B, 2, samples) -> log energies (B, 84, samples / hop): semitones, bands of mid, bands of side."""
    semitones, bands = filters(config.sample_rate, audio.device)
    audio = audio[..., :audio.shape[-1] // config.hop * config.hop]
    both = torch.stack([audio.mean(1), (audio[:, 0] - audio[:, 1]) / 2], dim=1)             # (B, 2, samples)
    both = F.pad(both, 2 * [(WINDOW - config.hop) // 2])
    spectra = torch.stft(both.flatten(0, 1), WINDOW, config.hop,
                         window=torch.hann_window(WINDOW, device=audio.device), center=False,
                         return_complex=True)
    mid, side = spectra.abs().unflatten(0, (-1, 2)).unbind(1)    # (B, bins, frames)
    pitch = (semitones @ mid + 1e-2).log()
    pitch = pitch - pitch.mean(1, keepdim=True)
    level = [(bands @ x.square() + 1e-4).log() for x in (mid, side)]
    return torch.cat([pitch, *level], dim=1)


@torch.no_grad()
def fit(model, columns):
    """Choose the model's channels: principal components of features (N, 84), scaled half way to equal
    spread."""
    c = model.config
    model.sketch_mean.copy_(columns.mean(0))
    model.sketch_directions.zero_()
    first = 0
    for rows, count in (PITCH, c.pitch_channels), (LEVEL, c.level_channels):
        spread, components = torch.linalg.eigh(torch.cov((columns[:, rows] - model.sketch_mean[rows]).T))
        spread = spread.flip(0)[:count].clamp(min=1e-6).sqrt()
        scale = (spread * spread.mean()).sqrt()
        model.sketch_directions[first:first + count, rows] = components.T.flip(0)[:count] / scale[:, None]
        first += count


def encode(model, audio):
    """(B, 2, samples) -> latents and, where the model has them, the channels of its sketch: (B, channels,
    T)."""
    latents = model.autoencoder.encode(audio)
    if model.config.channels == model.config.latent_channels:
        return latents
    sketch = sketch_channels(model, features(audio, model.config))
    return torch.cat([latents, sketch.to(latents.device)], dim=1)


# -------------------------------------------------------------------------------- what a player gives
GIVES = "pitch", "level", "both"
CHORDS = {                                                  # semitones above the root
    "": (0, 4, 7), "maj": (0, 4, 7), "m": (0, 3, 7), "min": (0, 3, 7), "5": (0, 7), "6": (0, 4, 7, 9),
    "m6": (0, 3, 7, 9), "7": (0, 4, 7, 10), "maj7": (0, 4, 7, 11), "m7": (0, 3, 7, 10),
    "m7b5": (0, 3, 6, 10), "dim": (0, 3, 6), "dim7": (0, 3, 6, 9), "aug": (0, 4, 8), "sus2": (0, 2, 7),
    "sus4": (0, 5, 7), "add9": (0, 2, 4, 7), "9": (0, 2, 4, 7, 10)}


def chord_notes(name):
    """"F#m7" -> its pitch classes (0 is C), the root first; None where that is no chord."""
    found = re.fullmatch(r"([A-G])([#b]?)(.*)", name.replace("\u266f", "#").replace("\u266d", "b"))
    if not found or found[3] not in CHORDS:
        return None
    root = "C D EF G A B".index(found[1]) + {"": 0, "#": 1, "b": -1}[found[2]]
    return [(root + interval) % 12 for interval in CHORDS[found[3]]]


@lru_cache(maxsize=64)
def chord_features(name, config):
    """What `features` hears of a chord, held: (84,). The root lies below middle C, the chord around it."""
    notes = chord_notes(name)
    midi = [48 + notes[0], *(60 + note if note < 7 else 48 + note for note in notes)]
    seconds = torch.arange(2 * WINDOW) / config.sample_rate
    tone = torch.zeros(2 * WINDOW)
    for number in midi:
        for partial in range(1, 7):
            hertz = partial * 440 * 2 ** ((number - 69) / 12)
            tone += 0.1 / partial * torch.sin(2 * math.pi * hertz * seconds)
    heard = features(tone.expand(1, 2, -1), config)[0]
    return heard[:, heard.shape[-1] // 2]


def sketch_channels(model, heard):
    """Features (..., 84, T) -> the channels of the model's sketch (..., pitch and level channels, T)."""
    return model.sketch_directions @ (heard.to(model.sketch_mean.device) - model.sketch_mean[:, None])


def chord_channels(model, names, bpm, bars):
    """Chords, a bar each, over and over -> the sketch's channels of a block that begins after so many
    bars."""
    c = model.config
    place = bars + torch.arange(c.block, dtype=torch.float64) / c.frame_rate * bpm / 60 / BEATS_A_BAR   # bars
    chords = (place + 1e-6).floor().long() % len(names)     # which one each frame has
    columns = torch.stack([chord_features(name, c) for name in names], dim=1)   # (84, chords)
    return sketch_channels(model, columns[:, chords])


def given_of(model, pieces):
    """[(the sketch's channels (channels, block), "pitch", "level" or "both", until)] -> `Given`."""
    c = model.config
    device = model.sketch_mean.device
    values = torch.zeros(1, c.channels, c.block, device=device)
    mask = torch.zeros(c.channels, 1, dtype=torch.bool, device=device)
    until = torch.zeros(c.channels, 1, device=device)
    level = c.latent_channels + c.pitch_channels
    rows = dict(pitch=slice(c.latent_channels, level), level=slice(level, c.channels),
                both=slice(c.latent_channels, c.channels))
    for channels, what, lowest in pieces:
        whole = torch.zeros(c.channels, c.block, device=device)
        whole[c.latent_channels:] = channels
        values[:, rows[what]] = whole[rows[what]]
        mask[rows[what]] = True
        until[rows[what]] = lowest
    return Given(values, mask, until)
