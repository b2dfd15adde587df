"""Play: one block after another, for as long as you like.

    python sample.py --seconds 600 > out.wav
    python sample.py --live --realtime 1 | ffplay -autoexit -nodisp -    # what you type is played next

`denoise_block` makes a block, `Context` remembers the finished ones (the KV cache), `stream` puts them
together; training rolls out with the same. `decode_stream` in audio.py turns blocks into sound. See "How it
works" in the README. What is played when: live.py. """
import contextlib
import itertools
import math
import sys
import time
from functools import partial

import soundfile
import torch
from tqdm import tqdm

import osc
from audio import decode_stream, decoder_margin, encode_file, open_output, pcm     # decode_stream for callers
from common import (UserError, default_checkpoint, device_of, discard_output, keep_inputs, load,
                    playing_precision, reason_of, regime_of, run, say, speed, writable)
from controls import beat_of
from live import Turn, known_words, prompt_encoder
from model import NO_BLOCKS, Cond, Numbered, add_noise, alpha_sigma, denoise, forget_t5, schedule
from options import SAMPLERS, check, default_seconds, parse
from stage import (Delivery, Listening, Pace, Sound, Stopping, Typing, audio_from, control_of,
                   first_signal_sets, load_state, make_room, save_state, take_line)

GUIDED_BLOCKS = 2                                           # after a change of prompt, by "pingpong++"
GUIDANCE = 0.7                                              # of these, below 1: at 0 the prompt has no say
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
        self.frames_kept = (c.context_blocks if use_cache else c.reach_blocks) * c.block
        self.start = first * c.block                        # the next block's first frame
        self.kv = None                                      # cached: per layer (k, v)
        self.beat = None                                    # of the next block, `beat_of`: (B, block, 18)
        self.waiting = 0                                    # how many of the newest blocks are not cached yet
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
        self.let_wait()

    def let_wait(self):
        """The block finished last waits, and where nothing that is cached can stay, all of `finished`
        does."""
        if not self.keeps_cached:
            self.kv = None
        self.waiting = 1 if self.kv is not None else self.finished.shape[-1] // self.model.config.block

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
        if self.waiting:
            latents = self.finished[..., -self.waiting * block:]
            clean = Numbered(repeated(latents, batch), tuple(range(-self.waiting, 0)))
        if self.kv is not None:
            n_cached = self.kv[0][0].shape[2] // block
            cached = Numbered(self.kv, tuple(range(-self.waiting - n_cached, -self.waiting)))
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
        self.waiting = 0

    def take_prompt(self, prompt, forget=None):
        """A new prompt, from the next block on. What is cached stays as the old one made it, unless `forget`
        is a number: then the context is read again under the new one, its oldest so many blocks as silence.

        The batch may grow by the null prompt's branch (the context is read again) or lose it."""
        grows = len(prompt.global_) > len(self.prompt.global_)
        self.prompt = prompt
        if self.kv is not None:
            self.kv = [(k[:len(prompt.global_)], v[:len(prompt.global_)]) for k, v in self.kv]
        if forget is None and not (grows and self.use_cache):
            return
        c = self.model.config
        blocks = self.finished[..., -c.context:]
        silent = min(forget or 0, c.context_blocks) * c.block
        self.finished = torch.cat([torch.zeros_like(blocks[..., :silent]), blocks[..., silent:]], dim=-1)
        self.kv = None
        self.let_wait()

    def replace_last(self, block):
        """What somebody else played, (B, C, block), takes the place of the newest finished block."""
        self.finished = torch.cat([self.finished[..., :-block.shape[-1]], block], dim=-1)

    def tensors(self):
        """Between two blocks: all that changes from one to the next."""
        return [self.start, self.finished, *(y for kv in self.kv or () for y in kv)]

    def restore(self, tensors):
        """The inverse of `tensors`."""
        self.start, self.finished, *kv = tensors
        self.kv = list(zip(kv[::2], kv[1::2])) or None
        self.let_wait()


def repeated(x, batch):
    """x (B, C, T) as often as guidance needs it: (batch, C, T)."""
    return x if len(x) == batch else x.repeat(batch // len(x), 1, 1)


@torch.no_grad()
def denoise_block(predict, x, levels, sampler, objective, draw, cfg=1.0, given=None):
    """From noise x (B, C, T) to x0, evaluating predict(x, t) -> v at each of `levels`, falling from 1.

    sampler: "euler" keeps the predicted noise, "pingpong" draws fresh noise with draw(), "pingpong++" does so
    with guidance (`next_guided`), "dpmpp" is Euler with x0 extrapolated from the two last predictions
    (DPM-Solver++ 2M, arXiv 2211.01095). Stopping early is passing fewer levels. cfg: guidance; other than 1,
    predict gives v of the doubled batch (`with_null`). given: `Given`, or None."""
    noise = x
    previous = None    # "dpmpp": the last x0, and the growth of log SNR since
    for i, t in enumerate(levels):
        if given is not None:
            x = given.hold(x, t, noise, objective)
        v = predict(x, t)
        x0, eps = denoise(x, guided(v, cfg), t, objective)
        if i + 1 == len(levels):
            return x0 if given is None else given.hold(x0, torch.zeros_like(t), noise, objective)
        if sampler == "pingpong++":
            unguided, _ = denoise(x, guided(v, 0), t, objective)
            x = next_guided(x0, unguided, draw(), levels[i + 1], objective)
            continue
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


def next_guided(x0, unguided, noise, t, objective):
    """Guided ping-pong's x at the next level t: x0 + t (noise - unguided), for rectified flow.

    The prompt is followed by x0, while the noise goes onto what the model would play without a prompt, so a
    scale of 0 to 1 suffices for x0 (CFG++, arXiv 2406.08070)."""
    alpha, sigma = alpha_sigma(t, objective)
    return x0 + (alpha - 1) * unguided + sigma * noise


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
           use_cache=True, change=None, beat=None, sketch=None, forget=None, listen=None, state=None,
           keep=None):
    """Yield latent blocks (B, C, block), for ever when `blocks` is None; the first n do not depend on
    `blocks`.

    steps, sampler and cfg default to what suits the checkpoint. seed: one, or one for each item, which then
    is the stream of that seed. prime: latents (B or 1, C, T) to go on from; of its whole blocks, counted from
    its end, as many as still have any influence.

    change, beat and sketch are functions, called with a block's number, 0 the first, before it is made.
    change gives what holds from there on: a `Turn`, a bare Cond of the same batch, or None. beat gives
    what `controls.beat_of` takes: the tempo in bpm and the place in the bar, in [0, 1), where the block
    begins, or None. sketch gives a `Given`, or None. listen is called with a block's number after it was
    made: it gives latents (B, C, block) that were heard meanwhile and take its place in the context, or None,
    which ends the stream.

    After a bare Cond, finished blocks stay as they are; block-causal, so do their cached keys and values,
    made under the old condition (the newest block's only come with the next); encoder-decoder, the context is
    read again under the new one. After a Turn that is `turned`, the context is read again, its oldest
    `forget` blocks (None: all, but in a morph or while listening all but one) as silence, and GUIDED_BLOCKS
    blocks are made by guided ping-pong.

    keep: a function, called after each block with what to hand in as `state`, to go on from there; steps,
    sampler, cfg, forget and the noise are then the state's."""
    settings = sampling_settings(model, steps, sampler, cfg)
    settings["forget"] = model.config.context_blocks - 1 if forget is None and listen is not None else forget
    plan = BlockPlan(model, cond, settings, seed, state)
    context = Context(model, plan.encoded_prompt(), still_heard(model.config, cond, prime), use_cache)
    plan.begin(context, state)
    first = plan.number
    for number in itertools.count(first) if blocks is None else range(first, first + blocks):
        if listen is not None and number:
            heard = listen(number - 1)
            if heard is None:
                return
            context.replace_last(heard)
        plan.take_turn(None if change is None else change(number))
        if beat is not None:
            context.beat = beat_of(beat(number), model.config, len(cond.tokens), cond.tokens.device)
        given = None if sketch is None else sketch(number)
        sampler, cfg = plan.sampler_and_guidance()
        if plan.graphed is not None and sampler != "pingpong++":
            x = plan.graphed(plan.draw, given)
        else:
            x = denoise_block(context.predict, plan.draw(), plan.levels, sampler, model.config.objective,
                              plan.draw, cfg, given)
            context.append(x)
        plan.number += 1
        if keep is not None:
            keep(plan.state())
        yield x


class BlockPlan:
    """How the next block of a stream is made: under which prompt, in how many steps, by which sampler and
    guidance, from which noise."""

    def __init__(self, model, cond, settings, seed, state=None):
        """settings: steps, sampler, cfg, forget. The others as in `stream`."""
        self.model = model
        self.cond = cond
        self.settings = settings
        self.device = cond.tokens.device
        self.number = 0                                     # of the next block
        self.guided_until = -1                              # number of the first block after a guided stretch
        if state is not None:
            self.number = state["number"]
            self.guided_until = state["guided_until"]
            self.settings = dict(state["settings"])
        self.draw = Noise(model.config, seed, len(cond.tokens), self.device)
        if state is not None:
            self.draw.restore(state["noise"])

    def begin(self, context, state=None):
        """context: the stream's, made under `encoded_prompt`."""
        self.context = context
        if state is not None:
            context.restore(on_device(state["context"], self.device))
        self.prepare()

    def sampler_and_guidance(self):
        """Of the next block: guided ping-pong for some blocks after a change of prompt."""
        if self.number < self.guided_until:
            return "pingpong++", GUIDANCE
        return self.settings["sampler"], self.settings["cfg"]

    def encoded_prompt(self):
        _, cfg = self.sampler_and_guidance()
        return self.model.dit.encode_prompt(with_null(self.cond, cfg))

    def prepare(self):
        """For new settings: the noise levels of a block and, on a GPU, a function that makes it as one CUDA
        graph."""
        self.levels = schedule(self.settings["steps"])[:-1].to(self.device)
        self.graphed = None
        if speed and self.device.type == "cuda":
            self.graphed = speed.graphed_block(self.context, denoise_block, self.levels,
                                               self.settings["sampler"], self.settings["cfg"])

    def take_turn(self, turn):
        """turn: `Turn`, a new Cond, or None, before the next block is made."""
        if isinstance(turn, Cond):
            turn = Turn(turn)
        forget = None
        if turn is not None:
            self.cond = turn.cond or self.cond
            self.settings.update(turn.settings)
            if turn.turned:
                forget = self.settings["forget"]
                if forget is None:
                    forget = self.model.config.context_blocks - turn.gradual
                self.guided_until = self.number + GUIDED_BLOCKS
        if turn is not None or self.number == self.guided_until:
            self.context.take_prompt(self.encoded_prompt(), forget)
        if turn is not None and turn.settings:
            self.prepare()

    def state(self):
        """Plain values and tensors of their own, from which the stream goes on."""
        tensors = [torch.as_tensor(x).clone() for x in self.context.tensors()]
        return dict(number=self.number, guided_until=self.guided_until, settings=dict(self.settings),
                    context=tensors, noise=self.draw.state())


def on_device(tensors, device):
    """Of a saved context. On a CPU the first, its place in the stream, is a number."""
    start, *rest = (x.to(device) for x in tensors)
    return [start if device.type == "cuda" else int(start), *rest]


class Noise:
    """Draws the next noise (B, C, block) when called.

    It is drawn on the CPU, so that the same seed gives the same noise everywhere."""
    def __init__(self, config, seed, batch, device):
        """seed: one, or one for each item of the batch."""
        seeds = [seed] if isinstance(seed, int) else seed
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self.shape = batch // len(seeds), config.channels, config.block
        self.device = device

    def __call__(self):
        drawn = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.cat(drawn).to(self.device)

    def state(self):
        return [generator.get_state() for generator in self.generators]

    def restore(self, states):
        for generator, state in zip(self.generators, states):
            generator.set_state(state)


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


# -------------------------------------------------------------------------------- command line
def clip_pieces(model, args):
    """What a base model plays, one piece of audio (1, 2, n), and a line about it."""
    settings = sampling_settings(model, args.steps, args.sampler, args.cfg)
    numbers = {name: 0 if name == "seconds_start" else args.seconds for name, _, _ in model.config.numbers}
    encode, names = prompt_encoder(model, args.prompt_file, numbers)
    prompt = args.prompt
    if prompt is None:
        prompt = names[0] if names else model.sampling.get("prompt", "")
    cond = encode(prompt)
    if not names:
        prompt = known_words(model, prompt)

    def pieces():                                           # made when asked for, once the output is open
        yield model.autoencoder.decode(clip(model, cond, model.config.clip, seed=args.seed, **settings))
    return pieces(), f"{prompt!r}: one clip, {in_words(settings)}"


def stream_pieces(model, args, samples, together, control, pace, saved, stopping, take=None):
    """The audio pieces (1, 2, n) of a stream, at least `samples` of them, a line about the plan, and Sound.

    samples: None for no end; together: make blocks while others are decoded; pace: where the stream begins,
    which --listen moves to before block 0; take: takes a typed line (None: control.say)."""
    c = model.config
    settings = sampling_settings(model, args.steps, args.sampler, args.cfg)
    in_force = saved["stream"]["settings"] if saved else settings
    plan = (f"{control.playing()!r}: blocks of {c.block / c.frame_rate:.2f} s seeing "
            f"{c.context / c.frame_rate:.2f} s, {in_words(in_force)}")
    prime = None
    if args.prime is not None:
        prime = encode_file(model, args.prime, c.reach_blocks * c.block)[None].to(args.device)
        if prime.shape[-1] < c.block:
            raise UserError(f"{args.prime} is shorter than one block ({c.block / c.frame_rate:.2f} s)")
    sound = Sound(model, args.compile, saved)
    # whole blocks, and the decoder's reach beyond the end: so a shorter stream is exactly the start of a
    # longer one
    blocks = None
    if samples is not None:
        end = pace.position + samples
        blocks = math.ceil((end / c.hop + decoder_margin(c)) / c.block) - sound.number
    typing = Typing(sys.stdin, partial(take_line, take or control.say)) if args.live else None
    listening = None
    if args.listen:
        listening = Listening(model, audio_from(args.listen, c, stopping.is_set), args.delay, args.mix)
        pace.first = pace.position = -listening.delay       # silence first: block 0 begins at sample 0
    if samples is not None and not args.save_state:
        end = (pace.position + samples) / c.sample_rate
        never = [text for second, text in control.plan if second >= end]
        if never:
            say(f"planned for after the end, and not played: {'; '.join(never)}")

    def change(number):
        if typing is not None:
            typing.poll()
        turn = control.change(number)
        return turn._replace(turned=False) if turn is not None and args.no_transitions else turn

    def keep(state):
        sound.keep(state, control.state())
    sketches = c.channels > c.latent_channels
    latents = stream(model, control.cond, blocks=blocks, prime=prime, use_cache=not args.no_cache,
                     change=change, beat=control.beat if c.beats else None,
                     sketch=control.sketch if sketches else None, forget=args.forget,
                     listen=listening and listening.block, seed=args.seed, state=saved and saved["stream"],
                     keep=keep if args.save_state else None, **settings)
    if together:
        latents = speed.prefetch(latents)
    if prime is not None:                                   # decoded over the join, to be dropped afterwards
        heard = prime[..., -decoder_margin(c):]
        sound.number -= 1
        pieces = without_first(sound.pieces(itertools.chain([heard], latents)), heard.shape[-1] * c.hop)
    else:
        pieces = sound.pieces(latents)
    if saved:
        pieces = after(saved["rest"].to(args.device), pieces)
    if listening:
        pieces = listening.answers(pieces)
    if typing is not None:
        typing.watch()
    return pieces, plan, sound


def in_words(settings):
    return f"{settings['steps']} {settings['sampler']} steps, guidance {settings['cfg']:g}"


def held_back(pieces, n):
    """The same, but the first n come as one: nobody should listen while a GPU's code is compiled."""
    first = list(itertools.islice(pieces, n))
    if first:
        yield torch.cat(first, dim=-1)
    yield from pieces


def after(first, pieces):
    """One piece, then the others."""
    yield first
    yield from pieces


def only_first(pieces, samples):
    """The first so many samples; None: all."""
    for piece in pieces:
        piece = piece[..., :samples]
        yield piece
        if samples is not None:
            samples -= piece.shape[-1]
            if not samples:
                return


def without_first(pieces, samples):
    """The same audio without its first so many samples."""
    for piece in pieces:
        yield piece[..., samples:]
        samples = max(0, samples - piece.shape[-1])


def set_up(args):
    """The model of the arguments, ready to play, its precision, and whether blocks are made while others are
    decoded."""
    device = device_of(args.device)
    path = default_checkpoint() if args.ckpt is None else args.ckpt
    inputs = {"--ckpt": path, "--prime": args.prime, "--prompt-file": args.prompt_file,
              "--sketch": args.sketch, "--listen": args.listen, "--schedule": args.schedule,
              "--resume-state": args.resume_state}
    if args.out:
        keep_inputs(args.out, inputs)
    if args.save_state:                                     # over the file that it went on from, if so wished
        writable(args.save_state)
        keep_inputs(args.save_state, {**inputs, "--resume-state": None, "--out": args.out})
    threads = args.threads or torch.get_num_threads()
    model = load(path).to(device)
    args.seconds = args.seconds or default_seconds(model, args.live)
    check(model, args)
    parameters = sum(p.numel() for p in model.dit.parameters())
    # a block made ahead would be heard later: not where every change should be heard soon
    ahead = not args.realtime and not args.listen
    together = bool(speed) and ahead and speed.side_by_side(model, threads)
    if device.type == "cpu":
        torch.set_num_threads((threads + 1) // 2 if together else threads)
    precision = playing_precision(model, args.precision)
    say(f"{path}: {model.stage}, {regime_of(model.config)}, DiT {parameters / 1e6:.1f} M, {args.device}, "
        f"{threads} threads, {precision}")
    if args.compile:
        longer = "20 to 30 s" if device.type == "cpu" else "about a minute"
        say(f"compiling: the first audio takes {longer} longer")
        speed.compile_layers(model)
    return model, precision, together


@torch.no_grad()
def main():
    started = time.time()
    args = parse()
    torch.set_flush_denormal(True)
    if speed:
        speed.keep_memory()
    model, precision, together = set_up(args)
    c = model.config
    length = args.seconds * c.sample_rate
    samples = None if math.isinf(length) else round(length)
    stopping = Stopping()
    saved = load_state(args, model, precision) if args.resume_state else None
    pace = Pace(c.sample_rate, args.realtime, saved["position"] if saved else 0)
    control = sound = None
    if model.stage == "base":
        pieces, plan = clip_pieces(model, args)
    else:
        control = control_of(model, args, pace, stopping, saved)
        if args.osc is not None:
            say(f"OSC at 127.0.0.1:{osc.serve(control.say, args.osc)}")
        if args.osc_beats:
            osc.Beats(args.osc_beats, control, pace.heard)
        pieces, plan, sound = stream_pieces(model, args, samples, together, control, pace, saved, stopping)
    if not args.live and args.osc is None:                  # no prompt will follow
        forget_t5()
    say(plan + "; type a prompt, or a /command, and press Enter" * args.live)
    target = args.out or "standard output"
    writer = open_output(args.out, c.sample_rate, c.audio_channels, samples)
    if args.realtime and args.out is None:
        make_room(sys.stdout.fileno(), math.ceil(args.realtime * c.sample_rate) * 2 * c.audio_channels)
    bar = tqdm(total=samples and samples / c.sample_rate, unit="s", unit_scale=True, file=sys.stderr,
               disable=args.live or None, bar_format="{l_bar}{bar}| {n:.0f} s, {rate_fmt}")
    if args.compile and args.device != "cpu":
        # the third piece is compiled and recorded, and one more may be what a recording (--prime) leaves in
        # the decoder
        pieces = held_back(pieces, 4)

    # --- the loop; on Ctrl-C too, what was made is kept
    written = clipped = first_samples = 0
    first_seconds = 0.0                                     # from the start until the first audio is out
    delivery = Delivery(pace, control, stopping, samples, c.block * c.hop)
    try:
        with (contextlib.closing(writer), contextlib.closing(pieces), contextlib.closing(bar),
              first_signal_sets(stopping)):
            for piece in pieces:
                for audio in delivery.parts(piece):
                    writer.write(pcm(audio))
                    if not written:
                        first_seconds = time.time() - started
                        first_samples = audio.shape[-1]
                    clipped += (~(audio.abs() <= 1)).sum().item()       # what is no number too
                    written += audio.shape[-1]
                    bar.update(audio.shape[-1] / c.sample_rate)
                if delivery.over:
                    break
    except BrokenPipeError:                                 # the player has quit, perhaps by the same Ctrl-C
        if args.save_state and delivery.rest is not None:
            save_state(args, model, precision, sound.state(), delivery.rest, pace.position)
            say(f"whoever listened has quit; --resume-state {args.save_state} goes on from there")
        raise
    except (OSError, soundfile.LibsndfileError) as error:
        if not args.out:
            discard_output()
        raise UserError(f"cannot go on writing {target} after {written / c.sample_rate:.1f} s: "
                        f"{reason_of(error, args.out)}") from None
    if args.save_state and delivery.over:
        save_state(args, model, precision, sound.state(), delivery.rest, pace.position)
    seconds = written / c.sample_rate
    took = time.time() - started
    then = (written - first_samples) / c.sample_rate / max(1e-9, took - first_seconds)
    say(f"{seconds:.1f} s of music in {took:.1f} s, {seconds / took:.1f}x real time; first audio after "
        f"{first_seconds:.1f} s, then {then:.1f}x; "
        f"{100 * clipped / max(1, written * c.audio_channels):.3f} % of samples clipped -> {target}")
    for line in pace.summary():
        say(line)
    if stopping.signal is not None:
        raise KeyboardInterrupt(stopping.signal)


if __name__ == "__main__":
    run(main)
