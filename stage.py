"""What stands between a stream and its audience: typed lines, the listener's clock, other people's audio, and
the file from which a stream goes on.

Nothing here makes music: `sample.py` does, and `live.py` says what. """
import contextlib
import itertools
import math
import os
import select
import signal
import struct
import sys
import threading
import time
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F

from audio import (decoded_pieces, decoder_margin, decoder_state, encode_chunks, encoder_margin,
                   restore_decoder, streaming_decoder)
from common import STOP_SIGNALS, UserError, load_plain, save_whole, say
from controls import WINDOW, features, sketch_channels
from grammar import Line, Setting, parse_chords, parse_untimed, read_schedule, seconds_of
from live import Control, prompt_encoder
from recordings import LOUDEST, overlapped, read_audio, resampled, to_stereo, usual_speakers

PIECE_OUT = 0.05                                            # seconds that are handed out at once, paced
SHORTEST_FADE = 0.1                                         # seconds
KEPT_OPTIONS = "no_transitions", "no_cache", "prompt_file"    # without which no saved stream goes on exactly
PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE                       # formats of a WAV; the last names one further on
ENDLESS = 2 ** 62                                           # bytes: of a WAV whose length is not known yet


# -------------------------------------------------------------------------------- what the command line says
def in_option(option, read, text):
    """read(text), whose UserError names the option that the text stands in."""
    try:
        return read(text)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


def control_of(model, args, pace, stopping, saved):
    """What is played when, by the command line. saved: of `load_state`, or None. Raises UserError."""
    encode, names = prompt_encoder(model, args.prompt_file)
    prompt = None if saved else args.prompt
    if prompt is None:
        prompt = names[0] if names else model.sampling.get("prompt", "")

    standard_input = args.sketch == "-"                     # is it still to be read?

    def sketch_of(file):
        nonlocal standard_input
        if file == "-" and not standard_input:
            raise UserError("standard input is read as a sketch once, from the start, by --sketch -")
        standard_input = standard_input and file != "-"
        return open_sketch(model, audio_from(file, model.config, given_up))

    def given_up():
        return stopping.is_set() or control is not None and control.ends_sketch()
    control = None
    lines = []
    if args.bpm:
        lines.append(f"/bpm {args.bpm!r}")
    if args.chords:
        chords = in_option("--chords", parse_chords, args.chords)
        lines.append(Line(None, Setting("chords", chords), f"/chords {args.chords}"))
    if args.sketch:
        sketch = args.sketch, args.sketch_what, args.sketch_until
        lines.append(Line(None, Setting("sketch", sketch), '/sketch "{}" {} {!r}'.format(*sketch)))
    for moment, line in args.at:
        at = in_option("--at", seconds_of, moment)
        lines.append(in_option(f"--at {moment}", parse_untimed, line)._replace(time=at))
    if args.schedule:
        lines += read_schedule(args.schedule)
    control = Control(model, encode, prompt, lines, names, pace.heard, sketch_of)
    for remark in control.remarks:
        say(remark)
    if saved:
        control.restore(saved["control"])
        sketch = saved["control"]["sketch"]
        if sketch and sketch[0] == "-":
            say("the sketch came through standard input, and is over")
        if args.prompt is not None:
            control.add(control.read(args.prompt), said=True)
    return control


# -------------------------------------------------------------------------------- typed lines
class Typing:
    """Lines typed into an open file, a terminal or a pipe: each goes to take(line) as soon as it is there."""

    def __init__(self, file, take):
        self.file = file
        self.take = take
        self.unfinished = b""
        self.open = True
        self.lock = threading.Lock()

    def poll(self, wait=False):
        """Take the whole lines that are there, without waiting for more; wait: for another thread that is
        taking some."""
        if not self.lock.acquire(blocking=wait):
            return
        try:
            for line in self.lines():
                self.take(line)
        finally:
            self.lock.release()

    def lines(self):
        """Whole lines that are there, of a flood some."""
        left = 2 ** 16                                      # bytes
        try:
            while self.open and left > 0 and select.select([self.file], [], [], 0)[0]:
                more = os.read(self.file.fileno(), left)    # of a terminal, a line
                left -= len(more)
                self.unfinished += more
                self.open = bool(more)
        except (OSError, ValueError):                       # a terminal that is gone, a file that was closed
            self.open = False
        *lines, self.unfinished = self.unfinished.split(b"\n")
        if not self.open:                                   # the last line may end without a newline
            lines.append(self.unfinished)
            self.unfinished = b""
        lines = (line.decode(errors="replace").strip() for line in lines)
        return [line for line in lines if line]

    def watch(self):
        """Poll in a thread of its own from now on, so that a line's time is the time at which it was
        typed."""
        threading.Thread(target=self.keep_polling, daemon=True).start()

    def keep_polling(self):
        while self.open:
            try:
                select.select([self.file], [], [], 0.5)
            except (OSError, ValueError):
                return
            self.poll(wait=True)


def take_line(take, line):
    """Print take(line), the reply, or what is wrong with it: the music goes on."""
    try:
        reply = take(line)
    except UserError as error:
        reply = str(error)
    say(reply)


# -------------------------------------------------------------------------------- the listener's clock
class Pace:
    """The listener's clock, how far the stream is ahead of it, and how soon they hear what was said.

    With a lead, audio is handed out no earlier than that many seconds before it is heard; without one, as
    fast as it is taken, and what was handed out counts as heard. Where audio comes too late the listener
    waits for it: from then on the clock is that much behind. Positions are samples of the stream."""

    def __init__(self, rate, lead=None, position=0, now=time.perf_counter, sleep=time.sleep):
        self.rate = rate
        self.lead = lead
        self.first = position                               # of the first sample handed out
        self.position = position                            # of the next one
        self.now = now
        self.sleep = sleep
        self.began = None                                   # when the first sample was heard, plus all delays
        self.leads = []                                     # seconds still to hear when a piece came
        self.late = []                                      # seconds by which pieces came too late
        self.latencies = []                                 # (seconds of the stream, seconds of the clock)
        self.work_since = now()                             # when the work on the next piece began
        self.work = 0.0                                     # seconds

    def heard(self):
        """The second of the stream at which the listener is."""
        if self.lead is None or self.began is None:
            return self.position / self.rate
        return min(self.position / self.rate, self.first / self.rate + self.now() - self.began)

    def arrived(self):
        """A piece has been made. Returns a line where it came too late, else None."""
        self.work += self.now() - self.work_since
        if self.lead is None or self.began is None:
            return None
        ahead = self.began + (self.position - self.first) / self.rate - self.now()
        self.leads.append(ahead)
        if ahead >= 0:
            return None
        self.late.append(-ahead)
        self.began -= ahead
        return f"late: the audio at {self.position / self.rate:.1f} s came {-ahead:.2f} s after its time"

    def wait(self, samples):
        """Wait until so many samples more may be handed out."""
        if self.lead is None or self.began is None:
            return
        end = (self.position + samples - self.first) / self.rate
        ahead = self.began + end - self.now() - self.lead
        if ahead > 0:
            self.sleep(ahead)

    def hand_out(self, samples, said, block_samples):
        """So many samples have been handed out. Takes out of `said`, a deque of `live.Said`, those that these
        are the first to obey; returns a line about each."""
        if self.began is None:
            self.began = self.now()
        self.position += samples
        self.work_since = self.now()
        lines = []
        for one in list(said):
            first = one.block * block_samples
            if first >= self.position:
                continue
            said.remove(one)
            if one.planned:
                continue
            due = self.now() if self.lead is None else self.began + (first - self.first) / self.rate
            self.latencies.append((first / self.rate - one.heard, due - one.wall))
            music, clock = self.latencies[-1]
            what = "is handed to the player" if self.lead is None else "is heard"
            lines.append(f"{one.text!r} {what} from {first / self.rate:.2f} s on: {music:.2f} s of music "
                         f"and {clock:.2f} s of time after it was said")
        return lines

    def summary(self):
        """Lines for the end."""
        lines = []
        if self.lead is not None:
            leads = self.leads or [0.0]
            played = (self.position - self.first) / self.rate
            lines.append(f"lead when audio came: {np.median(leads):.2f} s in the median, {min(leads):.2f} s "
                         f"at least, of {self.lead:g} s allowed; {self.work:.1f} s of work "
                         f"for {played:.1f} s of music; {len(self.late)} blocks late, by "
                         f"{sum(self.late):.2f} s together")
        if self.latencies:
            music, clock = np.median(self.latencies, axis=0)
            lines.append(f"from a change to the first sample that obeys it, median of {len(self.latencies)}: "
                         f"{music:.2f} s of music, {clock:.2f} s of time"
                         + ", and what the player holds back" * (self.lead is None))
        return lines


class Fade:
    """Where a stream ends: from full level at sample `begin` down to silence at sample `end`."""

    def __init__(self, begin, end):
        self.begin = begin
        self.end = end

    def of(self, audio, position):
        """Audio (B, 2, n) that begins at this sample."""
        samples = position + torch.arange(audio.shape[-1], device=audio.device)
        return audio * ((self.end - samples) / (self.end - self.begin)).clamp(0, 1).to(audio.dtype)


class Stopping(threading.Event):
    """Set by Ctrl-C and the like. signal: which one it was, or None."""
    signal = None


@contextlib.contextmanager
def first_signal_sets(stopping):
    """Inside, the first of STOP_SIGNALS sets an Event; the next one does what it always does."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}

    def remember(number, frame):
        if stopping.is_set():
            handlers[number](number, frame)
        stopping.signal = number
        stopping.set()
    try:
        for number, handler in handlers.items():
            if callable(handler):                           # not where a shell has made the script ignore it
                signal.signal(number, remember)
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)


def make_room(pipe, size):
    """Let a pipe hold `size` bytes, where the system can (Linux, up to 1 MiB). It holds 64 KiB otherwise, a
    third of a second: whoever wants to be further ahead has to wait for the player."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl
        size = min(size, 1 << 20)
        if fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) < size:    # an OSError: it is no pipe
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, size)


class Delivery:
    """Hands audio out, each part as soon as the listener's clock allows, and fades out after Ctrl-C and after
    /stop."""

    def __init__(self, pace, control, stopping, samples, block_samples):
        """samples: how many, or None; control: `live.Control` or None; stopping: an Event."""
        self.pace = pace
        self.control = control
        self.stopping = stopping
        self.block_samples = block_samples
        self.end = math.inf if samples is None else pace.position + samples
        self.fade = None
        self.over = False
        self.rest = None                                    # what was made and not handed out yet (1, 2, n)

    def parts(self, piece):
        """A piece of audio (1, 2, n), which has just been made -> its parts, to be written at once."""
        pace = self.pace
        late = pace.arrived()
        if late:
            say(late)
        while piece.shape[-1] and not self.over:
            self.rest = piece                               # where whoever takes it fails to
            self.look_for_an_end(piece.shape[-1])
            n = min(piece.shape[-1], self.end - pace.position)
            if pace.lead is not None:
                n = min(n, max(1, round(min(PIECE_OUT, pace.lead / 2) * pace.rate)))
            audio = piece[..., :n]
            piece = piece[..., n:]
            pace.wait(n)
            yield audio if self.fade is None else self.fade.of(audio, pace.position)
            for line in pace.hand_out(n, self.control.said if self.control else [], self.block_samples):
                say(line)
            self.rest = piece
            self.over = pace.position >= self.end

    def look_for_an_end(self, in_hand):
        """Begin to fade where it is time for it. in_hand: samples that have been made."""
        position = self.pace.position
        if self.fade is None and self.stopping.is_set():    # over what is in hand, or a little longer
            self.fade = Fade(position, position + max(in_hand, round(SHORTEST_FADE * self.pace.rate)))
        if self.fade is None and self.control is not None and self.control.end is not None:
            self.fade = Fade(*(self.block_samples * (self.control.end + i) for i in (0, 1)))
        if self.fade is not None:
            self.end = min(self.end, max(self.fade.end, position))


# -------------------------------------------------------------------------------- other people's audio
def audio_from(file, config, given_up=None):
    """A recording, or "-" for a WAV on standard input as it comes -> tensors (2, n) at the model's rate.

    given_up: a function that says whether what comes from standard input is over. Raises UserError, with the
    first piece."""
    return wav_pieces(sys.stdin, config, given_up) if file == "-" else read_audio(file, config)


def wav_pieces(stream, config, given_up=None, seconds=0.02):
    """A WAV that arrives through a pipe -> tensors (2, n) at the model's rate, about so many seconds each."""
    if stream is None:
        raise UserError("standard input is closed: a WAV was expected there")
    come = arriving(stream.fileno(), given_up)
    try:
        rate, channels, kind, bits, size = wav_form(come)
    except struct.error:
        raise UserError("standard input: no WAV (16, 24 or 32 bits) arrived there") from None
    if not 1000 <= rate <= 1000000:
        raise UserError(f"standard input: a WAV with a sample rate of {rate} Hz arrived there")
    frame = bits // 8 * channels                            # bytes

    def arrays():
        left = size
        warned = False
        while left > 0:
            raw = come(max(1, round(seconds * rate)) * frame)[:left]
            left -= len(raw)
            if len(raw) < frame:
                return
            samples = samples_of(raw[:len(raw) // frame * frame], kind, bits).reshape(-1, channels)
            if not (np.abs(samples) <= LOUDEST).all() and not warned:       # so too for what is no number
                say("standard input: samples that are no numbers are taken for silence, far too loud ones cut")
                warned = True
            yield np.nan_to_num(samples, nan=0, posinf=0, neginf=0).clip(-LOUDEST, LOUDEST)
    for audio in resampled(to_stereo(arrays(), usual_speakers(channels)), rate, config.sample_rate, seconds):
        yield audio.mean(dim=0, keepdim=True) if config.audio_channels == 1 else audio


def arriving(descriptor, given_up=None):
    """A function read(n) -> the next n bytes that arrive there, fewer at the end or once given_up() is
    true."""
    def read(n):
        raw = b""
        while len(raw) < n:
            while not select.select([descriptor], [], [], 0.2)[0]:
                if given_up is not None and given_up():
                    return raw
            more = os.read(descriptor, n - len(raw))
            raw += more
            if not more:
                break
        return raw
    return read


def wav_form(read):
    """Read a WAV up to its samples -> (Hz, channels, PCM or FLOAT, bits, bytes of samples). Raises
    struct.error where it is none of these."""
    riff, _, wave = struct.unpack("<4sI4s", read(12))
    if (riff, wave) != (b"RIFF", b"WAVE"):
        raise struct.error
    form = b""
    name, size = struct.unpack("<4sI", read(8))
    while name != b"data":
        content = read(size + size % 2)
        form = content if name == b"fmt " else form
        name, size = struct.unpack("<4sI", read(8))
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", form)
    if kind == EXTENSIBLE:
        kind, = struct.unpack_from("<H", form, 24)
    if (kind, bits) not in ((PCM, 16), (PCM, 24), (PCM, 32), (FLOAT, 32)) or not channels or not rate:
        raise struct.error
    if not 0 < size < 2 ** 31 - 2 ** 16:                    # what streams promise
        size = ENDLESS
    return rate, channels, kind, bits, size


def samples_of(raw, kind, bits):
    """Bytes of a WAV -> float32, full scale 1."""
    if kind == FLOAT:
        return np.frombuffer(raw, "<f4")
    if bits == 24:                                          # each becomes the upper bytes of 32 bits
        three = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        raw = np.pad(three, ((0, 0), (1, 0))).tobytes()
        bits = 32
    values = np.frombuffer(raw, f"<i{bits // 8}")
    return (values / 2.0 ** (bits - 1)).astype(np.float32)


def open_sketch(model, chunks):
    """Audio tensors (2, n) as they come -> the channels of the model's sketch (channels, block), block by
    block: as if the whole had been heard at once. The end is filled up with silence.

    The first block is made here, so that what cannot be read raises its UserError now."""
    blocks = sketch_blocks(model, chunks)
    first = next(blocks, None)
    return iter(()) if first is None else itertools.chain([first], blocks)


def sketch_blocks(model, chunks):
    c = model.config
    size = c.block * c.hop
    margin = math.ceil((WINDOW - c.hop) / 2 / c.hop) * c.hop
    for piece, left, _ in overlapped(chunks, size, margin):
        piece = F.pad(piece, (0, left + size + margin - piece.shape[-1]))   # at the end of the recording
        heard = features(piece[None], c)[0]                 # (84, frames)
        yield sketch_channels(model, heard[:, left // c.hop:left // c.hop + c.block])


class Listening:
    """Somebody else's audio as the context in place of the model's own, and the answer after a fixed delay.

    Block n of the answer is made after the input's blocks before n. It comes out `delay` samples after the
    place that it answers, so the delay must cover what encoder and decoder look ahead: nothing that comes out
    has used input of a later sample. The end of the input that fills no block is not answered."""

    def __init__(self, model, chunks, delay=None, mix=0.0):
        """chunks: tensors (2, n) as they come; delay: seconds, None for a block; mix: how loud the input is
        in what comes out. Raises UserError for too short a delay."""
        c = model.config
        self.model = model
        self.hop = c.hop
        self.mix = mix
        self.delay = c.block * c.hop if delay is None else round(delay * c.sample_rate)
        least = (encoder_margin(c) + decoder_margin(c)) * c.hop
        if delay is None:
            self.delay = max(self.delay, least)
        if self.delay < least:
            raise UserError(f"--delay: encoder and decoder of this model look ahead: at least "
                            f"{least / c.sample_rate:.3f} s")
        self.source = iter(chunks)
        self.to_encode = deque()                            # chunks that were read for `dry`
        self.input = torch.zeros(c.audio_channels, 0)       # what was read and is still to be mixed
        self.latents = encode_chunks(model, self.chunks_to_encode(), c.block)

    def pull(self):
        """Read a chunk of the input. False at its end."""
        chunk = next(self.source, None)
        if chunk is None:
            return False
        self.to_encode.append(chunk)
        if self.mix:
            self.input = torch.cat([self.input, chunk], dim=-1)
        return True

    def chunks_to_encode(self):
        while self.to_encode or self.pull():
            yield self.to_encode.popleft()

    def block(self, number):
        """For `sample.stream`: latents (1, channels, block) of the input's next block; None at its end."""
        latents = next(self.latents, None)
        if latents is None or latents.shape[-1] < self.model.config.block:
            return None
        return latents[None].to(next(self.model.parameters()).device)

    def answers(self, pieces):
        """Audio pieces (1, 2, n) of the answer -> what comes out: silence as long as the delay first, and the
        input mixed in."""
        silence = torch.zeros(1, self.model.config.audio_channels, self.delay)
        for piece in itertools.chain([silence], pieces):
            if self.mix:
                piece = piece + self.mix * self.dry(piece.shape[-1]).to(piece.device)
            yield piece

    def dry(self, samples):
        """The next samples of the input, silence after its end; waits for those that are still to come."""
        while self.input.shape[-1] < samples and self.pull():
            pass
        now, self.input = self.input[:, :samples], self.input[:, samples:]
        return F.pad(now, (0, samples - now.shape[-1]))[None]


# -------------------------------------------------------------------------------- to go on later
class Sound:
    """Latent blocks -> audio, and what must be kept to go on from between two of them."""

    def __init__(self, model, compile=False, state=None):
        """state: of an earlier `state`, or None. May raise UserError (compile)."""
        self.decoder = streaming_decoder(model.autoencoder, compile)
        self.number = 0                                     # of the next block to be decoded
        self.kept = {}                                      # number of the next block -> state of the stream
        if state is not None:
            self.number = state["stream"]["number"]
            self.keep(state["stream"], state["control"])    # for whoever stops before the next block is made
            restore_decoder(self.decoder, state["decoder"])

    def keep(self, stream_state, control_state):
        """Remember what goes with the blocks so far, which are still to be decoded."""
        self.kept[stream_state["number"]] = dict(stream=stream_state, control=control_state)

    def pieces(self, latents):
        """Audio pieces (1, 2, n), as `audio.decode_stream` gives them."""
        return decoded_pieces(self.decode, latents)

    def decode(self, block, last=False):
        """A block -> its audio, or what is left at the end. States older than the block are forgotten."""
        if not last:
            self.number += 1
            for number in [number for number in self.kept if number < self.number]:
                del self.kept[number]
        return self.decoder(block, last=last)

    def state(self):
        return dict(self.kept[self.number], decoder=decoder_state(self.decoder))


def save_state(args, model, precision, states, rest, position):
    """Write --save-state, which `load_state` reads. states: of stream, control and decoder. Raises
    UserError."""
    save_whole({"kind": "stream", "model": fingerprint(model), "precision": precision, **states,
                "options": {name: bool(getattr(args, name)) for name in KEPT_OPTIONS},
                "rest": rest.cpu().clone(), "position": position}, args.save_state)


def load_state(args, model, precision):
    """--resume-state, the file of a stream that was stopped: states of the stream, of its control and
    decoder, and the audio that was made but not written (`rest`), with the position of its first sample.
    Raises UserError."""
    path = args.resume_state
    saved = load_plain(path, own=True)
    if not isinstance(saved, dict) or saved.get("kind") != "stream":
        raise UserError(f"{path} was not written by --save-state")
    if saved["precision"] != precision:                     # in which weights are others: not to be compared
        raise UserError(f"{path} is of a stream in {saved['precision']}: add --precision "
                        f"{saved['precision']}, and the --ckpt that it was played with")
    if saved["model"] != fingerprint(model):
        raise UserError(f"{path} is of a stream of another checkpoint (--ckpt)")
    for name, given in saved.get("options", {}).items():
        if given != bool(getattr(args, name)):
            mend = "add it" if given else "leave it out"
            raise UserError(f"{path} is of a stream played with{'' if given else 'out'} "
                            f"--{name.replace('_', '-')}: {mend}")
    return saved


def fingerprint(model):
    """Plain values that tell one model from another."""
    sums = [float(p.double().sum()) for p in (*model.conditioner.parameters(), model.dit.context_in.weight)]
    return {"config": repr(model.config.to_dict()), "sums": sums}
