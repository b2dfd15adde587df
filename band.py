"""Composes and renders labelled pieces of music in eleven genres: the training data of the small model.

    python band.py data/band --hours 24 --keys few     # train/, validation/ and metadata.csv with the labels
    python band.py data/notes --hours 5 --kind notes   # any notes of any instrument, for the autoencoder

A piece is 48 seconds of drums, bass, chords and lead. Every note begins exactly with a latent frame: then the
same note is the same latents whenever it is played, its phases too. An interrupted run goes on where it was.
It takes libfluidsynth and a soundfont (Debian: apt-get install fluidsynth fluid-soundfont-gm).

Patterns are strings of sixteen steps a bar, of one bar or two; a space stands between alternatives. "." is a
rest, "-" holds a note on, and the other letters are
    drums    x loud, o medium, g soft
    bass     r root, 3 third, 5 fifth, 8 octave, n the degree of the scale below the next bar's root
    chords   x the chord, p root, fifth and octave, digits one of the chord's notes, counted from below
    lead     x a note of the melody
"""
import argparse
import csv
import ctypes
import ctypes.util
import os
import random
import re
import zlib
from functools import lru_cache
from itertools import count
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from common import (UserError, leave_signals, positive_finite, random_seed, run, say, whole, writable,
                    write_whole)
from model import PRESETS

HOP = PRESETS["nano"].hop                                   # samples a latent frame
RATE = PRESETS["nano"].sample_rate
PERIOD = 64                                                 # samples: fluidsynth's grid of note times
SECONDS = 48                                                # of a piece, rounded to whole bars
BEATS = 4                                                   # a bar
STEPS = 16                                                  # a bar
HELD_OUT = 48                                               # pieces for validation
ROLES = ("drums", "bass", "chords", "lead")
LEVEL = {"drums": 0, "bass": -3, "chords": -4, "lead": -3}  # dB of RMS while the part sounds
ABSENT = {"drums": 0.08, "bass": 0.1, "chords": 0, "lead": 0.2}     # share of pieces without this part
VELOCITY = {"x": 108, "o": 82, "g": 52}

# ---------------------------------------------------------------------------------------- instruments, words
INSTRUMENTS = {                                             # General MIDI programs, from 0
    "piano": 0, "electric piano": 4, "harpsichord": 6, "music box": 10, "vibraphone": 11, "marimba": 12,
    "organ": 16, "accordion": 21, "nylon guitar": 24, "acoustic guitar": 25, "jazz guitar": 26,
    "clean guitar": 27, "distorted guitar": 30, "upright bass": 32, "electric bass": 33,
    "fretless bass": 35, "synth bass": 38, "violin": 40, "cello": 42, "strings": 48, "choir": 52,
    "trumpet": 56, "brass": 61, "alto sax": 65, "tenor sax": 66, "oboe": 68, "clarinet": 71, "flute": 73,
    "pan flute": 75, "square lead": 80, "saw lead": 81, "pad": 89, "kalimba": 108, "steel drums": 114}
LIFT = {"flute": 12, "pan flute": 12, "music box": 12, "tenor sax": -12}    # of a melody, semitones
DRUMS = {"kick": 36, "rim": 37, "snare": 38, "clap": 39, "hat": 42, "pedal hat": 44, "low tom": 45,
         "open hat": 46, "mid tom": 47, "crash": 49, "high tom": 50, "ride": 51, "shaker": 70}
FILL = {"s": "snare", "c": "clap", "h": "high tom", "m": "mid tom", "l": "low tom"}
SYNONYMS = {
    "boom bap": ("hip hop", "lofi hip hop"), "jazz trio": ("jazz",), "bossa nova": ("bossa",),
    "orchestra": ("orchestral", "cinematic"), "reggae": ("island",), "arpeggios": ("arpeggio",),
    "ambient": ("calm",), "drums": ("drum kit",), "upright bass": ("double bass", "bass"),
    "electric bass": ("bass guitar", "bass"), "fretless bass": ("bass",), "synth bass": ("bass",),
    "piano": ("grand piano",), "electric piano": ("rhodes",), "vibraphone": ("vibes",),
    "nylon guitar": ("classical guitar", "guitar"), "acoustic guitar": ("guitar",),
    "jazz guitar": ("guitar",), "clean guitar": ("electric guitar", "guitar"),
    "distorted guitar": ("distortion guitar", "electric guitar"),
    "strings": ("string ensemble",), "choir": ("voices",), "brass": ("horns",), "violin": ("fiddle",),
    "alto sax": ("saxophone", "sax"), "tenor sax": ("saxophone", "sax"),
    "square lead": ("synth", "synth lead"), "saw lead": ("synth", "synth lead"),
    "pad": ("synth pad", "warm pad"), "steel drums": ("steelpan",)}

# ---------------------------------------------------------------------------------------- genres
STRAIGHT = (0, 1 / 4, 1 / 2, 3 / 4)                         # where the four steps of a beat lie
LAZY = (0, 0.3, 1 / 2, 0.8)
TRIPLET = (0, 1 / 3, 2 / 3, 5 / 6)
HELD = "x---------------"
SPARSE = "x-----------x---x--------------- ....x-------x-------x----------- x-------x---x---x-------........"
LYRIC = "x---x-x-x-------x---x---x------- x-----x-x---x---x-----------.... ..x-x-x-x-----x-x---x---x-------"
EIGHTHS = "x-x-x---x-x-x-x-..x-x-x-x------- ..x-x-x-..x-x-x-x---x-x-x------- x---x-x---x-x-x-..x-..x-x-----.."
RIFF = "x.x..x.x..x.x...x.x..x.x..x-.... x..x..x.x..x..x.x..x..x-........ x.x.x..x..x.x.x.x.x.x..x..x-...."
POP = {"major": ("I V vi IV", "I vi IV V", "I IV I V", "I iii IV V", "I V IV V", "I IV vi V", "I ii V I"),
       "minor": ("i VI III VII", "i iv VI V", "i VI VII i", "i VII VI V", "i III iv V", "i iv V i",
                 "i v VI V")}
JAZZ = {"major": ("ii V I I", "I vi ii V", "I IV ii V", "I ii V I", "ii V I vi", "I vi IV V"),
        "minor": ("iio V i i", "i iv V i", "i VI iio V", "i iv iio V", "iv V i i")}
MODAL = {"major": ("I IV I V", "I ii IV I", "I IV V I", "I vi IV I", "I V IV I"),
         "minor": ("i i iv i", "i VI V i", "i i VI iv", "i VI iv i", "i i VI V")}


class Genre(NamedTuple):
    beats: tuple                                            # latent frames a beat, to choose from
    swing: tuple
    modes: tuple
    progressions: dict                                      # {mode: Roman numerals, one a bar}
    sevenths: bool
    kits: tuple                                             # General MIDI programs of the drum bank
    drums: dict                                             # {drum: pattern}
    fill: str                                               # letters of FILL: from the first one on, no drums
    bass: dict                                              # {instruments: pattern}
    chords: dict
    lead: dict
    softer: float = 0.0                                     # drums, by so many dB


BOTH = ("major", "minor")
GENRES = {
    "boom bap": Genre(
        (28, 32), LAZY, ("minor",), POP, True, (0, 8),
        {"kick": "x......x..x..... x..x......x..... x.....x...x..x..x......x.xx.....",
         "snare": "....x.......x... ....x..g.g..x..g", "hat": "o.g.o.g.o.g.o.g. o.o.o.ogo.o.o.o.",
         "open hat": "................ ..............................o."},
        "............ss.s ..........s.s.ss",
        {"upright bass, electric bass": "r--.r.5-..r.n-.. r-----r---5-..n- r--r--..5-..8-n-"},
        {"electric piano, piano, vibraphone, jazz guitar":
         "x---..x-..x-.... x-----..x---..x- ..x---..x-------"},
        {"flute, tenor sax, trumpet, vibraphone, electric piano": EIGHTHS}),
    "house": Genre(
        (20,), STRAIGHT, ("minor",), POP, True, (25, 24),
        {"kick": "x...x...x...x...", "open hat": "..o...o...o...o.", "clap": "....x.......x...",
         "hat": "o.g.o.g.o.g.o.g. gggogggogggogggo", "shaker": "................ ogogogogogogogog"},
        "............cccc ..........c.c.cc",
        {"synth bass, electric bass": "..r-..r-..r-..8- r.r-..8.r.r-..n- ..rr..r-..rr..8-"},
        {"piano, organ, electric piano": "x..x..x...x..x.. ..x-..x-..x-..x- x-.x-.x-..x-.x-.",
         "pad, strings": HELD},
        {"saw lead, square lead, marimba, piano": RIFF}),
    "techno": Genre(
        (20,), STRAIGHT, ("minor",), MODAL, False, (24, 25),
        {"kick": "x...x...x...x...", "hat": "..x...x...x...x. o.xoo.xoo.xoo.xo",
         "clap": "....o.......o... ................",
         "rim": "...o..o....o..o. .......o.o...... ................",
         "ride": "................ o.o.o.o.o.o.o.o."},
        "........s.s.ssss ............ssss",
        {"synth bass": "r.r.r.r.r.r.r.r. .rrr.rrr.rrr.rr8 r..r..r.r..r..8."},
        {"pad, strings": HELD, "saw lead, square lead": "x.....x.....x... ...x..x....x..x. 0120120120120123"},
        {"square lead, saw lead, kalimba, marimba": RIFF}),
    "ambient": Genre(
        (40, 36), STRAIGHT, BOTH, MODAL, True, (), {}, "",
        {"fretless bass, cello": "r--------------- r-------5-------"},
        {"pad, choir, strings": HELD, "pad, electric piano": "x-------x------- x-----------x---"},
        {"piano, kalimba, pan flute, music box, vibraphone": SPARSE}),
    "rock": Genre(
        (24, 20), STRAIGHT, BOTH, POP, False, (16, 8),
        {"kick": "x.......x.x..... x..x....x.x..... x.x.....x.x...x.", "snare": "....x.......x...",
         "hat": "x.o.x.o.x.o.x.o. ................", "ride": "................ x.o.x.o.x.o.x.o."},
        "........ssssmmll ........s.s.hhml ............ssss",
        {"electric bass": "r-r-r-r-r-r-r-r- r---r-r-r---r-n- r--r--r-r--r--n-"},
        {"distorted guitar": "p-p-p-p-p-p-p-p- p---..p-p---..p- p--p--p-p-p-p-p-",
         "clean guitar, organ": "x---x-x-..x-x-x- x-------x---x---"},
        {"distorted guitar, organ, saw lead": EIGHTHS}),
    "jazz trio": Genre(
        (24, 20, 16), TRIPLET, BOTH, JAZZ, True, (32, 40),
        {"ride": "x...o.o.x...o.o. x...o...x...o.o.", "pedal hat": "....o.......o...",
         "kick": "g............... g.......g.......",
         "snare": "......g......... ..........g...g. ..g.......g....."},
        "........s.s...ss ..........s.ss.s",
        {"upright bass": "r---3---5---n--- r---5---8---n--- r---8---5---n---"},
        {"piano, jazz guitar, vibraphone":
         "..x-......x-.... x-----x-........ ....x-....x-.... x-....x-......x-..x-......x-...."},
        {"piano, tenor sax, alto sax, jazz guitar, trumpet, clarinet": EIGHTHS}, softer=10),
    "bossa nova": Genre(
        (24, 20), STRAIGHT, BOTH, JAZZ, True, (40, 32),
        {"hat": "o.g.o.g.o.g.o.g. gggggggggggggggg", "kick": "x.....o.x.....o.",
         "rim": "x.....x.....x.......x.....x....."},
        "............s.ss ..........s.s.s.",
        {"upright bass, fretless bass": "r-----5-5-----r- r-----r-5-----n-"},
        {"nylon guitar, piano, electric piano": "x---..x---..x-....x---..x---..x- x---..x-x-..x---"},
        {"flute, alto sax, vibraphone, clarinet": f"{LYRIC} {EIGHTHS}"}),
    "folk": Genre(
        (28, 24, 20), STRAIGHT, BOTH, POP, False, (), {}, "",
        {"upright bass, cello": "r-----..5-----.. r-------5---n---"},
        {"acoustic guitar, nylon guitar": "x---x-x-..x-x-x- x-x-x-x-x-x-x-x- 0-2-1-2-3-2-1-2-",
         "accordion, harpsichord": "x---x---x---x--- x-------x---x---"},
        {"violin, flute, accordion, clarinet, oboe": f"{LYRIC} {EIGHTHS}"}),
    "orchestra": Genre(
        (40, 36, 32), STRAIGHT, BOTH, POP, False, (48,),
        {"kick": "x............... x.......o.......", "snare": "........o.g.g.g. ..............gg"},
        "........ssssssss",
        {"cello": "r-----------5--- r-------8---5--- r-r-r-r-r-r-r-r-"},
        {"strings, choir": f"{HELD} x-------x-------", "strings, brass": "x-x-x-x-x-x-x-x- x-----x-x---x---"},
        {"violin, flute, oboe, trumpet, clarinet": f"{LYRIC} {SPARSE}"}),
    "reggae": Genre(
        (32, 28), STRAIGHT, BOTH, POP, False, (0, 8),
        {"kick": "........x....... x...x...x...x...", "rim": "........x....... ........x.....g.",
         "hat": "o.o.o.o.o.o.o.o. o.ogo.ogo.ogo.og"},
        "............hhml ........s..s.mml",
        {"electric bass, fretless bass": "r--.r-3-5-..r-.. ..r-r-..5-3-r-.. r-..r-..8-5-3-.."},
        {"organ, clean guitar, electric piano": "....x-......x-.. ..x...x...x...x. ..x.x.x...x.x.x."},
        {"steel drums, marimba, trumpet, pan flute, organ": f"{EIGHTHS} {LYRIC}"}),
    "arpeggios": Genre(
        (36, 28, 24, 20), STRAIGHT, BOTH, POP, False, (), {}, "",
        {"cello, synth bass": "r--------------- r-------5-------"},
        {"piano, harpsichord, marimba, music box, nylon guitar, square lead, kalimba, electric piano":
         "0-1-2-3-4-3-2-1- 0-2-1-3-2-4-3-5- 5-3-4-2-3-1-2-0- 0---2---1---3---",
         "piano, square lead, marimba": "0123432101234321 0231023102310231"},
        {"violin, flute, oboe": f"{LYRIC} {SPARSE}"}),
}
# each word is a phrase: its section and the parts that play. Two phrases of a section end with a fill
FORMS = ("A:c A:dbc B:dbcl B:dbcl A:dbc A:dbcl B:bcl B:dbcl",
         "A:db A:dbcl B:dbc B:dbcl A:bcl A:dbcl B:dbcl B:dbc",
         "A:bc A:dbcl B:dbcl B:dbc A:cl A:dbcl B:dbcl B:dbcl",
         "A:dc A:dbcl B:dbcl B:dbl A:dbc A:dbcl B:bcl B:dbcl")


# ---------------------------------------------------------------------------------------- harmony
class Key(NamedTuple):
    tonic: int                                              # semitones above C
    mode: str
    name: str                                               # as in "Bb major"


NUMERALS = ("I", "II", "III", "IV", "V", "VI", "VII")
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
NAMES = {"major": "C Db D Eb E F F# G Ab A Bb B".split(), "minor": "C C# D Eb E F F# G G# A Bb B".split()}
KEYS = [Key(tonic, mode, f"{name} {mode}") for mode in SCALES for tonic, name in enumerate(NAMES[mode])]
# eight keys of six signatures
FEW = ("C major", "F major", "G major", "D major", "A minor", "E minor", "G minor", "C minor")
FLAT = {"major": "F Bb Eb Ab Db".split(), "minor": "D G C F Bb Eb".split()}     # keys of flats
QUALITIES = {(4, 7): "", (3, 7): "m", (3, 6): "dim",
             (4, 7, 10): "7", (4, 7, 11): "maj7", (3, 7, 10): "m7", (3, 6, 10): "m7b5"}


class Chord(NamedTuple):
    symbol: str
    degree: int                                             # of its root in the scale, from 0
    tones: tuple                                            # semitones above C, the root first
    scale: tuple                                            # the bar's, semitones above C


def make_chord(numeral, key, sevenths):
    """Roman numeral ("ii", "V", "iio") -> Chord. A major V raises the seventh degree of a minor key."""
    scale = SCALES[key.mode]
    plain = numeral.rstrip("o")
    degree = NUMERALS.index(plain.upper())
    shape = (4 if plain.isupper() else 3, 6 if numeral.endswith("o") else 7)
    if sevenths:
        shape += (10 if (scale[degree] + 10) % 12 in scale else 11,)
    tones = (scale[degree], *(scale[degree] + interval for interval in shape))
    raised = 11 if 11 in tones else scale[6]
    flat = key.name.split()[0] in FLAT[key.mode]
    names = "C Db D Eb E F Gb G Ab A Bb B" if flat else "C C# D D# E F F# G G# A A# B"
    symbol = names.split()[(key.tonic + scale[degree]) % 12] + QUALITIES[shape]
    scale = (*scale[:6], raised)
    return Chord(symbol, degree, tuple(key.tonic + t for t in tones), tuple(key.tonic + t for t in scale))


def above(lowest, pitch):
    """The pitch, moved by octaves into the twelve semitones from `lowest` on."""
    return lowest + (pitch - lowest) % 12


# ---------------------------------------------------------------------------------------- parts
class Note(NamedTuple):
    start: float                                            # latent frames
    length: float
    pitch: int
    velocity: int


class Bar(NamedTuple):
    number: int
    beat: int                                               # latent frames
    swing: tuple
    chord: Chord
    following: Chord                                        # of the next bar
    crash: bool                                             # a cymbal marks its beginning
    fill: str                                               # letters of FILL, or ""

    def frame(self, step):
        beat, part = divmod(self.number * STEPS + step, STEPS // BEATS)
        return beat * self.beat + round(self.beat * self.swing[part])

    def note(self, step, held, pitch, loudness=""):         # ends a frame early: repeated notes stay apart
        start = self.frame(step)
        loudness = loudness or ("x" if step % 8 == 0 else "o")
        return Note(start, max(1, self.frame(step + held) - start - 1), pitch, VELOCITY[loudness])


def hits(pattern, bar):
    """One bar of a pattern -> [(step, steps that it is held, letter)]"""
    first = bar * STEPS % len(pattern)
    return [(m.start(), len(m[0]), m[0][0]) for m in re.finditer(r"[^.-]-*", pattern[first:first + STEPS])]


def play_drums(bar, patterns):
    """patterns: {drum: pattern}. Returns notes, as all of these do."""
    pause = STEPS - len(bar.fill.lstrip("."))
    line = [(step, drum, letter) for drum, pattern in patterns.items()
            for step, _, letter in hits(pattern, bar.number) if step < pause]
    line += [(step, FILL[letter], "") for step, letter in enumerate(bar.fill) if letter != "."]
    line += [(0, "crash", "o")] if bar.crash else []
    return [bar.note(step, 1, DRUMS[drum], letter) for step, drum, letter in line]


def play_bass(bar, pattern, lowest):
    root, third, fifth = bar.chord.tones[:3]
    low = above(lowest, root)
    approach = above(lowest - 3, bar.following.scale[(bar.following.degree - 1) % 7])
    pitches = {"r": low, "3": low + third - root, "5": low + fifth - root, "8": low + 12, "n": approach}
    return [bar.note(step, held, pitches[letter]) for step, held, letter in hits(pattern, bar.number)]


def play_chords(bar, pattern):
    voicing = sorted(above(52, tone) for tone in bar.chord.tones)
    low = above(40, bar.chord.tones[0])
    notes = []
    for step, held, letter in hits(pattern, bar.number):
        if letter == "x":
            pitches = voicing
        elif letter == "p":
            pitches = (low, low + 7, low + 12)
        else:
            octave, tone = divmod(int(letter), len(voicing))
            pitches = (voicing[tone] + 12 * octave,)
        notes += [bar.note(step, held, pitch) for pitch in pitches]
    return notes


def play_lead(bar, motif, lift):
    """One bar of a motif of two. Every other time the motif is an answer: its second half goes the other way.

    motif: (rhythm, degrees of the scale to move by at each of its 32 steps, degree to come from). On half
    bars, and where a note is long, the melody takes the nearest tone of the chord."""
    rhythm, moves, place = motif
    answer = bar.number % 4 >= 2
    tonic = above(57, bar.chord.scale[0])
    notes = []
    for half in range(bar.number % 2 + 1):                  # the second bar goes on where the first ends
        for step, held, _ in hits(rhythm, half):
            move = moves[STEPS * half + step]
            place = min(10, max(-2, place + (-move if answer and half else move)))
            if step % 8 == 0 or held > 3:
                tones = [p for p in range(-3, 12) if (p - bar.chord.degree) % 7 in (0, 2, 4)]
                place = min(tones, key=lambda p: abs(p - place))
            if half == bar.number % 2:
                pitch = tonic + lift + 12 * (place // 7) + bar.chord.scale[place % 7] - bar.chord.scale[0]
                notes.append(bar.note(step, held, pitch))
    return notes


# ---------------------------------------------------------------------------------------- pieces
class Part(NamedTuple):
    program: int
    drums: bool
    notes: list
    level: float                                            # dB
    pan: float                                              # -1 left, 1 right


class Piece(NamedTuple):
    labels: dict                                            # columns of metadata.csv
    parts: list
    frames: int
    room: float                                             # seconds
    wet: float                                              # amplitude of the room's sound
    loudness: float                                         # RMS, dBFS


class Section(NamedTuple):
    chords: list
    drums: dict                                             # {drum: pattern}
    patterns: dict                                          # {role: pattern}
    motif: tuple


def draw_section(rng, genre, patterns, progression, key):
    chords = [make_chord(numeral, key, genre.sevenths) for numeral in progression.split()]
    drums = {drum: rng.choice(pattern.split()) for drum, pattern in genre.drums.items()}
    patterns = {role: rng.choice(pattern.split()) for role, pattern in patterns.items()}
    moves = [rng.choice((-2, -1, -1, 0, 1, 1, 2)) for _ in range(2 * STEPS)]
    return Section(chords, drums, patterns, (patterns["lead"], moves, rng.choice((0, 2, 4, 7))))


def draw_band(rng, genre):
    """-> ({role: instrument}, {role: alternatives of its pattern}). Some bands lack an instrument."""
    band = {"drums": "drums"} if genre.drums else {}
    patterns = {}
    for role in ROLES[1:]:
        names, patterns[role] = rng.choice(list(getattr(genre, role).items()))
        band[role] = rng.choice([name for name in names.split(", ") if name not in band.values()])
    return {role: name for role, name in band.items() if rng.random() >= ABSENT[role]}, patterns


def compose(rng, name, keys):
    """A piece of the genre with this name. rng: random.Random. keys: to choose from, some of each mode."""
    genre = GENRES[name]
    beat = rng.choice(genre.beats)
    bars = round(SECONDS * RATE / (HOP * BEATS * beat))
    mode = rng.choice(genre.modes)
    key = rng.choice([key for key in keys if key.mode == mode])
    band, patterns = draw_band(rng, genre)
    progressions = rng.sample(genre.progressions[mode], 2)
    sections = [draw_section(rng, genre, patterns, progression, key) for progression in progressions]
    phrase = 4 if bars > 16 else 2                          # bars
    form = [word.split(":") for word in rng.choice(FORMS).split()]
    timeline = [(sections["AB".index(letter)], roles) for letter, roles in form for _ in range(phrase)][:bars]
    chords = [section.chords[number % 4] for number, (section, _) in enumerate(timeline)]
    notes = {role: [] for role in band}
    playing = []
    for number, (section, initials) in enumerate(timeline):
        place = number % (2 * phrase)
        crash = place == 0 and number > 0
        fill = rng.choice(genre.fill.split()) if genre.fill and place == 2 * phrase - 1 else ""
        bar = Bar(number, beat, genre.swing, chords[number], chords[(number + 1) % bars], crash, fill)
        roles = [role for role in band if role[0] in initials] or ["chords"]
        playing.append("".join(role[0] for role in roles))
        for role in roles:
            if role == "drums":
                notes[role] += play_drums(bar, section.drums)
            elif role == "bass":
                notes[role] += play_bass(bar, section.patterns[role], 36 if band[role] == "cello" else 31)
            elif role == "chords":
                notes[role] += play_chords(bar, section.patterns[role])
            else:
                notes[role] += play_lead(bar, section.motif, LIFT.get(band[role], 0))
    side = rng.choice((-0.4, 0.4))
    pan = {"drums": 0, "bass": 0, "chords": side, "lead": -side / 2}
    programs = {**INSTRUMENTS, "drums": rng.choice(genre.kits or (0,))}
    levels = {**LEVEL, "drums": LEVEL["drums"] - genre.softer}
    parts = [Part(programs[band[r]], r == "drums", notes[r], levels[r], pan[r]) for r in band]
    labels = {"genre": name, "instruments": ";".join(band.values()), "key": key.name,
              "bpm": 60 * RATE / (HOP * beat), "beat_frames": beat, "beats_per_bar": BEATS, "first_beat": 0,
              "bars": bars, "chords": " ".join(c.symbol for c in chords), "playing": " ".join(playing)}
    return Piece(labels, parts, bars * BEATS * beat, room=0.4, wet=0.05, loudness=-20)


def random_notes(rng):
    """Any program, any pitch, any time, any loudness, in any room: what an autoencoder should have heard."""
    frames = round(SECONDS / 2 * RATE / HOP)
    parts = []
    for drums in rng.sample((True, False, False, False, False), rng.randint(1, 4)):
        program = rng.choice((0, 8, 16, 24, 25, 32, 40, 48)) if drums else rng.randrange(120)
        middle = rng.randint(40, 84)
        rate = rng.choice((0.5, 1, 2, 4, 8))                # chords a second
        notes = []
        for _ in range(round(SECONDS / 2 * rate)):
            start = rng.randrange(frames * HOP // PERIOD) * PERIOD / HOP
            length = rng.choice((4, 10, 20, 43, 100))
            for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
                pitch = rng.randint(35, 81) if drums else min(103, max(24, middle + rng.randint(-14, 14)))
                notes.append(Note(start, length, pitch, rng.randint(30, 120)))
        parts.append(Part(program, drums, notes, rng.uniform(-12, 0), rng.uniform(-0.8, 0.8)))
    wet = rng.choice((0, 0, 0.1, 0.2, 0.5))
    return Piece({}, parts, frames, rng.choice((0.3, 0.8, 1.4)), wet, rng.uniform(-30, -14))


# ---------------------------------------------------------------------------------------- sound
class Synth:
    """libfluidsynth through ctypes: its command line rounds times to milliseconds, this plays on time."""
    def __init__(self, soundfont):
        name = ctypes.util.find_library("fluidsynth")
        if not name:
            raise UserError("fluidsynth is missing: on Debian, apt-get install fluidsynth fluid-soundfont-gm")
        if not Path(soundfont).is_file():
            raise UserError(f"no soundfont at {soundfont}: on Debian, apt-get install fluid-soundfont-gm")
        self.library = library = ctypes.CDLL(name)
        library.new_fluid_settings.restype = ctypes.c_void_p
        library.new_fluid_synth.restype = ctypes.c_void_p
        self.settings = settings = ctypes.c_void_p(library.new_fluid_settings())
        library.fluid_settings_setnum(settings, b"synth.sample-rate", ctypes.c_double(RATE))
        library.fluid_settings_setint(settings, b"synth.reverb.active", 0)
        library.fluid_settings_setint(settings, b"synth.chorus.active", 0)
        # only the programs it plays
        library.fluid_settings_setint(settings, b"synth.dynamic-sample-loading", 1)
        self.synth = ctypes.c_void_p(library.new_fluid_synth(settings))
        self.font = library.fluid_synth_sfload(self.synth, os.fsencode(soundfont), 1)
        if self.font < 0:
            raise UserError(f"{soundfont} is not a soundfont that fluidsynth can read")

    def play(self, part, frames):
        """-> float32 (samples, 2), as loud as the soundfont has it"""
        channel = 9 if part.drums else 0
        bank = 128 if part.drums else 0
        self.library.fluid_synth_all_sounds_off(self.synth, -1)
        self.library.fluid_synth_program_select(self.synth, channel, self.font, bank, part.program)
        events = [(note.start, 1, note.pitch, note.velocity) for note in part.notes]
        events += [(note.start + note.length, 0, note.pitch, 0) for note in part.notes]
        events.append((frames, 0, 0, 0))
        audio = np.zeros((frames * HOP, 2), np.float32)
        position = 0
        for time, begins, pitch, velocity in sorted(events):
            sample = min(round(time * HOP / PERIOD) * PERIOD, len(audio))
            if sample > position:
                out = ctypes.c_void_p(audio[position:].ctypes.data)
                self.library.fluid_synth_write_float(self.synth, sample - position, out, 0, 2, out, 1, 2)
                position = sample
            if begins:
                self.library.fluid_synth_noteon(self.synth, channel, pitch, velocity)
            else:
                self.library.fluid_synth_noteoff(self.synth, channel, pitch)
        return audio

    def close(self):
        self.library.delete_fluid_synth(self.synth)
        self.library.delete_fluid_settings(self.settings)


def sounding_rms(audio):
    """RMS of the frames in which a part is heard: what enters late is no louder for it."""
    energy = np.square(audio).reshape(-1, HOP * 2).mean(1)
    return np.sqrt(energy[energy > 1e-4 * energy.max()].mean()) if energy.any() else 1.0


@lru_cache
def room_response(seconds):
    """Decaying noise after a short delay, its highs dying first -> (samples, 2), unit energy a channel"""
    noise = np.random.default_rng(0).standard_normal((round(seconds * RATE), 2))
    time = np.arange(len(noise))[:, None] / RATE
    dull = (noise + np.roll(noise, 1, 0) + np.roll(noise, 2, 0)) / 3
    response = noise * np.exp(-14 * time / seconds) + dull * np.exp(-7 * time / seconds)
    response *= time > 0.01
    return (response / np.sqrt(np.square(response).sum(0))).astype(np.float32)


def convolve(audio, response):
    """(samples, 2) and a response of at most 65536 -> (samples, 2), of the audio's length"""
    piece = 1 << 16                                         # short transforms are faster than a long one
    spectrum = np.fft.rfft(response.T, 2 * piece)
    out = np.zeros((2, len(audio) + 2 * piece), np.float32)
    for start in range(0, len(audio), piece):
        part = np.fft.rfft(audio[start:start + piece].T, 2 * piece)
        out[:, start:start + 2 * piece] += np.fft.irfft(part * spectrum)
    return out[:, :len(audio)].T


def render(piece, soundfont):
    """-> int16 (samples, 2)"""
    synth = Synth(soundfont)    # a new one: attacks vary with what a synthesizer has played
    mix = np.zeros((piece.frames * HOP, 2), np.float32)
    for part in piece.parts:
        stem = synth.play(part, piece.frames)
        balance = np.array([min(1, 1 - part.pan), min(1, 1 + part.pan)], np.float32)
        mix += stem * balance * (10 ** (part.level / 20) / sounding_rms(stem))
    synth.close()
    if piece.wet:
        mix += piece.wet * convolve(mix, room_response(piece.room))
    mix *= 10 ** (piece.loudness / 20) / max(1e-9, np.sqrt(np.square(mix).mean()))
    over = np.abs(mix) > 0.7                                # what is louder is bent towards 0.99
    mix[over] = np.sign(mix[over]) * (0.7 + 0.29 * np.tanh((np.abs(mix[over]) - 0.7) / 0.29))
    return np.round(32767 * mix).astype(np.int16)


# ---------------------------------------------------------------------------------------- prompts
def prompt(labels, rng=None):
    """A row of metadata.csv -> "boom bap, drums, upright bass, electric piano, flute, C minor, 92 bpm".

    With rng as people write it: in another order, in other words."""
    bpm = round(float(labels["bpm"]))
    names = [labels["genre"], *labels["instruments"].split(";")]
    if rng is None:
        return ", ".join([*names, labels["key"], f"{bpm} bpm"])
    names = [rng.choice(SYNONYMS.get(name, (name,))) if rng.random() < 0.3 else name for name in names]
    key = rng.choice((labels["key"], labels["key"], f"in {labels['key']}"))
    speed = "slow" if bpm < 85 else "medium" if bpm < 115 else "fast"
    tempo = rng.choice((f"{bpm} bpm", f"{bpm} bpm", f"{bpm}bpm", f"at {bpm} bpm", speed))
    parts = [*names, key, tempo]
    if rng.random() < 0.5:
        rng.shuffle(parts)
    return ", ".join(parts)


def vocabulary():
    """Every word that `prompt` can write, lower case, sorted. "c#" is one word."""
    phrases = [*GENRES, *INSTRUMENTS, "drums", *(key.name for key in KEYS), "in at slow medium fast bpm"]
    phrases += [other for others in SYNONYMS.values() for other in others]
    for beat in {beat for genre in GENRES.values() for beat in genre.beats}:
        bpm = round(60 * RATE / (HOP * beat))
        phrases += [f"{bpm}", f"{bpm}bpm"]
    return sorted({word.lower() for phrase in phrases for word in phrase.split()})


# ---------------------------------------------------------------------------------------- command line
def make_piece(args, side, index):
    """-> (Piece, its row of metadata.csv). The file's name holds a checksum: other music, another name."""
    rng = random.Random(f"{args.seed} {side} {index}")
    if args.kind == "music":
        name = args.genres[index % len(args.genres)]
        piece = compose(rng, name, [key for key in KEYS if args.keys == "all" or key.name in FEW])
        text = prompt(piece.labels, rng if side == "train" else None)
    else:
        name = text = "random notes"
        piece = random_notes(rng)
    checksum = zlib.crc32(repr((piece, Path(args.soundfont).name)).encode())
    file = f"{side}/{index:05d}_{name.replace(' ', '_')}_{checksum:08x}.flac"
    return piece, {"file_name": file, "text": text, **piece.labels}


def plan(args):
    """-> [(side, index, row)], the held-out pieces first. No other piece has the labels of one of those."""
    planned = [("validation", index, make_piece(args, "validation", index)[1]) for index in range(HELD_OUT)]
    held_out = {prompt(row) for _, _, row in planned if args.kind == "music"}
    wanted = 3600 * args.hours * RATE / HOP                 # frames
    for index in count():
        if wanted <= 0:
            return planned
        piece, row = make_piece(args, "train", index)
        if args.kind == "notes" or prompt(row) not in held_out:
            planned.append(("train", index, row))
            wanted -= piece.frames


def write_piece(job):
    piece, row = make_piece(*job)
    audio = render(piece, job[0].soundfont)
    path = Path(job[0].out, row["file_name"])
    try:
        write_whole(path, lambda file: soundfile.write(file, audio, RATE, format="FLAC", subtype="PCM_16"))
    except (OSError, soundfile.LibsndfileError) as error:   # a full disk
        raise UserError(f"cannot write {path}: {error}") from None


def main():
    p = argparse.ArgumentParser(description="Compose and render labelled music.", allow_abbrev=False)
    p.add_argument("out", help="folder to write train/, validation/ and metadata.csv to")
    p.add_argument("--hours", type=positive_finite, default=24, help=f"besides {HELD_OUT} held-out pieces")
    p.add_argument("--kind", choices=("music", "notes"), default="music", help="notes: for the autoencoder")
    p.add_argument("--genres", default=",".join(GENRES), help="names with commas between them")
    p.add_argument("--keys", choices=("few", "all"), default="all", help="few: eight keys of six signatures")
    p.add_argument("--seed", type=random_seed, default=0)
    p.add_argument("--workers", type=whole, default=2)
    p.add_argument("--soundfont", default="/usr/share/sounds/sf2/FluidR3_GM.sf2")
    args = p.parse_args()
    args.genres = [name.strip() for name in args.genres.split(",")]
    for name in args.genres:
        if name not in GENRES:
            raise UserError(f"--genres {name}: there are {', '.join(GENRES)}")
    out = Path(args.out)
    table = writable(out / "metadata.csv")
    Synth(args.soundfont).close()                           # what is missing is said before any work is done
    planned = plan(args)
    strange = {file.relative_to(out).as_posix() for file in out.glob("*/*.flac")}
    strange -= {row["file_name"] for _, _, row in planned}
    if strange:
        raise UserError(f"{out} holds pieces made with other options ({min(strange)}): name another folder")
    for side in ("train", "validation"):
        (out / side).mkdir(parents=True, exist_ok=True)
    with open(table, "w", newline="") as file:                # first: one can train on what is there already
        writer = csv.DictWriter(file, list(planned[0][2]))
        writer.writeheader()
        writer.writerows(row for _, _, row in planned)
    jobs = [(args, side, index) for side, index, row in planned if not (out / row["file_name"]).exists()]
    with Pool(args.workers, leave_signals) as pool:
        for _ in tqdm(pool.imap_unordered(write_piece, jobs), total=len(jobs), unit="piece"):
            pass
    say(f"{len(planned)} pieces in {out}, {len(jobs)} of them new")


if __name__ == "__main__":
    run(main)
