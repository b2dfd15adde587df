"""The music of the first small model, a marimba (docs/marimba.md): public-domain scores (Bach chorales) ->
audio and prompts, for `python nano.py data`.

Each chorale is moved to C major or A minor, played note for note or broken into arpeggios, and put together
from the notes of a synthesizer's instrument. Needs fluidsynth with its General MIDI soundfont (Debian:
fluidsynth fluid-soundfont-gm) and `pip install music21`.
"""
import csv
import random
import shutil
import struct
import subprocess
import tempfile
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import soundfile

from common import UserError, leave_signals, say
from library import split
from model import PRESETS

INSTRUMENTS = {"marimba": 12}                               # General MIDI programs
# latent frames per beat. Every note begins with a frame: then the same note is the same latents whenever it
# is played, its phases too, and a small transformer can learn the notes themselves
TEXTURES = {"chorale": {"slow": 48, "moderate": 32, "fast": 24},
            "arpeggios": {"slow": 64, "moderate": 48, "fast": 32}}
HOP, RATE = PRESETS["nano"].hop, PRESETS["nano"].sample_rate
# orders of an arpeggio's four notes a beat, 0 the lowest
PATTERNS = (0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 2), (0, 3, 1, 2)
PITCHES = range(28, 100)                                    # MIDI numbers
NOTE_SECONDS = 5
NOTES = {}    # {instrument: {pitch: int16 (samples, 2)}}, per worker


def read_chorale(path):
    """A chorale of music21's corpus, moved to C major or A minor -> (key name, beats, notes [(beat, length in
    beats, pitch, voice)]), or None where it has not four parts."""
    from music21 import corpus
    score = corpus.parse(path)
    parts = list(score.parts)
    if len(parts) != 4:
        return None
    key = score.analyze("key")
    shift = ((0 if key.mode == "major" else 9) - key.tonic.pitchClass + 5) % 12 - 5
    notes = [(float(n.getOffsetInHierarchy(part)), float(n.quarterLength), pitch.midi + shift, voice)
             for voice, part in enumerate(parts) for n in part.stripTies().recurse().notes
             for pitch in n.pitches]
    beats = max(start + length for start, length, *_ in notes)
    return "C major" if key.mode == "major" else "A minor", beats, notes


def arpeggiate(notes, beats, rng):
    """Break each beat's chord into sixteenths, in two patterns of the piece's own, in turns."""
    out, patterns = [], rng.choices(PATTERNS, k=2)
    for beat in range(int(beats)):
        chord = sorted({pitch for start, length, pitch, _ in notes
                        if start < beat + 0.99 and start + length > beat + 0.01})
        order = [(chord * 4)[i] for i in patterns[beat % 2]] if chord else []
        out += [(beat + i / 4, 1, pitch, 0 if i == 0 else 1) for i, pitch in enumerate(order)]
    return out


def write_midi(path, program):
    """All pitches, one after the other, at 480 ticks a second."""
    track = bytearray([0, 0xC0, program])                   # at once: the instrument
    # and the tempo, in microseconds a beat
    track += bytes([0, 0xFF, 0x51, 3]) + round(1e6).to_bytes(3, "big")
    ticks = 480 * NOTE_SECONDS
    for pitch in PITCHES:
        track += bytes([0, 0x90, pitch, 84]) + midi_delay(ticks - 240)
        track += bytes([0x80, pitch, 0]) + midi_delay(240)
        track += bytes([0xB0, 120, 0])              # all sound off
    track += b"\x00\xff\x2f\x00"
    header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, 480)
    Path(path).write_bytes(header + b"MTrk" + struct.pack(">I", len(track)) + track)


def midi_delay(ticks):
    """A variable-length quantity below 16384."""
    return bytes([ticks >> 7 | 128, ticks & 127])


def sample_notes(program, soundfont):
    """{pitch: int16 (samples, 2)}: what fluidsynth makes of each note, held until it has died away."""
    with tempfile.TemporaryDirectory() as tmp:
        midi, wav = f"{tmp}/a.mid", f"{tmp}/a.wav"
        write_midi(midi, program)
        done = subprocess.run(["fluidsynth", "-ni", "-q", "-r", str(RATE), "-g", "0.8", "-R", "0", "-C", "0",
                               "-F", wav, "-T", "wav", soundfont, midi], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
        audio = np.zeros((0, 2)) if done.returncode else soundfile.read(wav, dtype="int16", always_2d=True)[0]
        if not audio.any():
            raise UserError(f"fluidsynth makes no sound with {soundfont}: is it a soundfont?")
    n = NOTE_SECONDS * RATE
    notes = {pitch: audio[i * n:(i + 1) * n - RATE // 20] for i, pitch in enumerate(PITCHES)}
    return {pitch: note[:1 + note.any(1).nonzero()[0].max(initial=0)] for pitch, note in notes.items()}


def start_worker(notes):
    leave_signals()
    NOTES.update(notes)


def render(job):
    """One performance of a score -> one FLAC file. Returns (file name, prompt), or None where the score has
    not four parts."""
    score, index, performance, folder = job
    rng = random.Random(1000 * performance + index)
    instrument = list(NOTES)[index % len(NOTES)]
    texture = list(TEXTURES)[(index // len(NOTES) + performance) % 2]
    speed, frames = rng.choice(list(TEXTURES[texture].items()))
    target = folder / f"{index:03d}{chr(97 + performance)}_{texture}_{instrument.replace(' ', '_')}.flac"
    chorale = read_chorale(score)
    if chorale is None:
        return None
    key, beats, notes = chorale
    if texture == "arpeggios":
        notes = arpeggiate(notes, beats, rng)
    if not target.exists():
        audio = np.zeros((int((beats + 2) * frames) * HOP, 2), np.float32)
        for start, _, pitch, voice in notes:
            at, note = round(start * frames) * HOP, NOTES[instrument][pitch]
            audio[at:at + len(note)] += note[:len(audio) - at] * (1.4 if voice == 0 else 1.05)
        part = target.with_suffix(".part")
        soundfile.write(part, audio.clip(-32767, 32767).round().astype(np.int16), RATE, format="FLAC",
                        subtype="PCM_16")
        part.rename(target)
    return f"{folder.name}/{target.name}", f"{speed} {texture} in {key} on {instrument}"


def make_data(args):
    """Render the first `--tracks` chorales that have four parts to `--data`, with metadata.csv.

    One in sixteen is held out, in a folder `validation`; of the others `--performances` are made, each with
    its own texture, speed and patterns."""
    if not shutil.which("fluidsynth"):
        raise UserError("fluidsynth is not installed: on Debian, "
                        "apt-get install fluidsynth fluid-soundfont-gm")
    if not Path(args.soundfont).exists():
        raise UserError(f"no soundfont at {args.soundfont}: name one with --soundfont")
    try:
        from music21 import corpus
    except ImportError:
        raise UserError("the scores come from music21: pip install music21")
    folder = Path(args.data)
    scores = [str(p) for p in corpus.getComposer("bach") if p.stem.startswith("bwv")]
    scores.sort()
    random.Random(0).shuffle(scores)
    held_out, jobs = set(split([Path(s).stem for s in scores[:args.tracks]])[1]), []
    for i, score in enumerate(scores[:args.tracks]):
        side = "validation" if Path(score).stem in held_out else "train"
        (folder / side).mkdir(parents=True, exist_ok=True)
        jobs += [(score, i, performance, folder / side)
                 for performance in range(1 if side == "validation" else args.performances)]
    started, rows = time.time(), []
    notes = {name: sample_notes(program, args.soundfont) for name, program in INSTRUMENTS.items()}
    with Pool(args.workers, start_worker, (notes,)) as pool:
        for row in pool.imap(render, jobs):
            if row:
                rows.append(row)
                say(f"{len(rows):4d} {row[0]}: {row[1]}")
    with open(folder / "metadata.csv", "w", newline="") as f:
        csv.writer(f).writerows([("file_name", "text"), *rows])
    hours = sum(soundfile.info(folder / name).duration for name, _ in rows) / 3600
    say(f"{len(rows)} tracks, {hours:.2f} h in {folder}, {time.time() - started:.0f} s")
