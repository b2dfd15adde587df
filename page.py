"""Play from a browser: a server of the standard library, and page.html.

    python page.py                                          # then open http://127.0.0.1:8000
    python page.py --port 9000 --osc 9001 --ckpt nano.pt --prompt "reggae, organ, C major"

The music is made in the main thread, by what sample.py plays with. Each request has a thread of its own,
which only reads the tape of the set (show.py) or says a line.

    GET /           page.html                               GET /state     where the set is, as JSON
    GET /audio      what is due now, or ?from=SAMPLE        GET /set.wav   the set so far
    POST /say       {"line": "a line of grammar.py, or /start"}

A page of somebody else cannot drive it: see `Handler.stranger`. """
import argparse
import contextlib
import json
import math
import re
import socket
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs

import torch

import osc
import sample
from common import UserError, reason_of, run, say, speed
from show import Show
from stage import Pace, Stopping, control_of, first_signal_sets

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


# -------------------------------------------------------------------------------- requests
class Handler(BaseHTTPRequestHandler):
    """One connection. What cannot be answered gets a 4xx and one line of plain text."""
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"                    # also of a request line that is broken off
    timeout = 30                                            # seconds without a byte in or out
    disable_nagle_algorithm = True                          # what is written goes out at once

    def do_GET(self):
        path, _, query = self.path.partition("?")
        show = self.server.show
        if self.stranger(path):
            return
        if path == "/":
            self.answer(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif path == "/state":
            self.answer(200, "application/json", json.dumps(show.state()).encode())
        elif path == "/audio":
            self.audio(show, parse_qs(query, keep_blank_values=True))
        elif path == "/set.wav":
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
            answer, position = self.server.show.say(line)
        except UserError as error:
            return self.send_error(400, str(error))
        say(f"{self.client_address[0]}: {answer}")
        self.answer(200, "application/json", json.dumps(dict(answer=answer, position=position)).encode())

    def refuse(self):
        if not self.stranger(None):
            self.send_error(405, "GET, or POST to /say, was expected")
    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = refuse

    def stranger(self, path):
        """Answer 403, and return True, where a page of another site may have made the request.

        A name that is not ours in Host: somebody's domain was made to point here (DNS rebinding). Another
        Origin: a form or script of another site. Sec-Fetch-Site is what browsers say themselves; only the
        page itself may be opened through a link. Programs send neither."""
        hosts = self.headers.get_all("Host", [])
        host = hosts[0].strip().lower() if len(hosts) == 1 else ""
        reached = bracketed(self.connection.getsockname()[0])
        name = re.sub(r":[0-9]+$", "", host)
        if name not in ("localhost", "127.0.0.1", "[::1]", self.server.name, reached):
            self.send_error(403, "Host: this server's address, or the name in --host, was expected")
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
        self.answer(code, "text/plain; charset=utf-8", f"{text}\n".encode(errors="replace"))

    def version_string(self):
        return "page.py"

    def log_message(self, form, *values):                   # requests come all the time
        pass


class Server(socketserver.ThreadingTCPServer):
    """Every connection in a thread of its own, CONNECTIONS at once: who is slow keeps nobody waiting."""
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128                                # who finds it full tries again after a second

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
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):                  # OSError: who is cut off asks again
            say(f"{address[0]}: a request ended with {type(error).__name__}: {error}")


def bracketed(address):
    """As it stands in a URL."""
    return f"[{address}]" if ":" in address else address


# -------------------------------------------------------------------------------- command line
def parse(argv=None):
    """This script's own arguments, and those of sample.py. Raises UserError."""
    p = argparse.ArgumentParser(description="Play from a browser.", allow_abbrev=False,
                                epilog="All further options are those of sample.py, "
                                f"but for {', '.join(REFUSED)}; --realtime is {LEAD:g} here.")
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
    if own.osc is not None or own.osc_beats:                # before the model takes its time
        osc.pythonosc("--osc" if own.osc_beats is None else "--osc-beats")
    model, _, _ = sample.set_up(args)
    rate = model.config.sample_rate
    show = Show(Pace(rate, args.realtime), files=own.host in ("127.0.0.1", "::1", "localhost"))
    stopping = Stopping()
    show.control = control_of(model, args, show.pace, stopping, None)
    show.settings = sample.sampling_settings(model, args.steps, args.sampler, args.cfg)
    samples = None if math.isinf(args.seconds) else round(args.seconds * rate)
    pieces, plan, _ = sample.stream_pieces(model, args, samples, False, show.control, show.pace, None,
                                            stopping, take=lambda line: show.say(line, files=True)[0])
    pieces = sample.only_first(pieces, samples)
    say(plan)
    server = Server(show, own.host, own.port)
    threading.Thread(target=server.serve_forever, name="server", daemon=True).start()
    say(f"play at http://{server.name}:{server.server_address[1]} (Ctrl-C ends the set)")
    if own.osc is not None:
        say(f"OSC at {own.host}:{osc.serve(lambda line: show.say(line)[0], own.osc, own.host)}")
    if own.osc_beats:
        osc.Beats(own.osc_beats, show.control, show.pace.heard)
    with contextlib.closing(pieces), server, first_signal_sets(stopping):
        show.play(pieces, stopping)
        server.shutdown()
    for line in show.pace.summary():
        say(line)
    if stopping.signal is not None:
        raise KeyboardInterrupt(stopping.signal)


if __name__ == "__main__":
    run(main)
