"""Is it music, does it stay so, and is it what was asked for? Figures of a checkpoint's streams beside the
same figures of recordings held out from its training.

    python measure.py --data data/nano                      # sound: 8 streams of 30 s
    python measure.py --data data/nano --drift              # 8 streams of 2 minutes, ten seconds at a time
    python measure.py --data data/band --obey               # 48 streams of 15 s: tempo, key, genre, beats

The distance is Frechet's between Gaussian fits of 64-band log-mel frames with their deltas: no network judges
another. Obedience needs exact labels beside the prompts: `metadata.csv` with the columns of `LABELS`.
"""
import argparse
import csv
import math
import re
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torchaudio.functional import compute_deltas
from torchaudio.transforms import MelSpectrogram
from tqdm import tqdm

import data
from audio import decode_stream, decoder_margin, encode_chunks, pcm
from common import (PRECISIONS, UserError, check_streams, default_checkpoint, device_of, finite, load,
                    playing_precision, run, speed, step_count, thread_count, whole, writable)
from recordings import read_audio
from sample import SAMPLERS, known_words, sampling_settings, stream

HOP = 512                                                   # samples between frames of `log_mel`
LABELS = ("file_name", "genre", "instruments", "key", "bpm", "first_beat")
BEAT_ERROR = 25                                             # ms from the grid that a beat may lie
NEAR_BEAT = 60                                              # ms around a beat where its onset is looked for


# -------------------------------------------------------------------------------- figures of a sound
def log_mel(audio, rate, size=2048, hop=HOP, bands=64):
    """Audio (2, n) -> power of the mid signal in mel bands in dB, floor -80 (frames, bands)."""
    mel = MelSpectrogram(rate, n_fft=size, hop_length=hop, n_mels=bands, f_min=30,
                         normalized=True)(audio.mean(0))
    return 10 * mel.clamp(min=1e-8).log10().T


def features(audio, rate):
    """Log-mel frames with deltas over five frames: (frames, 128)."""
    mel = log_mel(audio, rate)
    return torch.cat([mel, compute_deltas(mel.T).T], dim=1)


def frechet(a, b):
    """Frechet distance, in dB squared, between Gaussian fits of two sets of frames (n, d) and (m, d)."""
    a = a.double()
    b = b.double()
    cov_a = torch.cov(a.T)
    cov_b = torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def rises(mel):
    """Spectral flux: mean rise in dB a band from each frame (frames, bands) to the next (frames - 1,)."""
    return mel.diff(dim=0).clamp(min=0).mean(1)


def around(curve, frames):
    """Mean of a curve (n,) over `frames` on both sides of each point, of as many as there are (n,)."""
    return F.avg_pool1d(curve[None], 2 * frames + 1, 1, frames, count_include_pad=False)[0]


def highest(curve, frames):
    """Largest value of a curve (n,) within `frames` on both sides of each point (n,)."""
    return F.max_pool1d(curve[None], 2 * frames + 1, 1, frames)[0]


def onsets_per_second(audio, rate):
    """Peaks of spectral flux: frames that rise 1.5 dB a band above the half second around them, highest
    within 50 ms."""
    flux = rises(log_mel(audio, rate))
    usual = around(flux, round(0.25 * rate / HOP))
    peaks = (flux == highest(flux, round(0.05 * rate / HOP))) & (flux > usual + 1.5)
    return peaks.sum().item() / (audio.shape[-1] / rate)


def chroma(audio, rate, size=8192, hop=2048):
    """Magnitudes of the mid signal from 55 to 2000 Hz, summed by pitch class from A upwards (12, frames)."""
    window = torch.hann_window(size)
    spectrum = torch.stft(audio.mean(0), size, hop, window=window, return_complex=True).abs()
    hertz = torch.arange(len(spectrum)) * rate / size
    used = (hertz > 55) & (hertz < 2000)
    pitch = (12 * torch.log2(hertz[used] / 440)).round().long() % 12
    return torch.zeros(12, spectrum.shape[1]).index_add_(0, pitch, spectrum[used])


def chroma_change(audio, rate, seconds=2.0):
    """Mean cosine distance between the chroma of moments `seconds` apart, where both sound; NaN without
    any."""
    classes = chroma(audio, rate)
    lag = round(seconds * rate / 2048)
    sounds = classes.norm(dim=0) > 1e-2
    classes = F.normalize(classes, dim=0)
    distance = 1 - (classes[:, lag:] * classes[:, :-lag]).sum(0)
    return distance[sounds[lag:] & sounds[:-lag]].mean().item()


def chroma_correlation(a, b, rate):
    """How far two recordings (2, n), cut to the shorter one, play the same notes at the same time.

    It is the correlation of their chroma over time and pitch classes, in frames of 8192 samples, which count
    alike whether loud or soft."""
    n = min(a.shape[-1], b.shape[-1])
    curves = [F.normalize(chroma(audio[:, :n], rate, hop=8192), dim=0) for audio in (a, b)]
    return torch.corrcoef(torch.stack([curve.flatten() for curve in curves]))[0, 1].item()


def level(audio):
    """Root mean square in dB, 0 for a square wave of full scale."""
    return 20 * math.log10(audio.square().mean().sqrt().item() + 1e-9)


def brightness(audio, rate):
    """Spectral centroid of the mid signal in Hz: the mean frequency, weighted by the magnitude."""
    window = torch.hann_window(2048)
    magnitude = torch.stft(audio.mean(0), 2048, HOP, window=window, return_complex=True).abs().mean(1)
    hertz = torch.arange(len(magnitude)) * rate / 2048
    return ((hertz * magnitude).sum() / magnitude.sum().clamp(min=1e-9)).item()


def width(audio):
    """Energy of the side signal divided by that of the mid signal: 0 for mono."""
    side = (audio[0] - audio[1]).square().mean()
    return (side / (audio[0] + audio[1]).square().mean().clamp(min=1e-12)).item()


def seams(audio, block_samples, box=882):
    """Energy and spectral flux of audio (2, n) at the boundaries of blocks, each divided by that elsewhere.

    Energy is that of `box` samples (20 ms at 44.1 kHz) around a place, flux the mean rise in dB a bin to it
    from the box before. Elsewhere is 31 places in each block, evenly spaced."""
    mid = audio.mean(0)
    boundaries = torch.arange(block_samples, len(mid) - block_samples, block_samples)
    places = boundaries[:, None] + torch.arange(32) * block_samples // 32                   # (boundaries, 32)
    samples = places[..., None] - box // 2 + torch.arange(box)                         # (boundaries, 32, box)
    energy = mid[samples].square().mean((0, 2))                                             # (32,)
    here, before = (10 * torch.fft.rfft(part * torch.hann_window(box)).abs().square().clamp(min=1e-3).log10()
                    for part in (mid[samples], mid[samples - box]))
    flux = (here - before).clamp(min=0).mean((0, 2))                                        # (32,)
    return tuple((curve[0] / curve[1:].mean()).item() for curve in (energy, flux))


# -------------------------------------------------------------------------------- figures of an autoencoder
def si_sdr(made, real):
    """Scale-invariant signal-to-distortion ratio in dB, tensors of one shape (arXiv 1811.02508)."""
    made = made.flatten()
    real = real.flatten()
    target = (made @ real) / (real @ real) * real
    return 10 * torch.log10(target.square().sum() / (made - target).square().sum()).item()


def log_spectral_distance(made, real, floor=1e-3):
    """Mean difference of the levels in dB of 2048-point STFT magnitudes, audio (..., n) each.

    A magnitude below the floor counts as the floor: 1e-3 is about the noise of 16 bits."""
    window = torch.hann_window(2048, device=real.device)
    levels = [torch.stft(audio.flatten(0, -2), 2048, 512, window=window, return_complex=True).abs()
              .clamp(min=floor).log10() for audio in (made, real)]
    return 20 * (levels[0] - levels[1]).abs().mean().item()


# -------------------------------------------------------------------------------- obedience: tempo and beats
def autocorrelation(audio, rate):
    """Autocorrelation of the spectral flux, one value a lag of 10 ms, the mean of as many products (n,)."""
    mel = log_mel(audio, rate, hop=round(rate / 100))
    flux = rises(mel.clamp(min=-50))                        # noise below that has rhythms of its own
    flux = flux - flux.mean()
    n = len(flux)
    power = torch.fft.rfft(flux, 2 * n).abs().square()
    return torch.fft.irfft(power)[:n] / torch.arange(n, 0, -1)


def tempo_of(audio, rate):
    """Beats a minute of audio (2, n), between 50 and 214. NaN for less than 6 s and for silence.

    The lag of 0.28 to 1.2 s after which the spectral flux returns best, and after two and four of them: the
    geometric mean of the three, times a bell one octave wide around half a second, where people tap along.
    The peak is refined by a parabola."""
    if audio.shape[-1] < 6 * rate:
        return math.nan
    similar = autocorrelation(audio, rate)
    lags = torch.arange(28, 121)
    score = similar[lags].clamp(min=0)
    for beats in 2, 4:                                      # 4 are 2 frames off where the lag is half a frame
        score = score * highest(similar, beats // 2)[beats * lags].clamp(min=0)
    score = score.pow(1 / 3) * torch.exp(-0.5 * torch.log2(lags / 50).square())
    if score.max() <= 0:
        return math.nan
    lag = lags[score.argmax()].item()
    before, peak, after = similar[lag - 1:lag + 2].tolist()
    bend = before - 2 * peak + after
    shift = 0.5 * (before - after) / bend if bend < 0 else 0
    return 6000 / (lag + max(-0.5, min(0.5, shift)))


def tempo_obeyed(found, asked, octaves=True, triplets=False):
    """Whether a tempo is the one asked for within 4 %. octaves: or 2 or 4 times as fast or slow, as people
    hear tempo too; triplets: or 3 times, or 2 beats for 3, or 3 for 4."""
    ratios = [1]
    if octaves:
        ratios += [2, 4, 1 / 2, 1 / 4]
    if triplets:
        ratios += [3, 3 / 2, 4 / 3, 1 / 3, 2 / 3, 3 / 4]
    return any(abs(found / (asked * ratio) - 1) <= 0.04 for ratio in ratios)


def onset_times(audio, rate):
    """Times in seconds at which something begins (n,), within a few ms.

    Peaks of the rise in dB of 24 bands, a short window apart, that stand out by a standard deviation from the
    half second around them and are the highest within 30 ms."""
    hop = 128
    quarter = round(0.25 * rate / hop)
    curve = rises(log_mel(audio, rate, 512, hop, 24).clamp(min=-30))
    mean = around(curve, quarter)
    deviation = (around(curve.square(), quarter) - mean.square()).clamp(min=0).sqrt()
    peaks = (curve == highest(curve, round(0.03 * rate / hop))) & (curve > mean + deviation)
    return (peaks.nonzero()[:, 0] + 0.5) * hop / rate       # a rise lies between two frames


def offsets_of(times, beat_seconds, first, length):
    """Onset times -> as `beat_offsets` of a sound of that length in seconds."""
    first = first % beat_seconds
    beats = torch.arange(math.ceil((length - first) / beat_seconds)) * beat_seconds + first
    if not len(beats) or not len(times):
        return torch.zeros(0)
    distance = 1000 * (times - beats[:, None])              # (beats, onsets)
    nearest = distance.gather(1, distance.abs().argmin(1, keepdim=True))[:, 0]
    return nearest[nearest.abs() <= NEAR_BEAT]


def beat_offsets(audio, rate, beat_seconds, first=0):
    """How late in ms (early: below 0) the onset nearest to a beat is, for beats with one within `NEAR_BEAT`.

    Beats lie at `first` seconds + any whole number of beat_seconds. Of onsets that know nothing of the grid,
    a share of `BEAT_ERROR` / `NEAR_BEAT` counts as on it."""
    return offsets_of(onset_times(audio, rate), beat_seconds, first, audio.shape[-1] / rate)


def on_the_grid(offsets):
    """Share of offsets in ms that are within `BEAT_ERROR`; NaN of none."""
    return (offsets.abs() <= BEAT_ERROR).float().mean().item()


# -------------------------------------------------------------------------------- obedience: key and genre
# How well each pitch class fits a key, from the tonic upwards (D. Temperley, What's key for key?, 1999)
PROFILES = {"major": (5, 2, 3.5, 2, 4.5, 4, 2, 4.5, 2, 3.5, 1.5, 4),
            "minor": (5, 2, 3.5, 4.5, 2, 4, 2, 4.5, 3.5, 2, 1.5, 4)}
TONICS = "C Db D Eb E F F# G Ab A Bb B".split()
CLASSES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}


def pitch_classes(audio, rate):
    """How strongly each pitch class sounds, from C upwards (12,).

    Only local maxima of the spectrum count, so that noise between the notes does not; the square root of each
    semitone's magnitude keeps a few loud notes from deciding. From MIDI 48, below which bins are too wide, to
    83."""
    size = 8192
    window = torch.hann_window(size)
    spectrum = torch.stft(audio.mean(0), size, size // 2, window=window, return_complex=True).abs()
    inner = spectrum[1:-1]
    peaks = torch.where((inner > spectrum[:-2]) & (inner >= spectrum[2:]), inner, 0)
    hertz = torch.arange(1, len(spectrum) - 1) * rate / size
    pitch = (69 + 12 * torch.log2(hertz / 440)).round().long()
    used = (pitch >= 48) & (pitch < 84)
    energy = torch.zeros(36, spectrum.shape[1]).index_add_(0, pitch[used] - 48, peaks[used].square())
    return energy.pow(0.25).mean(1).view(3, 12).sum(0)


def key_of(audio, rate):
    """The key of audio (2, n), as "C minor": of 24, that whose profile correlates best with what sounds."""
    heard = pitch_classes(audio, rate)
    heard = heard - heard.mean()
    fits = {}
    for mode, profile in PROFILES.items():
        profile = torch.tensor(profile)
        profile = F.normalize(profile - profile.mean(), dim=0)
        for tonic, name in enumerate(TONICS):
            fits[f"{name} {mode}"] = (heard @ profile.roll(tonic)).item()
    return max(fits, key=fits.get)


def scale_of(key):
    """"C# minor" -> the tonic of the major key of the same notes, 0 to 11. ValueError for what is no key."""
    match = re.fullmatch(r"([A-G])([#b]?) (major|minor)", key.strip())
    if not match:
        raise ValueError(f"{key!r} is not a key like \"C# minor\"")
    tonic = CLASSES[match[1]] + {"#": 1, "b": -1, "": 0}[match[2]]
    return (tonic + 3 * (match[3] == "minor")) % 12


def key_obeyed(found, asked):
    """Whether a key is the one asked for or its relative: C major and A minor have the same notes."""
    return scale_of(found) == scale_of(asked)


def genre_features(audio, rate):
    """What tells genres apart (73,).

    At a level of -20 dB, of 16 log-mel bands the means over time and the standard deviations of them and of
    their changes; onsets a second; how well the spectral flux returns after 24 lags from 0.2 to 2.4 s. Few
    bands and a high floor, so that what an autoencoder does to the treble counts less than the genre."""
    audio = audio * (0.1 / audio.square().mean().sqrt().clamp(min=1e-6))
    mel = log_mel(audio, rate, bands=16).clamp(min=-30)
    similar = autocorrelation(audio, rate)
    similar = F.pad(similar, (0, max(0, 242 - len(similar))))
    lags = torch.from_numpy(np.geomspace(20, 240, 24)).round().long()
    rhythm = highest(similar, 1)[lags] / similar[0].clamp(min=1e-6)
    onsets = torch.tensor([onsets_per_second(audio, rate)])
    return torch.cat([mel.mean(0), mel.std(0), mel.diff(dim=0).std(0), onsets, rhythm]).double()


def nearest_genre(heard, renders, genres):
    """Features (d,) -> the genre with the nearest centroid of renders (n, d). genres: a list of n names.

    Features are divided by their standard deviation over the renders. What varies within every genre counts
    less: distances are measured by the covariance within genres, with 0.1 of a sphere."""
    names = sorted(set(genres))
    owner = torch.tensor([names.index(genre) for genre in genres])
    scale = renders.std(0).clamp(min=1e-6)
    scaled = (renders - renders.mean(0)) / scale
    centroids = torch.stack([scaled[owner == i].mean(0) for i in range(len(names))])
    within = scaled - centroids[owner]
    covariance = within.T @ within / len(within)
    sphere = covariance.diagonal().mean().clamp(min=1e-6) * torch.eye(len(covariance)).to(covariance)
    difference = centroids - (heard - renders.mean(0)) / scale                              # (genres, d)
    distance = (difference * torch.linalg.solve(0.9 * covariance + 0.1 * sphere, difference.T).T).sum(1)
    return names[distance.argmin()]


# -------------------------------------------------------------------------------- what is compared
def spread(items, most):
    """At most so many items of a list, evenly spaced over all of it."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def middle(folder, track, config, seconds):
    """The middle of a track, at most so many seconds -> audio (2, n), and its start in the file in s."""
    audio = torch.cat(list(read_audio(folder / track.name, config)), dim=1)
    audio = audio[:, track.start * config.hop:track.stop * config.hop]
    n = round(seconds * config.sample_rate)
    start = max(0, (audio.shape[1] - n) // 2)
    return audio[:, start:start + n], (track.start * config.hop + start) / config.sample_rate


def read_split(folder, dataset, config, seconds, most):
    """(training, held-out) audio: up to `most` excerpts of `seconds` a side, from the middle of tracks spread
    evenly over the split."""
    return [[middle(folder, track, config, seconds)[0] for track in spread(tracks, most)]
            for tracks in (dataset.train, dataset.validation)]


def make_streams(model, prompts, seconds, args):
    """One stream for each seed, prompts in turn, all at once: audio (2, n) and latents (C, T) of each."""
    c = model.config
    seeds = range(args.seeds)
    cond = model.conditioner([prompts[seed % len(prompts)] for seed in seeds], **c.stream_numbers)
    blocks = math.ceil((seconds * c.frame_rate + decoder_margin(c)) / c.block)
    made = stream(model, cond, blocks=blocks, steps=args.steps, sampler=args.sampler, cfg=args.cfg,
                  seed=seeds)
    progress = tqdm(made, desc="blocks", total=blocks, file=sys.stderr, disable=None)
    latents = torch.cat(list(progress), dim=-1)
    out = []
    for seed, z in zip(seeds, latents.split(1)):
        audio = torch.cat(list(decode_stream(model.autoencoder, z.split(c.block, dim=-1))), dim=-1)[0]
        audio = audio[:, :round(seconds * c.sample_rate)].cpu()
        out.append((audio, z[0].cpu()))
        if args.keep:
            Path(args.keep).mkdir(parents=True, exist_ok=True)
            soundfile.write(Path(args.keep, f"seed{seed}.flac"), pcm(audio[None]), c.sample_rate)
    return out


def through_autoencoder(model, audio):
    """Audio (2, n) encoded and decoded again: what the best streams of such latents would sound like. Whole
    frames, on the CPU."""
    device = next(model.parameters()).device
    latents = encode_chunks(model, [audio])
    pieces = decode_stream(model.autoencoder, (z[None].to(device) for z in latents))
    return torch.cat([piece[0].cpu() for piece in pieces], dim=-1)


def by_chance(recordings, reference, count, samples, rate, draws=20):
    """What real music gets where `count` streams are judged by a few seconds of each.

    Distances to the reference's frames of random excerpts, `samples` long, of as many recordings as there are
    streams, or of all."""
    rng = np.random.default_rng(0)
    distances = []
    for _ in range(draws):
        chosen = [recordings[i] for i in rng.permutation(len(recordings))[:count]]
        starts = [rng.integers(max(0, audio.shape[1] - samples), endpoint=True) for audio in chosen]
        frames = [features(audio[:, start:start + samples], rate) for audio, start in zip(chosen, starts)]
        distances.append(frechet(torch.cat(frames), reference))
    return distances


def jackknife(items, statistic):
    """Standard errors of statistic(items), an array: one of two or more items is left out at a time (Tukey
    1958)."""
    without = [statistic(items[:i] + items[i + 1:]) for i in range(len(items))]
    return np.sqrt((len(items) - 1) * np.var(without, axis=0))


# -------------------------------------------------------------------------------- sound
def sound(model, dataset, prompts, args):
    """Print figures of streams beside those of training recordings, plain and through the autoencoder, and
    those of held-out recordings.

    The fewer the recordings, the further their Gaussian fit lies from any other, whatever they are: beside
    the streams' distance belongs that of as many training recordings (the mean of several draws), not only
    that of all of them."""
    rate = model.config.sample_rate
    seconds = args.seconds or 30
    train, held_out = read_split(Path(args.data), dataset, model.config, seconds, args.excerpts)
    made = [audio for audio, _ in make_streams(model, prompts, seconds, args)]
    sides = {"training": train, "decoded": [through_autoencoder(model, audio) for audio in train],
             "held out": held_out, "streams": made}
    frames = {name: [features(audio, rate) for audio in side] for name, side in sides.items()}
    reference = torch.cat(frames["held out"])

    def distance(parts):
        return frechet(torch.cat(parts), reference)

    print(f"{'':10} {'n':>3} {'onsets/s':>9} {'chroma change':>14} {'level dB':>9} "
          f"{'distance to held out':>21}")
    for name, side in sides.items():
        onsets = mean_of([onsets_per_second(audio, rate) for audio in side])
        change = mean_of([chroma_change(audio, rate) for audio in side])
        loudness = mean_of([level(audio) for audio in side])
        apart = "" if name == "held out" else f"{distance(frames[name]):.1f}"
        print(f"{name:10} {len(side):3d} {onsets:9.2f} {change:14.3f} {loudness:9.1f} {apart:>21}")
    if len(made) > 1:
        error = jackknife(frames["streams"], distance)
        print(f"streams: standard error of their distance, one left out at a time: {error:.1f}")
    draws = max(1, len(train) // len(made))
    for name in "training", "decoded":
        alike = [distance(frames[name][i::draws][:len(made)]) for i in range(draws)]
        print(f"{name} recordings, {min(len(train), len(made))} at a time: distance {np.mean(alike):.1f} "
              f"({min(alike):.1f} to {max(alike):.1f})")
    for name in "streams", "held out":
        print_seams(name, sides[name], model.config)
    if args.picture:
        picture(args.picture, {f"held-out recording: {prompts[0]}": held_out[0],
                               "stream, seed 0, the same prompt": made[0]}, rate)


def mean_of(figures):
    """Their mean without NaN; NaN where nothing else is there."""
    return torch.tensor(figures, dtype=torch.float64).nanmean().item()


def print_seams(name, sounds, config):
    """Print `seams` of sounds (2, n), the mean over them. Of recordings, in which nothing happens there, it
    shows how far the figures are off by chance."""
    energy, flux = zip(*(seams(audio, config.block * config.hop) for audio in sounds))
    print(f"{name}: energy at the boundaries of blocks {mean_of(energy):.3f} of that elsewhere, "
          f"spectral flux {mean_of(flux):.3f}")


def picture(path, sounds, rate, seconds=15):
    """Mel spectrograms, one under the other, of {title: audio (2, n)} -> PNG. UserError: no matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    _, axes = pyplot.subplots(len(sounds), 1, figsize=(9, 2.6 * len(sounds)), sharex=True, squeeze=False)
    for axis, (title, audio) in zip(axes[:, 0], sounds.items()):
        mel = log_mel(audio[:, :seconds * rate], rate, size=4096, bands=160).T
        shown = mel.shape[1] * HOP / rate
        axis.imshow(mel, origin="lower", aspect="auto", vmin=-70, vmax=10, cmap="magma",
                    extent=(0, shown, 0, 160))
        axis.set_title(title, fontsize=9)
        axis.set_yticks([])
        axis.set_ylabel("mel bands")
    axes[-1, 0].set_xlabel("seconds")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=90)
    pyplot.close()
    print(f"-> {path}", file=sys.stderr)


# -------------------------------------------------------------------------------- drift
def summary(curve, window):
    """Distances, one every `window` seconds -> mean, last 15 % less the first, slope over two minutes."""
    ends = max(1, round(0.15 * len(curve)))
    slope = np.polyfit(window / 120 * np.arange(len(curve)), curve, 1)[0]
    return np.mean(curve), np.mean(curve[-ends:]) - np.mean(curve[:ends]), slope


def drift(model, dataset, prompts, args):
    """Print the distance to held-out recordings, `--window` seconds at a time, over all seeds, its gap and
    slope, and how the last minute differs from the first. CSV and PNG."""
    rate = model.config.sample_rate
    seconds = args.seconds or 120
    window = args.window
    if seconds < 2 * window:
        raise UserError(f"--seconds {seconds} is less than two of the {window} s that --drift looks at "
                        "together (--window)")
    train, held_out = read_split(Path(args.data), dataset, model.config, 60, args.excerpts)
    reference = torch.cat([features(audio, rate) for audio in held_out])
    made = make_streams(model, prompts, seconds, args)
    starts = range(0, int(seconds) - window + 1, window)
    windows = [[audio[:, start * rate:(start + window) * rate] for start in starts] for audio, _ in made]
    frames = [[features(part, rate) for part in parts] for parts in windows]

    def curve_of(streams):
        return np.array([frechet(torch.cat(together), reference) for together in zip(*streams)])

    def curve_and_summary(streams):
        curve = curve_of(streams)
        return [*curve, *summary(curve, window)]

    curve = curve_of(frames)
    rows = drift_rows(model.config, starts, window, curve, windows, [latents for _, latents in made])
    for row in rows:
        print(f"{row['second']:4d} s  distance {row['distance']:8.1f}  latents {row['latent_std']:.3f}  "
              f"clipped {100 * row['clipped']:.4f} %")
    mean, gap, slope = summary(curve, window)
    print(f"mean {mean:.1f}, last 15 % - first 15 %: {gap:+.1f}, slope over 2 minutes: {slope:+.1f}, "
          f"{len(made)} streams")
    errors = np.zeros(len(curve))
    if len(made) > 1:
        *errors, of_mean, of_gap, of_slope = jackknife(frames, curve_and_summary)
        print(f"standard errors, one stream left out at a time: mean {of_mean:.1f}, gap {of_gap:.1f}, "
              f"slope {of_slope:.1f}")
    streams = [audio for audio, _ in made]
    compare_ends(streams, reference, rate, min(60, seconds // 2))
    print_seams("streams", streams, model.config)
    beside = {}
    decoded = [through_autoencoder(model, audio) for audio in train]
    for name, recordings in {"as they are": train, "through the autoencoder": decoded}.items():
        alike = by_chance(recordings, reference, len(made), window * rate, rate)
        print(f"{window} s of {min(len(train), len(made))} training recordings, {name}: "
              f"distance {np.mean(alike):.1f}, standard deviation {np.std(alike):.1f} over {len(alike)} "
              "draws")
        beside[f"training recordings {name}"] = np.mean(alike)
    write_rows(f"{args.out}.csv", rows)
    drift_picture(args.out, rows, window, np.array(errors), beside, len(made))


def drift_rows(config, starts, window, curve, windows, latents):
    """A dictionary for each window: second, distance, deviation of the latents, share of clipped samples."""
    rows = []
    for start, distance, *parts in zip(starts, curve, *windows):
        frames = slice(round(start * config.frame_rate), round((start + window) * config.frame_rate))
        rows.append({"second": start, "distance": distance,
                     "latent_std": torch.stack([z[:, frames] for z in latents]).std().item(),
                     "clipped": np.mean([(part.abs() > 1).float().mean().item() for part in parts])})
    return rows


def compare_ends(sounds, reference, rate, seconds):
    """Print how the last seconds of sounds (2, n) differ from the first in what is heard."""
    n = seconds * rate
    ends = [[audio[:, :n] for audio in sounds], [audio[:, -n:] for audio in sounds]]
    first, last = (frechet(torch.cat([features(audio, rate) for audio in end]), reference) for end in ends)
    loudness = [mean_of([level(audio) for audio in end]) for end in ends]
    bright = [mean_of([brightness(audio, rate) for audio in end]) for end in ends]
    wide = [mean_of([width(audio) for audio in end]) for end in ends]
    print(f"last {seconds} s: distance {last:.1f}, {last / first:.2f} times that of the first; "
          f"level {loudness[1] - loudness[0]:+.1f} dB, "
          f"brightness {100 * (bright[1] / max(bright[0], 1e-9) - 1):+.1f} %, "
          f"width {100 * (wide[1] / max(wide[0], 1e-9) - 1):+.1f} %")


def write_rows(path, rows):
    """Dictionaries of the same keys -> a CSV file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def drift_picture(name, rows, window, errors, beside, streams):
    """Distances over time with their standard errors, and those of recordings as lines -> PNG.

    name: path of the CSV and PNG without suffix; beside: {label: distance}. No matplotlib, no picture."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"-> {name}.csv (pip install matplotlib for a picture)", file=sys.stderr)
        return
    middles = [row["second"] + window / 2 for row in rows]
    curve = np.array([row["distance"] for row in rows])
    pyplot.figure(figsize=(6, 3))
    pyplot.plot(middles, curve, label=f"{streams} streams, one standard error")
    pyplot.fill_between(middles, curve - errors, curve + errors, alpha=0.2)
    for style, (label, distance) in zip(("k:", "k--"), beside.items()):
        pyplot.plot([0, rows[-1]["second"] + window], [distance] * 2, style, linewidth=1, label=label)
    pyplot.xlabel("seconds")
    pyplot.ylabel("distance to held-out audio")
    pyplot.ylim(bottom=0)
    pyplot.legend(fontsize="small", loc="lower right")
    pyplot.tight_layout()
    pyplot.savefig(f"{name}.png", dpi=100)
    print(f"-> {name}.csv, {name}.png", file=sys.stderr)


# -------------------------------------------------------------------------------- obedience
def read_labels(folder):
    """metadata.csv of a folder -> {file name: row}. UserError where it lacks a column of `LABELS`."""
    path = Path(folder, "metadata.csv")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--obey needs the labels of {path} ({error})") from None
    lacking = [column for column in LABELS if not rows or column not in rows[0]]
    if lacking:
        raise UserError(f"{path}: --obey needs the columns {', '.join(lacking)}")
    try:
        for row in rows:
            row["bpm"] = float(row["bpm"])
            row["first_beat"] = float(row["first_beat"])
            scale_of(row["key"])
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {row['file_name']}: {error}") from None
    return {row["file_name"]: row for row in rows}


def hear(audio, rate):
    """What obedience is judged by: tempo in bpm, key, features of the genre, times of onsets, seconds."""
    return {"tempo": tempo_of(audio, rate), "key": key_of(audio, rate),
            "features": genre_features(audio, rate), "onsets": onset_times(audio, rate),
            "seconds": audio.shape[1] / rate}


def obedience(heard, asked, genre, first):
    """{row of the table: right or not, or a share} for one sound; tempo and beats only where there are drums.

    asked: a row of labels; genre: the one found; first: seconds to a beat."""
    same_scale = key_obeyed(heard["key"], asked["key"])
    figures = {"key or its relative": same_scale,
               "key": same_scale and heard["key"].split()[1] == asked["key"].split()[1],
               "genre": genre == asked["genre"]}
    if "drums" in asked["instruments"]:
        figures["tempo, octaves allowed"] = tempo_obeyed(heard["tempo"], asked["bpm"])
        figures["tempo"] = tempo_obeyed(heard["tempo"], asked["bpm"], octaves=False)
        offsets = offsets_of(heard["onsets"], 60 / asked["bpm"], first, heard["seconds"])
        figures["beats on the grid"] = on_the_grid(offsets)
    return figures


def genre_of_each(heard, pieces, references, genres):
    """The genre found for each sound. pieces: the number of the reference that its prompt was taken from,
    which is left out: a render must not be compared with itself, nor a stream with what it was asked for."""
    found = []
    for sound, piece in zip(heard, pieces):
        others = [i for i in range(len(genres)) if i != piece]
        found.append(nearest_genre(sound["features"], references[others], [genres[i] for i in others]))
    return found


def obey(model, dataset, args):
    """Print how often streams obey held-out prompts in tempo, key, genre and beats.

    Beside it: the same of the renders that the prompts describe, through the autoencoder and plain, and of
    renders judged by the labels of all others."""
    c = model.config
    folder = Path(args.data)
    seconds = args.seconds or 15
    labels = read_labels(folder)
    labelled = [track for track in dataset.validation if track.name in labels]
    if not labelled:
        raise UserError(f"{folder}/metadata.csv: no labels for {dataset.validation[0].name} and others held "
                        "out")
    tracks = spread(labelled, args.seeds)
    asked = [labels[track.name] for track in tracks]
    excerpts = [middle(folder, track, c, seconds) for track in tracks]
    renders = [hear(audio, c.sample_rate) for audio, _ in excerpts]
    decoded = [hear(through_autoencoder(model, audio), c.sample_rate) for audio, _ in excerpts]
    streamed = make_streams(model, [known_words(model, track.prompt) for track in tracks], seconds, args)
    streams = [hear(audio, c.sample_rate) for audio, _ in streamed]

    more = [track for track in labelled if track not in tracks]
    more += [track for track in spread(dataset.train, args.excerpts) if track.name in labels]
    features_of_more = [genre_features(middle(folder, track, c, seconds)[0], c.sample_rate) for track in more]
    references = torch.stack([heard["features"] for heard in renders] + features_of_more)
    genres = [row["genre"] for row in asked] + [labels[track.name]["genre"] for track in more]

    once = range(len(tracks))
    turns = [seed % len(tracks) for seed in range(args.seeds)]      # the piece whose prompt each stream got
    firsts = [row["first_beat"] * c.hop / c.sample_rate - start for row, (_, start) in zip(asked, excerpts)]

    def judged(sounds, pieces, firsts):
        found = genre_of_each(sounds, pieces, references, genres)
        return [obedience(heard, asked[piece], genre, first)
                for heard, piece, genre, first in zip(sounds, pieces, found, firsts)]

    found = genre_of_each(renders, once, references, genres)
    print_obedience({
        "streams": judged(streams, turns, [0] * len(turns)),
        "decoded": judged(decoded, once, firsts),
        "renders": judged(renders, once, firsts),
        "others'": [obedience(renders[i], asked[j], found[i], firsts[j])
                    for i in once for j in once if i != j],
    }, len(references))


def print_obedience(columns, references):
    """The table of `obey`, in %. columns: {name: figures of each sound}; references: renders that genres are
    known from."""
    rows = list(dict.fromkeys(row for figures in columns["renders"] for row in figures))
    print(f"{'%':24}" + "".join(f" {name:>9}" for name in columns))
    for row in rows:
        cells = []
        for sounds in columns.values():
            right = [float(figures[row]) for figures in sounds if row in figures]
            cells.append(f"{100 * mean_of(right):9.0f}" if right else " " * 9)
        judged = sum(row in figures for figures in columns["streams"])
        print(f"{row:24} {' '.join(cells)}   ({judged} streams)")
    print(f"genre: nearest centroid of {references} renders, without the piece itself\n"
          f"beats: of those with an onset within {NEAR_BEAT} ms, those that have it within {BEAT_ERROR} ms; "
          "with drums only, like tempo\n"
          "others': renders judged by the labels of all other pieces: what a player gets who does not listen")


# -------------------------------------------------------------------------------- the command line
def parse_args():
    p = argparse.ArgumentParser(description="Measure a checkpoint's streams beside held-out recordings.",
                                allow_abbrev=False)
    p.add_argument("--data", required=True,
                   help="folder of audio that the model was trained on; its held-out tracks are the measure")
    p.add_argument("--ckpt", help="checkpoint (default: as sample.py)")
    p.add_argument("--drift", action="store_true",
                   help="follow the distance over time instead of printing figures")
    p.add_argument("--obey", action="store_true",
                   help="how often streams have their prompt's tempo, key and genre; takes a metadata.csv "
                        f"with the columns {', '.join(LABELS)}")
    p.add_argument("--seconds", type=whole,
                   help="length of each stream (default: 30, --drift 120, --obey 15)")
    p.add_argument("--window", type=whole, default=10, help="seconds that --drift looks at together")
    p.add_argument("--seeds", type=whole, help="number of streams (default: 8, with --obey 48)")
    p.add_argument("--excerpts", type=whole,
                   help="recordings of each side of the split, at most (default: 40); with --obey training "
                        "recordings that show what genres are like (default: 400)")
    p.add_argument("--steps", type=step_count)
    p.add_argument("--cfg", type=finite)
    p.add_argument("--sampler", choices=SAMPLERS)
    p.add_argument("--picture",
                   help="PNG with the mel spectrograms of a held-out recording and of a stream; not with "
                        "--drift, which draws its own, nor --obey")
    p.add_argument("--keep", help="folder to keep the streams in, as FLAC")
    p.add_argument("--out", default="out/drift", help="name of the CSV and PNG of --drift, without suffix")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=PRECISIONS, default="float32")
    p.add_argument("--threads", type=thread_count, help="CPU threads (default: PyTorch's choice)")
    args = p.parse_args()
    if args.drift and args.obey:
        raise UserError("--drift and --obey are two measurements: one at a time")
    if args.drift and args.picture:
        raise UserError("--picture is for the figures without --drift, which draws its own (--out)")
    if args.obey and args.picture:
        raise UserError("--picture is for the figures without --obey")
    args.seeds = args.seeds or (48 if args.obey else 8)
    args.excerpts = args.excerpts or (400 if args.obey else 40)
    return args


def main():
    args = parse_args()
    for path in args.picture, args.drift and f"{args.out}.csv", args.keep and Path(args.keep, "seed0.flac"):
        if path:
            writable(path)
    torch.set_flush_denormal(True)
    if speed:
        speed.keep_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.obey:
        read_labels(args.data)                              # before an hour of encoding, not after it
    path = args.ckpt or default_checkpoint()
    model = load(path).to(device_of(args.device))
    check_streams(path, model.stage)
    dataset = data.prepare(args.data, model, device=args.device)    # the training's own split
    precision = playing_precision(model, args.precision)
    settings = sampling_settings(model, args.steps, args.sampler, args.cfg)
    print(f"{path}: {model.stage}, {settings}, {precision}", file=sys.stderr)
    with torch.no_grad():
        if args.obey:
            obey(model, dataset, args)
            return
        prompts = [known_words(model, track.prompt) for track in dataset.validation]
        (drift if args.drift else sound)(model, dataset, prompts, args)


if __name__ == "__main__":
    run(main)
