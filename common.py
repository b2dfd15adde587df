"""What the scripts share: checkpoints on disk, the device, numbers on the command line, how a script ends."""
import argparse
import contextlib
import errno
import io
import math
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import zipfile
from dataclasses import fields
from glob import escape
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from model import LMDM, Config, UserError

try:
    import speed
except ModuleNotFoundError as error:    # speed.py only makes things faster: all else works without it
    if error.name != "speed":
        raise
    speed = None

PRECISIONS = "auto", "float32", "bf16", "int8"
# Ctrl-C; what `kill` and batch systems send; a terminal that is closed, which Windows does not tell
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
LARGEST = 10 ** 9                                           # of the numbers on the command line
SLOWEST, FASTEST = 20, 400                                  # beats a minute


# -------------------------------------------------------------------------------- files that are written
def writable(path):
    """Path of a file that is to be written later. Raises UserError where it cannot be, before any work is
    done for it."""
    path = Path(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is a device, not a file")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: {folder} is no folder that can be written in")
    return path


def say(text):
    """A line for people, on standard error: standard output may be the music."""
    print(text, file=sys.stderr)


class HelpWithDefaults(argparse.HelpFormatter):
    """Each option's default, where its help does not tell it already."""

    def _get_help_string(self, action):
        told = "default" in action.help or action.default in (None, argparse.SUPPRESS) or action.nargs == 0
        return action.help if told else f"{action.help} (default: %(default)s)"


def keep_inputs(output, inputs):
    """UserError where the file to be written is one of those that are read, under whatever name or link.

    inputs: {option: its path or None}."""
    for option, path in inputs.items():
        if path and os.path.exists(path) and os.path.exists(output) and os.path.samefile(path, output):
            raise UserError(f"{output} would be written over {option} {path}, which is read: name another")


@contextlib.contextmanager
def uninterrupted():
    """STOP_SIGNALS that arrive inside take effect at the end. Only the main thread receives any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived = []

    def remember(number, frame):
        arrived.append(number)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, remember)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


@uninterrupted()
def write_whole(path, write):
    """write(file) to a temporary file, then rename it: `path` holds all of the new content, or what it held
    before.

    Ctrl-C and the like wait for the end. A link stays one. Raises UserError, such as for a full disk."""
    target = Path(path).resolve()
    part = Path(f"{target}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            write(file)
        os.replace(part, target)
    except (OSError, RuntimeError) as error:                # RuntimeError: torch.save
        raise UserError(f"cannot write {path}: {reason_of(error, target)}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def reason_of(error, written=None):
    """An exception in a few words: the system's own, which torch.save hides behind another. numpy and
    libsndfile lose it; where no space is left beside the file `written`, that is it."""
    while not isinstance(error, OSError) and isinstance(error.__context__, Exception):
        error = error.__context__
    if getattr(error, "strerror", None):
        return error.strerror
    if written and shutil.disk_usage(Path(written).parent).free < 2 ** 20:
        return os.strerror(errno.ENOSPC)
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def save_whole(content, path):
    """torch.save, the whole file or none. Raises UserError."""
    path = writable(path)
    for leftover in path.parent.glob(f"{escape(path.name)}.*.part"):        # of a run that was killed
        leftover.unlink(missing_ok=True)
    write_whole(path, lambda file: torch.save(content, file))


# -------------------------------------------------------------------------------- checkpoints
@uninterrupted()
def save(model, path, step=0, made="", dtype=None, **extra):
    """Write config, weights, stage, step and how it was made to one file, whole or not at all.

    dtype: of the matrices in the file; extra: plain values. Raises UserError where the file cannot be
    written, and for weights that are not finite: the file of before is worth more."""
    weights = {}
    for name, value in model.state_dict().items():          # vectors (norms, biases) are small and sensitive
        weights[name] = value.to("cpu", dtype if dtype and value.ndim > 1 else value.dtype)
    discriminator = extra.get("discriminator", {}).get("weights", {})
    if not all(value.isfinite().all() for value in (*weights.values(), *discriminator.values())):
        raise UserError("not written: the weights are no longer finite (a lower --lr?); "
                        f"what {path} held before is still there")
    save_whole({"config": model.config.to_dict(), "weights": weights, "stage": model.stage,
                "sampling": model.sampling, "step": step, "made": made, **extra}, path)


def first_bytes(path):
    """Raises UserError where there is no file, or none that can be read."""
    if not os.path.isfile(path):
        raise UserError(f"cannot read {path}: no such file")
    try:
        with open(path, "rb") as file:
            return file.read(4096)
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from None


def is_safetensors(start):                                  # a header in JSON after its length in 8 bytes
    return start[8:9] == b"{"


def not_weights(start):
    """What a file is that was taken for weights and is not, by its first bytes, with the mend; or None."""
    if not start:
        return "is empty, thus truncated: copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer to the weights, not the weights: fetch them with git lfs pull"
    if start.lstrip()[:1] == b"<":
        return "is a web page, not weights: log in, accept the licence if there is one, download it again"
    if b'"weight_map"' in start:
        return "is the index of weights in several files: join them into one model.safetensors first"
    if start.isascii() and b" ".join(start.split()).decode().isprintable():
        return f"is text, not weights: {start[:60].decode()!r}"
    return None


def load_plain(path, own=False):
    """torch.load of tensors and plain values, never of code. Raises UserError that says what is wrong.

    own: written by `save_whole`; then the check sums are compared, and tensors read when they are used."""
    start = first_bytes(path)
    complaint = not_weights(start)
    if is_safetensors(start):
        complaint = "is a safetensors file: public weights go through stable_audio_port.py first"
    if complaint:
        raise UserError(f"{path} {complaint}")
    try:
        if own:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("its content does not fit its check sums")
        # Windows replaces no file that is mapped
        return torch.load(path, weights_only=True, map_location="cpu", mmap=own and os.name != "nt")
    except Exception as error:    # torch.load raises a dozen types for a damaged file
        reason = reason_of(error)
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if code:
        raise UserError(f"{path} is a pickle that wants to run code ({code[1]}), not only weights: refused. "
                        "Save {'state_dict': ...} alone, or unwrap it with the tools that made it")
    raise UserError(f"{path} is not a readable checkpoint: truncated or damaged ({reason})")


def read_checkpoint(path):
    """The checkpoint as a dictionary. Raises UserError where it is missing, damaged, or not one of ours."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"no checkpoint at {path}: it is a folder; public weights go through "
                        "stable_audio_port.py first")
    if not path.is_file():
        parts = [str(part) for part in path.parent.glob(f"{escape(path.name)}*.part")]
        raise UserError(f"no checkpoint at {path}"
                        + f"; not written to the end: {', '.join(parts)}" * bool(parts))
    saved = load_plain(path, own=True)
    if not isinstance(saved, dict) or not {"config", "weights", "stage"} <= set(saved):
        raise UserError(f"{path} is not a checkpoint of this project; "
                        "public weights go through stable_audio_port.py first")
    return saved


class Unfilled(TorchFunctionMode):
    """Modules made under it get no first weights: they are about to be loaded, and random numbers on "meta"
    import a compiler."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


def load(path, **overrides):
    """Read this project's checkpoint -> model in eval mode, float32, CPU. overrides: Config fields.

    Raises UserError where keys or shapes do not match, naming the first few."""
    saved = read_checkpoint(path)
    sampling = saved.get("sampling") or {}
    try:
        config = Config.from_dict({**saved["config"], **overrides})
        check_sizes(config)
        check_sampling(config, saved["stage"], sampling)
        with torch.device("meta"), Unfilled():
            model = LMDM(config, saved["stage"], sampling)
        want = model.state_dict()
        have = dict(saved["weights"])
    except (TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{path}: {reason_of(error)}") from None
    wrong = [f"{k} missing" for k in want if k not in have] + [f"{k} unknown" for k in have if k not in want]
    for name in want:
        if name in have and not is_floats(have[name]):
            wrong.append(f"{name} is no tensor of finite floats")
        elif name in have and have[name].shape != want[name].shape:
            wrong.append(f"{name} is {tuple(have[name].shape)}, not {tuple(want[name].shape)}")
    if wrong:
        more = " ..." if len(wrong) > 3 else ""
        raise UserError(f"{path} does not fit its config: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict({name: value.float() for name, value in have.items()}, assign=True)
    return model.eval()


def is_floats(value):
    """Is it a plain tensor of finite floating-point numbers?"""
    return (torch.is_tensor(value) and value.is_floating_point() and value.layout == torch.strided
            and not value.is_meta and value.float().sum().isfinite().item())


def check_sizes(config):
    """ValueError where a field of a Config that was read is not of its default's type, or out of bounds."""
    for field in fields(Config):
        value = getattr(config, field.name)
        numbers = [n for n in (value if isinstance(value, tuple) else [value]) if type(n) is int]
        least = 0 if field.default == 0 else 1
        most = 1000 if field.name == "depth" else 10 ** 9   # it would be built for ever
        if type(value) is not type(field.default) or any(not least <= n <= most for n in numbers):
            raise ValueError(f"its config says {field.name} = {value!r}")
    known = {"prompt", *(name for name, _, _ in config.numbers)}
    named = {*config.cross_ids, *config.global_ids}
    if not named <= known or not all(low < high for _, low, high in config.numbers):
        raise ValueError(f"its config says {config.numbers}, {config.cross_ids}, {config.global_ids}")


def check_sampling(config, stage, sampling):
    """ValueError where a checkpoint's stage, or what it recommends for playing, cannot be."""
    if not isinstance(stage, str) or not isinstance(sampling, dict):
        raise ValueError(f"its stage is {stage!r}, and it recommends {sampling!r} for playing")
    kinds = dict(steps=int, cfg=(int, float), sampler=str, prompt=str, words=(list, dict), finetuned=dict)
    for name in set(kinds) & set(sampling):
        if not isinstance(sampling[name], kinds[name]):
            raise ValueError(f"it recommends {name} = {sampling[name]!r} for playing")
    words = sampling.get("words", {})
    rows = words.values() if isinstance(words, dict) else []
    if not all(type(row) is int and 1 <= row <= config.text_width for row in rows):
        raise ValueError("some of its words have no row of the table")


def check_streams(path, stage):
    """UserError where a checkpoint of this stage has not learned to make a block after its context."""
    if stage not in ("finetune", "arc"):
        raise UserError(f"{path} (stage {stage}) has not learned to stream: "
                        f"finetune it first (finetune.py --init {path})")


def regime_of(config):
    """How a model's context is read, in words."""
    return "block-causal" if config.causal else "encoder-decoder"


def default_checkpoint():
    shipped = Path(__file__).with_name("nano.pt")
    if shipped.is_relative_to(Path.cwd()):                  # the shorter name
        shipped = shipped.relative_to(Path.cwd())
    for path in (Path("out/arc.pt"), Path("out/finetune.pt"), shipped):
        if path.exists():
            return path
    raise UserError("no checkpoint: out/arc.pt, out/finetune.pt and nano.pt are all missing; "
                    "name one with --ckpt")


# -------------------------------------------------------------------------------- the machine
def device_of(name):
    """torch.device of "cpu", "cuda", "cuda:1". Raises UserError where there is none on this machine."""
    try:
        torch.empty(0, device=name)
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("rotary angles need float64: cpu or cuda")
        if device.type == "cuda" and device.index is not None:
            # what waits for "the" GPU, or asks for its memory, means this one
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} cannot be used here ({reason_of(error)})") from None


def needs_speed(option):
    """UserError for an option that only speed.py can serve."""
    if speed is None:
        raise UserError(f"{option} needs speed.py, which is not beside this script")


def playing_precision(model, name):
    """Put a model that only plays from now on into the precision of this name; see `speed.to_precision`.

    Returns the one taken: float32 where there is no speed.py. Raises UserError."""
    if speed:
        return speed.to_precision(model, name)
    if name not in ("auto", "float32"):
        needs_speed(f"--precision {name}")
    return "float32"


def training_precision(name, device):
    """"auto", "float32" or "bf16" -> the one to train in, and a function that makes its context manager.

    Weights and optimizer stay float32. auto is bf16 where matrix products in it are faster."""
    if name == "bf16" or name == "auto" and speed and speed.has_bf16(device):
        return "bf16", lambda: torch.autocast(device.type, torch.bfloat16)
    return "float32", contextlib.nullcontext


# -------------------------------------------------------------------------------- numbers of the command line
def positive(text):                                         # inf too
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def finite(text):
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    if abs(value) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is beyond {LARGEST}")
    return value


def whole(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    if value > LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is more than {LARGEST}")
    return value


def positive_finite(text):
    value = finite(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def not_negative(text):
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def fraction(text):
    value = finite(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return value


def whole_or_zero(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    if value > LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is more than {LARGEST}")
    return value


def tempo(text):
    value = finite(text)
    if not SLOWEST <= value <= FASTEST:
        raise argparse.ArgumentTypeError(f"{text} beats a minute: music has {SLOWEST} to {FASTEST}")
    return value


def step_count(text):
    value = whole(text)
    if value > 10000:                                       # of denoising a block
        raise argparse.ArgumentTypeError(f"{text} is more than 10000")
    return value


def thread_count(text):
    value = whole(text)
    most = 8 * (os.cpu_count() or 1)                        # far more would wait for each other for ever
    if value > most:
        raise argparse.ArgumentTypeError(f"{text} is more than {most}, which is 8 for each CPU")
    return value


def random_seed(text):
    value = int(text)
    if not 0 <= value < 2 ** 64:                            # what random number generators take
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^64 - 1")
    return value


# -------------------------------------------------------------------------------- scripts
def discard_output():
    """What is still to be written to standard output goes nowhere, so that Python does not complain at
    exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stop(number, frame):
    """A signal that ends a script as Ctrl-C does: what was made is saved."""
    raise KeyboardInterrupt(number)


def check_values():
    """UserError for an option with the value --, which argparse takes for no value at all and passes on."""
    for argument in sys.argv[1:]:
        if re.fullmatch("--[^=]+=--", argument):
            raise UserError(f"{argument} names no value")


def leave_signals():
    """In a worker of a Pool: Ctrl-C, which reaches it too, is for the script, and that ends its workers."""
    def leave(number, frame):
        signal.signal(number, signal.SIG_IGN)               # a second one would come in the middle of leaving
        sys.exit(128 + number)                              # killed, it would keep the queue locked
    for number in STOP_SIGNALS:
        signal.signal(number, leave if number == signal.SIGTERM else signal.SIG_IGN)


def is_out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def run(main):
    """Run a script's main(). A UserError, or the system's (a full disk), is one line and status 2; a closed
    pipe is no error; Ctrl-C is status 130, SIGTERM 143."""
    # closed: what is said would go to standard output, into the music
    sys.stderr = sys.stderr or open(os.devnull, "w", errors="replace")
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")   # prompts and names that a terminal cannot show
    taken = [number for number in STOP_SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        check_values()
        main()
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        fail(error)
    except BrokenPipeError:                                 # the player quit
        discard_output()
    except OSError as error:
        fail(f"{error.filename}: {reason_of(error)}" if error.filename else reason_of(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail(f"out of memory: {reason_of(error)}")
    except KeyboardInterrupt as interrupt:
        sys.exit(128 + (interrupt.args or [signal.SIGINT])[0])
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def fail(reason):
    """Print the reason in one line and exit with status 2."""
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(2)
