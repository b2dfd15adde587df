"""What the scripts share: checkpoints on disk, the device, numbers on the command line, how a script ends."""
import argparse
import contextlib
import math
import os
import sys
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


# -------------------------------------------------------------------------------- checkpoints
def writable(path):
    """Path of a file that is to be written later. UserError where it cannot be, before any work is done for
    it."""
    path = Path(path)
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"cannot write {path}: {there} is no folder that can be written in")
    return path


def write_whole(path, write):
    """write(file) to a temporary name, then rename: a killed run leaves no half file that a later one would
    trust."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_whole(content, path):
    """torch.save, the whole file or none. Raises UserError."""
    path = writable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for killed in path.parent.glob(f"{escape(path.name)}.*.part"):
            killed.unlink(missing_ok=True)
        write_whole(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:                # a full disk
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or str(error).splitlines()[0][:100]}") from None


def save(model, path, step=0, made="", dtype=None, **extra):
    """Write config, weights, stage, step and how it was made to one file, whole or not at all. extra: plain
    values.

    Raises UserError where it cannot be written, and for weights that are not finite: the file of before is
    worth more."""
    # only matrices are rounded: vectors (norms, frequencies, biases) are small and sensitive
    weights = {k: v.to("cpu", dtype if dtype and v.ndim > 1 else v.dtype) for k,
               v in model.state_dict().items()}
    judge = extra.get("discriminator", {}).get("weights", {})
    if not all(v.isfinite().all() for v in (*weights.values(), *judge.values())):
        raise UserError(f"not written: the weights are no longer finite (a lower --lr?); what {path} held before is still there")
    save_whole({"config": model.config.to_dict(), "weights": weights, "stage": model.stage,
                "sampling": model.sampling, "step": step, "made": made, **extra}, path)


def read_checkpoint(path):
    """The checkpoint as a dictionary. Raises UserError where it is missing, corrupt, or not one of ours."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        # which replaces no file that is mapped
        saved = torch.load(path, weights_only=True, map_location="cpu", mmap=os.name != "nt")
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint ({str(error).splitlines()[0][:100]})") from None
    if not isinstance(saved, dict) or not {"config", "weights", "stage"} <= set(saved):
        raise UserError(f"{path} is not a checkpoint of this project; public weights go through stable_audio_port.py first")
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
    try:
        config = Config.from_dict({**saved["config"], **overrides})
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    with torch.device("meta"), Unfilled():
        model = LMDM(config, saved["stage"], saved.get("sampling"))
    want, have = model.state_dict(), saved["weights"]
    wrong = [f"{k} missing" for k in want if k not in have] + [f"{k} unknown" for k in have if k not in want]
    wrong += [f"{k} is {tuple(have[k].shape)}, not {tuple(want[k].shape)}" for k in want
              if k in have and have[k].shape != want[k].shape]
    if wrong:
        raise UserError(f"{path} does not fit its config: {'; '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}")
    model.load_state_dict({k: v.float() for k, v in have.items()}, assign=True)
    return model.eval()


def check_streams(path, stage):
    """UserError where a checkpoint of this stage has not learned to make a block after its context."""
    if stage not in ("finetune", "arc"):
        raise UserError(f"{path} (stage {stage}) has not learned to stream: finetune it first (finetune.py --init {path})")


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
    raise UserError("no checkpoint: out/arc.pt, out/finetune.pt and nano.pt are all missing; name one with --ckpt")


# -------------------------------------------------------------------------------- the machine
def device_of(name):
    """torch.device of "cpu", "cuda", "cuda:1". Raises UserError where there is none on this machine."""
    try:
        torch.empty(0, device=name)
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("rotary angles need float64: cpu or cuda")
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # what waits for "the" GPU, or asks for its memory, means this one
        return device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0][:80]})") from None


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
    """"auto", "float32" or "bf16" -> the one to train in, and a function that makes the context manager for
    it.

    Weights and optimizer stay float32. auto is bf16 where matrix products in it are faster."""
    if name == "bf16" or name == "auto" and speed and speed.has_bf16(device):
        return "bf16", lambda: torch.autocast(device.type, torch.bfloat16)
    return "float32", contextlib.nullcontext


# -------------------------------------------------------------------------------- scripts
def positive(text):
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def finite(text):
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def whole(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
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


def whole_or_zero(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def random_seed(text):
    value = int(text)
    if not 0 <= value < 2 ** 64:                            # what random number generators take
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^64 - 1")
    return value


def discard_output():
    """What is still to be written to standard output goes nowhere, so that Python does not complain at
    exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main):
    """Run a script's main(): a UserError is one line and status 2, a closed pipe is no error, Ctrl-C is
    130."""
    # closed: what is said would go to standard output, into the music
    sys.stderr = sys.stderr or open(os.devnull, "w", errors="replace")
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                                 # the player quit
        discard_output()
    except KeyboardInterrupt:
        sys.exit(130)
