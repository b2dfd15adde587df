"""A folder of audio -> latents on disk, once -> random crops with prompts.

    python data.py path/to/music            # encode it and say what a training on it would learn from

Each file is decoded, resampled and encoded piece by piece, so an hour takes no more memory than a minute, and
the pieces overlap by what the filters see, so the result is that of the whole file. Which files, and their
prompts: library.py. Prompts are looked up each time: mending them costs no encoding.
"""
import argparse
import contextlib
import json
import os
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from audio import encode_chunks
from common import UserError, device_of, load, run, say, speed, write_whole
from controls import BEAT_FEATURES, beat_features
from library import (Beats, beats_of_row, composed, find_files, find_prompt, held_out_folder, read_metadata,
                     split)
from model import frames_of, words_of
from recordings import read_audio

SHORTEST = 0.5                                              # seconds; a shorter clip is no music


# -------------------------------------------------------------------------------- latents
def at_least_a_block(file, chunks, config):
    """Pass audio on; refuse a clip under `SHORTEST` and fill one under a block with silence at its end."""
    samples = 0
    for chunk in chunks:
        samples += chunk.shape[-1]
        yield chunk
    if samples < SHORTEST * config.sample_rate:
        raise UserError(f"{file}: too short ({samples / config.sample_rate:.2f} s, less than {SHORTEST} s)")
    if samples < config.block * config.hop:
        yield torch.zeros(config.audio_channels, config.block * config.hop - samples)


def fingerprint(model):
    """What latents depend on besides the audio: the encoder's weights, the rate and the strides. 8 hex
    digits."""
    c = model.config
    sizes = c.sample_rate, c.audio_channels, c.ae_multipliers, c.ae_strides
    if c.latent_limit:    # without one, latents that were made before limits existed are still right
        sizes += c.latent_limit,
    crc = zlib.crc32(repr(sizes).encode())
    weights = model.autoencoder.encoder.state_dict()
    weights |= {name: buffer for name, buffer in model.named_buffers() if name.startswith("sketch_")}
    for name, weight in sorted(weights.items()):
        crc = zlib.crc32(weight.float().cpu().contiguous().numpy(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


@lru_cache(maxsize=256)                                     # thousands held open would be refused
def opened(file):
    return np.load(file, mmap_mode="r")


class Track(NamedTuple):
    """A recording: frames start..stop of a latents file."""
    name: str                                               # relative to the folder
    prompt: str
    file: Path                                              # .npy, float16 (T, C)
    start: int
    stop: int
    beats: Beats = None                                     # None: not known

    @property
    def frames(self):
        return self.stop - self.start

    @property
    def latents(self):                                      # (T, C) float16, memory-mapped
        return opened(self.file)[self.start:self.stop]


@dataclass
class Dataset:
    """What a training learns from."""
    tracks: list                                            # of Track, sorted by name
    train: list
    validation: list
    skipped: list                                           # of (name, reason)
    latent_std: float                                       # over all channels, of some 20000 frames
    hours: float


READER = 2    # version of `read_audio`: latents made through another one are made anew


def hashed(text):
    """8 hex digits."""
    return f"{zlib.crc32(text.encode('utf-8', 'surrogateescape')):08x}"


def latents_path(latents_dir, file, name, mark):
    """The name of a latents file tells name, size and time of its audio, and the encoder."""
    stat = os.stat(file) if os.path.isfile(file) else os.lstat(file)    # of a broken link read_audio tells
    version = hashed(f"{name} {stat.st_size} {stat.st_mtime_ns} {mark} {READER}")
    return latents_dir / f"{re.sub('[^a-zA-Z0-9]+', '_', name)[:80]}-{version}.npy"


def encode_track(file, path, model, tell):
    """Make the latents file at `path` unless it is there. Returns where it is, and its frames. UserError when
    the audio cannot be used.

    A clip of exactly one block may have been filled up with silence. Its file's name tells the block's
    length, so that a model with longer blocks makes it anew. tell: called with the seconds encoded so far."""
    config = model.config
    filled = path.with_suffix(f".{config.block}.npy")
    for made in path, filled:
        with contextlib.suppress(OSError, ValueError, EOFError):                # absent or damaged
            frames, channels = np.load(made, mmap_mode="r").shape
            # otherwise it was long enough for shorter blocks only
            if channels == config.channels and frames >= config.block:
                return made, frames
    parts = []
    frames = 0
    audio = at_least_a_block(file, read_audio(file, config), config)
    for latents in encode_chunks(model, audio):
        parts.append(latents.T.half().numpy())                                  # (n, C)
        frames += len(parts[-1])
        tell(frames / config.frame_rate)
    latents = np.concatenate(parts)
    if not np.isfinite(latents).all():
        raise UserError(f"{file}: its latents are not finite")
    made = filled if frames == config.block else path
    write_whole(made, lambda f: np.save(f, latents))
    opened.cache_clear()
    return made, frames


def make_latents_dir(folder, latents_dir, mark):
    """The folder for the latents, made where it is missing; by default one of its own. Raises UserError."""
    if latents_dir is None:
        place = folder.resolve()
        latents_dir = Path("out", "latents", f"{place.name}-{hashed(f'{place} {mark}')}")
    try:
        Path(latents_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{latents_dir}: cannot be made for the latents ({error.strerror})") from None
    return Path(latents_dir)


def prepare(folder, model, latents_dir=None, device="cpu", quiet=False):
    """Encode what is new or changed in the folder to `latents_dir` and return the Dataset.

    A latents file that exists under the right name is right. Under torchrun call it in one process first.
    quiet: print nothing. UserError when there is no readable audio."""
    folder, mark = Path(folder), fingerprint(model)
    found = find_files(folder)
    notes = list(found.notes)
    metadata = read_metadata(folder, notes)
    beats = read_metadata(folder, [], beats_of_row) if model.config.beats else {}
    latents_dir = make_latents_dir(folder, latents_dir, mark)

    home = next(model.autoencoder.parameters()).device
    model.autoencoder.to(device)
    tracks, sources = [], []
    skipped = [(file.relative_to(folder).as_posix(), reason) for file, reason in found.refused]
    progress = tqdm(found.audio, desc="encoding", unit="file", leave=False, disable=quiet or None)
    for file in progress:
        name = file.relative_to(folder).as_posix()
        try:
            path = latents_path(latents_dir, file, name, mark)
            path, frames = encode_track(file, path, model,
                                        lambda seconds: progress.set_postfix_str(f"{name}, {seconds:.0f} s"))
            prompt, source = find_prompt(file, folder, metadata, notes)
            tracks.append(Track(name, prompt, path, 0, frames, beats.get(name, beats.get(composed(name)))))
            sources.append(source)
        except UserError as error:
            skipped.append((name, str(error).removeprefix(f"{file}: ")))
        except OSError as error:                            # a full disk is not the track's fault
            place = error.filename or latents_dir
            raise UserError(f"{place}: {error.strerror or error}; mend it, run again") from None
    model.autoencoder.to(home)

    if not tracks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3]) or "it is empty"
        raise UserError(f"{folder}: no readable audio ({reasons}); put wav, flac, ogg, mp3, opus or aiff "
                        "files there")
    index = {t.name: {"latents": t.file.name, "frames": t.frames, "prompt": t.prompt} for t in tracks}
    # for people
    write_whole(latents_dir / "index.json", lambda f: f.write(json.dumps(index, indent=1).encode()))
    dataset = Dataset(tracks, *divide(tracks, model.config.block), sorted(skipped), latent_std(tracks),
                      sum(t.frames for t in tracks) / model.config.frame_rate / 3600)
    if not quiet:
        for note in notes:
            say(f"  {note}")
        report_prompts(dataset, sources, metadata, model)
        report(dataset, latents_dir, len(found.ignored))
    return dataset


def divide(tracks, block):
    """Tracks -> (train, validation). Of a single track the last tenth, at least a block, is validation."""
    if len(tracks) > 1:
        sizes = {t.name: t.frames for t in tracks}
        held_out = set(split(list(sizes), sizes=sizes)[1])
        return [t for t in tracks if t.name not in held_out], [t for t in tracks if t.name in held_out]
    track, = tracks
    cut = track.stop - max(track.frames // 10, block)
    if cut < block:                                         # nothing to set apart
        return tracks, tracks
    return [track._replace(stop=cut)], [track._replace(start=cut)]


def latent_std(tracks):
    step = max(1, sum(t.frames for t in tracks) // 20000)
    return float(np.concatenate([t.latents[::step] for t in tracks]).astype(np.float64).std())


def report_prompts(dataset, sources, metadata, model):
    """Where prompts came from, and what of them is not what was meant."""
    tracks = dataset.tracks
    names = {composed(t.name) for t in tracks} | {composed(name) for name, _ in dataset.skipped}
    absent = {composed(name) for name in metadata} - names
    if absent:
        say(f"  metadata names {len(absent)} files that are not there, {min(absent)} for one")
    read = model.config.text_tokens
    long = [t.name for t in tracks if len(words_of(t.prompt)) > read]
    if long:
        say(f"  {len(long)} prompts are longer than the {read} words that the model reads, "
            f"that of {long[0]} for one")
    encoder = model.conditioner.text_encoder
    if encoder.trains:
        words = {word for t in tracks for word in words_of(t.prompt)[:read]} | set(encoder.known)
        rows = encoder.table.num_embeddings - 1
        if len(words) > rows:
            say(f"  {len(words)} different words for the {rows} rows of the model's table: "
                "some share one, and sound the same")
    order = "metadata", "captions", "tags", "names"
    line = "prompts: " + ", ".join(f"{sources.count(source)} from {source}" for source in order)
    without = [t.name for t, source in zip(tracks, sources) if source != "metadata"]
    named = [t.name for t, source in zip(tracks, sources) if source == "names"]
    if metadata and without:
        line += f"; {len(without)} tracks have no text in the metadata, {(named or without)[0]} for one"
    say(line)


def report(dataset, latents_dir, ignored):
    """The closing lines, on stderr. ignored: how many files were left alone on purpose."""
    for name, reason in dataset.skipped:
        say(f"  skipped {name}: {reason}")
    used, skipped = len(dataset.tracks), len(dataset.skipped)
    folders = sorted({held_out_folder(t.name) for t in dataset.validation} - {None})
    if folders and not any(held_out_folder(t.name) for t in dataset.train):
        say(f"held out for validation, by the name of their folder: {', '.join(folders)}")
    say(f"{used + skipped + ignored} files found: {used} used, {skipped} skipped, "
        f"{ignored} ignored (captions, metadata, pictures, lists, hidden files)")
    say(f"{used} tracks, {dataset.hours:.2f} h ({len(dataset.train)} to train on, "
        f"{len(dataset.validation)} for validation), {skipped} files skipped; "
        f"latents (standard deviation {dataset.latent_std:.2f}) in {latents_dir}")


# -------------------------------------------------------------------------------- crops
class Crops(NamedTuple):
    """Excerpts of equal length. n of them."""
    latents: torch.Tensor                                   # (n, C, blocks * block) float32
    prompts: list
    missing: torch.Tensor                                   # (n,): blocks at its beginning that are not there
    starts: list                                            # of (Beats or None, frame of the recording)


def crops_at(tracks, blocks, block, positions):
    """Crops at positions in [0, 1) of all tracks laid end to end. Where positions are uniform, so are the
    starts within a track, not aligned to blocks; a track's first and last frames are then in fewer crops than
    its middle.

    A track too short for a crop stands at its right end, zeros before it, as a stream begins."""
    ends = np.cumsum([t.frames for t in tracks])
    length = blocks * block
    out, prompts, missing, starts = [], [], [], []
    for position in positions:
        i = int(np.searchsorted(ends, position * ends[-1], side="right"))
        track, latents = tracks[i], tracks[i].latents
        if track.frames >= length:
            spare = track.frames - length    # position within the track -> start within what it leaves
            start = int((position * ends[-1] - ends[i] + track.frames) / track.frames * (spare + 1))
            start = min(start, spare)
            latents = latents[start:][:length]
        else:    # whole blocks from the end, as a stream would be primed
            start = track.frames - length
            latents = latents[track.frames % block:]
        latents = torch.from_numpy(latents.T.astype(np.float32))                            # (C, frames)
        out.append(torch.nn.functional.pad(latents, (length - latents.shape[1], 0)))
        prompts.append(track.prompt)
        missing.append((length - latents.shape[1]) // block)
        starts.append((track.beats, track.start + start))
    return Crops(torch.stack(out), prompts, torch.tensor(missing), starts)


def beats_at(starts, blocks, config):
    """`controls.beat_features` (n, len(blocks) * block, 18) of the frames of blocks that follow one another,
    by their numbers in crops that begin at `Crops.starts`; zeros where a recording's beats are not known.
    None for a model that cannot be told."""
    if not config.beats:
        return None
    frames = frames_of(blocks, config.block, "cpu")
    features = torch.zeros(len(starts), len(frames), BEAT_FEATURES)
    for row, (beats, start) in zip(features, starts):
        if beats is not None:
            seconds = (start + frames).double() / config.frame_rate
            bpm = torch.full(seconds.shape, beats.bpm, dtype=torch.float64)
            row.copy_(beat_features(bpm, beats.bar_at(seconds)))
    return features


def fixed_crops(tracks, blocks, block, count):
    """`count` crops evenly spaced over the tracks, the same every time: for validation."""
    return crops_at(tracks, blocks, block, (np.arange(count) + 0.5) / count)


def main():
    parser = argparse.ArgumentParser(
        description="Encode a folder of audio and say what a training would learn from.")
    parser.add_argument("data", help="folder of audio files")
    parser.add_argument("--ckpt", default=str(Path(__file__).with_name("nano.pt")),
                        help="checkpoint whose autoencoder encodes")
    parser.add_argument("--latents", help="folder for the latents (default: one of its own in out/latents)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if speed:
        speed.keep_memory()
    dataset = prepare(args.data, load(args.ckpt), args.latents, device_of(args.device))
    held_out = {t.name for t in dataset.validation}
    for track in dataset.tracks[:20]:
        print(f"{track.name}{' (validation)' if track.name in held_out else ''}: {track.prompt}")


if __name__ == "__main__":
    run(main)
