"""How fast, and how far from what the machine allows. Random weights, medians, everything compared within one run, in turns.

    python bench.py                                                 # nano, both regimes
    python bench.py --preset sao_small --steps 8 4 2 1 --repeats 5
    python bench.py --preset sao_small --device cuda --precision bf16 --compile --batch 1 8 64

Columns, in milliseconds. step: one denoising step with the cache; block: all steps of a block, taking the last block into
the cache included; floor: the block's matrix products and attentions alone, as bare library calls on the same shapes (a
block can be faster: large weights lie in another order for it); outpaint: the same network over the whole window at every
step, which is what outpainting does; decode: the block to audio, streaming; its floor: the decoder's convolutions alone, as
the library has them (in float32 `Winograd` in speed.py can be faster); whole: the share of a block where eight are decoded at once. Then everything as `sample.py` plays it:
round trip, from noise drawn on the host to audio on the host, of the whole batch (where a CPU decodes one block while it
makes the next, the time between two); times real time, the batch's together; and seconds from the start of the stream to its
first audio, which on a GPU `sample.py --compile` holds back. There everything is recorded as CUDA graphs, the floors too, and
weights says how long a block's weights take to come from its memory: the DiT's at every step, the decoder's once.
"""
import argparse
import itertools
import math
import platform
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from audio import decode_stream, pcm
from common import PRECISIONS, device_of, random_seed, run, step_count, thread_count, whole
from model import LMDM, PRESETS, Numbered, schedule
from sample import Context, denoise_block, stream
from speed import (Graphed, Int8Linear, PackedLinear, StreamingDecoder, channels_last, compile_layers, graphed_block,
                   has_bf16, keep_memory, prefetch, side_by_side, to_precision)


def unmeasured(device):
    """How often something must have run before its time counts: on a GPU until it is recorded as a graph."""
    return 4 if device.type == "cuda" else 1


def medians(jobs, repeats, device):
    """{name: function} -> {name: median milliseconds}: all in turns, after rounds that do not count."""
    taken = {name: [] for name in jobs}
    for round_ in range(unmeasured(device) + repeats):
        for name, job in jobs.items():
            synchronize(device)
            start = time.perf_counter()
            job()
            synchronize(device)
            if round_ >= unmeasured(device):
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(times)[len(times) // 2] for name, times in taken.items()}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def graphed(job):
    """A job that returns a tensor, in a CUDA graph where there is a GPU to record it on."""
    job_, nothing = Graphed(lambda state, x: (job(), state)), []
    return lambda x: job_(nothing, x)


def bandwidth(device, size=2 ** 30):
    """Bytes a millisecond that a GPU's memory gives and takes, from a copy."""
    x = torch.empty(size, dtype=torch.uint8, device=device)
    return 2 * size / medians({"copy": x.clone}, 9, device)["copy"]


def recorded(module, kinds, job):
    """Run job() and return (layer, its input) of every layer of these kinds that it went through."""
    calls, hooks = [], []
    for layer in module.modules():
        if isinstance(layer, kinds):
            hooks.append(layer.register_forward_pre_hook(lambda m, args: calls.append((m, args[0]))))
    job()
    for hook in hooks:
        hook.remove()
    return calls


def block_floor(model, cond, context, steps):
    """A function of a block's matrix products and attentions alone."""
    c, batch = model.config, len(cond.tokens)
    x = torch.randn(batch, c.latent_channels, c.block).to(cond.tokens)
    t, H, d = torch.tensor(0.5, device=x.device), c.heads, c.head_width
    context.predict()
    context.append(x)
    kinds = nn.Linear, Int8Linear, PackedLinear
    passes = [recorded(model.dit.layers, kinds, lambda: context.predict(x, t)) for _ in range(2)]    # first step, later step
    attentions, zeros = [], model.dit.project_in.weight.new_zeros
    for calls in passes:
        n, cross = calls[0][1].shape[1], cond.tokens.shape[1]
        keys = n if not c.causal and n > c.block + 1 else c.context + n     # encoder-decoder: the first pass holds the context
        attentions.append([(zeros(batch, H, n, d), zeros(batch, H, k, d)) for k in (keys, cross)])
    plain = {layer: nn.Linear(y.shape[-1], layer(y).shape[-1], layer.bias is not None).to(y)
             for layer, y in passes[1] if isinstance(layer, PackedLinear)}
    passes = [[(plain.get(layer, layer), y) for layer, y in calls] for calls in passes]

    def products():
        for step in range(steps):
            for layer, y in passes[min(step, 1)]:
                layer(y)
            for _ in range(c.depth):
                for q, k in attentions[min(step, 1)]:
                    y = F.scaled_dot_product_attention(q, k, k)
        return y
    return products


def decode_floor(autoencoder, latents):
    """A function of the decoder's convolutions alone, for these latents."""
    calls = recorded(autoencoder.decoder, (nn.Conv1d, nn.ConvTranspose1d), lambda: autoencoder.decode(latents))
    calls = [(conv, channels_last(x)) for conv, x in calls]
    return lambda: [conv(x) for conv, x in calls][-1]


def row(preset, causal, steps, batch, args, device, precision):
    """The figures of one line of the table, as a dictionary."""
    torch.manual_seed(args.seed)
    model = LMDM(replace(PRESETS[preset], causal=causal), stage="arc").requires_grad_(False).eval()
    to_precision(model.to(device), precision)
    c, block_seconds = model.config, model.config.block / model.config.frame_rate
    text = ["moderate arpeggios"] * batch if c.text == "words" else torch.randn(batch, c.text_tokens, c.cond_width, device=device)
    cond = model.conditioner(text, **c.stream_numbers)
    latents = torch.randn(batch, c.latent_channels, c.context, device=device)
    block, levels = latents[..., :c.block], schedule(steps)[:-1].to(device)
    window, memory = tuple(range(c.context_blocks)), model.dit.encode_prompt(cond)
    one = batch == 1
    floors = (block_floor(model, cond, Context(model, memory, latents), steps), decode_floor(model.autoencoder, block)) if one else (None, None)
    if args.compile:
        compile_layers(model)
    decoder = StreamingDecoder(model.autoencoder, args.compile)
    make = block_maker(Context(model, memory, latents), levels)
    cached = Context(model, memory, latents)
    cached.predict(block, levels[0])                        # nothing waits any more: a later step
    step, floor, decode_floor_, outpaint, whole_ = map(graphed, (
        lambda: cached.predict(block, levels[0]), *floors,
        lambda: [model.dit.blocks(memory, Numbered(block, (len(window),)), t.expand(batch, 1), Numbered(latents, window))[0] for t in levels][-1],
        lambda: model.autoencoder.decode(block.repeat(1, 1, 8))))
    ours = {"step": lambda: step(block), "block": lambda: make(lambda: block), "decode": lambda: decoder(block)}
    beside = {"floor": lambda: floor(block), "outpaint": lambda: outpaint(block), "decode floor": lambda: decode_floor_(block),
              "whole": lambda: whole_(block)}
    times = dict.fromkeys(beside, math.nan) | medians(ours | beside if one else ours, args.repeats, device)
    times["whole"] /= 8

    threads, played, before, n = torch.get_num_threads(), [], unmeasured(device), args.repeats
    blocks = stream(model, cond, blocks=before + n, steps=steps, sampler="pingpong", cfg=1)
    if side_by_side(model, threads):                        # as sample.py does
        torch.set_num_threads((threads + 1) // 2)
        blocks = prefetch(blocks)
    if args.compile and device.type == "cpu":               # again, where the number of threads has changed
        StreamingDecoder(model.autoencoder, args.compile)(block)
    start = time.perf_counter()
    for audio in decode_stream(model.autoencoder, blocks, args.compile):
        for item in audio.split(1):
            pcm(item)
        played.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    played = played[:before + n]                            # without the closing tail
    trips = np.diff(played[before - 1:])
    return {**times, "round trip": 1e3 * np.median(trips), "x real time": batch * block_seconds / trips.mean(), "first": played[0],
            "weights": steps * sum(size_of(layer) - size_of(layer.cross_attention.kv) for layer in model.dit.layers)
                       + size_of(model.autoencoder.decoder)}


def block_maker(context, levels):
    """The step of `sample.stream`: a function of draw() -> noise that makes the next block and appends it to the context."""
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
    p = argparse.ArgumentParser(description="Measure speed against what the machine allows.", allow_abbrev=False)
    p.add_argument("--preset", nargs="+", choices=sorted(PRESETS), default=["nano"])
    p.add_argument("--regime", nargs="+", choices=("causal", "encdec"), default=["causal", "encdec"])
    p.add_argument("--steps", nargs="+", type=step_count, default=[8, 4])
    p.add_argument("--batch", nargs="+", type=whole, default=[1], help="streams at once")
    p.add_argument("--repeats", type=whole, default=5)
    p.add_argument("--precision", nargs="+", choices=PRECISIONS[1:], help="(default: float32, int8 on a CPU, and bf16 where the hardware has it)")
    p.add_argument("--seed", type=random_seed, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=thread_count, help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--compile", action="store_true", help="as sample.py's")
    args = p.parse_args()
    device = device_of(args.device)
    torch.set_flush_denormal(True)
    keep_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    precisions = args.precision or ["float32"] + ["int8"] * (device.type == "cpu") + ["bf16"] * has_bf16(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    print(f"torch {torch.__version__}, {device.type} ({name}), {torch.get_num_threads()} threads, seed {args.seed}, medians of "
          f"{args.repeats}, ms{', compiled' * args.compile}")
    gpu = device.type == "cuda"
    columns = ["step", "block", "floor", "outpaint", "decode", "decode floor", "whole", "round trip", "x real time", "first"] + ["weights"] * gpu
    if gpu:
        rate = bandwidth(device)
        print(f"memory, reading and writing: {rate / 1e9:.2f} TB/s")
    print(f"{'preset':10} {'regime':7} {'dtype':8} {'steps':>5} {'batch':>5}" + "".join(f" {name:>12}" for name in columns))
    for preset, precision, regime, steps, batch in itertools.product(args.preset, precisions, args.regime, args.steps, args.batch):
        figures = row(preset, regime == "causal", steps, batch, args, device, precision)
        if gpu:
            figures["weights"] /= rate
        digits = lambda name: 2 if gpu or name in ("x real time", "first") else 1
        print(f"{preset:10} {regime:7} {precision:8} {steps:5d} {batch:5d}" +
              "".join(f" {figures[name]:12.{digits(name)}f}" for name in columns), flush=True)


if __name__ == "__main__":
    run(main)
