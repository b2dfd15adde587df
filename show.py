"""A set that is played for listeners: kept on a tape, at the pace of a clock, stopped and started.

One thread makes the music and lays it on the `Tape`; `Show` keeps it a little ahead of the clock. All others
only read the tape or say a line. Everything is counted in samples from the start of the set, so whoever was
cut off asks for the sample that was next, and all listeners hear the same. """
import io
import tempfile
import threading
import time

import numpy as np

from audio import WavWriter, decoder_margin, pcm
from common import UserError, reason_of, say
from grammar import parse_line
from stage import Fade

FRAME = 4                                                   # bytes of a sample: int16, left and right
KEPT = 120                                                  # seconds that a listener may fall behind


class Tape:
    """The set so far, int16 stereo: its last minutes in memory, all of it in a temporary file."""

    def __init__(self, rate, seconds=KEPT):
        self.rate = rate
        self.ring = np.zeros((round(rate * seconds), 2), "<i2")
        self.end = 0                                        # samples so far
        self.more = threading.Condition()
        self.file = tempfile.TemporaryFile()
        self.recorded = 0                                   # samples in the file
        self.full = False                                   # is there no room for more in the file?

    def append(self, samples):                              # int16 (n, 2)
        with self.more:
            self.ring[np.arange(self.end, self.end + len(samples)) % len(self.ring)] = samples
            self.end += len(samples)
            try:
                if not self.full:
                    self.file.seek(FRAME * self.recorded)
                    self.file.write(samples.astype("<i2").tobytes())
                    self.file.flush()
                    self.recorded += len(samples)
            except OSError as error:    # the music goes on
                self.full = True
                say(f"the recording ends after {self.recorded / self.rate:.1f} s: {reason_of(error)}")
            self.more.notify_all()

    def read(self, first, count):
        """Up to `count` samples from `first` on, or from the oldest one kept: (its position, bytes)."""
        with self.more:
            first = max(first, self.end - len(self.ring), 0)
            begin = first % len(self.ring)
            end = begin + max(0, min(self.end - first, count))
            return first, self.ring[begin:end].tobytes() + self.ring[:max(0, end - len(self.ring))].tobytes()

    def wav(self):
        """The set so far as a WAV: its size in bytes, and an iterator of its pieces."""
        header = io.BytesIO()
        recorded = self.recorded
        WavWriter(header, self.rate, 2, recorded)
        size = FRAME * recorded

        def pieces():
            yield header.getvalue()
            for start in range(0, size, 2 ** 16):
                with self.more:
                    self.file.seek(start)
                    piece = self.file.read(min(2 ** 16, size - start))
                yield piece
        return len(header.getvalue()) + size, pieces()


class Show:
    """The set while it is played: its tape, the listeners' clock, and commands.

    The clock (`stage.Pace`) runs in real time from the first piece on, and never beyond what was made: while
    the set rests it stands, and when a piece comes too late all listeners hear a gap."""

    def __init__(self, pace, files=True):
        """files: may a line name a file of this machine (/sketch)?"""
        self.pace = pace
        self.files = files
        self.tape = Tape(pace.rate)
        self.control = None                                 # live.Control
        self.settings = {}                                  # steps, cfg: as they were at first
        self.going = threading.Event()                      # cleared: stop after the next piece
        self.going.set()
        self.resting = False                                # will nothing come until /start?
        self.over = False                                   # will nothing come any more?

    def due(self):
        """The sample that listeners hear now."""
        return round(self.pace.heard() * self.pace.rate)

    def block_samples(self):
        return round(self.control.block_seconds * self.pace.rate)

    def say(self, text, files=None):
        """Take a line of grammar.py, or /start: the reply, and the sample from which it holds, or None.
        files: may it name one (None: as all lines)? Raises UserError."""
        word = text.strip().lower()
        if self.over:
            raise UserError("the set is over: start page.py again")
        if word == "/start":
            self.going.set()
            self.resting = False                            # whoever asks for audio now may wait for it
            return "going on", None
        if word == "/stop":                                 # "@20 /stop" is the control's: the end for good
            self.going.clear()
            return "stopping: one more block, which fades out", None
        may = self.files if files is None else files
        if not may and text.strip() not in self.control.names and names_file(text):
            raise UserError("files can be named only where nobody else reaches the page")
        before = time.perf_counter()
        answer = self.control.say(text)
        blocks = [one.block for one in list(self.control.said) if one.wall >= before]
        return answer, blocks[-1] * self.block_samples() if blocks else None

    def state(self):
        """Plain values for the page."""
        c = self.control.model.config
        words = self.control.model.sampling.get("words", ())
        keys = [f"{note.upper()} {mode}" for note in "cdefgab" for mode in ("major", "minor")
                if note in words and mode in words]
        promise = self.pace.lead + self.control.block_seconds + decoder_margin(c) / c.frame_rate
        return {**self.settings, **self.control.status(), "rate": self.pace.rate, "end": self.tape.end,
                "due": self.due(), "reserve": self.pace.lead / 2, "promise": promise, "keys": keys,
                "playing": self.going.is_set(), "over": self.over, "late": len(self.pace.late)}

    def play(self, pieces, stopping):
        """Lay audio (1, 2, n) on the tape, the next piece when all but the lead of the last one was heard.

        stopping: an Event that ends the set, with a piece that fades out."""
        begins = False
        for audio in pieces:
            position = self.pace.position
            end = position + audio.shape[-1]
            if begins:
                audio = Fade(end, position).of(audio, position)         # from its end backwards: a rise
                anew = self.pace.now() - (position - self.pace.first) / self.pace.rate
                self.pace.began = max(self.pace.began, anew)            # the fade may still be heard
            stops = stopping.is_set() or not self.going.is_set()
            if stops:
                audio = Fade(position, end).of(audio, position)
            last = self.control.end                         # number of a block: /stop at a time
            if last is not None:
                fade = Fade(last * self.block_samples(), (last + 1) * self.block_samples())
                audio = fade.of(audio, position)
            self.add(pcm(audio), begins)
            if stopping.is_set() or last is not None and end >= fade.end:
                break
            if stops:
                self.rest(stopping)
                if stopping.is_set():
                    break
            begins = stops
            self.pace.wait(0)
            self.pace.work_since = self.pace.now()
        else:
            stopping.set()                                  # --seconds are over
        self.over = True
        self.going.clear()
        self.rest(stopping)

    def add(self, samples, begins=False):
        """begins: the first ones after a rest, which cannot be late."""
        late = None if begins else self.pace.arrived()
        self.tape.append(samples)
        with self.control.lock:
            lines = self.pace.hand_out(len(samples), self.control.said, self.block_samples())
        for line in [late, *lines] if late else lines:
            say(line)

    def rest(self, stopping):
        """Wait until all that was made is heard, and for /start or the end."""
        with self.tape.more:
            self.resting = True
            self.tape.more.notify_all()                     # listeners: no more will come
        while not self.going.is_set() and self.due() < self.tape.end:
            time.sleep(0.01)
        while not (self.going.wait(0.1) or stopping.is_set()):
            pass
        self.resting = self.over


def names_file(text):
    """Does a line have a file read? Raises UserError."""
    line = parse_line(text)
    return line.sets("sketch") and line.command.value is not None
