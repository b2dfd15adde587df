"""Figures of a sound: spectra, onsets, chroma, tempo, key, genre, beats, seams, the distance of a copy.

Everything takes audio (2, n) in [-1, 1] and its rate in Hz, and nothing needs more than torch.
"""
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from torchaudio.functional import compute_deltas
from torchaudio.transforms import MelSpectrogram

HOP = 512                                                   # samples between frames of `log_mel`
BEAT_ERROR = 25                                             # ms from the grid that a beat may lie
NEAR_BEAT = 60                                              # ms around a beat where its onset is looked for


# -------------------------------------------------------------------------------- sound
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
    from the box before. Elsewhere is 31 places in each block, evenly spaced. nan for less than two blocks."""
    mid = audio.mean(0)
    # boxes of small blocks reach beyond the ends
    first = -(-2 * box // block_samples) * block_samples
    last = len(mid) - block_samples - max(0, box // 2 - block_samples // 32)
    if first >= last:
        return math.nan, math.nan
    boundaries = torch.arange(first, last, block_samples)
    places = boundaries[:, None] + torch.arange(32) * block_samples // 32                   # (boundaries, 32)
    samples = places[..., None] - box // 2 + torch.arange(box)                         # (boundaries, 32, box)
    energy = mid[samples].square().mean((0, 2))                                             # (32,)
    here, before = (10 * torch.fft.rfft(part * torch.hann_window(box)).abs().square().clamp(min=1e-3).log10()
                    for part in (mid[samples], mid[samples - box]))
    flux = (here - before).clamp(min=0).mean((0, 2))                                        # (32,)
    return tuple((curve[0] / curve[1:].mean()).item() for curve in (energy, flux))


# -------------------------------------------------------------------------------- a copy
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


def tempo_obeyed(found, asked, octaves=True):
    """Whether a tempo is the one asked for within 4 %. octaves: or 2 or 4 times as fast or slow, as people
    hear tempo too."""
    ratios = (1, 2, 4, 1 / 2, 1 / 4) if octaves else (1,)
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
