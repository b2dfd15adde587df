"""Is it music, and does it stay so? Figures of a checkpoint's streams beside the same figures of held-out recordings.

    python measure.py --data data/nano                      # sound: 8 streams of 30 s against the held-out tracks
    python measure.py --data data/nano --drift              # 8 streams of 2 minutes, ten seconds at a time

The distance is Frechet's between Gaussian fits of 64-band log-mel frames with their deltas: no network judges another.
"""
import argparse
import csv
import math
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import compute_deltas
from torchaudio.transforms import MelSpectrogram
from tqdm import tqdm

import data
from audio import decode_stream, decoder_margin, pcm, read_audio
from common import (PRECISIONS, UserError, check_streams, default_checkpoint, device_of, finite, load, playing_precision,
                    run, speed, step_count, thread_count, whole, writable)
from sample import SAMPLERS, known_words, sampling_settings, stream

HOP = 512                                                   # samples between frames of the figures below


# -------------------------------------------------------------------------------- figures of a sound
def log_mel(audio, rate):
    """Audio (2, n) -> power of the mid signal in 64 mel bands in dB, floor -80 (frames, 64)."""
    mel = MelSpectrogram(rate, n_fft=2048, hop_length=HOP, n_mels=64, f_min=30, normalized=True)(audio.mean(0))
    return 10 * mel.clamp(min=1e-8).log10().T


def features(audio, rate):
    """Log-mel frames with deltas over five frames: (frames, 128)."""
    mel = log_mel(audio, rate)
    return torch.cat([mel, compute_deltas(mel.T).T], dim=1)


def frechet(a, b):
    """Frechet distance, in dB squared, between Gaussian fits of two sets of frames (n, d) and (m, d)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def onsets_per_second(audio, rate):
    """Peaks of spectral flux: frames that rise 1.5 dB a band above the half second around them, highest within 50 ms."""
    flux = log_mel(audio, rate).diff(dim=0).clamp(min=0).mean(1)[None, None]
    near, around = round(0.05 * rate / HOP), round(0.25 * rate / HOP)
    highest = torch.nn.functional.max_pool1d(flux, 2 * near + 1, 1, near)
    level = torch.nn.functional.avg_pool1d(flux, 2 * around + 1, 1, around, count_include_pad=False)
    return ((flux == highest) & (flux > level + 1.5)).sum().item() / (audio.shape[-1] / rate)


def chroma_change(audio, rate, seconds=2.0):
    """Mean cosine distance between the pitch-class contents (55-2000 Hz) of moments `seconds` apart, where both sound; NaN if none do."""
    size, hop = 8192, 2048
    spectrum = torch.stft(audio.mean(0), size, hop, window=torch.hann_window(size), return_complex=True).abs()
    hertz = torch.arange(spectrum.shape[0]) * rate / size
    used = (hertz > 55) & (hertz < 2000)
    pitch = (12 * torch.log2(hertz[used] / 440)).round().long() % 12
    chroma = torch.zeros(12, spectrum.shape[1]).index_add_(0, pitch, spectrum[used])
    sounds, chroma, lag = chroma.norm(dim=0) > 1e-2, torch.nn.functional.normalize(chroma, dim=0), round(seconds * rate / hop)
    return (1 - (chroma[:, lag:] * chroma[:, :-lag]).sum(0))[sounds[lag:] & sounds[:-lag]].mean().item()


def picture(path, sounds, rate, seconds=15):
    """Mel spectrograms, one under the other, of {title: audio (2, n)} -> PNG. UserError without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    _, axes = pyplot.subplots(len(sounds), 1, figsize=(9, 2.6 * len(sounds)), sharex=True, squeeze=False)
    for axis, (title, audio) in zip(axes[:, 0], sounds.items()):
        mel = MelSpectrogram(rate, n_fft=4096, hop_length=HOP, n_mels=160, f_min=30, normalized=True)(audio.mean(0)[:seconds * rate])
        shown = mel.shape[1] * HOP / rate
        axis.imshow(10 * mel.clamp(min=1e-8).log10(), origin="lower", aspect="auto", vmin=-70, vmax=10, cmap="magma", extent=(0, shown, 0, 160))
        axis.set_title(title, fontsize=9), axis.set_yticks([]), axis.set_ylabel("mel bands")
    axes[-1, 0].set_xlabel("seconds")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pyplot.tight_layout(), pyplot.savefig(path, dpi=90), pyplot.close()
    print(f"-> {path}", file=sys.stderr)


# -------------------------------------------------------------------------------- what is compared
def read_split(folder, dataset, config, seconds, most):
    """(training, held-out) audio: up to `most` excerpts of `seconds` a side, from the middle of the split's tracks."""
    sides, n = [], round(seconds * config.sample_rate)
    for tracks in (dataset.train, dataset.validation):
        excerpts = []
        for track in tracks[::max(1, len(tracks) // most)][:most]:
            audio = torch.cat(list(read_audio(folder / track.name, config)), dim=1)[:, track.start * config.hop:track.stop * config.hop]
            start = max(0, (audio.shape[1] - n) // 2)
            excerpts.append(audio[:, start:start + n])
        sides.append(excerpts)
    return sides


def make_streams(model, prompts, seconds, args):
    """One stream for each seed, prompts in turn, all at once: audio (2, n) and latents (C, T) of each."""
    c, out, seeds = model.config, [], range(args.seeds)
    cond = model.conditioner([prompts[seed % len(prompts)] for seed in seeds], **c.stream_numbers)
    blocks = math.ceil((seconds * c.frame_rate + decoder_margin(c)) / c.block)
    made = stream(model, cond, blocks=blocks, steps=args.steps, sampler=args.sampler, cfg=args.cfg, seed=seeds)
    latents = torch.cat(list(tqdm(made, desc="blocks", total=blocks, file=sys.stderr, disable=None)), dim=-1)
    for seed, z in zip(seeds, latents.split(1)):
        audio = torch.cat(list(decode_stream(model.autoencoder, z.split(c.block, dim=-1))), dim=-1)[0, :, :round(seconds * c.sample_rate)].cpu()
        out.append((audio, z[0].cpu()))
        if args.keep:
            Path(args.keep).mkdir(parents=True, exist_ok=True)
            soundfile.write(Path(args.keep, f"seed{seed}.flac"), pcm(audio[None]), c.sample_rate)
    return out


def through_autoencoder(model, audio):
    """Audio (2, n) encoded and decoded again: what the best streams of such latents would sound like. Whole frames, on the CPU."""
    device, latents = next(model.parameters()).device, data.encode_chunks(model.autoencoder, model.config, [audio])
    return torch.cat([piece[0].cpu() for piece in decode_stream(model.autoencoder, (z[None].to(device) for z in latents))], dim=-1)


def by_chance(recordings, reference, count, samples, rate, draws=20):
    """What real music gets where `count` streams are judged by a few seconds of each: distances of random excerpts of
    `samples` of as many recordings (as many as there are) to the reference's frames."""
    rng, distances = np.random.default_rng(0), []
    for _ in range(draws):
        chosen = [recordings[i] for i in rng.permutation(len(recordings))[:count]]
        starts = [rng.integers(max(0, a.shape[1] - samples), endpoint=True) for a in chosen]
        distances.append(frechet(torch.cat([features(a[:, start:start + samples], rate) for a, start in zip(chosen, starts)]), reference))
    return distances


def jackknife(items, statistic):
    """Standard errors of statistic(items), an array, from leaving out one item at a time (two or more; Tukey 1958)."""
    without = [statistic(items[:i] + items[i + 1:]) for i in range(len(items))]
    return np.sqrt((len(items) - 1) * np.var(without, axis=0))


def summary(curve, window):
    """Distances, one every `window` seconds -> their mean, the last 15 % less the first, and the slope over two minutes."""
    ends = max(1, round(0.15 * len(curve)))
    return np.mean(curve), np.mean(curve[-ends:]) - np.mean(curve[:ends]), np.polyfit(window / 120 * np.arange(len(curve)), curve, 1)[0]


def sound(model, dataset, prompts, args):
    """Print the figures of 30 s streams beside those of training recordings, the same through the autoencoder, and held-out ones.

    The fewer the recordings, the further their Gaussian fit lies from any other, whatever they are: beside the streams'
    distance belongs that of as many training recordings (the mean of several draws), not only that of all of them."""
    rate, seconds = model.config.sample_rate, args.seconds or 30
    train, held_out = read_split(Path(args.data), dataset, model.config, seconds, args.excerpts)
    made = [audio for audio, _ in make_streams(model, prompts, seconds, args)]
    sides = {"training": train, "decoded": [through_autoencoder(model, a) for a in train], "held out": held_out, "streams": made}
    frames = {name: [features(a, rate) for a in side] for name, side in sides.items()}
    reference = torch.cat(frames["held out"])
    distance = lambda sounds: frechet(torch.cat(sounds), reference)
    print(f"{'':10} {'n':>3} {'onsets/s':>9} {'chroma change':>14} {'level dB':>9} {'distance to held out':>21}")
    for name, side in sides.items():
        mean = lambda f: torch.tensor([f(a, rate) for a in side]).nanmean().item()
        level = np.mean([20 * math.log10(a.square().mean().sqrt().item() + 1e-9) for a in side])
        apart = "" if name == "held out" else f"{distance(frames[name]):.1f}"
        print(f"{name:10} {len(side):3d} {mean(onsets_per_second):9.2f} {mean(chroma_change):14.3f} {level:9.1f} {apart:>21}")
    if len(made) > 1:
        print(f"streams: standard error of their distance, one left out at a time: {jackknife(frames['streams'], distance):.1f}")
    draws = max(1, len(train) // len(made))
    for name in "training", "decoded":
        alike = [distance(frames[name][i::draws][:len(made)]) for i in range(draws)]
        print(f"{name} recordings, {min(len(train), len(made))} at a time: distance {np.mean(alike):.1f} ({min(alike):.1f} to {max(alike):.1f})")
    if args.picture:
        picture(args.picture, {f"held-out recording: {prompts[0]}": held_out[0], "stream, seed 0, the same prompt": made[0]}, rate)


def drift(model, dataset, prompts, args):
    """The distance to held-out recordings, `--window` seconds at a time, over all seeds; its gap and slope; CSV and PNG."""
    rate, seconds, window = model.config.sample_rate, args.seconds or 120, args.window
    if seconds < 2 * window:
        raise UserError(f"--seconds {seconds} is less than two of the {window} s that --drift looks at together (--window)")
    train, held_out = read_split(Path(args.data), dataset, model.config, 60, args.excerpts)
    reference = torch.cat([features(a, rate) for a in held_out])
    made, rows, starts = make_streams(model, prompts, seconds, args), [], range(0, int(seconds) - window + 1, window)
    windows = [[a[:, start * rate:(start + window) * rate] for start in starts] for a, _ in made]
    frames = [[features(a, rate) for a in own] for own in windows]
    curve_of = lambda streams: np.array([frechet(torch.cat(together), reference) for together in zip(*streams)])
    curve = curve_of(frames)
    for start, distance, *audio in zip(starts, curve, *windows):
        at = slice(round(start * model.config.frame_rate), round((start + window) * model.config.frame_rate))
        rows.append(dict(second=start, distance=distance, latent_std=torch.stack([z[:, at] for _, z in made]).std().item(),
                         clipped=np.mean([(a.abs() > 1).float().mean().item() for a in audio])))
    for row in rows:
        print(f"{row['second']:4d} s  distance {row['distance']:8.1f}  latents {row['latent_std']:.3f}  clipped {100 * row['clipped']:.4f} %")
    mean, gap, slope = summary(curve, window)
    print(f"mean {mean:.1f}, last 15 % - first 15 %: {gap:+.1f}, slope over 2 minutes: {slope:+.1f}, {len(made)} streams")
    errors = np.zeros(len(curve))
    if len(made) > 1:
        *errors, of_mean, of_gap, of_slope = jackknife(frames, lambda streams: [*(own := curve_of(streams)), *summary(own, window)])
        print(f"standard errors, one stream left out at a time: mean {of_mean:.1f}, gap {of_gap:.1f}, slope {of_slope:.1f}")
    beside = {}
    for name, recordings in ("as they are", train), ("through the autoencoder", [through_autoencoder(model, a) for a in train]):
        alike = by_chance(recordings, reference, len(made), window * rate, rate)
        print(f"{window} s of {min(len(train), len(made))} training recordings, {name}: distance {np.mean(alike):.1f}, "
              f"standard deviation {np.std(alike):.1f} over {len(alike)} draws")
        beside[f"training recordings {name}"] = np.mean(alike)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{args.out}.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"-> {args.out}.csv (pip install matplotlib for a picture)", file=sys.stderr)
        return
    pyplot.figure(figsize=(6, 3))
    middles = [row["second"] + window / 2 for row in rows]
    pyplot.plot(middles, curve, label=f"{len(made)} streams, one standard error")
    pyplot.fill_between(middles, curve - errors, curve + errors, alpha=0.2)
    for style, (name, distance) in zip(("k:", "k--"), beside.items()):
        pyplot.plot([0, rows[-1]["second"] + window], [distance] * 2, style, linewidth=1, label=name)
    pyplot.xlabel("seconds"), pyplot.ylabel("distance to held-out audio"), pyplot.ylim(bottom=0)
    pyplot.legend(fontsize="small", loc="lower right"), pyplot.tight_layout()
    pyplot.savefig(f"{args.out}.png", dpi=100)
    print(f"-> {args.out}.csv, {args.out}.png", file=sys.stderr)


def main():
    p = argparse.ArgumentParser(description="Measure a checkpoint's streams beside held-out recordings.", allow_abbrev=False)
    p.add_argument("--data", required=True, help="folder of audio that the model was trained on; its held-out tracks are the measure")
    p.add_argument("--ckpt", help="checkpoint (default: as sample.py)")
    p.add_argument("--drift", action="store_true", help="follow the distance over time instead of printing figures")
    p.add_argument("--seconds", type=whole, help="length of each stream (default: 30, with --drift 120)")
    p.add_argument("--window", type=whole, default=10, help="seconds that --drift looks at together")
    p.add_argument("--seeds", type=whole, default=8, help="number of streams")
    p.add_argument("--excerpts", type=whole, default=40, help="recordings of each side of the split, at most")
    p.add_argument("--steps", type=step_count)
    p.add_argument("--cfg", type=finite)
    p.add_argument("--sampler", choices=SAMPLERS)
    p.add_argument("--picture", help="PNG with the mel spectrograms of a held-out recording and of a stream; not with --drift, which draws its own")
    p.add_argument("--keep", help="folder to keep the streams in, as FLAC")
    p.add_argument("--out", default="out/drift", help="name of the CSV and PNG of --drift, without suffix")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=PRECISIONS, default="float32")
    p.add_argument("--threads", type=thread_count, help="CPU threads (default: PyTorch's choice)")
    args = p.parse_args()
    if args.drift and args.picture:
        raise UserError("--picture is for the figures without --drift, which draws its own (--out)")
    for path in args.picture, args.drift and f"{args.out}.csv", args.keep and Path(args.keep, "seed0.flac"):
        if path:
            writable(path)
    torch.set_flush_denormal(True)
    if speed:
        speed.keep_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.ckpt or default_checkpoint()
    model = load(path).to(device_of(args.device))
    check_streams(path, model.stage)
    dataset = data.prepare(args.data, model, device=args.device)    # the training's own split
    prompts = [known_words(model, track.prompt) for track in dataset.validation]
    precision = playing_precision(model, args.precision)
    print(f"{path}: {model.stage}, {sampling_settings(model, args.steps, args.sampler, args.cfg)}, {precision}", file=sys.stderr)
    with torch.no_grad():
        (drift if args.drift else sound)(model, dataset, prompts, args)


if __name__ == "__main__":
    run(main)
