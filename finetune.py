"""Stage 1: teach a diffusion model to continue a clean context, one block after another.

    python finetune.py --data path/to/music                       # from the shipped nano.pt, on a laptop
    python finetune.py --data path/to/music --init out/sao_small.pt --batch 32 --accumulate 8
    torchrun --nproc_per_node=2 finetune.py --data path/to/music  # two processes share each batch

Everything random in step n comes from (seed, n): a resumed run, or one on several processes, draws the same.
"""
import argparse
import contextlib
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.quasirandom import SobolEngine

import data
from common import (HelpWithDefaults, UserError, finite, fraction, load, not_negative, positive_finite,
                    random_seed, read_checkpoint, regime_of, run, save, speed, thread_count,
                    training_precision, uninterrupted, whole, whole_or_zero)
from model import Numbered, add_noise, shift_time, velocity
from training import (Average, average_gradients, check_text_encoder, clip_gradients, condition,
                      describe_batch, encode_texts, keep_earlier_run, Log, millions, parse, prepare_once,
                      progress_bar, render_sample, restore, say, say_changes, say_done, set_up, track_records,
                      training_loop, words_met)

STREAM_OPTIONS = "causal", "block", "context_blocks", "beats_per_frame"     # of `Config`; a run keeps them
WITHOUT_BEAT = 0.2                                          # share of crops that are told no beat


# -------------------------------------------------------------------------------- the loss
def block_losses(model, prompt, latents, noise, t, remat=False, beat=None):
    """Mean squared error on v of the last m blocks, each at its own noise level: (B, m).

    prompt: EncodedPrompt; latents (B, C, n * block), the last m blocks to be learned; noise (B, C, m *
    block); t (B, m); beat (B, m * block, 18): their frames' places in the bar, or None. One pass over [clean
    blocks | noisy blocks | timestep tokens]: a noisy block sees the clean blocks before it, never itself
    clean. Block-causal, this equals m passes of one block each after its whole history. Raises ValueError for
    more than one block encoder-decoder: there all clean blocks see each other, and through them a noisy block
    would see itself clean."""
    c = model.config
    m = t.shape[1]
    if m > 1 and not c.causal:
        raise ValueError(f"an encoder-decoder model learns one block of a crop, not {m}")
    n = latents.shape[-1] // c.block
    x0 = latents[..., -m * c.block:]
    level = t.repeat_interleave(c.block, dim=1)[:, None]                                # (B, 1, m * block)
    noisy = Numbered(add_noise(x0, noise, level, c.objective), tuple(range(n - m, n)))
    clean = Numbered(latents[..., :-c.block], tuple(range(n - 1)))
    v, _ = model.dit.blocks(prompt, noisy, t, clean, beat=beat, remat=remat)
    error = (v.float() - velocity(x0, noise, level, c.objective)).square()
    return error.unflatten(-1, (m, c.block)).mean(dim=(1, 3))


@torch.no_grad()
def validation_loss(model, tracks, texts, args, device, precision):
    """The loss on fixed crops, noise and levels, with context and prompts: comparable between steps and
    runs."""
    c = model.config
    count = args.validation_crops
    crops = data.fixed_crops(tracks, c.context_blocks + args.blocks, c.block, count)
    beat = beats_of_blocks(crops, c, args.blocks)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, c.channels, args.blocks * c.block, generator=generator)
    # the golden ratio's multiples are spread evenly
    u = (torch.arange(count * args.blocks) * 0.618034 + 0.5) % 1
    t = shift_time(u, c.window).reshape(count, args.blocks)
    weights = block_weights(crops.missing, c, args.blocks)
    size = max(1, args.batch // args.accumulate)
    total = 0.0
    for start in range(0, count, size):
        rows = slice(start, start + size)
        with precision():
            prompt = model.dit.encode_prompt(condition(model, texts, crops.prompts[rows], device))
            losses = block_losses(model, prompt, crops.latents[rows].to(device), noise[rows].to(device),
                                  t[rows].to(device), beat=moved(beat, rows, device))
        total += (losses.cpu() * weights[rows]).sum().item()
    return total / weights.sum().item()


def beats_of_blocks(crops, config, blocks):
    """Where the frames of each crop's last blocks lie in the bar: see `data.beats_at`."""
    first = config.context_blocks
    return data.beats_at(crops.starts, range(first, first + blocks), config)


def moved(tensor, rows, device):
    return None if tensor is None else tensor[rows].to(device)


# -------------------------------------------------------------------------------- what a step draws
class Batch(NamedTuple):
    """Rows of a step's batch. B items, m blocks to learn of each."""
    latents: torch.Tensor                                   # (B, C, (context_blocks + m) * block)
    prompts: list
    noise: torch.Tensor                                     # (B, C, m * block)
    t: torch.Tensor                                         # (B, m)
    weights: torch.Tensor                                   # (B, m), adding up to 1 in each item
    with_prompt: torch.Tensor    # (B,), False where guidance's null prompt is learned
    beat: torch.Tensor                                      # (B, m * block, 18), or None


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


def without_some(prompt, rng, share):
    """What people leave out: in half of all cases each part of the prompt between commas is dropped with
    this probability, but never all of them."""
    if not share:
        return prompt
    parts = prompt.split(",")
    keep = rng.random(len(parts)) >= share * (rng.random() < 0.5)
    return ",".join(part for part, kept in zip(parts, keep) if kept or not keep.any()).strip()


def draw_batch(tracks, config, batch, blocks, rows, seed, step, shift=0.0, tag_dropout=0.0):
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
    with_beat = torch.from_numpy(rng.random(batch) >= WITHOUT_BEAT)[rows]
    tag_seeds = rng.integers(2 ** 31, size=batch)[rows]
    crops = data.crops_at(tracks, c.context_blocks + blocks, c.block, positions[rows])
    for item, gone in zip(crops.latents, missing[rows]):
        item[:, :gone * c.block] = 0
    prompts = [without_some(prompt, np.random.default_rng(tag_seed), tag_dropout)
               for prompt, tag_seed in zip(crops.prompts, tag_seeds)]
    beat = beats_of_blocks(crops, c, blocks)
    return Batch(crops.latents, prompts, noise[rows], shift_time(u, c.window, shift)[rows],
                 block_weights(crops.missing, c, blocks), torch.from_numpy(with_prompt[rows]),
                 None if beat is None else beat * with_beat[:, None, None])


def draw_batches(tracks, config, args, micro_batches, first_step):
    """Yield the Batch of every backward pass from `first_step` on."""
    for step in range(first_step, args.steps):
        for rows in micro_batches:
            yield draw_batch(tracks, config, args.batch, args.blocks, rows, args.seed, step, args.shift,
                             args.tag_dropout)


# -------------------------------------------------------------------------------- the script
def parser():
    p = argparse.ArgumentParser(description="Finetune a model to stream, on a folder of audio.",
                                allow_abbrev=False, formatter_class=HelpWithDefaults)
    p.add_argument("--data", help="folder of audio files (needed, except with --resume)")
    p.add_argument("--out", default="out/finetune.pt", help="checkpoint to write")
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
    p.add_argument("--beats-per-frame", action="store_const", const=True,
                   help="from now on tell each frame its place in the bar, where the checkpoint was told it "
                        "once a block")
    # optimization
    p.add_argument("--steps", type=whole, default=10000, help="steps of the optimizer")
    p.add_argument("--batch", type=whole, default=16,
                   help="crops per step, over all processes and accumulations")
    p.add_argument("--accumulate", type=whole, default=1, help="backward passes per step")
    p.add_argument("--shift", type=finite, default=0.0,
                   help="how far to shift levels towards noise beyond the public models' shift")
    p.add_argument("--lr", type=positive_finite, default=5e-5, help="learning rate")
    p.add_argument("--lr-end", type=not_negative, help="cosine to this at the last step (default: constant)")
    p.add_argument("--warmup", type=whole_or_zero, default=0, help="steps of linear warm-up")
    p.add_argument("--muon", action="store_true",
                   help="Muon for the layers' matrices, AdamW for the rest: for training from nothing, with "
                   "an --lr of about 1e-3")
    p.add_argument("--ema", type=fraction, default=0.0,
                   help="play and save an average of the weights that keeps this share each step (0.995)")
    p.add_argument("--tag-dropout", type=fraction, default=0.0,
                   help="in half of all crops drop each part of a prompt between commas at this rate")
    p.add_argument("--clip", type=not_negative, default=1.0, help="largest gradient norm, 0 for no clipping")
    p.add_argument("--seed", type=random_seed, default=0, help="of all that is drawn")
    # reports
    p.add_argument("--every", type=whole, default=250,
                   help="steps between validation, checkpoint and log row")
    p.add_argument("--validation-crops", type=whole, default=32, help="how many it is measured on")
    p.add_argument("--sample-every", type=whole_or_zero, default=1000,
                   help="steps between samples in out/samples, 0 for none")
    p.add_argument("--sample-seconds", type=positive_finite, default=10, help="length of each")
    # machine
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="such as cpu, cuda or cuda:1")
    p.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto",
                   help="auto: bf16 where it is faster")
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
    """The model that --init and the stream's options name. Raises UserError."""
    given = {name: getattr(args, name) for name in STREAM_OPTIONS if getattr(args, name) is not None}
    model = load(args.init, **given)
    if args.beats_per_frame and not model.config.beats:
        raise UserError(f"--beats-per-frame: {args.init} cannot be told a beat")
    if args.beats_per_frame and not read_checkpoint(args.init)["config"].get("beats_per_frame"):
        torch.nn.init.zeros_(model.dit.beat_in.weight)      # what it learned was for the timestep token
    sampling = model.sampling if model.stage == "finetune" else model.sampling.get("finetuned", {})
    sampling = {**sampling, "words": model.sampling.get("words", [])}
    model.stage = "finetune"
    model.sampling = sampling
    return model


def check_unchanged(args, saved, config):
    """UserError for options that --resume cannot change, given with another value than the run began with."""
    began_with = {**saved["args"], **config.to_dict()}
    for name in "init", *STREAM_OPTIONS, "muon":
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


def make_optimizers(model, trained, args):
    """Muon (arXiv 2502.16982) for matrices of the layers, where asked for; AdamW for all else. A list."""
    if not args.muon:
        return [torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), weight_decay=0)]
    matrices = [p for p in model.dit.layers.parameters() if p.ndim == 2]
    others = [p for p in trained if not any(p is matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.99), weight_decay=0)]


def save_state(model, optimizers, average, step, args, tracks):
    """The checkpoint, from which a run can also be resumed."""
    with average.in_place() as last:
        save(model, args.out, step, " ".join(["finetune.py", *sys.argv[1:]]),
             optimizer=[optimizer.state_dict() for optimizer in optimizers], last=last,
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
    if args.tag_dropout and not model.conditioner.text_encoder.trains:
        raise UserError("--tag-dropout: this checkpoint's text encoder reads each whole prompt once, before "
                        "the training: parts of it cannot be left out")
    dataset = prepare_once(args.data, model, device, rank, world)
    texts = encode_texts(model, dataset.tracks)
    model.sampling |= dict(prompt=dataset.train[0].prompt, words=words_met(model, dataset.train))
    tracks = track_records(dataset)
    model.to(device).requires_grad_(False)

    # --- optimizer: everything but the autoencoder
    trained = [*model.dit.parameters(), *model.conditioner.parameters()]
    for p in trained:
        p.requires_grad_()
    optimizers = make_optimizers(model, trained, args)
    average = Average(trained, args.ema)
    step = 0
    if saved is None:
        keep_earlier_run(args.out, rank)
    else:
        say_changes(saved.get("tracks", tracks), tracks, rank)
        restore(optimizers, saved["optimizer"], args.out)
        average.restore(saved.get("last"), saved["step"])
        step = saved["step"]
        del saved                                           # twice the weights' memory
    log = None if rank else Log(args.out, ("step", "loss", "validation", "lr", "seconds"), step)
    say(rank, f"{regime_of(c)}, {millions(trained)} parameters to train; window {c.window} frames = "
        f"{c.window / c.frame_rate:.2f} s, {args.blocks} blocks of {c.block} frames learned at once; "
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
            save_state(model, optimizers, average, step, args, tracks)
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
                                          batch.noise.to(device), batch.t.to(device), args.remat,
                                          moved(batch.beat, slice(None), device))
                # of this process's items, scaled so that the mean over processes is the batch's
                part = (losses * batch.weights.to(device)).sum() * world / args.batch
                part.backward()
                loss += part.detach() / world
            average_gradients(trained, world)
            if world > 1:
                dist.all_reduce(loss)
            gradient = clip_gradients(trained, args.clip)
            with uninterrupted():
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = learning_rate(step, args)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                average.update()
                step += 1
            learning_seconds += time.time() - step_began
            bar.update()
            if step % 10 == 0:
                bar.set_postfix_str(f"loss {loss.item():.4f}, gradient {gradient.item():.2f}")
            # --- validation, checkpoint, sample
            if step % args.every == 0 or step == args.steps:
                with average.in_place():
                    held_out = validation_loss(model, dataset.validation, texts, args, device, precision)
                if not rank:
                    seconds = time.time() - clock
                    bar.write(f"step {step}: loss {loss.item():.4f}, validation {held_out:.4f}, "
                              f"{seconds:.0f} s", file=sys.stderr)
                    log.write(step=step, loss=f"{loss.item():.9g}", validation=f"{held_out:.9g}",
                              lr=f"{learning_rate(step - 1, args):.3g}", seconds=f"{seconds:.1f}")
                    save_state(model, optimizers, average, step, args, tracks)
            if args.sample_every and step % args.sample_every == 0 and not rank:
                with average.in_place():
                    bar.write(render_sample(model, texts, model.sampling["prompt"], args.out, step,
                                            args.sample_seconds, device, precision), file=sys.stderr)
    steps_made = step - first_step
    if not steps_made:
        say(rank, f"nothing is left to do after step {step}: --steps {args.steps}")
    say_done(rank, f"{steps_made} steps of {tokens} tokens, "
             f"{tokens * steps_made / max(1e-9, learning_seconds):.0f} tokens/s", device, args.out)


if __name__ == "__main__":
    run(main)
