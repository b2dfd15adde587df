"""A folder of anybody's recordings: which files are in it, which are held out, and the prompt of each.

Prompts, the first found: `metadata.jsonl`, `.csv` or `.json` with `file_name` and `text` (the AudioFolder
convention), a caption beside the track (`song.txt`, `song.json`), its title and genre tags, its cleaned file
and folder name. Metadata may also tell where the beats are, for models that can be told: `bpm`, `first_beat`
(seconds to the first bar) and, where it is not 4, `beats_per_bar`, of recordings whose tempo stays.
"""
import codecs
import contextlib
import csv
import io
import json
import math
import os
import posixpath
import re
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common import UserError
from recordings import read_tags

AUDIO = set(".wav .wave .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .snd .w64 .rf64 .caf".split())
AUDIO |= set(".m4a .m4b .m4r .mp4 .m4v .mov .3gp .aac .adts .alac .wma .asf .webm .weba .mka .mkv".split())
AUDIO |= set(".avi .mp2 .mp1 .mpga .ac3 .eac3 .dts .ape .wv .tta .tak .mpc .shn .spx .amr .dsf .dff".split())
AUDIO |= set(".voc .ra .rm .ogx .ogv".split())                       # from .m4a on through ffmpeg
# no music, and no mistake
BESIDE = set(".jpg .jpeg .png .gif .webp .bmp .pdf .m3u .m3u8 .pls .cue .log .npy .pt .json .db .ini".split())
METADATA = "metadata.csv", "metadata.jsonl", "metadata.json"
HELD_OUT = {"validation", "valid", "val", "dev", "test", "eval"}    # names of folders, by convention
TRAINED_ON = {"train", "training"}
LARGEST_METADATA = 2 ** 24                                  # bytes; what is made of them takes 20 times that
LARGEST_CAPTION = 2 ** 22                                   # bytes; a longer text is about something else


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
    if os.path.getsize(file) > LARGEST_METADATA:
        raise ValueError(f"longer than {LARGEST_METADATA >> 20} MiB; every folder may have its own metadata")
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
        if os.path.getsize(file) > LARGEST_CAPTION:
            raise ValueError(f"longer than {LARGEST_CAPTION} bytes")
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
    """The prompt of one track and where it is from: "metadata" (of `read_metadata`), else "captions" beside
    it, else title and genre "tags", else "names" of file and folder (but for a folder that tells the
    split)."""
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
    parent = Path(os.path.abspath(file)).parent.name
    parts = [file.stem] if parent.lower() in HELD_OUT | TRAINED_ON else [file.stem, parent]
    return ", ".join(clean(part) for part in parts), "names"
