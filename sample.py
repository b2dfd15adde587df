"""Play: one block after another, for as long as you like.

    python sample.py --seconds 600 > out.wav
    python sample.py --live | ffplay -nodisp -nostats -   # what you type is what is played next

`denoise_block` makes a block and `Context` remembers the finished ones (the KV cache); training rolls out with the same
two. `decode_stream` turns blocks into audio without seams. See "How it works" in the README.
"""
import argparse
import contextlib
import itertools
import math
import os
import select
import struct
import sys
import time
import weakref
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import soundfile
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import UserError, default_checkpoint, device_of, discard_output, finite, keep_memory, load, positive, random_seed, run, whole
from model import Cond, Conv1d, ConvTranspose1d, Memory, ResidualUnit, add_noise, alpha_sigma, denoise, schedule, words_of
from precision import PRECISIONS, packs, to_precision
from stable_audio_port import forget_t5, load_prompts

SAMPLERS = "euler", "dpmpp", "pingpong"
DEFAULTS = {                                                # by the stage recorded in the checkpoint
    "base": dict(sampler="pingpong", steps=8, cfg=1.0),
    "finetune": dict(sampler="euler", steps=50, cfg=7.0),
    "arc": dict(sampler="pingpong", steps=8, cfg=1.0),
}


# ------------------------------------------------------------------------------------------------ one block after another
def as_it_is():
    """Nothing is compiled for what is run here: for shapes that come once it would take longer than they do."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


class Context:
    """The finished blocks that the next block sees, with their keys and values: the KV cache.

    A finished block waits until the next block's first denoising step, whose pass also takes it along, clean, and caches
    its keys and values. Encoder-decoder: the whole context waits, and the cache is made anew. Without a cache every step
    runs over all blocks that have any influence. Gradients never enter the context."""

    def __init__(self, model, memory, prime, use_cache=True, first=0):
        """prime: latents (B, C, whole blocks, possibly none); first: number of the first context block."""
        self.model, self.memory, self.use_cache, c = model, memory, use_cache, model.config
        self.grows = use_cache and c.causal                 # block by block, because finished blocks never look ahead
        self.most = c.block * (1 if self.grows else c.context_blocks if use_cache else c.reach_blocks)
        self.start = torch.tensor(first * c.block, device=prime.device)     # the next block's first frame
        self.kv, self.waiting = None, False                 # per layer (k, v); are the finished latents not cached yet?
        self.finished = prime[..., :0]                      # latents, the last `most` frames
        blocks = list(prime.split(c.block, dim=-1)) if prime.shape[-1] else []
        zeros = prime.new_zeros(*prime.shape[:-1], c.block)
        with as_it_is():
            for block in [zeros] * (c.context_blocks - len(blocks)) + blocks:
                self.append(block)

    @torch.no_grad()
    def append(self, block):
        """A block (B, C, block) is finished."""
        if self.waiting and self.grows:
            self.fill()                                     # only while priming: a denoised block has filled it already
        self.finished = torch.cat([self.finished, block.detach()], dim=-1)[..., -self.most:]
        self.start, self.waiting = self.start + self.model.config.block, True
        if not self.grows:
            self.kv = None

    @property
    def state(self):
        """Between two blocks: the tensors that change from one to the next."""
        return [self.start, self.finished, *itertools.chain.from_iterable(self.kv or ())]

    @state.setter
    def state(self, tensors):
        self.start, self.finished, *kv = tensors
        self.kv, self.waiting = list(zip(kv[::2], kv[1::2])) or None, True

    def run(self, x=None, t=None):
        """One pass over [waiting blocks | x | its timestep token] -> v, and the keys and values of the waiting blocks."""
        batch, block = len(self.memory.global_), self.model.config.block
        copies = lambda y: y if y is None or len(y) == batch else y.repeat(batch // len(y), 1, 1)   # guidance: 2
        t = None if t is None else t.expand(batch, 1)
        n = self.finished.shape[-1] // block if self.waiting else 0
        cached = self.kv[0][0].shape[2] // block if self.kv else 0
        v, new = self.model.dit.blocks(self.memory, copies(x), t, () if x is None else (0,),        # numbered from the next block
                                       copies(self.finished) if n else None, tuple(range(-n, 0)),
                                       self.kv, tuple(range(-n - cached, -n)), self.start)
        return None if v is None else v.float(), new        # in bf16 the network runs, not the sampler

    def store(self, new):
        """Append keys and values of the waiting blocks to the cache and forget what no later block sees."""
        keep = self.model.config.context
        if self.kv is not None:
            new = [(torch.cat([k, k2], dim=2), torch.cat([v, v2], dim=2)) for (k, v), (k2, v2) in zip(self.kv, new)]
        self.kv, self.waiting = [(k[:, :, -keep:], v[:, :, -keep:]) for k, v in new], False

    @torch.no_grad()
    def fill(self):
        self.store(self.run()[1])

    def predict(self, x, t):
        """v (B, C, block) of the next block x at level t. With guidance the batch is doubled: (2B, C, block)."""
        if not self.use_cache:
            return self.run(x, t)[0]
        if self.waiting and torch.is_grad_enabled():
            self.fill()                                     # a pass of its own, so that no gradient reaches the context
        v, new = self.run(x, t)
        if self.waiting:
            self.store(new)
        return v


@torch.no_grad()
def denoise_block(predict, x, levels, sampler, objective, draw):
    """From noise x (B, C, T) to x0, evaluating predict(x, t) -> v at each of `levels`, falling from 1.

    sampler: "euler" keeps the predicted noise, "pingpong" draws fresh noise with draw(), "dpmpp" is Euler with x0
    extrapolated from the two last predictions (DPM-Solver++ 2M, arXiv 2211.01095). Stopping early is passing fewer levels."""
    before = None                                           # the last x0, and by how much log SNR grew since
    for i, t in enumerate(levels):
        x0, eps = denoise(x, predict(x, t), t, objective)
        if i + 1 == len(levels):
            return x0
        if sampler != "dpmpp":
            x = add_noise(x0, eps if sampler == "euler" else draw(), levels[i + 1], objective)
            continue
        (alpha, sigma), (alpha2, sigma2) = (alpha_sigma(level, objective) for level in levels[i:i + 2])
        h = (alpha2 / sigma2).log() - (alpha / sigma).clamp(min=0).log()     # the cosine of pi / 2, rounded, is below 0
        ahead = x0 if before is None else x0 + h / (2 * before[1]) * (x0 - before[0])
        x, before = sigma2 / sigma * x - alpha2 * torch.expm1(-h) * ahead, (x0, h)


def sampling_settings(model, steps=None, sampler=None, cfg=None):
    """What the caller names, else what the checkpoint recommends, else the stage's defaults."""
    settings = {**DEFAULTS.get(model.stage, DEFAULTS["finetune"]), **model.sampling}
    named = dict(steps=steps, sampler=sampler, cfg=cfg)
    settings = {k: settings[k] if v is None else v for k, v in named.items()}
    if settings["sampler"] not in SAMPLERS or settings["steps"] < 1:
        raise UserError(f"{settings['steps']} steps of {settings['sampler']}: at least 1 of {', '.join(SAMPLERS)}")
    return settings


def with_null(cond, cfg):
    """The batch that guidance needs: [conditional | null], or just the condition where cfg is 1."""
    return cond if cfg == 1 else Cond(*(torch.cat(pair) for pair in zip(cond, cond.null())))


def with_guidance(predict, cfg):
    """predict(x, t) -> v of that doubled batch, as one that is guided: v_null + cfg (v_cond - v_null)."""
    def guided(x, t):
        cond, null = predict(x, t).chunk(2)
        return null + cfg * (cond - null)
    return predict if cfg == 1 else guided


class Graphed:
    """function(state, *inputs) -> (result, new state), a function of tensors alone. On a GPU, once it has met the same shapes
    twice, it is recorded as a CUDA graph, and then all its kernels start with one call: Python would take longer than they do.
    Only for these shapes is anything compiled.

    state: a list of tensors, which from then on stay where the graph keeps them. An input is read again if it is another
    tensor than the last time, not if its values have changed."""

    def __init__(self, function):
        self.function, self.graph, self.shapes = function, None, None

    @torch.no_grad()
    def __call__(self, state, *inputs):
        tensors = [*state, *inputs]
        shapes, device = [x.shape for x in tensors], tensors[0].device.type
        if device != "cuda" or torch.is_autocast_enabled(device):           # which keeps its own copies of weights
            return self.function(state, *inputs)
        if shapes != self.shapes:
            self.graph, self.shapes = None, shapes
            with as_it_is():
                return self.function(state, *inputs)
        if self.graph is None:
            self.record(tensors, len(state))
        for i, x in enumerate(tensors):
            if x is not self.seen[i]:
                self.tensors[i].copy_(x)
        self.graph.replay()
        self.seen = [*self.tensors[:len(state)], *inputs]
        return self.result.clone(), self.tensors[:len(state)]

    def record(self, tensors, n):
        self.tensors, self.seen, graph = [x.clone() for x in tensors], tensors[:], torch.cuda.CUDAGraph()
        self.function(self.tensors[:n], *self.tensors[n:])  # compiles, and chooses the convolutions' algorithms
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.result, new = self.function(self.tensors[:n], *self.tensors[n:])
            for kept, x in zip(self.tensors, new):
                kept.copy_(x)
        self.graph = graph                                  # only once it is whole


def block_by_block(context, levels, sampler, cfg=1.0):
    """A function that makes the block (B, C, block) after `context`, which then is part of it, of noise (n, B, C, block):
    one for each level where the sampler is "pingpong", else one. Nothing in it waits for a GPU."""
    predict, objective = with_guidance(context.predict, cfg), context.model.config.objective

    def following(state, noise, *memory):                   # `context` is where it works: what it needs of it is handed in
        context.state, context.memory, (x, *rest) = state, Memory.of(memory), noise
        x = denoise_block(predict, x, levels, sampler, objective, iter(rest).__next__)
        context.append(x)
        return x, context.state
    graphed = Graphed(following)

    def make(noise):
        x, context.state = graphed(context.state, noise, *context.memory.tensors())
        return x
    return make


@torch.no_grad()
def stream(model, cond, *, blocks=None, steps=None, sampler=None, cfg=None, seed=0, prime=None, use_cache=True, change=None):
    """Yield latent blocks (B, C, block), for ever when `blocks` is None; the first n do not depend on `blocks`.

    prime: latents (B or 1, C, T) to go on from; only its last whole blocks, as many as are still heard, count. steps, sampler and cfg
    default to what suits the checkpoint's stage. seed: one, or one for each item, which then is the stream of that seed.
    change: called before each block; gives a new `cond` of the same batch from there on, or None. Finished blocks stay.
    Block-causal, so do their cached keys and values, made under the old condition (the newest block's only come with the
    next); encoder-decoder, the context is read anew under the new one, as always."""
    c, settings = model.config, sampling_settings(model, steps, sampler, cfg)
    cfg, device, seeds = settings["cfg"], cond.tokens.device, [seed] if isinstance(seed, int) else seed
    rngs = [torch.Generator().manual_seed(s) for s in seeds]
    levels = schedule(settings["steps"])[:-1].to(device)
    shape = len(cond.tokens) // len(rngs), c.latent_channels, c.block
    draw = lambda: torch.cat([torch.randn(shape, generator=rng) for rng in rngs])
    prime = torch.zeros(len(cond.tokens), c.latent_channels, 0) if prime is None else prime
    heard = min(prime.shape[-1] // c.block, c.reach_blocks) * c.block
    prime = prime[..., prime.shape[-1] - heard:].to(device).expand(len(cond.tokens), -1, -1)
    context = Context(model, model.dit.memory(with_null(cond, cfg)), prime, use_cache)
    make, draws = block_by_block(context, levels, settings["sampler"], cfg), len(levels) if settings["sampler"] == "pingpong" else 1
    for _ in itertools.count() if blocks is None else range(blocks):
        if change is not None and (new := change()) is not None:
            context.memory = model.dit.memory(with_null(new, cfg))
        yield make(torch.stack([draw() for _ in range(draws)]).to(device))


@torch.no_grad()
def clip(model, cond, frames, *, steps=None, sampler=None, cfg=None, seed=0):
    """One clip of latents (B, C, frames) made whole, as the public model does: no context, no blocks."""
    settings, rng = sampling_settings(model, steps, sampler, cfg), torch.Generator().manual_seed(seed)
    told = with_null(cond, settings["cfg"])
    draw = lambda: torch.randn(len(cond.tokens), model.config.latent_channels, frames, generator=rng).to(cond.tokens.device)
    twice = lambda x: x.repeat(len(told.tokens) // len(x), 1, 1)                # with guidance
    predict = with_guidance(lambda x, t: model.dit(twice(x), t.expand(len(told.tokens)), told), settings["cfg"])
    levels = schedule(settings["steps"])[:-1].to(cond.tokens.device)
    return denoise_block(predict, draw(), levels, settings["sampler"], model.config.objective, draw)


class Winograd:
    """A convolution of 7 taps without its padding, by 12 matrix products for 6 outputs in place of 42 (Toom-Cook; Winograd 1980).

    Polynomials of 6 and of 7 coefficients have a product that 12 values settle: take the values of each at 12 points, multiply,
    go back to coefficients. Transposed, those three steps are a convolution: 12 inputs are mixed into 12 sums, each sum goes
    through one matrix (the values of the taps' polynomial there), and what they give is mixed into 6 outputs. In float32 that is
    off by 5e-6 of the outputs, ten times as far as the convolution itself."""
    points = 1, -1, 0, 1 / 3, -1 / 3, 2 / 3, -2 / 3, 3 / 2, -3 / 2, 3, -3      # and infinity, where the last coefficient is the value

    def __init__(self, layer, most=512):
        values = lambda n: torch.tensor([[p ** i for i in range(n)] for p in self.points] + [[0] * (n - 1) + [1]], dtype=torch.float64)
        back = torch.linalg.inv(values(12)).T
        size = back.abs().sum(1, keepdim=True)              # divided by it, sums are about as large as inputs
        weight = layer.weight.detach().double()             # (out, in, 7)
        self.taps = (size * values(7) @ weight.permute(2, 1, 0).flatten(1)).float().unflatten(1, weight.shape[1::-1])   # (12, in, out)
        self.sums, self.outputs = (back / size).float(), values(6).T.float()
        self.bias, self.dilation, self.most = layer.bias.detach(), layer.dilation[0], most

    @staticmethod
    def suits(layer):
        """Is it faster? In float32 on a CPU 1.3 to 3 times, but for matrices too small to be worth the mixing."""
        return (layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32 and layer.kernel_size == (7,)
                and min(layer.in_channels, layer.out_channels) >= 128)

    def __call__(self, x):                                  # (B, in, T) -> (B, out, T - 6 * dilation)
        (batch, channels, size), d, x = x.shape, self.dilation, x.transpose(1, 2)
        rows = 6 * math.ceil(size / (6 * d))
        if batch * d > 1:                                   # every d-th frame, and item after item, as one long sequence
            x = F.pad(x, (0, 0, 0, rows * d - size)).unflatten(1, (rows, d)).transpose(1, 2)
        x, tiles = x.reshape(-1, channels), batch * d * rows // 6
        y, most = x.new_empty(tiles, 6, self.taps.shape[2]), min(tiles, self.most)
        sums, products = x.new_empty(most, 12, channels), x.new_empty(12, most, y.shape[2])
        for i in range(0, tiles - 1, most):                 # a few at a time, for the CPU's caches
            piece = x[6 * i:6 * (i + most) + 6]
            if len(piece) % 6:
                piece = F.pad(piece, (0, 0, 0, -len(piece) % 6))
            n = len(piece) // 6 - 1
            torch.bmm(self.sums.expand(n, 12, 12), piece.unfold(0, 12, 6).transpose(1, 2), out=sums[:n])
            torch.addmm(self.bias, sums[:n, 0], self.taps[0], out=products[0, :n])      # the value at 1 counts once in every output
            for k in range(1, 12):
                torch.mm(sums[:n, k], self.taps[k], out=products[k, :n])
            torch.bmm(self.outputs.expand(n, 6, 12), products[:, :n].transpose(0, 1), out=y[i:i + n])
        # outputs that span two stretches of the long sequence are the last of each, past those that there are
        return y.view(batch, d, rows, -1).transpose(1, 2).flatten(1, 2)[:, :size - 6 * d].transpose(1, 2)


class Unpadded:
    """One of the decoder's convolutions without its padding, a copy of its weights lying as a CPU wants them.

    A transposed one has a kernel of two strides: it becomes a convolution over two frames that makes a stride's samples
    as so many channels, which in channels-last memory are the samples one after another. Its input starts a frame early."""

    def __init__(self, layer):
        weight, self.bias, self.samples, self.out_channels = layer.weight.detach(), layer.bias, 1, layer.out_channels
        if isinstance(layer, ConvTranspose1d):              # (in, out, now and before) -> (sample and out, in, before and now)
            self.samples = layer.stride[0]
            weight = weight.unflatten(2, (2, self.samples)).flip(2).permute(3, 1, 0, 2).flatten(0, 1)
            self.bias = self.bias.repeat(self.samples)
        self.reach, self.dilation = (weight.shape[-1] - 1) * layer.dilation[0], (1, *layer.dilation)
        self.winograd = Winograd(layer) if Winograd.suits(layer) else None
        if self.winograd:
            return
        # dilated, on a GPU: frames in rows of `dilation`, so that the taps are neighbours below each other; cuDNN took 23 ms for 0.1
        self.folded = layer.dilation[0] if weight.is_cuda else 1
        weight = weight[:, :, None] if self.folded == 1 else weight[..., None]
        self.weight, self.packed = weight.contiguous(memory_format=torch.channels_last), packs(weight[:, :, 0])
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, (0, 0), (1, 1), self.dilation, 1)

    def __call__(self, x):                                  # (B, in, T) -> (B, out, (T - reach) * samples)
        if x.shape[-1] <= self.reach:
            return x.new_zeros(len(x), self.out_channels, 0)
        if self.winograd:
            return self.winograd(x)
        n, x = x.shape[-1], x[:, :, None]
        if self.folded > 1:
            rows = F.pad(x, (0, -n % self.folded))[:, :, 0].unflatten(-1, (-1, self.folded))
            return F.conv2d(rows, self.weight, self.bias).flatten(2)[..., :n - self.reach]
        if self.packed:
            y = torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, (0, 0), (1, 1), self.dilation, 1, "none", [], "")
        else:
            y = F.conv2d(x, self.weight, self.bias, dilation=self.dilation)
        return y[:, :, 0].transpose(1, 2).reshape(len(x), -1, self.out_channels).transpose(1, 2)


def plain_snake(layer, x, out):
    """SnakeBeta in float32, for a compiler."""
    alpha, gain = (y[:, None] for y in layer.constants(torch.float32))
    return out.copy_(x + gain * torch.sin(alpha * x.float()).square())


@lru_cache
def fused_snake(device, dtype):
    """SnakeBeta compiled, in one pass over memory, as a function (layer, x, out). UserError where that does not work."""
    made = lambda x, alpha, gain: x + gain * torch.sin(alpha * x.float()).square()
    into = torch.compile(lambda x, alpha, gain, out: out.copy_(made(x, alpha, gain)), dynamic=True)
    in_place = torch.compile(lambda x, alpha, gain: x.copy_(made(x, alpha, gain)), dynamic=True)
    torch._dynamo.config.recompile_limit = 64               # for every precision and number of threads

    def snake(layer, x, out):
        constants = layer.constants(torch.float32)          # no parameters: for those every size would be compiled anew
        if x.shape[-1] and out is x:
            in_place(x.transpose(1, 2), *constants)
        elif x.shape[-1]:
            into(x.transpose(1, 2), *constants, out.transpose(1, 2))
        return out
    try:                                                    # (B, samples, channels), like the first that comes
        in_place(torch.rand(1, 5, 3, device=device, dtype=dtype), *torch.rand(2, 3, device=device))
    except Exception as error:
        raise UserError(f"--compile does not work here ({(str(error).strip() or repr(error)).splitlines()[0][:100]})") from None
    return snake


def compile_layers(model):
    """On a GPU: the transformer's layers compiled, which fuses what lies between their matrix products. On a CPU: nothing."""
    if next(model.parameters()).device.type == "cuda":
        for layer in model.dit.layers:                      # all alike: compiled once for each shape
            layer.compile(dynamic=False)


class StreamingDecoder:
    """The autoencoder's decoder fed piece by piece: each layer keeps the end of its input, so no block is decoded twice.

    A convolution that looks ahead gives its output that much later; what its padding is to a whole, zeros at the start
    and the end are to a stream. So all pieces together equal decoding everything at once. Has its own copy of the weights.
    compile: the snakes; on a GPU all but the convolutions."""

    @torch.no_grad()
    def __init__(self, autoencoder, compile=False):
        self.layers, self.kept, self.places = autoencoder.decoder, {}, []      # what layers keep; those layers, in order
        self.unpadded = {layer: Unpadded(layer) for layer in self.layers.modules() if isinstance(layer, (Conv1d, ConvTranspose1d))}
        self.dtype, device = self.layers[0].weight.dtype, self.layers[0].weight.device.type
        me, piece, self.snake = weakref.ref(self), StreamingDecoder.piece, lambda layer, x, out: layer(x, out=out)
        if compile and device == "cpu":
            self.snake = fused_snake(device, self.dtype)
        elif compile:                                       # in as few passes over memory as can be
            fused_snake(device, self.dtype)                 # raises now what the third block would
            piece, self.snake = torch.compile(piece, dynamic=False), plain_snake
        # not self.piece: in a circle of references the copy of the weights would outlive the decoder
        self.graphed = Graphed(lambda *args: piece(me(), *args))
        # values between two layers: in bf16 a CPU multiplies so fast that they should stay in its caches; in float32 it did not matter
        self.most = 2 ** 21 if device == "cpu" and self.dtype == torch.bfloat16 else math.inf

    @torch.no_grad()
    def __call__(self, latents, last=False):
        """(B, C, T) -> the audio (B, 2, n) that they settle; with `last` also all that is still inside."""
        kept = list(self.kept.values())
        audio, kept = self.piece(kept, latents, last) if last else self.graphed(kept, latents)
        self.places = list(self.kept)
        self.kept = dict(zip(self.places, kept))
        return audio

    def piece(self, kept, latents, last=False):
        """The same as a function of what the layers have kept, returning what they keep now."""
        self.kept = dict(zip(self.places, kept))
        return self.through(self.layers, latents.to(self.dtype), last).float(), list(self.kept.values())

    def through(self, layers, x, last):
        for i, layer in enumerate(layers):
            if x.numel() > self.most and x.shape[-1] > 1:   # the rest in pieces: to a stream it is all the same
                pieces = x.split(max(1, self.most // x[..., 0].numel()), dim=-1)
                return torch.cat([self.through(layers[i:], piece, last and piece is pieces[-1]) for piece in pieces], dim=-1)
            if isinstance(layer, ResidualUnit):
                x = self.unit(layer, x, last)
            elif isinstance(layer, ConvTranspose1d):
                x = self.upsample(layer, x, last)
            else:
                x = self.conv(layer, x, last) if isinstance(layer, Conv1d) else self.snake(layer, x, x)     # the layer before made x
        return x

    def joined(self, layer, x, first, after=0, snake=None):
        """The end of a layer's input so far (at the start: `first` zeros), then x or snake(x), then `after` zeros."""
        before = self.kept[layer] if layer in self.kept else x.new_zeros(*x.shape[:2], first)
        at, end = before.shape[-1], before.shape[-1] + x.shape[-1]
        whole = x.new_empty(len(x), end + after, x.shape[1]).transpose(1, 2)    # channels last in memory
        whole[..., :at] = before
        if snake is None:
            whole[..., at:end] = x
        else:
            self.snake(snake, x, whole[..., at:end])
        whole[..., end:] = 0
        return whole

    def conv(self, conv, x, last, snake=None):
        pad = conv.padding[0]
        x = self.joined(conv, x, pad, pad * last, snake)
        self.kept[conv] = x[..., max(0, x.shape[-1] - 2 * pad):].clone()
        return self.unpadded[conv](x)

    def unit(self, unit, x, last):
        snake, wide, snake2, narrow = unit.layers
        x = x.to(wide.weight.dtype)                         # in bf16 the last units stay in float32
        y = self.conv(wide, x, last, snake)
        y = self.unpadded[narrow](self.snake(snake2, y, y))
        waiting = self.kept.get(unit, x[..., :0])           # input whose output comes only now
        n, size = min(waiting.shape[-1], y.shape[-1]), y.shape[-1]
        y[..., :n].add_(waiting[..., :n])
        y[..., n:].add_(x[..., :size - n])
        self.kept[unit] = torch.cat([waiting[..., n:], x[..., size - n:]], dim=-1)
        return y

    def upsample(self, conv, x, last):                      # a frame reaches its own samples and those of the next
        started = conv in self.kept
        x = self.joined(conv, x, 1, int(last))
        if x.shape[-1] > 1:
            self.kept[conv] = x[..., -1:].clone()
        y, pad = self.unpadded[conv](x), conv.padding[0]
        return y[..., 0 if started else pad:y.shape[-1] - pad * last]


def decode_stream(autoencoder, latent_blocks, compile=False):
    """Latent blocks (B, C, n) -> audio pieces (B, 2, m), together equal to decoding everything at once. compile: see `StreamingDecoder`.

    A piece is what its block settles; the rest, for which the decoder must know what follows, comes with the next."""
    decoder = StreamingDecoder(autoencoder, compile)        # at the call, so that its UserError comes before any output is opened

    def pieces():
        block = None
        for block in latent_blocks:
            audio = decoder(block)
            if audio.shape[-1]:
                yield audio
        if block is not None:
            yield decoder(block[..., :0], last=True)
    return pieces()


def prefetch(items):
    """The same items, each made in another thread while the caller is busy with the one before."""
    items, end, wanted, made = iter(items), object(), SimpleQueue(), SimpleQueue()

    def work():
        while wanted.get():
            try:
                made.put((next(items, end), None))
            except BaseException as error:                  # told to the caller, in whose thread it belongs
                made.put((end, error))
    thread = Thread(target=work, daemon=True)
    thread.start()
    wanted.put(True)
    try:
        while (got := made.get())[0] is not end:
            wanted.put(True)
            yield got[0]
        if got[1] is not None:
            raise got[1]
    finally:                                                # Python must not exit while the thread is inside torch
        wanted.put(False)
        thread.join()


def side_by_side(model, threads):
    """Should half of the CPU's cores make blocks while the other half turns them into sound?

    Yes where layers are too short to be split among all cores. Those of a large network are not, and the half that is done
    first would only wait: Stable Audio Open Small (int8, 2 cores) then played 4 steps at 0.60 times real time, not 0.74."""
    return next(model.parameters()).device.type == "cpu" and threads > 1 and model.config.width <= 512


# ------------------------------------------------------------------------------------------------ output
class WavWriter:
    """16-bit PCM WAV to an open binary file, a pipe included. samples: the length, or None; mended at close where the file is seekable."""

    def __init__(self, file, rate, channels, samples=None):
        self.file, self.rate, self.channels, self.promised, self.written = file, rate, channels, samples, 0
        self.start = file.tell() if file.seekable() else None
        self.header(samples)

    def header(self, samples):
        size = 2 * self.channels * samples if samples is not None else 2 ** 32
        riff, data = (min(n, 2 ** 32 - 1) for n in (size + 36, size))   # all ones: the convention for streams
        self.file.write(struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", riff, b"WAVE", b"fmt ", 16, 1, self.channels, self.rate,
                                    2 * self.channels * self.rate, 2 * self.channels, 16, b"data", data))

    def write(self, samples):                               # int16 (n, channels)
        self.file.write(samples.tobytes())
        self.file.flush()
        self.written += len(samples)

    def close(self):
        if self.start is not None and self.written != self.promised:
            self.file.seek(self.start)
            self.header(self.written)
            self.file.seek(0, os.SEEK_END)
        self.file.flush()


def open_output(path, rate, channels, samples):
    """A writer of int16 (n, channels) with write and close: stdout (None), .wav or .flac. Raises UserError."""
    if path is None and (sys.stdout is None or sys.stdout.isatty()):
        raise UserError(f"standard output is {'a terminal' if sys.stdout else 'closed'}: send the audio to a file (> out.wav), a player, or --out FILE")
    if path is not None and Path(path).suffix.lower() not in (".wav", ".flac"):
        raise UserError(f"--out {path}: the name must end in .wav or .flac")
    try:
        if path is None:
            return WavWriter(sys.stdout.buffer, rate, channels, samples)
        if Path(path).suffix.lower() == ".wav":
            return WavWriter(open(path, "wb"), rate, channels, samples)
        return soundfile.SoundFile(path, "w", rate, channels, "PCM_16")
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"cannot write {path or 'to standard output'}: {getattr(error, 'strerror', None) or error}") from None


def pcm(audio):
    """Audio (1, 2, n) in [-1, 1] -> int16 (n, 2)."""
    return (audio[0].T.float().clamp(-1, 1) * 32767).round().to(torch.int16).cpu().numpy()


# ------------------------------------------------------------------------------------------------ command line
def parse(argv=None):
    p = argparse.ArgumentParser(description="Stream music, block by block, as a WAV on standard output.", allow_abbrev=False)
    p.add_argument("--ckpt", help="checkpoint (default: out/arc.pt, else out/finetune.pt, else nano.pt)")
    p.add_argument("--prompt", help="what to play (default: the checkpoint's own example)")
    p.add_argument("--prompt-file", help="embeddings written by stable_audio_port.py --prompts; the first, or the one --prompt names")
    p.add_argument("--seconds", type=positive, help="length (default: 30, or a whole clip if that is shorter; with --live inf); inf plays until stopped")
    p.add_argument("--prime", help="audio file to go on from")
    p.add_argument("--live", action="store_true", help="each line typed while a player plays is the prompt from the next block on (not on Windows)")
    p.add_argument("--out", help=".wav or .flac instead of standard output")
    # sampling
    p.add_argument("--seed", type=random_seed, default=0)
    p.add_argument("--steps", type=whole, help="denoising steps per block (default: the checkpoint's)")
    p.add_argument("--cfg", type=finite, help="guidance, 1 for none (default: the checkpoint's)")
    p.add_argument("--sampler", choices=SAMPLERS, help="(default: the checkpoint's)")
    p.add_argument("--no-cache", action="store_true", help="recompute the whole context at every step: slow, the same music but for rounding (in int8 that makes another tune)")
    # machine
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: int8 where CPU and checkpoint suit it, else bf16 where it is faster")
    p.add_argument("--threads", type=whole, help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--compile", action="store_true", help="compile part of the decoder, 20 s more before the first block, then faster; on a GPU also the transformer, a minute")
    return p.parse_args(argv)


def known_words(model, prompt):
    """The prompt without words that the checkpoint's own text encoder never met, whose vectors are random still and make fewer,
    softer notes, and without those that it does not read because there are too many. They are named on standard error."""
    c, words, known = model.config, words_of(prompt), model.sampling.get("words")
    if c.text != "words":                                   # T5 knows all words
        return prompt
    strange = [w for w in words if known and w not in known]
    good = [w for w in words if w not in strange]
    for which, left in ("that this model has not learned", strange), (f"beyond the {c.text_tokens} that it reads", good[c.text_tokens:]):
        if left:
            print(f"words {which} are left out: {', '.join(left)}", file=sys.stderr)
    return prompt if good[:c.text_tokens] == words else " ".join(good[:c.text_tokens])


def make_cond(model, prompt, prompt_file, numbers):
    """The condition for one stream from --prompt (None: the checkpoint's own, or the file's first) and --prompt-file, and the prompt's text."""
    if prompt_file is None:
        asked = model.sampling.get("prompt", "") if prompt is None else prompt
        prompt = known_words(model, asked)
        if asked and not prompt:
            raise UserError(f"none is left; it knows {', '.join(model.sampling['words'][:20])}")
        return model.conditioner([prompt], **numbers), prompt
    prompts, embeddings = load_prompts(prompt_file)
    if prompt is not None and prompt not in prompts:
        raise UserError(f"{prompt_file} holds no embedding of {prompt!r}; it holds: {'; '.join(prompts[:5])}")
    if embeddings.shape[-1] != model.config.cond_width:
        raise UserError(f"{prompt_file} holds embeddings {embeddings.shape[-1]} wide, this checkpoint takes {model.config.cond_width}: "
                        "they are another model's (--ckpt)")
    row, device = 0 if prompt is None else prompts.index(prompt), next(model.parameters()).device
    return model.conditioner(embeddings[row:row + 1].float().to(device), **numbers), prompts[row]


def last_lines(file):
    """Yield the last line that came into an open file, a terminal or a pipe, since the turn before, or None. Never waits."""
    unfinished = b""
    while True:
        with contextlib.suppress(OSError):                  # a terminal that is gone
            while select.select([file], [], [], 0)[0] and (more := os.read(file.fileno(), 2 ** 16)):
                unfinished += more
        *lines, unfinished = unfinished.split(b"\n")
        yield next((line.decode(errors="replace").strip() for line in reversed(lines) if line.strip()), None)


def new_prompt(model, prompt_file, lines):
    """--live: the condition that was typed since the last call, or None."""
    if (line := next(lines)) is None:
        return None
    try:
        cond, prompt = make_cond(model, line, prompt_file, model.config.stream_numbers)
    except UserError as error:                              # the music goes on
        print(error, file=sys.stderr)
        return None
    print(f"next: {prompt!r}", file=sys.stderr)
    return cond


def longest_clip(config):
    """Seconds that the public model makes at once."""
    return config.clip * config.hop / config.sample_rate


def default_seconds(model, live):
    """Without --seconds: live for ever, a clip no longer than it can be."""
    return math.inf if live else min(30, longest_clip(model.config)) if model.stage == "base" else 30


def check(model, args):
    """UserError for what the arguments ask of a checkpoint that cannot do it."""
    base = model.stage == "base"
    for option in "compile", "prime", "no_cache":
        if getattr(args, option) and base:
            raise UserError(f"--{option.replace('_', '-')} is for models that stream; this one makes a clip")
    if model.stage == "autoencoder":
        raise UserError("this checkpoint holds only an autoencoder yet: finetune.py --init trains the rest")
    if args.live and (base or args.no_cache and model.config.causal):
        raise UserError("--live needs a model that streams, and block-causal its cache, which remembers what was made under which prompt")
    if args.live and (os.name == "nt" or sys.stdin is None):
        raise UserError("--live reads standard input, without waiting; it is closed, or this is Windows, where that cannot be done")
    if base and args.seconds > longest_clip(model.config):
        raise UserError(f"this checkpoint makes one clip of at most {longest_clip(model.config):.1f} s; to stream, finetune it first (finetune.py --init)")


def audio_of(model, args, samples, together):
    """The audio pieces (1, 2, n) that the arguments ask for, at least `samples` of them, and a line about the plan.

    together: make blocks while others are decoded."""
    c, prime, settings = model.config, None, sampling_settings(model, args.steps, args.sampler, args.cfg)
    plan, options = f"{settings['steps']} {settings['sampler']} steps, guidance {settings['cfg']:g}", dict(**settings, seed=args.seed)
    if model.stage == "base":
        numbers = {name: 0 if name == "seconds_start" else args.seconds for name, _, _ in c.numbers}
        cond, prompt = make_cond(model, args.prompt, args.prompt_file, numbers)
        # made when the first piece is asked for, once the output is open
        return (model.autoencoder.decode(clip(model, cond, c.clip, **options)) for _ in range(1)), f"{prompt!r}: one clip, {plan}"
    cond, prompt = make_cond(model, args.prompt, args.prompt_file, c.stream_numbers)
    if args.prime is not None:
        from data import encode_file                        # which imports torchaudio, for a second
        prime = encode_file(model, args.prime, c.reach_blocks * c.block)[None].to(args.device)
        if prime.shape[-1] < c.block:
            raise UserError(f"{args.prime} is shorter than one block ({c.block / c.frame_rate:.2f} s)")
    # whole blocks, and the decoder's reach beyond the end: so a shorter stream is exactly the start of a longer one
    blocks = None if samples is None else math.ceil((samples / c.hop + c.decoder_margin) / c.block)
    lines = last_lines(sys.stdin) if args.live else None
    change = lines and (lambda: new_prompt(model, args.prompt_file, lines))
    latents = stream(model, cond, blocks=blocks, prime=prime, use_cache=not args.no_cache, change=change, **options)
    if together:
        latents = prefetch(latents)
    if prime is None:
        pieces = decode_stream(model.autoencoder, latents, args.compile)
    else:                                                   # decode over the join, then drop what is the recording's
        heard = prime[..., -c.decoder_margin:]
        pieces = drop(decode_stream(model.autoencoder, itertools.chain([heard], latents), args.compile), heard.shape[-1] * c.hop)
    return pieces, f"{prompt!r}: blocks of {c.block / c.frame_rate:.2f} s seeing {c.context / c.frame_rate:.2f} s, {plan}"


def held_back(pieces, n):
    """The same, but the first n come as one: nobody should listen while a GPU's code is compiled."""
    if first := list(itertools.islice(pieces, n)):
        yield torch.cat(first, dim=-1)
    yield from pieces


def drop(pieces, samples):
    for piece in pieces:
        yield piece[..., samples:]
        samples = max(0, samples - piece.shape[-1])


@torch.no_grad()
def main():
    started = time.time()
    args = parse()
    torch.set_flush_denormal(True)
    keep_memory()
    path, device, threads = args.ckpt or default_checkpoint(), device_of(args.device), args.threads or torch.get_num_threads()
    model = load(path).to(device)
    args.seconds = args.seconds or default_seconds(model, args.live)
    check(model, args)
    together = side_by_side(model, threads)
    if device.type == "cpu":
        torch.set_num_threads((threads + 1) // 2 if together else threads)
    parameters, precision = sum(p.numel() for p in model.dit.parameters()), to_precision(model, args.precision)
    c, samples = model.config, args.seconds * model.config.sample_rate
    samples = None if math.isinf(samples) else round(samples)
    say = lambda text: print(text, file=sys.stderr)
    say(f"{path}: {model.stage}, {'block-causal' if c.causal else 'encoder-decoder'}, DiT "
        f"{parameters / 1e6:.1f} M, {args.device}, {threads} threads, {precision}")
    if args.compile:
        say(f"compiling: the first audio takes {'20 to 30 s' if device.type == 'cpu' else 'about a minute'} longer")
        compile_layers(model)
    pieces, plan = audio_of(model, args, samples, together)
    if not args.live:                                       # no prompt will follow
        forget_t5()
    say(plan + "; type a prompt and press Enter" * args.live)
    writer = open_output(args.out, c.sample_rate, c.audio_channels, samples)
    first = begun = clipped = written = 0                   # begun: samples in the first piece, out after `first` seconds
    bar = tqdm(total=samples and samples / c.sample_rate, unit="s", unit_scale=True, file=sys.stderr, disable=args.live or None,
               bar_format="{l_bar}{bar}| {n:.0f} s, {rate_fmt}")
    try:
        with contextlib.closing(writer), contextlib.closing(pieces), contextlib.closing(bar):     # Ctrl-C too: what was made is kept
            # the third piece is compiled and recorded, and one more may be what a recording (--prime) leaves in the decoder
            for audio in held_back(pieces, 4 if args.compile and device.type == "cuda" else 0):
                audio = audio if samples is None else audio[..., :samples - written]
                if not audio.shape[-1]:
                    continue
                writer.write(pcm(audio))
                if not written:
                    first, begun = time.time() - started, audio.shape[-1]
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
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot go on writing {args.out or 'standard output'} after {written / c.sample_rate:.1f} s: {reason}") from None
    seconds, took = written / c.sample_rate, time.time() - started
    after = (written - begun) / c.sample_rate / max(1e-9, took - first)
    say(f"{seconds:.1f} s of music in {took:.1f} s, {seconds / took:.1f}x real time; first audio after {first:.1f} s, then {after:.1f}x; "
        f"{100 * clipped / max(1, written * c.audio_channels):.3f} % of samples clipped -> {args.out or 'standard output'}")


if __name__ == "__main__":
    run(main)
