"""Play from other software: the lines of grammar.py as OSC messages over UDP, and the beat sent out as OSC.

    address                          arguments                       the line that is said
    /prompt                          text [seconds of a morph]       text ~ seconds
    /bpm /cfg /steps /forget         a number (/bpm also "off")      /bpm 92
    /sketch /chords                  text ...                        /chords Am F C G
    /stop /start                     none, or a button's number      /stop (nothing where that is 0)
    /say                             text                            text

/start is for page.py. What goes out, when the beat is heard: /beat NUMBER BAR PLACE, all counted from 1.

Max, SuperCollider, TouchOSC, DAWs and `oscsend` speak it; here python-osc reads and writes the packets."""
import math
import re
import socket
import threading
import time
from collections import deque

from common import UserError, reason_of, say
from controls import BEATS_A_BAR

WAIT = 0.002                                                # seconds between two looks at the clock


def pythonosc(option):
    """The package python-osc. Raises UserError where it is missing."""
    try:
        from pythonosc import osc_packet, udp_client
    except ImportError:
        raise UserError(f"{option} needs the package python-osc: pip install python-osc") from None
    return osc_packet, udp_client


# -------------------------------------------------------------------------------- commands in
def line_of(address, values):
    """An OSC message as a line of the grammar, or None for a button that is let go. Raises UserError."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise UserError(f"{address}: text and numbers were expected, not {type(value).__name__}")
    texts = [value if isinstance(value, str) else f"{value:g}" for value in values]     # float32 has 7 digits
    if address == "/say":
        if len(values) != 1 or not isinstance(values[0], str):
            raise UserError("/say: one text was expected")
        return texts[0]
    if address == "/prompt":
        if not 1 <= len(values) <= 2 or not isinstance(values[0], str):
            raise UserError("/prompt: a text and perhaps the seconds of a morph were expected")
        return " ~ ".join(texts)
    if address in ("/stop", "/start") and all(isinstance(value, (int, float)) for value in values):
        return None if values and not values[0] else address
    if address == "/sketch":                                # spaces of a file's name; /chords "Am F" is two
        texts = [f'"{text}"' if " " in text else text for text in texts]
    return " ".join([address, *texts])


def serve(command, port, host="127.0.0.1"):
    """Take commands at a UDP port, in a thread of its own: command(line) gives a reply or raises UserError.

    What cannot be read or played is one line on standard error. Port 0 takes any that is free. Returns the
    port. Raises UserError."""
    osc_packet, _ = pythonosc("--osc")
    server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        server.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--osc {port} cannot be used at {host}: {reason_of(error)}") from None

    def listen():
        while True:
            try:
                packet, _ = server.recvfrom(2 ** 16)
                messages = osc_packet.OscPacket(packet).messages
            except Exception as error:    # python-osc raises many types for a packet that is none
                say(f"OSC: a packet that cannot be read ({reason_of(error)})")
                continue
            for timed in messages:
                obey(command, timed.message)
    threading.Thread(target=listen, name="osc", daemon=True).start()
    return server.getsockname()[1]


def obey(command, message):
    try:
        line = line_of(message.address, message.params)
        if line is not None:
            say(f"OSC: {command(line)}")
    except UserError as error:
        say(f"OSC: {error}")


# -------------------------------------------------------------------------------- beats out
def beats_of(bars, bpm, seconds):
    """The beats of a stretch of music: (seconds from its start, number of the beat from 0).

    bars: how many there were before it."""
    before = bars * BEATS_A_BAR
    first = math.ceil(before - 1e-6)                        # rounding must neither lose nor repeat one
    after = math.ceil(before + seconds * bpm / 60 - 1e-6)
    return [(max(0.0, (beat - before) * 60 / bpm), beat) for beat in range(first, after)]


class Beats:
    """Sends /beat to HOST:PORT when the beat is heard, as long as a tempo is set.

    control: `live.Control`; heard: a function that gives the second of the stream that the listener is at."""

    def __init__(self, target, control, heard):
        _, udp_client = pythonosc("--osc-beats")
        host, _, port = target.rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2 ** 16:
            raise UserError(f"--osc-beats {target}: HOST:PORT was expected")
        try:
            self.client = udp_client.SimpleUDPClient(host.strip("[]"), int(port))
        except OSError as error:
            raise UserError(f"--osc-beats {target}: {reason_of(error)}") from None
        self.control = control
        self.heard = heard
        self.number = control.number                        # of the next block that will be begun
        self.waiting = deque()                              # (second of the stream, number of the beat)
        threading.Thread(target=self.watch, name="beats", daemon=True).start()

    def watch(self):
        while True:
            time.sleep(WAIT)
            with self.control.lock:
                while self.number < self.control.number:
                    self.begun(self.number)
                    self.number += 1
            while self.waiting and self.waiting[0][0] <= self.heard():
                self.send(self.waiting.popleft()[1])

    def begun(self, number):
        """Block `number` is being made, in the tempo that the control has now."""
        bars = self.control.bars(number)
        if bars is not None:
            seconds = self.control.block_seconds
            for after, beat in beats_of(bars, self.control.bpm, seconds):
                self.waiting.append((number * seconds + after, beat))

    def send(self, beat):
        try:
            self.client.send_message("/beat", [beat + 1, beat // BEATS_A_BAR + 1, beat % BEATS_A_BAR + 1])
        except OSError:    # nobody listens there, yet
            pass
