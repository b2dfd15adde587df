"""What the two trainings share: prompts, several processes, a run's log and files, how its loop ends."""
import contextlib
import csv
import io
import itertools
import math
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
from audio import WavWriter, decode_stream, pcm
from common import (UserError, device_of, read_checkpoint, reason_of, uninterrupted, writable, write_whole)
from model import Cond, forget_t5
from sample import stream


# -------------------------------------------------------------------------------- prompts
@torch.no_grad()
def check_text_encoder(model):
    """UserError where a frozen text encoder (T5) cannot be used: before hours of encoding, not after."""
    if not model.conditioner.text_encoder.trains:
        model.conditioner.embed_text([""])


def encode_texts(model, tracks):
    """{prompt: embedding} where the text encoder is frozen (T5), None where it is trained with the DiT."""
    if model.conditioner.text_encoder.trains:
        return None
    prompts = sorted({track.prompt for track in tracks})
    with torch.no_grad():
        embeddings = model.conditioner.embed_text(prompts)
    forget_t5()                                             # training needs the memory
    return dict(zip(prompts, embeddings))


def condition(model, texts, prompts, device, with_prompt=None, frames=None):
    """Cond of a batch of prompts. texts: what `encode_texts` returned.

    with_prompt (B,): where False, the tokens are zero, as guidance's null prompt has them (default: nowhere).
    frames: length of what is denoised (default: the stream's window)."""
    text = prompts if texts is None else torch.stack([texts[p] for p in prompts]).to(device)
    cond = model.conditioner(text, **model.config.numbers_for(frames or model.config.window))
    if with_prompt is None:
        return cond
    return Cond(cond.tokens * with_prompt.to(device)[:, None, None], cond.global_)


def words_met(model, tracks):
    """{word: its row} of a trained text encoder, these tracks' words included: see `Words.learn`.

    The vectors of all other words are still random. A frozen encoder knows all words, and none are listed."""
    encoder = model.conditioner.text_encoder
    if encoder.trains:
        return encoder.learn([track.prompt for track in tracks])
    return model.sampling.get("words", [])


# -------------------------------------------------------------------------------- several processes
def start_processes(device):
    """(rank, world, device) of this process: one of several, or the only one. Raises UserError."""
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1, device_of(device)
    names = ["RANK", "WORLD_SIZE", "MASTER_PORT"]           # torchrun sets them
    if device.startswith("cuda"):
        names += ["LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    wrong = [name for name in names if not os.environ.get(name, "").isdigit()]
    if wrong:
        raise UserError(f"the environment names several processes, but {', '.join(wrong)} is no number: "
                        "start with torchrun, or unset RANK and WORLD_SIZE")
    if device.startswith("cuda"):
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise UserError(f"more processes than GPUs: --nproc_per_node={torch.cuda.device_count()}, or "
                            "--device cpu")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = device_of(device)
    try:
        # the others wait while the first encodes the audio, which may take hours
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes cannot be joined ({reason_of(error)}): "
                        "start them with torchrun") from None
    return dist.get_rank(), dist.get_world_size(), device


def micro_rows(batch, accumulate, world, rank):
    """The slices of a batch that this process works through, one backward pass each. Raises UserError."""
    if batch % (accumulate * world):
        raise UserError(f"--batch {batch} does not divide into {accumulate} accumulations x {world} "
                        "processes")
    size = batch // (accumulate * world)
    starts = [(i * world + rank) * size for i in range(accumulate)]
    return [slice(start, start + size) for start in starts]


def prepare_once(folder, model, device, rank, world):
    """`data.prepare`: the first process encodes, the others wait and then find it done."""
    if rank:
        dist.barrier()
    dataset = data.prepare(folder, model, device=device, quiet=rank > 0)
    if world > 1 and not rank:
        dist.barrier()
    return dataset


def average_gradients(parameters, world):
    """Mean of all processes' gradients, in one message."""
    if world == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients]) / world
    dist.all_reduce(flat)
    for p, g in zip(parameters, flat.split([g.numel() for g in gradients])):
        p.grad = g.view_as(p)


# -------------------------------------------------------------------------------- records
class Log:
    """A CSV file beside the checkpoint, written row by row."""

    def __init__(self, out, columns, step):
        """out: the checkpoint; step: 0 for a new run, else the one resumed from: later rows are dropped,
        since the run will write them again. Raises UserError, as `write` does."""
        self.path = log_of(out)
        self.columns = columns
        rows = []
        damaged = 0
        with unwritable(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if step and self.path.exists():
                rows, damaged = read_log(self.path, columns)
            if damaged:
                kept, = set_aside(self.path)
                print(f"{damaged} lines of {self.path} cannot be read and are left out; as it was it is kept "
                      f"as {kept}", file=sys.stderr)
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(row for row in rows if row["step"] <= step)
            if rows:                                        # hours of them: write all or none
                write_whole(self.path, lambda file: file.write(text.getvalue().encode()))
            else:
                self.path.write_text(text.getvalue(), newline="")

    def write(self, **row):
        with unwritable(self.path), open(self.path, "a", newline="") as f:
            csv.DictWriter(f, self.columns, restval="").writerow(row)


@contextlib.contextmanager
def unwritable(path):
    """An OSError in this block, such as a full disk, becomes a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason_of(error)}") from None


def read_log(path, columns):
    """The rows of a log, step as an int, and how many lines are no rows: after a spreadsheet, or a power cut.

    Other separators with decimal commas, other orders of columns and a byte order mark are understood."""
    text = path.read_bytes().decode("utf-8-sig", "replace").replace("\0", "\ufffd")
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    separator = max(",;\t", key=lines[0].count)
    rows = []
    try:
        names, *cells = csv.reader(lines, delimiter=separator)
    except csv.Error:
        return [], len(lines)
    for values in cells:
        if len(values) < len(names):                        # a full disk takes the beginning of a row
            continue
        if separator != ",":
            values = [value.replace(",", ".") for value in values]
        row = {name: "" for name in columns} | {k: v for k, v in zip(names, values) if k in columns}
        with contextlib.suppress(ValueError, OverflowError):
            for name, value in row.items():
                if value and name != "phase":
                    float(value)
            row["step"] = int(float(row["step"]))
            rows.append(row)
    return rows, len(cells) - len(rows)


def stem_of(out):
    """A checkpoint's name without .pt: what follows another dot (lr0.1) is part of the name."""
    return Path(out).name.removesuffix(".pt")


def log_of(out):
    """Where the log of a checkpoint lies."""
    return Path(out).with_name(stem_of(out) + ".csv")


def set_aside(*paths):
    """Rename the files that exist to NAME.before.pt, or NAME.before2.pt and so on where there is one already.

    All get the same number. Returns the new paths."""
    paths = [Path(path) for path in paths if os.path.lexists(path)]
    for number in itertools.count(1):
        mark = f".before{number if number > 1 else ''}"
        kept = []
        for path in paths:
            ending = path.suffix if path.suffix in (".pt", ".csv") else ""
            kept.append(path.with_name(path.name.removesuffix(ending) + mark + ending))
        if not any(map(os.path.lexists, kept)):
            break
    for path, new in reversed([*zip(paths, kept)]):         # the checkpoint, by which a run is noticed, last
        path.rename(new)
    return kept


def keep_earlier_run(out, rank):
    """Where a new run would overwrite the checkpoint of an earlier one, keep that and its log."""
    if rank or not os.path.lexists(out):
        return
    with unwritable(out):
        kept = " and ".join(map(str, set_aside(out, log_of(out))))
    say(rank, f"{out} is there already and is kept as {kept} (--resume would go on from it)")


def track_records(dataset):
    """{name: [frames, prompt, held out?, deviation of some latents]}, by which a changed folder is noticed.

    The deviation and not the bytes: another machine makes slightly other latents of the same audio."""
    held_out = {track.name for track in dataset.validation}
    records = {}
    for track in dataset.tracks:
        some = track.latents[::max(1, track.frames // 100)].astype(np.float32)      # (n, C)
        deviation = float(some.std(axis=0).mean())
        records[track.name] = [track.frames, track.prompt, track.name in held_out, deviation]
    return records


def say_changes(before, now, rank):
    """Name the tracks by which two results of `track_records` differ."""
    both = before.keys() & now.keys()
    changed = {name for name in both if before[name][:3] != now[name][:3]
               or not math.isclose(before[name][3], now[name][3], rel_tol=0.01)}
    parts = []
    for kind, names in (("added", now.keys() - both), ("removed", before.keys() - both),
                        ("changed", changed)):
        if names:
            parts.append(f"{len(names)} {kind} ({', '.join(sorted(names)[:5])}{', ...' * (len(names) > 5)})")
    if parts:
        say(rank, f"the data is not what it was when the checkpoint was written: {'; '.join(parts)}; "
            "training goes on with what is there now")


def render_sample(model, texts, prompt, out, number, seconds, device, precision):
    """Write a short stream, played as the checkpoint `out` would play it, to samples/ beside it.

    Returns a line that says where it is. One that cannot be written is no reason to end a training."""
    c = model.config
    blocks = math.ceil(seconds * c.frame_rate / c.block)
    with precision(), torch.no_grad():
        cond = condition(model, texts, [prompt], device)
        latents = [z.float() for z in stream(model, cond, blocks=blocks)]
    path = Path(out).parent / "samples" / f"{stem_of(out)}_{number}.wav"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as f:
            writer = WavWriter(f, c.sample_rate, c.audio_channels)
            for audio in decode_stream(model.autoencoder, latents):
                writer.write(pcm(audio))
            writer.close()
    except OSError as error:
        return f"warning: no sample, {path} cannot be written ({error.strerror})"
    return f"-> {path}"


def peak_memory(device):
    """The most memory that this process has held so far, in words: the GPU's where it trains on one."""
    if device.type == "cuda":
        return f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU"
    try:
        import resource
    except ImportError:                                     # Windows
        return "peak memory not known here"
    unit = 1 if sys.platform == "darwin" else 1024          # of ru_maxrss, in bytes
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def millions(parameters):
    return f"{sum(p.numel() for p in parameters) / 1e6:.1f} M"


# -------------------------------------------------------------------------------- what both scripts share
def parse(p, needs, training):
    """Arguments of the parser p; with --resume the ones not given are those of the run to be resumed.

    needs: what the checkpoint to resume must hold; training: its name in words. Returns (args, checkpoint or
    None). Raises UserError."""
    args = p.parse_args()
    if not args.resume:
        return args, None
    saved = read_checkpoint(args.out)
    if "args" not in saved:
        raise UserError(f"{args.out} holds no training to resume")
    p.set_defaults(**{**saved["args"], "out": args.out})    # the file may have been moved
    args = p.parse_args()
    if needs not in saved:
        raise UserError(f"{args.out} holds no {training} to resume")
    return args, saved


def set_up(args):
    """Threads, processes, device and random numbers, and what would only fail later: --out, --batch.

    Returns (rank, world, device, this process's slices of a batch). Raises UserError."""
    writable(args.out)
    torch.set_flush_denormal(True)
    if args.threads:
        torch.set_num_threads(args.threads)
    rank, world, device = start_processes(args.device)
    micro_batches = micro_rows(args.batch, args.accumulate, world, rank)
    torch.manual_seed(args.seed)                            # for weights that start at random
    return rank, world, device, micro_batches


def restore(optimizers, states, path):
    """Optimizers as a checkpoint holds them. Raises UserError."""
    states = states if isinstance(states, list) else [states]           # as older checkpoints hold one
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer is not this model's ({reason_of(error)})") from None


class Average:
    """A running average of weights: less noisy than the last ones, so it is what is played and saved."""

    def __init__(self, parameters, keep):
        """keep: the share of the average that stays each step; 0: there is none, but the last weights."""
        self.parameters = parameters
        self.keep = keep
        self.steps = 0
        self.values = [p.detach().clone() for p in parameters] if keep else []
        self.in_model = False                               # has the model the average for its weights?

    @torch.no_grad()
    def update(self):
        """Call it after each step. The first ones, soon outdated, count less."""
        self.steps += 1
        if self.keep:
            share = min(self.keep, self.steps / (self.steps + 10))
            torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - share)

    @contextlib.contextmanager
    def in_place(self):
        """Inside, the model has the average for its weights. Gives the last ones, a list, empty without an
        average."""
        try:
            self.exchange(True)
            yield self.values
        finally:
            self.exchange(False)

    @torch.no_grad()
    def exchange(self, in_model):
        """Give the model the average (True) or its last weights (False).

        Nothing is done where it has them already: Ctrl-C may have come before the exchange, or after it."""
        with uninterrupted():
            if self.in_model == in_model:
                return
            for p, value in zip(self.parameters, self.values):
                kept = p.clone()
                p.copy_(value)
                value.copy_(kept)
            self.in_model = in_model

    def restore(self, last, steps):
        """Of a run that goes on: the model holds the average, `last` the weights to train on, if any."""
        self.steps = steps
        self.in_model = bool(last)
        for value, weight in zip(self.values, last or []):
            value.copy_(weight)
        self.exchange(False)


def clip_gradients(parameters, most):
    """Scale gradients to a norm of at most `most`, where that is not 0. Returns the norm from before."""
    return nn.utils.clip_grad_norm_(parameters, most or math.inf)


def say(rank, text):
    """A line on standard error, from the first process."""
    if not rank:
        print(text, file=sys.stderr)


def progress_bar(total, done, rank):
    """tqdm's bar, in the first process, where standard error is a terminal."""
    return tqdm(total=total, initial=done, file=sys.stderr, disable=True if rank else None)


def describe_batch(args, world, device, precision_name):
    size = args.batch // world // args.accumulate
    return (f"batch {args.batch} = {world} processes x {args.accumulate} x {size}; {device.type}, "
            f"{precision_name}")


@contextlib.contextmanager
def training_loop(bar, world, stop):
    """Around the loop over steps. On Ctrl-C or SIGTERM stop() saves what was learned; at the end all
    processes leave together."""
    try:
        yield
    except KeyboardInterrupt:
        with uninterrupted():                               # by the impatient second Ctrl-C
            stop()
        raise
    else:
        if world > 1:
            dist.barrier()                                  # nobody leaves while another still sends
    finally:
        bar.close()
        if world > 1:
            dist.destroy_process_group()


def say_done(rank, summary, device, out):
    """The closing lines of a training."""
    say(rank, f"{summary}, {peak_memory(device)}")
    say(rank, f"-> {out}; hear it with: python sample.py --ckpt {out} > out.wav")
