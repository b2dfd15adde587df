"""A folder of audio -> latents on disk, once -> random crops with prompts.

    python data.py path/to/music            # encode it and say what a training on it would learn from

Audio is what libsndfile and, where it is installed, ffmpeg read. Each file is decoded, resampled and encoded
piece by piece, so an hour takes no more memory than a minute, and the pieces overlap by what the filters see,
so the result is that of the whole file.

Prompts, the first found: `metadata.jsonl`, `.csv` or `.json` with `file_name` and `text` (the AudioFolder
convention), a caption beside the track (`song.txt`, `song.json`), its title and genre tags, its cleaned file
and folder name. They are looked up each time: mending them costs no encoding. Metadata may also tell where
the beats are, for models that can be told: `bpm`, `first_beat` (seconds to the first bar) and, where it is
not 4, `beats_per_bar`, of recordings whose tempo stays.
"""
import argparse
import codecs
import contextlib
import csv
import io
import json
import math
import os
import posixpath
import re
import sys
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from audio import encode_chunks
from common import UserError, device_of, load, run, speed, write_whole
from controls import BEAT_FEATURES, beat_features
from recordings import read_audio, read_tags
from model import words_of

AUDIO = set(".wav .wave .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .snd .w64 .rf64 .caf".split())
AUDIO |= set(".m4a .m4b .m4r .mp4 .m4v .mov .3gp .aac .adts .alac .wma .asf .webm .weba .mka .mkv".split())
AUDIO |= set(".avi .mp2 .mp1 .mpga .ac3 .eac3 .dts .ape .wv .tta .tak .mpc .shn .spx .amr .dsf .dff".split())
AUDIO |= set(".voc .ra .rm .ogx .ogv".split())                       # from .m4a on through ffmpeg
# no music, and no mistake
BESIDE = set(".jpg .jpeg .png .gif .webp .bmp .pdf .m3u .m3u8 .pls .cue .log .npy .pt .json .db .ini".split())
METADATA = "metadata.csv", "metadata.jsonl", "metadata.json"
HELD_OUT = {"validation", "valid", "val", "dev", "test", "eval"}    # names of folders, by convention
SHORTEST = 0.5                                              # seconds; a shorter clip is no music


# -------------------------------------------------------------------------------- finding files
class Folder(NamedTuple):
    """What lies in a folder: every file once, sorted, and lines about folders that are not looked into."""
    audio: list                                             # of Path: what by its name could be audio
    refused: list                                           # of (Path, reason)
    ignored: list                                           # of Path: captions, pictures, lists, hidden files
    notes: list                                             # of str


def walk(folder):
    """All files of a folder and its subfolders -> (sorted Paths, notes about folders). Raises UserError.

    Links are followed after all else, so a folder that is reached twice goes by its own name. Our own `out/`
    is passed over."""
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give one with audio files in it")
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; give the folder that the audio files are in")
    own_output = os.path.realpath("out")
    seen = {}                                               # real path -> relative name
    files, notes = [], []
    waiting, links = [folder], []
    while waiting or links:
        place = waiting.pop() if waiting else links.pop(0)
        name = place.relative_to(folder).as_posix()
        real = os.path.realpath(place)
        if real in seen:
            notes.append(f"folder {name} is the same as {seen[real]}: taken once")
        elif real == own_output and place != folder:
            notes.append(f"folder {name} is this program's own output: left out")
        else:
            seen[real] = name
            try:
                entries = sorted(os.listdir(place))
            except OSError as error:
                if place == folder:
                    raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None
                notes.append(f"folder {name} cannot be listed ({error.strerror}): nothing in it is used")
                entries = []
            for path in (place / entry for entry in entries):
                if not os.path.isdir(path):
                    files.append(path)
                elif path.is_symlink():
                    links.append(path)
                else:
                    waiting.append(path)
    return sorted(files), notes


def is_hidden(name):
    """A hidden folder like .git, but not an album that begins with an ellipsis."""
    return name.startswith(".") and not name.startswith("..")


def find_files(folder):
    """Sort what lies in a folder -> Folder. UserError when there is no such folder."""
    folder = Path(folder)
    files, notes = walk(folder)
    audio, refused, ignored = [], [], []
    hidden = Counter()                                      # audio files in hidden folders
    for file in files:
        inside = next((part for part in file.relative_to(folder).parts[:-1] if is_hidden(part)), None)
        is_audio = file.suffix.lower() in AUDIO and not file.name.startswith("._")
        if inside is not None:
            hidden[inside] += is_audio
            ignored.append(file)
        elif is_audio:
            audio.append(file)
        elif file.name.startswith(".") or file.suffix.lower() in BESIDE or file.name in METADATA:
            ignored.append(file)
        else:
            refused.append((file, "not audio, or of an unknown kind"))
    captions = {caption for file in audio for caption in caption_files(file)}
    ignored += [file for file, _ in refused if file in captions]
    refused = [(file, reason) for file, reason in refused if file not in captions]
    for name, count in hidden.items():
        if count:
            notes.append(f"hidden folder {name}: {count} audio files in it are ignored")

    first = {}                                              # (device, inode) -> the first of its names
    for file in sorted(audio, key=lambda f: (f.is_symlink(), f)):
        with contextlib.suppress(OSError):                  # a broken link: reading it will say so
            stat = os.stat(file)
            other = first.setdefault((stat.st_dev, stat.st_ino), file)
            if other != file and stat.st_ino:
                refused.append((file, f"the same file as {other.relative_to(folder).as_posix()}"))
    twice = {file for file, _ in refused}
    return Folder([file for file in audio if file not in twice], sorted(refused), sorted(ignored), notes)


def audio_files(folder):
    """Every file that by its name could be audio, once, sorted. UserError when there is no such folder."""
    return find_files(folder).audio


def held_out_folder(name):
    """The folder in a relative name that by convention holds what is not to be trained on, or None."""
    return next((part for part in name.split("/")[:-1] if part.lower() in HELD_OUT), None)


def split(names, share=1 / 16, sizes=None):
    """Names relative to the folder -> (train, validation), sorted. By track, and the same on every machine.

    What lies in a folder of a name in HELD_OUT is validation, and all else is trained on. Where there is
    none, a share is drawn by name. sizes: {name: frames}; what is held out is then no more than half of it
    all, so the only long track is trained on."""
    held_out = [name for name in names if held_out_folder(name)]
    if 0 < len(held_out) < len(names):
        return sorted(set(names) - set(held_out)), sorted(held_out)
    ranked = sorted(names, key=lambda name: zlib.crc32(name.encode("utf-8", "surrogateescape")))
    n = max(1, round(len(names) * share))
    if sizes is None:
        return sorted(ranked[n:]), sorted(ranked[:n])
    held_out, left = [], sum(sizes.values()) / 2
    for name in ranked:
        if len(held_out) < n and sizes[name] <= left:
            held_out.append(name)
            left -= sizes[name]
    return sorted(set(names) - set(held_out)), sorted(held_out)


# -------------------------------------------------------------------------------- prompts
BYTE_ORDER_MARKS = [
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")]     # UTF-32's begins as UTF-16's


def encoding_of(raw):
    """The encoding of the bytes of a text, and the length of its mark. ValueError where it cannot be told."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            return encoding, len(mark)
    zeros = raw[::2].count(0), raw[1::2].count(0)
    if sum(zeros) > len(raw) / 4:                           # Latin letters in UTF-16
        return ("utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"), 0
    try:
        raw.decode("utf-8")
        return "utf-8", 0
    except UnicodeDecodeError:
        pass
    letters = b"".join(raw.split())
    # Western European has mostly plain letters
    if sum(byte >= 0x80 for byte in letters) > 0.4 * len(letters):
        raise ValueError("neither UTF-8 nor UTF-16, nor Western European: save it as UTF-8")
    return "cp1252", 0


def decode_text(raw, name, notes):
    """Bytes of a caption, a tag or metadata -> text. ValueError where it is none. A guess goes to `notes`."""
    encoding, mark = encoding_of(raw)
    try:
        text = raw[mark:].decode(encoding)
    except UnicodeDecodeError:
        raise ValueError("neither UTF-8 nor UTF-16, nor Western European: save it as UTF-8") from None
    text = text.rstrip("\x1a")                              # the end of a file, to old programs
    if re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text):
        raise ValueError("not a text")
    if encoding == "cp1252":
        notes.append(f"{name} is not UTF-8: read as Western European (cp1252)")
    return text


def as_text(value):
    """A value of metadata -> one line of text: lists joined by commas, numbers as they are written.
    ValueError for anything else."""
    if value is None:
        return ""
    if isinstance(value, str):
        # JSON can hold what is no letter: half of a pair of surrogates, control characters
        value = value.encode("utf-8", "ignore").decode()
        return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", value).split())
    if isinstance(value, list):
        return ", ".join(filter(None, map(as_text, value)))
    if isinstance(value, float):    # NaN is how some programs write that there is none
        return f"{value:.10g}" if math.isfinite(value) else ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{str(value)[:40]} is neither text, a number nor a list")


def metadata_rows(file, notes):
    """The rows of a metadata file, dictionaries. ValueError and others where it cannot be understood."""
    text = decode_text(file.read_bytes(), file.name, notes)
    if file.suffix == ".csv":
        first = text.partition("\n")[0]
        delimiter = max(",;\t", key=first.count)            # as a spreadsheet of some countries writes it
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
        if any(None in row for row in rows):
            raise ValueError("a row has more cells than the first; put texts that hold commas in quotes")
        return rows
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    rows = json.loads(text)
    if isinstance(rows, dict):                              # {name: text} or {name: {"text": text}}
        return [{**(row if isinstance(row, dict) else {"text": row}), "file_name": name}
                for name, row in rows.items()]
    return rows


class Beats(NamedTuple):
    """The beats of a recording whose tempo stays."""
    bpm: float
    per_bar: float
    first: float                                            # seconds to the beginning of the first bar

    def bar_at(self, seconds):
        """The place in the bar, in [0, 1)."""
        return (seconds - self.first) * self.bpm / 60 / self.per_bar % 1


def beats_of_row(row):
    """Beats of a row of metadata, None where it does not tell where they are. Raises ValueError."""
    first = as_text(row.get("first_beat"))
    if not first:
        return None
    beats = Beats(float(row["bpm"]), float(as_text(row.get("beats_per_bar")) or 4), float(first))
    if not (10 <= beats.bpm <= 1000 and 1 <= beats.per_bar <= 64 and math.isfinite(beats.first)):
        raise ValueError(f"no music has bpm {beats.bpm:g}, beats_per_bar {beats.per_bar:g}, "
                         f"first_beat {beats.first:g}")
    return beats


def read_metadata(folder, notes=None, value=lambda row: as_text(row["text"])):
    """All metadata files under the folder -> {file name relative to the folder: value of its row}; a name
    that Unicode can write in two ways is there in its composed form too.

    value: by default the prompt. UserError where one cannot be understood: training on wrong prompts would go
    unnoticed for hours. A `metadata.json` may be another program's and is then left alone, with a note."""
    notes = [] if notes is None else notes
    values = {}
    files = [f for f in find_files(folder).ignored if f.name in METADATA]
    for file in sorted(files, key=lambda f: len(f.parts)):  # the nearest to the track has the last word
        place = file.parent.relative_to(folder)
        if any(map(is_hidden, place.parts)):
            continue
        found = {}
        row = {}
        try:
            for row in metadata_rows(file, notes):
                name = posixpath.join(place.as_posix(), row["file_name"].replace("\\", "/"))
                found[posixpath.normpath(name)] = value(row)
        except (OSError, ValueError, TypeError, AttributeError, csv.Error, RecursionError, KeyError) as error:
            reason = f"cannot be read ({error})"
            if isinstance(error, KeyError):
                needed = "`bpm` beside `first_beat`" if error.args == ("bpm",) else "`file_name` and `text`"
                reason = f"every row needs {needed}; one has only {', '.join(map(str, row))}"
            if file.suffix != ".json":
                raise UserError(f"{file}: {reason}; mend or remove it") from None
            notes.append(f"{file.relative_to(folder).as_posix()} is not used: {reason}")
        else:
            values |= found
    for name, found in list(values.items()):
        values.setdefault(composed(name), found)
    return values


def composed(name):
    return unicodedata.normalize("NFC", name)


def caption_files(file):
    """Where a caption of this track may be, in the order of preference. Its name may be written in another
    Unicode form."""
    stems = [file.stem, file.name]
    stems += [unicodedata.normalize(form, stem) for form in ("NFC", "NFD") for stem in stems]
    return [file.with_name(stem + ending) for ending in (".txt", ".json") for stem in dict.fromkeys(stems)]


def caption_from_json(value):
    """The caption in a JSON file beside a track: a text of its own, or else its keywords."""
    if not isinstance(value, dict):
        return as_text(value)
    value = {str(key).lower(): content for key, content in value.items()}
    for key in "caption", "text", "prompt", "description":
        text = as_text(value.get(key))
        if text:
            return text
    keys = "tags", "keywords", "genre", "genres", "mood", "moods", "instrument", "instruments", "bpm", "key"
    return ", ".join(filter(None, (as_text(value.get(key)) for key in keys)))


def read_caption(file, name, notes):
    """The text of a caption file, "" where it holds none that can be understood, which goes to `notes`."""
    try:
        text = decode_text(file.read_bytes(), name, notes)
        return caption_from_json(json.loads(text)) if file.suffix == ".json" else as_text(text)
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{name} is not used as a caption: {error}")
        return ""


def clean(text):
    """'03 - night_drive' -> 'night drive': a track's number goes, as far as a name can tell. What is only a
    number stays, and a tempo (90 bpm)."""
    text = " ".join(text.replace("_", " ").split())
    number = r"(\d{1,2}-)?(0\d+[-.)\s]|\d\d[-\s](?!\s*bpm)|\d+\s*[.)](?!\d)|\d+\s+-)"
    return re.sub(rf"^{number}[-.\s]*(?=\S)", "", text, flags=re.IGNORECASE)


def prompt_from_tags(file, name, notes):
    """Title and genre, "" where there are none."""
    tags = {}
    for key, raw in read_tags(file).items():
        try:
            tags[key] = as_text(decode_text(raw, f"the {key} tag of {name}", notes))
        except ValueError as error:
            notes.append(f"the {key} tag of {name} is not used: {error}")
    # ID3 may give a bare number: no word to learn
    genre = re.sub(r"^(\(\d+\))+|^\d+$", "", tags.get("genre", ""))
    return ", ".join(filter(None, (clean(tags.get("title", "")), genre.strip())))


def find_prompt(file, folder, metadata, notes):
    """The prompt of one track and where it is from: "metadata", "captions", "tags" or "names"."""
    file = Path(file)
    name = file.relative_to(folder).as_posix()
    text = metadata.get(name) or metadata.get(composed(name))
    if text:
        return text, "metadata"
    for caption in caption_files(file):
        if os.path.isfile(caption):
            text = read_caption(caption, caption.relative_to(folder).as_posix(), notes)
            if text:
                return text, "captions"
    text = prompt_from_tags(file, name, notes)
    if text:
        return text, "tags"
    return f"{clean(file.stem)}, {clean(Path(os.path.abspath(file)).parent.name)}", "names"


def prompt_of(file, folder, metadata):
    """The prompt of one track: from `read_metadata`, else caption file, else title and genre tags, else its
    name."""
    return find_prompt(file, folder, metadata, [])[0]


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


READER = 2    # of another version of `read_audio` latents are not taken


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

    A clip that ends with a block, for all we know filled with silence, is kept under a name for blocks of
    that length alone. tell: called with the seconds encoded so far."""
    config = model.config
    filled = path.with_suffix(f".{config.block}.npy")
    for made in path, filled:
        with contextlib.suppress(OSError, ValueError, EOFError):                # absent or damaged
            frames, channels = np.load(made, mmap_mode="r").shape
            # else it was long enough for shorter blocks
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


def say(line):
    print(line, file=sys.stderr)


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
    """`controls.beat_features` (n, len(blocks), 18) of blocks, by their numbers in crops that begin at
    `Crops.starts`; zeros where a recording's beats are not known. None for a model that cannot be told."""
    if not config.beats:
        return None
    features = torch.zeros(len(starts), len(blocks), BEAT_FEATURES)
    for row, (beats, start) in zip(features, starts):
        if beats is not None:
            seconds = (start + torch.tensor(blocks) * config.block).double() / config.frame_rate
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
