"""What a line says that is typed, planned or sent: one small grammar of prompts and settings over time.

The same lines are typed, stand in schedule files, and come from the command line, a web page, OSC or Python:

    line     [@TIME] COMMAND        TIME: of the stream, 20, 20.5, 1:05 or 1:00:05; without it the next block
    COMMAND  PROMPT                 slow piano
             MIX                    house:0.7 + reggae:0.3       weights are divided by their sum
             MIX ~ SECONDS          slow piano ~ 8               a morph over so many seconds
             /bpm 92     /bpm off   the beat (models that can be told one); where each frame is told its place
                                    in the bar, a prompt with "92 bpm" in it says so too
             /cfg 4                 guidance; 1 for none
             /steps 8               denoising steps of a block
             /forget 3              blocks of the past that are dropped when the heaviest prompt changes
             /sketch FILE [pitch|level|both] [UNTIL]     /sketch off      what is played, given by a recording
             /chords Am F C G       /chords off          a bar each, over and over
             /stop                  one more block, which fades out

Double quotes protect + : ~ @ / inside a prompt. A colon before a space is part of the prompt. In files, #
after a space or at a line's start begins a comment. What a line changes is heard from the first block that
begins at TIME or later, so the same lines at the same stream times give the same samples, however they came.

What comes of the lines while a stream plays: live.py. """
import re
import unicodedata
from typing import NamedTuple

from common import FASTEST, SLOWEST, UserError
from controls import GIVES, chord_notes

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)
TIME = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+\.?\d*|\.\d+)$")
LARGEST = 10 ** 6                                           # of all numbers in a line


class Mix(NamedTuple):
    """Prompts and their weights, which add up to 1, and over how many seconds to get there."""
    weights: dict
    seconds: float


class Setting(NamedTuple):
    name: str
    value: object


class Line(NamedTuple):
    """time: seconds of the stream, or None for as soon as possible; command: Mix or Setting; text: as
    written."""
    time: float
    command: object
    text: str

    def sets(self, *names):
        """Is it one of these settings?"""
        return isinstance(self.command, Setting) and self.command.name in names


def wrong(at, expected):
    """The error for what stands at this index of a line."""
    return UserError(f"column {at + 1}: {expected}")


def number(text, at, what, least=0.0, most=LARGEST):
    """The number that stands at index `at`. Raises UserError."""
    lead = len(text) - len(text.lstrip())
    text = text.strip()
    if not NUMBER.match(text):
        raise wrong(at + lead, f"{what} was expected, not {text!r}" if text else f"{what} was expected")
    if not least <= float(text) <= most:
        raise wrong(at + lead, f"{what} from {least:g} to {most:g} was expected, not {text}")
    return float(text)


def whole(text, at, what, least, most):
    value = number(text, at, what, least, most)
    if value != int(value):
        raise wrong(at, f"{what} was expected, a whole number, not {text}")
    return int(value)


def seconds_of(text, at=0):
    """20, 1:05 or 1:00:05 -> seconds. Raises UserError."""
    found = TIME.match(text)
    if not found or float(found[3]) >= 60 and ":" in text:
        raise wrong(at, f"a time such as 20 or 1:05 was expected after @, not {text!r}")
    hours, minutes = (int(n or 0) for n in found.groups()[:2])
    seconds = 3600 * hours + 60 * minutes + float(found[3])
    if seconds > LARGEST:
        raise wrong(at, f"a time up to {LARGEST} s was expected, not {text!r}")
    return seconds


def clock_of(seconds):
    """65 -> 1:05."""
    seconds = round(seconds, 3)
    whole_seconds = f"{seconds % 60:06.3f}".rstrip("0").rstrip(".")
    return f"{int(seconds // 60)}:{whole_seconds}"


def parse_line(text):
    """Text -> Line. Raises UserError that names the column, counted from 1, and what was expected there."""
    for at, letter in enumerate(text):
        if unicodedata.category(letter) == "Cc" and letter != "\t":
            raise wrong(at, "a letter was expected, not a control character")
    at = len(text) - len(text.lstrip())
    moment = None
    if text[at:at + 1] == "@":
        word = re.compile(r"@(\S*)").match(text, at)
        moment = seconds_of(word[1], at + 1)
        at = word.end()
        at += len(text[at:]) - len(text[at:].lstrip())
    if at >= len(text.rstrip()):
        raise wrong(at, "a prompt or a /command was expected")
    if text[at] == "@":
        raise wrong(at, "a prompt or a /command was expected, not a second time")
    command = parse_setting(text, at) if text[at] == "/" else parse_mix(text, at)
    return Line(moment, command, text[at:].strip())


def parse_untimed(text):
    """`parse_line` of what has its time from elsewhere. Raises UserError."""
    line = parse_line(text)
    if line.time is not None:
        raise wrong(text.index("@"), "a prompt or a /command was expected, not a time")
    return line


def without_quoted(text):
    """The text with every quoted stretch replaced by as many zero characters. Raises UserError."""
    hidden = re.sub(r'"[^"]*"', lambda quoted: "\0" * len(quoted[0]), text)
    if '"' in hidden:
        raise wrong(hidden.index('"'), "this quotation mark has no partner")
    return hidden


def parse_mix(text, at=0):
    """Weighted prompts from index `at` on -> Mix. Raises UserError."""
    hidden = without_quoted(text)
    end = hidden.find("~", at)
    seconds = 0.0
    if end < 0:
        end = len(text)
    else:
        seconds = number(text[end + 1:], end + 1, "a number of seconds")
    weights = {}
    while at <= end:
        plus = hidden.find("+", at, end)
        plus = end if plus < 0 else plus
        prompt, weight = parse_part(text[:plus], hidden[:plus], at)
        weights[prompt] = weights.get(prompt, 0.0) + weight
        at = plus + 1
    total = sum(weights.values())
    if not total:
        raise wrong(end - 1, "a weight above 0 was expected")
    return Mix({prompt: weight / total for prompt, weight in weights.items() if weight}, seconds)


def parse_part(text, hidden, at):
    """PROMPT or PROMPT:WEIGHT from index `at` to the end -> both. hidden: `without_quoted` text."""
    colon = hidden.rfind(":", at)
    prompt = text[at:]
    weight = 1.0
    if colon >= 0:
        after = text[colon + 1:]
        if NUMBER.match(after.strip()):
            weight = number(after, colon + 1, "a weight")
            prompt = text[at:colon]
        elif not after[:1].isspace() or not after.strip():
            raise wrong(colon + 1, "a weight such as 0.7 was expected after the colon "
                                   "(put quotes around a prompt with a colon)")
    prompt = " ".join(prompt.replace('"', " ").split())
    if not prompt:
        raise wrong(min(at, len(text)), "a prompt was expected")
    return prompt, weight


def parse_setting(text, at=0):
    """/NAME VALUE ... from index `at` on -> Setting. Raises UserError."""
    words = words_at(text, at)
    name = words[0][0][1:].lower()
    values = words[1:]
    end = len(text.rstrip())
    value, value_at = values[0] if values else ("", end)
    most = 1                                                # values
    if name == "stop":
        most = 0
        setting = Setting(name, None)
    elif name == "bpm":
        off = value == "off"
        setting = Setting(name, None if off else number(value, value_at, "a tempo, or off,", SLOWEST,
                                                    FASTEST))
    elif name == "cfg":
        setting = Setting(name, number(value, value_at, "guidance", -100, 100))
    elif name == "steps":
        setting = Setting(name, whole(value, value_at, "a number of steps", 1, 10000))
    elif name == "forget":
        setting = Setting(name, whole(value, value_at, "a number of blocks", 0, 10000))
    elif name == "sketch":
        most = 3
        setting = Setting(name, sketch_values(values, end))
    elif name == "chords":
        most = len(values)
        setting = Setting(name, chord_values(values, end))
    else:
        raise wrong(at, "/bpm, /cfg, /steps, /forget, /sketch, /chords or /stop was expected, "
                        f"not {words[0][0]!r}")
    if len(values) > most:
        raise wrong(values[most][1], f"nothing more was expected after /{name}")
    return setting


def words_at(text, at=0):
    """[(word, its index)] from index `at` on, quotes taken off. Raises UserError."""
    without_quoted(text)
    return [(word[0].replace('"', ""), word.start())
            for word in re.compile(r'(?:"[^"]*"|[^\s"])+').finditer(text, at)]


def sketch_values(values, end):
    """Words after /sketch, each with its index -> (file, what is given, until), or None for off."""
    if not values:
        raise wrong(end, "an audio file, or off, was expected")
    file, _ = values[0]
    if file == "off":
        if len(values) > 1:
            raise wrong(values[1][1], "nothing more was expected after off")
        return None
    what = "both"
    rest = values[1:]
    if rest and rest[0][0] in GIVES:
        what = rest[0][0]
        rest = rest[1:]
    until = 0.0
    if rest:
        until = number(*rest[0], "pitch, level or both, or a noise level", 0, 1)
    if len(rest) > 1:
        raise wrong(rest[1][1], "nothing more was expected after /sketch")
    return file, what, until


def chord_values(values, end):
    """Words after /chords, each with its index -> their names, or None for off."""
    if not values:
        raise wrong(end, "chords such as Am F C G, or off, were expected")
    if values[0][0] == "off":
        if len(values) > 1:
            raise wrong(values[1][1], "nothing more was expected after off")
        return None
    for name, at in values:
        if chord_notes(name) is None:
            raise wrong(at, f"a chord such as Am, F#m7 or Gsus4 was expected, not {name!r}")
    return tuple(name for name, _ in values)


def parse_chords(text):
    """"Am F C G" -> their names. Raises UserError."""
    return chord_values(words_at(text), len(text.rstrip()))


def read_schedule(path):
    """A file of lines -> list of Line. Raises UserError with the line's number and the column."""
    try:
        with open(path, encoding="utf-8-sig") as file:      # some editors begin with a byte order mark
            rows = file.read().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the schedule {path}: "
                        f"{getattr(error, 'strerror', None) or 'not text in UTF-8'}") from None
    lines = []
    for row, text in enumerate(rows, start=1):
        text = re.sub(r"(^|\s)#.*", "", text)
        if not text.strip():
            continue
        try:
            lines.append(parse_line(text))
        except UserError as error:
            raise UserError(f"{path}, line {row}, {error}") from None
    return lines
