"""A folder of audio -> latents on disk, once -> random crops with prompts.

    python data.py path/to/music            # encode it and say what a training on it would learn from

Audio is whatever libsndfile reads, at any rate. Each file is decoded, resampled and encoded piece by piece, so an hour
takes no more memory than a minute, and the pieces overlap by what the filters see, so the result is that of the whole
file. Prompts, the first found: `metadata.jsonl` or `metadata.csv` with `file_name` and `text` (the AudioFolder
convention), a caption beside the track (`song.txt`), its title and genre tags, its cleaned file and folder name. They
are looked up anew each time: mending them costs no encoding.
"""
import argparse
import contextlib
import csv
import json
import os
import posixpath
import re
import sys
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from audio import encode_chunks, read_audio
from common import UserError, device_of, load, run, speed, write_whole

AUDIO = set(".wav .wave .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .snd .w64 .rf64 .caf".split())
BESIDE = set(".jpg .jpeg .png .gif .webp .pdf .m3u .m3u8 .cue .log .npy .pt .json".split())     # no music, no mistake
METADATA = "metadata.csv", "metadata.jsonl"
SHORTEST = 0.5                                              # seconds; a shorter clip is no music


# -------------------------------------------------------------------------------- finding files
def walk(folder):
    """All files of a folder, sorted. Hidden ones and our own `out/` are passed over; links are followed."""
    folder, files, seen = Path(folder), [], {os.path.realpath("out")}
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give one with audio files in it")
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; give the folder that the audio files are in")
    for root, subfolders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(root))                    # links may lead in circles
        subfolders[:] = [s for s in subfolders if s[0] != "." and os.path.realpath(os.path.join(root, s)) not in seen]
        files += [Path(root, name) for name in names if name[0] != "."]
    return sorted(files)


def audio_files(folder):
    """Every file that by its name could be audio, sorted. UserError when there is no such folder."""
    return [f for f in walk(folder) if f.suffix.lower() in AUDIO]


def stray_files(folder):
    """What is neither audio nor belongs beside it: more likely music that we cannot read than meant to be left out."""
    files = walk(folder)
    known = {caption for f in files if f.suffix.lower() in AUDIO for caption in caption_files(f)}
    return [f for f in files if f.suffix.lower() not in AUDIO | BESIDE and f not in known and f.name not in METADATA]


def split(names, share=1 / 16):
    """Names relative to the folder -> (train, validation), sorted. By track, and the same on every machine.

    What is in a subfolder `validation` (the AudioFolder convention) is that, and all else is trained on."""
    held_out = [name for name in names if name.startswith("validation/")]
    if 0 < len(held_out) < len(names):
        return sorted(set(names) - set(held_out)), sorted(held_out)
    ranked = sorted(names, key=lambda name: zlib.crc32(name.encode("utf-8", "surrogateescape")))
    n = max(1, round(len(names) * share))
    return sorted(ranked[n:]), sorted(ranked[:n])


# -------------------------------------------------------------------------------- prompts
def read_metadata(folder):
    """All `metadata.jsonl` and `metadata.csv` under the folder -> {file name relative to the folder: prompt}.

    UserError where one cannot be understood: training on wrong prompts would go unnoticed for hours."""
    prompts = {}
    files = [f for f in walk(folder) if f.name in METADATA]
    for file in sorted(files, key=lambda f: len(f.parts)):  # the nearest to the track has the last word
        try:
            with open(file, encoding="utf-8-sig", newline="") as f:
                rows = list(csv.DictReader(f)) if file.suffix == ".csv" else [json.loads(s) for s in f if s.strip()]
            for row in rows:
                if None in row:
                    raise ValueError("a row has more cells than the first; put texts that hold commas in quotes")
                name = posixpath.join(file.parent.relative_to(folder).as_posix(), row["file_name"].replace("\\", "/"))
                prompts[posixpath.normpath(name)] = str(row["text"] or "")
        except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
            raise UserError(f"{file}: cannot be read ({error}); mend or remove it") from None
        except KeyError:
            raise UserError(f"{file}: every row needs `file_name` and `text`; one has only {', '.join(map(str, row))}") from None
    return prompts


def caption_files(file):
    return file.with_suffix(".txt"), file.with_name(file.name + ".txt")


def clean(text):
    """'03 - night_drive' -> 'night drive': a track's number goes, as far as a name can tell. What is only a number stays, and a tempo (90 bpm)."""
    text = " ".join(text.replace("_", " ").split())
    number = r"(\d{1,2}-)?(0\d+[-.)\s]|\d\d[-\s](?!\s*bpm)|\d+\s*[.)](?!\d)|\d+\s+-)"
    return re.sub(rf"^{number}[-.\s]*(?=\S)", "", text, flags=re.IGNORECASE)


def prompt_of(file, folder, metadata):
    """The prompt of one track: from `read_metadata`, else caption file, else title and genre tags, else its name."""
    file, folder = Path(file), Path(folder)
    if text := metadata.get(file.relative_to(folder).as_posix(), "").strip():
        return text
    for caption in caption_files(file):
        if os.path.isfile(caption) and (text := " ".join(caption.read_text("utf-8-sig", "replace").split())):
            return text
    with soundfile.SoundFile(file) as f:
        tags = f.copy_metadata()
    genre = re.sub(r"^(\(\d+\))+|^\d+$", "", tags.get("genre", ""))    # ID3 may give a bare number: no word to learn
    if text := ", ".join(filter(None, (clean(tags.get("title", "")), genre.strip()))):
        return text
    return f"{clean(file.stem)}, {clean(Path(os.path.abspath(file)).parent.name)}"


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
    """What latents depend on besides the audio: the encoder's weights, the rate and the strides. 8 hex digits."""
    c = model.config
    crc = zlib.crc32(repr((c.sample_rate, c.audio_channels, c.ae_multipliers, c.ae_strides)).encode())
    weights = model.autoencoder.encoder.state_dict()
    if model.sketch is not None:
        weights |= model.sketch.state_dict(prefix="sketch.")
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

    @property
    def frames(self):
        return self.stop - self.start

    @property
    def latents(self):                                      # (T, C) float16, memory-mapped
        return opened(self.file)[self.start:self.stop]


@dataclass
class Dataset:
    tracks: list                                            # of Track, sorted by name
    train: list
    validation: list
    skipped: list                                           # of (name, reason)
    latent_std: float                                       # over all channels, of some 20000 frames
    hours: float


def encode_track(file, path, model, tell):
    """Make the latents file at `path` unless it is there. Returns where it is, and its frames. UserError when the audio is no good.

    A clip that ends with a block, for all we know filled with silence, is kept under a name for blocks of that length alone.
    tell: called with the seconds encoded so far."""
    config = model.config
    filled = path.with_suffix(f".{config.block}.npy")
    for made in path, filled:
        with contextlib.suppress(OSError, ValueError, EOFError):                # absent or damaged
            frames, channels = np.load(made, mmap_mode="r").shape
            if channels == config.channels and frames >= config.block:   # else it was long enough for shorter blocks
                return made, frames
    parts, frames = [], 0
    for latents in encode_chunks(model, at_least_a_block(file, read_audio(file, config), config)):
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


def prepare(folder, model, latents_dir=None, device="cpu", quiet=False):
    """Encode what is new or changed in the folder to `latents_dir` and return the Dataset.

    The name of a latents file tells name, size and time of its audio and the encoder: where it exists, it is right.
    Under torchrun call it in one process first. quiet: print nothing. UserError when there is no readable audio."""
    folder, config, mark = Path(folder), model.config, fingerprint(model)
    crc = lambda text: f"{zlib.crc32(text.encode('utf-8', 'surrogateescape')):08x}"
    audio, metadata = audio_files(folder), read_metadata(folder)
    if latents_dir is None:
        latents_dir = Path("out", "latents", f"{folder.resolve().name}-{crc(f'{folder.resolve()} {mark}')}")
    latents_dir = Path(latents_dir)
    try:
        latents_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{latents_dir}: cannot be made for the latents ({error.strerror})") from None

    home = next(model.autoencoder.parameters()).device
    model.autoencoder.to(device)
    tracks, skipped = [], [(f.relative_to(folder).as_posix(), "not audio, or of a kind that libsndfile cannot read")
                           for f in stray_files(folder)]
    progress = tqdm(audio, desc="encoding", unit="file", leave=False, disable=quiet or None)
    for file in progress:
        name = file.relative_to(folder).as_posix()
        try:
            stat = os.stat(file) if file.is_file() else os.lstat(file)      # a broken link is told by read_audio
            version = crc(f"{name} {stat.st_size} {stat.st_mtime_ns} {mark}")
            path = latents_dir / f"{re.sub('[^a-zA-Z0-9]+', '_', name)[:80]}-{version}.npy"
            path, frames = encode_track(file, path, model, lambda s: progress.set_postfix_str(f"{name}, {s:.0f} s"))
            tracks.append(Track(name, prompt_of(file, folder, metadata), path, 0, frames))
        except (UserError, soundfile.SoundFileError, UnicodeEncodeError) as error:      # of a name that is no UTF-8
            skipped.append((name, str(error).removeprefix(f"{file}: ")))
        except OSError as error:                            # a full disk is not the track's fault
            raise UserError(f"{error.filename or latents_dir}: {error.strerror or error}; mend it, run again") from None
    model.autoencoder.to(home)

    if not tracks:
        found = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3]) or "it is empty"
        raise UserError(f"{folder}: no readable audio ({found}); put wav, flac, ogg, mp3, opus or aiff files there")
    index = {t.name: {"latents": t.file.name, "frames": t.frames, "prompt": t.prompt} for t in tracks}
    write_whole(latents_dir / "index.json", lambda f: f.write(json.dumps(index, indent=1).encode()))      # for people
    dataset = Dataset(tracks, *divide(tracks, config.block), sorted(skipped), latent_std(tracks),
                      sum(t.frames for t in tracks) / config.frame_rate / 3600)
    if not quiet:
        report(dataset, latents_dir, set(metadata) - {t.name for t in tracks} - {name for name, _ in skipped})
    return dataset


def divide(tracks, block):
    """Tracks -> (train, validation). Of a single track the last tenth, at least a block, is validation."""
    if len(tracks) > 1:
        train, validation = (set(names) for names in split([t.name for t in tracks]))
        return [t for t in tracks if t.name in train], [t for t in tracks if t.name in validation]
    track, = tracks
    cut = track.stop - max(track.frames // 10, block)
    if cut < block:                                         # nothing to set apart
        return tracks, tracks
    return [track._replace(stop=cut)], [track._replace(start=cut)]


def latent_std(tracks):
    step = max(1, sum(t.frames for t in tracks) // 20000)
    return float(np.concatenate([t.latents[::step] for t in tracks]).astype(np.float64).std())


def report(dataset, latents_dir, unknown):
    """The closing lines, on stderr. unknown: names in the metadata that are no track."""
    say = lambda line: print(line, file=sys.stderr)
    for name, reason in dataset.skipped:
        say(f"  skipped {name}: {reason}")
    if unknown:
        say(f"  metadata names {len(unknown)} files that are not there, {min(unknown)} for one")
    say(f"{len(dataset.tracks)} tracks, {dataset.hours:.2f} h ({len(dataset.train)} to train on, "
        f"{len(dataset.validation)} for validation), {len(dataset.skipped)} files skipped; "
        f"latents (standard deviation {dataset.latent_std:.2f}) in {latents_dir}")


# -------------------------------------------------------------------------------- crops
def crops_at(tracks, blocks, block, positions):
    """Crops at positions in [0, 1) of all tracks laid end to end: every frame as likely as any other where the positions are
    random, not aligned to blocks.

    Returns latents (n, C, blocks * block) float32, the prompts, and how many blocks of each crop are missing (n,): a track
    too short for it stands at the right end, zeros before it, as a stream begins."""
    ends = np.cumsum([t.frames for t in tracks])
    length, out, prompts, missing = blocks * block, [], [], []
    for position in positions:
        i = int(np.searchsorted(ends, position * ends[-1], side="right"))
        track, latents = tracks[i], tracks[i].latents
        if track.frames >= length:
            spare = track.frames - length                   # position within the track -> start within what it leaves
            start = int((position * ends[-1] - ends[i] + track.frames) / track.frames * (spare + 1))
            latents = latents[min(start, spare):][:length]
        else:                                               # whole blocks from the end, as a stream would be primed
            latents = latents[track.frames % block:]
        latents = torch.from_numpy(latents.T.astype(np.float32))                            # (C, frames)
        out.append(torch.nn.functional.pad(latents, (length - latents.shape[1], 0)))
        prompts.append(track.prompt)
        missing.append((length - latents.shape[1]) // block)
    return torch.stack(out), prompts, torch.tensor(missing)


def fixed_crops(tracks, blocks, block, count):
    """`count` crops evenly spaced over the tracks, the same every time: for validation."""
    return crops_at(tracks, blocks, block, (np.arange(count) + 0.5) / count)


def main():
    parser = argparse.ArgumentParser(description="Encode a folder of audio and say what a training would learn from.")
    parser.add_argument("data", help="folder of audio files")
    parser.add_argument("--ckpt", default=str(Path(__file__).with_name("nano.pt")), help="checkpoint whose autoencoder encodes")
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
