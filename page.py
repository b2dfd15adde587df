"""Play from a browser: a server of the standard library, and page.html.

    python page.py                                          # then open http://127.0.0.1:8000
    python page.py --port 9000 --osc 9001 --ckpt nano.pt --prompt "slow chorale in C major on marimba"

One thread makes the music and lays it on a `Tape`; `Show` keeps it a little ahead of the clock and takes
commands. Each request has a thread of its own, which only reads the tape or says a line. Everything is
counted in samples from the start of the set, so whoever was cut off asks for the sample that was next, and
all listeners hear the same.

    GET /           page.html                               GET /state     where the set is, as JSON
    GET /audio      what is due now, or ?from=SAMPLE        GET /set.wav   the set so far
    POST /say       {"line": "a line of live.py's grammar, or /start"}

A page of somebody else cannot drive it: see `Handler.stranger`. """
import argparse
import contextlib
import io
import json
import math
import re
import socket
import socketserver
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch

import osc
import sample
from audio import WavWriter, decoder_margin, pcm
from common import UserError, reason_of, run, speed
from live import parse_line
from stage import Fade, Pace, Stopping, control_of, first_signal_sets

FRAME = 4                                                   # bytes of a sample: int16, left and right
KEPT = 120                                                  # seconds that a listener may fall behind
MOST_SENT = 10                                              # seconds of sound in one answer
PATIENCE = 5                                                # seconds that a request waits for new sound
LARGEST_BODY = 4096                                         # bytes
CONNECTIONS = 64                                            # at once
LEAD = 0.5                                                  # --realtime, where it is not given
REFUSED = "--out", "--listen", "--no-cache", "--save-state", "--resume-state"
PAGE = Path(__file__).with_name("page.html")
HEADERS = (                                                 # nothing from elsewhere, nothing for elsewhere
    ("Content-Security-Policy", "default-src 'none'; script-src 'unsafe-inline' blob:; connect-src 'self'; "
                                "style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"), ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"))


# -------------------------------------------------------------------------------- the set
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
                note(f"the recording ends after {self.recorded / self.rate:.1f} s: {reason_of(error)}")
            self.more.notify_all()

    def read(self, first, count):
        """Up to `count` samples from `first` on, or from the oldest one kept: (its position, bytes)."""
        with self.more:
            first = max(first, self.end - len(self.ring), 0)
            rows = np.arange(first, min(self.end, first + count)) % len(self.ring)
            return first, self.ring[rows].tobytes()

    def wav(self):
        """The set so far as a WAV: its size in bytes, and an iterator of its pieces."""
        header = io.BytesIO()
        WavWriter(header, self.rate, 2, self.recorded)
        size = FRAME * self.recorded

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

    def __init__(self, pace):
        self.pace = pace
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

    def say(self, text):
        """Take a line of live.py's grammar, or /start: the reply, and the sample from which it holds, or
        None. Raises UserError."""
        word = text.strip()
        if word == "/start" and self.over:
            raise UserError("the set is over: start page.py again")
        if word == "/start":
            self.going.set()
            return "going on", None
        if word == "/stop":                                 # with a time, it is the end
            self.going.clear()
            return "stopping: one more block, which fades out", None
        with self.control.lock:
            answer = self.control.say(text)
            return answer, self.control.said[-1].block * self.block_samples()

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
                self.pace.began = self.pace.now() - (position - self.pace.first) / self.pace.rate
            stops = stopping.is_set() or not self.going.is_set()
            if stops:
                audio = Fade(position, end).of(audio, position)
            last = self.control.end                         # number of the block that a /stop in a schedule fades
            if last is not None:
                fade = Fade(last * self.block_samples(), (last + 1) * self.block_samples())
                audio = fade.of(audio, position)
            self.add(pcm(audio))
            if stopping.is_set() or last is not None and end >= fade.end:
                break
            if stops:
                self.rest(stopping)
            begins = stops
            self.pace.wait(0)
            self.pace.work_since = self.pace.now()
        self.over = True
        self.going.clear()
        self.rest(stopping)

    def add(self, samples):
        late = self.pace.arrived()
        self.tape.append(samples)
        with self.control.lock:
            lines = self.pace.hand_out(len(samples), self.control.said, self.block_samples())
        for line in [late] * bool(late) + lines:
            note(line)

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


# -------------------------------------------------------------------------------- requests
class Handler(BaseHTTPRequestHandler):
    """One connection. What cannot be answered gets a 4xx and one line of plain text."""
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"                    # also of a request line that is broken off
    timeout = 30                                            # seconds without a byte in or out

    def do_GET(self):
        url = urlsplit(self.path)
        show = self.server.show
        if self.stranger(url.path):
            return
        if url.path == "/":
            self.answer(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif url.path == "/state":
            self.answer(200, "application/json", json.dumps(show.state()).encode())
        elif url.path == "/audio":
            self.audio(show, parse_qs(url.query, keep_blank_values=True))
        elif url.path == "/set.wav":
            size, pieces = show.tape.wav()
            self.head(200, "audio/wav", size, [("Content-Disposition", 'attachment; filename="set.wav"')])
            for piece in pieces:
                self.wfile.write(piece)
        else:
            self.send_error(404, "there are /, /state, /audio?from=SAMPLE and /set.wav")

    def audio(self, show, query):
        """The samples from ?from= on, as soon as there are any; without it, from the one that is due."""
        asked = query.get("from", [str(show.due())])
        if set(query) - {"from"} or len(asked) != 1 or not re.fullmatch("[0-9]{1,15}", asked[0]):
            return self.send_error(400, "/audio?from=SAMPLE: a whole number was expected")
        first = int(asked[0])
        if first > show.tape.end:
            return self.send_error(416, f"the set has no more than {show.tape.end} samples yet")
        known = self.headers.get("X-Stopped") is not None   # does the listener know that the set rests?
        with show.tape.more:
            show.tape.more.wait_for(lambda: show.tape.end > first or show.resting and not known, PATIENCE)
        first, samples = show.tape.read(first, MOST_SENT * show.pace.rate)
        if samples:
            self.answer(200, "application/octet-stream", samples, [("X-Position", first)])
        else:
            self.answer(204, None, b"", [("X-Stopped", 1)] if show.resting else [])

    def do_POST(self):
        if self.stranger(None):
            return
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        length = self.headers.get("Content-Length", "")
        if self.path != "/say":
            return self.send_error(404, "commands go to /say")
        if kind != "application/json":
            return self.send_error(415, "Content-Type: application/json was expected")
        if not re.fullmatch("[0-9]{1,15}", length):
            return self.send_error(411, "Content-Length was expected")
        if int(length) > LARGEST_BODY:
            return self.send_error(413, f"at most {LARGEST_BODY} bytes were expected")
        try:
            body = json.loads(self.rfile.read(int(length)))
            line = body["line"]
            if not isinstance(line, str) or not line.strip():
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            return self.send_error(400, 'JSON such as {"line": "slow piano"} was expected')
        try:
            self.check_file(line)
            answer, position = self.server.show.say(line)
        except UserError as error:
            return self.send_error(400, str(error))
        print(f"{self.client_address[0]}: {answer}", file=sys.stderr)
        self.answer(200, "application/json", json.dumps(dict(answer=answer, position=position)).encode())

    def check_file(self, line):
        """UserError where another machine would have a file of this one read."""
        if self.client_address[0] not in ("127.0.0.1", "::1"):
            command = parse_line(line).command
            if command[0] == "sketch" and command[1] is not None:
                raise UserError("files can be named only from the machine that plays")

    def refuse(self):
        if not self.stranger(None):
            self.send_error(405, "GET, or POST to /say, was expected")
    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = refuse

    def stranger(self, path):
        """Answer 403, and return True, where a page of another site may have made the request.

        A name that is not ours in Host: somebody's domain was made to point here (DNS rebinding). Another
        Origin: a form or script of another site. Sec-Fetch-Site is what browsers say themselves; only the page
        itself may be opened through a link. Programs send neither."""
        hosts = self.headers.get_all("Host", [])
        host = hosts[0].strip().lower() if len(hosts) == 1 else ""
        reached = bracketed(self.connection.getsockname()[0])
        name = re.sub(r":[0-9]+$", "", host)
        if name not in ("localhost", "127.0.0.1", "[::1]", self.server.name, reached):
            self.send_error(403, "Host: this server's own name or address was expected")
            return True
        origins = self.headers.get_all("Origin", [])
        site = self.headers.get("Sec-Fetch-Site", "none")
        foreign = path != "/" and site not in ("same-origin", "none")
        if foreign or any(origin != f"http://{host}" for origin in origins):
            self.send_error(403, "only this server's own page may do that")
            return True
        return False

    def answer(self, status, kind, body, more=()):
        self.head(status, kind, len(body), more)
        self.wfile.write(body)

    def head(self, status, kind, size, more=()):
        self.send_response(status)
        if kind:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", size)
        for name, value in (*more, *HEADERS):
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code, message=None, explain=None):
        """One line; the base class calls this for what is no HTTP too."""
        self.close_connection = True
        text = " ".join((message or self.responses[code][0]).split())
        self.answer(code, "text/plain; charset=utf-8", f"{text}\n".encode())

    def version_string(self):
        return "page.py"

    def log_message(self, form, *values):                   # requests come all the time
        pass


class Server(socketserver.ThreadingTCPServer):
    """Every connection in a thread of its own, CONNECTIONS at once: who is slow keeps nobody waiting."""
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, show, host, port):
        """Port 0 takes any that is free. Raises UserError."""
        self.show = show
        self.name = bracketed(host.lower())
        self.free = threading.Semaphore(CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot serve at {self.name}:{port}: {reason_of(error)}") from None

    def process_request(self, request, address):
        if self.free.acquire(blocking=False):
            super().process_request(request, address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, address):
        try:
            super().process_request_thread(request, address)
        finally:
            self.free.release()

    def handle_error(self, request, address):
        error = sys.exception()
        if not isinstance(error, OSError):                  # OSError: who is cut off asks again
            note(f"{address[0]}: a request ended with {type(error).__name__}: {error}")


def bracketed(address):
    """As it stands in a URL."""
    return f"[{address}]" if ":" in address else address


def note(text):
    print(text, file=sys.stderr)


# -------------------------------------------------------------------------------- command line
def parse(argv=None):
    """This script's own arguments, and those of sample.py. Raises UserError."""
    p = argparse.ArgumentParser(description="Play from a browser.", allow_abbrev=False,
                                epilog=f"All further options are those of sample.py, but for --realtime, which is "
                                f"{LEAD:g} here, and {', '.join(REFUSED)}.")
    p.add_argument("--host", default="127.0.0.1",
                   help="address to serve at (default: 127.0.0.1, which only this machine reaches)")
    p.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    p.add_argument("--osc", type=int, metavar="PORT", help="take commands as OSC messages over UDP, too")
    p.add_argument("--osc-beats", metavar="HOST:PORT", help="send /beat there as OSC when a beat is heard")
    own, rest = p.parse_known_args(argv)
    args = sample.parse(rest)
    for option in REFUSED:
        if getattr(args, option[2:].replace("-", "_")):
            raise UserError(f"{option} belongs to sample.py; here the page keeps the set")
    args.realtime = args.realtime or LEAD
    args.seconds = args.seconds or math.inf
    return own, args


@torch.no_grad()
def main():
    own, args = parse()
    torch.set_flush_denormal(True)
    if speed:
        speed.keep_memory()
    if own.osc is not None or own.osc_beats:
        osc.pythonosc("--osc")
    model, _, _ = sample.set_up(args)
    rate = model.config.sample_rate
    show = Show(Pace(rate, args.realtime))
    stopping = Stopping()
    show.control = control_of(model, args, show.pace, stopping, None)
    show.settings = sample.sampling_settings(model, args.steps, args.sampler, args.cfg)
    samples = None if math.isinf(args.seconds) else round(args.seconds * rate)
    pieces, plan, _ = sample.stream_pieces(model, args, samples, False, show.control, None, stopping)
    note(plan)
    server = Server(show, own.host, own.port)
    threading.Thread(target=server.serve_forever, name="server", daemon=True).start()
    note(f"play at http://{server.name}:{server.server_address[1]} (Ctrl-C ends the set)")
    if own.osc is not None:
        note(f"OSC at {own.host}:{osc.serve(lambda line: show.say(line)[0], own.osc, own.host)}")
    if own.osc_beats:
        osc.Beats(own.osc_beats, show.control, show.pace.heard)
    with contextlib.closing(pieces), first_signal_sets(stopping):
        show.play(pieces, stopping)
    for line in show.pace.summary():
        note(line)


if __name__ == "__main__":
    run(main)
