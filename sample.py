"""Play: one block after another, for as long as you like.

    python sample.py --seconds 600 > out.wav
    python sample.py --live | ffplay -nodisp -nostats -   # what you type is what is played next

`denoise_block` makes a block and `Context` remembers the finished ones (the KV cache); training rolls out with the same
two. `decode_stream` turns blocks into audio without seams. See "How it works" in the README.
"""
import argparse
import contextlib
import ctypes
import itertools
import math
import os
import select
import struct
import sys
import time
from collections import deque
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import soundfile
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from model import (LMDM, Cond, Config, Conv1d, ConvTranspose1d, ResidualUnit, UserError, add_noise, alpha_sigma, denoise, guided,
                   schedule, words_of)

SAMPLERS = "euler", "dpmpp", "pingpong"
DEFAULTS = {                                                # by the stage recorded in the checkpoint
    "base": dict(sampler="pingpong", steps=8, cfg=1.0),
    "finetune": dict(sampler="euler", steps=50, cfg=7.0),
    "arc": dict(sampler="pingpong", steps=8, cfg=1.0),
}


# ------------------------------------------------------------------------------------------------ checkpoints
def writable(path):
    """Path of a file that is to be written later. UserError where it cannot be, before any work is done for it."""
    path = Path(path)
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"cannot write {path}: {there} is no folder that can be written in")
    return path


def save_whole(content, path):
    """torch.save to a temporary name, then rename: a whole file or none. Raises UserError."""
    path = writable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, f"{path}.part")
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:                # a full disk
        Path(f"{path}.part").unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or str(error).splitlines()[0][:100]}") from None


def save(model, path, step=0, made="", dtype=None, **extra):
    """Write config, weights, stage, step and how it was made to one file, whole or not at all. extra: plain values. Raises UserError."""
    # only matrices are rounded: vectors (norms, frequencies, biases) are small and sensitive
    weights = {k: v.to("cpu", dtype if dtype and v.ndim > 1 else v.dtype) for k, v in model.state_dict().items()}
    save_whole({"config": model.config.to_dict(), "weights": weights, "stage": model.stage, "sampling": model.sampling,
                "step": step, "made": made, **extra}, path)


def read_checkpoint(path):
    """The checkpoint as a dictionary. Raises UserError where it is missing, corrupt, or not one of ours."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint ({str(error).splitlines()[0][:100]})") from None
    if not isinstance(saved, dict) or not {"config", "weights", "stage"} <= set(saved):
        raise UserError(f"{path} is not a checkpoint of this project; public weights go through stable_audio_port.py first")
    return saved


class Unfilled(TorchFunctionMode):
    """Modules made under it get no first weights: they are about to be loaded, and random numbers on "meta" import a compiler."""
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


# ------------------------------------------------------------------------------------------------ precision
PRECISIONS = "auto", "float32", "bf16", "int8"


def has_bf16(device):
    """Are bf16 matrix products faster than float32 here? On a CPU it takes AVX-512 BF16, which AMX implies."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def has_int8(device):
    """Does this CPU multiply 8-bit integers fastest? With AVX2 alone twice as fast as float32, with AVX-512 BF16 1.7 times as
    fast as bf16; with AMX not."""
    return device.type == "cpu" and torch.cpu._is_avx2_supported() and not torch.cpu._is_amx_tile_supported()


def choose_precision(name, device):
    """"auto", "float32", "bf16" or "int8" -> one of the last three; what auto takes is never int8."""
    return name if name != "auto" else "bf16" if has_bf16(device) else "float32"


class Int8Linear(nn.Module):
    """A linear layer on a CPU in 8-bit integers: weights with a scale for each output channel, inputs with one scale, found
    anew for each input (dynamic quantization). Sums are exact, in 32 bits; input and output are float32."""
    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(dim=1).clamp(min=1e-8) / 127
        weight = torch.quantize_per_channel(linear.weight, scale, torch.zeros(len(scale), dtype=torch.long), 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, linear.bias)
        self.reduce_range = not torch.cpu._is_vnni_supported()      # older CPUs add pairs of products in 16 bits: 7 bits for inputs

    def forward(self, x):                                   # (..., in_features) -> (..., out_features)
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)


def packs(weight):
    """Should oneDNN, PyTorch's library for CPUs, get this weight, of a linear layer or a convolution, in its own order?

    With AVX-512 the products of a block of Stable Audio Open Small took 0.8 times as long in float32 and 0.93 in bf16;
    nano's, which fit in cache, 1.3 times; with AVX2 alone nothing changed. The order that it gives a convolution of kernel
    size 1 does not suit the inputs that come, and each call rearranged it: 31 ms in place of 2."""
    return (weight.device.type == "cpu" and weight.numel() >= 2 ** 20 and weight.shape[2:] != (1,)
            and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported())


class PackedLinear(nn.Module):
    """A linear layer on a CPU, its weights in the order in which oneDNN reads them, so that no call has to rearrange them."""
    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()), linear.bias

    def forward(self, x):                                   # (B, N, in_features) -> (B, N, out_features)
        n = x.shape[-2]
        if x.dtype == torch.bfloat16 and n % 4:             # up to 3 rows that nobody reads: oneDNN is slower with 49 than with 52
            x = torch.cat([x, x[..., :-n % 4, :]], dim=-2)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")[..., :n, :]


@torch.no_grad()
def to_precision(model, name):
    """What the model plays in. bf16: the DiT, and the decoder but for its last level. int8: most linear layers of the DiT's
    blocks; where the CPU has bf16, in that the rest of those layers and the decoder as above. A narrow decoder (nano's has 16
    channels at the audio's own rate, Stable Audio's 128) stays in float32, in which it is as fast. Returns the precision taken.

    auto takes int8 only for a checkpoint that recommends it. Weights also come to lie in memory as a CPU wants them: call it
    once, and neither train nor save the model after. The sampler's state, rotary angles, frequencies, the conditioner and the
    encoder stay in float32. UserError for int8 off the CPU."""
    device = next(model.parameters()).device
    recommended = name == "auto" and model.sampling.get("int8") and has_int8(device)
    name = "int8" if recommended else choose_precision(name, device)
    if name == "int8" and device.type != "cpu":
        raise UserError(f"--precision int8 is for CPUs; with --device {device.type} take bf16")
    bf16 = name == "bf16" or name == "int8" and has_bf16(device)
    if bf16:
        # not the decoder's last level, where 8 bits are heard: nano's distance to held-out audio was 3531 in place of 864
        of_dit = model.dit.modules() if name == "bf16" else [layer.ff.down for layer in model.dit.layers]
        of_decoder = model.autoencoder.decoder[:-5].modules() if model.config.ae_width >= 64 else ()
        for layer in (*of_dit, *of_decoder):
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d, nn.LayerNorm)):
                layer.to(torch.bfloat16)
    for layer in model.autoencoder.decoder:
        if isinstance(layer, ConvTranspose1d):              # or decoding a whole at once copies them at every call
            layer.weight.data = layer.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
    for layer in model.dit.layers:
        for part, names in (layer.self_attention, ("qkv", "out")), (layer.cross_attention, ("q", "out")), (layer.ff, ("up", "down")):
            for child in names:
                linear = getattr(part, child)
                if name == "int8" and child != "down":      # its input has outliers, and v was off by 14 % instead of 2 %
                    setattr(part, child, Int8Linear(linear))
                elif packs(linear.weight):
                    setattr(part, child, PackedLinear(linear))
        if name == "int8" and bf16:
            layer.ff.down.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
    return name


# ------------------------------------------------------------------------------------------------ one block after another
class Context:
    """The finished blocks that the next block sees, with their keys and values: the KV cache.

    A finished block waits in `pending` until the next block's first denoising step, whose pass also takes it along,
    clean, and caches its keys and values. Encoder-decoder: the whole context waits, and the cache is made anew.
    Without a cache every step runs over all blocks that have any influence. Gradients never enter the context."""

    def __init__(self, model, memory, prime, use_cache=True, first=0):
        """prime: latents (B, C, whole blocks, possibly none); first: number of the first context block."""
        self.model, self.memory, self.use_cache, c = model, memory, use_cache, model.config
        self.index = first                                  # of the next block
        self.kv, self.kv_index = None, ()                   # per layer (k, v), and the blocks they belong to
        self.pending, self.pending_index = None, ()
        self.history = deque(maxlen=c.context_blocks if use_cache else c.reach_blocks)
        blocks = list(prime.split(c.block, dim=-1)) if prime.shape[-1] else []
        zeros = prime.new_zeros(*prime.shape[:-1], c.block)
        for block in [zeros] * (c.context_blocks - len(blocks)) + blocks:
            self.append(block)

    @torch.no_grad()
    def append(self, block):
        """A block (B, C, block) is finished."""
        c = self.model.config
        if self.pending is not None and self.use_cache and c.causal:
            self.fill()                                     # only while priming: a denoised block has filled it already
        self.history.append(block.detach())
        self.index += 1
        if self.use_cache and c.causal:
            self.pending, self.pending_index = self.history[-1], (self.index - 1,)
        else:
            self.kv, self.kv_index = None, ()
            self.pending = torch.cat(tuple(self.history), dim=-1)
            self.pending_index = tuple(range(self.index - len(self.history), self.index))

    def run(self, x=None, t=None):
        """One pass over [pending | x | its timestep token] -> v, and the keys and values of pending."""
        batch = len(self.memory.global_)
        copies = lambda y: y if y is None or len(y) == batch else y.repeat(batch // len(y), 1, 1)   # guidance: 2
        t = None if t is None else t.expand(batch, 1)
        v, new = self.model.dit.blocks(self.memory, copies(x), t, () if x is None else (self.index,),
                                       copies(self.pending), self.pending_index, self.kv, self.kv_index)
        return None if v is None else v.float(), new        # in bf16 the network runs, not the sampler

    def store(self, new):
        """Append keys and values of the pending blocks to the cache and forget what no later block sees."""
        keep = self.model.config.context
        if self.kv is not None:
            new = [(torch.cat([k, k2], dim=2), torch.cat([v, v2], dim=2)) for (k, v), (k2, v2) in zip(self.kv, new)]
        self.kv = [(k[:, :, -keep:], v[:, :, -keep:]) for k, v in new]
        self.kv_index = (self.kv_index + self.pending_index)[-self.model.config.context_blocks:]
        self.pending, self.pending_index = None, ()

    @torch.no_grad()
    def fill(self):
        self.store(self.run()[1])

    def predict(self, x, t):
        """v (B, C, block) of the next block x at level t. With guidance the batch is doubled: (2B, C, block)."""
        if not self.use_cache:
            return self.run(x, t)[0]
        if self.pending is not None and torch.is_grad_enabled():
            self.fill()                                     # a pass of its own, so that no gradient reaches the context
        v, new = self.run(x, t)
        if self.pending is not None:
            self.store(new)
        return v


def denoise_block(predict, x, levels, sampler, objective, draw, grad=False):
    """From noise x (B, C, T) to x0, evaluating predict(x, t) -> v at each of `levels`, falling from 1.

    sampler: "euler" keeps the predicted noise, "pingpong" draws fresh noise with draw(), "dpmpp" is Euler with x0
    extrapolated from the two last predictions (DPM-Solver++ 2M, arXiv 2211.01095). With grad only the last evaluation is
    differentiated (ARC-Forcing). Stopping early is passing fewer levels."""
    before = None                                           # the last x0, and by how much log SNR grew since
    for i, t in enumerate(levels):
        with torch.set_grad_enabled(grad and i == len(levels) - 1):
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


@torch.no_grad()
def stream(model, cond, *, blocks=None, steps=None, sampler=None, cfg=None, seed=0, prime=None, use_cache=True, change=None):
    """Yield latent blocks (B, C, block), for ever when `blocks` is None; the first n do not depend on `blocks`.

    prime: latents (B or 1, C, T) to go on from; frames before its first whole block are dropped. steps, sampler and cfg
    default to what suits the checkpoint's stage. seed: one, or one for each item, which then is the stream of that seed.
    change: called before each block; gives a new `cond` of the same batch from there on, or None. Finished blocks stay.
    Block-causal, so do their cached keys and values, made under the old condition (the newest block's only come with the
    next); encoder-decoder, the context is read anew under the new one, as always."""
    c, settings = model.config, sampling_settings(model, steps, sampler, cfg)
    cfg, device, seeds = settings["cfg"], cond.tokens.device, [seed] if isinstance(seed, int) else seed
    rngs = [torch.Generator().manual_seed(s) for s in seeds]
    levels = schedule(settings["steps"])[:-1].to(device)
    shape = len(cond.tokens) // len(rngs), c.latent_channels, c.block
    draw = lambda: torch.cat([torch.randn(shape, generator=rng) for rng in rngs]).to(device)
    prime = torch.zeros(len(cond.tokens), c.latent_channels, 0) if prime is None else prime[..., prime.shape[-1] % c.block:]
    prime = prime.to(device).expand(len(cond.tokens), -1, -1)
    context = Context(model, model.dit.memory(with_null(cond, cfg)), prime, use_cache)
    predict = context.predict if cfg == 1 else lambda x, t: guided(context.predict(x, t), cfg)
    for _ in itertools.count() if blocks is None else range(blocks):
        if change is not None and (new := change()) is not None:
            context.memory = model.dit.memory(with_null(new, cfg))
        x = denoise_block(predict, draw(), levels, settings["sampler"], c.objective, draw)
        context.append(x)
        yield x


@torch.no_grad()
def clip(model, cond, frames, *, steps=None, sampler=None, cfg=None, seed=0):
    """One clip of latents (B, C, frames) made whole, as the public model does: no context, no blocks."""
    settings, rng = sampling_settings(model, steps, sampler, cfg), torch.Generator().manual_seed(seed)
    cfg, doubled = settings["cfg"], with_null(cond, settings["cfg"])
    draw = lambda: torch.randn(len(cond.tokens), model.config.latent_channels, frames, generator=rng).to(cond.tokens.device)

    def predict(x, t):
        if cfg == 1:
            return model.dit(x, t.expand(len(x)), cond)
        return guided(model.dit(x.repeat(2, 1, 1), t.expand(2 * len(x)), doubled), cfg)
    levels = schedule(settings["steps"])[:-1].to(cond.tokens.device)
    return denoise_block(predict, draw(), levels, settings["sampler"], model.config.objective, draw)


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
        self.weight, self.packed = weight[:, :, None].contiguous(memory_format=torch.channels_last), packs(weight)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, (0, 0), (1, 1), self.dilation, 1)

    def __call__(self, x):                                  # (B, in, T) -> (B, out, (T - reach) * samples)
        if x.shape[-1] <= self.reach:
            return x.new_zeros(len(x), self.out_channels, 0)
        x = x[:, :, None]
        if self.packed:
            y = torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, (0, 0), (1, 1), self.dilation, 1, "none", [], "")
        else:
            y = F.conv2d(x, self.weight, self.bias, dilation=self.dilation)
        return y[:, :, 0].transpose(1, 2).reshape(len(x), -1, self.out_channels).transpose(1, 2)


@lru_cache
def fused_snake(device, dtype):
    """SnakeBeta compiled, in one pass over memory, as a function (layer, x, out). UserError where that does not work."""
    made = lambda x, alpha, gain: x + gain * torch.sin(alpha * x.float()) ** 2
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


class StreamingDecoder:
    """The autoencoder's decoder fed piece by piece: each layer keeps the end of its input, so no block is decoded twice.

    A convolution that looks ahead gives its output that much later; what its padding is to a whole, zeros at the start
    and the end are to a stream. So all pieces together equal decoding everything at once. Has its own copy of the weights.
    compile: the snakes."""

    @torch.no_grad()
    def __init__(self, autoencoder, compile=False):
        self.layers, self.kept = autoencoder.decoder, {}
        self.unpadded = {layer: Unpadded(layer) for layer in self.layers.modules() if isinstance(layer, (Conv1d, ConvTranspose1d))}
        self.dtype, device = self.layers[0].weight.dtype, self.layers[0].weight.device.type
        self.snake = fused_snake(device, self.dtype) if compile else lambda layer, x, out: layer(x, out=out)
        # values between two layers: in bf16 a CPU multiplies so fast that they should stay in its caches; in float32 it did not matter
        self.most = 2 ** 21 if device == "cpu" and self.dtype == torch.bfloat16 else math.inf

    @torch.no_grad()
    def __call__(self, latents, last=False):
        """(B, C, T) -> the audio (B, 2, n) that they settle; with `last` also all that is still inside."""
        return self.through(self.layers, latents.to(self.dtype), last).float()

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
    """Latent blocks (B, C, n) -> audio pieces (B, 2, m), together equal to decoding everything at once. compile: the snakes.

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
    """16-bit PCM WAV to an open binary file, a pipe included. samples None: length unknown, mended at close if seekable."""

    def __init__(self, file, rate, channels, samples=None):
        self.file, self.rate, self.channels, self.written = file, rate, channels, 0
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
        if self.file.seekable():
            self.file.seek(0)
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


def mallopt(options):
    """Set glibc's options for memory, {option: value}; another C library does as it likes."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)


def keep_memory():
    """glibc returns large tensors to the kernel when freed, and gets them back page by page, zeroed: have it keep them."""
    mallopt({-4: 0, -1: 2 ** 31 - 1, -2: 2 ** 26})          # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def discard_output():
    """What is still to be written to standard output goes nowhere, so that Python does not complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main):
    """Run a script's main(): a UserError is one line and status 2, a closed pipe is no error, Ctrl-C is 130."""
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


# ------------------------------------------------------------------------------------------------ command line
def default_checkpoint():
    here = Path(__file__).parent
    for path in (Path("out/arc.pt"), Path("out/finetune.pt"), here / "nano.pt"):
        if path.exists():
            return path
    raise UserError("no checkpoint: out/arc.pt, out/finetune.pt and nano.pt are all missing; name one with --ckpt")


def positive(text):
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def whole(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def parse(argv=None):
    p = argparse.ArgumentParser(description="Stream music, block by block, as a WAV on standard output.", allow_abbrev=False)
    p.add_argument("--ckpt", help="checkpoint (default: out/arc.pt, else out/finetune.pt, else nano.pt)")
    p.add_argument("--prompt", help="what to play (default: the checkpoint's own example)")
    p.add_argument("--prompt-file", help="embeddings written by stable_audio_port.py --prompts; the first, or the one --prompt names")
    p.add_argument("--seconds", type=positive, help="length (default: 30, with --live inf); inf plays until stopped")
    p.add_argument("--prime", help="audio file to go on from")
    p.add_argument("--live", action="store_true", help="each line typed while a player plays is the prompt from the next block on (not on Windows)")
    p.add_argument("--out", help=".wav or .flac instead of standard output")
    # sampling
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=whole, help="denoising steps per block (default: the checkpoint's)")
    p.add_argument("--cfg", type=float, help="guidance, 1 for none (default: the checkpoint's)")
    p.add_argument("--sampler", choices=SAMPLERS, help="(default: the checkpoint's)")
    p.add_argument("--no-cache", action="store_true", help="recompute the whole context at every step: slow, the same music")
    # machine
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: int8 where CPU and checkpoint suit it, else bf16 where it is faster")
    p.add_argument("--threads", type=whole, help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--compile", action="store_true", help="compile part of the decoder: 20 s more before the first block, then faster")
    args = p.parse_args(argv)
    args.seconds = args.seconds or (math.inf if args.live else 30)
    return args


def device_of(name):
    """torch.device of "cpu", "cuda", "cuda:1". Raises UserError where there is none on this machine."""
    try:
        torch.empty(0, device=name)
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("rotary angles need float64: cpu or cuda")
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)                   # what waits for "the" GPU, or asks for its memory, means this one
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0][:80]})") from None


def make_cond(model, prompt, prompt_file, numbers):
    """The condition for one stream from --prompt (None: the checkpoint's own, or the file's first) and --prompt-file, and the prompt's text."""
    if prompt_file is None:
        prompt, known = model.sampling.get("prompt", "") if prompt is None else prompt, model.sampling.get("words")
        if known and (strange := [w for w in words_of(prompt) if w not in known]):  # random vectors still: fewer, softer notes
            print(f"words that this model has not learned are left out: {', '.join(strange)}", file=sys.stderr)
            prompt = " ".join(w for w in words_of(prompt) if w in known)
        return model.conditioner([prompt], **numbers), prompt
    from stable_audio_port import load_prompts
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


def audio_of(model, args, samples, together):
    """The audio pieces (1, 2, n) that the arguments ask for, at least `samples` of them, and a line about the plan.

    together: make blocks while others are decoded."""
    c, prime = model.config, None
    for option in "compile", "prime", "no_cache":
        if getattr(args, option) and model.stage == "base":
            raise UserError(f"--{option.replace('_', '-')} is for models that stream; this one makes a clip")
    settings = sampling_settings(model, args.steps, args.sampler, args.cfg)
    plan = f"{settings['steps']} {settings['sampler']} steps, guidance {settings['cfg']:g}"
    options = dict(**settings, seed=args.seed)
    if model.stage == "autoencoder":
        raise UserError("this checkpoint holds only an autoencoder yet: finetune.py --init trains the rest")
    if args.live and (model.stage == "base" or args.no_cache and c.causal):
        raise UserError("--live needs a model that streams, and block-causal its cache, which remembers what was made under which prompt")
    if args.live and (os.name == "nt" or sys.stdin is None):
        raise UserError("--live reads standard input, without waiting; it is closed, or this is Windows, where that cannot be done")
    if model.stage == "base":
        longest = c.clip * c.hop / c.sample_rate
        if args.seconds > longest:
            raise UserError(f"this checkpoint makes one clip of at most {longest:.1f} s; to stream, finetune it first (finetune.py --init)")
        numbers = {name: 0 if name == "seconds_start" else args.seconds for name, _, _ in c.numbers}
        cond, prompt = make_cond(model, args.prompt, args.prompt_file, numbers)
        return (model.autoencoder.decode(z) for z in [clip(model, cond, c.clip, **options)]), f"{prompt!r}: one clip, {plan}"
    cond, prompt = make_cond(model, args.prompt, args.prompt_file, c.stream_numbers)
    if args.prime:
        from data import encode_file
        prime = encode_file(model, args.prime)[None].to(args.device)
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
    together = side_by_side(model, threads)
    if device.type == "cpu":
        torch.set_num_threads((threads + 1) // 2 if together else threads)
    parameters, precision = sum(p.numel() for p in model.dit.parameters()), to_precision(model, args.precision)
    c, samples = model.config, None if math.isinf(args.seconds) else round(args.seconds * model.config.sample_rate)
    say = lambda text: print(text, file=sys.stderr)
    say(f"{path}: {model.stage}, {'block-causal' if c.causal else 'encoder-decoder'}, DiT "
        f"{parameters / 1e6:.1f} M, {args.device}, {threads} threads, {precision}")
    if args.compile:
        say("compiling: the first block takes 20 to 30 s longer")
    pieces, plan = audio_of(model, args, samples, together)
    say(plan + "; type a prompt and press Enter" * args.live)
    writer = open_output(args.out, c.sample_rate, c.audio_channels, samples)
    first = begun = clipped = written = 0                   # begun: samples in the first piece, out after `first` seconds
    bar = tqdm(total=samples and samples / c.sample_rate, unit="s", unit_scale=True, file=sys.stderr, disable=args.live or None,
               bar_format="{l_bar}{bar}| {n:.0f} s, {rate_fmt}")
    try:
        with contextlib.closing(writer), contextlib.closing(pieces), contextlib.closing(bar):     # Ctrl-C too: what was made is kept
            for audio in pieces:
                audio = audio if samples is None else audio[..., :samples - written]
                if not audio.shape[-1]:
                    continue
                writer.write(pcm(audio))
                if not written:
                    first, begun = time.time() - started, audio.shape[-1]
                clipped += (audio.abs() > 1).sum().item()
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
