"""Anybody's recordings, read whole: a file -> pieces of sound at the model's rate.

Files are read by libsndfile and, where that fails or stops early, by ffmpeg, if it is installed. A file of
any length is decoded and resampled piece by piece, so an hour takes no more memory than a minute; the pieces
overlap by what the filter sees, so the result is that of the whole file. `read_audio` is the one way in. """
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from common import UserError

PIECE = 5                                                   # seconds of audio held and encoded at once,
LARGEST_PIECE = 2 ** 20                                     # but of many channels no more than these samples
TOLERANCE = 0.25                                            # seconds: headers promise a little too much
LOUDEST = 2.0                                               # times full scale: what mixes in float may reach
PATIENCE = 8                                                # seconds: ffmpeg looks through nonsense for ever
MOST_CHUNKS = 100_000                                       # of a WAV
MOST_MISTAKEN = 100_000                                     # a cover picture of 10 MB has 3000 "MPEG frames"


# -------------------------------------------------------------------------------- reading
class CannotRead(Exception):
    """Why one of the two readers, libsndfile and ffmpeg, does not give the whole of a file."""


class Recording(NamedTuple):
    """An open audio file. pieces: float32 arrays (n, channels) at `rate`, see `frames_of_piece`."""
    rate: int
    speakers: list                                          # what each channel is made for, a key of SIDES
    pieces: Iterator


# What each loudspeaker adds to the left and to the right side (ITU-R BS.775; the low-frequency effects
# channel is left out, as there). W, X, Y, Z are the channels of first-order ambisonics.
SIDES = {"FL": (1, 0), "FR": (0, 1), "FC": (0.7071, 0.7071), "LFE": (0, 0), "BL": (0.7071, 0),
         "BR": (0, 0.7071), "SL": (0.7071, 0), "SR": (0, 0.7071), "BC": (0.5, 0.5), "FLC": (0.9239, 0.3827),
         "FRC": (0.3827, 0.9239), "W": (0.7071, 0.7071), "X": (0, 0), "Y": (0.5, -0.5), "Z": (0, 0),
         "mono": (1, 1)}
# libsndfile's numbers of the places of channels
SNDFILE_PLACES = dict(enumerate("mono FL FR FC FL FR FC BC BL BR LFE FLC FRC SL SR".split(), start=1))
SNDFILE_PLACES |= {23: "W", 24: "X", 25: "Y", 26: "Z"}
SFC_GET_CHANNEL_MAP_INFO = 0x1100
# bits of a WAV header's channel mask
MASK_PLACES = "FL FR FC LFE BL BR FLC FRC BC SL SR".split()
# the order of channels where a file does not tell it
WAV_ORDER = {3: "FL FR FC", 4: "FL FR BL BR", 5: "FL FR FC BL BR", 6: "FL FR FC LFE BL BR",
             7: "FL FR FC LFE BC SL SR", 8: "FL FR FC LFE BL BR SL SR"}
OGG_ORDER = {3: "FL FC FR", 4: "FL FR BL BR", 5: "FL FC FR BL BR", 6: "FL FC FR BL BR LFE",
             7: "FL FC FR SL SR BC LFE", 8: "FL FC FR SL SR BL BR LFE"}


# files only: a list that names addresses must not open them
FFMPEG = "ffmpeg", "-nostdin", "-v", "error", "-protocol_whitelist", "file,pipe"


def usual_speakers(channels, order=WAV_ORDER):
    """Of more than eight channels nothing is known: all of them are heard on both sides."""
    return order[channels].split() if channels in order else ["mono"] * channels


def downmix(speakers):
    """Weights (2, channels) that make left and right; full scale in all channels stays full scale."""
    weights = torch.tensor([SIDES[speaker] for speaker in speakers], dtype=torch.float32).T
    if not weights.any():                                   # nothing but low frequencies: better than silence
        weights = torch.ones_like(weights)
    return weights / weights.abs().sum(dim=1).max().clamp(min=1)


def to_stereo(pieces, speakers):
    """Arrays (n, channels) -> tensors (2, n). One channel is doubled, two stay as they are."""
    weights = downmix(speakers) if len(speakers) > 2 else None
    for piece in pieces:
        samples = torch.from_numpy(piece.T.copy())                                          # (channels, n)
        yield samples.expand(2, -1) if weights is None else weights @ samples


def overlapped(chunks, size, margin):
    """Regroup a stream of tensors (..., n): pieces of `size`, with up to `margin` of their neighbours on both
    sides.

    Yields (piece, left, keep): its own samples are piece[..., left:left + keep]. Neighbours are missing only
    at the stream's ends, so a filter that sees no further than `margin` gives for the pieces what it gives
    for the whole."""
    held = None
    left = 0
    for chunk in chunks:
        held = chunk if held is None else torch.cat([held, chunk], dim=-1)
        while held.shape[-1] >= left + size + margin:
            yield held[..., :left + size + margin], left, size
            held = held[..., max(0, left + size - margin):]
            left = min(margin, left + size)
    while held is not None and held.shape[-1] > left:
        yield held[..., :left + size + margin], left, min(size, held.shape[-1] - left)
        held = held[..., max(0, left + size - margin):]
        left = min(margin, left + size)


def resampled(chunks, rate, new_rate, seconds=1.0):
    """A stream of (2, n) at `rate` Hz -> the same at `new_rate`: whole periods of the filter at a time, as
    many as make about so many seconds."""
    # an odd rate would need gigabytes of filters: numerator times denominator
    ratio = Fraction(rate, new_rate).limit_denominator(round(1000 * min(1, new_rate / rate) ** 0.5))
    p, q = ratio.numerator, ratio.denominator
    if p == q:
        yield from chunks
        return
    from torchaudio.transforms import Resample              # here, because importing it takes a second
    resample = Resample(p, q)
    margin = (resample.width // p + 1) * p
    size = max(1, round(seconds * rate) // p) * p
    for piece, left, keep in overlapped(chunks, size, margin):
        start = left // p * q
        yield resample(piece.contiguous())[..., start:start - (-keep * q // p)]     # up to ceil(keep * q / p)


def sndfile_speakers(f):
    """The loudspeakers that the channels of an open SoundFile are made for."""
    if f.channels <= 2:
        return usual_speakers(f.channels)
    places = soundfile._ffi.new("int[]", f.channels)        # soundfile itself does not tell channel maps
    size = soundfile._ffi.sizeof("int") * f.channels
    told = soundfile._snd.sf_command(f._file, SFC_GET_CHANNEL_MAP_INFO, places, size)
    if told and all(place in SNDFILE_PLACES for place in places):   # some AIFF files give random numbers
        return [SNDFILE_PLACES[place] for place in places]
    return usual_speakers(f.channels, OGG_ORDER if f.format == "OGG" else WAV_ORDER)


def too_short(seconds, whole):
    return f"damaged, {seconds:.1f} of {whole:.1f} s are readable"


def sndfile_reason(error):
    """What libsndfile says, in a form that helps."""
    text = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
    if "not exist" in text:                                 # it does exist: what MP3 readers say of nonsense
        text = "damaged, or of another kind than its name says"
    return text.strip(" .")


def through_sndfile(file):
    """Open a file with libsndfile -> Recording. Raises CannotRead, while it is read too."""
    try:
        f = soundfile.SoundFile(file)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a name that ends in .raw
        raise CannotRead(sndfile_reason(error)) from None
    if f.format == "RAW":                                   # anything at all whose name ends in .au
        raise CannotRead("damaged, or of another kind than its name says")
    return Recording(f.samplerate, sndfile_speakers(f), sndfile_pieces(f))


def frames_of_piece(rate, channels):
    """How much is read at once."""
    return max(1, min(PIECE * rate, LARGEST_PIECE // channels))


def sndfile_pieces(f):
    done = 0
    frames = frames_of_piece(f.samplerate, f.channels)
    with f:
        try:
            while len(piece := f.read(frames, dtype="float32", always_2d=True)):
                done += len(piece)
                yield piece
        except soundfile.SoundFileError as error:
            raise CannotRead(sndfile_reason(error)) from None
        # where others raise, Ogg readers just stop at a hole; of an MP3 the number of frames is a guess
        if f.format != "MP3" and done < f.frames - TOLERANCE * f.samplerate:
            raise CannotRead(too_short(done / f.samplerate, f.frames / f.samplerate))


def through_ffmpeg(file, options, strict):
    """Open a file with ffmpeg -> Recording. Raises CannotRead, while it is read too.

    options: of ffmpeg, for its input. strict: anything that ffmpeg complains of makes the file unreadable."""
    complaints = tempfile.TemporaryFile()
    process = subprocess.Popen(
        [*FFMPEG, *options, "-i", f"file:{file}", "-map", "0:a:0", "-f", "wav", "-c:a", "pcm_f32le",
         "-bitexact", "pipe:1"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints)
    try:
        rate, channels, mask = with_patience(process, wav_header, process.stdout)
    except struct.error:                                    # nothing, or not enough
        process.stdout.close()
        check_ffmpeg(process, complaints, strict=True)
        raise CannotRead("ffmpeg: no audio in it") from None
    places = [place for bit, place in enumerate(MASK_PLACES) if mask >> bit & 1]
    if len(places) != channels or mask >> len(MASK_PLACES):
        places = usual_speakers(channels)
    return Recording(rate, places, ffmpeg_pieces(process, complaints, rate, channels, strict))


def wav_header(stream):
    """Read a WAV stream up to its samples -> (Hz, channels, channel mask). struct.error where it ends
    before."""
    form = b""
    stream.read(12)                                         # "RIFF", size, "WAVE"
    name = b""
    while name != b"data":
        name, size = struct.unpack("<4sI", stream.read(8))
        if name == b"fmt ":
            form = stream.read(size)
        elif name != b"data":
            stream.read(size)
    channels, rate = struct.unpack_from("<HI", form, 2)
    mask, = struct.unpack_from("<I", form, 20) if len(form) >= 24 else (0,)
    return rate, channels, mask


def ffmpeg_pieces(process, complaints, rate, channels, strict):
    frame = 4 * channels                                    # bytes
    size = frames_of_piece(rate, channels) * frame
    try:
        while raw := with_patience(process, process.stdout.read, size):
            if strict and os.fstat(complaints.fileno()).st_size:
                process.kill()                              # one complaint is enough
                break
            yield np.frombuffer(raw[:len(raw) // frame * frame], "<f4").reshape(-1, channels)
        check_ffmpeg(process, complaints, strict)
    finally:                                                # the caller may have gone before the end
        process.kill()
        process.wait()
        process.stdout.close()


def with_patience(process, read, *args):
    """read(*args) of what ffmpeg writes. When that takes longer than PATIENCE seconds ffmpeg is killed, and
    CannotRead raised."""
    killed = threading.Event()

    def kill():
        killed.set()
        process.kill()
    late = threading.Timer(PATIENCE, kill)
    late.start()
    try:
        return read(*args)
    finally:
        late.cancel()
        if killed.is_set():
            process.wait()                                  # else it would stay as a zombie
            process.stdout.close()
            raise CannotRead(f"ffmpeg: no audio for {PATIENCE} s")


def check_ffmpeg(process, complaints, strict):
    """Wait for ffmpeg's end; CannotRead where it failed, or (strict) complained."""
    status = process.wait()
    complaints.seek(0)
    lines = complaints.read(10000).decode(errors="replace").splitlines()
    if status or strict and lines:
        first = re.sub(r"^\[[^]]*\] |^file:.*: ", "", lines[0]) if lines else f"ended with status {status}"
        raise CannotRead(f"ffmpeg: {first.strip(' .')}")


def open_recording(file, by_ffmpeg, length):
    """File and its Length -> Recording. Raises CannotRead."""
    if by_ffmpeg:
        recording = through_ffmpeg(file, length.options, strict=length.seconds is None)
    else:
        recording = through_sndfile(file)
    if not 1000 <= recording.rate <= 1000000:               # a damaged header
        recording.pieces.close()
        raise CannotRead(f"a sample rate of {recording.rate} Hz")
    return recording


def examine(file, by_ffmpeg, length):
    """Read a file to its end -> the factor that brings its level down to full scale, 1 where it is not far
    above.

    Raises CannotRead where the file ends early, UserError where its samples make no sense."""
    rate, speakers, pieces = open_recording(file, by_ffmpeg, length)
    frames = 0
    peak = 0.0
    loud = 0                                                # samples
    for piece in pieces:
        if not np.isfinite(piece).all():
            raise UserError(f"{file}: holds samples that are not numbers, after {frames / rate:.0f} s")
        frames += len(piece)
        peak = max(peak, float(np.abs(piece).max()))
        loud += int((np.abs(piece) > LOUDEST).sum())
    seconds = frames / rate
    if length.seconds and seconds < length.seconds - TOLERANCE:
        raise CannotRead(too_short(seconds, length.seconds))
    if not frames:
        raise CannotRead("holds no samples")
    if peak <= LOUDEST:
        return 1.0
    if peak > 100 and loud < 1e-4 * frames * len(speakers):
        raise UserError(f"{file}: damaged, a sample of {peak:.3g} times full scale among quiet ones")
    return 1 / peak


def way_in(file):
    """How to read a file whole -> (by ffmpeg?, its Length, factor to full scale). Raises UserError."""
    length = length_by_counting(file)
    try:
        return False, length, examine(file, False, length)
    except CannotRead as error:
        reason = str(error)
    if shutil.which("ffmpeg") is None:
        raise UserError(f"{file}: not readable as audio ({reason}); install ffmpeg: what libsndfile cannot "
                        "read is read through it")
    try:
        return True, length, examine(file, True, length)
    except CannotRead as error:
        if reason != str(error):
            reason += f"; {error}"
        raise UserError(f"{file}: not readable as audio ({reason})") from None


def check_file(file):
    """UserError where there is nothing to read."""
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file, or a broken link")
    try:
        str(file).encode()
        with open(file, "rb") as f:
            if not f.read(1):
                raise UserError(f"{file}: empty file")
    except UnicodeEncodeError:
        raise UserError(f"{file}: its name is not UTF-8; rename it") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be opened ({error.strerror})") from None


def read_audio(file, config):
    """File -> float32 tensors (channels, n) at the model's rate, a few seconds each.

    The file is read twice: once to see whether all of it can be read, by which reader, and how loud it is;
    then to hand it on. What libsndfile refuses or cuts short goes through ffmpeg, where that is installed.
    Surround is mixed down by its layout; a model of one channel hears the mean of both sides. A level far
    above full scale is brought down to it. That, and a file shorter than its header says, is a line on
    standard error. Raises UserError with file, reason and mend."""
    file = Path(file)
    check_file(file)
    by_ffmpeg, length, factor = way_in(file)
    if length.seconds and length.promised > length.seconds + 2 * TOLERANCE:
        tqdm.write(f"{file}: cut short, {length.seconds:.1f} s of the {length.promised:.1f} s that its "
                   "header promises", file=sys.stderr)
    if factor != 1:
        tqdm.write(f"{file}: its samples reach {1 / factor:.4g} times full scale; scaled down to that",
                   file=sys.stderr)
    try:
        rate, speakers, pieces = open_recording(file, by_ffmpeg, length)
        for audio in resampled(to_stereo(pieces, speakers), rate, config.sample_rate):
            if config.audio_channels == 1:
                audio = audio.mean(dim=0, keepdim=True)
            yield audio * factor if factor != 1 else audio
    except CannotRead as error:
        raise UserError(f"{file}: not readable as audio ({error})") from None


def read_tags(file):
    """The title and genre tags of an audio file -> {"title": bytes, "genre": bytes}, without those it
    lacks."""
    try:
        with soundfile.SoundFile(file) as f:
            found = {}
            for name in ("title", "genre"):
                # as bytes, because soundfile takes them for UTF-8, which they need not be
                text = soundfile._snd.sf_get_string(f._file, soundfile._str_types[name])
                if text:
                    found[name] = soundfile._ffi.string(text)
            return found
    except soundfile.SoundFileError:
        pass
    if shutil.which("ffmpeg") is None:
        return {}
    command = [*FFMPEG, "-i", f"file:{file}", "-f", "ffmetadata", "pipe:1"]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stdout
    lines = re.findall(rb"(?ims)^(title|genre)=((?:\\.|[^\\\n])*)", told)
    return {name.decode().lower(): re.sub(rb"\\(.)", rb"\1", text) for name, text in reversed(lines)}


# -------------------------------------------------------------------------------- how long a file is
class Length(NamedTuple):
    """How much audio a file holds.

    seconds: as counted in its bytes; None where that is not done for its kind. promised: as its header says,
    where that is more. options: what ffmpeg needs to know to read all of it."""
    seconds: float | None = None
    promised: float = 0.0
    options: tuple = ()


def length_by_counting(file):
    """File -> Length, from the bytes themselves and not from the length that the header promises."""
    with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
            return wav_length(data)
        if data[:4] == b"OggS":
            return Length(ogg_seconds(data))
        if data[:4] == b"fLaC":
            return Length(flac_seconds(data))
        if data[:3] == b"ID3" or MPEG_HEADER.match(data) or Path(file).suffix.lower() in (".mp3", ".mp2"):
            return mpeg_length(data)
    return Length()


def wav_length(data):
    """Uncompressed WAV whose header is not true: recorders that stop early leave it behind, files over 4 GiB
    cannot tell their size, and of joined files the first header speaks for itself alone."""
    at = 12
    seconds = 0.0
    bytes_per_second = 0
    for _ in range(MOST_CHUNKS):
        if at + 8 > len(data):
            break
        name, size = struct.unpack_from("<4sI", data, at)
        start, end = at + 8, at + 8 + size
        if name == b"fmt " and end <= len(data) and size >= 16:
            kind, _, _, bytes_per_second = struct.unpack_from("<HHII", data, start)
            if kind not in (1, 3, 0xFFFE) or not bytes_per_second:
                return Length()                             # compressed
        if name == b"data" and bytes_per_second:
            rest = data[end:end + 8]
            if end > len(data):                             # cut short, unless it says "of unknown length"
                promised = size / bytes_per_second if size < 0x7fff0000 else 0.0
                return Length(seconds + (len(data) - start) / bytes_per_second, promised)
            if size and (rest.startswith((b"ID3", b"TAG")) or not rest.strip(b"\0")):
                return Length(seconds + size / bytes_per_second)
            if not size or not re.match(rb"\0?[A-Za-z0-9 _]{4}", rest):    # neither a chunk nor the end
                return Length(seconds + (len(data) - start) / bytes_per_second, 0.0, ("-ignore_length", "1"))
            seconds += size / bytes_per_second
        at = at + 12 if name == b"RIFF" else end + size % 2
    return Length(seconds or None)


def ogg_seconds(data):
    """Of all streams that are joined in an Ogg file, from the time stamps of their pages; None where one is
    of an unknown kind."""
    seconds = 0.0
    rate = first = last = None
    at = 0
    while (at := data.find(b"OggS", at)) >= 0 and at + 27 <= len(data):
        flags, time = struct.unpack_from("<Bq", data, at + 5)
        lacing = data[at + 27:at + 27 + data[at + 26]]
        body = at + 27 + len(lacing)
        if flags & 2:                                       # a stream begins
            seconds += span(first, last, rate)
            first = last = None
            head = data[body:body + 64]
            if head.startswith(b"OpusHead"):
                rate = 48000
            elif head.startswith(b"\x01vorbis") and len(head) >= 16:
                rate, = struct.unpack_from("<I", head, 12)
            elif head.startswith(b"\x7fFLAC") and len(head) >= 30:
                rate = int.from_bytes(head[27:30], "big") >> 4
            else:
                return None
        elif time > 0 and rate:
            first = time if first is None else first
            last = time
        at = body + sum(lacing)
    return (seconds + span(first, last, rate)) or None


def span(first, last, rate):
    """Seconds of a stream with these first and last time stamps. One cut from a broadcast begins late."""
    if first is None or not rate:
        return 0.0
    begin = first if first > 10 * rate else 0
    return max(0, last - begin) / rate


def flac_seconds(data):
    """Of all FLAC streams that are joined in a file; None where the length of one is not written."""
    seconds = 0.0
    for header in re.finditer(rb"fLaC[\x00\x80]\x00\x00\x22", data):
        fields = int.from_bytes(data[header.end() + 10:header.end() + 18], "big")
        rate, samples = fields >> 44, fields & (1 << 36) - 1
        if not rate or not samples:
            return None
        seconds += samples / rate
    return seconds


MPEG_HEADER = re.compile(rb"\xff[\xe2-\xe7\xf2-\xff][\x10-\xef]")     # sync, version and layer, bit rate
MPEG_KBITS = {                                              # (MPEG 1?, layer) -> kbit/s by index
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


@lru_cache(maxsize=4096)
def mpeg_frame(kind, numbers):
    """The second and third byte of an MPEG audio frame's header -> its (bytes, samples, Hz), or None."""
    version, layer, bits, rate = kind >> 3 & 3, 4 - (kind >> 1 & 3), numbers >> 4, numbers >> 2 & 3
    if version == 1 or layer == 4 or bits in (0, 15) or rate == 3:
        return None
    first = version == 3                                    # MPEG 1; 2 is MPEG 2, 0 is MPEG 2.5
    hertz = (44100, 48000, 32000)[rate] // {3: 1, 2: 2, 0: 4}[version]
    samples = 384 if layer == 1 else 1152 if layer == 2 or first else 576
    slot = 4 if layer == 1 else 1                           # bytes
    kbits = MPEG_KBITS[first, layer if first else min(layer, 2)][bits]
    size = (samples // 8 * 1000 * kbits // hertz // slot + (numbers >> 1 & 1)) * slot
    return size, samples, hertz


def mpeg_length(data):
    """Count the MPEG audio frames (MP3) of a file, whatever its first frame says of their number ->
    Length."""
    seconds = 0.0
    promised = 0.0
    trimmed = 0.0                                           # what encoders add in front and behind
    at = 0
    mistaken = 0                                            # what looked like frames
    while at + 4 <= len(data) and mistaken < MOST_MISTAKEN:
        if data[at:at + 3] == b"ID3" and at + 10 <= len(data):
            a, b, c, d = data[at + 6:at + 10]
            at += 10 + (a << 21 | b << 14 | c << 7 | d)
            continue
        frame = mpeg_frame(data[at + 1], data[at + 2]) if MPEG_HEADER.match(data, at) else None
        if frame is not None and followed_by_a_frame(data, at, frame[0]):
            size, samples, hertz = frame
            if not seconds:
                promised = frames_promised(data[at:at + 64]) * samples / hertz
            seconds += samples / hertz
            trimmed = 4 * samples / hertz
            at += size
        else:
            at = next_mpeg(data, at + 1)
            mistaken += 1
    return Length(max(0.0, seconds - trimmed) or None, promised if promised > seconds else 0.0)


def followed_by_a_frame(data, at, size):
    """Whether after these bytes comes another frame of the kind, a tag or the end: else it only looked like
    one."""
    after = data[at + size:at + size + 3]
    if len(after) < 3 or after in (b"ID3", b"TAG", b"APE"):
        return True
    return after[0] == 0xff and after[1] & 0xfe == data[at + 1] & 0xfe


def next_mpeg(data, at):
    """From here on, where a frame or a tag could begin; the end of the data where none does."""
    header = MPEG_HEADER.search(data, at)
    end = header.start() if header else len(data)
    tag = data.find(b"ID3", at, end)
    return tag if tag >= 0 else end


def frames_promised(frame):
    """The number of frames that the start of a file's first one gives, 0 where it gives none."""
    mark = re.search(rb"Xing|Info", frame)
    if mark is None or len(frame) < mark.end() + 8 or not frame[mark.end() + 3] & 1:
        return 0
    return int.from_bytes(frame[mark.end() + 4:mark.end() + 8], "big")
