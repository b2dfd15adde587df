"""Stage 1: teach a diffusion model to go on from clean context, one block after another (the paper, section 3).

    python finetune.py --data path/to/music                       # from the shipped nano.pt, on a laptop
    python finetune.py --data path/to/music --init out/sao_small.pt --batch 32 --accumulate 8
    torchrun --nproc_per_node=2 finetune.py --data path/to/music  # data parallel: the same batch, shared out

Everything random in step n comes from (seed, n): a resumed run, and one shared by several processes, draws the same.
"""
import argparse
import csv
import math
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.quasirandom import SobolEngine
from tqdm import tqdm

import data
from audio import WavWriter, decode_stream, pcm
from common import (UserError, device_of, load, random_seed, read_checkpoint, run, save, speed, training_precision, whole,
                    writable)
from model import LMDM, PRESETS, Cond, Numbered, add_noise, forget_t5, shift_time, velocity
from sample import stream


# -------------------------------------------------------------------------------- the loss
def block_losses(model, prompt, latents, noise, t, remat=False):
    """Mean squared error on v of the last m blocks of latents (B, C, n * block), each at its own level t (B, m).

    One pass over [clean blocks | noisy blocks | timestep tokens]: noisy block i sees the clean blocks before it, never
    itself clean. Block-causal: equal to taking the m blocks one by one with their whole history. Returns (B, m)."""
    c, m = model.config, t.shape[1]
    n = latents.shape[-1] // c.block
    x0 = latents[..., -m * c.block:]
    level = t.repeat_interleave(c.block, dim=1)[:, None]                                    # (B, 1, m * block)
    noisy = Numbered(add_noise(x0, noise, level, c.objective), tuple(range(n - m, n)))
    clean = Numbered(latents[..., :-c.block], tuple(range(n - 1)))
    v, _ = model.dit.blocks(prompt, noisy, t, clean, remat=remat)
    error = (v.float() - velocity(x0, noise, level, c.objective)).square()
    return error.unflatten(-1, (m, c.block)).mean(dim=(1, 3))


def missing_context(rng, count, config):
    """How many of the oldest context blocks to take away from each of `count` items.

    Encoder-decoder, as the paper: p = 0.2 all, p = 0.3 one to all. Block-causal: half start as a stream starts."""
    c, kind, some = config.context_blocks, rng.random(count), rng.integers(1, config.context_blocks + 1, count)
    if config.causal:
        return np.where(kind < 0.5, c, 0)
    return np.where(kind < 0.2, c, np.where(kind < 0.5, some, 0))


def draw_batch(tracks, config, batch, blocks, rows, seed, step, shift=0.0):
    """Rows (a slice) of the batch of `step`: latents, prompts, noise, levels, weights of blocks, who keeps the prompt.

    latents (B, C, (context_blocks + blocks) * block), the last `blocks` to be learned, noise of those, t (B, blocks)."""
    rng, c = np.random.default_rng([seed, step]), config
    positions, missing, kept = rng.random(batch), missing_context(rng, batch, c), rng.random(batch) >= 0.1
    generator = torch.Generator().manual_seed(int(rng.integers(2 ** 31)))
    noise = torch.randn(batch, c.channels, blocks * c.block, generator=generator)
    t = SobolEngine(1, scramble=True, seed=int(rng.integers(2 ** 31))).draw(batch * blocks).reshape(batch, blocks)
    t = t[:, torch.from_numpy(rng.permutation(blocks))]
    latents, prompts, absent = data.crops_at(tracks, c.context_blocks + blocks, c.block, positions[rows])
    for item, gone in zip(latents, missing[rows]):
        item[:, :gone * c.block] = 0
    return latents, prompts, noise[rows], shift_time(t, c.window, shift)[rows], block_weights(absent, c, blocks), torch.from_numpy(kept[rows])


def block_weights(absent, config, blocks):
    """1 / (blocks to learn) for each block of an item that is music, 0 where the track was too short: (B, blocks)."""
    real = (torch.arange(blocks) + config.context_blocks >= absent[:, None]).float()
    return real / real.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def validation_loss(model, tracks, texts, args, device, precision):
    """The loss on fixed crops, noise and levels, with context and prompts: comparable between steps and runs."""
    c, blocks, count = model.config, args.blocks, args.validation_crops
    latents, prompts, absent = data.fixed_crops(tracks, c.context_blocks + blocks, c.block, count)
    noise = torch.randn(count, c.channels, blocks * c.block, generator=torch.Generator().manual_seed(0))
    t = shift_time((torch.arange(count * blocks) * 0.618034 + 0.5) % 1, c.window).reshape(count, blocks)
    weights, total, size = block_weights(absent, c, blocks), 0.0, max(1, args.batch // args.accumulate)
    for rows in (slice(i, i + size) for i in range(0, count, size)):
        with precision():
            prompt = model.dit.encode_prompt(condition(model, texts, prompts[rows], device))
            loss = block_losses(model, prompt, *(y[rows].to(device) for y in (latents, noise, t)))
        total += (loss.cpu() * weights[rows]).sum().item()
    return total / (weights.sum().item())


# -------------------------------------------------------------------------------- prompts
def encode_texts(model, tracks):
    """Where prompts go through T5: {prompt: embedding}, made once. The word table is trained, so it is asked each step."""
    if model.conditioner.text_encoder.trains:
        return None
    prompts = sorted({t.prompt for t in tracks})
    with torch.no_grad():
        embeddings = model.conditioner.embed_text(prompts)
    forget_t5()                                             # its memory is better used in training
    return dict(zip(prompts, embeddings))


def condition(model, texts, prompts, device, kept=None, frames=None):
    """Cond of a batch of prompts; where `kept` is False the tokens are zero, which is what guidance leaves out.

    frames: length of what is denoised (default: the stream's window)."""
    text = prompts if texts is None else torch.stack([texts[p] for p in prompts]).to(device)
    cond = model.conditioner(text, **model.config.numbers_for(frames or model.config.window))
    return cond if kept is None else Cond(cond.tokens * kept.to(device)[:, None, None], cond.global_)


# -------------------------------------------------------------------------------- machine
def start_processes(device):
    """(rank, world, device) of this process: torchrun's, or the only one. Raises UserError."""
    if "RANK" not in os.environ:
        return 0, 1, device_of(device)
    if device.startswith("cuda"):
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise UserError(f"more processes than GPUs: --nproc_per_node={torch.cuda.device_count()}, or --device cpu")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = device_of(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))    # one may encode for hours
    return dist.get_rank(), dist.get_world_size(), device


def prepare_once(folder, model, device, rank, world):
    """`data.prepare`: the first process encodes, the others then find it done."""
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
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in grads]) / world
    dist.all_reduce(flat)
    for p, g in zip(parameters, flat.split([g.numel() for g in grads])):
        p.grad = g.view_as(p)


def peak_memory(device):
    """The most memory that this process has held so far, in words: on the GPU where it trains there."""
    if device.type == "cuda":
        return f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU"
    try:
        import resource
    except ImportError:                                     # Windows
        return "peak memory not known here"
    unit = 1 if sys.platform == "darwin" else 1024          # of ru_maxrss
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def micro_rows(batch, accumulate, world, rank):
    """The slices of a batch that this process works through, one backward pass each. Raises UserError."""
    if batch % (accumulate * world):
        raise UserError(f"--batch {batch} does not divide into {accumulate} accumulations x {world} processes")
    size = batch // (accumulate * world)
    return [slice((i * world + rank) * size, (i * world + rank + 1) * size) for i in range(accumulate)]


# -------------------------------------------------------------------------------- records
class Log:
    """A CSV file beside the checkpoint, one row at a time; a resumed run drops the rows that it will write again."""

    def __init__(self, path, columns, step):
        self.path, self.columns, rows = Path(path), columns, []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if step and self.path.exists():
            with open(self.path, newline="") as f:
                rows = [row for row in csv.DictReader(f) if int(row["step"]) <= step]
        with open(self.path, "w", newline="") as f:
            writer = csv.DictWriter(f, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def write(self, **row):
        with open(self.path, "a", newline="") as f:
            csv.DictWriter(f, self.columns, restval="").writerow(row)


def render_sample(model, texts, prompt, path, seconds, device, precision):
    """A short stream as the checkpoint would play it, to a WAV file."""
    c = model.config
    with precision(), torch.no_grad():
        cond = condition(model, texts, [prompt], device)
        latents = [z.float() for z in stream(model, cond, blocks=math.ceil(seconds * c.frame_rate / c.block))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        writer = WavWriter(f, c.sample_rate, c.audio_channels)
        for audio in decode_stream(model.autoencoder, latents):
            writer.write(pcm(audio))
        writer.close()


# -------------------------------------------------------------------------------- the script
def parser():
    p = argparse.ArgumentParser(description="Finetune a model to stream, on a folder of audio.", allow_abbrev=False)
    p.add_argument("--data", help="folder of audio files (needed, except with --resume)")
    p.add_argument("--out", default="out/finetune.pt")
    p.add_argument("--init", default=str(Path(__file__).parent / "nano.pt"), help="checkpoint to start from, or none")
    p.add_argument("--preset", choices=sorted(PRESETS), default="nano", help="sizes for --init none")
    p.add_argument("--resume", action="store_true", help="go on from --out, with its settings unless given anew")
    # the stream
    p.add_argument("--causal", action=argparse.BooleanOptionalAction, help="block-causal or encoder-decoder (default: the checkpoint's)")
    p.add_argument("--block", type=whole, help="frames of a block (default: the checkpoint's)")
    p.add_argument("--context-blocks", type=whole, help="blocks of context (default: the checkpoint's)")
    p.add_argument("--blocks", type=whole, default=8, help="blocks learned at once in a crop, with --causal")
    # optimization
    p.add_argument("--steps", type=whole, default=10000)
    p.add_argument("--batch", type=whole, default=16, help="crops per step, over all processes and accumulations")
    p.add_argument("--accumulate", type=whole, default=1, help="backward passes per step")
    p.add_argument("--shift", type=float, default=0.0, help="how far to shift levels towards noise beyond the public models' shift")
    p.add_argument("--lr", type=float, default=5e-5)
    p.add_argument("--lr-end", type=float, help="cosine to this at the last step (default: constant)")
    p.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up")
    p.add_argument("--clip", type=float, default=1.0, help="gradient norm")
    p.add_argument("--seed", type=random_seed, default=0)
    # reports
    p.add_argument("--every", type=whole, default=250, help="steps between validation, checkpoint and log row")
    p.add_argument("--validation-crops", type=whole, default=32)
    p.add_argument("--sample-every", type=int, default=1000, help="steps between samples in out/samples, 0 for none")
    p.add_argument("--sample-seconds", type=float, default=10)
    # machine
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto")
    p.add_argument("--remat", action=argparse.BooleanOptionalAction, default=False, help="activation checkpointing: less memory, slower")
    p.add_argument("--threads", type=whole, help="CPU threads (default: PyTorch's choice)")
    return p


def parse(p):
    """Arguments; with --resume the ones not given are those of the run to be resumed. Returns (args, checkpoint or None)."""
    args, saved = p.parse_args(), None
    if args.resume:
        saved = read_checkpoint(args.out)
        if "args" not in saved:
            raise UserError(f"{args.out} holds no training to resume")
        p.set_defaults(**{**saved["args"], "out": args.out})    # which may have been moved
        args = p.parse_args()
    return args, saved


def start_model(args):
    """The model that --init, --preset and the stream's options name."""
    overrides = {k: getattr(args, k) for k in ("causal", "block", "context_blocks") if getattr(args, k) is not None}
    if args.init != "none":
        model = load(args.init, **overrides)
        keep = model.sampling if model.stage == "finetune" else model.sampling.get("finetuned", {})
        keep = {**keep, "words": model.sampling.get("words", [])}
        if model.stage == "autoencoder":                    # an autoencoder alone: its other weights say nothing yet
            fresh = LMDM(model.config)
            fresh.autoencoder = model.autoencoder
            model = fresh
    else:
        model, keep = LMDM(replace(PRESETS[args.preset], **overrides)), {}
    model.stage, model.sampling = "finetune", keep
    return model


def words_met(model, tracks):
    """The words whose vectors are no longer random once the model's own text encoder has learned these tracks' prompts too,
    each with its row: see `Words.learn`. T5 knows all."""
    encoder = model.conditioner.text_encoder
    return encoder.learn([track.prompt for track in tracks]) if encoder.trains else model.sampling.get("words", [])


def learning_rate(step, args):
    end = args.lr if args.lr_end is None else args.lr_end
    return min(1, (step + 1) / max(1, args.warmup)) * (end + (args.lr - end) * 0.5 * (1 + math.cos(math.pi * step / args.steps)))


def main():
    args, saved = parse(parser())
    if saved is not None and "optimizer" not in saved:
        raise UserError(f"{args.out} holds no finetuning to resume")
    if args.data is None:
        raise UserError("--data is missing: name a folder of audio files")
    writable(args.out)
    torch.set_flush_denormal(True)
    if args.threads:
        torch.set_num_threads(args.threads)
    rank, world, device = start_processes(args.device)
    if not args.remat:                                      # activation checkpointing is for those short of memory
        if speed:
            speed.keep_memory()
    rows = micro_rows(args.batch, args.accumulate, world, rank)
    torch.manual_seed(args.seed)                            # for weights that start at random
    model = start_model(args) if saved is None else load(args.out)
    begun = {} if saved is None else {**saved["args"], **model.config.to_dict()}
    for name in "init", "preset", "causal", "block", "context_blocks":
        now = getattr(args, name)
        if now is not None and Path(str(now)).resolve() != Path(str(begun.get(name, now))).resolve():     # --init may be spelled otherwise
            raise UserError(f"{args.out} was begun with {name} {begun[name]}; --resume cannot change that")
    precision_name, precision = training_precision(args.precision, device)
    c, say = model.config, lambda text: rank or print(text, file=sys.stderr)
    args.blocks = args.blocks if c.causal else 1

    dataset = prepare_once(args.data, model, device, rank, world)
    texts = encode_texts(model, dataset.tracks)
    model.sampling |= dict(prompt=dataset.train[0].prompt, words=words_met(model, dataset.train))
    model.to(device).requires_grad_(False)

    # --- optimizer: everything but the autoencoder
    trained = [p.requires_grad_() for part in (model.dit, model.conditioner) for p in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), weight_decay=0)
    step = 0
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        del saved
    log = Log(Path(args.out).with_suffix(".csv"), ("step", "loss", "validation", "lr", "seconds"), step) if not rank else None
    say(f"{'block-causal' if c.causal else 'encoder-decoder'}, {sum(p.numel() for p in trained) / 1e6:.1f} M parameters to train; window "
        f"{c.window} frames = {c.window / c.frame_rate:.2f} s, {args.blocks} of {c.block} learned at once; batch {args.batch} = {world} "
        f"processes x {args.accumulate} x {args.batch // world // args.accumulate}; {device.type}, "
        f"{precision_name}; steps {step} to {args.steps}")

    def write():
        if not rank:
            save(model, args.out, step, " ".join(["finetune.py", *sys.argv[1:]]), optimizer=optimizer.state_dict(), args=vars(args))
    if step == 0:
        start = validation_loss(model, dataset.validation, texts, args, device, precision)
        say(f"step 0: validation {start:.4f}")
        if not rank:
            log.write(step=0, validation=f"{start:.6f}")

    # --- the loop; on a GPU the next batch is drawn while this one is learned, a CPU has no core left for that
    draws = (draw_batch(dataset.train, c, args.batch, args.blocks, part, args.seed, n, args.shift)
             for n in range(step, args.steps) for part in rows)
    draws = speed.prefetch(draws) if speed and device.type == "cuda" else draws
    bar, clock = tqdm(total=args.steps, initial=step, file=sys.stderr, disable=None if not rank else True), time.time()
    tokens, made, spent = args.batch * ((c.context_blocks + 2 * args.blocks - 1) * c.block + args.blocks), 0, 0.0
    try:
        while step < args.steps:
            total, begun = 0.0, time.time()
            for _ in rows:
                latents, prompts, noise, t, weights, kept = next(draws)
                with precision():
                    prompt = model.dit.encode_prompt(condition(model, texts, prompts, device, kept))
                    losses = block_losses(model, prompt, latents.to(device), noise.to(device), t.to(device), args.remat)
                loss = (losses * weights.to(device)).sum() * world / args.batch     # the mean over processes is the batch's
                loss.backward()
                total += loss.detach() / world
            average_gradients(trained, world)
            if world > 1:
                dist.all_reduce(total)
            norm = nn.utils.clip_grad_norm_(trained, args.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, made, spent = step + 1, made + 1, spent + time.time() - begun
            bar.update()
            if step % 10 == 0:
                bar.set_postfix_str(f"loss {total.item():.4f}, gradient {norm.item():.2f}")

            # --- validation, checkpoint, sample
            if step % args.every == 0 or step == args.steps:
                held_out = validation_loss(model, dataset.validation, texts, args, device, precision)
                if not rank:
                    bar.write(f"step {step}: loss {total.item():.4f}, validation {held_out:.4f}, {(time.time() - clock):.0f} s", file=sys.stderr)
                    log.write(step=step, loss=f"{total.item():.9g}", validation=f"{held_out:.9g}", lr=f"{learning_rate(step - 1, args):.3g}",
                              seconds=f"{time.time() - clock:.1f}")
                write()
            if args.sample_every and step % args.sample_every == 0 and not rank:
                path = Path(args.out).parent / "samples" / f"{Path(args.out).stem}_{step}.wav"
                render_sample(model, texts, model.sampling["prompt"], path, args.sample_seconds, device, precision)
                bar.write(f"-> {path}", file=sys.stderr)
    except KeyboardInterrupt:                               # `step` is right, unless it fell into the update itself
        write()
        say(f"\nstopped after step {step}; go on with --resume")
        raise
    else:
        if world > 1:
            dist.barrier()                                  # nobody leaves while another still talks
    finally:
        draws.close()
        bar.close()
        if world > 1:
            dist.destroy_process_group()
    say(f"{made} steps of {tokens} tokens, {tokens * made / max(1e-9, spent):.0f} tokens/s, {peak_memory(device)}")
    say(f"-> {args.out}; hear it with: python sample.py --ckpt {args.out} > out.wav")


if __name__ == "__main__":
    run(main)
