"""Is it music, does it stay so, and is it what was asked for? Figures of a checkpoint's streams beside the
same figures of recordings held out from its training.

    python measure.py --data data/band                      # sound: 8 streams of 30 s
    python measure.py --data data/band --drift              # 8 streams of 2 minutes, ten seconds at a time
    python measure.py --data data/band --obey               # 48 streams of 15 s: tempo, key, genre, beats

The distance is Frechet's between Gaussian fits of 64-band log-mel frames with their deltas: no network judges
another. Obedience needs exact labels beside the prompts: `metadata.csv` with the columns of `LABELS`.
"""
import argparse
import csv
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from tqdm import tqdm

import data
from audio import decode_stream, decoder_margin, encode_chunks, pcm
from common import (PRECISIONS, UserError, check_streams, default_checkpoint, device_of, finite, load,
                    playing_precision, run, say, speed, step_count, thread_count, whole, writable)
from controls import Given, steady_beat
from figures import (BEAT_ERROR, HOP, NEAR_BEAT, beat_offsets, brightness, chroma_change, chroma_correlation,
                     features, frechet, genre_features, key_obeyed, key_of, level, log_mel, nearest_genre,
                     offsets_of, on_the_grid, onset_times, onsets_per_second, scale_of, seams, tempo_obeyed,
                     tempo_of, width)
from recordings import read_audio
from sample import SAMPLERS, known_words, sampling_settings, stream

LABELS = ("file_name", "genre", "instruments", "key", "bpm", "first_beat")


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


def make_streams(model, prompts, seconds, args, beat=None, sketch=None):
    """One stream for each seed, prompts in turn, all at once: audio (2, n) and latents (C, T) of each.

    beat, sketch: see `stream`."""
    c = model.config
    seeds = range(args.seeds)
    cond = model.conditioner([prompts[seed % len(prompts)] for seed in seeds], **c.stream_numbers)
    blocks = math.ceil((seconds * c.frame_rate + decoder_margin(c)) / c.block)
    made = stream(model, cond, blocks=blocks, steps=args.steps, sampler=args.sampler, cfg=args.cfg,
                  seed=seeds, beat=beat, sketch=sketch)
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


def latents_of(track, start, seconds, config):
    """The stored latents (channels, frames) of a track's excerpt that begins at this second of its file."""
    first = round(start * config.frame_rate) - track.start
    frames = track.latents[first:first + round(seconds * config.frame_rate)]
    return torch.from_numpy(frames.T.astype(np.float32))


def from_latents(model, track, start, seconds):
    """The excerpt of a track that begins at this second of its file, decoded from its stored latents: audio
    (2, n), on the CPU."""
    c = model.config
    latents = latents_of(track, start, seconds, c)[None].to(next(model.parameters()).device)
    pieces = decode_stream(model.autoencoder, latents.split(c.block, dim=-1))
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
def sound(model, dataset, prompts, args, beat):
    """Print figures of streams beside those of training recordings, plain and through the autoencoder, and
    those of held-out recordings.

    The fewer the recordings, the further their Gaussian fit lies from any other, whatever they are: beside
    the streams' distance belongs that of as many training recordings (the mean of several draws), not only
    that of all of them."""
    rate = model.config.sample_rate
    seconds = args.seconds or 30
    train, held_out = read_split(Path(args.data), dataset, model.config, seconds, args.excerpts)
    made = [audio for audio, _ in make_streams(model, prompts, seconds, args, beat)]
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
    say(f"-> {path}")


# -------------------------------------------------------------------------------- drift
def summary(curve, window):
    """Distances, one every `window` seconds -> mean, last 15 % less the first, slope over two minutes."""
    ends = max(1, round(0.15 * len(curve)))
    slope = np.polyfit(window / 120 * np.arange(len(curve)), curve, 1)[0]
    return np.mean(curve), np.mean(curve[-ends:]) - np.mean(curve[:ends]), slope


def drift(model, dataset, prompts, args, beat):
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
    made = make_streams(model, prompts, seconds, args, beat)
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
    compare_beats(streams, dataset.validation, rate, min(60, seconds // 2))
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


def compare_beats(sounds, tracks, rate, seconds):
    """Print how many beats of the first and of the last seconds of sounds (2, n) lie on a grid that begins
    with the sound, in the tempo of the track whose prompt it has. Only of tracks with drums and known
    beats."""
    shares = []
    for seed, audio in enumerate(sounds):
        track = tracks[seed % len(tracks)]
        if track.beats is None or "drums" not in track.prompt:
            continue
        whole, beat = audio.shape[1] / rate, 60 / track.beats.bpm
        ends = (audio[:, :seconds * rate], 0), (audio[:, -seconds * rate:], seconds - whole)
        shares.append([on_the_grid(beat_offsets(end, rate, beat, first)) for end, first in ends])
    if shares:
        first, last = (100 * mean_of(side) for side in zip(*shares))
        print(f"beats of the first and the last {seconds} s within {BEAT_ERROR} ms of the grid, of those "
              f"with an onset within {NEAR_BEAT} ms: {first:.0f} and {last:.0f} % ({len(shares)} streams)")


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
        say(f"-> {name}.csv (pip install matplotlib for a picture)")
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
    say(f"-> {name}.csv, {name}.png")


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


def beats_of(tracks, count, config):
    """For `stream`: each of `count` streams keeps to the tempo of the track whose prompt it has. Raises
    UserError where one's beats are not known."""
    for track in tracks:
        if track.beats is None:
            raise UserError(f"--beats: the metadata has no bpm and first_beat of {track.name}")
    owners = [tracks[seed % len(tracks)] for seed in range(count)]
    beats = [steady_beat(config, track.beats.bpm, track.beats.per_bar) for track in owners]
    return lambda number: torch.tensor([beat(number) for beat in beats]).double().T


class Pieces(NamedTuple):
    """Held-out pieces and their labels, and what shows what genres are like."""
    tracks: list
    asked: list                                             # rows of labels
    excerpts: list                                          # of (audio (2, n), its start in s)
    more: list                                              # of (track, audio, start), for genres alone
    genres: list                                            # of tracks, then of more


def labelled_pieces(dataset, args, config, seconds):
    """Pieces, one for each stream, if there are so many. Raises UserError."""
    folder = Path(args.data)
    labels = read_labels(folder)
    labelled = [track for track in dataset.validation if track.name in labels]
    if not labelled:
        raise UserError(f"{folder}/metadata.csv: no labels for {dataset.validation[0].name} and others held "
                        "out")
    tracks = spread(labelled, args.seeds)
    others = [track for track in labelled if track not in tracks]
    others += [track for track in spread(dataset.train, args.excerpts) if track.name in labels]
    more = [(track, *middle(folder, track, config, seconds)) for track in others]
    return Pieces(tracks, [labels[track.name] for track in tracks],
                  [middle(folder, track, config, seconds) for track in tracks], more,
                  [labels[track.name]["genre"] for track in (*tracks, *others)])


def decoded_features(model, pieces, decoded, seconds):
    """Genre features of all pieces after the autoencoder (pieces, d): its own colour is no genre.

    decoded: what was heard (`hear`) of the first of them."""
    rate = model.config.sample_rate
    features = [heard["features"] for heard in decoded]
    features += [genre_features(from_latents(model, track, start, seconds), rate)
                 for track, _, start in pieces.more]
    return torch.stack(features)


def obey(model, dataset, args):
    """Print how often streams obey held-out prompts in tempo, key, genre and beats.

    Beside it: the same of the renders that the prompts describe, through the autoencoder and plain, and of
    renders judged by the labels of all others."""
    c = model.config
    seconds = args.seconds or 15
    pieces = labelled_pieces(dataset, args, c, seconds)
    tracks, asked, genres = pieces.tracks, pieces.asked, pieces.genres
    renders = [hear(audio, c.sample_rate) for audio, _ in pieces.excerpts]
    decoded = [hear(from_latents(model, track, start, seconds), c.sample_rate)
               for track, (_, start) in zip(tracks, pieces.excerpts)]
    prompts = [known_words(model, track.prompt) for track in tracks]
    beat = beats_of(tracks, args.seeds, c) if args.beats else None
    streamed = make_streams(model, prompts, seconds, args, beat)
    streams = [hear(audio, c.sample_rate) for audio, _ in streamed]

    coded = decoded_features(model, pieces, decoded, seconds)
    plain = torch.stack([heard["features"] for heard in renders]
                        + [genre_features(audio, c.sample_rate) for _, audio, _ in pieces.more])
    once = range(len(tracks))
    turns = [seed % len(tracks) for seed in range(args.seeds)]      # the piece whose prompt each stream got
    firsts = [row["first_beat"] - start for row, (_, start) in zip(asked, pieces.excerpts)]

    def judged(sounds, owners, firsts, references):
        found = genre_of_each(sounds, owners, references, genres)
        return [obedience(heard, asked[owner], genre, first)
                for heard, owner, genre, first in zip(sounds, owners, found, firsts)]

    found = genre_of_each(renders, once, plain, genres)
    print_obedience({
        "streams": judged(streams, turns, [0] * len(turns), coded),
        "decoded": judged(decoded, once, firsts, coded),
        "renders": judged(renders, once, firsts, plain),
        "others'": [obedience(renders[i], asked[j], found[i], firsts[j])
                    for i in once for j in once if i != j],
    }, len(plain))


def follow(model, dataset, args):
    """Print how well streams follow the pitch of held-out pieces that is given them, and whether they are of
    their prompt's genre: another, with instruments of a piece of it. Key and tempo are the sketch's to say."""
    c = model.config
    seconds = args.seconds or 15
    pieces = labelled_pieces(dataset, args, c, seconds)
    count = len(pieces.tracks)
    genres = [row["genre"] for row in pieces.asked]
    if len(set(genres)) < 2:
        raise UserError(f"{args.data}: --sketch needs held-out pieces of two genres")
    prompted = [next(j % count for j in range(i + 1, i + count) if genres[j % count] != genres[i])
                for i in range(count)]                      # whose genre and instruments stream i gets
    prompts = [known_words(model, f"{genres[j]}, {pieces.asked[j]['instruments'].replace(';', ', ')}")
               for j in prompted]
    given = [latents_of(track, start, seconds, c)
             for track, (_, start) in zip(pieces.tracks, pieces.excerpts)]
    frames = min(z.shape[1] for z in given)
    given = torch.stack([z[:, :frames] for z in given]).to(next(model.parameters()).device)
    mask = torch.zeros(c.channels, 1, dtype=torch.bool, device=given.device)
    mask[c.latent_channels:c.latent_channels + c.pitch_channels] = True

    def sketch(number):
        values = given[..., number * c.block:(number + 1) * c.block]
        whole = values.shape[-1] == c.block
        return Given(values, mask, torch.zeros((), device=given.device)) if whole else None
    args.seeds = count
    streams = [audio for audio, _ in make_streams(model, prompts, seconds, args, sketch=sketch)]

    def alike(sounds, others):
        found = [chroma_correlation(a, b, c.sample_rate) for a, b in zip(sounds, others)]
        return f"{np.mean(found):.2f} +- {np.std(found) / math.sqrt(len(found)):.2f}"
    sources = [audio for audio, _ in pieces.excerpts]
    decoded = [from_latents(model, track, start, seconds)
               for track, (_, start) in zip(pieces.tracks, pieces.excerpts)]
    references = decoded_features(model, pieces, [hear(audio, c.sample_rate) for audio in decoded], seconds)
    heard = [{"features": genre_features(audio, c.sample_rate)} for audio in streams]
    found = genre_of_each(heard, prompted, references, pieces.genres)
    print(f"chroma correlation of {count} streams with the pieces whose pitch they were given: "
          f"{alike(streams, sources)}\nof those pieces through the autoencoder: {alike(decoded, sources)}\n"
          f"of pieces with others: {alike([sources[j] for j in prompted], sources)}\n"
          f"of the prompt's genre: {sum(f == genres[j] for f, j in zip(found, prompted))} streams; "
          f"of the given piece's: {sum(f == genre for f, genre in zip(found, genres))}")


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
    print(f"genre: nearest centroid of {references} renders, without the piece itself; of decoded ones for "
          "streams and decoded\n"
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
    p.add_argument("--sketch", action="store_true",
                   help="with --obey: give streams the pitch of held-out pieces, under prompts of other "
                   "genres, and see how they follow it")
    p.add_argument("--beats", action="store_true",
                   help="tell the model the beats of held-out tracks too (as sample.py --bpm), not only "
                        "their prompts")
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
    if args.sketch and not args.obey:
        raise UserError("--sketch goes with --obey")
    if args.beats and args.sketch:
        raise UserError("--beats and --sketch are two measurements: one at a time")
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
    if args.beats and not model.config.beats:
        raise UserError(f"--beats: {path} cannot be told a beat")
    if args.sketch and not model.config.pitch_channels:
        raise UserError(f"--sketch: {path} has no channels of pitch")
    dataset = data.prepare(args.data, model, device=args.device)    # the training's own split
    precision = playing_precision(model, args.precision)
    settings = sampling_settings(model, args.steps, args.sampler, args.cfg)
    say(f"{path}: {model.stage}, {settings}, {precision}")
    with torch.no_grad():
        if args.obey:
            (follow if args.sketch else obey)(model, dataset, args)
            return
        prompts = [known_words(model, track.prompt) for track in dataset.validation]
        beat = beats_of(dataset.validation, args.seeds, model.config) if args.beats else None
        (drift if args.drift else sound)(model, dataset, prompts, args, beat)


if __name__ == "__main__":
    run(main)
