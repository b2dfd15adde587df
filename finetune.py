"""Stage 1: teach a diffusion model to continue a clean context, one block after another.

    python finetune.py --data path/to/music                       # from the shipped nano.pt, on a laptop
    python finetune.py --data path/to/music --init out/sao_small.pt --batch 32 --accumulate 8
    torchrun --nproc_per_node=2 finetune.py --data path/to/music  # two processes share each batch

Everything random in step n comes from (seed, n): a resumed run, or one on several processes, draws the same.
"""
import argparse
import contextlib
import csv
import io
import itertools
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.quasirandom import SobolEngine
from tqdm import tqdm

import data
from audio import WavWriter, decode_stream, pcm
from common import (UserError, device_of, finite, load, not_negative, positive_finite, random_seed,
                    read_checkpoint, reason_of, regime_of, run, save, speed, thread_count, training_precision,
                    uninterrupted, whole, whole_or_zero, writable, write_whole)
from model import LMDM, Cond, Numbered, add_noise, forget_t5, shift_time, velocity
from sample import stream


# -------------------------------------------------------------------------------- the loss
def block_losses(model, prompt, latents, noise, t, remat=False):
    """Mean squared error on v of the last m blocks, each at its own noise level: (B, m).

    prompt: EncodedPrompt; latents (B, C, n * block), the last m blocks to be learned; noise (B, C, m *
    block); t (B, m). One pass over [clean blocks | noisy blocks | timestep tokens]: a noisy block sees the
    clean blocks before it, never itself clean. Block-causal, this equals m passes of one block each after its
    whole history. Raises ValueError for more than one block encoder-decoder: there all clean blocks see each
    other, and through them a noisy block would see itself clean."""
    c = model.config
    m = t.shape[1]
    if m > 1 and not c.causal:
        raise ValueError(f"an encoder-decoder model learns one block of a crop, not {m}")
    n = latents.shape[-1] // c.block
    x0 = latents[..., -m * c.block:]
    level = t.repeat_interleave(c.block, dim=1)[:, None]                                # (B, 1, m * block)
    noisy = Numbered(add_noise(x0, noise, level, c.objective), tuple(range(n - m, n)))
    clean = Numbered(latents[..., :-c.block], tuple(range(n - 1)))
    v, _ = model.dit.blocks(prompt, noisy, t, clean, remat=remat)
    error = (v.float() - velocity(x0, noise, level, c.objective)).square()
    return error.unflatten(-1, (m, c.block)).mean(dim=(1, 3))


@torch.no_grad()
def validation_loss(model, tracks, texts, args, device, precision):
    """The loss on fixed crops, noise and levels, with context and prompts: comparable between steps and
    runs."""
    c = model.config
    count = args.validation_crops
    latents, prompts, absent = data.fixed_crops(tracks, c.context_blocks + args.blocks, c.block, count)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, c.channels, args.blocks * c.block, generator=generator)
    # the golden ratio's multiples are spread evenly
    u = (torch.arange(count * args.blocks) * 0.618034 + 0.5) % 1
    t = shift_time(u, c.window).reshape(count, args.blocks)
    weights = block_weights(absent, c, args.blocks)
    size = max(1, args.batch // args.accumulate)
    total = 0.0
    for start in range(0, count, size):
        rows = slice(start, start + size)
        with precision():
            prompt = model.dit.encode_prompt(condition(model, texts, prompts[rows], device))
            losses = block_losses(model, prompt, latents[rows].to(device), noise[rows].to(device),
                                  t[rows].to(device))
        total += (losses.cpu() * weights[rows]).sum().item()
    return total / weights.sum().item()


# -------------------------------------------------------------------------------- what a step draws
class Batch(NamedTuple):
    """Rows of a step's batch. B items, m blocks to learn of each."""
    latents: torch.Tensor                                   # (B, C, (context_blocks + m) * block)
    prompts: list
    noise: torch.Tensor                                     # (B, C, m * block)
    t: torch.Tensor                                         # (B, m)
    weights: torch.Tensor                                   # (B, m), adding up to 1 in each item
    with_prompt: torch.Tensor    # (B,), False where guidance's null prompt is learned


def missing_context(rng, count, config):
    """How many of the oldest context blocks are taken away from each of `count` items.

    Encoder-decoder, as in the paper: with p = 0.2 all, with p = 0.3 one to all. Block-causal: with p = 0.5
    all, so that the beginnings of streams are learned too."""
    most = config.context_blocks
    kind = rng.random(count)
    some = rng.integers(1, most + 1, count)
    if config.causal:
        return np.where(kind < 0.5, most, 0)
    return np.where(kind < 0.2, most, np.where(kind < 0.5, some, 0))


def block_weights(absent, config, blocks):
    """Weights (B, blocks): 1 / (blocks to learn) where a block is music, 0 where the track was too short.

    absent (B,): how many blocks at a crop's beginning are not there."""
    real = (torch.arange(blocks) + config.context_blocks >= absent[:, None]).float()
    return real / real.sum(1, keepdim=True).clamp(min=1)


def draw_batch(tracks, config, batch, blocks, rows, seed, step, shift=0.0):
    """The Batch of `step`, of which only `rows` (a slice): `blocks` blocks to learn in each of `batch` items.

    Everything random is drawn for the whole batch and cut afterwards, so rows do not depend on how it is
    shared."""
    c = config
    rng = np.random.default_rng([seed, step])
    positions = rng.random(batch)
    missing = missing_context(rng, batch, c)
    with_prompt = rng.random(batch) >= 0.1
    generator = torch.Generator().manual_seed(int(rng.integers(2 ** 31)))
    noise = torch.randn(batch, c.channels, blocks * c.block, generator=generator)
    u = SobolEngine(1, scramble=True, seed=int(rng.integers(2 ** 31))).draw(batch * blocks)
    u = u.reshape(batch, blocks)[:, torch.from_numpy(rng.permutation(blocks))]
    latents, prompts, absent = data.crops_at(tracks, c.context_blocks + blocks, c.block, positions[rows])
    for item, gone in zip(latents, missing[rows]):
        item[:, :gone * c.block] = 0
    return Batch(latents, prompts, noise[rows], shift_time(u, c.window, shift)[rows],
                 block_weights(absent, c, blocks), torch.from_numpy(with_prompt[rows]))


def draw_batches(tracks, config, args, micro_batches, first_step):
    """Yield the Batch of every backward pass from `first_step` on."""
    for step in range(first_step, args.steps):
        for rows in micro_batches:
            yield draw_batch(tracks, config, args.batch, args.blocks, rows, args.seed, step, args.shift)


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
    for path, new in zip(paths, kept):
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


def restore(optimizer, state, path):
    """An optimizer as a checkpoint holds it. Raises UserError."""
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer is not this model's ({reason_of(error)})") from None


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


# -------------------------------------------------------------------------------- the script
def parser():
    p = argparse.ArgumentParser(description="Finetune a model to stream, on a folder of audio.",
                                allow_abbrev=False)
    p.add_argument("--data", help="folder of audio files (needed, except with --resume)")
    p.add_argument("--out", default="out/finetune.pt")
    p.add_argument("--init", default=str(Path(__file__).parent / "nano.pt"),
                   help="checkpoint to start from; its autoencoder stays as it is")
    p.add_argument("--resume", action="store_true",
                   help="go on from --out, with its settings unless given again")
    # the stream
    p.add_argument("--causal", action=argparse.BooleanOptionalAction,
                   help="block-causal or encoder-decoder (default: the checkpoint's)")
    p.add_argument("--block", type=whole, help="frames of a block (default: the checkpoint's)")
    p.add_argument("--context-blocks", type=whole, help="blocks of context (default: the checkpoint's)")
    p.add_argument("--blocks", type=whole, default=8, help="blocks learned at once in a crop, with --causal")
    # optimization
    p.add_argument("--steps", type=whole, default=10000)
    p.add_argument("--batch", type=whole, default=16,
                   help="crops per step, over all processes and accumulations")
    p.add_argument("--accumulate", type=whole, default=1, help="backward passes per step")
    p.add_argument("--shift", type=finite, default=0.0,
                   help="how far to shift levels towards noise beyond the public models' shift")
    p.add_argument("--lr", type=positive_finite, default=5e-5)
    p.add_argument("--lr-end", type=not_negative, help="cosine to this at the last step (default: constant)")
    p.add_argument("--warmup", type=whole_or_zero, default=0, help="steps of linear warm-up")
    p.add_argument("--clip", type=not_negative, default=1.0, help="largest gradient norm, 0 for no clipping")
    p.add_argument("--seed", type=random_seed, default=0)
    # reports
    p.add_argument("--every", type=whole, default=250,
                   help="steps between validation, checkpoint and log row")
    p.add_argument("--validation-crops", type=whole, default=32)
    p.add_argument("--sample-every", type=whole_or_zero, default=1000,
                   help="steps between samples in out/samples, 0 for none")
    p.add_argument("--sample-seconds", type=positive_finite, default=10)
    # machine
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto")
    p.add_argument("--remat", action=argparse.BooleanOptionalAction, default=False,
                   help="activation checkpointing: less memory, slower")
    p.add_argument("--threads", type=thread_count, help="CPU threads (default: PyTorch's choice)")
    return p


def check_options(args):
    """UserError for options that make no sense."""
    if args.data is None:
        raise UserError("--data is missing: name a folder of audio files")
    if abs(args.shift) > 20:
        raise UserError(f"--shift {args.shift:g} leaves nothing but noise, or nothing but music: -20 to 20")
    if args.init == "none" and not args.resume:
        raise UserError("--init none: the autoencoder would be random, and whatever is learned heard as "
                        "noise; name a checkpoint with a trained one (nano.py autoencoder makes it)")


def start_model(args):
    """The model that --init and the stream's options name."""
    names = "causal", "block", "context_blocks"
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    model = load(args.init, **overrides)
    sampling = model.sampling if model.stage == "finetune" else model.sampling.get("finetuned", {})
    sampling = {**sampling, "words": model.sampling.get("words", [])}
    if model.stage == "autoencoder":                        # its other weights were never trained
        autoencoder = model.autoencoder
        model = LMDM(model.config)
        model.autoencoder = autoencoder
    model.stage = "finetune"
    model.sampling = sampling
    return model


def check_unchanged(args, saved, config):
    """UserError for options that --resume cannot change, given with another value than the run began with."""
    began_with = {**saved["args"], **config.to_dict()}
    for name in "init", "causal", "block", "context_blocks":
        now = getattr(args, name)
        then = began_with.get(name, now)
        same = now == then
        if name == "init":                                  # a path may be spelled in several ways
            same = Path(now).resolve() == Path(then).resolve()
        if now is not None and not same:
            raise UserError(f"{args.out} was begun with {name} {then}; --resume cannot change that")


def learning_rate(step, args):
    """Linear warm-up, times a cosine from --lr to --lr-end."""
    end = args.lr if args.lr_end is None else args.lr_end
    cosine = end + (args.lr - end) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    return min(1, (step + 1) / max(1, args.warmup)) * cosine


def save_state(model, optimizer, step, args, tracks):
    """The checkpoint, from which a run can also be resumed."""
    save(model, args.out, step, " ".join(["finetune.py", *sys.argv[1:]]), optimizer=optimizer.state_dict(),
         args=vars(args), tracks=tracks)


def main():
    args, saved = parse(parser(), "optimizer", "finetuning")
    check_options(args)
    rank, world, device, micro_batches = set_up(args)
    if speed and not args.remat:    # activation checkpointing is for those short of memory
        speed.keep_memory()
    model = start_model(args) if saved is None else load(args.out)
    if saved is not None:
        check_unchanged(args, saved, model.config)
    precision_name, precision = training_precision(args.precision, device)
    c = model.config
    args.blocks = args.blocks if c.causal else 1

    check_text_encoder(model)
    dataset = prepare_once(args.data, model, device, rank, world)
    texts = encode_texts(model, dataset.tracks)
    model.sampling |= dict(prompt=dataset.train[0].prompt, words=words_met(model, dataset.train))
    tracks = track_records(dataset)
    model.to(device).requires_grad_(False)

    # --- optimizer: everything but the autoencoder
    trained = [*model.dit.parameters(), *model.conditioner.parameters()]
    for p in trained:
        p.requires_grad_()
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), weight_decay=0)
    step = 0
    if saved is None:
        keep_earlier_run(args.out, rank)
    else:
        say_changes(saved.get("tracks", tracks), tracks, rank)
        restore(optimizer, saved["optimizer"], args.out)
        step = saved["step"]
        del saved                                           # twice the weights' memory
    log = None if rank else Log(args.out, ("step", "loss", "validation", "lr", "seconds"), step)
    say(rank, f"{regime_of(c)}, {millions(trained)} parameters to train; window {c.window} frames = "
        f"{c.window / c.frame_rate:.2f} s, {args.blocks} of {c.block} learned at once; "
        f"{describe_batch(args, world, device, precision_name)}; steps {step} to {args.steps}")
    if step == 0:
        at_start = validation_loss(model, dataset.validation, texts, args, device, precision)
        say(rank, f"step 0: validation {at_start:.4f}")
        if not rank:
            log.write(step=0, validation=f"{at_start:.6f}")

    # --- the loop; on a GPU the next batch is drawn while this one is learned, a CPU has no core to spare
    batches = draw_batches(dataset.train, c, args, micro_batches, step)
    if speed and device.type == "cuda":
        batches = speed.prefetch(batches)
    tokens = args.batch * ((c.context_blocks + 2 * args.blocks - 1) * c.block + args.blocks)    # of a step
    first_step = step
    learning_seconds = 0.0
    clock = time.time()
    bar = progress_bar(args.steps, step, rank)

    def stop():
        if not rank:
            save_state(model, optimizer, step, args, tracks)
        say(rank, f"\nstopped after step {step}; go on with --resume")

    with contextlib.closing(batches), training_loop(bar, world, stop):
        while step < args.steps:
            step_began = time.time()
            loss = 0.0
            for _ in micro_batches:
                batch = next(batches)
                with precision():
                    cond = condition(model, texts, batch.prompts, device, batch.with_prompt)
                    losses = block_losses(model, model.dit.encode_prompt(cond), batch.latents.to(device),
                                          batch.noise.to(device), batch.t.to(device), args.remat)
                # of this process's items, scaled so that the mean over processes is the batch's
                part = (losses * batch.weights.to(device)).sum() * world / args.batch
                part.backward()
                loss += part.detach() / world
            average_gradients(trained, world)
            if world > 1:
                dist.all_reduce(loss)
            gradient = clip_gradients(trained, args.clip)
            optimizer.param_groups[0]["lr"] = learning_rate(step, args)
            with uninterrupted():
                optimizer.step()
                step += 1
            optimizer.zero_grad(set_to_none=True)
            learning_seconds += time.time() - step_began
            bar.update()
            if step % 10 == 0:
                bar.set_postfix_str(f"loss {loss.item():.4f}, gradient {gradient.item():.2f}")

            # --- validation, checkpoint, sample
            if step % args.every == 0 or step == args.steps:
                held_out = validation_loss(model, dataset.validation, texts, args, device, precision)
                if not rank:
                    seconds = time.time() - clock
                    bar.write(f"step {step}: loss {loss.item():.4f}, validation {held_out:.4f}, "
                              f"{seconds:.0f} s", file=sys.stderr)
                    log.write(step=step, loss=f"{loss.item():.9g}", validation=f"{held_out:.9g}",
                              lr=f"{learning_rate(step - 1, args):.3g}", seconds=f"{seconds:.1f}")
                    save_state(model, optimizer, step, args, tracks)
            if args.sample_every and step % args.sample_every == 0 and not rank:
                bar.write(render_sample(model, texts, model.sampling["prompt"], args.out, step,
                                        args.sample_seconds, device, precision), file=sys.stderr)
    steps_made = step - first_step
    if not steps_made:
        say(rank, f"nothing is left to do after step {step}: --steps {args.steps}")
    say_done(rank, f"{steps_made} steps of {tokens} tokens, "
             f"{tokens * steps_made / max(1e-9, learning_seconds):.0f} tokens/s", device, args.out)


if __name__ == "__main__":
    run(main)
