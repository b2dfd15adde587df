"""What is played when: prompts and settings over the time of one stream.

The lines that say so are those of grammar.py. `Control` takes them from any thread and tells `sample.stream`
before each block what has changed. """
import math
import re
import threading
import time
from collections import deque
from functools import partial
from typing import NamedTuple

from common import FASTEST, SLOWEST, UserError, say
from controls import BEATS_A_BAR, chord_channels, given_of, takes_tempo
from grammar import Line, Mix, Setting, clock_of, parse_line, wrong
from model import Cond, words_of

TEMPO = re.compile(r"(?<![\d.])(\d+\.?\d*) ?bpm\b", re.IGNORECASE)
CHORDS_UNTIL = 0.3                                          # written chords have no timbre: the model adds it


# -------------------------------------------------------------------------------- prompts to conditions
def words_read(model, prompt):
    """What the model's text encoder can use of a prompt, and a line about the rest, "" where there is none.

    Words that the checkpoint never met, whose vectors are still random and make fewer, softer notes, are left
    out, and so are words beyond the number that the encoder reads."""
    if not model.conditioner.text_encoder.trains:           # T5 knows all words
        return prompt, ""
    words = words_of(prompt)
    known = model.sampling.get("words") or words
    most = model.config.text_tokens
    kept = [word for word in words if word in known]
    unknown = [word for word in words if word not in known]
    notes = []
    if unknown:
        notes.append(f"words that this model has not learned are left out: {', '.join(unknown)}")
    if kept[most:]:
        notes.append(f"words beyond the {most} that it reads are left out: {', '.join(kept[most:])}")
    return prompt if kept[:most] == words else " ".join(kept[:most]), "; ".join(notes)


def known_words(model, prompt):
    """The prompt without what its text encoder cannot use, which is named on standard error."""
    kept, note = words_read(model, prompt)
    if note:
        say(note)
    return kept


def prompt_encoder(model, prompt_file=None, numbers=None):
    """A function from a prompt to its Cond, which raises UserError, and the prompts that it is limited to.

    prompt_file: embeddings written by stable_audio_port.py --prompts; None: the model's own text encoder, and
    () for all prompts. numbers: for the conditioner; None: those of a stream."""
    numbers = model.config.stream_numbers if numbers is None else numbers
    if prompt_file is None:
        return partial(encoded_words, model, numbers), ()
    from stable_audio_port import load_prompts
    names, embeddings = load_prompts(prompt_file)
    if embeddings.shape[-1] != model.config.cond_width:
        raise UserError(f"{prompt_file} holds embeddings {embeddings.shape[-1]} wide, this checkpoint takes "
                        f"{model.config.cond_width}: they are another model's (--ckpt)")
    device = next(model.parameters()).device

    def stored(prompt):
        if prompt not in names:
            raise UserError(f"{prompt_file} holds no embedding of {prompt!r}; "
                            f"it holds: {'; '.join(names[:5])}")
        row = names.index(prompt)
        return model.conditioner(embeddings[row:row + 1].float().to(device), **numbers)
    return stored, tuple(names)


def encoded_words(model, numbers, prompt):
    """The Cond of a prompt through the model's own text encoder. Raises UserError where it knows no word."""
    kept, _ = words_read(model, prompt)
    reads_words = model.conditioner.text_encoder.trains
    if prompt.strip() and (not kept or reads_words and not words_of(kept)):
        learned = sorted(model.sampling.get("words", []), key=lambda word: (word[0].isdigit(), word))
        words = ", ".join(learned[:100]) or "words and numbers"
        raise UserError(f"no word of the prompt {prompt!r} is known to this model; it knows {words}")
    return model.conditioner([kept], **numbers)


def tempo_named(prompt):
    """"house, A minor, 129 bpm" -> 129.0; None where the prompt names no tempo."""
    found = TEMPO.search(prompt)
    return float(found[1]) if found and SLOWEST <= float(found[1]) <= FASTEST else None


# -------------------------------------------------------------------------------- what each block plays
class Turn(NamedTuple):
    """What changes with the block that is about to be made.

    cond: a new one, or None; turned: has the heaviest prompt changed, so that the past is to be read again
    under the new one?; settings: of steps, cfg and forget those that have changed; gradual: in the middle of
    a morph."""
    cond: Cond = None
    turned: bool = False
    settings: dict = {}
    gradual: bool = False


class Said(NamedTuple):
    """A line that was said while the stream ran, for measuring how soon it is heard.

    block: the first that obeys; wall: when it was said, by time.perf_counter(); heard: the second of the
    stream that the listener was at; planned: it was said with a time."""
    text: str
    block: int
    wall: float
    heard: float
    planned: bool = False


class Control:
    """Prompts and settings over the time of one stream. Every method may be called from any thread.

        control = Control(model, encode, "slow piano", ["@20 fast piano ~ 4"])
        stream(model, control.cond, change=control.change, beat=control.beat, sketch=control.sketch)
        control.say("house:0.7 + reggae:0.3")               # by a performer, while it plays

    `say` is for performers, `status` and `plan` for displays. The stream calls `change`, `beat` and `sketch`
    before each block, in its own thread and with rising numbers."""

    def __init__(self, model, encode, prompt, schedule=(), names=(), clock=None, open_sketch=None):
        """encode: prompt -> Cond; prompt: text of the grammar, what is played first; schedule: texts, or
        Lines; names: prompts that are taken as they stand, whatever signs they hold; clock: a function that
        gives the second of the stream that the listener is at; open_sketch: file -> iterator of a sketch's
        channels, block by block (`stage.open_sketch`). Raises UserError."""
        c = model.config
        self.model = model
        self.encode = encode
        self.names = frozenset(names)
        self.clock = clock
        self.open_sketch = open_sketch
        self.lock = threading.RLock()
        self.block_seconds = c.block / c.frame_rate
        self.number = 0                                     # of the next block to be begun
        self.planned = []                                   # (block, Line, what it needs), in order
        self.said = deque(maxlen=256)                       # Said, until whoever measures takes them
        self.states = deque(maxlen=16)                      # the last ones that `state` gave
        self.settings = {}                                  # cfg, steps, forget: as far as they were set
        self.bpm = None
        self.beat_from = (0, 0.0)                           # a block, and the bars before it began
        self.chords = None
        self.sketched = None                                # OpenSketch
        self.end = None                                     # number of the block that fades out
        line = self.read(prompt)
        if not isinstance(line.command, Mix) or line.time is not None or line.command.seconds:
            raise UserError(f"a prompt was expected first, without a time or a morph, not {prompt!r}")
        self.conds = {}                                     # of the prompts that are played: prompt -> Cond
        self.conds, remark = self.prepare(line)
        self.remarks = [remark] if remark else []           # on the first prompt and the schedule
        self.origin = self.target = line.command.weights    # the mix before a morph, and after it
        self.morph = (0.0, 0.0)                             # where it begins, and how long it takes: seconds
        self.heaviest = heaviest(self.target, None)
        self.keep_named_tempo(0)
        self.cond = self.mixed(self.target)                 # of the first block
        self.told = dict(self.target)                       # the mix that the stream was told last
        for line in schedule:
            reply = self.add(self.read(line) if isinstance(line, str) else line)
            if "left out" in reply:
                self.remarks.append(reply)

    # --- for performers and displays
    def say(self, text):
        """Take a line: a reply of one line. Raises UserError, and then nothing has changed.

        Without @TIME, or with one that is over, it holds from the next block that is begun."""
        if not text.strip():
            raise wrong(0, "a prompt or a /command was expected")
        return self.add(self.read(text), said=True)

    @property
    def time(self):
        """The second of the stream at which the next block begins."""
        return self.number * self.block_seconds

    @property
    def plan(self):
        """What is still to come: [(second of the stream, text)]."""
        with self.lock:
            return [(block * self.block_seconds, line.text) for block, line, _ in self.planned]

    def status(self):
        """What is played now, as plain values for a display."""
        with self.lock:
            c = self.model.config
            sketch = self.sketched and [self.sketched.file, self.sketched.what, self.sketched.until]
            return dict(time=self.time, heard=self.clock() if self.clock else self.time,
                        block_seconds=self.block_seconds, mix=self.mix_at(self.time), bpm=self.bpm,
                        chords=list(self.chords or ()), sketch=sketch, plan=self.plan, **self.settings,
                        words=list(self.model.sampling.get("words", ())), has_beat=c.beats,
                        has_pitch=c.pitch_channels > 0, has_level=c.level_channels > 0,
                        stopping=self.end is not None)

    def playing(self):
        """The mix that is being gone to with the next block, in words."""
        with self.lock:
            due = [line.command for block, line, _ in self.planned
                   if block <= self.number and isinstance(line.command, Mix)]
            return self.mix_in_words(due[-1] if due else Mix(self.target, 0.0))

    # --- for the stream
    def change(self, number):
        """Turn, or None: what changes with block `number`, which is begun now."""
        with self.lock:
            self.number = number + 1
            before = dict(self.settings)
            while self.planned and self.planned[0][0] <= number:
                _, line, needs = self.planned.pop(0)
                self.apply(line.command, number, needs)
            new = {name: value for name, value in self.settings.items() if before.get(name) != value}
            middle = (number + 0.5) * self.block_seconds
            begins, takes = self.morph
            mix = self.mix_at(middle)
            turned = heaviest(mix, self.heaviest) != self.heaviest
            self.heaviest = heaviest(mix, self.heaviest)
            if mix == self.told and not new:
                return None
            cond = None if mix == self.told else self.mixed(mix)
            self.told = mix
            return Turn(cond, turned and number > 0, new, gradual=middle < begins + takes)

    def bars(self, number):
        """Bars before block `number`, or None where no tempo is set."""
        if self.bpm is None:
            return None
        block, bars = self.beat_from
        return bars + (number - block) * (self.block_seconds * self.bpm / 60 / BEATS_A_BAR)

    def beat(self, number):
        """Tempo in bpm and place in the bar, in [0, 1), at which block `number` begins; or None."""
        with self.lock:
            bars = self.bars(number)
            return None if bars is None else (self.bpm, bars % 1)

    def sketch(self, number):
        """`controls.Given` of block `number`, or None."""
        with self.lock:
            chords, sketched = self.chords, self.sketched
            bars = self.bars(number)
        if chords is None and sketched is None:
            return None
        given = []
        if chords is not None and bars is not None:
            given.append((chord_channels(self.model, chords, self.bpm, bars), "pitch", CHORDS_UNTIL))
        if sketched is not None:
            try:
                channels = next(sketched.blocks, None)      # waits, where the recording is still being made
            except UserError as error:                      # the music goes on
                say(error)
                channels = None
            if channels is None:
                with self.lock:
                    self.sketched = None
            else:
                given.append((channels, sketched.what, sketched.until))
        return given_of(self.model, given) if given else None

    def ends_sketch(self):
        """Has somebody just given up the recording that is followed, so that it is not worth waiting for?"""
        with self.lock:
            return any(line.time is None and line.sets("sketch", "stop") for _, line, _ in self.planned)

    # --- inside
    def read(self, text):
        """Text -> Line; a prompt that stands in a --prompt-file, or an empty one, is taken as it is."""
        if text.strip() in self.names or not text.strip():
            return Line(None, Mix({text.strip(): 1.0}, 0.0), text.strip())
        return parse_line(text)

    def prepare(self, line):
        """Get what a line needs, before it is due: its prompts' conditions, its open recording.

        Returns (what `apply` needs, what to remark). Raises UserError where the model cannot do it."""
        c = self.model.config
        command = line.command
        if isinstance(command, Mix):
            conds = self.conds                              # another thread may replace it meanwhile
            conds = {prompt: conds[prompt] if prompt in conds else self.encode(prompt)
                     for prompt in command.weights}
            notes = [words_read(self.model, prompt)[1] for prompt in command.weights if not self.names]
            return conds, "; ".join(note for note in notes if note)
        if command.value is None:
            return None, ""
        if command.name == "bpm" and not takes_tempo(c):
            raise UserError("this checkpoint cannot be told a beat; put the tempo in its prompt")
        if command.name in ("sketch", "chords"):
            return self.prepare_sketch(command), ""
        return None, ""

    def prepare_sketch(self, command):
        c = self.model.config
        what = "pitch" if command.name == "chords" else command.value[1]
        missing = [name for name, count in (("pitch", c.pitch_channels), ("level", c.level_channels))
                   if what in (name, "both") and not count]
        if missing:
            raise UserError(f"this checkpoint has no channels of {' and '.join(missing)}: it cannot be given "
                            f"{'chords' if command.name == 'chords' else 'a sketch'}")
        if command.name == "chords":
            return None
        if self.open_sketch is None:
            raise UserError("this stream was started without a way to read recordings")
        return self.open_sketch(command.value[0])

    def check_tempo(self, line):
        """UserError for chords without a tempo."""
        planned = any(other.sets("bpm") and other.command.value for _, other, _ in self.planned)
        if line.sets("chords") and line.command.value and self.bpm is None and not planned:
            raise UserError("chords need a tempo first, such as /bpm 92 (--bpm 92)")

    def add(self, line, said=False, saved=False):
        """Plan a Line; returns the reply. Raises UserError where it cannot be played.

        saved: it was planned before, in the stream that goes on."""
        needs, remark = self.prepare(line)
        if not saved:
            self.check_tempo(line)
        with self.lock:
            moment = line.time or 0.0
            block = max(self.number, math.ceil(moment / self.block_seconds - 1e-6))
            late = line.time is not None and moment < self.time - 1e-6
            self.insert(block, line, needs)
            if said:
                heard = self.clock() if self.clock else self.time
                self.said.append(Said(line.text, block, time.perf_counter(), heard, line.time is not None))
        when = f"at {clock_of(moment)}" if line.time is not None and not late else "next"
        reply = f"{when}: {self.in_words(line)}"
        if late:
            reply += f" ({clock_of(moment)} is over)"
        return f"{reply} ({remark})" if remark else reply

    def insert(self, block, line, needs):
        place = sum(planned[0] <= block for planned in self.planned)
        self.planned.insert(place, (block, line, needs))
        if not for_now(line):
            for state in self.states:
                state["planned"].append((block, line.text))

    def in_words(self, line):
        return line.text if isinstance(line.command, Setting) else repr(self.mix_in_words(line.command))

    def mix_in_words(self, mix):
        """A mix as it is played: without words that the model does not know."""
        parts = []
        for prompt, weight in mix.weights.items():
            kept = prompt if self.names else words_read(self.model, prompt)[0]
            parts.append(f"{kept}:{weight:.3g}" if len(mix.weights) > 1 else kept)
        return " + ".join(parts) + (f" ~ {mix.seconds:g}" if mix.seconds else "")

    def apply(self, command, number, needs):
        """A command takes effect with block `number`."""
        if isinstance(command, Mix):
            now = number * self.block_seconds
            self.origin = self.mix_at(now)
            self.target = command.weights
            self.morph = (now, command.seconds)
            conds = {**self.conds, **needs}
            self.conds = {prompt: conds[prompt] for prompt in {**self.origin, **self.target}}
            self.keep_named_tempo(number)
        elif command.name in ("cfg", "steps", "forget"):
            self.settings[command.name] = command.value
        elif command.name == "bpm":
            self.keep_tempo(command.value, number)
        elif command.name == "chords":
            self.chords = command.value
            if self.chords and self.sketched and self.sketched.what != "level":     # the pitch is taken
                both = self.sketched.what == "both"
                self.sketched = self.sketched._replace(what="level") if both else None
        elif command.name == "sketch":
            self.sketched = command.value and OpenSketch(*command.value, needs, number)
            if self.sketched and self.sketched.what != "level":
                self.chords = None
        elif command.name == "stop":
            self.end = number

    def keep_tempo(self, bpm, number):
        """From block `number` on, the bar going on from where it is; None for no tempo."""
        self.beat_from = (number, self.bars(number) or 0.0)
        self.bpm = bpm

    def keep_named_tempo(self, number):
        """The heaviest prompt's own, if it names one and the model has learned to lean on the beat."""
        named = tempo_named(heaviest(self.target, None))
        if named and self.model.config.beats_per_frame:
            self.keep_tempo(named, number)

    def mix_at(self, moment):
        """{prompt: weight} at a second of the stream."""
        begins, takes = self.morph
        if not takes or moment >= begins + takes:
            return self.target
        share = max(0.0, (moment - begins) / takes)
        mix = {}
        for weights, part in ((self.origin, 1 - share), (self.target, share)):
            for prompt, weight in weights.items():
                mix[prompt] = mix.get(prompt, 0.0) + part * weight
        return {prompt: weight for prompt, weight in mix.items() if weight}

    def mixed(self, mix):
        """Cond of a mix: embeddings mixed token by token."""
        conds = [(self.conds[prompt], weight) for prompt, weight in mix.items()]
        if len(conds) == 1:
            return conds[0][0]
        return Cond(*(sum(weight * part for part, weight in zip(parts, mix.values()))
                      for parts in zip(*(cond for cond, _ in conds))))

    # --- to go on later
    def state(self):
        """Plain values from which `restore` goes on with block `self.number`. Lines that are said later are
        added to what is `planned` in it."""
        with self.lock:
            sketch = self.sketched and [self.sketched.file, self.sketched.what, self.sketched.until,
                                        self.sketched.begun]
            self.states.append(dict(
                number=self.number,
                planned=[(block, line.text) for block, line, _ in self.planned if not for_now(line)],
                settings=dict(self.settings), bpm=self.bpm, beat_from=list(self.beat_from),
                chords=list(self.chords or ()), sketch=sketch, origin=dict(self.origin),
                target=dict(self.target), morph=list(self.morph), heaviest=self.heaviest))
            return self.states[-1]

    def restore(self, state):
        """Go on from `state`. Lines planned here that were due before are over; of the others, those count
        that do not stand in `state`, after those that do. Raises UserError."""
        with self.lock:
            self.number = state["number"]
            self.settings = dict(state["settings"])
            self.bpm = state["bpm"]
            self.beat_from = tuple(state["beat_from"])
            self.chords = tuple(state["chords"]) or None
            self.origin = dict(state["origin"])
            self.target = dict(state["target"])
            self.morph = tuple(state["morph"])
            self.heaviest = state["heaviest"]
            saved = [tuple(planned) for planned in state["planned"]]
            new = [(block, line, needs) for block, line, needs in self.planned
                   if block >= self.number and (block, line.text) not in saved]
            self.planned = []
            self.conds = {prompt: self.encode(prompt) for prompt in {**self.origin, **self.target}}
            self.told = self.mix_at((self.number - 0.5) * self.block_seconds)
            self.cond = self.mixed(self.told)
            if state["sketch"] and self.open_sketch and state["sketch"][0] != "-":
                file, what, until, begun = state["sketch"]
                blocks = self.open_sketch(file)
                for _ in range(self.number - begun):
                    next(blocks, None)
                self.sketched = OpenSketch(file, what, until, blocks, begun)
            for block, text in saved:
                try:
                    self.add(self.read(text)._replace(time=block * self.block_seconds), saved=True)
                except UserError as error:                  # a file may be gone
                    say(f"left out: {text}: {error}")
            self.states.append(state)
            for block, line, needs in new:
                self.insert(block, line, needs)


class OpenSketch(NamedTuple):
    """A recording that is being followed. blocks: an iterator of its channels (channels of the sketch,
    block), begun: number of the block at which it began."""
    file: str
    what: str
    until: float
    blocks: object
    begun: int


def for_now(line):
    """Is it a /stop for now, which whoever goes on from here does not mean any more?"""
    return line.time is None and line.sets("stop")


def heaviest(mix, now):
    """The prompt of the largest weight; of several, the one that is it now."""
    most = max(mix.values())
    return now if mix.get(now, 0.0) >= most - 1e-9 else next(p for p, weight in mix.items() if weight == most)
