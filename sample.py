"""Play: one block after another, for as long as you like.

    python sample.py --seconds 600 > out.wav
    python sample.py --live | ffplay -nodisp -nostats -   # what you type is what is played next

`denoise_block` makes a block, `Context` remembers the finished ones (the KV cache), `stream` puts them
together; training rolls out with the same. `decode_stream` in audio.py turns blocks into sound. See "How it
works" in the README. """
import argparse
import contextlib
import itertools
import math
import os
import select
import sys
import time

import soundfile
import torch
from tqdm import tqdm

from audio import decode_stream, decoder_margin, encode_file, open_output, pcm
from common import (PRECISIONS, UserError, default_checkpoint, device_of, discard_output, finite, keep_inputs,
                    load, needs_speed, playing_precision, positive, random_seed, reason_of, regime_of, run,
                    speed, step_count, tempo, thread_count)
from controls import beat_of, steady_beat
from model import NO_BLOCKS, Cond, Numbered, add_noise, alpha_sigma, denoise, forget_t5, schedule, words_of

SAMPLERS = "euler", "dpmpp", "pingpong"
DEFAULTS = {                                                # by the stage recorded in the checkpoint
    "base": dict(sampler="pingpong", steps=8, cfg=1.0),
    "finetune": dict(sampler="euler", steps=50, cfg=7.0),
    "arc": dict(sampler="pingpong", steps=8, cfg=1.0),
}


# -------------------------------------------------------------------------------- one block after another
class Context:
    """The finished blocks that the next block sees, with their keys and values: the KV cache.

    A finished block waits until the next block's first denoising step, whose pass also takes it along, clean,
    and caches its keys and values. Encoder-decoder: the whole context waits, and the cache is computed again.
    Without a cache every step runs over all blocks that have any influence. Gradients never enter the
    context."""

    def __init__(self, model, prompt, prime, use_cache=True, first=0):
        """prompt: EncodedPrompt, its batch doubled for guidance; prime: latents (B, C, whole blocks, possibly
        none); first: number of the first context block."""
        c = model.config
        self.model = model
        self.prompt = prompt
        self.use_cache = use_cache
        self.keeps_cached = use_cache and c.causal          # what is cached of a finished block never changes
        if not use_cache:
            blocks_kept = c.reach_blocks
        else:
            blocks_kept = 1 if c.causal else c.context_blocks
        self.frames_kept = blocks_kept * c.block
        self.start = first * c.block                        # the next block's first frame
        self.kv = None                                      # cached: per layer (k, v)
        self.beat = None                                    # of the next block: `controls.beat_of` (B, 1, 18)
        self.waiting = False                                # are there finished latents that are not cached?
        self.finished = prime[..., :0]                      # latents of the last `frames_kept` frames
        blocks = list(prime.split(c.block, dim=-1)) if prime.shape[-1] else []
        zeros = prime.new_zeros(*prime.shape[:-1], c.block)
        with torch.no_grad():
            for block in [zeros] * (c.context_blocks - len(blocks)) + blocks:
                if self.waiting and self.keeps_cached:
                    self.predict()
                self.append(block)

    def append(self, block):
        """A block (B, C, block) is finished. Block-causal, `predict` must have cached the one before it."""
        lost = self.waiting and self.keeps_cached
        assert not lost, "the finished block before this one is not cached: call predict() between two blocks"
        self.finished = torch.cat([self.finished, block.detach()], dim=-1)[..., -self.frames_kept:]
        self.start = self.start + self.model.config.block
        self.waiting = True
        if not self.keeps_cached:
            self.kv = None

    def predict(self, x=None, t=None):
        """v (B, C, block) of the next block x at level t: one pass over [waiting blocks | x | its timestep
        token].

        With guidance the prompt's batch is doubled, and so is v's. Without x only the cache is filled. Blocks
        are numbered from the next one, which is 0: the last finished one is -1."""
        if x is not None and self.use_cache and self.waiting and torch.is_grad_enabled():
            with torch.no_grad():                           # its own pass: no gradient reaches the context
                self.predict()
        batch, block = len(self.prompt.global_), self.model.config.block
        noisy = clean = cached = NO_BLOCKS
        beat = None if x is None or self.beat is None else repeated(self.beat, batch)
        if x is not None:
            noisy = Numbered(repeated(x, batch), (0,))
            t = t.expand(batch, 1)
        n_waiting = self.finished.shape[-1] // block if self.waiting else 0
        if n_waiting:
            clean = Numbered(repeated(self.finished, batch), tuple(range(-n_waiting, 0)))
        if self.kv is not None:
            n_cached = self.kv[0][0].shape[2] // block
            cached = Numbered(self.kv, tuple(range(-n_waiting - n_cached, -n_waiting)))
        v, keys_values = self.model.dit.blocks(self.prompt, noisy, t, clean, cached, self.start, beat)
        if self.waiting and self.use_cache:
            self.remember(keys_values)
        return None if v is None else v.float()             # in bf16 the network runs, not the sampler

    def remember(self, new):
        """Append keys and values of the waiting blocks to the cache and forget what no later block sees."""
        keep = self.model.config.context
        if self.kv is not None:
            new = [(torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2))
                   for (k, v), (new_k, new_v) in zip(self.kv, new)]
        self.kv = [(k[:, :, -keep:], v[:, :, -keep:]) for k, v in new]
        self.waiting = False


def repeated(x, batch):
    """x (B, C, T) as often as guidance needs it: (batch, C, T)."""
    return x if len(x) == batch else x.repeat(batch // len(x), 1, 1)


@torch.no_grad()
def denoise_block(predict, x, levels, sampler, objective, draw, cfg=1.0, given=None):
    """From noise x (B, C, T) to x0, evaluating predict(x, t) -> v at each of `levels`, falling from 1.

    sampler: "euler" keeps the predicted noise, "pingpong" draws fresh noise with draw(), "dpmpp" is Euler
    with x0 extrapolated from the two last predictions (DPM-Solver++ 2M, arXiv 2211.01095). Stopping early is
    passing fewer levels. cfg: guidance; other than 1, predict gives v of the doubled batch (`with_null`).
    given: `Given`, or None."""
    noise = x
    previous = None    # "dpmpp": the last x0, and the growth of log SNR since
    for i, t in enumerate(levels):
        if given is not None:
            x = given.hold(x, t, noise, objective)
        x0, eps = denoise(x, guided(predict(x, t), cfg), t, objective)
        if i + 1 == len(levels):
            return x0 if given is None else given.hold(x0, torch.zeros_like(t), noise, objective)
        if sampler != "dpmpp":
            x = add_noise(x0, eps if sampler == "euler" else draw(), levels[i + 1], objective)
            continue
        alpha, sigma = alpha_sigma(t, objective)
        alpha_next, sigma_next = alpha_sigma(levels[i + 1], objective)
        # at t = 1 alpha is 0 and h infinite, which is meant; the cosine of pi / 2, rounded, would be below 0
        h = (alpha_next / sigma_next).log() - (alpha / sigma).clamp(min=0).log()
        ahead = x0 if previous is None else x0 + h / (2 * previous[1]) * (x0 - previous[0])
        x = sigma_next / sigma * x - alpha_next * torch.expm1(-h) * ahead
        previous = x0, h


def with_null(cond, cfg):
    """The batch that guidance needs: [conditional | null], or just the condition where cfg is 1."""
    return cond if cfg == 1 else Cond(*(torch.cat(pair) for pair in zip(cond, cond.null())))


def guided(v, cfg):
    """v of that doubled batch -> v_null + cfg (v_cond - v_null)."""
    if cfg == 1:
        return v
    cond, null = v.chunk(2)
    return null + cfg * (cond - null)


def sampling_settings(model, steps=None, sampler=None, cfg=None):
    """What the caller names, else what the checkpoint recommends, else its stage's defaults. Raises
    UserError."""
    settings = {**DEFAULTS.get(model.stage, DEFAULTS["finetune"]), **model.sampling}
    named = dict(steps=steps, sampler=sampler, cfg=cfg)
    settings = {k: settings[k] if v is None else v for k, v in named.items()}
    if settings["sampler"] not in SAMPLERS or settings["steps"] < 1:
        raise UserError(f"{settings['steps']} steps of {settings['sampler']}: "
                        f"at least 1 of {', '.join(SAMPLERS)}")
    return settings


@torch.no_grad()
def stream(model, cond, *, blocks=None, steps=None, sampler=None, cfg=None, seed=0, prime=None,
           use_cache=True, change=None, beat=None, sketch=None):
    """Yield latent blocks (B, C, block), for ever when `blocks` is None; the first n do not depend on
    `blocks`.

    steps, sampler and cfg default to what suits the checkpoint. seed: one, or one for each item, which then
    is the stream of that seed. prime: latents (B or 1, C, T) to go on from; of its whole blocks, counted from
    its end, as many as still have any influence. change: a function, called before each block, that gives a
    new `cond` of the same batch from there on, or None. Finished blocks stay as they are; block-causal, so do
    their cached keys and values, made under the old condition (the newest block's only come with the next);
    encoder-decoder, the context is read again under the new one. beat, sketch: functions of the number of a
    block, 0 the first: beat gives tempo in bpm and the place in the bar where it begins, in [0, 1), or None;
    sketch gives a `Given`, or None."""
    settings = sampling_settings(model, steps, sampler, cfg)
    sampler, cfg = settings["sampler"], settings["cfg"]
    objective = model.config.objective
    device = cond.tokens.device
    levels = schedule(settings["steps"])[:-1].to(device)
    draw = noise_source(model.config, seed, len(cond.tokens), device)
    prompt = model.dit.encode_prompt(with_null(cond, cfg))
    context = Context(model, prompt, still_heard(model.config, cond, prime), use_cache)
    make = None
    if speed and device.type == "cuda":
        make = speed.graphed_block(context, denoise_block, levels, sampler, cfg)
    for number in itertools.count() if blocks is None else range(blocks):
        if change is not None and (new := change()) is not None:
            context.prompt = model.dit.encode_prompt(with_null(new, cfg))
        if beat is not None:
            context.beat = beat_of(beat(number), len(cond.tokens), device)
        given = None if sketch is None else sketch(number)
        if make:
            x = make(draw, given)
        else:
            x = denoise_block(context.predict, draw(), levels, sampler, objective, draw, cfg, given)
            context.append(x)
        yield x


def noise_source(config, seed, batch, device):
    """A function that draws the next noise (B, C, block). seed: one, or one for each item of the batch.

    Drawn on the CPU, so that the same seed gives the same noise everywhere."""
    seeds = [seed] if isinstance(seed, int) else seed
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    shape = batch // len(seeds), config.channels, config.block

    def draw():
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    return draw


def still_heard(config, cond, prime):
    """The end of prime (B or 1, C, T) that influences what follows: (B, C, whole blocks). None: no blocks."""
    if prime is None:
        prime = torch.zeros(1, config.channels, 0)
    frames = min(prime.shape[-1] // config.block, config.reach_blocks) * config.block
    return prime[..., prime.shape[-1] - frames:].to(cond.tokens.device).expand(len(cond.tokens), -1, -1)


@torch.no_grad()
def clip(model, cond, frames, *, steps=None, sampler=None, cfg=None, seed=0):
    """One clip of latents (B, C, frames) made whole, as the public model does: no context, no blocks."""
    settings = sampling_settings(model, steps, sampler, cfg)
    cfg = settings["cfg"]
    both = with_null(cond, cfg)
    device = cond.tokens.device
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(len(cond.tokens), model.config.channels, frames,
                           generator=generator).to(device)

    def predict(x, t):
        return model.dit(repeated(x, len(both.tokens)), t.expand(len(both.tokens)), both)
    levels = schedule(settings["steps"])[:-1].to(device)
    return denoise_block(predict, draw(), levels, settings["sampler"], model.config.objective, draw, cfg)


# -------------------------------------------------------------------------------- prompts
def known_words(model, prompt):
    """The prompt without what its text encoder cannot use, which is named on standard error.

    That is words the checkpoint never met, whose vectors are still random and make fewer, softer notes, and
    words beyond the number that the encoder reads."""
    if not model.conditioner.text_encoder.trains:           # T5 knows all words
        return prompt
    words = words_of(prompt)
    known = model.sampling.get("words") or words
    read = model.config.text_tokens
    kept = [word for word in words if word in known]
    unknown = [word for word in words if word not in known]
    if unknown:
        print(f"words that this model has not learned are left out: {', '.join(unknown)}", file=sys.stderr)
    if kept[read:]:
        print(f"words beyond the {read} that it reads are left out: {', '.join(kept[read:])}",
              file=sys.stderr)
    return prompt if kept[:read] == words else " ".join(kept[:read])


def make_cond(model, prompt, prompt_file, numbers):
    """The condition for one stream, and the prompt's text. Raises UserError.

    prompt: None for the checkpoint's own, or the file's first; prompt_file: None, or where embeddings are."""
    if prompt_file is None:
        asked = model.sampling.get("prompt", "") if prompt is None else prompt
        prompt = known_words(model, asked)
        reads_words = model.conditioner.text_encoder.trains
        if asked.strip() and (not prompt or reads_words and not words_of(prompt)):
            words = ", ".join(list(model.sampling.get("words", []))[:20]) or "words and numbers"
            raise UserError(f"no word of the prompt {asked!r} is known to this model; it knows {words}")
        return model.conditioner([prompt], **numbers), prompt
    from stable_audio_port import load_prompts
    prompts, embeddings = load_prompts(prompt_file)
    if prompt is not None and prompt not in prompts:
        raise UserError(f"{prompt_file} holds no embedding of {prompt!r}; it holds: {'; '.join(prompts[:5])}")
    if embeddings.shape[-1] != model.config.cond_width:
        raise UserError(f"{prompt_file} holds embeddings {embeddings.shape[-1]} wide, this checkpoint takes "
                        f"{model.config.cond_width}: they are another model's (--ckpt)")
    row = 0 if prompt is None else prompts.index(prompt)
    device = next(model.parameters()).device
    return model.conditioner(embeddings[row:row + 1].float().to(device), **numbers), prompts[row]


def last_lines(file):
    """Yield the last line that came into an open file, a terminal or a pipe, since the turn before, or None.
    Never waits."""
    unfinished = b""
    while True:
        with contextlib.suppress(OSError):                  # a terminal that is gone
            while select.select([file], [], [], 0)[0] and (more := os.read(file.fileno(), 2 ** 16)):
                unfinished += more
        *lines, unfinished = unfinished.split(b"\n")
        lines = [line.decode(errors="replace").strip() for line in lines if line.strip()]
        yield lines[-1] if lines else None


def new_prompt(model, prompt_file, lines):
    """--live: the condition that was typed since the last call, or None."""
    line = next(lines)
    if line is None:
        return None
    try:
        cond, prompt = make_cond(model, line, prompt_file, model.config.stream_numbers)
    except UserError as error:                              # the music goes on
        print(error, file=sys.stderr)
        return None
    print(f"next: {prompt!r}", file=sys.stderr)
    return cond


# -------------------------------------------------------------------------------- command line
def parse(argv=None):
    p = argparse.ArgumentParser(description="Stream music, block by block, as a WAV on standard output.",
                                allow_abbrev=False)
    p.add_argument("--ckpt", help="checkpoint (default: out/arc.pt, else out/finetune.pt, else nano.pt)")
    p.add_argument("--prompt", help="what to play (default: the checkpoint's own example)")
    p.add_argument("--prompt-file", help="embeddings written by stable_audio_port.py --prompts; "
                   "the first, or the one --prompt names")
    p.add_argument("--seconds", type=positive,
                   help="length (default: 30, or a whole clip if that is shorter; with --live inf); "
                   "inf plays until stopped")
    p.add_argument("--prime", help="audio file to go on from")
    p.add_argument("--bpm", type=tempo,
                   help="beats a minute to keep to, four to a bar (for models that can be told)")
    p.add_argument("--live", action="store_true",
                   help="each line typed while a player plays is the prompt from the next block on "
                   "(not on Windows)")
    p.add_argument("--out", help=".wav or .flac instead of standard output")
    # sampling
    p.add_argument("--seed", type=random_seed, default=0)
    p.add_argument("--steps", type=step_count, help="denoising steps per block (default: the checkpoint's)")
    p.add_argument("--cfg", type=finite, help="guidance, 1 for none (default: the checkpoint's)")
    p.add_argument("--sampler", choices=SAMPLERS, help="(default: the checkpoint's)")
    p.add_argument("--no-cache", action="store_true",
                   help="recompute the whole context at every step: slow, the same music but "
                   "for rounding (in int8 that makes another tune)")
    # machine
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=PRECISIONS, default="auto",
                   help="auto: int8 where CPU and checkpoint suit it, else bf16 where it is faster")
    p.add_argument("--threads", type=thread_count, help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--compile", action="store_true",
                   help="compile part of the decoder, 20 s more before the first block, then "
                   "faster; on a GPU also the transformer, a minute")
    return p.parse_args(argv)


def longest_clip(config):
    """Seconds that the public model makes at once."""
    return config.clip * config.hop / config.sample_rate


def default_seconds(model, live):
    """Without --seconds: live for ever, a clip no longer than it can be."""
    if live:
        return math.inf
    return min(30, longest_clip(model.config)) if model.stage == "base" else 30


def check(model, args):
    """UserError for what the arguments ask of a checkpoint, or of this machine, that cannot do it."""
    base = model.stage == "base"
    for option in "compile", "prime", "no_cache":
        if getattr(args, option) and base:
            raise UserError(f"--{option.replace('_', '-')} is for models that stream; this one makes a clip")
    if model.stage == "autoencoder":
        raise UserError("this checkpoint holds only an autoencoder yet: finetune.py --init trains the rest")
    if args.live and (base or args.no_cache and model.config.causal):
        raise UserError("--live needs a model that streams, and block-causal its cache, which remembers what "
                        "was made under which prompt")
    if args.live and (os.name == "nt" or sys.stdin is None):
        raise UserError("--live reads standard input without waiting, but it is closed, or this is Windows, "
                        "where that cannot be done")
    if base and args.seconds > longest_clip(model.config):
        raise UserError(f"this checkpoint makes one clip of at most {longest_clip(model.config):.1f} s; to "
                        "stream, finetune it first (finetune.py --init)")
    if args.bpm and not model.config.beats:
        raise UserError("--bpm: this checkpoint cannot be told a beat; put the tempo in its prompt")
    if args.compile:
        needs_speed("--compile")


def clip_pieces(model, args):
    """What a base model plays, one piece of audio (1, 2, n), and a line about it."""
    settings = sampling_settings(model, args.steps, args.sampler, args.cfg)
    numbers = {name: 0 if name == "seconds_start" else args.seconds for name, _, _ in model.config.numbers}
    cond, prompt = make_cond(model, args.prompt, args.prompt_file, numbers)

    def pieces():                                           # made when asked for, once the output is open
        yield model.autoencoder.decode(clip(model, cond, model.config.clip, seed=args.seed, **settings))
    return pieces(), f"{prompt!r}: one clip, {in_words(settings)}"


def stream_pieces(model, args, samples, together):
    """The audio pieces (1, 2, n) of a stream, at least `samples` of them, and a line about the plan.

    samples: None for no end; together: make blocks while others are decoded."""
    c = model.config
    settings = sampling_settings(model, args.steps, args.sampler, args.cfg)
    cond, prompt = make_cond(model, args.prompt, args.prompt_file, c.stream_numbers)
    plan = (f"{prompt!r}: blocks of {c.block / c.frame_rate:.2f} s seeing {c.context / c.frame_rate:.2f} s, "
            f"{in_words(settings)}")
    prime = None
    if args.prime is not None:
        prime = encode_file(model, args.prime, c.reach_blocks * c.block)[None].to(args.device)
        if prime.shape[-1] < c.block:
            raise UserError(f"{args.prime} is shorter than one block ({c.block / c.frame_rate:.2f} s)")
    # whole blocks, and the decoder's reach beyond the end: so a shorter stream is exactly the start of a
    # longer one
    blocks = None if samples is None else math.ceil((samples / c.hop + decoder_margin(c)) / c.block)
    lines = last_lines(sys.stdin) if args.live else None

    def typed():
        return new_prompt(model, args.prompt_file, lines)
    latents = stream(model, cond, blocks=blocks, prime=prime, use_cache=not args.no_cache,
                     change=typed if args.live else None, beat=args.bpm and steady_beat(c, args.bpm),
                     seed=args.seed, **settings)
    if together:
        latents = speed.prefetch(latents)
    if prime is None:
        return decode_stream(model.autoencoder, latents, args.compile), plan
    heard = prime[..., -decoder_margin(c):]    # decode over the join, then drop what is the recording's
    pieces = decode_stream(model.autoencoder, itertools.chain([heard], latents), args.compile)
    return without_first(pieces, heard.shape[-1] * c.hop), plan


def in_words(settings):
    return f"{settings['steps']} {settings['sampler']} steps, guidance {settings['cfg']:g}"


def held_back(pieces, n):
    """The same, but the first n come as one: nobody should listen while a GPU's code is compiled."""
    first = list(itertools.islice(pieces, n))
    if first:
        yield torch.cat(first, dim=-1)
    yield from pieces


def without_first(pieces, samples):
    """The same audio without its first so many samples."""
    for piece in pieces:
        yield piece[..., samples:]
        samples = max(0, samples - piece.shape[-1])


def set_up(args):
    """The model of the arguments, ready to play, and whether blocks are made while others are decoded."""
    device = device_of(args.device)
    path = default_checkpoint() if args.ckpt is None else args.ckpt
    if args.out:
        keep_inputs(args.out, {"--ckpt": path, "--prime": args.prime, "--prompt-file": args.prompt_file})
    threads = args.threads or torch.get_num_threads()
    model = load(path).to(device)
    args.seconds = args.seconds or default_seconds(model, args.live)
    check(model, args)
    parameters = sum(p.numel() for p in model.dit.parameters())
    together = bool(speed) and speed.side_by_side(model, threads)
    if device.type == "cpu":
        torch.set_num_threads((threads + 1) // 2 if together else threads)
    precision = playing_precision(model, args.precision)
    say(f"{path}: {model.stage}, {regime_of(model.config)}, DiT {parameters / 1e6:.1f} M, {args.device}, "
        f"{threads} threads, {precision}")
    if args.compile:
        longer = "20 to 30 s" if device.type == "cpu" else "about a minute"
        say(f"compiling: the first audio takes {longer} longer")
        speed.compile_layers(model)
    return model, together


def say(text):
    print(text, file=sys.stderr)


@torch.no_grad()
def main():
    started = time.time()
    args = parse()
    torch.set_flush_denormal(True)
    if speed:
        speed.keep_memory()
    model, together = set_up(args)
    c = model.config
    length = args.seconds * c.sample_rate
    samples = None if math.isinf(length) else round(length)
    if model.stage == "base":
        pieces, plan = clip_pieces(model, args)
    else:
        pieces, plan = stream_pieces(model, args, samples, together)
    if not args.live:                                       # no prompt will follow
        forget_t5()
    say(plan + "; type a prompt and press Enter" * args.live)
    target = args.out or "standard output"
    writer = open_output(args.out, c.sample_rate, c.audio_channels, samples)
    bar = tqdm(total=samples and samples / c.sample_rate, unit="s", unit_scale=True, file=sys.stderr,
               disable=args.live or None, bar_format="{l_bar}{bar}| {n:.0f} s, {rate_fmt}")
    if args.compile and args.device != "cpu":
        # the third piece is compiled and recorded, and one more may be what a recording (--prime) leaves in
        # the decoder
        pieces = held_back(pieces, 4)

    # --- the loop; on Ctrl-C too, what was made is kept
    written = clipped = first_samples = 0
    first_seconds = 0.0                                     # from the start until the first audio is out
    try:
        with contextlib.closing(writer), contextlib.closing(pieces), contextlib.closing(bar):
            for audio in pieces:
                audio = audio if samples is None else audio[..., :samples - written]
                if not audio.shape[-1]:
                    continue
                writer.write(pcm(audio))
                if not written:
                    first_seconds = time.time() - started
                    first_samples = audio.shape[-1]
                clipped += (~(audio.abs() <= 1)).sum().item()           # what is no number too
                written += audio.shape[-1]
                bar.update(audio.shape[-1] / c.sample_rate)
                if written == samples:
                    break
    except BrokenPipeError:
        raise
    except (OSError, soundfile.LibsndfileError) as error:
        if not args.out:
            discard_output()
        raise UserError(f"cannot go on writing {target} after {written / c.sample_rate:.1f} s: "
                        f"{reason_of(error, args.out)}") from None
    seconds = written / c.sample_rate
    took = time.time() - started
    then = (written - first_samples) / c.sample_rate / max(1e-9, took - first_seconds)
    say(f"{seconds:.1f} s of music in {took:.1f} s, {seconds / took:.1f}x real time; first audio after "
        f"{first_seconds:.1f} s, then {then:.1f}x; "
        f"{100 * clipped / max(1, written * c.audio_channels):.3f} % of samples clipped -> {target}")


if __name__ == "__main__":
    run(main)
