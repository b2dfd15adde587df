import csv
import random
import re
import sys

import numpy as np
import pytest
import soundfile

import band
from common import UserError


# ------------------------------------------------------------------------------------------------ band.py
SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
QUALITIES = {"": (0, 4, 7), "m": (0, 3, 7), "dim": (0, 3, 6), "7": (0, 4, 7, 10), "maj7": (0, 4, 7, 11), "m7": (0, 3, 7, 10),
             "m7b5": (0, 3, 6, 10)}


def pitch_classes(symbol):
    """Chord symbol, as "Bbm7" -> its pitch classes, the root first."""
    letter, accidental, quality = re.fullmatch(r"([A-G])([#b]?)(.*)", symbol).groups()
    root = SEMITONES[letter] + {"": 0, "#": 1, "b": -1}[accidental]
    return [(root + interval) % 12 for interval in QUALITIES[quality]]


def scale_of(key):
    tonic, mode = key.split()
    scale = band.SCALES[mode] + ((11,) if mode == "minor" else ())      # the dominant's leading tone
    return {(pitch_classes(tonic)[0] + s) % 12 for s in scale}


def pieces(count=66):
    """Pieces of all genres, with {role: part}."""
    for seed in range(count):
        piece = band.compose(random.Random(seed), list(band.GENRES)[seed % len(band.GENRES)], band.KEYS)
        roles = [role for role in band.ROLES if role[0] in piece.labels["playing"]]
        yield piece, dict(zip(roles, piece.parts, strict=True))


def test_patterns_of_the_genres():
    for genre in band.GENRES.values():
        assert set(genre.progressions) == {"major", "minor"} and set(genre.drums) <= set(band.DRUMS)
        tables = {"xog": genre.drums, "r358n": genre.bass, "xp012345": genre.chords, "x": genre.lead}
        for letters, table in tables.items():
            for names, pattern in table.items():
                assert table is genre.drums or set(names.split(", ")) <= set(band.INSTRUMENTS)
                for line in pattern.split():
                    assert len(line) in ((32,) if table is genre.lead else (16, 32)) and set(line) <= set(letters + ".-"), line
        assert all(len(fill) == 16 and set(fill) <= {".", *band.FILL} for fill in genre.fill.split())
        assert bool(genre.fill) == bool(genre.drums) == bool(genre.kits)
        assert all(len(set(progressions)) > 1 for progressions in genre.progressions.values())


def test_chords_by_hand():
    def symbols(progression, name, sevenths=False):
        key = next(key for key in band.KEYS if key.name == name)
        return " ".join(band.make_chord(numeral, key, sevenths).symbol for numeral in progression.split())
    assert symbols("i VI III VII", "A minor") == "Am F C G"
    assert symbols("i iv V iio", "G minor") == "Gm Cm D Adim"
    assert symbols("I ii V vi", "C major", True) == "Cmaj7 Dm7 G7 Am7"
    assert symbols("iio V i VII", "D minor", True) == "Em7b5 A7 Dm7 C7"
    assert symbols("IV", "Bb major") == "Eb" and symbols("VI", "C# minor") == "A" and symbols("iii", "F# major") == "A#m"
    minor = next(key for key in band.KEYS if key.name == "A minor")
    assert [p % 12 for p in band.make_chord("V", minor, False).scale] == [9, 11, 0, 2, 4, 5, 8]     # G sharp


def test_notes_of_a_pattern():
    assert band.hits("x--.g.x-........", 5) == [(0, 3, "x"), (4, 1, "g"), (6, 2, "x")]
    assert band.hits("r---------------....5-----......", 1) == [(4, 6, "5")] and band.hits("x" + "." * 31, 1) == []


def test_pieces_lie_on_the_grid_of_latent_frames():
    for piece, parts in pieces():
        labels = piece.labels
        beat, genre = labels["beat_frames"], band.GENRES[labels["genre"]]
        assert beat in (40, 36, 32, 28, 24, 20, 16) and labels["beats_per_bar"] == 4 and labels["first_beat"] == 0
        assert labels["bpm"] * beat * band.HOP == pytest.approx(60 * band.RATE)
        assert piece.frames == labels["bars"] * 4 * beat and abs(piece.frames * band.HOP / band.RATE - 48) < 2
        starts = {note.start for part in parts.values() for note in part.notes}
        assert all(isinstance(start, int) and 0 <= start < piece.frames for start in starts)
        assert any(start % beat == 0 for start in starts)
        if genre.swing == band.STRAIGHT:
            assert all(start % (beat // 4) == 0 for start in starts)
        else:
            assert any(start % beat and 4 * (start % beat) % beat for start in starts)
        ends = [note.start + note.length for part in parts.values() for note in part.notes]
        assert max(ends) < piece.frames


def test_labels_say_what_is_played():
    seen = set()
    for piece, parts in pieces():
        labels, bar_frames = piece.labels, 4 * piece.labels["beat_frames"]
        chords, playing = labels["chords"].split(), labels["playing"].split()
        names = labels["instruments"].split(";")
        assert len(chords) == len(playing) == labels["bars"] and len(set(chords)) > 2
        assert len(set(playing)) > 1 or len(names) == 1     # instruments enter and leave
        for name, (role, part) in zip(names, parts.items(), strict=True):
            assert part.drums == (role == "drums") == (name == "drums") and (part.drums or part.program == band.INSTRUMENTS[name])
            bars = {note.start // bar_frames for note in part.notes}
            written = {number for number, letters in enumerate(playing) if role[0] in letters}
            assert bars <= written and (role == "lead" or len(written - bars) == 0), (role, labels)
            for note in part.notes:
                number = note.start // bar_frames
                if role == "chords":
                    assert note.pitch % 12 in pitch_classes(chords[number])
                elif not part.drums:
                    assert note.pitch % 12 in scale_of(labels["key"]) and 24 <= note.pitch <= 103
            if role == "bass":
                roots = [note.pitch % 12 == pitch_classes(chords[note.start // bar_frames])[0] for note in part.notes]
                assert np.mean(roots) > 0.2
        seen |= {labels["genre"], *names, labels["key"].split()[1]}
    assert {*band.GENRES, "drums", "major", "minor"} <= seen and len(seen) > 35


def test_fills_and_crashes():
    chord = band.make_chord("I", band.KEYS[0], False)
    drums = {"hat": "o.o.o.o.o.o.o.o."}
    bar = band.Bar(2, 40, band.STRAIGHT, chord, chord, True, "..........s.hm.l")
    played = [(note.start - 320, note.pitch, note.velocity) for note in band.play_drums(bar, drums)]
    hats = [(step * 10, band.DRUMS["hat"], 82) for step in range(0, 10, 2)]           # they pause from the fill's start on
    fill = [(100, 38, 82), (120, 50, 82), (130, 47, 82), (150, 45, 82)]
    assert sorted(played) == sorted([*hats, *fill, (0, band.DRUMS["crash"], 82)])
    assert len(band.play_drums(bar._replace(crash=False, fill=""), drums)) == 8
    for piece, parts in pieces(44):
        section = 8 if piece.labels["bars"] > 16 else 4
        bar_frames = 4 * piece.labels["beat_frames"]
        crashes = {note.start for note in parts["drums"].notes if note.pitch == 49} if "drums" in parts else set()
        assert crashes <= {number * bar_frames for number in range(section, piece.labels["bars"], section)}


def test_prompts_keep_to_the_vocabulary():
    words = band.vocabulary()
    assert len(words) == len(set(words)) < 125 and {"c#", "bb", "rhodes", "92bpm", "161", "bpm"} <= set(words)
    piece = next(piece for piece, _ in pieces() if piece.labels["genre"] == "boom bap")
    row = {name: str(value) for name, value in piece.labels.items()}                # as read from metadata.csv
    row["instruments"] = "drums;upright bass;electric piano;flute"
    row.update(key="C minor", bpm=str(60 * 44100 / (28 * 1024)))
    assert band.prompt(row) == "boom bap, drums, upright bass, electric piano, flute, C minor, 92 bpm"
    written = [band.prompt(row, random.Random(seed)) for seed in range(300)]
    assert len(set(written)) > 150 and any("rhodes" in text for text in written) and all(written)
    assert any(not text.startswith("boom bap") for text in written) and any("92" not in text for text in written)
    for piece, _ in pieces():
        for text in (band.prompt(piece.labels), band.prompt(piece.labels, random.Random(1)), band.prompt(piece.labels, random.Random(2))):
            found = text.lower().replace(",", " ").split()
            assert set(found) <= set(words) and 0 < len(found) <= 16


def test_keys_have_six_signatures_or_more():
    few = [key for key in band.KEYS if key.name in band.FEW]
    assert len(few) == len(band.FEW) and {key.mode for key in few} == {"major", "minor"} and len(band.KEYS) == 24
    assert len({(key.tonic + (3 if key.mode == "minor" else 0)) % 12 for key in few}) >= 6
    assert all(pitch_classes(key.name.split()[0])[0] == key.tonic for key in band.KEYS)


def test_random_notes():
    piece = band.random_notes(random.Random(0))
    notes = [note for part in piece.parts for note in part.notes]
    assert any(note.start % 1 for note in notes) and all((note.start * band.HOP) % band.PERIOD == 0 for note in notes)
    assert len({note.velocity for note in notes}) > 20 and all(0 <= note.start < piece.frames for note in notes)


def band_arguments(out, **changes):
    values = dict(out=str(out), seed=0, kind="music", genres=["techno", "house"], keys="few", hours=0.1, soundfont="a.sf2", **changes)
    return type("Arguments", (), values)


def test_plan_holds_prompts_out_and_is_the_same_again(tmp_path):
    args = band_arguments(tmp_path)
    planned = band.plan(args)
    rows = [row for _, _, row in planned]
    assert planned == band.plan(args) and len({row["file_name"] for row in rows}) == len(rows)
    sides = [{row["text"] for side, _, row in planned if side == wanted} for wanted in ("train", "validation")]
    assert not sides[0] & sides[1] and {row["genre"] for row in rows} == {"techno", "house"}
    assert {row["key"] for row in rows} <= set(band.FEW)
    seconds = sum(row["bars"] * 4 * row["beat_frames"] * band.HOP / band.RATE for side, _, row in planned if side == "train")
    assert 360 <= seconds < 410
    args.seed = 1
    assert not {row["file_name"] for row in rows} & {row["file_name"] for _, _, row in band.plan(args)}


def test_band_names_what_is_wrong(tmp_path, monkeypatch):
    def main(*words):
        monkeypatch.setattr(sys, "argv", ["band.py", str(tmp_path / "out"), *words])
        band.main()
    with pytest.raises(UserError, match="--genres polka"):
        main("--genres", "house,polka")
    with pytest.raises(UserError, match="fluidsynth|soundfont"):
        main("--soundfont", str(tmp_path / "missing.sf2"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(band.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(UserError, match="apt-get install fluidsynth"):
        main()


@pytest.fixture
def soundfont():
    path = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
    try:
        band.Synth(path).close()
    except UserError as error:
        pytest.skip(str(error))
    return path


def test_notes_begin_with_their_frame_and_sound_the_same_wherever_they_are(soundfont):
    starts = [3, 203, 507]
    synth = band.Synth(soundfont)
    for program, drums in ((12, False), (0, True)):
        part = band.Part(program, drums, [band.Note(start, 20, 60 if not drums else 37, 108) for start in starts], 0, 0)
        audio = synth.play(part, 700)
        sounds = [audio[start * band.HOP:start * band.HOP + 100 * band.HOP] for start in starts]
        assert np.abs(sounds[0]).max() > 1e-3 and all(np.abs(s - sounds[0])[band.PERIOD:].max() < 1e-3 for s in sounds)
        heard = np.flatnonzero(np.abs(audio).max(1) > 0.02 * np.abs(audio).max())[0]
        assert 3 * band.HOP <= heard < 3 * band.HOP + 3 * band.PERIOD
    held = band.Part(48, False, [band.Note(0, 500, 60, 108)], 0, 0)
    assert synth.play(held, 20)[-1].any() and not synth.play(held._replace(notes=[]), 3).any()      # nothing rings on
    synth.close()


def test_rendered_pieces_are_loud_enough_and_never_clip(soundfont, monkeypatch):
    monkeypatch.setattr(band, "SECONDS", 9)
    piece = band.compose(random.Random(2), "rock", band.KEYS)
    audio = band.render(piece, soundfont).astype(np.float32) / 32768
    assert audio.shape == (piece.frames * band.HOP, 2) and np.abs(audio).max() < 0.995
    assert -21 < 20 * np.log10(np.sqrt(np.square(audio).mean())) < -19
    assert np.abs(audio[:, 0] - audio[:, 1]).max() > 0.01                            # stereo
    np.testing.assert_array_equal(band.render(piece, soundfont), (audio * 32768).astype(np.int16))


def test_the_room_is_a_convolution():
    audio = np.random.default_rng(0).standard_normal((150000, 2)).astype(np.float32)
    response = band.room_response(0.02)[441:481]
    expected = np.stack([np.convolve(audio[:, i], response[:, i])[:len(audio)] for i in (0, 1)], 1)
    np.testing.assert_allclose(band.convolve(audio, response), expected, atol=1e-4)
    np.testing.assert_allclose(np.square(band.room_response(0.4)).sum(0), 1, rtol=1e-4)


def test_a_run_goes_on_where_it_stopped(soundfont, tmp_path, monkeypatch):
    monkeypatch.setattr(band, "SECONDS", 4)
    monkeypatch.setattr(band, "HELD_OUT", 1)
    out = tmp_path / "out"

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["band.py", str(out), "--hours", "0.001", "--workers", "1", "--genres", "arpeggios", *words])
        band.main()
    main()
    files = sorted(out.glob("*/*.flac"))
    rows = list(csv.DictReader(open(out / "metadata.csv")))
    assert sorted(row["file_name"] for row in rows) == [f.relative_to(out).as_posix() for f in files] and len(files) >= 2
    for row in rows:
        info = soundfile.info(out / row["file_name"])
        assert (info.samplerate, info.channels) == (44100, 2)
        assert info.frames == int(row["bars"]) * int(row["beats_per_bar"]) * int(row["beat_frames"]) * band.HOP
        assert band.prompt(row) == row["text"]
    first = files[0].read_bytes()
    files[0].unlink()
    files[1].write_bytes(b"kept")
    main()
    assert files[0].read_bytes() == first and files[1].read_bytes() == b"kept"
    with pytest.raises(UserError, match="other options"):
        main("--seed", "1")
