"""How fast is it, and how far from what the machine allows? Random weights; medians of runs in turns.

    python bench.py                                                 # nano, both regimes
    python bench.py --preset sao_small --steps 8 4 2 1 --repeats 5
    python bench.py --preset sao_small --device cuda --precision bf16 --compile --batch 1 8 64

The networks, in milliseconds:

    step          one denoising step of a block, with the cache
    block         all steps of a block; the first also takes the block before it into the cache
    floor         only the matrix products and attentions of `block`, as plain library calls
    outpaint      all steps without a cache: each a pass over the whole window, as outpainting does
    decode        a block to audio, streaming
    decode floor  only the convolutions of `decode`, as plain library calls
    whole         an eighth of the time that decoding eight blocks at once takes

The whole program, as `sample.py` plays:

    round trip    milliseconds from noise drawn on the host to audio on the host, of all streams together;
                  where a CPU decodes one block while it makes the next, the time between two blocks
    x real time   seconds of audio a second, of all streams together
    first         seconds from the start to the first audio; on a GPU `sample.py --compile` holds it back
    weights       on a GPU: milliseconds to read a block's weights from its memory, the DiT's at every step
                  and the decoder's once

A floor can be beaten: speed.py lays large weights out in another order, and its Winograd convolutions take
fewer products. On a GPU everything is recorded as CUDA graphs, the floors too.
"""
import argparse
import itertools
import math
import platform
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from audio import decode_stream, pcm
from common import PRECISIONS, device_of, random_seed, run, step_count, thread_count, whole
from model import LMDM, PRESETS, Numbered, schedule
from sample import Context, denoise_block, stream
from speed import (Graphed, Int8Linear, PackedLinear, StreamingDecoder, channels_last, compile_layers,
                   graphed_block, has_bf16, keep_memory, prefetch, side_by_side, to_precision)


def unmeasured(device):
    """Rounds before those that count: on a GPU, until everything is recorded as a graph."""
    return 4 if device.type == "cuda" else 1


def medians(jobs, repeats, device):
    """{name: function} -> {name: median milliseconds}. The functions run in turns: the machine's other load
    meets all of them."""
    taken = {name: [] for name in jobs}
    for number in range(unmeasured(device) + repeats):
        for name, job in jobs.items():
            synchronize(device)
            start = time.perf_counter()
            job()
            synchronize(device)
            if number >= unmeasured(device):
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(times)[len(times) // 2] for name, times in taken.items()}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def graphed(job):
    """A function of no arguments that returns a tensor -> the same of one tensor, as a CUDA graph on a GPU.

    The tensor only tells which device it is."""
    recorder = Graphed(lambda state, x: (job(), state))
    return lambda x: recorder([], x)


def bandwidth(device, size=2 ** 30):
    """Bytes a millisecond that a GPU's memory gives and takes, from a copy."""
    x = torch.empty(size, dtype=torch.uint8, device=device)
    return 2 * size / medians({"copy": x.clone}, 9, device)["copy"]


# -------------------------------------------------------------------------------- floors
def recorded(module, kinds, job):
    """Run job() and return (layer, its input) of every layer of these kinds that it went through."""
    calls = []

    def note(layer, inputs):
        calls.append((layer, inputs[0]))
    hooks = [layer.register_forward_pre_hook(note) for layer in module.modules() if isinstance(layer, kinds)]
    job()
    for hook in hooks:
        hook.remove()
    return calls


def block_floor(model, cond, context, steps):
    """A function that computes a block's matrix products and attentions alone.

    context: its blocks, to which one is appended, so that the first step also fills the cache."""
    c = model.config
    batch = len(cond.tokens)
    x = torch.randn(batch, c.channels, c.block).to(cond.tokens)
    t = torch.tensor(0.5, device=x.device)
    context.predict()
    context.append(x)
    kinds = nn.Linear, Int8Linear, PackedLinear
    first_step = recorded(model.dit.layers, kinds, lambda: context.predict(x, t))
    later_step = recorded(model.dit.layers, kinds, lambda: context.predict(x, t))
    attentions = [attention_inputs(model, calls, cond) for calls in (first_step, later_step)]
    plain = {layer: nn.Linear(y.shape[-1], layer(y).shape[-1], layer.bias is not None).to(y)
             for layer, y in later_step if isinstance(layer, PackedLinear)}
    products = [[(plain.get(layer, layer), y) for layer, y in calls] for calls in (first_step, later_step)]

    def floor():
        for step in range(steps):
            for layer, y in products[min(step, 1)]:
                layer(y)
            for _ in range(c.depth):
                for q, k in attentions[min(step, 1)]:
                    y = F.scaled_dot_product_attention(q, k, k)
        return y
    return floor


def attention_inputs(model, calls, cond):
    """Queries and keys (B, H, tokens, head width), zeros, of a layer's self- and cross-attention in a pass.

    calls: the pass's layers with their inputs, as `recorded` returns them."""
    c = model.config
    batch, cross_tokens = cond.tokens.shape[:2]
    tokens = calls[0][1].shape[1]
    # encoder-decoder, the pass of the first step holds the whole context itself
    whole_context = not c.causal and tokens > c.block + 1
    keys = tokens if whole_context else c.context + tokens
    zeros = model.dit.project_in.weight.new_zeros
    return [(zeros(batch, c.heads, tokens, c.head_width), zeros(batch, c.heads, n, c.head_width))
            for n in (keys, cross_tokens)]


def decode_floor(autoencoder, latents):
    """A function that computes the decoder's convolutions alone, for these latents."""
    kinds = nn.Conv1d, nn.ConvTranspose1d
    calls = recorded(autoencoder.decoder, kinds, lambda: autoencoder.decode(latents))
    calls = [(convolution, channels_last(x)) for convolution, x in calls]
    return lambda: [convolution(x) for convolution, x in calls][-1]


# -------------------------------------------------------------------------------- one line of the table
def row(preset, causal, steps, batch, args, device, precision):
    """The figures of one line of the table: {column: figure}. weights: in bytes."""
    torch.manual_seed(args.seed)
    model = LMDM(replace(PRESETS[preset], causal=causal), stage="arc").requires_grad_(False).eval()
    to_precision(model.to(device), precision)
    c = model.config
    text = ["moderate arpeggios"] * batch
    if c.text != "words":
        text = torch.randn(batch, c.text_tokens, c.cond_width, device=device)
    cond = model.conditioner(text, **c.stream_numbers)
    latents = torch.randn(batch, c.channels, c.context, device=device)
    figures = networks(model, cond, latents, steps, args)
    figures |= playing(model, cond, steps, args)
    layers = sum(size_of(layer) - size_of(layer.cross_attention.kv) for layer in model.dit.layers)
    figures["weights"] = steps * layers + size_of(model.autoencoder.decoder)
    return figures


def networks(model, cond, latents, steps, args):
    """Median milliseconds of the networks' columns; NaN in those of one stream alone where there are more.

    latents: the context (B, C, frames)."""
    c = model.config
    device = latents.device
    single = len(latents) == 1
    block = latents[..., :c.block]
    levels = schedule(steps)[:-1].to(device)
    prompt = model.dit.encode_prompt(cond)
    floors = {}
    if single:                                              # before compilation, which would hide the layers
        floors["floor"] = block_floor(model, cond, Context(model, prompt, latents), steps)
        floors["decode floor"] = decode_floor(model.autoencoder, block)
    if args.compile:
        compile_layers(model)
    decoder = StreamingDecoder(model.autoencoder, args.compile)
    make = block_maker(Context(model, prompt, latents), levels)
    cached = Context(model, prompt, latents)
    cached.predict(block, levels[0])                        # nothing waits any more: a later step

    def outpaint():
        window = Numbered(latents, tuple(range(c.context_blocks)))
        new = Numbered(block, (c.context_blocks,))
        for t in levels:
            v, _ = model.dit.blocks(prompt, new, t.expand(len(block), 1), window)
        return v

    def whole_decode():
        return model.autoencoder.decode(block.repeat(1, 1, 8))

    step = partial(graphed(lambda: cached.predict(block, levels[0])), block)
    jobs = {"step": step, "block": lambda: make(lambda: block), "decode": lambda: decoder(block)}
    if single:
        for name, job in {**floors, "outpaint": outpaint, "whole": whole_decode}.items():
            jobs[name] = partial(graphed(job), block)
    times = dict.fromkeys(("floor", "outpaint", "decode floor", "whole"), math.nan)
    times |= medians(jobs, args.repeats, device)
    times["whole"] /= 8
    return times


def playing(model, cond, steps, args):
    """A stream as `sample.py` plays it: round trip in ms, times real time, seconds to the first audio."""
    device = cond.tokens.device
    batch = len(cond.tokens)
    block_seconds = model.config.block / model.config.frame_rate
    threads = torch.get_num_threads()
    before = unmeasured(device)
    measured = args.repeats
    blocks = stream(model, cond, blocks=before + measured, steps=steps, sampler="pingpong", cfg=1)
    if side_by_side(model, threads):                        # as sample.py does
        torch.set_num_threads((threads + 1) // 2)
        blocks = prefetch(blocks)
    if args.compile and device.type == "cpu":               # again, where the number of threads has changed
        block = torch.randn(batch, model.config.latent_channels, model.config.block)
        StreamingDecoder(model.autoencoder, args.compile)(block)
    played = []                                             # seconds since the start at which a block is out
    start = time.perf_counter()
    for audio in decode_stream(model.autoencoder, blocks, args.compile):
        for item in audio.split(1):
            pcm(item)
        played.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    played = played[:before + measured]                     # without the closing tail
    trips = np.diff(played[before - 1:])
    return {"round trip": 1e3 * np.median(trips), "x real time": batch * block_seconds / trips.mean(),
            "first": played[0]}


def block_maker(context, levels):
    """One step of `sample.stream`: make(draw) -> the next block, which is appended. draw() -> noise."""
    if levels.device.type == "cuda":
        return graphed_block(context, denoise_block, levels, "pingpong", 1.0)

    def make(draw):
        x = denoise_block(context.predict, draw(), levels, "pingpong", context.model.config.objective, draw)
        context.append(x)
        return x
    return make


def size_of(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description="Measure speed against what the machine allows.",
                                allow_abbrev=False)
    p.add_argument("--preset", nargs="+", choices=sorted(PRESETS), default=["nano"])
    p.add_argument("--regime", nargs="+", choices=("causal", "encdec"), default=["causal", "encdec"])
    p.add_argument("--steps", nargs="+", type=step_count, default=[8, 4])
    p.add_argument("--batch", nargs="+", type=whole, default=[1], help="streams at once")
    p.add_argument("--repeats", type=whole, default=5)
    p.add_argument("--precision", nargs="+", choices=PRECISIONS[1:],
                   help="(default: float32, int8 on a CPU, and bf16 where the hardware has it)")
    p.add_argument("--seed", type=random_seed, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=thread_count, help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--compile", action="store_true", help="as sample.py's")
    args = p.parse_args()
    device = device_of(args.device)
    gpu = device.type == "cuda"
    torch.set_flush_denormal(True)
    keep_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    precisions = args.precision or ["float32"] + ["int8"] * (not gpu) + ["bf16"] * has_bf16(device)
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    name = torch.cuda.get_device_name() if gpu else cpu
    print(f"torch {torch.__version__}, {device.type} ({name}), {torch.get_num_threads()} threads, "
          f"seed {args.seed}, medians of {args.repeats}, ms{', compiled' * args.compile}")
    columns = ["step", "block", "floor", "outpaint", "decode", "decode floor", "whole", "round trip",
               "x real time", "first"] + ["weights"] * gpu
    if gpu:
        rate = bandwidth(device)
        print(f"memory, reading and writing: {rate / 1e9:.2f} TB/s")
    print(f"{'preset':10} {'regime':7} {'dtype':8} {'steps':>5} {'batch':>5}"
          + "".join(f" {name:>12}" for name in columns))
    for preset, precision, regime, steps, batch in itertools.product(args.preset, precisions, args.regime,
                                                                     args.steps, args.batch):
        figures = row(preset, regime == "causal", steps, batch, args, device, precision)
        if gpu:
            figures["weights"] /= rate
        digits = {name: 2 if gpu or name in ("x real time", "first") else 1 for name in columns}
        print(f"{preset:10} {regime:7} {precision:8} {steps:5d} {batch:5d}"
              + "".join(f" {figures[name]:12.{digits[name]}f}" for name in columns), flush=True)


if __name__ == "__main__":
    run(main)
