"""Everything that must hold. Tiny random models, no network, no timing: python -m pytest -q

A sceptic reads the first section: the claims that everything else rests on. Then comes one section a file:
    what must always hold
    model.py
    common.py: checkpoints
    speed.py
    audio.py
    library.py, data.py: files, prompts, latents, crops
    sample.py
    live.py
    stage.py
    page.py, show.py, osc.py
    finetune.py
    arc_forcing.py
    stable_audio_port.py
    nano.py
    band.py
    measure.py
    bench.py
    the README and docs
"""
import argparse
import contextlib
import copy
import csv
import fcntl
import gc
import http.client
import importlib
import io
import itertools
import json
import math
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import torchaudio

import arc_forcing
import audio as audio_io
import bench
import band
import common
import controls
import data
import figures
import finetune
import grammar
import library
import live
import measure
import nano
import osc
import page
import recordings
import sample
import show
import speed
import stable_audio_port as port
import stage
import training

from common import UserError
from model import (LMDM, PRESETS, T5, Cond, Conditioner, Config, Numbered, SnakeBeta, add_noise, alpha_sigma,
                   denoise, forget_t5, load_t5, schedule, shift_time, velocity, visible, words_of)
from stable_audio_port import load_stable_audio

# ------------------------------------------------------------------------ models and helpers for all sections
HERE = Path(__file__).parent
torch.set_num_threads(1)                                    # two only wait for each other in so small layers
torch.set_flush_denormal(True)
TINY = Config(ae_width=4, ae_strides=(2, 4, 4), ae_multipliers=(1, 2, 4), latent_channels=8, text="words",
              text_tokens=6, text_width=64, cond_width=16, width=64, depth=3, heads=2, block=6,
              context_blocks=3)


def tiny(seed=0, **overrides):
    """A random model whose every weight matters (no zero-initialised layer)."""
    torch.manual_seed(seed)
    model = LMDM(replace(TINY, **overrides), stage="finetune",
                 sampling=dict(steps=3, cfg=1.0, prompt="slow piano")).eval()
    with torch.no_grad():
        for p in model.dit.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.requires_grad_(False)


def condition(model, *prompts):
    return model.conditioner(list(prompts or ["slow piano", "fast"]), **model.config.stream_numbers)


def latents_of(model, cond, blocks, **kw):
    return torch.cat(list(sample.stream(model, cond, blocks=blocks, **kw)), dim=-1)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "tiny.pt"
    common.save(tiny(), path)
    return path


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """A folder of five short tracks."""
    folder, rng = tmp_path_factory.mktemp("music"), np.random.default_rng(0)
    for i in range(5):
        t = np.arange(int(0.8 * 44100)) / 44100
        tone = sum(np.sin(2 * np.pi * f * t) for f in rng.uniform(100, 2000, 3))[:, None] * [0.1, 0.08]
        soundfile.write(folder / f"tone {i}.wav", tone, 44100)
    return folder


def script(name, *args, **kw):
    return subprocess.run([sys.executable, HERE / name, *map(str, args)], capture_output=True, **kw)


def on_two_processes(port, name, *args, cwd):
    """A training begun under torchrun, to go on beside what the test does meanwhile."""
    run = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", HERE / name, *args]
    return subprocess.Popen([sys.executable, *map(str, run)], cwd=cwd, text=True, stderr=subprocess.PIPE)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """A script's main in this process, in a folder -> (status, standard error): a process of its own needs 3
    to 6 s to import torch."""
    def call_main(main, *args, cwd=tmp_path):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [main.__module__ + ".py", *map(str, args)])
        if main is sample.main:
            torch.set_num_threads(2)                        # one makes blocks while the other decodes
        try:
            common.run(main)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            torch.set_num_threads(1)
        return status, capsys.readouterr().err
    return call_main


def rows_of(path):
    with open(path) as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


SMALL_AE = Config(ae_width=4, ae_multipliers=(1, 2, 2), ae_strides=(2, 4, 8), latent_channels=8, text="words",
                  text_tokens=4, text_width=16, cond_width=16, width=32, depth=1, heads=1, block=16,
                  context_blocks=2)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return LMDM(SMALL_AE).eval()


def notes(seconds, rate=44100, channels=2, seed=0):
    rng, t = np.random.default_rng(seed), np.arange(round(seconds * rate))[:, None] / rate
    x = sum(np.sin(2 * np.pi * (f * t + rng.random(channels))) for f in rng.uniform(100, 3000, 5))
    return (0.1 * x * (1 - t * 4 % 1) + 0.001 * rng.standard_normal(x.shape)).astype(np.float32)


def save_wav(path, seconds=1.0, rate=44100, channels=2, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, notes(seconds, rate, channels, seed), rate)
    return path


GOLDEN = HERE / "golden"


def golden_io(case):
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / case / "io.npz").items()}


def close(ours, truth, tolerance=1e-5):
    assert ours.shape == truth.shape and (ours - truth).abs().max() < tolerance


def small(**overrides):
    return load_stable_audio(GOLDEN / "sao_small_tiny",
                             **{"block": 12, "context_blocks": 4, "causal": True, **overrides})


def public_small():
    """The golden Small as a dictionary of public tensors, to be spoiled and written again."""
    return {k: read() for k,
            read in port.read_safetensors(GOLDEN / "sao_small_tiny" / "model.safetensors").items()}


@torch.no_grad()
def check_networks(model, z, numbers):
    """Autoencoder both ways, conditioning, v, and guidance at scale 4."""
    mean, std = model.autoencoder.posterior(z["audio"])
    close(mean, z["latent_mean"])
    close(std, z["latent_std"])
    close(model.autoencoder.decode(z["latents"]), z["decoded"])
    cond = model.conditioner(z["prompt_embedding"], **numbers)
    close(cond.tokens, z["cond_tokens"])
    close(cond.global_, z["cond_global"])
    both = Cond(*(torch.cat(pair) for pair in zip(cond, cond.null())))
    v = model.dit(z["x"].repeat(2, 1, 1), z["t"].repeat(2), both)
    close(v[:2], z["v"])
    close(sample.guided(v, 4), z["v_cfg4"])
    return cond


LEVELS = schedule(3)[:-1]


def noises(seed, shape=(2, 8, 6)):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


TRAIN = ["--steps", 4, "--batch", 4, "--blocks", 2, "--every", 1, "--validation-crops", 4, "--sample-every",
         0, "--precision", "float32", "--lr", "1e-3", "--threads", 1]


# -------------------------------------------------------------------------------- what must always hold
def test_mask_by_hand():
    """Two clean blocks (0, 1), noisy block 2, context of one block; one token each."""
    block, noisy = torch.tensor([0, 1, 2]), torch.tensor([False, False, True])
    rows = lambda causal: visible(block, noisy, block, noisy, 1, causal).int().tolist()
    assert rows(True) == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert rows(False) == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("causal", [True, False])
def test_context_does_not_depend_on_block_or_level(causal):
    model = tiny(causal=causal)
    prompt, context = model.dit.encode_prompt(condition(model)), torch.randn(2, 8, 18)
    def keys(x, t):
        return model.dit.blocks(prompt, Numbered(x, (3,)), t, Numbered(context, (0, 1, 2)))[1]
    a, b = keys(torch.randn(2, 8, 6), torch.full((2, 1), 0.1)), keys(torch.randn(2, 8, 6),
                                                                     torch.full((2, 1), 0.9))
    assert all(torch.equal(x, y) for kv, kv2 in zip(a, b) for x, y in zip(kv, kv2))
    block, history = Numbered(torch.zeros(2, 8, 6), (3,)), Numbered(context, (0, 1, 2))
    v = [model.dit.blocks(prompt, block, torch.full((2, 1), t), history)[0] for t in (0.1, 0.9)]
    assert (v[0] - v[1]).abs().max() > 1e-3                 # while the block itself does


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("primed", [False, True])
def test_cached_equals_uncached(causal, cfg, primed):
    """First block and twentieth. The recording is longer than the context and not of whole blocks."""
    model = tiny(causal=causal)
    cond = condition(model)
    prime = torch.randn(2, 8, 5 * 6 + 4) if primed else None
    kw = dict(blocks=20, cfg=cfg, sampler="pingpong", prime=prime)
    cached, uncached = (latents_of(model, cond, use_cache=use, **kw) for use in (True, False))
    assert cached.std() > 0.1
    assert (cached - uncached).abs().max() < 1e-4


@pytest.mark.parametrize("causal", [True, False])
def test_stream_equals_the_plain_forward(causal):
    """A block by way of the cache == model.dit(x, t, cond, context) at every step, with the whole history
    given: a stream's history starts with context_blocks blocks of zeros."""
    model = tiny(causal=causal)
    cond, made = condition(model), []
    for block in sample.stream(model, cond, blocks=6, steps=2, sampler="euler", seed=3):
        made.append(block)
    rng = torch.Generator().manual_seed(3)
    history = torch.zeros(2, 8, 18)
    for block in made:
        x = torch.randn(2, 8, 6, generator=rng)
        levels = schedule(2)
        for t, t_next in zip(levels, levels[1:]):
            v = model.dit(x, t.expand(2), cond, context=history)
            x = x + (t_next - t) * v                        # Euler, as textbooks write it
        assert (x - block).abs().max() < 1e-4
        history = torch.cat([history, x], dim=-1)


def test_stream_is_reproducible_and_a_prefix():
    model = tiny()
    cond = condition(model)
    short, long = (latents_of(model, cond, n, seed=7, sampler="pingpong") for n in (3, 9))
    assert torch.equal(short, long[..., :short.shape[-1]])
    assert not torch.allclose(short, latents_of(model, cond, 3, seed=8, sampler="pingpong"))


@pytest.mark.parametrize("causal", [True, False])
def test_a_million_frames_on(causal):
    model = tiny(causal=causal)
    memory = model.dit.encode_prompt(condition(model))
    prime, noise, out = torch.randn(2, 8, 4 * 6), torch.randn(3, 2, 8, 6), []
    for first in (0, 10 ** 6):
        context, blocks = sample.Context(model, memory, prime, first=first), []
        for x in noise:
            draw = lambda: torch.ones(2, 8, 6)
            blocks.append(sample.denoise_block(context.predict, x, schedule(2)[:-1], "pingpong",
                                               "rectified_flow", draw))
            context.append(blocks[-1])
        out.append(torch.cat(blocks, dim=-1))
    assert (out[0] - out[1]).abs().max() < 1e-5


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sizes", [[6] * 10, [1] * 60, [48, 12], [60]])
def test_streamed_decode_equals_whole(sizes, packed, monkeypatch):
    """Whatever the pieces, with weights packed for the CPU or not, and where a piece is too large and goes on
    in smaller ones."""
    model = tiny()
    latents = torch.randn(2, 8, 60)
    whole = model.autoencoder.decode(latents)
    decoder = audio_io.StreamingDecoder(model.autoencoder)
    plain = [decoder(piece) for piece in latents.split(sizes, dim=-1)]
    plain = torch.cat([*plain, decoder(latents[..., :0], last=True)], dim=-1)
    assert plain.shape == whole.shape and (plain - whole).abs().max() < 1e-5
    monkeypatch.setattr(speed, "packs", lambda weight: packed and torch.backends.mkldnn.is_available())
    speed.to_precision(model, "float32")    # changes the order of some weights in memory, no number
    streamed = torch.cat(list(audio_io.decode_stream(model.autoencoder, latents.split(sizes, dim=-1))),
                         dim=-1)
    assert streamed.shape == whole.shape and (streamed - whole).abs().max() < 1e-5
    sevens = lambda layer: layer.kernel_size == (7,) and layer.bias is not None
    # the tiny model's matrices are small
    monkeypatch.setattr(speed.Winograd, "suits", sevens if packed else speed.Winograd.suits)
    decoder = speed.StreamingDecoder(model.autoencoder)
    assert packed == any(conv.winograd is not None for conv in decoder.unpadded.values())
    decoder.most = 300    # 10 frames of the narrowest layer, one or two of the widest
    streamed = torch.cat([decoder(z, last=i == len(sizes)) for i,
                          z in enumerate([*latents.split(sizes, dim=-1), latents[..., :0]])], dim=-1)
    assert streamed.shape == whole.shape and (streamed - whole).abs().max() < 1e-5


def test_parallel_loss_equals_one_window_at_a_time():
    """The blocks of a crop learned at once == each alone, noisy at the end of its whole clean history."""
    model = tiny(causal=True)
    m = 4
    latents, noise, t = torch.randn(2, 8, 7 * 6), torch.randn(2, 8, m * 6), torch.rand(2, m)
    memory = model.dit.encode_prompt(condition(model))
    together = finetune.block_losses(model, memory, latents, noise, t)
    for i in range(m):
        alone = finetune.block_losses(model, memory, latents[..., :(4 + i) * 6],
                                      noise[..., i * 6:(i + 1) * 6], t[:, i:i + 1])
        assert (together[:, i:i + 1] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_loss_is_the_stream_s_own_prediction(causal):
    """What is trained is what plays: the loss's v for the last block is `Context.predict`'s."""
    model = tiny(causal=causal)
    memory = model.dit.encode_prompt(condition(model))
    latents, noise = torch.randn(2, 8, 24), torch.randn(2, 8, 6)
    t = torch.tensor(0.4)
    loss = finetune.block_losses(model, memory, latents, noise, t.expand(2, 1))
    x0 = latents[..., -6:]
    v = sample.Context(model, memory, latents[..., :-6]).predict(add_noise(x0, noise, t, "rectified_flow"), t)
    assert ((v - (noise - x0)).square().mean((1, 2)) - loss[:, 0]).abs().max() < 1e-5


@pytest.mark.parametrize("objective", ["rectified_flow", "v"])
@pytest.mark.parametrize("causal", [True, False])
def test_rollout_is_the_stream(causal, objective):
    """All of the steps in every block: what training rolls out is what `sample.py` plays, from a recording or
    from nothing."""
    model = tiny(causal=causal, objective=objective)
    cond = condition(model)
    for prime in (torch.randn(2, 8, 18), torch.zeros(2, 8, 18)):
        latents, last = arc_forcing.rollout(model, model.dit.encode_prompt(cond), prime, LEVELS, [3] * 5,
                                            noises(4))
        played = latents_of(model, cond, 5, steps=3, sampler="pingpong", seed=4,
                            prime=prime if prime.any() else None)
        assert torch.equal(latents, played) and [t for _, t in last] == [LEVELS[-1]] * 5


@pytest.mark.parametrize("objective", ["rectified_flow", "v"])
@pytest.mark.parametrize("causal", [True, False])
def test_replay_gives_the_gradients_of_the_plain_rollout(causal, objective):
    """All blocks' graphs kept, by hand == one block at a time; contexts detached; nothing but last
    evaluations counts."""
    model, ks = tiny(causal=causal, objective=objective), [1, 3, 2, 1, 3]
    prime, target = torch.randn(2, 8, 18), torch.randn(2, 8, 30)
    trained = [*model.dit.parameters(), *model.conditioner.parameters()]
    def gradients(backward):
        for p in trained:
            p.grad = None
            p.requires_grad_()
        backward(model.dit.encode_prompt(condition(model)))
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]

    def plain(memory, detach=True):
        """Nothing of ours but the network: no cache, no Context, the history given as latents."""
        draw, history, made = noises(4), torch.cat([torch.zeros(2, 8, 0), prime], -1), []
        for k in ks:
            x = draw()
            for i, t in enumerate(LEVELS[:k]):
                n = history.shape[-1] // 6
                with torch.no_grad():    # the context's keys and values, by a pass of their own
                    kv, index = None, ()
                    if causal:
                        for j in range(n):
                            clean = Numbered(history[..., j * 6:j * 6 + 6], (j,))
                            new = model.dit.blocks(memory, clean=clean, cached=Numbered(kv, index))[1]
                            kv = new if kv is None else [tuple(torch.cat(p, 2)[:, :, -18:] for p in zip(a, b))
                                                         for a, b in zip(kv, new)]
                            index = (*index, j)[-3:]
                    else:
                        index = tuple(range(n - 3, n))
                        kv = model.dit.blocks(memory, clean=Numbered(history[..., -18:], index))[1]
                with torch.set_grad_enabled(i == k - 1):
                    v = model.dit.blocks(memory, Numbered(x, (n,)), t.expand(2, 1),
                                         cached=Numbered(kv, index))[0]
                    x0, _ = denoise(x, v, t, objective)
                if i < k - 1:
                    x = add_noise(x0, draw(), LEVELS[i + 1], objective)
            made.append(x0)
            history = torch.cat([history, x0.detach()], -1)
        ((torch.cat(made, -1) - target).square() * target.cos()).sum().backward()

    def ours(memory):
        latents, last = arc_forcing.rollout(model, memory, prime, LEVELS, ks, noises(4))
        assert not latents.requires_grad
        latents.requires_grad_()
        gradient, = torch.autograd.grad(((latents - target).square() * target.cos()).sum(), latents)
        arc_forcing.replay(model, memory, prime, latents.detach(), last, gradient, contextlib.nullcontext)
    a, b = gradients(plain), gradients(ours)
    scale = max(g.abs().max() for g in a)
    assert scale > 1 and max((x - y).abs().max() for x, y in zip(a, b)) < 1e-5 * scale
    assert model.dit.context_in.weight.grad is None  # no way into the context, so the script leaves it alone


@pytest.mark.parametrize("causal", [True, False])
def test_gradient_flows_only_through_last_evaluations(causal):
    """The differentiated calls of the network: one a block, at its last level, on inputs that carry no
    graph."""
    model, ks, seen = tiny(causal=causal), [2, 1, 3], []
    plain = model.dit.blocks
    def spy(prompt, noisy, t, clean, cached, start, beat):
        if torch.is_grad_enabled():
            graph = noisy.data.requires_grad or any(y.requires_grad for kv in cached.data for y in kv)
            seen.append((noisy.index[0] + start // 6, t[0, 0].item(), clean.data, graph))
        return plain(prompt, noisy, t, clean, cached, start, beat)
    model.dit.blocks = spy
    memory = model.dit.encode_prompt(condition(model.requires_grad_()))
    latents, last = arc_forcing.rollout(model, memory, torch.randn(2, 8, 18), LEVELS, ks, noises(0))
    assert seen == []
    arc_forcing.replay(model, memory, torch.randn(2, 8, 18), latents, last, torch.ones_like(latents),
                       contextlib.nullcontext)
    assert seen == [(3 + i, LEVELS[k - 1].item(), None, False) for i, k in enumerate(ks)]


def test_losses_by_hand():
    real, fake, wrong = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 5.0]]), torch.tensor([[2.0, -1.0]])
    weights, softplus = torch.tensor([[0.25, 0.75]]), lambda x: math.log(1 + math.exp(x))
    assert arc_forcing.generator_loss(real, fake,
                                      weights).item() == pytest.approx(0.25 * softplus(1)
                                                                       + 0.75 * softplus(-2))
    assert arc_forcing.discriminator_loss(real, fake,
                                          weights).item() == pytest.approx(0.25 * softplus(-1)
                                                                           + 0.75 * softplus(2))
    for differs in (0.0, 1.0):
        loss = arc_forcing.contrastive_loss(real, wrong, weights, torch.tensor([differs]))
        assert loss.item() == pytest.approx(differs * (0.25 * softplus(1) + 0.75 * softplus(-4)))
    x0, target = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[1.5, 1.0]], [[0.0, 3.0]]])
    loss = arc_forcing.distill_loss(x0, target, torch.tensor(0.5))
    assert loss.tolist() == pytest.approx([(0.25 + 1) / 2 / 0.25, 4.5 / 0.25])


def test_save_and_load(tmp_path):
    model = tiny(causal=False)
    (tmp_path / "a.pt.7.part").write_bytes(b"of a run killed while it saved")
    common.save(model, tmp_path / "a.pt", step=5)
    again = sample.load(tmp_path / "a.pt")
    assert again.config == model.config and again.stage == "finetune" and again.sampling == model.sampling
    cond = condition(model)
    assert torch.equal(latents_of(model, cond, 3), latents_of(again, condition(again), 3))
    assert not list(tmp_path.glob("*.part"))


@torch.no_grad()
def test_port_matches_the_public_small(capsys):
    z, model = golden_io("sao_small_tiny"), small()
    assert "matched 430 of 430" in capsys.readouterr().err
    cond = check_networks(model, z, {"seconds_total": z["numbers"]})
    close(model.conditioner.numbers["seconds_total"](z["number.seconds_total.values"]),
          z["number.seconds_total.embedding"])
    close(model.dit.hidden(z["x"], z["t"], cond, 0), z["hidden0"])
    for causal, context, v in ((False, "lmdm.context", "lmdm.v_encdec"),
                               (True, "lmdm.context", "lmdm.v_block_causal"),
                               (True, "lmdm.long_context", "lmdm.v_block_causal_long")):
        model = small(causal=causal)
        model.dit.context_in.weight.copy_(z["lmdm.to_input_add_embed.weight"])
        close(model.dit(z["lmdm.x"], z["lmdm.t"], cond, context=z[context]), z[v])


def test_port_matches_diffusers_1_0():
    z, model = golden_io("diffusers_1_0_tiny"), load_stable_audio(GOLDEN / "diffusers_1_0_tiny")
    assert model.config.objective == "v" and not model.config.qk_norm
    assert model.config.token_width < model.config.width
    check_networks(model, z, {name: z[name] for name in ("seconds_start", "seconds_total")})


def test_without_speed_the_rest_is_complete(tiny_file, music, tmp_path, call):
    """The same music within one step of 16 bits, the same loss; an option that only speed.py serves names
    it."""
    here = tmp_path / "plain"
    here.mkdir()
    for file in HERE.glob("*.py"):
        if file.name not in ("speed.py", "test_all.py"):
            shutil.copy(file, here)

    def begin(name, *args):                                 # beside each other: they take seconds to begin
        return subprocess.Popen([sys.executable, here / name, *map(str, args)], cwd=tmp_path, text=True,
                                stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    exact = ["--precision", "float32", "--device", "cpu", "--threads", 1]
    play = ["--ckpt", tiny_file, "--seconds", 0.02, *exact]
    train = ["--init", tiny_file, "--data", music, "--steps", 1, "--batch", 2, "--blocks", 2,
             "--validation-crops", 2, *exact]
    begun = [begin("sample.py", *play, "--out", "without.wav"),
             begin("finetune.py", *train, "--out", "without.pt"),
             begin("sample.py", "--ckpt", tiny_file, "--precision", "int8", "--out", "refused.wav")]
    for main, options, out in (sample.main, play, "with.wav"), (finetune.main, train, "with.pt"):
        status, err = call(main, *options, "--out", out)
        assert status == 0, err
    *errors, refused = (process.communicate()[1] for process in begun)
    assert [process.returncode for process in begun] == [0, 0, 2], errors
    assert "needs speed.py" in refused and "Traceback" not in refused
    played, plain = (soundfile.read(tmp_path / f"{name}.wav", dtype="int16")[0].astype(int)
                     for name in ("with", "without"))
    assert played.any() and np.abs(played - plain).max() <= 1
    loss, plain = (float(rows_of(tmp_path / f"{name}.csv")[-1]["loss"]) for name in ("with", "without"))
    assert abs(loss - plain) < 1e-4 * loss


def test_the_road_to_attention_is_short(tiny_file, tmp_path, call, monkeypatch):
    """Our own frames from a script's main to the attention call, guidance included."""
    roads, real = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kw):
        stack = traceback.extract_stack()
        frames = [f.name for f in stack if Path(f.filename).parent == HERE and f.filename != __file__]
        roads.append(frames[frames.index("main"):])
        return real(*args, **kw)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    status, err = call(sample.main, "--ckpt", tiny_file, "--seconds", 0.01, "--threads", 1, "--cfg", 2,
                       "--device", "cpu", "--out", "a.wav")
    assert status == 0, err
    longest = max(roads, key=len)
    assert len(longest) <= 8, " > ".join(longest)


# -------------------------------------------------------------------------------- model.py
@pytest.mark.parametrize("objective", ["rectified_flow", "v"])
def test_noise_conversions_invert(objective):
    x0, eps, t = torch.randn(3, 8, 5), torch.randn(3, 8, 5), torch.rand(3, 1, 1)
    x = add_noise(x0, eps, t, objective)
    back = denoise(x, velocity(x0, eps, t, objective), t, objective)
    assert torch.allclose(back[0], x0, atol=1e-5) and torch.allclose(back[1], eps, atol=1e-5)


def test_schedule_and_shift():
    levels = schedule(8)
    assert len(levels) == 9 and levels[0] == 1 and levels[-1] == 0 and (levels.diff() < 0).all()
    assert levels[4] == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-6)     # l = -2 half way
    t, mu = 0.3, -(0.5 + 0.65 * (1000 - 256) / 3840)
    assert shift_time(torch.tensor(t),
                      1000).item() == pytest.approx(1 - math.exp(mu) / (math.exp(mu) + t / (1 - t)), abs=1e-6)
    assert shift_time(torch.tensor(t), 1000,
                      1.5).item() == pytest.approx(t / (t + math.exp(mu - 1.5) * (1 - t)), abs=1e-6)
    assert shift_time(torch.tensor(1.0), 240) == 1 and shift_time(torch.tensor(0.0), 240) == 0


def test_wrong_lengths_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="block is 6 frames"):
        model.dit(torch.zeros(2, 8, 5), torch.ones(2), condition(model), context=torch.zeros(2, 8, 6))
    with pytest.raises(ValueError, match="seconds_total"):
        model.conditioner(["x"])


def test_text_follows_the_model(monkeypatch):
    """T5's states come from the CPU and must go where the conditioner is, projected or not."""
    monkeypatch.setattr(T5, "__call__", lambda self,
                        prompts: (torch.ones(len(prompts), 3, 8), torch.ones(len(prompts), 3) > 0))
    for width in 8, 16:
        with torch.device("meta"):
            conditioner = Conditioner(replace(TINY, text="t5", text_tokens=3, text_width=8, cond_width=width))
        assert conditioner(["a", "b"], seconds_total=1).tokens.device.type == "meta"


def test_words_are_stable():
    """The ids are part of every checkpoint: they must never change. Unknown words and long prompts are no
    error."""
    words = tiny().conditioner.words
    with torch.no_grad():
        words.table.weight[1:] = torch.arange(1, 65)[:, None]
    states, mask = words(["Slow PIANO, 120 bpm"])
    ids = states[0, :, 0].int().tolist()
    assert ids == [30, 45, 41, 16, 0, 0] and mask.tolist() == [[True] * 4 + [False] * 2], ids
    assert words(["one two three four five six seven eight"])[0].shape == (1, 6, 16)


@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_margins_cover_the_receptive_field(side):
    """A change outside the margin changes nothing; one inside, a little short of it, does (so it is not far
    too wide)."""
    ae, hop = tiny().autoencoder, TINY.hop
    margin, T = (audio_io.decoder_margin(TINY), audio_io.encoder_margin(TINY))[side == "encoder"], 80
    x = torch.randn(1, 8, T) if side == "decoder" else torch.randn(1, 2, T * hop)
    run, unit = (ae.decode, 1) if side == "decoder" else (ae.encode, hop)
    def changed(distance):
        y = x.clone()
        y[..., :(40 - distance) * unit] += 1
        y[..., (41 + distance) * unit:] -= 1
        a, b = run(x), run(y)
        at = slice(40 * hop, 41 * hop) if side == "decoder" else slice(40, 41)
        return (a - b)[..., at].abs().max()
    assert changed(margin) == 0 and changed(margin - 3) > 0


def test_presets_round_trip_and_geometry():
    for config in PRESETS.values():
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    small = PRESETS["sao_small"]
    assert (small.hop, small.window, small.context, small.stream_numbers) == (2048, 240, 192,
                                                                              {"seconds_total": 12})


def test_t5_equals_running_it_by_hand(tmp_path):
    """A T5 with random weights and a tokenizer, saved by `transformers` itself."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = ["<pad>", "</s>", "<unk>", "warm", "rhodes", "piano", "drums"]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)},
                                                            unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>",
                                                     eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=7, d_model=768, d_kv=8, d_ff=32,
                                                           num_layers=2, num_heads=2)).eval()
    t5.save_pretrained(tmp_path)
    prompts = ["warm rhodes piano", "drums", "", "drums " * 100]
    model = small(text_model=str(tmp_path))
    states, mask = T5(str(tmp_path), None, 64)(prompts)
    assert states.shape == (4, 64, 768) and mask.sum(1).tolist() == [4, 2, 1, 64]
    with torch.no_grad():
        for row, prompt in enumerate(prompts[:3]):          # by hand, without any padding
            ids = torch.tensor([[words.index(w) for w in prompt.split()] + [1]])
            close(states[row:row + 1, :ids.shape[1]], t5(input_ids=ids).last_hidden_state)
        embeddings = model.conditioner.embed_text(prompts)
        close(embeddings, model.conditioner.proj_out(states) * mask[..., None])
        assert embeddings.shape == (4, 64, 48)
        assert not embeddings[0, 4:].any() and embeddings[0, :4].all(-1).all()
        assert torch.equal(model.conditioner(prompts, seconds_total=12).tokens[:, :64], embeddings)
    port.save_prompts(model, prompts, tmp_path / "out" / "prompts.pt")
    assert port.load_prompts(tmp_path / "out" / "prompts.pt")[0] == prompts
    assert torch.equal(port.load_prompts(tmp_path / "out" / "prompts.pt")[1], embeddings)
    with pytest.raises(UserError, match="768 wide; this checkpoint expects 512"):
        T5(str(tmp_path), 512, 64)(prompts)
    encoder = weakref.ref(load_t5(str(tmp_path))[1])
    shutil.rmtree(tmp_path)
    T5(str(tmp_path), None, 64)(prompts)                    # a later prompt reads nothing again
    forget_t5()
    assert encoder() is None
    with pytest.raises(UserError, match="cannot load the text encoder"):
        T5(str(tmp_path), None, 64)(prompts)


def sketching(**overrides):
    """A tiny model with everything that public models lack: beats, channels of pitch and of loudness."""
    model = tiny(pitch_channels=3, level_channels=2, beats=True, ae_strides=(4, 4, 16), **overrides)
    generator = torch.Generator().manual_seed(0)
    controls.fit(model, torch.randn(500, 84, generator=generator) @ torch.randn(84, 84, generator=generator))
    return model


def test_public_models_have_neither_beats_nor_a_sketch():
    """... and their checkpoints no weights for them."""
    assert not [name for name in tiny().state_dict() if "beat" in name or "sketch" in name]
    assert Config().channels == 64 and PRESETS["sao_1_0"].channels == 64


def test_sketch_knows_pitch_from_loudness():
    """The same chord louder: other levels, the same pitch. Another chord as loud: the other way round. In
    pieces as whole."""
    model = sketching()
    t = torch.arange(44100) / 44100

    def chord(*midi, gain=0.1):
        tone = sum(torch.sin(2 * math.pi * 440 * 2 ** ((m - 69) / 12) * t) for m in midi)
        return gain * tone.expand(1, 2, -1)
    middle = slice(60, 80)
    quiet, loud, other = (controls.features(x, model.config)[0, :, middle].mean(1) for x in
                          (chord(60, 64, 67), chord(60, 64, 67, gain=0.2), chord(62, 65, 69)))
    assert quiet[:60].topk(3).indices.sort().values.tolist() == [24, 28, 31]
    assert (loud[60:72] - quiet[60:72]).max() > 1
    assert (other[:60] - quiet[:60]).abs().max() > 10 * (loud[:60] - quiet[:60]).abs()[[24, 28, 31]].max()
    assert (quiet[72:] == quiet[72:].min()).all()           # nothing at the sides
    music = torch.randn(1, 2, 300 * 256)
    pieces = torch.cat(list(audio_io.encode_chunks(model, music[0].split(10000, dim=1))), dim=1)
    whole = controls.encode(model, music)[0]
    assert whole.shape == (8 + 5, 300) and (pieces - whole).abs().max() < 1e-4


def test_sketch_channels_are_principal_components():
    """Of half-way equal spread, 1 on the whole; pitch and loudness apart, so that one can be given without
    the other."""
    model = sketching()
    assert not model.sketch_directions[:3, 60:].any() and not model.sketch_directions[3:, :60].any()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 84, generator=generator) @ torch.randn(84, 84, generator=generator)
    made = (features - model.sketch_mean) @ model.sketch_directions.T
    covariance = torch.cov(made[:, :3].T)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    assert 0.9 < covariance.diag().sqrt().mean() < 1.1


@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_beats_are_told_to_the_new_block_alone(causal, per_frame):
    """Cached equals uncached with them; a block told nothing is the block of a model that cannot be told."""
    model = sketching(causal=causal, beats_per_frame=per_frame)
    cond = condition(model)
    kw = dict(blocks=6, cfg=3.0, sampler="pingpong")
    beat = controls.steady_beat(model.config, 92)
    cached, uncached = (latents_of(model, cond, beat=beat, use_cache=use, **kw) for use in (True, False))
    assert cached.shape[1] == 13 and (cached - uncached).abs().max() < 1e-4
    silent = latents_of(model, cond, **kw)
    assert (cached - silent).abs().max() > 1e-2
    assert torch.equal(latents_of(model, cond, beat=lambda number: None, **kw), silent)
    prompt, history = model.dit.encode_prompt(cond), Numbered(torch.randn(2, 13, 18), (0, 1, 2))
    block, t = Numbered(torch.randn(2, 13, 6), (3,)), torch.full((2, 1), 0.5)
    beat = controls.beat_of((92, 0.25), model.config, 2, "cpu")
    told = model.dit.blocks(prompt, block, t, history, beat=beat)
    plain = model.dit.blocks(prompt, block, t, history)
    assert (told[0] - plain[0]).abs().max() > 1e-3
    assert all(torch.equal(x, y) for kv, kv2 in zip(told[1], plain[1]) for x, y in zip(kv, kv2))


def test_beat_features_go_round_with_the_bar():
    bpm = torch.full((3,), 100.0)
    start, half, next_bar = controls.beat_features(bpm, torch.tensor([0.0, 0.5, 1.0]))
    assert start.shape == (18,) and start[:2].tolist() == [1, 0]
    assert torch.allclose(start, next_bar, atol=1e-5) and (start - half).abs().max() > 1
    # 2 blocks of 48 frames of 1024 samples, 4 beats of a second
    bpm, bar, _ = controls.steady_beat(PRESETS["nano"], 60)(2)
    assert bpm == 60 and bar == pytest.approx(2 * 48 * 1024 / 44100 / 4)


def test_every_frame_has_its_place_in_the_bar():
    """The frames of one block and of the next go on where those before them end, in bars of four and
    three."""
    config = PRESETS["nano"]
    for beats_per_bar in (4, 3):
        beat = controls.steady_beat(config, 92, beats_per_bar)
        told = torch.cat([controls.beat_of(beat(number), config, 1, "cpu")[0] for number in range(3)])
        bars = torch.arange(3 * config.block).double() / config.frame_rate * 92 / 60 / beats_per_bar
        expected = controls.beat_features(torch.full(bars.shape, 92.0).double(), bars)
        assert torch.allclose(told, expected, atol=1e-4)
    assert torch.equal(controls.beat_of((92, 0.1), config, 1, "cpu"),
                       controls.beat_of((92, 0.1, 4), config, 1, "cpu"))


def test_a_beat_moves_each_frame_or_the_timestep_token():
    """Two beats that are alike where the block begins and not after it: told per frame they make two blocks,
    at the token, where only the beginning counts, one."""
    for per_frame in (True, False):
        model = sketching(beats_per_frame=per_frame)
        c = model.config
        prompt = model.dit.encode_prompt(condition(model))
        block, t = Numbered(torch.randn(2, 13, 6), (3,)), torch.full((2, 1), 0.5)
        history = Numbered(torch.randn(2, 13, 18), (0, 1, 2))
        beat = controls.beat_of((92, 0.25), c, 2, "cpu")
        other = beat.clone()
        other[:, 1:] = controls.beat_of((92, 0.75), c, 2, "cpu")[:, 1:]      # all frames but the first
        one, two = (model.dit.blocks(prompt, block, t, history, beat=b)[0] for b in (beat, other))
        assert ((one - two).abs().max() > 1e-3) == per_frame


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_what_is_given_of_a_block_stays(sampler):
    """To the end, or down to a level, from where the model goes its own way; the other channels follow."""
    model = sketching()
    cond = condition(model)
    values, mask = torch.randn(4, 2, 13, 6), torch.zeros(13, 1, dtype=torch.bool)
    mask[8:11] = True                                       # the pitch

    def played(until):
        given = lambda number: controls.Given(values[number], mask, torch.tensor(until))
        return latents_of(model, cond, 4, steps=4, sampler=sampler, cfg=1.0, sketch=given)
    free = latents_of(model, cond, 4, steps=4, sampler=sampler, cfg=1.0)
    strict, loose = played(0.0), played(0.9)
    wanted = torch.cat(list(values), dim=-1)
    assert torch.equal(strict[:, 8:11], wanted[:, 8:11])
    assert (strict[:, :8] - free[:, :8]).abs().max() > 1e-3
    assert (strict[:, 11:] - wanted[:, 11:]).abs().max() > 0.1
    assert (loose[:, 8:11] - wanted[:, 8:11]).abs().max() > 1e-3 and (loose - free).abs().max() > 1e-3
    assert torch.equal(played(2.0), free)                   # no level is that high
    pitch, level = torch.ones(5, 6), torch.full((5, 6), 2.0)
    given = controls.given_of(model, [(pitch, "pitch", 0.3), (level, "level", 0.0)])    # each its own
    assert given.mask[:, 0].tolist() == 8 * [False] + 5 * [True]
    assert given.until[8:, 0].tolist() == pytest.approx(3 * [0.3] + 2 * [0])
    assert (given.values[0, 8:11] == 1).all() and (given.values[0, 11:] == 2).all()


def test_what_is_given_can_be_read_in_the_first_step():
    """When a block is nothing but noise, the given channels are not; further down they have as much less."""
    values, noise, mask = torch.randn(2, 13, 6), torch.randn(2, 13, 6), torch.zeros(13, 1, dtype=torch.bool)
    mask[8:11] = True
    given = controls.Given(values, mask, torch.tensor(0.0))
    for t in (1.0, 0.5, 0.0):
        held = given.hold(noise, torch.tensor(t), noise, "rectified_flow")
        share = controls.SKETCH_NOISE * t
        close(held[:, 8:11], ((1 - share) * values + share * noise)[:, 8:11])
        assert torch.equal(held[:, :8], noise[:, :8]) and torch.equal(held[:, 11:], noise[:, 11:])
    assert controls.SKETCH_NOISE < 0.5


# -------------------------------------------------------------------------------- common.py: checkpoints
def test_a_checkpoint_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    """As on a full disk: files may not grow beyond 10 kB here."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    common.save(tiny(), tmp_path / "a.pt")
    broken = tiny()
    broken.dit.project_in.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="no longer finite"):
        common.save(broken, tmp_path / "a.pt")
    with pytest.raises(UserError, match="no longer finite"):
        common.save(tiny(), tmp_path / "a.pt",
                    discriminator=dict(weights=dict(head=torch.tensor([math.nan]))))
    assert sample.load(tmp_path / "a.pt").dit.project_in.weight.isfinite().all()
    before = (tmp_path / "a.pt").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*a.pt: File too large"):
            common.save(tiny(seed=1), tmp_path / "a.pt")
        # numpy gives no reason; the free space does
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
        with pytest.raises(UserError, match="cannot write .*new.npy: No space left on device"):
            common.write_whole(tmp_path / "new.npy", lambda file: np.save(file, np.zeros(9999)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [f.name for f in tmp_path.iterdir()] == ["a.pt"] and (tmp_path / "a.pt").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_checkpoint_is_written_to_its_end(number, tmp_path, monkeypatch, call):
    """A signal in the midst of it, or two, takes effect afterwards; the script's status tells which."""
    model, real = tiny(seed=1), torch.save
    common.save(tiny(), tmp_path / "a.pt")

    def interrupted(content, file):
        os.kill(os.getpid(), number)
        real(content, file)
        os.kill(os.getpid(), number)
    monkeypatch.setattr(torch, "save", interrupted)

    def main():
        common.save(model, tmp_path / "a.pt")
        pytest.fail("the signal was lost")
    assert call(main)[0] == 128 + number
    monkeypatch.undo()
    assert [f.name for f in tmp_path.iterdir()] == ["a.pt"]
    assert torch.equal(common.load(tmp_path / "a.pt").dit.project_in.weight, model.dit.project_in.weight)
    with pytest.raises(KeyboardInterrupt):                  # as before
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_only_files_are_replaced(tmp_path):
    """A link stays a link to a new content, a device stays a device."""
    (tmp_path / "large disk").mkdir()
    (tmp_path / "a.pt").symlink_to(tmp_path / "large disk" / "b.pt")
    for seed in 0, 1:
        common.save(tiny(seed), tmp_path / "a.pt")
        assert torch.equal(common.load(tmp_path / "large disk" / "b.pt").dit.project_in.weight,
                           tiny(seed).dit.project_in.weight)
    assert (tmp_path / "a.pt").is_symlink()
    with pytest.raises(UserError, match="a device"):
        common.writable(os.devnull)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
NOT_WEIGHTS = [(b"", "is empty"), (LFS, "git lfs pull"),
               (b"<!DOCTYPE html><title>Log in</title>", "web page"),
               (b"\n <?xml version='1.0'?><Error>AccessDenied</Error>", "web page"),
               (b"Entry not found", "is text, not weights: 'Entry not found'"),
               (b'{"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001.safetensors"}}', "index")]


@pytest.mark.parametrize("content, message", NOT_WEIGHTS)
def test_files_that_are_no_weights(content, message, tmp_path):
    folder = write_public(tmp_path / "public", public_small())
    for name in "a.pt", "public/model.ckpt", "public/model.safetensors":
        (tmp_path / name).write_bytes(content)
    for read in (lambda: common.load(tmp_path / "a.pt"), lambda: load_stable_audio(folder / "model.ckpt"),
                 lambda: load_stable_audio(folder), lambda: port.load_prompts(tmp_path / "a.pt")):
        with pytest.raises(UserError, match=re.escape(message)):
            read()


def test_checkpoints_that_are_something_else(tmp_path, tiny_file):
    """The reason is told, not "not readable", for what can be read."""
    saved = torch.load(tiny_file, weights_only=True)
    name = "dit.project_in.weight"

    def refused(content, message):
        if content is not None:
            torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError, match=message) as error:
            common.load(tmp_path / "a.pt")
        assert "not a readable" not in str(error.value)
    refused(saved["weights"], "not a checkpoint of this project")
    refused({**saved, "weights": {**saved["weights"], "bn.num_batches_tracked": torch.tensor(3)}},
            "num_batches_tracked unknown")
    weight = saved["weights"][name]
    for wrong in weight.int(), weight.to("meta"), weight * math.nan, 3:
        refused({**saved, "weights": {**saved["weights"], name: wrong}}, f"{name} is no tensor of finite")
    refused({**saved, "weights": [1, 2]}, "a.pt: ")
    refused({**saved, "config": "large"}, "a.pt: ")
    wrong = dict(block=0, width="64", causal=None, heads=2.0, depth=2 ** 70, ae_strides=(0, 4, 4),
                 cross_ids=("prompt", "mood"), numbers=(("seconds_total", 256, 0),))
    for field, value in wrong.items():
        refused({**saved, "config": {**saved["config"], field: value}}, "a.pt: ")
    for recommended in (dict(steps="8"), dict(cfg=None), dict(sampler=3), dict(words="a b"), dict(words=[1]),
                        dict(words={"a": 65}), dict(words={"a": [1]}), "fast"):
        refused({**saved, "sampling": recommended}, "a.pt: ")
    refused({**saved, "callback": Code()}, "wants to run code")
    (tmp_path / "a.pt").write_bytes((GOLDEN / "sao_small_tiny" / "model.safetensors").read_bytes())
    refused(None, "safetensors file")
    damaged = bytearray(tiny_file.read_bytes())
    damaged[len(damaged) // 2] ^= 1                         # within a weight: torch.load does not notice
    (tmp_path / "a.pt").write_bytes(damaged)
    with pytest.raises(UserError, match="check sums"):
        common.load(tmp_path / "a.pt")
    (tmp_path / "a.pt").rename(tmp_path / "a.pt.123.part")
    refused(None, "no checkpoint at .*a.pt; not written to the end: .*a.pt.123.part")
    with pytest.raises(UserError, match="is a folder"):
        common.load(tmp_path)


def test_what_cannot_be_printed_or_written(tmp_path):
    """A terminal that knows only ASCII gets escapes, a full standard output is told."""
    line = "import common; common.run(lambda: print('caf\\u00e9 \\U0001f3b5 \\udcff'))"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with open("/dev/full", "w") as full:
        printing, failing = (subprocess.Popen([sys.executable, "-c", line], cwd=HERE, env=env, stdout=out,
                                              stderr=subprocess.PIPE, text=True)
                             for out in (subprocess.PIPE, full))
        assert printing.communicate() == ("caf\\xe9 \\U0001f3b5 \\udcff\n", "")
        assert failing.communicate() == (None, "error: No space left on device\n")
    assert (printing.returncode, failing.returncode) == (0, 2)


def test_out_of_memory_is_one_line(call):
    def main():
        torch.empty(2 ** 50)
    status, err = call(main)
    assert status == 2 and err.startswith("error: out of memory: ") and err.count("\n") == 1


@pytest.mark.parametrize("module", [sample, finetune, arc_forcing, data, nano, band, measure, bench, port])
def test_two_dashes_are_no_value(module, call):
    """argparse takes `--out=--` for an empty list: a traceback later, or the default without a word."""
    assert call(module.main, "x", "--out=--") == (2, "error: --out=-- names no value\n")


def test_numbers_of_the_command_line():
    kinds = dict(positive=["inf", "1e-3", "1e300"], finite=["-1", "0", "1e9"],
                 whole=["1", "1_000", "1000000000"], positive_finite=["1e-9"],
                 not_negative=["0", "3.5"], whole_or_zero=["0", "7"],
                 step_count=["1", "10000"], thread_count=["1"], random_seed=["0", str(2 ** 64 - 1)])
    bad = dict(positive=["nan", "0", "-inf", "-1"], finite=["nan", "inf", "1e300"],
               whole=["0", "-1", "nan", "1e3", str(10 ** 30)],
               positive_finite=["0", "nan", "inf", "-1"], not_negative=["-1e-9", "nan", "inf"],
               whole_or_zero=["-1", "0.5", str(10 ** 30)], step_count=["0", "10001"],
               thread_count=["0", "1000000"], random_seed=["-1", str(2 ** 64), "nan"])
    for name, texts in kinds.items():
        for text in texts:
            getattr(common, name)(text)
        for text in bad[name]:
            with pytest.raises((ValueError, argparse.ArgumentTypeError)):
                getattr(common, name)(text)


def test_loading_fills_no_weights_first(tiny_file):
    """... which on the meta device would import a compiler, a second and more before the first audio."""
    line = f"import sys, sample; sample.load({str(tiny_file)!r}); print('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", line], cwd=HERE, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# -------------------------------------------------------------------------------- speed.py
def in_pieces(model, latents, compile=False):
    """Latents (B, C, T) -> audio, decoded block by block."""
    pieces = audio_io.decode_stream(model.autoencoder, latents.split(6, dim=-1), compile)
    return torch.cat(list(pieces), dim=-1)


def off_by(got, want):
    """How far got is from want, as a share of want's norm."""
    return (got - want).norm() / want.norm()


@pytest.mark.parametrize("causal", [True, False])
def test_bf16_is_float32_within_its_error(causal):
    """bf16 keeps 8 bits: a prediction is off by a few times 2^-8. Angles, frequencies and the sampler's state
    stay float32."""
    narrow = tiny(ae_width=16)
    assert speed.to_precision(narrow, "bf16") == "bf16"
    assert narrow.autoencoder.decoder[0].weight.dtype == torch.float32
    model = tiny(causal=causal, ae_width=64)
    assert speed.to_precision(model, "float32") == "float32"
    assert model.dit.project_in.weight.dtype == torch.float32
    low = tiny(causal=causal, ae_width=64)
    assert speed.to_precision(low, "bf16") == "bf16"
    assert low.dit.project_in.weight.dtype == torch.bfloat16
    assert low.autoencoder.decoder[0].weight.dtype == torch.bfloat16
    assert low.autoencoder.decoder[-1].weight.dtype == torch.float32
    for always in low.dit.inv_freq, low.dit.time_frequencies, low.conditioner.words.table.weight:
        assert always.dtype == torch.float32

    kw = dict(steps=2, sampler="euler", cfg=3.0)
    latents = latents_of(model, condition(model), 6, **kw)
    rough = latents_of(low, condition(low), 6, **kw)
    uncached = latents_of(low, condition(low), 6, use_cache=False, **kw)
    assert latents.dtype == rough.dtype == torch.float32
    assert 0 < off_by(rough, latents) < 0.03
    assert (rough - uncached).norm() / latents.norm() < 0.03

    audio = in_pieces(model, latents)
    rough_audio = in_pieces(low, latents)
    assert rough_audio.dtype == torch.float32
    assert 0 < off_by(rough_audio, audio) < 0.03
    # what is heard is not rounded to 8 bits
    assert off_by(rough_audio.bfloat16(), rough_audio) > 1e-3
    whole = low.autoencoder.decode(latents)
    assert whole.dtype == torch.float32
    assert (whole - rough_audio).norm() / audio.norm() < 0.03


def test_int8_layer_by_hand():
    """Weights round to 127 steps a row, inputs to 127 or 255 steps of their range: an output is off by about
    a percent, and inputs that are whole steps come out exact."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    x = torch.randn(2, 5, 64)
    want = linear(x)
    got = speed.Int8Linear(linear)(x)
    assert got.shape == want.shape
    assert 0 < off_by(got, want) < 0.03
    with torch.no_grad():
        linear.weight[0] /= 100                             # a row a hundred times smaller has its own scale
    want = linear(x)[..., 0] - linear.bias[0]
    got = speed.Int8Linear(linear)(x)[..., 0] - linear.bias[0]
    assert off_by(got, want) < 0.05                         # with one scale for all rows: 0.2 to 0.7
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-127, 128, linear.weight.shape))
        linear.weight[:, 0] = 127
    exact = speed.Int8Linear(linear)
    top = 64 if exact.reduce_range else 128
    x = torch.randint(-top, top, (1, 3, 64)).float()
    x[0, 0, :2] = torch.tensor([-top, top - 1.0])           # all of the range, so that a step is 1
    assert (exact(x) - linear(x)).abs().max() < 1e-2
    # one item of a batch does not change how another is rounded
    loud = torch.cat([x, 1000 * torch.randn_like(x)])
    assert torch.equal(exact(loud)[:1], exact(x))


@pytest.mark.parametrize("causal,bf16", [(True, False), (False, False), (True, True)])
def test_int8_is_float32_within_its_error(causal, bf16, monkeypatch):
    """The layers meant to run in integers do, in every block, the others and a wide decoder in bf16 on CPUs
    that have it; the same seed still gives the same stream and its start."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    model = tiny(causal=causal, ae_width=64)
    low = tiny(causal=causal, ae_width=64)
    assert speed.to_precision(low, "int8") == "int8"
    half = torch.bfloat16 if bf16 else torch.float32
    types = set()
    for layer in low.dit.layers:
        layer.ff.down.register_forward_hook(lambda _, x, y: types.add((x[0].dtype, y.dtype)))
    small = {name.split(".", 2)[2] for name, module in low.dit.named_modules()
             if isinstance(module, speed.Int8Linear)}
    assert small == {"self_attention.qkv", "self_attention.out", "cross_attention.q", "cross_attention.out",
                     "ff.up"}
    kw = dict(steps=2, sampler="euler", cfg=3.0)
    latents = latents_of(model, condition(model), 6, **kw)
    rough = latents_of(low, condition(low), 6, **kw)
    assert 0 < off_by(rough, latents) < 0.05
    assert torch.equal(rough[..., :3 * 6], latents_of(low, condition(low), 3, **kw))
    assert types == {(half, half)}
    assert low.dit.project_in.weight.dtype == torch.float32
    assert low.autoencoder.decoder[0].weight.dtype == half
    assert off_by(in_pieces(low, latents), in_pieces(model, latents)) < 0.03


@pytest.mark.parametrize("amx,avx512_bf16,avx2,recommended,chosen", [
    (True, True, True, True, "bf16"),
    (False, True, True, True, "int8"),
    (False, True, True, False, "bf16"),
    (False, False, True, True, "int8"),
    (False, False, True, False, "float32"),
    (False, False, False, True, "float32")])
def test_precision_is_chosen_by_asking_the_hardware(amx, avx512_bf16, avx2, recommended, chosen, monkeypatch):
    """int8 in addition takes a checkpoint for which somebody found that it changes nothing."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: avx2)
    model = tiny()
    model.sampling["int8"] = recommended
    assert speed.to_precision(model, "auto") == chosen
    assert speed.to_precision(tiny(), "float32") == "float32"
    cpu = torch.device("cpu")
    assert common.training_precision("float32", cpu)[0] == "float32"
    in_training = common.training_precision("auto", cpu)[0]
    assert in_training == ("bf16" if avx512_bf16 else "float32")        # int8 is for playing alone


def tensors_of(prompt):
    """All tensors of an EncodedPrompt, in the order in which a graph takes them."""
    return [prompt.global_, *(y for kv in prompt.cross for y in kv)]


def equal(some, others):
    """Are two lists of tensors the same?"""
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_and_a_piece_are_functions_of_tensors(causal, monkeypatch):
    """What a CUDA graph is recorded of: all that changes is handed in and handed back, and nothing is written
    where it lies."""
    model = tiny(causal=causal)
    functions = []
    monkeypatch.setattr(speed, "Graphed", lambda function: functions.append(function) or function)
    prompt = model.dit.encode_prompt(condition(model))
    context = sample.Context(model, prompt, torch.zeros(2, 8, 0))
    make = speed.graphed_block(context, sample.denoise_block, LEVELS, "pingpong", 1.0)
    decoder = speed.StreamingDecoder(model.autoencoder)
    draw = noises(1)
    for _ in range(3):
        decoder(make(draw))

    noise = torch.randn(3, 2, 8, 6)
    other = model.dit.encode_prompt(condition(model, "fast", "loud drums"))
    state = context.tensors()
    next_block, piece = functions
    assert not torch.equal(next_block(state, noise, *tensors_of(prompt))[0],
                           next_block(state, noise, *tensors_of(other))[0])

    for function, state, inputs in ((next_block, state, [noise, *tensors_of(other)]),
                                    (piece, list(decoder.kept.values()), [noise[0]])):
        before = [x.clone() for x in (*state, *inputs)]
        result, new_state = function(state, *inputs)
        for _ in range(2):                                  # now it has been elsewhere
            decoder(make(draw))
        again, new_again = function(state, *inputs)
        assert torch.equal(result, again)
        assert equal(new_state, new_again)
        assert equal(before, [*state, *inputs])
        assert [x.shape for x in new_state] == [x.shape for x in state]
        assert not any(torch.equal(new, old) for new, old in zip(new_state, state))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_graphs_play_what_the_network_plays(causal, cfg, monkeypatch):
    """... on the GPU without a graph, and on the CPU; a new prompt is read, and the end, of another shape, is
    decoded too."""
    model = tiny(causal=causal)

    def play(device):
        model.to(device)
        other = condition(model, "fast drums", "slow")
        prompts = iter([None] * 6 + [other] + [None] * 5)
        blocks = list(sample.stream(model, condition(model), blocks=12, steps=3, sampler="pingpong", cfg=cfg,
                                    change=lambda number: next(prompts)))
        audio = list(audio_io.decode_stream(model.autoencoder, blocks))
        return torch.cat(blocks, dim=-1).cpu(), torch.cat(audio, dim=-1).cpu()
    on_cpu = play("cpu")
    recorded = []
    record = speed.Graphed.record

    def counted(self, tensors, n):
        recorded.append(n)
        record(self, tensors, n)
    monkeypatch.setattr(speed.Graphed, "record", counted)
    graphed = play("cuda")
    assert len(recorded) == 2                               # blocks, pieces
    monkeypatch.setattr(speed.Graphed, "__call__", lambda self, state, *inputs: self.function(state, *inputs))
    for with_graph, without, slow in zip(graphed, play("cuda"), on_cpu):
        assert (with_graph - without).abs().max() < 1e-5 * without.abs().max()
        assert (with_graph - slow).norm() < 1e-2 * slow.norm()


def test_only_what_is_recorded_is_compiled(monkeypatch):
    """... and without --compile nothing imports PyTorch's compiler, which takes seconds."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    @torch.compile(backend=backend)
    def double(x):
        return 2 * x
    try:
        torch.compiler.set_stance("force_eager")            # as `speed.compile_layers` does on a GPU
        double(torch.ones(2))
        assert not compiled
        with speed.compiling():
            double(torch.ones(2))
        assert len(compiled) == 1
        double(torch.ones(3))
        assert len(compiled) == 1
    finally:
        torch.compiler.set_stance("default")
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    monkeypatch.setattr(torch.compiler, "set_stance", None)
    with speed.compiling():
        pass


def test_a_broken_speed_file_is_not_passed_over(tmp_path):
    shutil.copy(HERE / "common.py", tmp_path)
    shutil.copy(HERE / "model.py", tmp_path)
    (tmp_path / "speed.py").write_text("import no_such_package")
    done = subprocess.run([sys.executable, "-c", "import common"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode
    assert "no_such_package" in done.stderr


@pytest.mark.parametrize("dilation", [1, 3, 9])
def test_winograd_is_the_convolution(dilation):
    """For batches and any length, in one piece or several."""
    conv = torch.nn.Conv1d(20, 30, 7, dilation=dilation).requires_grad_(False)
    exact = copy.deepcopy(conv).double()
    for batch, outputs, tiles_at_once in itertools.product((1, 3), (1, 5, 6, 7, 50, 217), (512, 4)):
        x = speed.channels_last(torch.randn(batch, 20, outputs + 6 * dilation))
        want = exact(x.double())
        got = speed.Winograd(conv, tiles_at_once)(x)
        assert got.shape == want.shape
        assert off_by(got, want) < 2e-5
    large = torch.nn.Conv1d(128, 128, 7)
    assert speed.Winograd.suits(large)
    assert not speed.Winograd.suits(conv)
    assert not speed.Winograd.suits(large.bfloat16())


def test_a_decoder_goes_at_once():
    """Its copy of the weights, and on a GPU its graph, must not wait for the garbage collector."""
    gc.disable()
    try:
        decoder = speed.StreamingDecoder(tiny().autoencoder)
        decoder(torch.randn(1, 8, 6))
        left = weakref.ref(decoder)
        del decoder
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN packs nothing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layer_is_the_layer(dtype):
    """For any number of rows, though some are added in bf16; the weights are the layer's own, in another
    order."""
    # with oneDNN's order, each call would rearrange them
    assert not speed.packs(torch.empty(1024, 1024, 1))
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_supported():
        pytest.skip("oneDNN has bf16 with AVX-512")
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-6
    for bias in True, False:
        linear = torch.nn.Linear(64, 48, bias=bias).to(dtype)
        packed = speed.PackedLinear(linear, rows=49)
        for batch, rows in (2, 1), (2, 2), (2, 4), (2, 49), (1, 49):
            x = torch.randn(batch, rows, 64).to(dtype)
            want = linear(x)
            got = packed(x)
            assert got.shape == want.shape
            assert got.dtype == dtype
            assert off_by(got, want) < tolerance


def random_snake(channels):
    layer = speed.PiecewiseSnake(channels)
    torch.nn.init.normal_(layer.alpha)
    torch.nn.init.normal_(layer.beta)
    return layer


@pytest.mark.skipif(shutil.which("g++") is None, reason="--compile needs a C++ compiler")
@torch.no_grad()
def test_compiled_snake_is_the_snake():
    """Into another place, and over the input; channels and lengths vary. In a decoder too, which equals the
    whole."""
    compiled = speed.fused_snake("cpu", torch.float32)
    for batch, channels, samples in (1, 70, 300), (2, 33, 41), (1, 33, 0):
        layer = random_snake(channels)
        x = speed.channels_last(torch.randn(batch, channels, samples))
        out = speed.channels_last(torch.zeros(batch, channels, 2 + samples))
        want = layer(x)
        made = compiled(layer, x, out[..., 2:])
        assert torch.allclose(made[..., :samples], want, atol=1e-5)
        assert torch.allclose(out[..., 2:], want, atol=1e-5)
        assert not out[..., :2].any()
        assert torch.allclose(compiled(layer, x, x), want, atol=1e-5)
        assert torch.allclose(x, want, atol=1e-5)
    model = tiny()
    latents = torch.randn(1, 8, 30)
    streamed = in_pieces(model, latents, compile=True)
    assert (streamed - model.autoencoder.decode(latents)).abs().max() < 1e-5


def test_without_a_compiler_compile_ends_before_the_output_is_opened(tiny_file, tmp_path):
    """... or a recording of that name would be lost to an option that does not work here."""
    out = tmp_path / "kept.wav"
    out.write_bytes(b"a recording")
    env = dict(os.environ, CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    done = script("sample.py", "--ckpt", tiny_file, "--seconds", 1, "--compile", "--out", out, text=True,
                  env=env)
    assert done.returncode == 2
    assert "--compile does not work here" in done.stderr
    assert "Traceback" not in done.stderr
    assert out.read_bytes() == b"a recording"


def test_snake_in_pieces_is_the_snake():
    """A long input goes through in pieces: the same numbers, also written over the input, in either order of
    memory."""
    layer = random_snake(70)
    plain = SnakeBeta(70)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 70, 31000)                           # over 2 ** 21 values, the last piece is shorter
    want = (x + (layer.alpha.exp()[:, None] * x).sin() ** 2 / (layer.beta.exp()[:, None] + 1e-9)).detach()
    assert torch.allclose(plain(x), want, atol=1e-6)
    assert torch.allclose(layer(x), want, atol=1e-6)        # with gradients: whole
    with torch.no_grad():
        for x in x, speed.channels_last(x):
            assert torch.allclose(layer(x), want, atol=1e-6)
            assert torch.allclose(speed.snake(layer, x, out=x), want, atol=1e-6)
            assert torch.allclose(x, want, atol=1e-6)


def test_side_by_side():
    """Making and decoding blocks share the cores only where there are two to share, and layers are small."""
    assert speed.side_by_side(tiny(), threads=2)
    assert not speed.side_by_side(tiny(), threads=1)
    assert not speed.side_by_side(tiny(width=576, heads=9), threads=2)


def test_prefetch():
    """The same items, made in another thread; its exceptions arrive too."""
    def items():
        yield threading.get_ident()
        yield 1
        raise UserError("no more")
    made = speed.prefetch(items())
    assert next(made) != threading.get_ident()
    assert next(made) == 1
    with pytest.raises(UserError, match="no more"):
        next(made)
    assert list(speed.prefetch(range(100))) == list(range(100))

    asked = threading.Event()
    go = threading.Event()

    def slow():
        yield 0
        asked.set()
        go.wait(20)
        yield 1
    made = speed.prefetch(slow())
    assert next(made) == 0
    assert asked.wait(20)                                   # the next one is begun before it is asked for
    go.set()
    made.close()                                            # ends the thread
    assert all("work" not in thread.name for thread in threading.enumerate())


# -------------------------------------------------------------------------------- audio.py
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "opus", "aiff"])
def test_formats(tmp_path, kind):
    rate = 48000 if kind == "opus" else 44100
    options = dict(format="OGG", subtype="OPUS") if kind == "opus" else {}
    soundfile.write(tmp_path / f"a.{kind}", notes(1.5, rate), rate, **options)
    assert library.audio_files(tmp_path) == [tmp_path / f"a.{kind}"]
    audio = torch.cat(list(recordings.read_audio(tmp_path / f"a.{kind}", SMALL_AE)), dim=1)
    assert audio.dtype == torch.float32 and audio.shape[0] == 2
    assert abs(audio.shape[1] - 1.5 * 44100) < 0.1 * 44100
    original = torch.from_numpy(notes(1.5, 44100 if kind != "opus" else rate).T.copy())
    original = torchaudio.functional.resample(original, rate, 44100)
    assert (audio[:, 10000:60000] - original[:,
                                             10000:60000]).square().mean() < 0.02 * original.square().mean()


@pytest.mark.parametrize("kind", ["flac", "ogg", "mp3", "opus"])
def test_reading_in_pieces_is_reading_whole(tmp_path, monkeypatch, kind):
    options = dict(format="OGG", subtype="OPUS") if kind == "opus" else {}
    soundfile.write(tmp_path / f"a.{kind}", notes(3.3, 48000), 48000, **options)
    whole = torch.cat(list(recordings.read_audio(tmp_path / f"a.{kind}", SMALL_AE)), dim=1)
    monkeypatch.setattr(recordings, "PIECE", 1)
    pieces = list(recordings.read_audio(tmp_path / f"a.{kind}", SMALL_AE))
    assert len(pieces) > 2
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("rate", [8000, 22050, 32000, 48000, 96000])
def test_resampling_in_pieces_is_resampling_whole(rate):
    x = torch.from_numpy(notes(2.71, rate).T.copy())
    whole = torchaudio.functional.resample(x, rate, 44100)
    for cuts in ([x], x.split(777, dim=1), x.split(rate, dim=1)):
        y = torch.cat(list(recordings.resampled(iter(cuts), rate, 44100)), dim=1)
        assert y.shape == whole.shape and (y - whole).abs().max() < 1e-5


@pytest.mark.parametrize("by_ffmpeg", [False, True])
def test_many_channels_are_read_in_small_pieces(by_ffmpeg, tmp_path):
    """Five seconds of 255 channels would be gigabytes at a high rate."""
    if by_ffmpeg and shutil.which("ffmpeg") is None:
        pytest.skip("no ffmpeg")
    soundfile.write(tmp_path / "a.wav", np.full((30000, 64), 0.25, np.float32), 44100, subtype="FLOAT")
    pieces = [*recordings.open_recording(tmp_path / "a.wav", by_ffmpeg, recordings.Length(1.0)).pieces]
    assert len(pieces) > 1 and max(piece.size for piece in pieces) <= 2 ** 20
    assert sum(map(len, pieces)) == 30000


def test_a_giant_text_is_no_caption(tmp_path):
    notes = []
    for name in "a.txt", "a.json":
        (tmp_path / name).write_bytes(b'"' + b"word " * 2 ** 20 + b'"')
        assert library.read_caption(tmp_path / name, name, notes) == "" and "longer than" in notes.pop()


def test_odd_rate_needs_no_giant_filter(monkeypatch):
    real = torchaudio.transforms.Resample
    monkeypatch.setattr(torchaudio.transforms, "Resample", lambda p,
                        q: real(p, q) if p * q < 2e6 else pytest.fail("giant filter"))
    for rate in 47999, 383999:
        x = torch.from_numpy(notes(1, rate).T.copy())
        y = torch.cat(list(recordings.resampled([x], rate, 44100)), dim=1)
        assert abs(y.shape[1] - 44100) < 5


def test_channels(tmp_path):
    for channels in (1, 2, 6):
        audio = torch.cat(list(recordings.read_audio(save_wav(tmp_path / f"{channels}.wav",
                                                              channels=channels), SMALL_AE)), dim=1)
        assert audio.shape == (2, 44100)
        assert (channels == 1) == torch.equal(audio[0], audio[1])


def test_encoding_in_pieces_is_encoding_whole(encoder, monkeypatch):
    monkeypatch.setattr(audio_io, "PIECE", 0.05)
    for samples in (44100, 44100 // 64 * 64, 64 * 40 + 63, 64, 20000):
        x = torch.from_numpy(notes(1).T.copy())[:, :samples]
        with torch.no_grad():
            whole = encoder.autoencoder.encode(x[None])[0]
        for cuts in ([x], x.split(1000, dim=1), x.split(7001, dim=1)):
            pieces = list(audio_io.encode_chunks(encoder, iter(cuts)))
            assert samples < 10000 or len(pieces) > 5
            assert (torch.cat(pieces, dim=1) - whole).abs().max() < 1e-5


def test_encode_file(encoder, tmp_path):
    latents = audio_io.encode_file(encoder, save_wav(tmp_path / "a.wav", 1))
    assert latents.shape == (8, 44100 // 64) and latents.dtype == torch.float32
    for last in 1, 200, 1000:
        end = audio_io.encode_file(encoder, tmp_path / "a.wav", last)
        assert end.shape == latents[:, -last:].shape and (end - latents[:, -last:]).abs().max() < 1e-5
    soundfile.write(tmp_path / "b.wav", np.zeros((10, 2)), 44100)
    with pytest.raises(UserError, match="too short"):
        audio_io.encode_file(encoder, tmp_path / "b.wav")
    with pytest.raises(UserError, match="no such file"):
        audio_io.encode_file(encoder, tmp_path / "c.wav")


def heard(file, config=SMALL_AE):
    return torch.cat(list(recordings.read_audio(file, config)), dim=1)


def seconds_heard(file):
    return heard(file).shape[1] / 44100


needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


def encoded(samples, rate=44100, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **options)
    return file.getvalue()


def ffmpeg(*args, data=None):
    return subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, args)], input=data, capture_output=True,
                          check=True).stdout


def without_first_frame(mp3):
    """An MP3 without its Xing or Info frame, as recordings of streams are."""
    return mp3[recordings.mpeg_frame(mp3[1], mp3[2])[0]:]


def late_page(ogg, samples):
    """An Ogg file with the time stamp of one page in its middle that much late, and its checksum made
    anew."""
    starts = [match.start() for match in re.finditer(b"OggS", ogg)]
    at, end = starts[len(starts) // 2:len(starts) // 2 + 2]
    page = bytearray(ogg[at:end])
    page[6:14] = struct.pack("<q", struct.unpack_from("<q", page, 6)[0] + samples)
    page[22:26] = bytes(4)
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04c11db7 if crc >> 31 else 0)) & 0xffffffff
    page[22:26] = struct.pack("<I", crc)
    return ogg[:at] + page + ogg[end:]


def spoilt_lengths():
    """{name: (bytes of a file whose header does not tell its length, seconds of music in it)}."""
    loud = np.random.default_rng(0).normal(size=(44100, 2)) * 0.2
    quiet = notes(4)
    small = encoded(loud, format="MP3", bitrate_mode="CONSTANT", compression_level=0.0)
    large = encoded(quiet, format="MP3", bitrate_mode="CONSTANT", compression_level=0.9)
    tag = b"ID3\x03\0\0\0\0\x02\0" + b"\xff" * 256
    vbr = encoded(np.concatenate([loud, quiet]), format="MP3", bitrate_mode="VARIABLE", compression_level=0.0)
    wav, flac, ogg = encoded(quiet, format="WAV"), encoded(quiet, format="FLAC"), encoded(quiet, format="OGG")
    at = wav.index(b"data") + 4
    return {
        "joined.mp3": (small + large, 5), "joined with a tag.mp3": (small + tag + large, 5),
        "stream.mp3": (without_first_frame(vbr), 5), "three.mp3": (tag + small + small + large, 6),
        "joined.ogg": (ogg + ogg, 8), "joined.flac": (flac + flac, 8),
        "left behind.wav": (wav[:at] + struct.pack("<I", 4410) + wav[at + 4:], 4),
        "never written.wav": (wav[:at] + bytes(4) + wav[at + 4:], 4),
        "unknown.wav": (wav[:at] + b"\xff" * 4 + wav[at + 4:], 4),
        "late.opus": (late_page(encoded(notes(8, 48000), 48000, format="OGG", subtype="OPUS"), 488), 8),
        "cut.flac": (flac[:len(flac) // 2], None), "joined.wav": (wav + wav, None)}


def test_files_are_read_whole_or_named(tmp_path, monkeypatch):
    """What their first header says of their length, players do not believe either. Without ffmpeg they are
    named."""
    for name, (content, seconds) in spoilt_lengths().items():
        (tmp_path / name).write_bytes(content)
        if seconds and (shutil.which("ffmpeg") or name == "unknown.wav"):
            assert abs(seconds_heard(tmp_path / name) - seconds) < 0.3, name
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "which", lambda program: None)
            if name != "unknown.wav":
                with pytest.raises(UserError, match=f"{name}: not readable as audio .*ffmpeg"):
                    heard(tmp_path / name)
        if seconds is None:
            with pytest.raises(UserError, match="damaged, 4.0 of 8.0 s|damaged, 2.0 of 4.0 s|lost sync"):
                heard(tmp_path / name)


@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100, 48000])
def test_counting_mp3_frames(tmp_path, rate):
    for options in {}, {"bitrate_mode": "VARIABLE"}, {"compression_level": 0.9}:
        (tmp_path / "a.mp3").write_bytes(encoded(notes(3, rate), rate, format="MP3", **options))
        length = recordings.length_by_counting(tmp_path / "a.mp3")
        assert -0.3 < length.seconds - 3 < 0.1 and not length.promised
    cut = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(cut[:len(cut) // 3])
    assert recordings.length_by_counting(tmp_path / "a.mp3").promised > 2.9


def test_a_file_cut_short_is_named(tmp_path, capsys):
    for kind in "WAV", "MP3":
        whole = encoded(notes(3), format=kind)
        (tmp_path / kind).write_bytes(whole[:len(whole) // 2])
        assert 1 < seconds_heard(tmp_path / kind) < 2
        assert re.search(f"{kind}: cut short, 1.. s of the 3.. s", capsys.readouterr().err)
    heard(save_wav(tmp_path / "whole.wav"))
    assert capsys.readouterr().err == ""


@needs_ffmpeg
@pytest.mark.parametrize("name, content, reason", (
    ("a.ogg", b"OggS" * 1_000_000, "no audio for 1 s"),        # it would look for 17 s
    ("a.mp3", b"\xff\xfb\x90\x00" + b"FORM\0\0\0\x04AIFF" * 400_000, "bad or corrupted frame|no audio"),
    ("b.mp3", b"\xff\xf3\x10\x00" * 2_000_000, "no audio for 1 s")))
def test_nobody_looks_for_sound_for_ever(name, content, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(recordings, "PATIENCE", 1)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"ffmpeg: .*({reason})"):
        recordings.way_in(tmp_path / name)


@needs_ffmpeg
def test_what_libsndfile_cannot_read_goes_through_ffmpeg(tmp_path):
    wav = encoded(notes(2), format="WAV")
    for name, *options in (["a.m4a"], ["a.webm"], ["a.aac"], ["a.wma"], ["alac.m4a", "-c:a", "alac"],
                           ["a.wv"]):
        ffmpeg("-i", "pipe:0", *options, tmp_path / name, data=wav)
        assert library.audio_files(tmp_path) == [tmp_path / name]
        audio = heard(tmp_path / name)
        assert audio.shape[0] == 2 and abs(audio.shape[1] - 88200) < 4000
        assert (audio.square().mean() / torch.from_numpy(notes(2)).square().mean() - 1).abs() < 0.1
        (tmp_path / name).unlink()
    (tmp_path / "pipe.flac").write_bytes(ffmpeg("-i", "pipe:0", "-f", "flac", "pipe:1", data=wav))
    assert (heard(tmp_path / "pipe.flac") - torch.from_numpy(notes(2).T)).abs().max() < 1e-4
    mono = encoded(notes(2, channels=1), format="WAV")          # at its own level, and not 3 dB quieter
    ffmpeg("-i", "pipe:0", "-c:a", "alac", tmp_path / "mono.m4a", data=mono)
    assert heard(tmp_path / "mono.m4a").abs().max() == pytest.approx(np.abs(notes(2, channels=1)).max(),
                                                                     abs=1e-3)
    ffmpeg("-i", "pipe:0", "-movflags", "faststart", tmp_path / "cut.m4a", data=wav)
    whole = (tmp_path / "cut.m4a").read_bytes()
    (tmp_path / "cut.m4a").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.m4a").write_text("no music")
    for name in "cut.m4a", "text.m4a":
        with pytest.raises(UserError, match=f"{name}: not readable as audio .*ffmpeg: "):
            heard(tmp_path / name)


def sides_heard(path, channels, config=SMALL_AE, **options):
    """Loudness (rms) of left and right for a tone in each single channel of a file."""
    tone = 0.2 * np.sin(np.arange(22050) * 0.1)
    found = []
    for channel in range(channels):
        samples = np.zeros((22050, channels))
        samples[:, channel] = tone
        soundfile.write(path, samples, 44100, **options)
        audio = heard(path, config)[:, 4000:18000]
        found.append(audio.square().mean(dim=1).sqrt() / 0.1414)
    return torch.stack(found)


@pytest.mark.parametrize("channels, wav, ogg", [
    (3, "L R C", "L C R"), (4, "L R l r", "L R l r"), (5, "L R C l r", "L C R l r"),
    (6, "L R C - l r", "L C R l r -"), (7, "L R C - B l r", "L C R l r B -"),
    (8, "L R C - l r l r", "L C R l r l r -")])
def test_surround_is_mixed_by_its_layout(tmp_path, channels, wav, ogg):
    """L R C: front; l r: behind or beside; B: behind in the middle; -: low frequencies, which are left
    out."""
    weights = {"L": (1, 0), "R": (0, 1), "C": (0.7071, 0.7071), "l": (0.7071, 0), "r": (0, 0.7071),
               "B": (0.5, 0.5), "-": (0, 0)}
    for kind, order in (("WAV", wav), ("FLAC", wav), ("OGG", ogg)):
        truth = torch.tensor([weights[place] for place in order.split()])
        truth = truth / truth.sum(dim=0).max()                  # full scale everywhere stays full scale
        assert (sides_heard(tmp_path / "a", channels, format=kind) - truth).abs().max() < 0.02, kind


def test_a_layout_that_the_file_tells_is_believed(tmp_path, monkeypatch):
    """The mask of a WAV: front, front, centre, behind in the middle."""
    soundfile.write(tmp_path / "a.wav", np.eye(4).repeat(11025, axis=0) * 0.5, 44100, format="WAVEX")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    struct.pack_into("<I", content, content.index(b"fmt ") + 28, 0x107)
    (tmp_path / "a.wav").write_bytes(content)
    audio = heard(tmp_path / "a.wav")
    truth = torch.tensor([[1, 0], [0, 1], [0.7071, 0.7071], [0.5, 0.5]]).T / 2.2071 / 2
    assert (audio[:, 5000::11025] - truth).abs().max() < 1e-3
    if shutil.which("ffmpeg"):                                  # which tells the layout too
        monkeypatch.setattr(recordings, "through_sndfile",
                            lambda file: (_ for _ in ()).throw(recordings.CannotRead("no")))
        assert (heard(tmp_path / "a.wav") - audio).abs().max() < 1e-4


def test_a_model_of_one_channel_hears_both_sides(tmp_path):
    mono = replace(SMALL_AE, audio_channels=1)
    assert torch.allclose(sides_heard(tmp_path / "a.wav", 2, mono), torch.tensor([[0.5], [0.5]]), atol=0.01)
    assert torch.allclose(sides_heard(tmp_path / "a.wav", 1, mono), torch.tensor([[1.0]]), atol=0.01)
    assert sides_heard(tmp_path / "a.wav", 12).min() > 0.05     # of so many channels none is lost


def test_a_level_far_above_full_scale_is_named(tmp_path, capsys):
    x = notes(1)
    for factor in 32768, 30:    # samples of 16 bits never divided; a wrong gain
        soundfile.write(tmp_path / "a.wav", x * factor, 44100, subtype="FLOAT")
        assert (heard(tmp_path / "a.wav") - torch.from_numpy(x.T / np.abs(x).max())).abs().max() < 1e-5
        err = capsys.readouterr().err
        assert f"a.wav: its samples reach {np.abs(x).max() * factor:.4g} times full scale" in err
    # mixes in float may
    soundfile.write(tmp_path / "a.wav", x / np.abs(x).max() * 1.5, 44100, subtype="FLOAT")
    assert heard(tmp_path / "a.wav").abs().max() == pytest.approx(1.5) and capsys.readouterr().err == ""
    x[7000] = 1e6
    soundfile.write(tmp_path / "a.wav", x, 44100, subtype="FLOAT")
    with pytest.raises(UserError, match="a sample of 1e.06 times full scale among quiet ones"):
        heard(tmp_path / "a.wav")


# -------------------------------------------------------- library.py, data.py: files, prompts, latents, crops
def test_latents_on_disk(encoder, tmp_path):
    save_wav(tmp_path / "music/album/a.wav", 1.2)
    save_wav(tmp_path / "music/b.wav", 0.6, rate=22050, channels=1, seed=1)
    d = data.prepare(tmp_path / "music", encoder, tmp_path / "latents")
    assert [t.name for t in d.tracks] == ["album/a.wav", "b.wav"] and len(d.train) == len(d.validation) == 1
    for track in d.tracks:
        assert track.latents.dtype == np.float16 and track.latents.shape == (track.frames, 8)
        whole = audio_io.encode_file(encoder, tmp_path / "music" / track.name)
        assert np.abs(track.latents - whole.T.numpy()).max() < 5e-3
    assert d.latent_std == pytest.approx(np.concatenate([t.latents for t in d.tracks]).astype(float).std(),
                                         rel=1e-3)
    assert d.hours == pytest.approx(1.8 / 3600, rel=0.01)
    assert json.loads((tmp_path / "latents/index.json").read_text())["b.wav"]["frames"] == d.tracks[1].frames


def test_resume_and_redo(encoder, tmp_path, monkeypatch):
    made = []
    real = recordings.read_audio
    monkeypatch.setattr(data, "read_audio", lambda file, config: made.append(file.name) or real(file, config))

    def run(m=encoder):
        made.clear()
        d = data.prepare(tmp_path / "music", m, tmp_path / "latents", quiet=True)
        return sorted(made), {t.name: np.array(t.latents) for t in d.tracks}

    for i, name in enumerate("abc"):
        save_wav(tmp_path / f"music/{name}.wav", 0.7, seed=i)
    names, first = run()
    assert names == ["a.wav", "b.wav", "c.wav"]
    names, again = run()
    assert names == [] and all(np.array_equal(first[n], again[n]) for n in first)
    os.utime(tmp_path / "music/b.wav", (1, 1))                                      # same size, other time
    assert run()[0] == ["b.wav"]
    save_wav(tmp_path / "music/a.wav", 0.8, seed=9)
    names, changed = run()
    assert names == ["a.wav"] and len(changed["a.wav"]) > len(first["a.wav"])
    next((tmp_path / "latents").glob("c_wav-*.npy")).write_bytes(b"half")           # damaged
    assert run()[0] == ["c.wav"]
    other = LMDM(SMALL_AE).eval()                                                       # another autoencoder
    names, redone = run(other)
    assert names == ["a.wav", "b.wav", "c.wav"] and not np.array_equal(redone["b.wav"], first["b.wav"])
    assert run()[0] == []  # and the first one's are still there


def test_stopped_while_encoding_goes_on_with_the_rest(encoder, tmp_path, monkeypatch):
    for i, name in enumerate("abc"):
        save_wav(tmp_path / f"music/{name}.wav", 0.7, seed=i)
    real, made = recordings.read_audio, []

    def read(file, config):
        made.append(file.name)
        yield from real(file, config)
        if made == ["a.wav", "b.wav"]:
            raise KeyboardInterrupt
    monkeypatch.setattr(data, "read_audio", read)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(tmp_path / "music", encoder, tmp_path / "latents", quiet=True)
    assert not list((tmp_path / "latents").glob("b*")) and not list((tmp_path / "latents").glob("*.part"))
    data.prepare(tmp_path / "music", encoder, tmp_path / "latents", quiet=True)
    assert made == ["a.wav", "b.wav", "b.wav", "c.wav"]


def test_a_broken_write_leaves_the_old_file(tmp_path):
    common.write_whole(tmp_path / "a", lambda f: f.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        common.write_whole(tmp_path / "a", lambda f: f.write(b"new") / 0)
    assert [f.name for f in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_short_clip_is_filled_with_silence(encoder, tmp_path):
    config = Config(**{**SMALL_AE.to_dict(), "block": 800})                             # 1.16 s
    wide = LMDM(config).eval()
    wide.load_state_dict(encoder.state_dict())
    save_wav(tmp_path / "music/a.wav", 0.7)
    for m, frames in ((wide, 800), (encoder, 30870 // 64), (wide, 800)):  # each block's length finds its own
        track, = data.prepare(tmp_path / "music", m, tmp_path / "latents", quiet=True).tracks
        assert track.frames == frames
    x = torch.zeros(1, 2, 800 * 64)
    x[0, :, :30870] = torch.from_numpy(soundfile.read(tmp_path / "music/a.wav", dtype="float32")[0].T)
    with torch.no_grad():
        assert np.abs(track.latents.T - encoder.autoencoder.encode(x)[0].numpy()).max() < 5e-3


def test_bad_files_are_named_and_skipped(encoder, tmp_path, capsys):
    save_wav(tmp_path / "good.wav", 0.7)
    save_wav(tmp_path / "good too.wav", 0.7)
    save_wav(tmp_path / "blip.wav", 0.2)
    (tmp_path / "good.txt").write_text("a caption, not a stray")
    (tmp_path / "cover.jpg").write_bytes(b"picture")
    (tmp_path / "empty.flac").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("buy strings")
    (tmp_path / "text.wav").write_text("not audio at all")
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(9000))
    (tmp_path / "noise.au").write_bytes(bytes(9000))
    soundfile.write(tmp_path / "nan.wav", np.full((44100, 2), np.nan), 44100, subtype="FLOAT")
    soundfile.write(tmp_path / "cut.flac", notes(3), 44100)
    whole = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[:len(whole) // 3] + b"x" * 20000)
    soundfile.write(tmp_path / "hole.ogg", np.random.default_rng(0).normal(0, 0.1, (200000, 2)), 44100)
    whole = (tmp_path / "hole.ogg").read_bytes()
    (tmp_path / "hole.ogg").write_bytes(whole[:20000] + bytes(30000) + whole[50000:])
    (tmp_path / "dead.wav").symlink_to(tmp_path / "gone.wav")
    (tmp_path / ".hidden").mkdir()
    save_wav(tmp_path / ".hidden/a.wav")
    d = data.prepare(tmp_path, encoder, tmp_path / "latents")
    bad = dict(d.skipped)
    assert set(bad) == {"blip.wav", "empty.flac", "notes.txt", "text.wav", "noise.mp3", "noise.au", "nan.wav",
                        "cut.flac", "hole.ogg", "dead.wav"}
    assert "0.20 s" in bad["blip.wav"]
    assert all("damaged" in bad[name] for name in ("hole.ogg", "noise.mp3", "noise.au"))
    assert "empty" in bad["empty.flac"] and "not numbers" in bad["nan.wav"]
    assert [t.name for t in d.tracks] == ["good too.wav", "good.wav"]
    told = capsys.readouterr().err
    assert all(f"{name}: {reason}" in told for name, reason in d.skipped)
    assert "2 tracks" in told and "10 files skipped" in told
    # nor are the latents in the folder strays
    d = data.prepare(tmp_path, encoder, tmp_path / "latents", quiet=True)
    assert dict(d.skipped) == bad and capsys.readouterr().err == ""


def test_strange_file_names(encoder, tmp_path):
    """A name that is no UTF-8 is skipped; one so long that none beside it could be longer has no caption."""
    long = "x" * 251 + ".wav"
    save_wav(tmp_path / long, 0.7)
    shutil.copy(os.fsencode(tmp_path / long), os.fsencode(tmp_path) + b"/caf\xe9.wav")
    d = data.prepare(tmp_path, encoder, tmp_path / "latents", quiet=True)
    assert [t.name for t in d.tracks] == [long] and [os.fsencode(name) for name,
                                                     _ in d.skipped] == [b"caf\xe9.wav"]


def test_a_full_disk_is_not_the_tracks_fault(encoder, tmp_path, monkeypatch):
    save_wav(tmp_path / "a.wav")
    full = lambda file, array: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    monkeypatch.setattr(data.np, "save", full)
    with pytest.raises(UserError, match="No space left"):
        data.prepare(tmp_path, encoder, tmp_path / "latents", quiet=True)
    assert not list((tmp_path / "latents").iterdir())


def test_folders_without_audio(encoder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.wav").write_text("no")
    for name, message in (("missing", "no such folder"), ("empty", "is empty"), ("bad", "a.wav"),
                          ("bad/a.wav", "not a folder")):
        with pytest.raises(UserError, match=message) as error:
            data.prepare(tmp_path / name, encoder, tmp_path / "latents", quiet=True)
        assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_own_outputs_are_no_music(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_wav(tmp_path / "a.wav")
    save_wav(tmp_path / "out/samples/b.wav")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert library.audio_files(".") == [data.Path("a.wav")]
    assert len(library.audio_files("out")) == 1


def prompt_of(file, folder, metadata):
    return library.find_prompt(file, folder, metadata, [])[0]


def test_prompts_in_order_of_preference(tmp_path):
    folder = tmp_path / "My_Jazz"
    file = folder / "disc_one" / "03 - night_drive.flac"
    save_wav(file)
    prompt = lambda: prompt_of(file, folder, library.read_metadata(folder))
    assert prompt() == "night drive, disc one"
    with soundfile.SoundFile(file, "w", 44100, 2) as f:
        f.title, f.genre = "01 Night Ride", "(8)Jazz"
        f.write(notes(1))
    assert prompt() == "Night Ride, Jazz"
    for genre, named in (("80s Pop", ", 80s Pop"), ("17", ""), ("(4)(9)Disco", ", Disco"),
                         ("8-bit", ", 8-bit")):
        with soundfile.SoundFile(file, "w", 44100, 2) as f:
            f.title, f.genre = "Night Ride", genre
            f.write(notes(1))
        assert prompt() == "Night Ride" + named
    file.with_suffix(".txt").write_text("slow piano\n at night\n")
    assert prompt() == "slow piano at night"
    (folder / "metadata.csv").write_text('file_name,text\ndisc_one/03 - night_drive.flac,"piano, slow"\n')
    assert prompt() == "piano, slow"
    (folder / "disc_one/metadata.jsonl").write_text(
        '{"file_name": "03 - night_drive.flac", "text": "nearer file"}\n\n')
    assert prompt() == "nearer file"
    assert prompt_of(save_wav(folder / "07.wav"), folder, {}) == "07, My Jazz"
    for kind, bad in [("jsonl", "{"), ("jsonl", '{"text": "x"}'), ("jsonl", '["a"]'),
                      ("csv", "file_name,caption\na.wav,soft\n"), ("csv", "file_name, text\na.wav,soft\n"),
                      ("csv", "file_name,text\na.wav,soft, slow\n"),
                      ("csv", "name,text\na.wav,soft, slow\n")]:
        (folder / f"metadata.{kind}").write_text(bad)
        with pytest.raises(UserError, match=f"metadata.{kind}"):
            library.read_metadata(folder)
        (folder / f"metadata.{kind}").unlink()


def test_clean_names():
    names = {"01 Title": "Title", "1-07 Title": "Title", "12. Title": "Title",
             "000_chorale_piano": "chorale piano", "808 State": "808 State", "1999": "1999", "07": "07",
             "2nd movement": "2nd movement", "a__b": "a b", "10 Song": "Song", "3 - Song": "Song",
             "90_bpm_house": "90 bpm house", "90-BPM": "90-BPM", "8-bit": "8-bit", "2-Step": "2-Step",
             "1.5 Hours": "1.5 Hours"}
    assert {name: library.clean(name) for name in names} == names


def test_split():
    names = [f"{i:03d}.flac" for i in range(240)]
    train, validation = library.split(names)
    assert len(validation) == 15 and sorted(train + validation) == names and train == sorted(train)
    assert library.split(names[::-1]) == (train, validation)
    assert validation[:3] == ["001.flac", "025.flac", "054.flac"]
    assert len(library.split(names[:3])[1]) == 1
    assert library.split(["train/a.wav", "validation/b.wav", "c.wav"]) == (["c.wav", "train/a.wav"],
                                                                        ["validation/b.wav"])
    assert len(library.split(["validation/a.wav", "validation/b.wav"])[0]) == 1    # nothing else to train on


def fake_tracks(tmp_path, lengths, channels=3):
    tracks = []
    for i, n in enumerate(lengths):
        np.save(tmp_path / f"{i}.npy",
                (100 * (i + 1) + np.arange(n)[:, None] + np.zeros(channels)).astype(np.float16))
        tracks.append(data.Track(f"{i}", f"prompt {i}", tmp_path / f"{i}.npy", 0, n))
    return tracks


def test_single_track_gives_its_last_tenth(tmp_path):
    track, = fake_tracks(tmp_path, [100])
    (train,), (validation,) = data.divide([track], 4)
    assert train.latents[:, 0].tolist() + validation.latents[:, 0].tolist() == track.latents[:, 0].tolist()
    assert validation.frames == 10 and data.divide([track], 20)[1][0].frames == 20
    assert data.divide([track], 60) == ([track], [track])


def test_crops(tmp_path):
    tracks = fake_tracks(tmp_path, [90, 11, 30])    # 11 frames: two blocks of 4, the first 3 frames dropped
    latents, prompts, missing, _ = data.crops_at(tracks, 5, 4, np.random.default_rng(1).random(2000))
    assert latents.shape == (2000, 3, 20) and latents.dtype == torch.float32 and missing.dtype == torch.long
    again = data.crops_at(tracks, 5, 4, np.random.default_rng(1).random(2000))
    assert torch.equal(again[0], latents) and again[1] == prompts and torch.equal(again[2], missing)
    assert not torch.equal(data.crops_at(tracks, 5, 4, np.random.default_rng(2).random(2000))[0], latents)
    which = torch.tensor([int(p[-1]) for p in prompts])
    for i, frames in enumerate((90, 11, 30)):
        assert abs((which == i).float().mean() - frames / 131) < 0.04
    for x, i, m in zip(latents[:200], which, missing):
        if i == 1:
            assert m == 3 and (x[:, :12] == 0).all() and x[0, 12:].tolist() == list(range(203, 211))
        else:
            assert m == 0 and (x[:, 1:] - x[:, :-1] == 1).all() and x[0, 0] >= 100 * (i + 1)
    starts = latents[which == 0][:, 0, 0] - 100
    assert set(starts.tolist()) == set(range(71))    # not aligned to blocks, first and last possible included


def test_fixed_crops(tmp_path):
    tracks = fake_tracks(tmp_path, [90, 30])
    latents, prompts, missing, _ = data.fixed_crops(tracks, 5, 4, 8)
    assert prompts == ["prompt 0"] * 6 + ["prompt 1"] * 2 and not missing.any()
    assert torch.equal(latents, data.fixed_crops(tracks, 5, 4, 8)[0])
    starts = latents[:6, 0, 0]
    assert ((starts[1:] - starts[:-1] - 71 / 6).abs() < 2).all()


def told_by_prepare(folder, model, capsys):
    """-> the Dataset and what was said, of which the count of files is checked."""
    capsys.readouterr()
    dataset = data.prepare(folder, model, folder.parent / "latents")
    told = capsys.readouterr().err
    count = re.search(r"(\d+) files found: (\d+) used, (\d+) skipped, (\d+) ignored", told)
    found, used, skipped, ignored = map(int, count.groups())
    assert found == used + skipped + ignored
    assert used == len(dataset.tracks) and skipped == len(dataset.skipped)
    return dataset, told, found


def test_names_that_begin_with_dots(encoder, tmp_path, capsys):
    folder = tmp_path / "music"
    for name in ("...And Justice for All/01 Blackened.wav", "...Baby One More Time.wav", ".5.wav",
                 "..wav.wav", "Other/x.wav", ".git/sound.wav", ".Trash/old/b.wav"):
        save_wav(folder / name, 0.6)
    (folder / "...Baby One More Time.txt").write_text("pop")
    for name in "Other/._x.wav", ".DS_Store", "._cover.jpg", ".gitignore", "cover.jpg", ".git/config":
        (folder / name).write_bytes(b"\0\5\26\7")
    dataset, told, found = told_by_prepare(folder, encoder, capsys)
    assert [t.name for t in dataset.tracks] == ["...And Justice for All/01 Blackened.wav",
                                                "...Baby One More Time.wav", "..wav.wav", ".5.wav",
                                                "Other/x.wav"]
    assert dataset.tracks[1].prompt == "pop" and not dataset.skipped and found == 14
    assert "hidden folder .Trash: 1 audio files in it are ignored" in told and "._x" not in told


def test_a_recording_reached_twice_is_taken_once(encoder, tmp_path, capsys):
    folder = tmp_path / "music"
    for i in range(3):
        save_wav(folder / f"z album/{i}.wav", 0.6, seed=i)
    save_wav(tmp_path / "elsewhere/far.wav", 0.6, seed=7)
    for name, target in (("best", "z album"), ("away", tmp_path / "elsewhere"),
                         ("away too", tmp_path / "elsewhere"), ("loop", "."), ("a.wav", "z album/0.wav"),
                         ("gone.wav", "nothing"), ("self.wav", "self.wav")):
        (folder / name).symlink_to(target)
    os.link(folder / "z album/1.wav", folder / "b.wav")
    dataset, told, found = told_by_prepare(folder, encoder, capsys)
    assert [t.name for t in dataset.tracks] == ["away/far.wav", "b.wav", "z album/0.wav", "z album/2.wav"]
    assert dict(dataset.skipped)["a.wav"] == "the same file as z album/0.wav" and found == 8
    assert dict(dataset.skipped)["z album/1.wav"] == "the same file as b.wav"
    for link, place in ("best", "z album"), ("away too", "away"), ("loop", "."):
        assert f"folder {link} is the same as {place}" in told


def test_a_folder_that_cannot_be_listed_is_named(encoder, tmp_path, capsys, monkeypatch):
    save_wav(tmp_path / "music/a.wav", 0.6)
    save_wav(tmp_path / "music/secret/b.wav", 0.6)
    real = os.listdir
    def listdir(place):
        if Path(place).name in closed:
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)
    monkeypatch.setattr(os, "listdir", listdir)
    closed = {"secret"}
    dataset, told, found = told_by_prepare(tmp_path / "music", encoder, capsys)
    assert len(dataset.tracks) == found == 1 and "folder secret cannot be listed (Permission denied)" in told
    closed = {"music"}
    with pytest.raises(UserError, match="music: cannot be listed"):
        library.audio_files(tmp_path / "music")


def test_held_out_folders_and_lengths(encoder, tmp_path, capsys):
    for name in "validation", "valid", "Val", "dev", "TEST", "eval":
        assert library.split(["a.wav", f"x/{name}/b.wav", "c.wav"]) == (["a.wav", "c.wav"],
                                                                        [f"x/{name}/b.wav"])
    assert "eval.wav" in library.split(["eval.wav", "test/b.wav"])[0]     # a file's name says nothing
    folder = tmp_path / "music"
    for name in "train/a.wav", "dev/b.wav", "test/c.wav":
        save_wav(folder / name, 0.6)
    dataset, told, _ = told_by_prepare(folder, encoder, capsys)
    assert [t.name for t in dataset.train] == ["train/a.wav"]
    assert "by the name of their folder: dev, test" in told
    for names in ("ab", "abcdef"):    # whichever is the only long one, it is trained on
        for long in names:
            tracks = [data.Track(name, "", None, 0, 9000 if name == long else 30) for name in names]
            train, validation = data.divide(tracks, 4)
            assert long in [t.name for t in train]
            assert validation and len(train) + len(validation) == len(names)
    same = [data.Track(f"{i:03d}.flac", "", None, 0, 100) for i in range(240)]
    assert [t.name for t in data.divide(same, 4)[1]] == library.split([t.name for t in same])[1]


TEXT = "slow café chorale"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32",
                                      "cp1252"])
def test_captions_in_any_encoding(tmp_path, encoding):
    save_wav(tmp_path / "a.wav")
    notes_ = []
    (tmp_path / "a.txt").write_bytes(f"{TEXT}\r\n".encode(encoding))
    assert library.find_prompt(tmp_path / "a.wav", tmp_path, {}, notes_) == (TEXT, "captions")
    (tmp_path / "metadata.csv").write_bytes(f'file_name;text\r\na.wav;"{TEXT}"\r\n'.encode(encoding))
    assert library.read_metadata(tmp_path, notes_)["a.wav"] == TEXT
    assert [("cp1252" in note) for note in notes_] == [True] * 2 * (encoding == "cp1252")
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "a.json").write_bytes(json.dumps({"Caption": TEXT}, ensure_ascii=False).encode(encoding))
    (tmp_path / "a.txt").unlink()
    assert prompt_of(tmp_path / "a.wav", tmp_path, {}) == TEXT


def test_a_name_of_the_split_is_no_word(tmp_path):
    """A track without words is called by its file and folder, but not "test" where others are "train"."""
    for folder, prompt in (("Night", "drive, Night"), ("test", "drive"), ("Train", "drive")):
        (tmp_path / folder).mkdir()
        save_wav(tmp_path / folder / "03 - drive.wav")
        assert prompt_of(tmp_path / folder / "03 - drive.wav", tmp_path, {}) == prompt


def test_help_tells_defaults():
    text = " ".join(finetune.parser().format_help().split())
    for told in ("--batch BATCH crops per step, over all processes and accumulations (default: 16)",
                 "blocks of context (default: the checkpoint's) --blocks",
                 "steps of linear warm-up (default: 0)", "unless given again --causal"):
        assert told in text, told


def test_captions_that_are_no_text_are_named(tmp_path):
    save_wav(tmp_path / "a.wav")
    for content in ("медленное пианино".encode("cp1251"), "静かなピアノ".encode("shift_jis"), b"slow\0piano",
                    bytes(40), b"\x81\x8d"):
        notes_ = []
        (tmp_path / "a.txt").write_bytes(content)
        assert library.find_prompt(tmp_path / "a.wav", tmp_path, {}, notes_)[1] == "names"
        assert "a.txt is not used" in notes_[0]
        (tmp_path / "metadata.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="metadata.jsonl: cannot be read"):
            library.read_metadata(tmp_path)
        (tmp_path / "metadata.jsonl").unlink()


def test_values_of_metadata(tmp_path):
    save_wav(tmp_path / "a.wav")
    def prompt(value):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "./a.wav", "text": value}))
        return library.read_metadata(tmp_path)["a.wav"]
    for value, text in ((["jazz", "piano", 120], "jazz, piano, 120"), (120, "120"), (92.5, "92.5"),
                        (120.0, "120"), (None, ""), (["jazz", None, "", ["slow"]], "jazz, slow"),
                        (" a\n b\t", "a b"), ("\ud83d piano\0", "piano"), (math.nan, ""),
                        (10 ** 400, f"1{400 * '0'}")):
        assert prompt(value) == text
    for value in {"genre": "jazz"}, True:
        with pytest.raises(UserError, match="neither text, a number nor a list"):
            prompt(value)
    (tmp_path / "metadata.jsonl").unlink()
    for content in ([{"file_name": "a.wav", "text": ["x", "y"]}], {"a.wav": "x, y"},
                    {"a.wav": {"text": "x, y", "bpm": 1}}):
        (tmp_path / "metadata.json").write_text(json.dumps(content))
        assert library.read_metadata(tmp_path)["a.wav"] == "x, y"
    notes_ = []
    (tmp_path / "metadata.json").write_text('{"album": {"year": 1}}')   # another program's
    assert library.read_metadata(tmp_path, notes_) == {} and "metadata.json is not used" in notes_[0]


def test_json_beside_a_track(tmp_path):
    file = save_wav(tmp_path / "a.wav")
    for content, prompt in (({"caption": "x", "title": "no"}, "x"), ({"text": ["x", "y"]}, "x, y"),
                            ({"Prompt": "x"}, "x"), ({"caption": "", "description": "x"}, "x"),
                            ({"tags": ["x", "y"], "bpm": 90, "sample_rate": 1}, "x, y, 90"),
                            ({"genre": "x", "moods": [], "key": "C#"}, "x, C#"), ("x", "x"),
                            (["x", "y"], "x, y")):
        for name in "a.json", "a.wav.json":
            (tmp_path / name).write_text(json.dumps(content))
            assert prompt_of(file, tmp_path, {}) == prompt
            (tmp_path / name).unlink()
    for content in "{", "[" * 100000, '{"caption": {"en": "x"}}':
        notes_ = []
        (tmp_path / "a.json").write_text(content)
        assert library.find_prompt(file, tmp_path, {}, notes_)[1] == "names"
        assert "a.json is not used" in notes_[0]


def test_names_in_other_unicode_forms(tmp_path):
    """A Mac writes é as two characters, most editors as one."""
    one, two = "caf\u00e9", "cafe\u0301"
    for on_disk, written in ((one, two), (two, one)):
        folder = tmp_path / on_disk
        save_wav(folder / f"{on_disk}/{on_disk}.wav")
        (folder / "metadata.csv").write_text(f"file_name,text\n{written}/{written}.wav,from a row\n")
        metadata = library.read_metadata(folder)
        assert prompt_of(folder / f"{on_disk}/{on_disk}.wav", folder, metadata) == "from a row"
        save_wav(folder / f"{on_disk} 2.wav")
        (folder / f"{written} 2.txt").write_text("from a caption")
        assert prompt_of(folder / f"{on_disk} 2.wav", folder, metadata) == "from a caption"
        assert not library.find_files(folder).refused


def test_where_prompts_came_from(encoder, tmp_path, capsys):
    folder = tmp_path / "music"
    for name in "abcdef":
        save_wav(folder / f"{name}.wav", 0.6)
    with soundfile.SoundFile(folder / "c.wav", "w", 44100, 2) as f:
        f.title = "Night Ride"
        f.write(notes(0.6))
    (folder / "a.txt").write_text("one two three four five")
    dataset, told, _ = told_by_prepare(folder, encoder, capsys)
    assert "prompts: 0 from metadata, 1 from captions, 1 from tags, 4 from names\n" in told
    assert "1 prompts are longer than the 4 words that the model reads, that of a.wav for one" in told
    (folder / "metadata.csv").write_text("file_name,text\na.wav,x\nb.wav,y\nf.wav,\nz.wav,z\n")
    dataset, told, _ = told_by_prepare(folder, encoder, capsys)
    assert ("prompts: 2 from metadata, 0 from captions, 1 from tags, 3 from names; 4 tracks have no text"
            in told)
    assert "in the metadata, d.wav for one" in told
    assert "metadata names 1 files that are not there, z.wav" in told
    for name in "abcdef":
        (folder / f"{name}.txt").write_text(f"{name}{name} {name}x {name}y {name}z")
    assert "18 different words for the 16 rows" in told_by_prepare(folder, encoder, capsys)[1]


def test_tags_in_other_encodings(tmp_path):
    """A WAV's title as Windows writes it; a telephone's recording."""
    title = "Café  Night".encode("cp1252") + b"\0"
    info = b"INFO" + b"INAM" + struct.pack("<I", len(title)) + title
    wav = encoded(notes(1), format="WAV") + b"LIST" + struct.pack("<I", len(info)) + info
    (tmp_path / "a.wav").write_bytes(wav[:4] + struct.pack("<I", len(wav) - 8) + wav[8:])
    notes_ = []
    assert library.find_prompt(tmp_path / "a.wav", tmp_path, {}, notes_) == ("Café Night", "tags")
    assert "title tag of a.wav is not UTF-8" in notes_[0]
    if shutil.which("ffmpeg"):
        ffmpeg("-i", tmp_path / "a.wav", "-metadata", "title=01 Café; x=1#", "-metadata", "genre=Jazz",
               tmp_path / "b.m4a")
        assert library.find_prompt(tmp_path / "b.m4a", tmp_path, {}, notes_) == ("Café; x=1#, Jazz", "tags")


def test_words_keep_their_signs():
    for prompt, words in (("C# major", "c# major"), ("F♯ minor", "f# minor"), ("A♭ Ab", "ab ab"),
                          ("R&B", "r&b"), ("B♭m7 Bb", "bbm7 bb"), ("F#m7b5", "f#m7b5"),
                          ("la♭ mineur", "la♭ mineur"), ("92.5 bpm in 6/8", "92.5 bpm in 6/8"),
                          ("C#/E♭-minor", "c# eb minor"), ("rock & roll", "rock roll"), ("#1 hit", "1 hit"),
                          ("cafe\u0301", "café"), ("हिन्दी गाना", "हिन्दी गाना"),
                          ("slow chorale in C major, 8-bit", "slow chorale in c major 8 bit")):
        assert words_of(prompt) == words.split()


def test_words_that_were_learned_share_no_row(tmp_path):
    model = tiny()                                              # 64 rows
    words = model.conditioner.words
    names = [f"word{i}" for i in range(40)]
    assert len({words.row_of(name) for name in names}) < 40     # by their hashes alone some would
    model.sampling["words"] = words.learn([" ".join(names[i:i + 6]) for i in range(0, 20, 6)])
    first = dict(words.known)
    common.save(model, tmp_path / "a.pt")
    loaded = common.load(tmp_path / "a.pt").conditioner.words
    assert loaded.known == first and [loaded.row_of(name) for name in first] == list(first.values())
    met = loaded.learn([" ".join(names[i:i + 6]) for i in range(20, 40, 6)])
    assert len(set(met.values())) == 40 and first.items() <= met.items()    # rows that were learned stay
    assert loaded.row_of("another") not in met.values()
    # checkpoints from before rows were kept: a list of words, whose rows are their hashes
    model.sampling["words"] = ["slow", "piano"]
    common.save(model, tmp_path / "old.pt")
    old = common.load(tmp_path / "old.pt").conditioner.words
    assert old.known == {"slow": 30, "piano": 45}
    # and when all are taken, they share
    assert len(set(old.learn([f"a{i}" for i in range(100)]).values())) == 64


# -------------------------------------------------------------------------------- sample.py
@pytest.mark.parametrize("objective", ["rectified_flow", "v"])
def test_dpmpp_follows_the_flow(objective):
    """Of Gaussian music of spread s the exact flow scales noise by s: DPM-Solver++ comes closer than
    Euler."""
    s, x = 0.6, torch.ones(1, 1, 1, dtype=torch.float64)

    def predict(x, t):
        alpha, sigma = alpha_sigma(t, objective)
        x0 = alpha * s * s / (alpha * alpha * s * s + sigma * sigma) * x
        return velocity(x0, (x - alpha * x0) / sigma, t, objective)
    error = {name: abs(sample.denoise_block(predict, x, schedule(16)[:-1].double(), name, objective,
                                            None).item() - s) for name in ("euler", "dpmpp")}
    assert error["dpmpp"] < 0.7 * error["euler"], error
    # cos(pi / 2), rounded, is below 0
    rounded = sample.denoise_block(predict, x.float(), schedule(16)[:-1], "dpmpp", objective, None)
    assert abs(rounded.item() - s) == pytest.approx(error["dpmpp"], abs=1e-4)


def test_each_item_may_have_its_own_seed():
    model = tiny()
    together = latents_of(model, condition(model), 4, seed=[7, 8], sampler="pingpong")
    for prompt, seed, made in zip(("slow piano", "fast"), (7, 8), together.split(1)):
        assert (made - latents_of(model, condition(model, prompt), 4, seed=seed,
                                  sampler="pingpong")).abs().max() < 1e-5


def test_cache_does_not_grow():
    model = tiny()
    context = sample.Context(model, model.dit.encode_prompt(condition(model)), torch.zeros(2, 8, 0))
    sizes = []
    for _ in range(8):
        context.predict(torch.randn(2, 8, 6), torch.tensor(0.5))
        context.append(torch.randn(2, 8, 6))
        sizes.append((context.kv[0][0].shape[2], context.finished.shape[-1] // 6))
    assert sizes[3:] == [(18, 3)] * 5


@pytest.mark.parametrize("causal,depth", [(False, 2), (True, 1)])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_prompt_changes_from_a_block_on(causal, depth, cfg):
    """Blocks before are those of the old prompt, blocks after those of a model that is told the new one:
    where finished blocks do not remember their prompt (encoder-decoder; a single layer) that is the uncached
    model, told the same."""
    model = tiny(causal=causal, depth=depth)
    old, new = condition(model, "slow piano"), condition(model, "fast")
    def changing():
        turns = iter([None, None, None, new, *[None] * 9])
        return dict(blocks=7, seed=3, cfg=cfg, change=lambda number: next(turns))
    made, kept = latents_of(model, old, **changing()), latents_of(model, old, 7, seed=3, cfg=cfg)
    uncached = latents_of(model, old, use_cache=False, **changing())
    at = 3 * TINY.block
    assert torch.equal(made[..., :at], kept[..., :at]) and (made - kept)[..., at:].abs().max() > 1e-3
    assert (made - uncached).abs().max() < 1e-4


def test_lines_of_a_terminal():
    """A terminal gives a line at a time and a pipe anything: all there is is read, and half a line waits for
    its end."""
    for ours, theirs in (pty.openpty()[::-1], os.pipe()):
        with open(ours) as file:
            lines = []
            typing = stage.Typing(file, lines.append)
            for typed, want in (("one\ntwo\n", ["one", "two"]), ("", []), ("fast arpeg", []),
                                ("gios\n \n", ["fast arpeggios"]), ("caf\u00e9\n", ["caf\u00e9"])):
                os.write(theirs, typed.encode())
                typing.poll()
                assert lines == want or os.isatty(ours) and typed and typed[-1:] != "\n"
                lines.clear()
            pipe = not os.isatty(ours)
            os.write(theirs, b"last" * pipe)                # without a newline
            os.close(theirs)
            typing.poll()
            typing.poll()                                   # the end of the file, a terminal that is gone
            assert lines == ["last"] * pipe and not typing.open


def test_a_line_that_takes_long_keeps_no_block_waiting():
    """While one thread takes a line another passes by, and of a flood each poll takes a part."""
    read, write = os.pipe()
    taking, done = threading.Event(), threading.Event()
    lines = []

    def take(line):
        lines.append(line)
        taking.set()
        assert done.wait(30)
    with open(read) as file:
        typing = stage.Typing(file, take)
        os.write(write, b"slow\n")
        thread = threading.Thread(target=typing.poll)
        thread.start()
        assert taking.wait(30)
        os.write(write, b"fast\n")
        typing.poll()
        assert lines == ["slow"]
        watcher = threading.Thread(target=typing.poll, kwargs=dict(wait=True))      # it does not spin
        watcher.start()
        watcher.join(0.2)
        assert watcher.is_alive()
        done.set()
        thread.join()
        watcher.join()
        assert lines == ["slow", "fast"]
        os.set_blocking(write, False)
        os.write(write, b"fast\n" * 13100)                 # 65,500 bytes
        typing.poll()
        assert lines.count("fast") == 13101 and typing.open
    os.close(write)


def test_live_prompts(tiny_file, tmp_path, monkeypatch, call):
    """--live: the last line typed is played from the next block on; one that cannot be is named and the music
    goes on."""
    def play(typed, *args):
        read, write = os.pipe()
        os.write(write, typed.encode())
        os.close(write)
        with open(read) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            status, err = call(sample.main, "--ckpt", tiny_file, "--seconds", 0.4, "--live", "--precision",
                               "float32", "--out", "live.wav", *args)
        return err if status else (err, soundfile.read(tmp_path / "live.wav", dtype="int16")[0])
    err, live = play("loud\nfast piano\n\n")
    model = sample.load(tiny_file)
    turns = iter([condition(model, "fast piano")])
    latents = latents_of(model, condition(model, "slow piano"), 100, change=lambda number: next(turns, None))
    whole = audio_io.pcm(model.autoencoder.decode(latents))[:17640]
    assert "next: 'fast piano'" in err and np.abs(live.astype(int) - whole).max() <= 1
    assert not np.array_equal(live, play("")[1])            # nothing typed: the checkpoint's own prompt
    torch.save({"prompts": ["fast"], "embeddings": torch.randn(1, 6, 16)}, tmp_path / "prompts.pt")
    err, there = play("slow\n", "--prompt-file", "prompts.pt")
    assert "no embedding of 'slow'" in err and np.array_equal(there,
                                                              play("", "--prompt-file", "prompts.pt")[1])
    assert "--live needs" in play("fast", "--no-cache")
    monkeypatch.setattr(sys, "stdin", None)
    assert "closed" in call(sample.main, "--ckpt", tiny_file, "--live", "--out", "live.wav")[1]
    assert sample.default_seconds(model, live=True) == math.inf
    assert sample.default_seconds(model, live=False) == 30


def test_words_never_learned_are_left_out(tiny_file, music, tmp_path, call):
    """finetune.py writes down the words of its prompts, the stages after it hand them on, sample.py plays no
    others."""
    for script_, *args in ((finetune, "--init", tiny_file, "--data", music, "--steps", 1, "--batch", 2,
                            "--sample-every", 0, "--validation-crops", 2),
                           (arc_forcing, "--d-warmup", 0, "--steps", 1, "--batch", 2, "--rollout", 1),
                           (nano, "pack", "--ckpt", "out/arc.pt"),
                           (finetune, "--init", "nano.pt", "--data", music, "--steps", 1, "--batch", 2,
                            "--sample-every", 0, "--validation-crops", 2)):
        status, err = call(script_.main, *args)
        assert status == 0, err
    words = {name: sample.load(tmp_path / name).sampling["words"]
             for name in ("out/arc.pt", "nano.pt", "out/finetune.pt")}
    assert words["nano.pt"] == words["out/arc.pt"] == words["out/finetune.pt"]
    assert "tone" in words["nano.pt"] and "dreamy" not in words["nano.pt"]
    played = []
    for prompt in "tone", "dreamy TONE, warm":
        status, err = call(sample.main, "--ckpt", "nano.pt", "--seconds", 0.1, "--prompt", prompt, "--out",
                           "a.wav")
        played.append((tmp_path / "a.wav").read_bytes())
        assert status == 0 and ("left out: dreamy, warm" in err) == (prompt != "tone")
    assert played[0] == played[1]
    status, err = call(sample.main, "--ckpt", "nano.pt", "--seconds", 0.1, "--prompt", "tone " * 8 + "dreamy",
                       "--out", "a.wav")
    assert status == 0 and "words beyond the 6 that it reads are left out: tone, tone\n" in err, err
    assert f"'{'tone ' * 5}tone'" in err, err
    # ARC-Forcing on other music learns its words, as many of a prompt as the model reads
    for name in "ab":
        save_wav(tmp_path / f"other/{name}.wav",
                 0.8).with_suffix(".txt").write_text("xylophone that plays on and on, harmonica")
    for out, *phases in (("warm.pt", "--g-warmup", 1, "--teacher-steps", 2, "--every", 1, "--steps", 1),
                         ("game.pt", "--steps", 1)):
        status, err = call(arc_forcing.main, "--init", "out/finetune.pt", "--data", "other", "--out", out,
                           "--d-warmup", 0, "--batch", 2, "--rollout", 1, *phases)
        known = sample.load(tmp_path / out).sampling["words"]
        assert status == 0 and {*words["nano.pt"], "xylophone",
                                "that"} <= {*known} and "harmonica" not in known, err


def test_nothing_known_in_a_prompt(tiny_file, tmp_path, call):
    model = sample.load(tiny_file)
    model.sampling = dict(model.sampling, words=["piano", "slow"])
    common.save(model, tmp_path / "knows.pt")
    status, err = call(sample.main, "--ckpt", "knows.pt", "--prompt", "jazz", "--out", "a.wav")
    assert status == 2 and "it knows piano, slow" in err and not (tmp_path / "a.wav").exists()


def test_clip_is_not_made_before_its_output_is_open(tmp_path, call, monkeypatch):
    """A whole clip can take minutes: what cannot be written is refused first. Without --seconds it is as long
    as it can be, up to 30 s."""
    model, made = tiny(clip=20), []
    model.stage = "base"
    common.save(model, tmp_path / "base.pt")
    real = sample.clip
    monkeypatch.setattr(sample, "clip", lambda *args, **kw: made.append(1) or real(*args, **kw))
    status, err = call(sample.main, "--ckpt", "base.pt", "--steps", 1, "--out", "a.mp3")
    assert status == 2 and "must end in .wav or .flac" in err and not made
    assert call(sample.main, "--ckpt", "base.pt", "--steps", 1, "--out", "a.wav")[0] == 0 and made == [1]
    assert soundfile.info(tmp_path / "a.wav").frames == 20 * TINY.hop


@pytest.mark.parametrize("causal", [True, False])
def test_prime_too_old_to_be_heard_is_left_out(causal):
    """As many blocks as reach the next one through all layers, not the whole recording."""
    model, ran = tiny(causal=causal), []
    c, plain, cond = model.config, model.dit.blocks, condition(model, "slow piano")
    prime, draw = torch.randn(1, 8, (c.reach_blocks + 9) * c.block + 1), noises(0, (1, 8, c.block))
    context = sample.Context(model, model.dit.encode_prompt(cond), prime[..., 1:])                 # all of it
    want = sample.denoise_block(context.predict, draw(), schedule(2)[:-1], "euler", c.objective, draw)
    model.dit.blocks = lambda *args, **kw: ran.append(args) or plain(*args, **kw)
    got = latents_of(model, cond, 1, steps=2, sampler="euler", cfg=1, prime=prime)
    assert (got - want).abs().max() < 1e-5 and len(ran) == (c.reach_blocks - 1 if causal else 0) + 2


def test_command_line_wav(tiny_file, tmp_path, call):
    """Exact length; a pipe gets a true header; the short file is the start of the long one, whose standard
    error is closed; --out says the same."""
    play = shlex.join([sys.executable, str(HERE / "sample.py"), "--ckpt", str(tiny_file), "--seconds"])
    players = [subprocess.Popen(f"{play} {rest}", shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for rest in ("0.2", "0.4 2>&-")]             # beside each other: they take seconds to begin
    (short, err), (long, _) = (player.communicate() for player in players)
    assert [player.returncode for player in players] == [0, 0], err.decode()
    assert len(long) == 44 + 4 * 17640
    audio, rate = soundfile.read(io.BytesIO(short), dtype="int16")
    assert rate == 44100 and audio.shape == (8820, 2)
    assert soundfile.info(io.BytesIO(short)).subtype == "PCM_16"
    assert len(short) == 44 + 4 * 8820 and short[44:] == long[44:len(short)]
    for name in ("a.wav", "a.flac"):
        assert call(sample.main, "--ckpt", tiny_file, "--seconds", 0.2, "--out", name)[0] == 0
        assert np.array_equal(soundfile.read(tmp_path / name, dtype="int16")[0], audio)


def test_streamed_file_is_the_latents_decoded_at_once(tiny_file, tmp_path, call):
    assert call(sample.main, "--ckpt", tiny_file, "--seconds", 0.4, "--seed", 5, "--precision", "float32",
                "--out", "a.wav")[0] == 0
    model = sample.load(tiny_file)
    latents = latents_of(model, condition(model, "slow piano"), 100, seed=5)
    whole = audio_io.pcm(model.autoencoder.decode(latents))[:17640]
    assert np.abs(soundfile.read(tmp_path / "a.wav", dtype="int16")[0].astype(int) - whole).max() <= 1


def test_priming_continues_the_recording(tiny_file, tmp_path, music, call):
    """--prime: blocks made after the recording's own latents, decoded over the join."""
    track = music / "tone 0.wav"
    assert call(sample.main, "--ckpt", tiny_file, "--seconds", 0.2, "--prime", track, "--precision",
                "float32", "--out", "a.wav")[0] == 0
    model = sample.load(tiny_file)
    prime = audio_io.encode_file(model, track)[None]
    latents = latents_of(model, condition(model, "slow piano"), 100, prime=prime)
    whole = model.autoencoder.decode(torch.cat([prime, latents], dim=-1))[..., prime.shape[-1] * TINY.hop:]
    assert np.abs(soundfile.read(tmp_path / "a.wav",
                                 dtype="int16")[0].astype(int) - audio_io.pcm(whole)[:8820]).max() <= 1


def test_closed_pipe(tiny_file, tmp_path, call):
    """A player that quits ends the stream quietly, and leaves the state with which it goes on from the first
    sample that was not taken."""
    play = "--ckpt", tiny_file, "--precision", "float32", "--threads", 1
    command = map(str, (sys.executable, HERE / "sample.py", *play, "--seconds", "inf", "--save-state",
                        "a.pt"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as player:
        player.stdout.read(50000)
        player.stdout.close()
        err = player.stderr.read()
        assert b"Traceback" not in err and b"rror" not in err and b"--resume-state a.pt" in err
    at = torch.load(tmp_path / "a.pt", weights_only=True)["position"]
    assert at >= (50000 - 44) // 4
    assert call(sample.main, *play, "--seconds", 0.1, "--out", "b.wav", "--resume-state", "a.pt")[0] == 0
    assert call(sample.main, *play, "--seconds", at / 44100 + 0.1, "--out", "whole.wav")[0] == 0
    on, whole = samples_in(tmp_path / "b.wav"), samples_in(tmp_path / "whole.wav")
    assert len(whole) == at + len(on) and np.abs(on - whole[at:]).max() <= 1


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(stop, tiny_file, tmp_path):
    play = [sys.executable, str(HERE / "sample.py"), "--ckpt", str(tiny_file), "--seconds", "inf"]
    with open(tmp_path / "a.wav", "wb") as f:
        f.write(b"before")    # the header, corrected at the end, stands where the output began
        f.flush()
        # a shell may have made the player ignore Ctrl-C
        player = subprocess.Popen(play, stdout=f, stderr=subprocess.PIPE,
                                  preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while os.path.getsize(tmp_path / "a.wav") < 50000:
            time.sleep(0.05)
        player.send_signal(stop)
        try:
            err = player.communicate(timeout=30)[1]
        finally:
            player.kill()
    assert player.returncode == 128 + stop and b"Traceback" not in err
    made = (tmp_path / "a.wav").read_bytes()
    assert made[:6] == b"before" and soundfile.info(io.BytesIO(made[6:])).frames == (len(made) - 50) // 4


BAD = [(sample.main, ["--ckpt", "{tmp}/none.pt"], "no checkpoint at"),
       (sample.main, ["--ckpt", "{tmp}/corrupt.pt"], "not a readable checkpoint"),
       (sample.main, ["--ckpt", "{tmp}/other.pt"], "not a checkpoint of this project"),
       (sample.main, ["--ckpt", "{tmp}/shape.pt"], "project_in.weight is"),
       (sample.main, ["--ckpt", "{tmp}/missing.pt"], "context_in.weight missing"),
       (sample.main, ["--ckpt", "{tiny}", "--seconds", "0"], "not positive"),
       (sample.main, ["--ckpt", "{tiny}", "--seconds", "nan"], "not positive"),
       (sample.main, ["--ckpt", "{tiny}", "--steps", "0"], "less than 1"),
       (sample.main, ["--ckpt", "{tiny}", "--seed", str(2 ** 64)], "not between 0 and 2^64 - 1"),
       (finetune.main, ["--init", "{tiny}", "--seed", "-1"], "not between 0 and 2^64 - 1"),
       (sample.main, ["--ckpt", "{tiny}", "--sampler", "magic"], "invalid choice"),
       (sample.main, ["--ckpt", "{tiny}", "--sec", "3"], "unrecognized"),
       (sample.main, ["--ckpt", "{tiny}", "--out", "{tmp}/a.wav", "--prompt-file", "{tmp}/prompts.pt"],
        "embeddings 7 wide"), (sample.main,
                               ["--ckpt", "{tmp}/base.pt", "--out", "{tmp}/a.wav", "--seconds", "1",
                                "--prime", "x.wav"], "--prime is for models that stream"),
       (sample.main, ["--ckpt", "{tiny}", "--device", "meta", "--out", "{tmp}/a.wav"], "cpu or cuda"),
       (sample.main, ["--ckpt", "{tiny}", "--out", "{tmp}/no/such/a.wav"], "cannot write"),
       (sample.main, ["--ckpt", "{tiny}", "--out", "{tmp}/a.xyz"], "must end in .wav or .flac"),
       (sample.main, ["--ckpt", "{tiny}", "--prime", "{tmp}/none.wav", "--out", "{tmp}/a.wav"],
        "no such file"), (sample.main, ["--ckpt", "{tiny}", "--device", "warp", "--out", "{tmp}/a.wav"],
                          "warp"), (sample.main,
                                    ["--ckpt", "{tiny}", "--device", "hpu", "--out", "{tmp}/a.wav"], "hpu"),
       (sample.main, ["--ckpt", "{tiny}", "--prime", "", "--out", "{tmp}/a.wav"], "no such file"),
       (sample.main, ["--ckpt", "{tiny}", "--cfg", "nan", "--out", "{tmp}/a.wav"], "no finite number"),
       (sample.main, ["--ckpt", "{tiny}", "--cfg", "1e300", "--out", "{tmp}/a.wav"], "beyond"),
       (sample.main, ["--ckpt", "{tiny}", "--threads", "1000000", "--out", "{tmp}/a.wav"], "8 for each CPU"),
       (sample.main, ["--ckpt", "{tiny}", "--steps", "1" + "0" * 30, "--out", "{tmp}/a.wav"], "more than"),
       (sample.main, ["--ckpt", "", "--out", "{tmp}/a.wav"], "no checkpoint at"),
       (sample.main, ["--ckpt", "{tiny}", "--prompt", "\U0001f3b5 \udcff", "--out", "{tmp}/a.wav"],
        "no word of"),
       (nano.main, ["autoencoder", "--lr", "nan"], "no finite number"),
       (nano.main, ["autoencoder", "--clip", "0"], "not positive"),
       (nano.main, ["autoencoder", "--noise", "-1"], "is negative"),
       (nano.main, ["autoencoder", "--adversary", "inf"], "no finite number"),
       (nano.main, ["pack", "--share", "nan"], "no finite number"),
       (measure.main, ["--data", "x", "--threads", "1000000"], "8 for each CPU"),
       (finetune.main, ["--init", "{tiny}"], "--data is missing"),
       (finetune.main, ["--init", "{tiny}", "--data", "{tmp}/nowhere"], "no such folder"),
       (finetune.main, ["--init", "{tiny}", "--data", "{tmp}/empty"], "no readable audio"),
       (finetune.main, ["--init", "{tiny}", "--data", "{tmp}/text"], "no readable audio"),
       (finetune.main, ["--init", "{tiny}", "--data", "{tmp}/text", "--batch", "3", "--accumulate", "2"],
        "does not divide"), (finetune.main, ["--resume", "--out", "{tiny}"], "no training to resume"),
       (finetune.main, ["--resume", "--out", "{tmp}/arc.pt"], "no finetuning to resume"),
       (finetune.main, ["--resume", "--out", "{tmp}/begun.pt", "--block", "7"], "was begun with block"),
       (finetune.main, ["--resume", "--out", "{tmp}/begun.pt", "--no-causal"], "was begun with causal True"),
       (finetune.main, ["--resume", "--out", "{tmp}/begun.pt", "--init", "{tiny}"],
        "was begun with init none"),
       (finetune.main, ["--init", "none", "--data", "{tmp}/text"], "autoencoder would be random"),
       (finetune.main, ["--init", "{tiny}", "--data", "{tmp}/text", "--out", "{tmp}/text"], "is a folder"),
       (finetune.main, ["--init", "{tiny}", "--data", "{tmp}/text", "--out", "{tmp}/text/song.wav/ft.pt"],
        "no folder that can be written in"), (arc_forcing.main,
                                              ["--init", "{tiny}", "--data", "{tmp}/text", "--out",
                                               "{tmp}/text"], "is a folder"),
       (measure.main, ["--ckpt", "{tiny}", "--data", "{tmp}/text", "--picture", "{tmp}/text"], "is a folder"),
       (measure.main, ["--ckpt", "{tiny}", "--data", "{tmp}/text", "--drift", "--picture", "{tmp}/a.png"],
        "draws its own"), (nano.main,
                           ["autoencoder", "--init", "{tiny}", "--data", "{tmp}/text", "--crop", "2047"],
                           "a multiple of"), (nano.main,
                                              ["autoencoder", "--init", "{tiny}", "--data", "{tmp}/text",
                                               "--crop", "1024"], "above 2048"),
       (nano.main, ["autoencoder", "--data", "{tmp}/short"], "fitted to tracks of 8 s or more"),
       (nano.main, ["evaluate", "--ckpt", "{tiny}", "--data", "{tmp}/empty"], "no audio to evaluate on"),
       (nano.main, ["pack", "--ckpt", "{tiny}", "--steps", "0"], "less than 1"),
       (measure.main, ["--ckpt", "{tiny}", "--data", "{tmp}/text", "--drift", "--out",
                       "{tmp}/text/song.wav/drift"], "no folder that can be written in")]


@pytest.mark.parametrize("main, args, message", BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_input(main, args, message, tiny_file, tmp_path, call):
    """One line that names the thing, status 2, no traceback, nothing half-written."""
    (tmp_path / "corrupt.pt").write_bytes(b"PK\x03\x04 not a zip")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    torch.save({"prompts": ["a"], "embeddings": torch.zeros(1, 2, 7)}, tmp_path / "prompts.pt")
    base = tiny()
    base.stage = "base"
    common.save(base, tmp_path / "base.pt")
    common.save(tiny(), tmp_path / "arc.pt", args=dict(data="x"), optimizers={})
    common.save(tiny(), tmp_path / "begun.pt", args=dict(data="x", init="none", preset="nano"), optimizer={})
    saved = torch.load(tiny_file, weights_only=True)
    weights = saved["weights"]
    torch.save({**saved, "weights": {**weights, "dit.project_in.weight": torch.zeros(3, 3)}},
               tmp_path / "shape.pt")
    torch.save({**saved, "weights": {k: v for k, v in weights.items() if "context_in" not in k}},
               tmp_path / "missing.pt")
    for folder in ("empty", "text"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text" / "song.wav").write_text("not audio")
    for name in "ab":
        save_wav(tmp_path / "short" / f"{name}.wav", 0.7)
    before = sorted(tmp_path.rglob("*"))
    status, err = call(main, *(a.format(tmp=tmp_path, tiny=tiny_file) for a in args))
    lines = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in err, err
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and "out" not in p.parts] == []


def test_terminal_is_refused(tiny_file):
    import pty
    master, slave = pty.openpty()
    done = subprocess.run([sys.executable, HERE / "sample.py", "--ckpt", tiny_file, "--seconds", "1"],
                          stdout=slave, stderr=subprocess.PIPE)
    os.close(slave), os.close(master)
    assert done.returncode == 2 and b"terminal" in done.stderr.splitlines()[-1]


def test_output_that_ends(tiny_file, tmp_path, call, monkeypatch):
    """A disk that fills, a standard output that is full from the start or closed: one line, status 2."""
    resource = pytest.importorskip("resource")
    play = shlex.join([sys.executable, str(HERE / "sample.py"), "--ckpt", str(tiny_file), "--seconds", "0.2"])
    done = subprocess.run(f"{play} > /dev/full", shell=True, stderr=subprocess.PIPE)
    assert done.returncode == 2, done.stderr
    assert b"cannot write to standard output" in done.stderr.splitlines()[-1], done.stderr
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        status, err = call(sample.main, "--ckpt", tiny_file, "--seconds", 0.2, "--out", "a.wav")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "cannot go on writing a.wav" in err.splitlines()[-1], err
    made = (tmp_path / "a.wav").read_bytes()                # ... and what there is of it is a valid file
    assert len(made) == 4096 and made[40:44] == (4096 - 44).to_bytes(4, "little")
    status, err = call(sample.main, "--ckpt", tiny_file, "--seconds", 0.2, "--out", "no/a.flac")
    assert status == 2 and "No such file or directory" in err.splitlines()[-1], err
    monkeypatch.setattr(sys, "stdout", None)
    status, err = call(sample.main, "--ckpt", tiny_file, "--seconds", 0.2)
    assert status == 2 and "standard output is closed" in err.splitlines()[-1], err


def test_ctrl_c_twice_leaves_a_valid_file(tmp_path):
    """The second one, while the header is corrected, waits."""
    with open(tmp_path / "a.wav", "wb") as file:
        writer = audio_io.WavWriter(file, 44100, 2)
        writer.write(np.ones((10, 2), np.int16))
        real = writer.header

        def interrupted(samples):
            os.kill(os.getpid(), signal.SIGINT)
            real(samples)
        writer.header = interrupted
        with pytest.raises(KeyboardInterrupt):
            writer.close()
    assert soundfile.info(tmp_path / "a.wav").frames == 10


def test_what_is_read_is_not_written_over(tiny_file, music, tmp_path, call):
    """--out may be no other name of the recording, the checkpoint or the prompts."""
    shutil.copy(music / "tone 0.wav", tmp_path / "x.wav")
    shutil.copy(tiny_file, tmp_path / "model.pt")
    torch.save({"prompts": ["a"], "embeddings": torch.randn(1, 6, 16)}, tmp_path / "prompts.pt")
    (tmp_path / "link.wav").symlink_to("x.wav")
    os.link(tmp_path / "x.wav", tmp_path / "hard.wav")
    (tmp_path / "model.wav").symlink_to("model.pt")
    (tmp_path / "prompts.flac").symlink_to("prompts.pt")
    (tmp_path / "sub").mkdir()
    before = {f: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    play = "--ckpt", "model.pt", "--seconds", 0.1, "--prime", "x.wav", "--prompt-file", "prompts.pt", "--out"
    for out in ("x.wav", "./x.wav", "sub/../x.wav", tmp_path / "x.wav", "link.wav", "hard.wav", "model.wav",
                "prompts.flac"):
        status, err = call(sample.main, *play, out)
        assert status == 2 and "which is read" in err.splitlines()[-1], err
    assert all(f.read_bytes() == content for f, content in before.items())
    assert call(sample.main, *play, "new.wav")[0] == 0


def test_seconds_beyond_all_measure(tiny_file, tmp_path, call, monkeypatch):
    """... are as good as inf. It is stopped, as by Ctrl-C, after some pieces."""
    real, pieces = audio_io.WavWriter.write, []

    def write(self, samples):
        real(self, samples)
        pieces.append(len(samples))
        if len(pieces) == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(audio_io.WavWriter, "write", write)
    for seconds in "inf", "1e308", "1e200":
        pieces.clear()
        assert call(sample.main, "--ckpt", tiny_file, "--seconds", seconds, "--out", "a.wav")[0] == 130
        assert soundfile.info(tmp_path / "a.wav").frames == sum(pieces)


def test_one_recording_for_several_prompts():
    for model, cache in ((tiny(causal=False), True), (tiny(), False), (tiny(), True)):
        prime = torch.randn(1, model.config.latent_channels, 2 * model.config.block)
        made = [latents_of(model, condition(model), 2, prime=p, use_cache=cache)
                for p in (prime, prime.repeat(2, 1, 1))]
        assert torch.equal(*made)
    for wrong in (dict(sampler="ddim"), dict(steps=0)):
        with pytest.raises(UserError, match="at least 1 of euler"):
            latents_of(model, condition(model), 1, **wrong)


# -------------------------------------------------------------------------------- live.py
def controlled(model, prompt="slow piano", lines=(), **kw):
    encode, names = live.prompt_encoder(model)
    return live.Control(model, encode, prompt, lines, names, **kw)


def played(model, control, blocks, said=(), **kw):
    """Latents of a stream under a control. said: {number of a block: lines said before it is begun}."""
    said = dict(said)

    def change(number):
        for line in said.get(number, ()):
            control.say(line)
        return control.change(number)
    return latents_of(model, control.cond, blocks, change=change, **kw)


@pytest.mark.parametrize("text, time, command", [
    ("slow piano", None, ({"slow piano": 1.0}, 0.0)),
    (" house:3 +  deep  ambient : 1 ", None, ({"house": 0.75, "deep ambient": 0.25}, 0.0)),
    ("house + house:3 + ambient:0", None, ({"house": 1.0}, 0.0)),
    ("a ~ 8", None, ({"a": 1.0}, 8.0)),
    ('@1:05 "x: y + z @ ~ /":1 + c# minor ~ .5', 65.0, ({"x: y + z @ ~ /": 0.5, "c# minor": 0.5}, 0.5)),
    ("@1:00:05.5 Genre: Rock", 3605.5, ({"Genre: Rock": 1.0}, 0.0)),
    ("@0 6/8 waltz", 0.0, ({"6/8 waltz": 1.0}, 0.0)),
    ("/bpm 92", None, ("bpm", 92.0)), ("/BPM off", None, ("bpm", None)), ("/cfg 4", None, ("cfg", 4.0)),
    ("@90 /steps 8", 90.0, ("steps", 8)), ("/forget 0", None, ("forget", 0)), ("/stop", None, ("stop", None)),
    ('/sketch "my take.wav" pitch 0.3', None, ("sketch", ("my take.wav", "pitch", 0.3))),
    ("/sketch a.wav .3", None, ("sketch", ("a.wav", "both", 0.3))), ("/sketch off", None, ("sketch", None)),
    ("/chords Am F#m7 Bb Gsus4", None, ("chords", ("Am", "F#m7", "Bb", "Gsus4"))),
    ("/chords off", None, ("chords", None))])
def test_grammar(text, time, command):
    line = grammar.parse_line(text)
    assert (line.time, tuple(line.command)) == (time, command)


@pytest.mark.parametrize("text, column, expected", [
    ("", 1, "a prompt or a /command"), ("@20", 4, "a prompt or a /command"), ("@x a", 2, "a time such as"),
    ("@1:75 a", 2, "a time such as"), ("@5 @6 a", 4, "not a second time"), ("a:x", 3, "a weight such as"),
    ("ab :-1", 5, "a weight from 0"), ("a:0 + b:0", 9, "a weight above 0"), ("a + ", 4, "a prompt"),
    ("+ a", 1, "a prompt"), ('a "b', 3, "no partner"), ("a ~", 4, "a number of seconds"),
    ("a ~ x", 5, "a number of seconds"), ("a ~ nan", 5, "a number of seconds"), ("a:1e9", 3, "a weight from"),
    ("a\x1b[0m", 2, "a letter"), ("/bpm", 5, "a tempo"), ("/bpm 900", 6, "a tempo"),
    ("/bpm 92 3", 9, "nothing more"), ("/", 1, "/bpm, /cfg"), ("  /foo 3", 3, "/bpm, /cfg"),
    ("/steps 2.5", 8, "whole number"), ("/chords Am H", 12, "a chord such as"),
    ("/sketch", 8, "an audio file"), ("/sketch a b", 11, "pitch, level or both"),
    ("/sketch off 3", 13, "nothing more"), ("/stop 3", 7, "nothing")])
def test_grammar_names_the_column(text, column, expected):
    with pytest.raises(UserError, match=rf"^column {column}: .*{re.escape(expected)}"):
        grammar.parse_line(text)


def test_schedule_files(tmp_path):
    file = tmp_path / "set.txt"
    file.write_text("# a set\n\n@2 c# minor  # a comment\n/cfg 3\n")
    lines = grammar.read_schedule(file)
    assert [(line.time, line.text) for line in lines] == [(2.0, "c# minor"), (None, "/cfg 3")]
    file.write_text("@2 c# minor", encoding="utf-8-sig")    # as some editors do
    assert grammar.read_schedule(file) == lines[:1]
    file.write_text("a\n@2 b:x\n")
    with pytest.raises(UserError, match="set.txt, line 2, column 6: a weight"):
        grammar.read_schedule(file)
    file.write_bytes(b"\xff\xfe\x00")
    for path in file, tmp_path / "none.txt":
        with pytest.raises(UserError, match="cannot read the schedule"):
            grammar.read_schedule(path)


def test_a_schedule_is_what_is_typed_at_its_times(tmp_path):
    """The same lines from a file, as texts, and said between blocks: the same samples."""
    model = tiny()
    lines = ["@0.01 fast:0.7 + loud:0.3", "@0.02 loud ~ 0.012", "@0.021 /steps 2", "@0.04 /cfg 2",
             "@0.05 slow"]
    (tmp_path / "set.txt").write_text("\n".join(lines))
    seconds = TINY.block / TINY.frame_rate
    said = {}
    for line in lines:
        moment, text = line[1:].split(" ", 1)
        said.setdefault(math.ceil(float(moment) / seconds), []).append(text)
    by_text = played(model, controlled(model, lines=lines), 15)
    by_file = played(model, controlled(model, lines=grammar.read_schedule(tmp_path / "set.txt")), 15)
    by_hand = played(model, controlled(model), 15, said)
    assert torch.equal(by_text, by_file) and torch.equal(by_text, by_hand)
    plain = latents_of(model, condition(model, "slow piano"), 15)
    assert torch.equal(by_text[..., :18], plain[..., :18]) and not torch.equal(by_text, plain)
    assert torch.equal(played(model, controlled(model), 15), plain)     # a control that is told nothing


def test_mixes_and_morphs_by_hand():
    """Weights are divided by their sum, embeddings mixed token by token; a morph is linear, and each block
    takes the mix of its middle."""
    model = tiny()
    a, b, c = (condition(model, prompt) for prompt in ("slow", "fast", "loud"))
    control = controlled(model, "slow:3 + fast:1")
    close(control.cond.tokens, 0.75 * a.tokens + 0.25 * b.tokens)
    close(control.cond.global_, a.global_)
    seconds = control.block_seconds
    control = controlled(model, "slow", [f"@{2 * seconds} fast ~ {4 * seconds}", f"@{4 * seconds} loud"])
    turns = [control.change(number) for number in range(7)]
    assert [turn is None for turn in turns] == [True, True, False, False, False, True, True]
    assert controlled(model, "slow", ["@0 fast", "@0 /cfg 2", "@9 loud"]).playing() == "fast"
    for turn, share in zip(turns[2:4], (1 / 8, 3 / 8)):
        close(turn.cond.tokens, (1 - share) * a.tokens + share * b.tokens)
    close(turns[4].cond.tokens, c.tokens)
    assert [turn.turned for turn in turns[2:5]] == [False, False, True]
    control = controlled(model, "slow", [f"fast ~ {4 * seconds}"])
    turns = [control.change(number) for number in range(4)]
    assert [turn.turned for turn in turns] == [False, False, True, False]
    assert all(turn.gradual for turn in turns)
    assert control.change(4).cond is control.conds["fast"]


def test_what_is_said():
    """Replies, errors that change nothing, lines for later, words that are left out, memory that stays
    flat."""
    model = tiny()
    model.sampling = dict(model.sampling, words=["slow", "fast", "piano"])
    control = controlled(model, "slow piano")
    assert control.change(0) is None and control.change(1) is None
    assert control.say("fast dreamy piano").startswith("next: 'fast piano' (words that this model has not")
    assert control.say("@1:00 slow:3 + fast:1 ~ 2") == "at 1:00: 'slow:0.75 + fast:0.25 ~ 2'"
    assert control.say("@0 /cfg 3") == "next: /cfg 3 (0:00 is over)"
    plan = control.plan
    assert [text for _, text in plan] == ["fast dreamy piano", "/cfg 3", "slow:3 + fast:1 ~ 2"]
    for line, reason in (("dreamy", "no word of"), ("fast:x", "column 6"),
                         ("/bpm 92", "cannot be told a beat"), ("/chords Am", "no channels of pitch"),
                         ("/sketch x.wav", "no channels of pitch and lev")):
        with pytest.raises(UserError, match=reason):
            control.say(line)
    assert control.plan == plan
    turn = control.change(2)
    assert turn.turned and turn.settings == {"cfg": 3.0}
    assert control.status()["mix"] == {"fast dreamy piano": 1.0}
    for number in range(3, 300):
        control.say(f"{'fast ' * (1 + number % 5)}piano{'!' * number}")
        control.change(number)
    assert len(control.conds) <= 2
    with pytest.raises(UserError, match="a prompt was expected first"):
        controlled(model, "/bpm 92")


def test_lines_from_many_threads():
    """The stream goes on, and every line takes effect once."""
    model = tiny()
    control = controlled(model)
    errors = []

    def talk(n):
        for i in range(20):
            control.say(f"@{0.5 + n} /steps {n + 1}" if i % 2 else f"piano {'x' * n}")
            try:
                control.say("oh :no")
            except UserError as error:
                errors.append(error)
    threads = [threading.Thread(target=talk, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    made = played(model, control, 10)
    for thread in threads:
        thread.join()
    assert made.isfinite().all() and len(errors) == 100
    control.change(10)
    assert [text for _, text in control.plan] == [f"/steps {n + 1}" for n in range(5) for _ in range(10)]


def test_beats_and_chords_over_time():
    """A change of tempo keeps the place in the bar; chords last a bar and come again; what is given is what
    the chord sounds like."""
    model = sketching()
    seconds = model.config.block / model.config.frame_rate
    bpm = 60 * 4 / (3 * seconds)                            # three blocks a bar, too fast for the grammar
    control = controlled(model)
    assert control.beat(0) is None
    control.apply(grammar.Setting("bpm", bpm), 2, None)
    assert [round(control.beat(n)[1], 3) for n in range(2, 6)] == [0, 0.333, 0.667, 0]
    control.apply(grammar.Setting("bpm", bpm / 2), 4, None)
    assert [round(control.beat(n)[1], 3) for n in range(4, 7)] == [0.667, 0.833, 0]
    assert controlled(model, lines=["/bpm 92"]).beat(0) is None         # not before it is begun
    control = controlled(model, lines=["/bpm 92", "/chords Am C"])
    control.change(0)
    assert control.beat(3) == pytest.approx(controls.steady_beat(model.config, 92)(3)[:2])
    control.apply(grammar.Setting("bpm", bpm), 0, None)
    given = [control.sketch(number) for number in range(7)]
    a_minor, c_major = (
        controls.sketch_channels(model, controls.chord_features(name, model.config)[:, None])[:3]
        for name in ("Am", "C"))
    for number, wanted in enumerate([a_minor] * 3 + [c_major] * 3 + [a_minor]):
        close(given[number].values[0, 8:11], wanted.expand(3, 6), 1e-4)
    assert given[0].mask[:, 0].nonzero()[:, 0].tolist() == [8, 9, 10]
    with pytest.raises(UserError, match="a tempo first"):
        controlled(model, lines=["/chords Am"])


def test_a_prompt_that_names_its_tempo_sets_the_beat():
    """... of a model that is told the beat frame by frame, until /bpm says otherwise; the heavier prompt's
    counts, and one that names none changes nothing."""
    assert [live.tempo_named(text) for text in ("house, 129 bpm", "at 92.5BPM", "8-bit, 4/4",
                                                "9000 bpm")] == [129, 92.5, None, None]
    model = sketching(beats_per_frame=True)
    control = controlled(model, "house, 120 bpm", ["@0 /chords Am"])
    assert control.beat(1) == pytest.approx(controls.steady_beat(model.config, 120)(1)[:2])
    tempi = []
    for number, line in enumerate(("slow piano", "fast, 90 bpm:0.6 + house, 120 bpm:0.4", "/bpm 100",
                                   "/bpm off", "house, 120 bpm ~ 8")):
        control.say(line)
        control.change(number)
        beat = control.beat(number)
        tempi.append(beat and beat[0])
    assert tempi == [120, 90, 100, None, 120]
    # such a model plays by its words alone
    assert controlled(sketching(), "house, 120 bpm").beat(0) is None


def test_chords_sound_as_written():
    assert controls.chord_notes("Am") == [9, 0, 4] and controls.chord_notes("F#m7") == [6, 9, 1, 4]
    assert controls.chord_notes("B♭") == [10, 2, 5] and controls.chord_notes("Cb") == [11, 3, 6]
    assert controls.chord_notes("H") is None and controls.chord_notes("Am F") is None
    for name in ("C", "Am", "F#m7", "Bb"):
        pitch = controls.chord_features(name, PRESETS["nano"])[:60]
        loudest = {int(row + controls.LOWEST) % 12 for row in pitch.topk(4).indices}
        assert loudest <= {*controls.chord_notes(name)}, name


# -------------------------------------------------------------------------------- stage.py
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_transitions_cached_equal_uncached(causal, cfg):
    """The past is read again under the new prompt, parts of it dropped, some blocks guided: with and without
    a cache the same, and twice the same."""
    model = tiny(causal=causal)
    lines = ["@0.02 fast", "@0.06 /forget 0", "@0.065 loud"]
    made = [played(model, controlled(model, lines=lines), 18, use_cache=use, cfg=cfg)
            for use in (True, False)]
    assert (made[0] - made[1]).abs().max() < 1e-4
    assert torch.equal(made[0], played(model, controlled(model, lines=lines), 18, cfg=cfg))
    assert (made[0] - played(model, controlled(model), 18, cfg=cfg))[..., 30:].abs().max() > 1e-2


@pytest.mark.parametrize("turn, listen, kept", [
    (dict(), None, 0), (dict(settings={"forget": 2}), None, 1), (dict(gradual=True), None, 1),
    (dict(settings={"forget": 0}), None, 3), (dict(), "itself", 1)])
def test_a_transition_by_hand(turn, listen, kept):
    """The block after a change, from the public pass alone: blocks of silence and those that are kept as
    its context, all under the new prompt, by guided ping-pong written out."""
    model = tiny()
    cond = condition(model, "fast")
    turn = live.Turn(cond, turned=True, **turn)
    made = []
    heard = listen and (lambda number: made[number])
    for block in sample.stream(model, condition(model, "slow"), blocks=6, steps=3, listen=heard,
                               change=lambda number: turn if number == 5 else None):
        made.append(block)
    made = torch.cat(made, dim=-1)
    noise = noises(0, (1, 8, 6))
    for _ in range(5):                                      # Euler draws once a block
        noise()
    context = torch.cat([torch.zeros(1, 8, 18 - 6 * kept), made[..., 30 - 6 * kept:30]], dim=-1)
    x = noise()
    levels = schedule(3)
    for t, t_next in zip(levels, levels[1:]):
        told, untold = (x - t * model.dit(x, t[None], c, context) for c in (cond, cond.null()))
        x0 = untold + 0.7 * (told - untold)
        x = x0 + t_next * (noise() - untold) if t_next else x0
    assert (x - made[..., 30:]).abs().max() < 1e-4


def test_after_a_transition_all_is_as_before():
    """Guidance doubles the batch only while it lasts, and the cache is as large as ever."""
    model = tiny()
    batches = []
    plain = model.dit.blocks
    model.dit.blocks = lambda prompt, *args, **kw: (batches.append(len(prompt.global_))
                                                    or plain(prompt, *args, **kw))
    states = []
    control = controlled(model, lines=["@0.02 fast"])
    played(model, control, 10, steps=1, keep=states.append)
    assert batches[-10:] == [1] * 5 + [2] * 2 + [1] * 3
    assert [state["context"][2].shape for state in states] == [(n, 2, 18, 32)
                                                               for n in [1] * 5 + [2] * 2 + [1] * 3]


@pytest.mark.parametrize("causal", [True, False])
def test_states_go_on(causal):
    """A stream that goes on from any of its states is the unbroken one, in the midst of a transition and of a
    morph too."""
    model = tiny(causal=causal)
    lines = ["@0.02 fast", "@0.03 loud ~ 0.03", "@0.035 /cfg 2"]
    control = controlled(model, lines=lines)
    states = []
    whole = played(model, control, 16, sampler="pingpong", seed=[4],
                   keep=lambda state: states.append((state, control.state())))
    for number in (1, 5, 6, 7, 9, 13):
        state, control_state = states[number - 1]
        again = controlled(model, lines=lines[:1])
        again.restore(control_state)
        made = played(model, again, 16 - number, state=state, seed=[4], sampler="pingpong")
        assert (made - whole[..., 6 * number:]).abs().max() < 1e-5, number


@pytest.mark.parametrize("decoder", [audio_io.StreamingDecoder, speed.StreamingDecoder])
def test_decoders_go_on(decoder):
    model = tiny()
    latents = torch.randn(1, 8, 60)
    whole = decoder(model.autoencoder)
    first = whole(latents[..., :30])
    state = audio_io.decoder_state(whole)
    last = whole(latents[..., 30:], last=True)
    again = decoder(model.autoencoder)
    audio_io.restore_decoder(again, state)
    assert torch.equal(again(latents[..., 30:], last=True), last)
    close(torch.cat([first, last], dim=-1), model.autoencoder.decode(latents), 1e-4)


def samples_in(path):
    return soundfile.read(path, dtype="int16")[0].astype(int)


@pytest.mark.parametrize("threads", [1, 2])
def test_saved_and_resumed_is_unbroken(threads, tiny_file, tmp_path, call):
    """... to the sample, with a prompt that changes just before, and another that is still to come."""
    play = ("--ckpt", tiny_file, "--precision", "float32", "--threads", threads, "--at", 0.09, "fast", "--at",
            "0.17", "loud ~ 0.02")
    for args in (("--seconds", 0.3, "--out", "whole.wav"),
                 ("--seconds", 0.1, "--out", "a.wav", "--save-state", "a.pt"),
                 ("--seconds", 0.002, "--out", "b.wav", "--resume-state", "a.pt", "--save-state", "a.pt"),
                 ("--seconds", 0.05, "--out", "x.wav", "--resume-state", "a.pt", "--prompt", "loud ~ 1"),
                 ("--seconds", 0.098, "--out", "c.wav", "--resume-state", "a.pt", "--save-state", "a.pt"),
                 ("--seconds", 0.1, "--out", "d.wav", "--resume-state", "a.pt")):
        status, err = call(sample.main, *play, *args)
        assert status == 0, err
    parts = np.concatenate([samples_in(tmp_path / f"{name}.wav") for name in "abcd"])
    whole = samples_in(tmp_path / "whole.wav")
    assert len(parts) == len(whole) and np.abs(parts - whole).max() <= 1
    common.save(tiny(seed=1), tmp_path / "other.pt")
    for args, reason in ((("--ckpt", "other.pt", "--precision", "float32"), "of another checkpoint"),
                         ((*play[:6], "--no-transitions"), "leave it out"),
                         (("--ckpt", tiny_file, "--precision", "bf16"), "of a stream in float32"),
                         (("--ckpt", tiny_file, "--steps", 3), "no --steps beside it"),
                         (("--ckpt", tiny_file, "--prime", "a.wav"), "no --prime")):
        status, err = call(sample.main, *args, "--resume-state", "a.pt", "--out", "e.wav")
        assert status == 2 and reason in err and not (tmp_path / "e.wav").exists(), err
    status, err = call(sample.main, "--ckpt", tiny_file, "--resume-state", tiny_file, "--out", "e.wav")
    assert status == 2 and "was not written by --save-state" in err


def test_a_state_keeps_what_is_said_after_its_last_block(capsys):
    """A line that was acknowledged is not lost; what is planned anew comes after what was saved for the same
    block; a saved line that cannot be played any more is named."""
    model = sketching()
    control = controlled(model, lines=["@0 /bpm 92", "@9 fast"])
    control.change(0)
    state = control.state()
    control.say("loud")
    control.say("@8 /chords Am F")
    control.say("/stop")                                    # for now
    second = math.ceil(8 / control.block_seconds), "/chords Am F"
    assert state["planned"][1:] == [(1, "loud"), second] and len(control.state()["planned"]) == 3
    state["planned"].append((second[0], '/sketch "gone.wav" pitch 0.0'))
    later = controlled(model, lines=["@9 slow", "@0 loud"])
    later.restore({**state, "bpm": None})                   # a tempo may come by another line
    assert "left out: /sketch" in capsys.readouterr().err
    assert [text for _, text in later.plan] == ["loud", "/chords Am F", "fast", "slow"]
    again = later.state()
    later.say("fast:1 + loud:1")
    assert [text for _, text in again["planned"]][3:] == ["slow", "fast:1 + loud:1"]


def test_ctrl_c_fades_out(tiny_file, tmp_path, call, monkeypatch):
    """The first one: the block in hand goes down to silence, the state is saved, and what goes on from there
    is the unbroken stream."""
    real, written = audio_io.WavWriter.write, []

    def write(self, samples):
        real(self, samples)
        written.append(len(samples))
        if len(written) == 4:
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(stage, "SHORTEST_FADE", 0.001)
    play = "--ckpt", tiny_file, "--precision", "float32", "--threads", 1
    with monkeypatch.context() as patch:
        patch.setattr(audio_io.WavWriter, "write", write)
        status, err = call(sample.main, *play, "--seconds", 0.3, "--out", "a.wav", "--save-state", "a.pt")
    assert status == 130 and len(written) == 5, err
    assert call(sample.main, *play, "--seconds", 0.1, "--out", "b.wav", "--resume-state", "a.pt")[0] == 0
    assert call(sample.main, *play, "--seconds", 0.3, "--out", "whole.wav")[0] == 0
    faded, on, whole = (samples_in(tmp_path / f"{name}.wav") for name in ("a", "b", "whole"))
    at, end = sum(written[:4]), sum(written)
    assert len(faded) == end and np.abs(faded[:at] - whole[:at]).max() <= 1
    ramp = whole[at:end] * np.linspace(1, 0, end - at, endpoint=False)[:, None]
    clear = np.abs(whole[at:end]) < 32767                   # elsewhere it fades before it is clipped
    assert np.abs(faded[at:] - ramp)[clear].max() <= 2 and np.abs(whole[at:end]).max() > 100
    assert np.abs(on - whole[end:end + len(on)]).max() <= 1


def test_stop_fades_out_over_its_block(tiny_file, tmp_path, call):
    play = "--ckpt", tiny_file, "--precision", "float32", "--threads", 1, "--seconds", 0.3
    assert call(sample.main, *play, "--out", "a.wav", "--at", "0.1", "/stop")[0] == 0
    assert call(sample.main, *play, "--out", "whole.wav")[0] == 0
    faded, whole = samples_in(tmp_path / "a.wav"), samples_in(tmp_path / "whole.wav")
    block = TINY.block * TINY.hop
    begin = math.ceil(4410 / block) * block
    assert len(faded) == begin + block and np.abs(faded[:begin] - whole[:begin]).max() <= 1
    gain = np.linspace(1, 0, block, endpoint=False)[:, None]
    last = whole[begin:begin + block]
    assert np.abs(faded[begin:] - last * gain)[np.abs(last) < 32767].max() <= 2


def test_pace_by_a_clock_that_is_told():
    """Audio is handed out no more than the lead before it is heard. What is late moves the clock, so that
    nothing is counted as late twice."""
    clock = [100.0]
    pace = stage.Pace(10, 2.0, now=lambda: clock[0],
                      sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    said = [live.Said("fast", 5, 100.0, 0.0), live.Said("loud", 50, 100.0, 0.0)]
    heard_at = []
    for piece in range(4):
        assert pace.arrived() is None
        for _ in range(10):                                 # of a second, in tenths
            pace.wait(1)
            heard_at.append((pace.position / 10, clock[0] - 100))
            lines = pace.hand_out(1, said, 5)
            assert bool(lines) == (pace.position == 26)     # the first sample of block 5
        clock[0] += 0.3                                     # the work on the next piece
    assert all(position - now <= 1.9 + 1e-6 for position, now in heard_at)
    assert heard_at[29] == pytest.approx((2.9, 1.0)) and [one.text for one in said] == ["loud"]
    assert pace.latencies == [(pytest.approx(2.5), pytest.approx(2.5))]
    assert pace.heard() == pytest.approx(clock[0] - 100)
    clock[0] += 5
    assert pace.heard() == 4.0                              # it cannot hear what is not there
    late = clock[0] - 104
    assert pace.arrived() == f"late: the audio at 4.0 s came {late:.2f} s after its time"
    assert pace.arrived() is None and pace.late == [pytest.approx(late)]
    assert "1 blocks late" in pace.summary()[0] and "median of 1: 2.50 s" in pace.summary()[1]
    free = stage.Pace(10, now=lambda: clock[0], sleep=None)
    free.wait(10)
    assert free.arrived() is None and free.hand_out(10, [live.Said("fast", 1, clock[0] - 3, 0.2)], 5)
    assert free.latencies == [(pytest.approx(0.3), pytest.approx(3.0))]
    planned = [live.Said("fast", 1, clock[0] - 3, 0.2, planned=True)]       # for later: no sign of slowness
    assert free.hand_out(10, planned, 5) == [] and planned == [] and len(free.latencies) == 1


def test_realtime_says_how_soon(tiny_file, tmp_path, call, monkeypatch):
    """The same samples, in small pieces, and a line about lead, work and lateness."""
    play = "--ckpt", tiny_file, "--precision", "float32", "--threads", 1, "--seconds", 0.2
    assert call(sample.main, *play, "--out", "a.wav")[0] == 0
    status, err = call(sample.main, *play, "--out", "b.wav", "--realtime", 0.5)
    assert status == 0 and "of 0.5 s allowed" in err, err
    assert np.array_equal(samples_in(tmp_path / "a.wav"), samples_in(tmp_path / "b.wav"))


@pytest.mark.skipif(sys.platform != "linux", reason="pipes have their size")
def test_a_pipe_has_room_for_the_lead(tmp_path):
    """So much can be written although nobody reads. It never becomes smaller; a file is left alone."""
    end, begin = os.pipe()
    os.set_blocking(begin, False)
    stage.make_room(begin, 200_000)
    stage.make_room(begin, 1000)
    assert os.write(begin, bytes(200_000)) == 200_000
    stage.make_room(begin, 1 << 30)
    assert fcntl.fcntl(begin, fcntl.F_GETPIPE_SZ) == 1 << 20
    for opened in end, begin:
        os.close(opened)
    with open(tmp_path / "file", "wb") as file:
        stage.make_room(file.fileno(), 1 << 17)


def echo(predict, x, *args):
    """In place of `denoise_block`: the block finished last, once more. It fills the cache as that does."""
    predict(x, torch.tensor(0.5))
    return predict.__self__.finished[..., -x.shape[-1]:].clone()


def test_the_answer_never_hears_the_future(monkeypatch):
    """An impulse reaches what comes out only afterwards. A model that answers with what it heard last gives
    back the input a block and the delay later, to the sample."""
    model = tiny()
    c = model.config
    block = c.block * c.hop
    torch.manual_seed(0)
    quiet = 0.1 * torch.randn(2, 20 * block)
    least = (audio_io.encoder_margin(c) + audio_io.decoder_margin(c)) * c.hop

    def answer(heard, mix=0.0, delay=least / c.sample_rate):
        listening = stage.Listening(model, heard.split(100, dim=1), delay, mix)
        blocks = sample.stream(model, condition(model, "slow"), steps=1, listen=listening.block)
        return torch.cat(list(listening.answers(audio_io.decode_stream(model.autoencoder, blocks))),
                         dim=-1)[0]
    plain = answer(quiet)
    for at in (3 * block, 3 * block + 77, 5 * block - 1):
        struck = quiet.clone()
        struck[:, at] += 1
        changed = (answer(struck) - plain).abs().amax(0) > 1e-6
        first = changed.nonzero()[0].item()
        assert at < first <= at + least + 2 * block, (at, first)
    monkeypatch.setattr(sample, "denoise_block", echo)
    given_back = answer(quiet)
    latents = torch.cat(list(audio_io.encode_chunks(model, [quiet])), dim=1)
    heard = model.autoencoder.decode(torch.cat([torch.zeros(8, c.block), latents], dim=1)[None])[0]
    close(given_back[:, least:], heard, 1e-4)
    assert not given_back[:, :least].any()
    mixed = answer(quiet, mix=0.5)
    assert (mixed[:, :20 * block] - given_back[:, :20 * block] - 0.5 * quiet).abs().max() < 1e-6
    with pytest.raises(UserError, match="--delay: .* at least"):
        stage.Listening(model, [], 0.9 * least / c.sample_rate)


def test_listening_to_a_pipe_is_listening_to_the_file(tiny_file, tmp_path, call, monkeypatch):
    soundfile.write(tmp_path / "x.wav", notes(0.3), 44100)
    play = "--ckpt", tiny_file, "--seconds", 0.2, "--precision", "float32", "--threads", 1, "--mix", 1
    assert call(sample.main, *play, "--listen", "x.wav", "--out", "a.wav")[0] == 0
    with open(tmp_path / "x.wav") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        status, err = call(sample.main, *play, "--listen", "-", "--out", "b.wav")
    assert status == 0, err
    assert np.abs(samples_in(tmp_path / "a.wav") - samples_in(tmp_path / "b.wav")).max() <= 1
    block = TINY.block * TINY.hop                           # /stop: the answer fades out over its next block
    status, err = call(sample.main, *play, "--listen", "x.wav", "--at", 0.08, "/stop", "--delay", 0.1,
                       "--out", "c.wav")
    last = math.ceil(0.08 * 44100 / block)
    stopped = samples_in(tmp_path / "c.wav")
    assert status == 0 and len(stopped) == round(0.1 * 44100) + (last + 1) * block
    (tmp_path / "none").write_bytes(b"not a WAV at all")
    with open(tmp_path / "none") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        status, err = call(sample.main, *play, "--listen", "-", "--out", "b.wav")
    assert status == 2 and "standard input: no WAV" in err.splitlines()[-1], err


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "FLOAT"])
def test_wav_that_arrives_in_pieces(subtype, tmp_path):
    soundfile.write(tmp_path / "x.wav", notes(0.1, channels=1), 44100, subtype)
    content = (tmp_path / "x.wav").read_bytes()
    at = content.index(b"data") + 4
    if subtype == "PCM_16":                                 # as written into a pipe: of unknown length
        content = content[:at] + b"\xff" * 4 + content[at + 4:]
    read, write = os.pipe()

    def feed():
        for i in range(0, len(content), 777):
            os.write(write, content[i:i + 777])
        os.close(write)
    thread = threading.Thread(target=feed)
    thread.start()
    with open(read) as file:
        audio = torch.cat(list(stage.wav_pieces(file, TINY)), dim=1)
    thread.join()
    assert audio.shape == (2, 4410) and np.abs(audio.numpy().T - notes(0.1, channels=1)).max() < 1e-4
    stopping = threading.Event()
    stopping.set()
    read, write = os.pipe()
    with open(read) as file, pytest.raises(UserError, match="no WAV"):  # a pipe that stays silent
        next(stage.wav_pieces(file, TINY, stopping.is_set))
    os.close(write)


def test_a_wav_that_makes_no_sense(tmp_path, capsys):
    """Samples that are no numbers are silence, with a line: one would stay in the context for ever."""
    samples = notes(0.1)
    samples[2000], samples[2500], samples[3000, 1] = math.nan, -math.inf, 1e30
    soundfile.write(tmp_path / "x.wav", samples, 44100, "FLOAT")
    with open(tmp_path / "x.wav") as file:
        audio = torch.cat(list(stage.wav_pieces(file, TINY)), dim=1).numpy().T
    samples[2000], samples[2500], samples[3000, 1] = 0, 0, 2
    assert np.abs(audio - samples).max() < 1e-4
    assert capsys.readouterr().err.count("no numbers") == 1
    for rate in 20, 4_000_000:
        soundfile.write(tmp_path / "x.wav", notes(0.1), rate)
        with open(tmp_path / "x.wav") as file, pytest.raises(UserError, match=f"rate of {rate} Hz"):
            next(stage.wav_pieces(file, TINY))


def test_a_sketch_that_pauses_can_be_given_up(tmp_path):
    """/sketch off is not kept waiting by a pipe that stays silent."""
    model = sketching()
    soundfile.write(tmp_path / "x.wav", notes(1.0), 44100, "PCM_16")
    content = (tmp_path / "x.wav").read_bytes()
    read, write = os.pipe()
    os.write(write, content[:40000])
    with open(read) as file:
        control = None
        pieces = stage.wav_pieces(file, model.config, lambda: control is not None and control.ends_sketch())
        control = controlled(model, lines=["@0 /sketch - pitch"],
                             open_sketch=lambda name: stage.open_sketch(model, pieces))
        made = sample.stream(model, control.cond, change=control.change, sketch=control.sketch)
        thread = threading.Thread(target=lambda: [next(made) for _ in range(40)])
        thread.start()
        thread.join(0.5)
        control.say("@0.3 /sketch off")                     # planned, it takes nothing from the blocks before
        assert thread.is_alive() and not control.ends_sketch()
        control.say("/sketch off")
        thread.join(30)
        assert not thread.is_alive() and control.sketched is None
    os.close(write)


def test_a_sketch_that_comes_in_pieces_is_the_whole():
    """Block by block, each as soon as its last frame's window is there; the end is filled up with silence."""
    model = sketching()
    c = model.config
    size = c.block * c.hop
    audio = torch.randn(2, 10 * size + 700)
    whole = controls.encode(model, F.pad(audio, (0, 2 * size))[None])[0, c.latent_channels:]
    blocks = torch.cat(list(stage.open_sketch(model, audio.split(1000, dim=1))), dim=1)
    assert blocks.shape == (5, 11 * c.block) and (blocks - whole[:, :11 * c.block]).abs().max() < 1e-4
    read = []
    sketch = stage.open_sketch(model, (read.append(1) or piece for piece in audio.split(256, dim=1)))
    next(sketch)
    assert len(read) <= c.block + 16 + 1                    # 16 frames of 256 samples: half a window
    assert list(stage.open_sketch(model, [])) == []


def test_a_sketch_is_played(tmp_path, call):
    """From the block at which it begins, to its end, as strictly as asked; a model without channels says
    so."""
    model = sketching()
    common.save(model, tmp_path / "sketch.pt")
    c = model.config
    size = c.block * c.hop
    soundfile.write(tmp_path / "x.wav", notes(4 * size / 44100), 44100, "FLOAT")
    audio = torch.from_numpy(notes(4 * size / 44100).T.copy())
    control = controlled(model, lines=[f"@{2 * size / 44100} /sketch x.wav pitch"],
                         open_sketch=lambda file: stage.open_sketch(model, [audio]))
    made = played(model, control, 8, sketch=control.sketch)
    wanted = controls.encode(model, audio[None])[0, 8:]
    close(made[0, 8:11, 12:36], wanted[:3], 1e-4)
    assert (made[0, 11:, 12:36] - wanted[3:]).abs().max() > 0.1 and control.sketched is None
    play = "--ckpt", "sketch.pt", "--seconds", 0.1, "--threads", 1, "--out"
    for name, args in (("a", ()),
                       ("b", ("--sketch", "x.wav", "--sketch-what", "level", "--sketch-until", 0.5)),
                       ("c", ("--bpm", 120, "--chords", "Am F"))):
        status, err = call(sample.main, *play, f"{name}.wav", *args)
        assert status == 0, err
    sounds = [samples_in(tmp_path / f"{name}.wav") for name in "abc"]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(sounds, 2))
    common.save(tiny(), tmp_path / "plain.pt")
    for args, reason in ((("--sketch", "x.wav"),
                          "no channels of pitch and level: it cannot be given a sketch"),
                         (("--sketch", "none.wav"), "no channels of pitch"),
                         (("--chords", "Am H"), "--chords: column 4"),
                         (("--at", "x", "a"), "--at: column 1"), (("--at", "5", "a:x"), "--at 5: column 3"),
                         (("--at", "5", " @7 fast"), "--at 5: column 2"), (("--prompt", "@7 fast"), "first"),
                         (("--prompt", "fast ~ 3"), "without a time or a morph"),
                         (("--forget", 1, "--no-transitions"), "--forget"),
                         (("--live", "--listen", "-"), "cannot both"),
                         (("--mix", "1"), "belong to --listen"),
                         (("--schedule", "none"), "cannot read the sch")):
        status, err = call(sample.main, "--ckpt", "plain.pt", "--out", "d.wav", *args)
        assert status == 2 and reason in err.splitlines()[-1] and not (tmp_path / "d.wav").exists(), err


# -------------------------------------------------------------------------------- page.py, show.py, osc.py
def streamed(model, control):
    """What the page plays: audio pieces (1, 2, n)."""
    latents = sample.stream(model, control.cond, change=control.change)
    return audio_io.decode_stream(model.autoencoder, latents)


def silence(model, control):
    """The same for as little work as possible."""
    for number in itertools.count():
        control.change(number)
        yield torch.zeros(1, 2, model.config.block * model.config.hop)


@contextlib.contextmanager
def served(played, lead=0.3):
    """A set, `streamed` or `silence`, in blocks of 0.17 s, served at a free port."""
    model = tiny(block=240, context_blocks=1)
    playing = show.Show(stage.Pace(model.config.sample_rate, lead))
    encode, _ = live.prompt_encoder(model)
    playing.control = live.Control(model, encode, "slow piano", clock=playing.pace.heard)
    ended = threading.Event()
    server = page.Server(playing, "127.0.0.1", 0)
    threads = [threading.Thread(target=server.serve_forever, daemon=True),
               threading.Thread(daemon=True,
                                target=lambda: playing.play(played(model, playing.control), ended))]
    for thread in threads:
        thread.start()
    try:
        yield SimpleNamespace(show=playing, port=server.server_address[1], model=model)
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        for thread in threads:
            thread.join()


def raw_request(port, text, host=True):
    """What a server answers to these bytes: (status, headers, body); None where it says nothing."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        if host:
            text = text.replace("\r\n", f"\r\nHost: 127.0.0.1:{port}\r\n", 1)
        connection.sendall(text.encode("latin-1"))
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        return reply.status, reply.headers, reply.read()


def get(port, path, *headers):
    lines = [f"GET {path} HTTP/1.1", *headers, "Connection: close", "", ""]
    return raw_request(port, "\r\n".join(lines))


def post(port, body, *headers, kind="application/json"):
    lines = ["POST /say HTTP/1.1", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
    return raw_request(port, "\r\n".join([*lines, "", body]))


def wait_until(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.01)


def heard_by_one_who_is_cut_off(port, samples, every):
    """The set's first samples as bytes, through connections that break after so many bytes of the body."""
    heard = b""
    while len(heard) < 4 * samples:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", f"/audio?from={len(heard) // 4}")
        reply = connection.getresponse()
        if reply.status == 200:
            assert int(reply.headers["X-Position"]) == len(heard) // 4
            piece = reply.read(every)
            heard += piece[:len(piece) // 4 * 4]
        connection.close()
    return heard[:4 * samples]


def test_listeners_hear_the_same_set():
    """The page's audio is sample.stream's, to the sample, whatever connections break, for every listener."""
    samples = 30000
    with served(streamed) as venue:
        other = []
        listener = threading.Thread(target=lambda: other.append(
            heard_by_one_who_is_cut_off(venue.port, samples, every=10 ** 9)))
        listener.start()
        heard = heard_by_one_who_is_cut_off(venue.port, samples, every=1003)
        listener.join()
        status, headers, recording = get(venue.port, "/set.wav")
    assert other == [heard] and status == 200 and headers["Content-Type"] == "audio/wav"
    assert recording[44:44 + len(heard)] == heard
    audio, rate = soundfile.read(io.BytesIO(recording), dtype="int16")
    assert rate == 44100 and len(audio) == len(recording) // 4 - 11
    latents = sample.stream(venue.model, condition(venue.model, "slow piano"), blocks=5)
    pieces = audio_io.decode_stream(venue.model.autoencoder, latents)
    whole = np.concatenate([audio_io.pcm(piece) for piece in pieces])
    assert np.array_equal(np.frombuffer(heard, "<i2").reshape(-1, 2), whole[:samples])


def test_a_change_holds_from_the_sample_that_is_told():
    with served(streamed) as venue:
        heard_by_one_who_is_cut_off(venue.port, 5000, every=10 ** 9)
        status, _, body = post(venue.port, '{"line": "fast"}')
        said = json.loads(body)
        assert status == 200 and said["answer"] == "next: 'fast'"
        position = said["position"]
        assert position % (240 * 32) == 0 and position > 0
        heard = heard_by_one_who_is_cut_off(venue.port, position + 6000, every=10 ** 9)
        state = json.loads(get(venue.port, "/state")[2])
    assert state["mix"] == {"fast": 1.0} and state["playing"] and state["end"] >= position + 6000

    def played(lines):                                      # in advance, in place of on the way
        control = live.Control(venue.model, live.prompt_encoder(venue.model)[0], "slow piano", lines)
        pieces = itertools.islice(streamed(venue.model, control), position // 7680 + 3)
        return np.concatenate([audio_io.pcm(piece) for piece in pieces])[:position + 6000]
    heard = np.frombuffer(heard, "<i2").reshape(-1, 2)
    assert np.array_equal(heard, played([f"@{position / 44100} fast"]))
    differs = (heard != played([])).any(1).nonzero()[0]
    margin = audio_io.decoder_margin(venue.model.config) * 32
    assert position - margin <= differs[0] < position + 7680


def test_stop_and_start():
    """One more block fades out, the listeners are told, and /start goes on at the next sample."""
    with served(streamed) as venue:
        heard_by_one_who_is_cut_off(venue.port, 5000, every=10 ** 9)
        assert json.loads(post(venue.port, '{"line": "/stop"}')[2])["position"] is None
        wait_until(lambda: venue.show.resting)
        end = venue.show.tape.end
        _, samples = venue.show.tape.read(end - 100, 100)
        assert np.abs(np.frombuffer(samples, "<i2")).max() < 3000
        status, headers, _ = get(venue.port, f"/audio?from={end}")
        assert status == 204 and headers["X-Stopped"] == "1" and venue.show.tape.end == end
        wait_until(lambda: venue.show.due() == end)
        time.sleep(0.1)
        assert venue.show.due() == end                      # the clock stands
        assert not json.loads(get(venue.port, "/state")[2])["playing"]
        post(venue.port, '{"line": "/start"}')
        status, headers, samples = get(venue.port, f"/audio?from={end}")
        assert status == 200 and int(headers["X-Position"]) == end and len(samples)
        assert np.abs(np.frombuffer(samples, "<i2")[:8]).max() < 300
        assert not venue.show.pace.late


def test_what_is_no_request_of_our_page():
    """Somebody else's page, and what is malformed, get one line; the music goes on."""
    with served(silence) as venue:
        here = f"127.0.0.1:{venue.port}"
        line = '{"line": "fast"}'
        for header, path, status in (
                ("Origin: https://evil.example", "/audio", 403), ("Origin: null", "/state", 403),
                (f"Origin: http://localhost:{venue.port + 1}", "/state", 403),
                (f"Origin: http://localhost:{venue.port}", "/state", 403),      # of another name than Host
                ("Sec-Fetch-Site: cross-site", "/set.wav", 403), ("Sec-Fetch-Site: same-site", "/audio", 403),
                ("Sec-Fetch-Site: cross-site", "/", 200), (f"Origin: http://{here}", "/state", 200),
                ("Sec-Fetch-Site: same-origin", "/state", 200), (f"Host: {here}", "/state", 403),
                ("X: y", "/nothing", 404), ("X: y", "/../page.py", 404), ("X: y", "/audio?from=-1", 400),
                ("X: y", "/audio?from=1&from=2", 400), ("X: y", "/audio?from=", 400),
                ("X: y", "/audio?from=\xb2", 400), ("X: y", "/audio?to=5", 400),
                ("X: y", f"/audio?from={10 ** 14}", 416), ("X: " + "y" * 70000, "/", 431),
                ("X: y", "/" + "y" * 70000, 414)):
            answer = get(venue.port, path, header)
            assert answer[0] == status, (header[:40], path[:40], answer)
            assert status == 200 or answer[2].count(b"\n") == 1
        for host in ("evil.example", f"localhost.evil.example:{venue.port}", f"evil@127.0.0.1:{venue.port}",
                     "", "127.0.0.1.nip.io", "127.0.0.1:x"):
            answer = raw_request(venue.port, f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n", host=False)
            assert answer[0] == 403 and answer[2].count(b"\n") == 1, host
        for host in f"localhost:{venue.port}", "LOCALHOST", "127.0.0.1:5":      # the last: through a tunnel
            assert raw_request(venue.port, f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n",
                               host=False)[0] == 200
        for text, status in (("GET / HTTP/1.1\r\n\r\n", 403), ("GET /\r\n\r\n", 403), ("what\r\n\r\n", 400),
                             ("GET / x y HTTP/1.1\r\n\r\n", 400), ("\x00\x01\x02 / HTTP/1\r\n\r\n", 400)):
            assert raw_request(venue.port, text, host=False)[0] == status, text
        for header, kind, status in (
                ("Origin: http://evil.example", "application/json", 403), ("X: y", "text/plain", 415),
                ("X: y", "application/x-www-form-urlencoded", 415), ("X: y", "", 415),
                ("X: y", "application/json; charset=utf-8", 200),
                (f"Origin: http://{here}", "application/json", 200)):
            answer = post(venue.port, line, header, kind=kind)
            assert answer[0] == status, (header, kind, answer)
            assert status == 200 or answer[2].count(b"\n") == 1
        for body in ("", "{", "[" * 4000, "[]", "5",
                     '{"line": 5}', '{"line": " "}', '{"line": "/nothing"}', "\xff",
                     json.dumps({"line": "\u266d\n"}), json.dumps({"line": "\ud800"}), " " * 5000):
            status, _, answer = post(venue.port, body)
            assert status == (413 if len(body) == 5000 else 400), (body[:40], answer)
            assert answer.count(b"\n") == 1
        assert b"column 1" in post(venue.port, '{"line": "/nothing"}')[2]
        kind = "Content-Type: application/json\r\n"
        for method, more, status in (("POST", kind, 411), ("POST", kind + "Content-Length: -1\r\n", 411),
                                     ("OPTIONS", "Access-Control-Request-Method: POST\r\n", 405),
                                     ("PUT", "", 405)):
            answer = raw_request(venue.port, f"{method} /say HTTP/1.1\r\n{more}\r\n")
            assert answer[0] == status and "Access-Control-Allow-Origin" not in answer[1]
        before = venue.show.tape.end
        wait_until(lambda: venue.show.tape.end > before)


def test_who_is_slow_keeps_nobody_waiting():
    with served(silence) as venue, contextlib.ExitStack() as open_ones:
        for _ in range(10):                                 # half a request, and one that is never read
            for text in b"GET / HT", b"GET /set.wav HTTP/1.1\r\nHost: localhost\r\n\r\n":
                slow = open_ones.enter_context(socket.create_connection(("127.0.0.1", venue.port)))
                slow.sendall(text)
        assert len(heard_by_one_who_is_cut_off(venue.port, 9000, every=10 ** 9)) == 36000
        many = [open_ones.enter_context(socket.create_connection(("127.0.0.1", venue.port)))
                for _ in range(page.CONNECTIONS)]
        many[-1].settimeout(60)
        assert many[-1].recv(1) == b""                      # too many: closed at once
        before = venue.show.tape.end
        wait_until(lambda: venue.show.tape.end > before)


def test_who_falls_far_behind_is_told(monkeypatch):
    tape = show.Tape(100, seconds=2)
    rows = np.arange(1000, dtype=np.int16).reshape(-1, 2)
    for start in range(0, 500, 70):
        tape.append(rows[start:start + 70])
    first, samples = tape.read(50, 1000)
    assert first == 300 and np.array_equal(np.frombuffer(samples, "<i2").reshape(-1, 2), rows[300:])
    assert tape.read(500, 9) == (500, b"") and tape.read(480, 9)[1] == rows[480:489].tobytes()
    size, pieces = tape.wav()
    wav = b"".join(pieces)
    assert len(wav) == size and wav[44:] == rows.tobytes()
    monkeypatch.setattr(tape, "file", open("/dev/full", "r+b", buffering=0))
    tape.append(rows[:50])                                  # no more room: the music goes on
    assert tape.full and tape.end == 550 and tape.recorded == 500


def test_late_pieces_set_the_clock_back(capsys):
    playing = show.Show(stage.Pace(1000, lead=0.01))
    playing.control = SimpleNamespace(lock=threading.Lock(), said=[], block_seconds=0.02, end=None)
    ended = threading.Event()

    def pieces():
        for _ in range(3):
            time.sleep(0.1)                                 # longer than the 0.02 s that a piece lasts
            yield torch.zeros(1, 2, 20)
    threading.Thread(target=lambda: playing.play(pieces(), ended), daemon=True).start()
    wait_until(lambda: playing.over and playing.due() == 60)
    ended.set()
    assert len(playing.pace.late) == 2 and "late: the audio at 0.0 s" in capsys.readouterr().err
    for line in "/start", "fast":
        with pytest.raises(UserError, match="over"):
            playing.say(line)


def test_a_set_ends_at_its_seconds():
    pieces = [torch.full((1, 2, 5), float(i)) for i in range(4)]
    cut = torch.cat(list(sample.only_first(iter(pieces), 12)), dim=-1)
    assert torch.equal(cut, torch.cat(pieces, dim=-1)[..., :12])
    assert len(list(sample.only_first(iter(pieces), None))) == 4


def test_others_cannot_name_files():
    playing = show.Show(stage.Pace(44100, 0.5), files=False)
    model = tiny()
    playing.control = live.Control(model, live.prompt_encoder(model)[0], "slow piano")
    for line in "/sketch /etc/passwd", "@5 /SKETCH x.wav", '/"sketch" x.wav':
        with pytest.raises(UserError, match="files can be named only"):
            playing.say(line)
    assert playing.say("fast") == ("next: 'fast'", 0) and playing.say("/sketch off")
    with pytest.raises(UserError, match="no channels"):     # whoever sits at the machine may
        playing.say("/sketch x.wav", files=True)
    assert playing.say(" /Stop")[1] is None and not playing.going.is_set()
    assert playing.say("/START")[1] is None and playing.going.is_set()


@pytest.mark.parametrize("args, message", (
    (["--port", 10 ** 6], "1000000"), (["--osc", 9001], "pip install python-osc"),
    (["--out", "x.wav"], "--out"), (["--osc-beats", "x:1"], "pip install python-osc"),
    (["--save-state", "x"], "--save-state"), (["--no-cache"], "--no-cache"),
    (["--prompt", '"', "--port", 0], "column 1")))
def test_page_command_line(args, message, tiny_file, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "pythonosc", None)     # not installed
    status, err = call(page.main, "--ckpt", tiny_file, *args)
    assert status == 2 and message in err and "Traceback" not in err


class Ear:
    """A UDP port and a list of the lines that were said to it."""
    def __init__(self):
        self.lines = []
        self.port = osc.serve(self.say, 0)

    def say(self, line):
        if line == "/wrong":
            raise UserError("column 1: wrong")
        self.lines.append(line)
        return f"next: {line}"

    def send(self, packet):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(packet, ("127.0.0.1", self.port))

    def heard(self, line):
        wait_until(lambda: line in self.lines)
        return self.lines


def test_osc_commands(capsys):
    pytest.importorskip("pythonosc", reason="python-osc is not installed")
    from pythonosc.udp_client import SimpleUDPClient
    ear = Ear()
    client = SimpleUDPClient("127.0.0.1", ear.port)
    for address, values in (("/prompt", "slow piano"), ("/prompt", ["house:0.7 + ambient:0.3", 8.0]),
                            ("/bpm", 92), ("/bpm", "off"), ("/cfg", 0.7), ("/steps", 8.0), ("/stop", []),
                            ("/stop", 0.0), ("/chords", ["Am", "F"]), ("/chords", "C G"), ("/wrong", []),
                            ("/sketch", ["a song.wav", "pitch", 0.5]),
                            ("/say", "@1:30 fast"), ("/say", [1, 2]), ("/prompt", []),
                            ("/prompt", b"\1\2"), ("/cfg", True), ("/cfg", float("nan"))):
        client.send_message(address, values)
    for packet in (b"", b"garbage", b"/a\0\0,i\0\0\0", b"#bundle\0\0\0\0\0\0\0\0\1\0\0\0\x7f",
                   b"/\xff\0\0,s\0\0\xff", b"#bundle\0" * 4000):
        ear.send(packet)
    client.send_message("/say", "last")
    assert ear.heard("last") == [
        "slow piano", "house:0.7 + ambient:0.3 ~ 8", "/bpm 92", "/bpm off", "/cfg 0.7", "/steps 8", "/stop",
        "/chords Am F", "/chords C G", '/sketch "a song.wav" pitch 0.5', "@1:30 fast", "/cfg nan", "last"]
    err = capsys.readouterr().err
    assert "column 1: wrong" in err and err.count("cannot be read") >= 4 and "Traceback" not in err
    assert "next: /bpm 92" in err and "/cfg: text and numbers" in err


@pytest.mark.skipif(not shutil.which("oscsend"), reason="no oscsend (Debian: liblo-tools)")
def test_osc_of_somebody_else():
    pytest.importorskip("pythonosc", reason="python-osc is not installed")
    ear = Ear()
    for message in (["/prompt", "sf", "slow piano", "2"], ["/bpm", "i", "92"], ["/say", "s", "/cfg 2"]):
        subprocess.run(["oscsend", "127.0.0.1", str(ear.port), *message], check=True)
    assert ear.heard("/cfg 2") == ["slow piano ~ 2", "/bpm 92", "/cfg 2"]


def test_osc_drives_a_stream(tmp_path, tiny_file):
    """sample.py --osc: a setting, then the end. Messages to a port that is not open yet are lost."""
    pytest.importorskip("pythonosc", reason="python-osc is not installed")
    from pythonosc.udp_client import SimpleUDPClient
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = "--seconds", "inf", "--realtime", "0.3", "--osc", port, "--out", "a.wav", "--threads", 1
    player = subprocess.Popen(list(map(str, [sys.executable, HERE / "sample.py", "--ckpt", tiny_file,
                                             *words])),
                              cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while "OSC at" not in (line := player.stderr.readline()):
        assert line, "it ended before it listened"
    for message in ("/steps", 2), ("/stop", []):
        SimpleUDPClient("127.0.0.1", port).send_message(*message)
    _, err = player.communicate(timeout=120)
    assert player.returncode == 0 and "OSC: next: /steps 2" in err and "OSC: next: /stop" in err
    assert soundfile.info(tmp_path / "a.wav").frames > 0


def test_osc_beats():
    """Every beat once, at its time, whatever the blocks are, and on through a change of tempo."""
    bars, told, start = 0.0, [], 0.0
    for bpm, blocks in (120.0, 3), (90.0, 5):               # blocks of 0.7 s
        for _ in range(blocks):
            told += [(start + after, beat) for after, beat in osc.beats_of(bars, bpm, 0.7)]
            bars += 0.7 * bpm / 60 / 4
            start += 0.7
    times, numbers = zip(*told)
    assert list(numbers) == list(range(len(told)))
    assert np.allclose(np.diff(times)[:4], 0.5) and np.allclose(np.diff(times)[-4:], 60 / 90)
    pytest.importorskip("pythonosc", reason="python-osc is not installed")
    from pythonosc.osc_message import OscMessage
    moment = [0.0]
    control = SimpleNamespace(block_seconds=3.0, bpm=120, bars=lambda number: 1.5 * number, number=1,
                              lock=threading.RLock())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear:
        ear.bind(("127.0.0.1", 0))
        ear.settimeout(60)
        osc.Beats(f"127.0.0.1:{ear.getsockname()[1]}", control, lambda: moment[0])
        control.number = 2                                  # block 1 is begun, and heard from second 3 on
        moment[0] = 4.1
        got = [OscMessage(ear.recv(1000)) for _ in range(3)]
        ear.settimeout(0.2)
        with pytest.raises(TimeoutError):
            ear.recv(1000)                                  # the fourth is not heard yet
    assert [m.address for m in got] == ["/beat"] * 3
    assert [m.params for m in got] == [[7, 2, 3], [8, 2, 4], [9, 3, 1]]
    for target in "nowhere", "127.0.0.1:x", "127.0.0.1:70000":
        with pytest.raises(UserError, match="HOST:PORT"):
            osc.Beats(target, control, None)


class Chromium:
    """A headless browser that is driven through a pipe, its file descriptors 3 and 4."""
    def __init__(self, home):
        pairs = [os.pipe(), os.pipe()]
        (self.theirs, self.out), (self.into, theirs_out) = (
            [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in pair] for pair in pairs)
        for end in itertools.chain(*pairs):
            os.close(end)
        command = ["bash", "-c", f'exec "$@" 3<&{self.theirs} 4>&{theirs_out}', "bash", "chromium",
                   "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   "--remote-debugging-pipe", f"--user-data-dir={home}", "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=(self.theirs, theirs_out),
                                        stderr=subprocess.DEVNULL)
        os.close(self.theirs)
        os.close(theirs_out)
        self.number = 0
        self.left = b""
        self.session = {}
        targets = self.ask("Target.getTargets", {})["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.ask("Target.attachToTarget", {"targetId": target, "flatten": True})
        self.session = {"sessionId": attached["sessionId"]}

    def ask(self, method, parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.left:
                assert select.select([self.into], [], [], 120)[0]
                self.left += os.read(self.into, 2 ** 20)
            text, _, self.left = self.left.partition(b"\0")
            reply = json.loads(text)
            if reply.get("id") == self.number:
                return reply["result"]

    def run(self, script):
        reply = self.ask("Runtime.evaluate", {"expression": script, "awaitPromise": True,
                                              "returnByValue": True, "userGesture": True})
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def close(self):
        self.session = {}
        self.ask("Browser.close", {})
        self.process.wait(60)
        os.close(self.out)
        os.close(self.into)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_page_in_a_browser(tmp_path):
    """Samples reach WebAudio; a prompt typed there changes the set; a line that is wrong is shown; stop and
    start."""
    with served(silence, lead=1.0) as venue:
        browser = Chromium(tmp_path)
        try:
            venue.show.control.say("slow piano:0.25 + loud:0.75")
            wait_until(lambda: len(venue.show.control.status()["mix"]) == 2)
            browser.ask("Page.navigate", {"url": f"http://localhost:{venue.port}/"})
            wait_until(lambda: browser.run("document.querySelector('#a')?.value") == "slow piano")
            assert browser.run("document.querySelector('#b').value") == "loud"
            assert browser.run("document.querySelector('#fade').value") == "0.75"
            browser.run("document.querySelector('#b').value = ''")
            venue.show.control.say("/cfg 4")
            wait_until(lambda: browser.run("document.querySelector('#cfg').value") == "4")
            browser.run("document.querySelector('#listen').click()")
            wait_until(lambda: (browser.run("window.playedFrames") or 0) > 44100)
            browser.run("const a = document.querySelector('#a'); a.value = 'fast'; a.onchange()")
            wait_until(lambda: browser.run("window.latencies.length") == 1)
            assert venue.show.control.status()["mix"] == {"fast": 1.0}
            browser.run("document.querySelector('#line').value = '/nothing'")
            browser.run("document.querySelector('#typed button').click()")
            wait_until(lambda: "column 1" in browser.run("document.querySelector('#log').textContent"))
            browser.run("document.querySelector('#set').click()")
            wait_until(lambda: venue.show.resting)
            wait_until(lambda: browser.run("document.querySelector('#set').textContent") == "Start the set")
            browser.run("document.querySelector('#set').click()")
            wait_until(lambda: not venue.show.resting)
        finally:
            browser.close()


# -------------------------------------------------------------------------------- finetune.py
def test_context_dropout_shares():
    rng, n = np.random.default_rng(0), 20000
    gone = finetune.missing_context(rng, n, replace(TINY, causal=False, context_blocks=4))
    share = np.bincount(gone, minlength=5) / n
    assert np.allclose(share, [0.5, 0.075, 0.075, 0.075, 0.275], atol=0.01)
    gone = finetune.missing_context(rng, n, replace(TINY, causal=True, context_blocks=4))
    assert set(gone) == {0, 4} and abs((gone == 4).mean() - 0.5) < 0.01


def test_batches_are_drawn_by_step(tmp_path):
    """The same step draws the same, rows of it or all; another step other music, noise and levels; --shift
    raises the levels."""
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((500, 8)).astype(np.float16))
    tracks = [data.Track("a", "slow", tmp_path / "a.npy", 0, 500)]
    draw = lambda rows=slice(0, 4), step=3, shift=0.0: finetune.draw_batch(tracks, TINY, 4, 2, rows, 0, step,
                                                                           shift)
    whole, again, part, other, shifted = draw(), draw(), draw(slice(2, 4)), draw(step=4), draw(shift=1.5)
    for i in (0, 2, 3):                                     # latents, noise, levels
        assert torch.equal(whole[i], again[i]) and torch.equal(whole[i][2:], part[i])
        assert not torch.equal(whole[i], other[i])
    t = whole[3].double()
    assert torch.allclose(shifted[3].double(), t / (t + math.exp(-1.5) * (1 - t)), atol=1e-5)


def test_an_average_is_what_is_saved_and_the_last_weights_are_what_is_trained():
    """By hand: the first updates move it far, later ones by 1 - keep."""
    weight = torch.nn.Parameter(torch.zeros(3))
    average = training.Average([weight], 0.5)
    expected = torch.zeros(3)
    for step in range(1, 15):
        with torch.no_grad():
            weight += step
        average.update()
        share = 1 - min(0.5, step / (step + 10))
        expected = expected + share * (weight.detach() - expected)
    last = weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), average.in_place() as kept:
        assert torch.allclose(weight, expected) and torch.equal(kept[0], last)
        raise KeyboardInterrupt
    assert torch.equal(weight, last)
    resumed = torch.nn.Parameter(expected.clone())          # as a checkpoint holds it
    again = training.Average([resumed], 0.5)
    again.restore([last], 14)
    assert torch.equal(resumed, last) and torch.allclose(again.values[0], expected)
    none = training.Average([weight], 0.0)
    none.update()
    with none.in_place() as kept:
        assert torch.equal(weight, last) and not kept


def test_muon_moves_the_matrices_of_the_layers_and_adamw_the_rest():
    model = tiny()
    trained = [*model.dit.parameters(), *model.conditioner.parameters()]
    args = finetune.parser().parse_args(["--muon", "--lr", "0.001"])
    muon, adamw = finetune.make_optimizers(model, trained, args)
    parts = [{id(p) for p in optimizer.param_groups[0]["params"]} for optimizer in (muon, adamw)]
    assert parts[0] | parts[1] == {id(p) for p in trained} and not parts[0] & parts[1]
    matrices = model.dit.layers[0].ff.up.weight, model.dit.layers[2].cross_attention.kv.weight
    assert all(id(p) in parts[0] for p in matrices)
    assert id(model.dit.project_in.weight) in parts[1] and id(model.dit.layers[0].ff.up.bias) in parts[1]


def test_dropped_tags():
    """Half of all prompts stay whole; of the others each part goes with the probability; something stays."""
    rng = np.random.default_rng(0)
    texts = [finetune.without_some("house, drums, C minor, 92 bpm", rng, 0.5) for _ in range(4000)]
    parts = [[part.strip() for part in text.split(",")] for text in texts]
    assert all(parts) and all(set(p) <= {"house", "drums", "C minor", "92 bpm"} for p in parts)
    assert 0.5 < np.mean([len(p) == 4 for p in parts]) < 0.6        # 1/2 + 1/2 * (1/16 whole + 1/16 none)
    assert np.mean(["C minor" in p for p in parts]) == pytest.approx(0.5 + 0.25 + 0.03, abs=0.03)
    assert finetune.without_some("one thing", rng, 0.9) == "one thing"
    assert finetune.without_some("house, drums, ", rng, 0.0) == "house, drums, "     # as it was encoded


def test_beats_of_blocks_come_from_the_metadata(tmp_path):
    """Each frame has its own place in the bar; half a bar later, half a bar on. Tracks without are told
    nothing, and in one item of five nothing is told."""
    config = replace(TINY, beats=True)
    rate = config.frame_rate
    np.save(tmp_path / "a.npy", np.zeros((900, 8), np.float16))
    known = data.Track("a", "x", tmp_path / "a.npy", 20, 900, library.Beats(120.0, 4, 0.25))
    features = data.beats_at([(known.beats, 50), (None, 50)], [3, 4], config)
    bars = [((50 + 6 * 3 + frame) / rate - 0.25) * 2 / 4 % 1 for frame in range(12)]       # of two blocks
    expected = controls.beat_features(torch.full((12,), 120.0).double(), torch.tensor(bars).double())
    assert torch.allclose(features[0], expected, atol=1e-5) and not features[1].any()
    batch = finetune.draw_batch([known], config, 200, 2, slice(0, 200), 0, 0)
    dropped = (batch.beat[:, :, 0] == 0).all(1).float().mean().item()
    assert batch.beat.shape == (200, 12, 18) and 0.1 < dropped < 0.3
    part = finetune.draw_batch([known], config, 200, 2, slice(5, 9), 0, 0)
    assert torch.equal(part.beat, batch.beat[5:9])
    assert finetune.draw_batch([known], TINY, 2, 2, slice(0, 2), 0, 0).beat is None


def test_giant_metadata_is_not_read(tmp_path):
    save_wav(tmp_path / "a.wav")
    for name in "metadata.json", "metadata.csv":
        with open(tmp_path / name, "wb") as file:
            file.truncate(2 ** 24 + 1)
        notes_ = []
        if name.endswith("json"):                           # it may be another program's
            assert library.read_metadata(tmp_path, notes_) == {} and "longer than 16 MiB" in notes_[0]
        else:
            with pytest.raises(UserError, match="longer than 16 MiB"):
                library.read_metadata(tmp_path)


def test_beats_in_metadata(tmp_path):
    def beats(text):
        (tmp_path / "metadata.csv").write_text(text)
        save_wav(tmp_path / "a.wav")
        return library.read_metadata(tmp_path, [], library.beats_of_row)["a.wav"]
    assert beats("file_name,text,bpm,first_beat\na.wav,x,92.5,0.3\n") == library.Beats(92.5, 4, 0.3)
    assert beats("file_name,text,bpm,beats_per_bar,first_beat\na.wav,x,180,3,0\n") == library.Beats(180, 3, 0)
    assert beats("file_name,text,bpm\na.wav,x,fast\n") is None            # says nothing of where beats are
    assert beats("file_name,text,bpm,first_beat\na.wav,x,,\n") is None
    for row, named in (("fast,0", "cannot be read"), ("0,0", "no music has bpm 0"), ("nan,1", "no music"),
                       ("90,inf", "no music"), (",1", "cannot be read")):
        with pytest.raises(UserError, match=named):
            beats(f"file_name,text,bpm,first_beat\na.wav,x,{row}\n")
    with pytest.raises(UserError, match="`bpm` beside `first_beat`"):
        beats("file_name,text,first_beat\na.wav,x,1\n")


def test_a_beat_is_learned_from_metadata_and_played(music, tmp_path, call):
    """finetune.py reaches the weights that read beats, and only where a folder tells them."""
    common.save(tiny(beats=True), tmp_path / "beats.pt")
    folder = tmp_path / "labelled"
    shutil.copytree(music, folder)
    for rows, learned in (("", False), ("".join(f"tone {i}.wav,x,120,0.1\n" for i in range(5)), True)):
        (folder / "metadata.csv").write_text("file_name,text,bpm,first_beat\n" + rows)
        args = "--init", "beats.pt", "--data", folder, *TRAIN, "--steps", 1
        assert call(finetune.main, *args)[0] == 0
        model = common.load(tmp_path / "out" / "finetune.pt")
        assert torch.equal(model.dit.beat_in.weight, tiny(beats=True).dit.beat_in.weight) != learned
    play = "--ckpt", "out/finetune.pt", "--seconds", 0.1, "--precision", "float32"
    assert call(sample.main, *play, "--bpm", 92, "--out", "a.wav")[0] == 0
    assert call(sample.main, *play, "--out", "b.wav")[0] == 0
    assert (tmp_path / "a.wav").read_bytes() != (tmp_path / "b.wav").read_bytes()
    one_block = "--rollout", 1, "--batch", 2, "--d-warmup", 0, "--g-warmup", 1, "--on-policy", 1, "--steps", 2
    status, err = call(arc_forcing.main, "--base", "none", *one_block, "--sample-every", 0)
    assert status == 0, err                                 # two blocks are played, one is rolled out
    common.save(tiny(), tmp_path / "none.pt")
    status, err = call(sample.main, "--ckpt", "none.pt", "--bpm", 92, "--out", "c.wav")
    assert status == 2 and "cannot be told a beat" in err
    status, err = call(sample.main, *play, "--bpm", 5000, "--out", "c.wav")
    assert status == 2 and "20 to 400" in err


def test_beats_once_a_block_become_beats_per_frame(music, tmp_path, call):
    """The layer that read a block's beat starts anew, once; a model that cannot be told a beat says so."""
    common.save(tiny(beats=True), tmp_path / "block.pt")
    rate_of_nothing = "--lr", 1e-12, "--steps", 1, "--beats-per-frame"
    args = "--data", music, *TRAIN, *rate_of_nothing
    assert call(finetune.main, "--init", "block.pt", *args)[0] == 0
    model = common.load(tmp_path / "out" / "finetune.pt")
    assert model.config.beats_per_frame and model.dit.beat_in.weight.abs().max() < 1e-9
    frames = tiny(beats=True, beats_per_frame=True)
    common.save(frames, tmp_path / "frame.pt")
    assert call(finetune.main, "--init", "frame.pt", *args, "--out", "again.pt")[0] == 0
    again = common.load(tmp_path / "again.pt").dit.beat_in.weight
    assert (again - frames.dit.beat_in.weight).abs().max() < 1e-6
    common.save(tiny(), tmp_path / "none.pt")
    status, err = call(finetune.main, "--init", "none.pt", *args)
    assert status == 2 and "--beats-per-frame: none.pt cannot be told a beat" in err


def test_encoder_decoder_learns_one_block_of_a_crop():
    """With more, a noisy block would see itself clean, by way of the clean blocks before it."""
    model, latents = tiny(causal=False), torch.randn(2, 8, 30)
    prompt = model.dit.encode_prompt(condition(model))
    with pytest.raises(ValueError, match="learns one block"):
        finetune.block_losses(model, prompt, latents, torch.randn(2, 8, 12), torch.rand(2, 2))
    losses = finetune.block_losses(model, prompt, latents, torch.randn(2, 8, 6), torch.rand(2, 1))
    assert losses.shape == (2, 1)


def killed_after(step, log, name, *args, cwd):
    """Start a script and kill -9 it once its log holds this step."""
    broken = subprocess.Popen([sys.executable, HERE / name, *map(str, args)], cwd=cwd,
                              stderr=subprocess.DEVNULL)
    while broken.poll() is None and not (log.exists()
                                         and any(int(row["step"]) >= step for row in rows_of(log))):
        time.sleep(0.01)
    broken.kill()
    broken.wait()


@pytest.mark.parametrize("options", ["--causal", "--no-causal", "--muon --ema 0.9 --tag-dropout 0.5"])
def test_kill_and_resume_equals_unbroken(options, tiny_file, music, tmp_path, call):
    """kill -9 somewhere after step 2, moved elsewhere, then --resume: the same losses to the last digit, the
    same weights."""
    args = ["--init", tiny_file, "--data", music, *options.split(), *TRAIN]
    assert (done := call(finetune.main, *args, "--out", "a/ft.pt"))[0] == 0, done
    killed_after(2, tmp_path / "b" / "finetune.csv", "finetune.py", *args, "--out", "b/finetune.pt",
                 cwd=tmp_path)
    for name in "finetune.pt", "finetune.csv":
        (tmp_path / "b" / name).rename(tmp_path / "out" / name)
    log = tmp_path / "out" / "finetune.csv"
    assert call(finetune.main, "--resume")[0] == 0
    assert rows_of(log) == rows_of(tmp_path / "a" / "ft.csv") and len(rows_of(log)) == 5
    a, b = (torch.load(tmp_path / name, weights_only=True) for name in ("a/ft.pt", "out/finetune.pt"))
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])
    start = torch.load(tiny_file, weights_only=True)["weights"]
    moved = [k for k in start if not torch.equal(start[k], a["weights"][k])]
    assert moved and not any(k.startswith("autoencoder") for k in moved) and "dit.context_in.weight" in moved


def test_accumulation_checkpointing_and_processes_change_nothing(tiny_file, music, tmp_path, call):
    """One step: plain; in two accumulations; with activation checkpointing; on two processes. A gradient too
    small to be clipped shows in Adam's first moment by its size."""
    args = ["--init", tiny_file, "--data", music, *TRAIN, "--steps", 1, "--clip", 1e9]
    assert call(finetune.main, *args, "--out", "a.pt")[0] == 0     # encodes the music, for the others too
    pair = on_two_processes(29631, "finetune.py", *args, "--out", "d.pt", cwd=tmp_path)
    for name, more in (("b", ["--accumulate", 2]), ("c", ["--remat"])):
        assert call(finetune.main, *args, "--out", f"{name}.pt", *more)[0] == 0
    err = pair.communicate()[1]
    assert pair.returncode == 0, err
    a, *others = (rows_of(tmp_path / f"{name}.csv")[-1] for name in "abcd")
    start = rows_of(tmp_path / "a.csv")[0]
    assert a["validation"] != start["validation"]
    for other in others:    # the loss before the update, and the validation after it
        assert float(other["validation"]) == pytest.approx(float(a["validation"]), abs=1e-5)
        assert float(other["loss"]) == pytest.approx(float(a["loss"]), abs=1e-5)
    plain, *moments = ([s["exp_avg"] for s in torch.load(tmp_path / f"{name}.pt",
                                                         weights_only=True)["optimizer"][0]["state"].values()]
                       for name in "abcd")
    assert max(m.abs().max() for m in plain) > 1e-3
    for other in moments:
        assert max((m - n).abs().max() for m, n in zip(plain, other)) < 1e-6


NONSENSE = [(finetune.main, "--lr nan"), (finetune.main, "--lr 0"), (finetune.main, "--lr -1"),
            (finetune.main, "--lr-end inf"), (finetune.main, "--warmup -1"), (finetune.main, "--clip nan"),
            (finetune.main, "--clip -1"), (finetune.main, "--shift nan"), (finetune.main, "--shift -1000"),
            (finetune.main, "--shift 800"), (finetune.main, "--sample-every -5"),
            (finetune.main, "--sample-seconds inf"), (finetune.main, "--sample-seconds -1"),
            (arc_forcing.main, "--lr nan"), (arc_forcing.main, "--d-lr -1"), (arc_forcing.main, "--clip inf"),
            (arc_forcing.main, "--warmup-lr nan"), (arc_forcing.main, "--d-warmup -1"),
            (arc_forcing.main, "--g-warmup -1"), (arc_forcing.main, "--on-policy -1"),
            (arc_forcing.main, "--on-policy 5"), (arc_forcing.main, "--teacher-steps 4"),
            (arc_forcing.main, "--sample-every -1")]


@pytest.mark.parametrize("main, option", NONSENSE)
def test_numbers_that_make_no_sense(main, option, tiny_file, music, call, monkeypatch):
    """Told in one line before anything long begins."""
    monkeypatch.setattr(data, "prepare", lambda *args, **kw: pytest.fail("encoding began"))
    status, err = call(main, "--init", tiny_file, "--data", music, *option.split())
    assert status == 2 and option.split()[0] in err.splitlines()[-1] and "Traceback" not in err, err


@pytest.mark.parametrize("environment", ["RANK=0", "WORLD_SIZE=2", "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0",
                                         "RANK=x WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_PORT=1",
                                         "RANK=7 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_PORT=1"])
def test_half_an_environment_of_several_processes(environment, tiny_file, music, call, monkeypatch):
    """A cluster may leave some of torchrun's variables: no traceback, and no two trainings on one file."""
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("="))
    status, err = call(finetune.main, "--init", tiny_file, "--data", music, *TRAIN, "--steps", 1)
    assert status == 2 and "torchrun" in err and "Traceback" not in err, err


def test_a_missing_text_encoder_is_told_before_hours_of_encoding(music, tmp_path, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(data, "prepare", lambda *args, **kw: pytest.fail("encoding began"))
    common.save(tiny(text="t5", text_width=16), tmp_path / "t5.pt")
    for main in finetune.main, arc_forcing.main:
        status, err = call(main, "--init", "t5.pt", "--data", music)
        assert status == 2 and "pip install transformers" in err, err


def test_clip_zero_is_no_clipping(tiny_file, music, tmp_path, call):
    """... and not a gradient of zero, with which nothing is learned. Adam's first moment shows its size."""
    moments = []
    for clip in 0, 1e9, 1e-6:
        args = ["--init", tiny_file, "--data", music, *TRAIN, "--steps", 1, "--clip", clip]
        assert (done := call(finetune.main, *args, "--out", f"{clip}.pt"))[0] == 0, done
        state = torch.load(tmp_path / f"{clip}.pt", weights_only=True)["optimizer"][0]["state"]
        moments.append(torch.cat([s["exp_avg"].flatten() for s in state.values()]))
    assert moments[0].any() and torch.equal(moments[0], moments[1]) and moments[2].abs().max() < 1e-6


@pytest.mark.parametrize("name", ["finetune", "arc_forcing"])
def test_a_new_run_keeps_the_earlier_one(name, tiny_file, music, tmp_path, call):
    """--resume forgotten: checkpoint and log of hours get another name, and another one the next time."""
    args = ["--init", tiny_file, "--data", music, "--steps", 1, "--batch", 2, "--every", 1, "--threads", 1]
    args += {"finetune": ["--validation-crops", 2, "--blocks", 1],
             "arc_forcing": ["--d-warmup", 0, "--rollout", 1]}[name]
    main = importlib.import_module(name).main
    out, log = tmp_path / "o" / "run.pt", tmp_path / "o" / "run.csv"
    kept = []
    for mark in "", ".before", ".before2":
        status, err = call(main, *args, "--out", "o/run.pt", "--seed", len(kept))
        assert status == 0 and (f"o/run{mark}.pt" in err) and ("--resume" in err) == bool(mark), err
        kept.append((out.read_bytes(), log.read_text()))
    assert len({content for content, _ in kept}) == 3
    for (content, rows), mark in zip(kept, (".before", ".before2", "")):
        assert (tmp_path / "o" / f"run{mark}.pt").read_bytes() == content
        assert (tmp_path / "o" / f"run{mark}.csv").read_text() == rows
    assert sorted(p.suffix for p in (tmp_path / "o").iterdir()) == [".csv"] * 3 + [".pt"] * 3


def test_each_checkpoint_has_its_own_log_and_samples(tiny_file, music, tmp_path, call):
    """What follows the last dot of a name without .pt is part of the name, not an ending."""
    for out in "lr0.1", "lr0.5", "v1.final", "v1.pt":
        done = call(finetune.main, "--init", tiny_file, "--data", music, *TRAIN, "--steps", 1,
                    "--sample-every", 1, "--sample-seconds", 0.01, "--out", f"o/{out}")
        assert done[0] == 0 and "-> o/" in done[1], done
    names = {"lr0.1", "lr0.5", "v1.final", "v1"}
    assert {p.name for p in (tmp_path / "o").glob("*.csv")} == {f"{name}.csv" for name in names}
    assert {p.name for p in (tmp_path / "o" / "samples").iterdir()} == {f"{name}_1.wav" for name in names}


def test_data_that_has_changed_is_named(tiny_file, music, tmp_path, call):
    """--resume goes on, but names a track that was added, removed, cut short, or has another caption."""
    shutil.copytree(music, tmp_path / "music")
    args = ["--init", tiny_file, "--data", "music", *TRAIN]
    assert call(finetune.main, *args, "--steps", 1)[0] == 0
    status, err = call(finetune.main, "--resume", "--steps", 2)
    assert status == 0 and "is not what it was" not in err, err
    (tmp_path / "music" / "tone 0.wav").unlink()
    (tmp_path / "music" / "tone 1.txt").write_text("quiet")
    save_wav(tmp_path / "music" / "tone 2.wav", 0.5)
    save_wav(tmp_path / "music" / "new.wav", 0.8)
    status, err = call(finetune.main, "--resume", "--steps", 3)
    line, = (line for line in err.splitlines() if "is not what it was" in line)
    assert status == 0 and "1 added (new.wav); 1 removed (tone 0.wav);" in line
    assert "tone 1.wav" in line and "tone 2.wav" in line and line.count(".wav") == 4
    status, err = call(finetune.main, "--resume", "--steps", 4)
    assert status == 0 and "is not what it was" not in err, err
    save_wav(tmp_path / "music" / "new.wav", 0.8, seed=1)   # of the same length, but a quarter as loud
    audio, rate = soundfile.read(tmp_path / "music" / "new.wav")
    soundfile.write(tmp_path / "music" / "new.wav", audio / 4, rate)
    assert "1 changed (new.wav)" in call(finetune.main, "--resume", "--steps", 5)[1]


DAMAGED_LOGS = {
    # the text, the steps whose rows can be read, how many lines cannot
    "semicolons": ("\ufeffstep;loss;validation;lr;seconds\r\n0;;3,25;;\r\n1;2,5;3,125;0,001;0,5\r\n",
                   [0, 1], 0),
    "reordered": ("note,seconds,step,validation\nmine,,0,3.25\n,0.5,1,3.125\n", [0, 1], 0),
    "floats": ("step,loss,validation,lr,seconds\n0.0,,3.25,,\n1.0,2.5,3.125,0.001,0.5\n", [0, 1], 0),
    "zeros": ("step,loss,validation,lr,seconds\n0,,3.25,,\n\0\0\0\0\0", [0], 1),
    "cut": ("step,loss,validation,lr,seconds\n0,,3.25,,\nthere was a row", [0], 1),
    "cut in its step, 12": ("step,loss,validation,lr,seconds\n0,,3.25,,\n1", [0], 1),
    "dates": ("step,loss,validation,lr,seconds\n0,,3. Mrz 25,,\n1,2.5,3.125,0.001,0.5\n", [1], 1),
    "another table": ("name,price\na,1\nb,2\n", [], 2),
    "empty": ("", [], 0)}


def test_a_damaged_log_does_not_keep_a_training_from_going_on(tiny_file, music, tmp_path, call):
    """Rows that can be read stay, others are counted, and then the file is kept as it was."""
    args = ["--init", tiny_file, "--data", music, *TRAIN]
    assert call(finetune.main, *args, "--steps", 1)[0] == 0
    saved = (tmp_path / "out" / "finetune.pt").read_bytes()
    for name, (text, steps, damaged) in DAMAGED_LOGS.items():
        out, log = tmp_path / f"{name}.pt", tmp_path / f"{name}.csv"
        out.write_bytes(saved)
        log.write_bytes(text.encode())
        status, err = call(finetune.main, "--resume", "--steps", 2, "--out", out)
        assert status == 0, (name, err)
        rows = rows_of(log)
        assert [row["step"] for row in rows] == [*map(str, steps), "2"]
        assert list(rows[0]) == ["step", "loss", "validation", "lr"]
        assert all(float(row["validation"]) in (3.25, 3.125) for row in rows[:-1])
        assert (f"{damaged} lines of" in err) == bool(damaged), (name, err)
        kept = tmp_path / f"{name}.before.csv"
        assert not damaged or kept.read_bytes() == text.encode()
        assert kept.exists() == bool(damaged)


def test_a_log_on_a_full_disk_and_a_sample_that_cannot_be_written(tiny_file, music, tmp_path, call):
    args = ["--init", tiny_file, "--data", music, *TRAIN, "--steps", 1]
    (tmp_path / "a.csv").symlink_to("/dev/full")
    status, err = call(finetune.main, *args, "--out", "a.pt")
    assert status == 2 and "error: cannot write a.csv: No space left" in err and "Traceback" not in err
    (tmp_path / "samples").write_text("no folder")          # a sample is worth no training
    status, err = call(finetune.main, *args, "--sample-every", 1, "--sample-seconds", 0.1, "--out", "b.pt")
    assert status == 0 and "warning: no sample, samples/b_1.wav cannot be written" in err
    assert (tmp_path / "b.pt").exists()


def test_a_run_killed_between_two_renames_loses_no_log(tiny_file, music, tmp_path, call, monkeypatch):
    """The next run still sees that there was one before it."""
    args = ["--init", tiny_file, "--data", music, *TRAIN, "--steps", 1]
    assert call(finetune.main, *args)[0] == 0
    log = (tmp_path / "out" / "finetune.csv").read_bytes()
    rename, count = Path.rename, itertools.count(1)

    def rename_one(path, target):
        if next(count) == 2:
            raise KeyboardInterrupt
        rename(path, target)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_one)
        assert call(finetune.main, *args)[0] == 130
    assert call(finetune.main, *args, "--seed", 1)[0] == 0
    assert log in [path.read_bytes() for path in (tmp_path / "out").glob("*.csv")]
    assert len([*(tmp_path / "out").glob("*.pt")]) == 2


@pytest.mark.parametrize("exchange", [0, 1])
@pytest.mark.parametrize("when", ["before", "within"])
def test_a_signal_while_weights_and_average_change_places(when, exchange, monkeypatch):
    """What is saved afterwards has the average for its weights, and training goes on with the last ones."""
    weight = torch.nn.Parameter(torch.zeros(2))
    average = training.Average([weight], keep=0.5)
    weight.data.fill_(1)
    count = itertools.count()

    @contextlib.contextmanager
    def hit_by_a_signal():
        hit = next(count) == exchange
        if hit and when == "before":
            signal.raise_signal(signal.SIGINT)
        with common.uninterrupted():
            if hit and when == "within":
                signal.raise_signal(signal.SIGINT)
            yield
    monkeypatch.setattr(training, "uninterrupted", hit_by_a_signal)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            with average.in_place():
                pass
    finally:
        signal.signal(signal.SIGINT, before)
    with average.in_place() as last:
        assert weight.tolist() == [0, 0] and last[0].tolist() == [1, 1]
    assert weight.tolist() == [1, 1] and average.values[0].tolist() == [0, 0]


def interrupted(monkeypatch, module, number):
    """A signal right after the weights of the third update have moved, and another while that is saved."""
    step, save, count = torch.optim.AdamW.step, module.save, itertools.count(1)

    def step_and_signal(self, *args, **kw):
        step(self, *args, **kw)
        if next(count) == 3:
            signal.raise_signal(number)

    def signal_and_save(*args, **kw):
        signal.raise_signal(number)
        save(*args, **kw)
    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_signal)
    monkeypatch.setattr(module, "save", signal_and_save)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["finetune", "arc_forcing"])
def test_a_signal_at_the_worst_moment_loses_nothing(name, number, tiny_file, music, tmp_path, call,
                                                    monkeypatch):
    """In the middle of an update, and once more while its checkpoint is written: the update counts, and the
    resumed run equals the unbroken one."""
    args = ["--init", tiny_file, "--data", music]
    args += [*TRAIN, "--every", 100] if name == "finetune" else [*ARC, "--every", 100]
    module = importlib.import_module(name)
    assert (done := call(module.main, *args, "--out", "a.pt"))[0] == 0, done
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)      # as `common.run` has it
    try:
        with monkeypatch.context() as patch:
            interrupted(patch, module, number)
            status, err = call(module.main, *args, "--out", "b.pt")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert status == 130 and "stopped after step 3; go on with --resume" in err
    assert torch.load(tmp_path / "b.pt", weights_only=True)["step"] == 3
    assert (done := call(module.main, "--resume", "--out", "b.pt"))[0] == 0, done
    a, b = (torch.load(tmp_path / f"{side}.pt", weights_only=True)["weights"] for side in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert rows_of(tmp_path / "a.csv")[-1] == rows_of(tmp_path / "b.csv")[-1]


def test_resume_with_nothing_to_do_or_another_optimizer(tiny_file, music, tmp_path, call):
    args = ["--init", tiny_file, "--data", music, *TRAIN, "--steps", 1]
    assert call(finetune.main, *args)[0] == 0
    status, err = call(finetune.main, "--resume")
    assert status == 0 and "nothing is left to do after step 1" in err
    saved = torch.load(tmp_path / "out" / "finetune.pt", weights_only=True)
    saved["optimizer"][0]["param_groups"][0]["params"].pop()
    torch.save(saved, tmp_path / "out" / "finetune.pt")
    status, err = call(finetune.main, "--resume", "--steps", 2)
    assert status == 2 and "error: out/finetune.pt: its optimizer is not this model's" in err


# -------------------------------------------------------------------------------- arc_forcing.py
@pytest.mark.parametrize("causal", [True, False])
def test_replay_in_bf16(causal):
    """Autocast keeps rounded weights between passes. Ones without a graph, from filling the cache, must not
    reach the pass with it."""
    model, made = tiny(causal=causal), []
    trained = [*model.dit.parameters(), *model.conditioner.parameters()]
    prime, gradient = torch.randn(2, 8, 18), torch.randn(2, 8, 30)
    model.requires_grad_()
    for precision_ in contextlib.nullcontext, lambda: torch.autocast("cpu", torch.bfloat16):
        model.zero_grad()
        with precision_():
            memory = model.dit.encode_prompt(condition(model))
        if not made:                                        # the same for both
            latents, last = arc_forcing.rollout(model, memory, prime, LEVELS, [1, 3, 2, 1, 3], noises(4))
        arc_forcing.replay(model, memory, prime, latents, last, gradient, precision_)
        made.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained])
    for a, b in zip(*made):
        assert (a - b).norm() < 0.05 * a.norm() + 1e-3 * max(x.norm() for x in made[0])


def test_discriminator_scores_the_rollout_only():
    """Scores are of frames from `first` on, hear the whole sequence, and only the layers below the head are
    trained."""
    torch.manual_seed(0)
    critic = arc_forcing.start_discriminator(tiny(depth=8), None)
    assert critic.layer == 5 and critic.config.depth == 8
    cond, t = condition(critic), torch.full((2,), 0.3)
    for context, frames, scores in ((18, 30, 4), (20, 32, 3), (23, 24, 1)):
        x = torch.randn(2, 8, frames, requires_grad=True)
        y = critic(x, t, cond, context)
        assert y.shape == (2, scores) == critic.weights(torch.ones(2, frames), context).shape
        gradient, = torch.autograd.grad(y.sum(), x)
        assert gradient[..., :context].abs().max() > 0 and gradient[...,
                                                                    context:].abs().amin((0, 1)).min() > 0
    music = torch.ones(2, 30)
    music[1, 24:] = music[1, :18] = 0    # scores are around frames 16 (counts as 18), 20, 24, 28
    assert critic.weights(music, 18)[1].tolist() == [0.5, 0.5, 0, 0]
    assert critic.weights(music, 18)[0].tolist() == [0.25] * 4
    for phase, loss in (("D", lambda: critic(x, t, condition(critic), 18).sum()),
                        ("warm D", lambda: arc_forcing.flow_loss(critic, condition(critic), x.detach(),
                                                                 torch.randn_like(x), t,
                                                                 torch.ones(2, 24)).sum())):
        critic.zero_grad()
        loss().backward()
        moved = {id(p) for p in critic.parameters() if p.grad is not None}
        assert moved == {id(p) for p in critic.trained(phase)}


def test_the_discriminator_reads_words_in_the_rows_that_g_gave_them():
    """Of two words with the same hash one has another row: D, whose table is a copy, must look there too."""
    model = tiny(text_width=2)
    words = [f"word{i}" for i in range(9)]
    first, second = next(pair for pair in itertools.combinations(words, 2)
                         if len({model.conditioner.words.row_of(word) for word in pair}) == 1)
    critic = arc_forcing.start_discriminator(model, None)
    training.words_met(model, [SimpleNamespace(prompt=f"{first} {second}")])
    for word in first, second:
        assert torch.equal(condition(model, word).tokens, condition(critic, word).tokens)
    assert not torch.equal(condition(critic, first).tokens, condition(critic, second).tokens)


def drawn(music, rows=slice(0, 6), step=0, phase="D", blocks=2, **kw):
    model = tiny(**kw)
    tracks = data.prepare(music, model, Path(music) / ".latents", quiet=True).train
    return arc_forcing.draw_batch(tracks, model.config, 6, blocks, 8, rows, 0, phase, step)


def test_draws(music, tmp_path):
    """k covers 1..K inclusive, the same for every row; rows are cut from one batch; prompts of others, own
    ones untouched."""
    whole, parts = drawn(music), [drawn(music, slice(i, i + 2)) for i in (0, 2, 4)]
    for name in ("latents", "music", "noise", "uniform"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
    assert torch.equal(whole.draw(), torch.cat([p.draw() for p in parts]))
    assert all(p.ks == whole.ks for p in parts)
    assert whole.others == [whole.prompts[-1], *whole.prompts[:-1]] and whole.others is not whole.prompts
    assert [q for p in parts for q in p.prompts] == whole.prompts and len(set(whole.prompts)) > 1
    again = drawn(music, step=1), drawn(music, phase="G")
    assert all(not torch.equal(whole.noise, other.noise) for other in again)

    tracks = [data.Track("a", "slow", tmp_path / "a.npy", 0, 60)]
    np.save(tmp_path / "a.npy", np.ones((60, 8), np.float16))
    ks = [k for step in range(500) for k in arc_forcing.draw_batch(tracks, TINY, 1, 2, 8, slice(0, 1), 0, "G",
                                                                   step).ks]
    count = np.bincount(ks, minlength=9)
    assert len(ks) == 1000 and count[0] == 0 and len(count) == 9 and count[1:].min() > 85


@pytest.mark.parametrize("frames", [13, 30])
def test_short_tracks_begin_like_a_stream(frames, tmp_path):
    """Fewer frames than context and rollout: [nothing | music | nothing], and only the music is marked as
    such."""
    np.save(tmp_path / "a.npy", np.ones((frames, 8), np.float16))
    tracks = [data.Track("a", "slow", tmp_path / "a.npy", 0, frames)]
    b = arc_forcing.draw_batch(tracks, TINY, 16, 3, 8, slice(0, 16), 0, "D", 0)
    assert torch.equal(b.latents[:, 0], b.music)
    blocks = {tuple(row) for row in b.music[:, ::6].int().tolist()}
    assert blocks == ({(0, 0, 0, 1, 1, 0)} if frames == 13 else {(0, 0, 0, 1, 1, 1), (0, 1, 1, 1, 1, 1)})


def test_phases_and_verdict():
    args = SimpleNamespace(d_warmup=2, g_warmup=1, steps=5)
    done, order = dict.fromkeys(arc_forcing.PHASES, 0), []
    while phase := arc_forcing.next_phase(done, args):
        order.append(phase)
        done[phase] += 1
    assert order == ["warm D", "warm D", "warm G", "D", "G", "D", "G", "D"]
    assert arc_forcing.verdict([(0.5, 1.0)] * 9) is None
    assert "D wins" in arc_forcing.verdict([(4.5, 1.0)] * 9)
    assert "G wins" in arc_forcing.verdict([(-5.0, 1.0)] * 9)
    for spread in (0.4, 2.1, math.nan):
        assert "standard deviation" in arc_forcing.verdict([(0.5, spread)] * 9)


def test_trajectory_is_the_teacher_s_stream():
    model = tiny()
    cond, prime = condition(model), torch.randn(2, 8, 18)
    points, end = arc_forcing.trajectory(model, cond, prime, schedule(5)[:-1], 3.0, noises(2))
    assert torch.equal(end, latents_of(model, cond, 1, steps=5, sampler="euler", cfg=3.0, seed=2,
                                       prime=prime))
    assert [t.item() for _, t in points] == schedule(5)[:-1].tolist() and points[0][0].shape == (2, 8, 6)


def test_pick_up():
    """An item's own stream, with the prompt it began with and the beats that it has got to; music's context
    where there is none or a new one is to begin."""
    prime = torch.randn(3, 8, 4)
    kept = {0: (torch.full((8, 4), 7.0), "seven", (None, 70)),
            3: (torch.full((8, 4), 9.0), "nine", ((90.0, 3.0, 0.5), 24))}
    new = ["a", "b", "c"], [(library.Beats(60, 4, 0), 5), (None, 6), (None, 7)]
    contexts, prompts, starts = arc_forcing.pick_up(kept, range(1, 4), prime, *new,
                                                    [True, False, False, False])
    assert prompts == ["a", "b", "nine"] and torch.equal(contexts[:2], prime[:2]) and (contexts[2] == 9).all()
    assert starts == [(library.Beats(60, 4, 0), 5), (None, 6), (library.Beats(90, 3, 0.5), 24)]
    contexts, prompts, starts = arc_forcing.pick_up(kept, range(3), prime, *new, [False] * 3)
    assert prompts == ["seven", "b", "c"]
    assert (contexts[0] == 7).all() and torch.equal(contexts[1:], prime[1:])
    assert starts[0] == (None, 70)
    assert arc_forcing.pick_up(kept, range(3), prime, *new, [True] * 3)[1:] == tuple(map(list, new))


def test_arc_tells_the_beat(tmp_path):
    """A rolled-out block gets the features of its own frames, a short track's where it was moved to."""
    config = replace(TINY, beats=True, beats_per_frame=True)
    model = tiny(beats=True, beats_per_frame=True)
    np.save(tmp_path / "a.npy", np.zeros((31, 8), np.float16))
    beats = library.Beats(120.0, 4, 0.25)
    track = data.Track("a", "slow", tmp_path / "a.npy", 0, 31, beats)
    batch = arc_forcing.draw_batch([track], config, 40, 4, 3, slice(0, 40), 0, "G", 0)
    features = batch.beats(config)
    frames = 31 - 7 * 6 + 6 * 3 + torch.arange(24)          # a block of the crop is not there
    frames += 0 if batch.music[0, 18] else 6
    bars = [beats.bar_at(frame.item() / config.frame_rate) for frame in frames]
    expected = controls.beat_features(torch.full((24,), 120.0).double(), torch.tensor(bars).double())
    expected = expected.unflatten(0, (4, 6))
    told = batch.with_beat[:, 0, 0] == 1
    assert torch.allclose(features[told], expected.expand(int(told.sum()), -1, -1, -1), atol=1e-5)
    assert not features[~told].any() and 0.6 < told.float().mean() < 1
    prompt = model.dit.encode_prompt(condition(model))
    prime = torch.randn(2, 8, 18)
    args = model, prompt, prime, LEVELS, [3] * 4
    with torch.no_grad():
        plain, _ = arc_forcing.rollout(*args, noises(4))
        with_beats, _ = arc_forcing.rollout(*args, noises(4), beats=features[told][:2])
        steady = lambda number: (120.0, bars[6 * number])
        streamed = latents_of(model, condition(model), 4, steps=3, sampler="pingpong", seed=4, prime=prime,
                              beat=steady)
    assert (plain - with_beats).abs().max() > 1e-3
    assert (streamed - with_beats).abs().max() < 1e-5


def test_on_policy_warmup_plays_its_own_streams(finetuned, call):
    """After one step each item has gone on from its music by two blocks, as the model of before the step
    plays them. The loss is that of velocities, against those that lead straight to where the teacher gets
    from there."""
    args = [*ARC, "--d-warmup", 0, "--g-warmup", 1, "--on-policy", 1, "--steps", 1, "--out", "o.pt"]
    assert (done := call(arc_forcing.main, *args, cwd=finetuned))[0] == 0, done
    model, streams = (sample.load(finetuned / "out" / "finetune.pt"),
                      torch.load(finetuned / "o.pt", weights_only=True)["streams"])
    folder = torch.load(finetuned / "o.pt", weights_only=True)["args"]["data"]
    tracks, c = data.prepare(folder, model, finetuned / "out" / "latents", quiet=True).train, model.config
    b = arc_forcing.draw_batch(tracks, c, 4, 2, 3, slice(0, 4), 0, "warm G", 0)
    cond = training.condition(model, training.encode_texts(model, tracks), b.prompts, "cpu")
    context, played = sample.Context(model, model.dit.encode_prompt(cond),
                                     b.latents[..., :c.context]), [b.latents[..., :c.context]]
    with torch.no_grad():
        for _ in range(2):
            played.append(sample.denoise_block(context.predict, b.draw(), schedule(3)[:-1], "dpmpp",
                                               c.objective, None))
            context.append(played[-1])
        expected = torch.cat(played, dim=-1)[..., -c.context:]
        assert [streams[i][1] for i in range(4)] == b.prompts
        assert (torch.stack([streams[i][0] for i in range(4)]) - expected).abs().max() < 1e-6
        points, end = arc_forcing.trajectory(model, cond, expected, schedule(4)[:-1], 3.0, b.draw)
        b.rng.random(4)                                     # which items are to begin anew
        context = sample.Context(model, model.dit.encode_prompt(cond), expected)
        errors = [(context.predict(x, t) - (x - end) / t).square().mean() for x,
                  t in (points[i] for i in b.rng.permutation(4)[:3])]
    assert float(rows_of(finetuned / "o.csv")[0]["loss"]) == pytest.approx(np.mean(errors), rel=1e-4)


ARC = ["--rollout", 2, "--most", 3, "--batch", 4, "--d-warmup", 2, "--g-warmup", 3, "--on-policy", 2,
       "--teacher-steps", 4, "--teacher-cfg", 3, "--steps", 4, "--every", 1, "--sample-every", 0,
       "--precision", "float32", "--lr", "1e-4", "--d-lr", "1e-3", "--threads", 1]


@pytest.fixture(scope="module")
def finetuned(tiny_file, music, tmp_path_factory):
    """A folder with out/finetune.pt, as finetune.py leaves it (it tells the data; the model is
    encoder-decoder)."""
    folder, model = tmp_path_factory.mktemp("finetuned"), tiny(causal=False)
    common.save(model, folder / "out" / "finetune.pt", args=dict(data=str(music), init=str(tiny_file)))
    return folder


def test_arc_kill_and_resume_equals_unbroken(finetuned, call):
    """Through all phases; kill -9 between the steps on G's own streams or later, then --resume: the same log,
    weights, optimizers."""
    assert (done := call(arc_forcing.main, *ARC, "--out", "a/arc.pt", cwd=finetuned))[0] == 0, done
    log = finetuned / "b" / "arc.csv"
    killed_after(4, log, "arc_forcing.py", *ARC, "--out", "b/arc.pt", cwd=finetuned)
    assert torch.load(finetuned / "b" / "arc.pt", weights_only=True)["step"] < 9
    assert (done := call(arc_forcing.main, "--resume", "--out", "b/arc.pt", cwd=finetuned))[0] == 0, done
    rows = rows_of(log)
    assert rows == rows_of(finetuned / "a" / "arc.csv")
    assert [row["phase"] for row in rows] == ["warm D"] * 2 + ["warm G"] * 3 + ["D", "G"] * 2
    a, b = (torch.load(finetuned / side / "arc.pt", weights_only=True) for side in "ab")
    def same(x, y):
        if torch.is_tensor(x):
            return torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
        if isinstance(x, tuple):
            return all(map(same, x, y))
        return x == y
    for key in ("weights", "discriminator", "optimizers", "streams", "done", "stage", "sampling", "step",
                "config"):
        assert same(a[key], b[key]), key
    assert a["stage"] == "arc" and a["sampling"]["steps"] == 3 and not a["config"]["causal"]
    assert a["optimizers"]["G"]["state"] and a["optimizers"]["D"]["state"]
    assert not a["optimizers"]["warm D"]["state"]
    rate = {phase: optimizer["param_groups"][0]["lr"] for phase, optimizer in a["optimizers"].items()}
    # warm-ups fall
    assert rate == {"warm D": pytest.approx(5e-5 / 2), "warm G": pytest.approx(5e-5 / 3), "D": 1e-3,
                    "G": 1e-4}
    start = torch.load(finetuned / "out" / "finetune.pt", weights_only=True)["weights"]
    moved = {k for k in start if not torch.equal(start[k], a["weights"][k])}
    assert moved and not any(k.startswith("autoencoder") or k == "dit.context_in.weight" for k in moved)
    assert sample.sampling_settings(sample.load(finetuned / "a" / "arc.pt")) == dict(sampler="pingpong",
                                                                                     steps=3, cfg=1.0)
    # from the game back to a longer warm-up of D, with other steps a block
    assert (done := call(arc_forcing.main, "--resume", "--out", "b/arc.pt", "--d-warmup", 3, "--most", 2,
                         cwd=finetuned))[0] == 0, done
    common.save(tiny(), finetuned / "b" / "causal.pt")
    status, err = call(arc_forcing.main, "--resume", "--out", "b/arc.pt", "--g-warmup", 9, "--init",
                       "b/causal.pt", cwd=finetuned)
    assert status == 2 and "b/causal.pt has other sizes, blocks or another regime" in err
    assert rows_of(log)[9]["phase"] == "warm D" and len(rows_of(log)) == 10
    assert sample.load(finetuned / "b" / "arc.pt").sampling["steps"] == 2


def test_arc_accumulation_and_processes_change_nothing(finetuned, tiny_file, call):
    """Two steps on G's own streams, one of D, one of G: plain; in two accumulations; on two processes: the
    same losses, streams and first updates."""
    args = ["--init", tiny_file, "--data", torch.load(finetuned / "out" / "finetune.pt",
                                                      weights_only=True)["args"]["data"], *ARC, "--d-warmup",
            0, "--g-warmup", 2, "--on-policy", 2, "--steps", 2, "--lr", "1e-6", "--d-lr", "1e-6",
            "--warmup-lr", "1e-6"]
    pair = on_two_processes(29632, "arc_forcing.py", *args, "--out", "r.pt", cwd=finetuned)
    for name, more in (("p", []), ("q", ["--accumulate", 2])):
        status, err = call(arc_forcing.main, *args, "--out", f"{name}.pt", *more, cwd=finetuned)
        assert status == 0, err
    err = pair.communicate()[1]
    assert pair.returncode == 0, err
    plain, *others = (torch.load(finetuned / f"{name}.pt", weights_only=True) for name in "pqr")
    rows = [rows_of(finetuned / f"{name}.csv") for name in "pqr"]
    assert [row["phase"] for row in rows[0]] == ["warm G", "warm G", "D", "G"]
    for other, logged in zip(others, rows[1:]):
        assert plain["streams"].keys() == other["streams"].keys() == {0, 1, 2, 3}
        for item, (one, prompt, start) in plain["streams"].items():
            two, prompt2, start2 = other["streams"][item]
            assert (prompt, start) == (prompt2, start2) and (one - two).abs().max() < 1e-5
        for player in "DG":    # after one step of Adam: a tenth of the clipped mean gradient
            one, two = (x["optimizers"][player]["state"] for x in (plain, other))
            assert one.keys() == two.keys() and all(s["step"] == 1 for s in two.values())
            assert max(s["exp_avg"].abs().max() for s in one.values()) > 1e-3
            assert max((one[i]["exp_avg"] - two[i]["exp_avg"]).abs().max() for i in one) < 1e-5
        for row, row2 in zip(rows[0], logged):
            assert {k: float(v) for k, v in row2.items() if v and k != "phase"} == pytest.approx(
                {k: float(v) for k, v in row.items() if v and k != "phase"}, abs=1e-5)


ARC_BAD = [([], "run finetune.py first"), (["--init", "{tiny}"], "--data is missing"),
           (["--init", "{tmp}/base.pt"], "has not learned to stream"),
           (["--init", "{tiny}", "--data", "{tmp}/nowhere"], "no such folder"),
           (["--init", "{tiny}", "--data", "{tmp}", "--batch", "3", "--accumulate", "2"], "does not divide"),
           (["--init", "{tiny}", "--data", "{tmp}", "--base", "{tmp}/none.pt"], "no checkpoint at"),
           (["--init", "{tiny}", "--data", "{tmp}", "--base", "{tmp}/base.pt"], "different autoencoders"),
           (["--init", "{tiny}", "--data", "{tmp}", "--rollout", "0"], "less than 1"),
           (["--init", "{tiny}", "--data", "{tmp}", "--g-warmup", "1", "--out", "{tiny}"],
            "would overwrite the warm-up's teacher"),
           (["--resume", "--out", "{tmp}/finetune.pt"], "no ARC-Forcing to resume"),
           (["--resume", "--out", "{tiny}"], "no training to resume")]


@pytest.mark.parametrize("args, message", ARC_BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_arc_bad_input(args, message, tiny_file, tmp_path, call):
    base = tiny(seed=1)
    base.stage = "base"
    common.save(base, tmp_path / "base.pt")
    common.save(tiny(), tmp_path / "finetune.pt", args=dict(data="x", init="none"))
    common.save(tiny(), tmp_path / "begun.pt", args=dict(data="x", base="none"), discriminator={})
    status, err = call(arc_forcing.main, *(a.format(tmp=tmp_path, tiny=tiny_file) for a in args))
    lines = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in err, err
    assert {p.name for p in tmp_path.iterdir()} <= {"base.pt", "begun.pt", "finetune.pt"}


def test_the_base_is_the_public_model_that_finetuning_began_with(tiny_file, music, tmp_path):
    """--base: what --init was finetuned from, if that was a public model; else --init itself."""
    base = tiny(seed=1)
    base.stage = "base"
    common.save(base, tmp_path / "base.pt")
    for init, expected in ((tmp_path / "base.pt", str(tmp_path / "base.pt")), (tiny_file, "none"),
                           ("none", "none"), ("gone.pt", "none")):
        common.save(tiny(), tmp_path / "ft.pt", args=dict(data="music", init=str(init)))
        args = arc_forcing.parser().parse_args(["--init", str(tmp_path / "ft.pt")])
        arc_forcing.fill_in(args)
        assert (args.data, args.base) == ("music", expected)


# -------------------------------------------------------------------------------- stable_audio_port.py
def write_public(folder, weights, name="model.ckpt"):
    """A folder in the public layout: the golden Small's config and these weights."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / "sao_small_tiny" / "model_config.json", folder)
    if name.endswith(".safetensors"):
        header, at = {}, 0
        for k, w in weights.items():
            kinds = {torch.float16: "F16", torch.float32: "F32", torch.int32: "I32", torch.int64: "I64",
                     torch.bool: "BOOL"}
            header[k] = dict(dtype=kinds[w.dtype], shape=list(w.shape), data_offsets=[at, at + w.nbytes])
            at += w.nbytes
        head = json.dumps(header).encode()
        (folder / name).write_bytes(len(head).to_bytes(8, "little") + head
                                    + b"".join(w.numpy().tobytes() for w in weights.values()))
    else:
        torch.save({"state_dict": weights}, folder / name)
    return folder


def test_port_config():
    c = small().config
    assert (c.clip, c.text_model, c.text_tokens, c.text_width, c.cond_width) == (256, "t5-base", 64, 768, 48)
    assert (c.numbers, c.cross_ids, c.global_ids) == ((("seconds_total", 0, 256),),
                                                      ("prompt", "seconds_total"), ("seconds_total",))
    model = small(causal=False, block=10, context_blocks=23, text_model="elsewhere")
    assert (model.config.causal, model.config.window, model.config.text_model) == (False, 240, "elsewhere")
    assert model.stage == "base" and not model.training
    # not a few-step "rf_denoiser"
    assert sample.sampling_settings(model) == dict(sampler="euler", steps=50, cfg=7.0)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}


def test_parameter_counts():
    for preset, dit, ids in (("sao_small", 340_879_488, 1), ("sao_1_0", 1_056_828_544, 2)):
        with torch.device("meta"):
            n = port.parameters(LMDM(PRESETS[preset]))
        assert n["DiT"] == dit and n["conditioner"] == ids * 198_272
        assert (n["encoder"], n["decoder"]) == (77_989_888, 78_122_626)


def test_port_only_new_weight_is_context_in(capsys):
    first = small().state_dict()
    torch.manual_seed(1)
    second = small().state_dict()
    assert "new: dit.context_in.weight, nothing else" in capsys.readouterr().err
    assert all(torch.equal(first[k], second[k]) for k in first)    # the same file twice: the same model twice
    dit = small().dit    # initialised from the noisy path, so after loading
    close(dit.context_in.weight[:, 1:], dit.project_in.weight @ (dit.conv_in.weight[..., 0] + torch.eye(16)))


def test_port_reads_the_original_codes_checkpoints(tmp_path):
    """A context path, self-attention in two pieces, a training wrapper around it all."""
    z, truth, weights = golden_io("sao_small_tiny"), small().state_dict(), public_small()
    new = truth["dit.context_in.weight"] = z["lmdm.to_input_add_embed.weight"]
    for key in [k for k in weights if k.endswith("to_qkv.weight")]:
        qkv, stem = weights.pop(key), key.removesuffix("to_qkv.weight")
        weights |= {stem + "to_q.weight": qkv[:128].clone(), stem + "to_kv.weight": qkv[128:].clone()}
    weights["model.model.to_input_add_embed.weight"] = new
    average = {f"diffusion_ema.ema_model.{k.removeprefix('model.')}": w for k,
               w in weights.items() if k.startswith("model.")}
    wrapped = {f"diffusion.{k}": w if "model.model." not in k else torch.zeros_like(w) for k,
               w in weights.items()}
    for name, tensors in (("split", weights), ("wrapped",
                                               wrapped | average | {"diffusion_ema.step": torch.tensor(7)})):
        model = load_stable_audio(write_public(tmp_path / name, tensors), block=12, causal=False)
        assert model.stage == "finetune" and not model.config.causal
        for k, w in model.state_dict().items():
            assert torch.equal(w, truth[k]), k
    # the objective's public name tells what it was trained for
    config = tmp_path / "split" / "model_config.json"
    config.write_text(config.read_text().replace('"rectified_flow"', '"rf_denoiser"'))
    assert load_stable_audio(tmp_path / "split").stage == "arc"
    public = json.loads(config.read_text())                 # ... and its "training" part for which stream
    masks = {"fixed_mask_size": 192, "context_router_attention_pattern": "enc-dec"}
    for more, expected in (({}, (False, 64, 3)),
                           ({"context_router_attention_pattern": "block-causal",
                             "block_causal_chunk_size": 48}, (True, 48, 4))):
        config.write_text(json.dumps({**public,
                                      "training": {"inpainting": {"mask_kwargs": {**masks, **more}}}}))
        c = load_stable_audio(tmp_path / "split").config
        assert (c.causal, c.block, c.context_blocks) == expected
        assert load_stable_audio(tmp_path / "split", block=12).config.block == 12


def test_port_reads_an_autoencoder_without_weight_norm(tmp_path):
    weights, truth = public_small(), small().state_dict()
    for key in [k for k in weights if k.endswith("weight_v")]:
        v, g = weights.pop(key).float(), weights.pop(key.removesuffix("v") + "g").float()
        weights[key.removesuffix("_v")] = g * v / v.flatten(1).norm(dim=1).view_as(g)
    model = load_stable_audio(write_public(tmp_path / "plain", weights))
    assert max((w - truth[k]).abs().max() for k, w in model.state_dict().items()) < 1e-5


def spoil(weights, kind):
    key = "model.model.transformer.layers.1.self_attn.to_qkv.weight"
    if kind == "renamed":
        weights[key.replace("to_qkv", "qkv_proj")] = weights.pop(key)
    elif kind == "missing":
        del weights[key]
    elif kind == "extra":
        weights["model.model.surprise.weight"] = torch.zeros(3)
    elif kind == "both":
        weights[key.replace("to_qkv", "to_q")] = torch.zeros(128, 128)
    elif kind == "shape":
        weights[key] = weights[key][:, :-1].clone()
    elif kind == "gain":                                    # would broadcast silently
        weights["pretransform.model.decoder.layers.0.weight_g"] = torch.ones(1, 1, 1)
    elif kind == "beta":
        weights["model.model.transformer.layers.0.ff_norm.beta"] += 1e-3
    return weights


@pytest.mark.parametrize("kind, named",
                         [("renamed", ["missing", "layers.1.self_attn.to_qkv.weight", "not understood",
                                       "qkv_proj"]),
                          ("missing", ["1 missing", "layers.1.self_attn.to_qkv.weight"]),
                          ("extra", ["1 not understood", "model.model.surprise.weight"]),
                          ("both", ["not understood", "layers.1.self_attn.to_q.weight"]),
                          ("shape", ["to_qkv.weight", "(384, 127)", "(384, 128)"]),
                          ("gain", ["decoder.layers.0.weight_g", "(1, 1, 1)"]),
                          ("beta", ["ff_norm.beta", "zeros"])])
def test_port_refuses_spoiled_weights(tmp_path, kind, named):
    with pytest.raises(UserError) as error:
        load_stable_audio(write_public(tmp_path, spoil(public_small(), kind), "model.safetensors"))
    assert all(word in str(error.value) for word in named), error.value


class Code:                                                 # unpickling it would run a command
    def __reduce__(self):
        return os.system, ("true",)


def test_port_refuses_damaged_files(tmp_path):
    def refused(folder, *words):
        with pytest.raises(UserError) as error:
            load_stable_audio(folder)
        assert all(word in str(error.value) for word in words), error.value
    weights = public_small()
    for name in ("model.safetensors", "model.ckpt"):
        folder = write_public(tmp_path / name, weights, name)
        load_stable_audio(folder / name)                    # whole, and named by the file itself
        whole = (folder / name).read_bytes()
        for keep in (len(whole) - 1, len(whole) // 2, 100, 3, 0):
            (folder / name).write_bytes(whole[:keep])
            refused(folder, str(folder / name), "truncated")
        (folder / name).unlink()
        refused(folder, "holds no model.safetensors or model.ckpt")
    torch.save({"state_dict": weights, "callbacks": Code()}, folder / "model.ckpt")
    refused(folder, "wants to run code", "system")
    torch.save(weights, folder / "model.ckpt")
    refused(folder, "state_dict")
    (folder / "model_config.json").unlink()
    refused(folder, "no model_config.json")
    refused(tmp_path / "nowhere", "nowhere")


def test_port_tells_what_a_file_is(tmp_path, tiny_file):
    """Whole files that it cannot take are not called truncated."""
    weights = public_small()
    first = next(iter(weights))

    def refused(folder, *words):
        with pytest.raises(UserError) as error:
            load_stable_audio(folder)
        assert all(word in str(error.value) for word in words), error.value
        assert "truncated" not in str(error.value), error.value
    for name in "model.safetensors", "model.ckpt":          # integers beside floats
        counted = {**weights, "model.norm.num_batches_tracked": torch.tensor(3),
                   "ema.initted": torch.tensor([True])}
        refused(write_public(tmp_path / f"counters {name}", counted, name), "2 not understood", "tracked")
        rounded = {**weights, first: weights[first].int()}
        refused(write_public(tmp_path / f"integers {name}", rounded, name), first, "not all finite floats")
        wild = {**weights, first: weights[first] * math.nan}
        refused(write_public(tmp_path / f"wild {name}", wild, name), first, "not all finite floats")
    folder = write_public(tmp_path / "bare", weights)
    torch.save(weights, folder / "model.ckpt")
    refused(folder, "bare state_dict", first)
    torch.save({"state_dict": {**weights, "epoch": 3}}, folder / "model.ckpt")
    refused(folder, "other things than tensors: epoch")
    shutil.copy(tiny_file, folder / "model.ckpt")
    refused(folder, "a checkpoint of this project already")
    torch.save([1, 2], folder / "model.ckpt")
    refused(folder, "no state_dict")
    (folder / "model.ckpt").rename(folder / "model.safetensors.part")
    refused(folder, "model.safetensors.part", "finished")
    folder = write_public(tmp_path / "kinds", weights, "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content.replace(b'"F16"', b'"F4"') if b'"F16"' in content
                                               else content.replace(b'"F32"', b'"F99"'))
    with pytest.raises(UserError):
        load_stable_audio(folder)
    (folder / "model.ckpt").write_bytes(content)            # named wrongly, but what is in it is what counts
    (folder / "model.safetensors").unlink()
    load_stable_audio(folder)
    (folder / "model_config.json").write_bytes(LFS)
    refused(folder, "model_config.json", "git lfs pull")


@pytest.mark.parametrize("option, value", [("model.diffusion.config.global_cond_type", "adaLN"),
                                           ("model.diffusion.config.num_memory_tokens", 64),
                                           ("model.diffusion.config.attn_kwargs.qk_norm", "l2"),
                                           ("model.diffusion.config.rotary_pos_emb", False),
                                           ("model.diffusion.config.input_add_dims",
                                            [["accompaniment", 16], ["mark", 1]]),
                                           ("model.diffusion.input_concat_ids", ["mask"]),
                                           ("model.pretransform.scale", 2.0),
                                           ("model.pretransform.config.bottleneck.type", "fsq"),
                                           ("model.pretransform.config.decoder.config.final_tanh", None),
                                           ("model.diffusion.diffusion_objective", "epsilon"),
                                           ("model_type", "diffusion_cond_inpaint"), ("sample_rate", None)])
def test_port_refuses_options_it_does_not_implement(tmp_path, option, value):
    """None: the option is left out, and the public default is another network."""
    folder = write_public(tmp_path, public_small())
    config = json.loads((folder / "model_config.json").read_text())
    *path, last = option.split(".")
    at = config
    for name in path:
        at = at.setdefault(name, {})
    at[last] = value
    if value is None:
        del at[last]
    (folder / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        load_stable_audio(folder)
    assert last in str(error.value)


def test_port_accepts_what_changes_no_network(tmp_path):
    folder = write_public(tmp_path, public_small())
    config = json.loads((folder / "model_config.json").read_text())
    config["training"] = {"learning_rate": 1e-5}
    config["model"]["diffusion"] |= {"diffusion_objective": "rf_denoiser", "prepend_cond_ids": [],
                                     "sampling_distribution_shift_options": None}
    config["model"]["diffusion"]["config"] |= {"postpend": True,
                                               "input_add_dims": [["inpaint_mask", 1],
                                                                  ["inpaint_masked_input", 16]]}
    # the public name beside base_model.ckpt
    (folder / "base_model_config.json").write_text(json.dumps(config))
    (folder / "model_config.json").unlink()
    (folder / "model.ckpt").rename(folder / "base_model.ckpt")
    golden = load_stable_audio(GOLDEN / "sao_small_tiny")
    assert load_stable_audio(folder / "base_model.ckpt").config == golden.config


def convert(capsys, monkeypatch, *args):
    """Run the command line in this process -> exit status, standard error."""
    monkeypatch.setattr(sys, "argv", ["stable_audio_port.py", *map(str, args)])
    capsys.readouterr()
    try:
        common.run(port.main)
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


def test_port_command(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out" / "small.pt"
    status, said = convert(capsys, monkeypatch, GOLDEN / "sao_small_tiny", "--out", out, "--no-causal",
                           "--block", 12)
    assert status == 0 and all(word in said for word in (
        "matched 430 of 430", "rectified flow", "44100 Hz", "seconds_total 0-256", "DiT 758,656", str(out)))
    model, truth = sample.load(out), small(causal=False)
    assert model.stage == "base" and model.config == truth.config
    assert all(torch.equal(w, truth.state_dict()[k]) for k, w in model.state_dict().items())
    half = tmp_path / "half.pt"
    assert convert(capsys, monkeypatch, GOLDEN / "sao_small_tiny", "--out", half, "--dtype",
                   "bfloat16")[0] == 0
    assert half.stat().st_size < 0.6 * out.stat().st_size
    weights = torch.load(half, weights_only=True)["weights"]
    assert weights["dit.inv_freq"].dtype == torch.float32
    assert weights["dit.project_in.weight"].dtype == torch.bfloat16


def test_port_command_refuses_in_one_line(tmp_path, capsys, monkeypatch):
    folder, golden = write_public(tmp_path / "spoiled",
                                  spoil(public_small(), "missing")), GOLDEN / "sao_small_tiny"
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for args in ((folder, "--out", tmp_path / "x.pt"), (tmp_path / "nowhere", "--out", tmp_path / "x.pt"),
                 (golden, "--out", tmp_path / "file" / "x.pt"), (golden, "--out", tmp_path / "folder"),
                 (golden, "--block", 0), (golden, "--text-model", tmp_path / "no-t5", "--prompts", "a",
                                          "--prompts-out", tmp_path / "p.pt")):
        status, said = convert(capsys, monkeypatch, *args)
        assert status == 2 and "error: " in said.splitlines()[-1], said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "spoiled"]  # nothing half-written
    whole = write_public(tmp_path / "whole", public_small())
    before = {f: f.read_bytes() for f in whole.iterdir()}
    (tmp_path / "link.pt").symlink_to(whole / "model.ckpt")
    for args in (("--out", whole / "model.ckpt"), ("--out", tmp_path / "link.pt"),
                 ("--out", whole / "model_config.json"),
                 ("--prompts", "a", "--out", tmp_path / "p.pt", "--prompts-out", tmp_path / "p.pt")):
        status, said = convert(capsys, monkeypatch, whole, *args)
        assert status == 2 and re.search("which is read|the same file", said.splitlines()[-1]), said
    assert {f: f.read_bytes() for f in whole.iterdir()} == before
    done = subprocess.run([sys.executable, HERE / "stable_audio_port.py", folder], capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def test_prompts_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        small().conditioner(["drums"], seconds_total=12)


def test_prompt_file_refuses_other_files(tmp_path):
    torch.save({"prompts": ["a", "b"], "embeddings": torch.zeros(1, 4, 8)}, tmp_path / "short.pt")
    for path in (tmp_path / "short.pt", tmp_path / "nowhere.pt", GOLDEN / "README.md", Path("/dev/full")):
        with pytest.raises(UserError, match="not a file of encoded prompts"):
            port.load_prompts(path)


# -------------------------------------------------------------------------------- nano.py
def test_autoencoder_starts_as_a_codec():
    """Before any training music comes back: the transforms invert each other, the principal components keep
    the energy."""
    x, basis = torch.randn(1, 1, 400), nano.mdct(4)[:, None]
    frames = torch.nn.functional.conv1d(x, basis, stride=4, padding=2)
    back = torch.nn.functional.conv_transpose1d(frames, basis, stride=4, padding=2)
    assert (x - back)[..., 4:-4].abs().max() < 1e-5
    t = torch.arange(32 * 400) / 44100
    tones = torch.tensor([[[110.0], [440.0]], [[330.0], [1000.0]], [[70.0], [700.0]]])
    audio = 0.1 * torch.sin(2 * math.pi * tones * t)        # left and right differ
    ae = tiny().autoencoder
    nano.start_as_transform(ae, audio)
    latents = ae.encode(audio)
    assert nano.snr(ae.decode(latents)[..., 500:-500], audio[..., 500:-500]) > 20
    assert 0.8 < latents.square().mean() < 1.2


def test_autoencoder_training(tmp_path, music, call):
    """It resumes where it stopped, as if it never had; the encoder stays as it was; the critic is part of it
    where asked for."""
    common.save(tiny(), tmp_path / "start.pt")
    train = lambda out, steps, weight: call(nano.main, "autoencoder", "--data", music, "--init", "start.pt",
                                            "--out", out, "--steps", steps, "--batch", 2, "--crop", 8192,
                                            "--every", 1, "--device", "cpu", "--lr", 1e-3, "--adversary",
                                            weight)[0]
    assert train("plain.pt", 2, 0) == 0
    assert train("judged.pt", 2, 1) == 0
    assert [train("resumed.pt", stop, 1) for stop in (1, 2)] == [0, 0]  # one cosine: the first step's rate is
    start, plain, judged = (sample.load(tmp_path / f"{name}.pt").autoencoder        # the same
                            for name in ("start", "plain", "judged"))
    assert all(torch.equal(p.half(), q.half()) for p, q in zip(start.encoder.parameters(),
                                                               plain.encoder.parameters()))
    moved = lambda a, b: max((p - q).abs().max().item() for p, q in zip(a.decoder.parameters(),
                                                                        b.decoder.parameters()))
    assert moved(start, plain) > 1e-6 and moved(plain, judged) > 1e-6
    unbroken, resumed = (torch.load(tmp_path / f"{name}.pt.train", weights_only=True)
                         for name in ("judged", "resumed"))
    assert resumed["step"] == 2
    assert resumed["critic"]["optimizer"]["state"][0]["step"] == 2
    for part in ("codec", "critic"):
        weights, again = resumed[part]["weights"], unbroken[part]["weights"]
        assert all(torch.equal(weights[k], again[k]) for k in weights)


def test_the_encoder_is_trained_where_asked_for(tmp_path, music, call):
    """... and at the end its latents have unit spread, half way to equal loudness, while the audio stays."""
    common.save(tiny(), tmp_path / "start.pt")
    more = tmp_path / "more"                                # a folder's only file is on both sides
    more.mkdir()
    shutil.copy(music / "tone 0.wav", more)
    assert [len(nano.read_tracks([str(more)], side, 8192)) for side in (False, True)] == [1, 1]
    (more / "b.wav").write_text("no audio")
    status, err = call(nano.main, "autoencoder", "--data", music, more, "--init", "start.pt", "--out",
                       "a.pt", "--encoder", "--steps", 2, "--batch", 2, "--crop", 8192, "--adversary", 1,
                       "--critic-from", 0.5, "--device", "cpu")
    assert status == 0 and f"left out: {more}/b.wav" in err, err
    start, trained = (sample.load(tmp_path / name).autoencoder for name in ("start.pt", "a.pt"))
    assert (start.encoder[0].weight - trained.encoder[0].weight).abs().max() > 1e-6
    audio = 0.3 * torch.randn(4, 2, 64 * TINY.hop)
    before = start.decode(start.encode(audio))
    spread = start.encode(audio).std((0, 2))
    nano.equalize(start, audio)
    latents = start.encode(audio)
    inner = slice(20 * TINY.hop, -20 * TINY.hop)            # padding is zero, which now means another latent
    assert (start.decode(latents) - before)[..., inner].abs().max() < 1e-4
    assert (latents.mean((0, 2)).abs() < 0.05).all()
    assert torch.allclose(latents.std((0, 2)), (spread / spread.mean()).sqrt(), rtol=0.05)


def test_autoencoder_losses_by_hand():
    mean, std = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, math.e]]])
    assert nano.posterior_loss(mean, std).item() == pytest.approx((0.5 + 0.5 * (math.e ** 2 - 2 - 1)) / 2)
    tone = 0.1 * torch.sin(torch.arange(16384) / 10).expand(1, 2, -1)
    assert nano.reconstruction_loss(tone, tone).item() == 0
    louder = [nano.reconstruction_loss(1.1 * tone, tone, *weights).item() for weights in ((), (6,), (5, 2))]
    assert louder[1] - louder[0] == pytest.approx(0.1, rel=1e-3)            # a tenth of its level
    assert 0 < louder[2] - louder[0] < math.log(1.1) + 1e-4                 # in bands above the floor
    # below the floor nothing is heard
    assert nano.log_spectral_distance(torch.zeros_like(tone), 1e-9 * tone) == 0
    crops = nano.draw_crops([np.ones((9000, 2), np.int16) * 3000] * 2, 50, 8192, 0, 3)
    assert crops.shape == (50, 2, 8192) and (crops.abs() <= 1).all() and crops.min() < 0 < crops.max()
    assert torch.equal(crops, nano.draw_crops([np.ones((9000, 2), np.int16) * 3000] * 2, 50, 8192, 0, 3))


def test_critic_losses_by_hand():
    real, made = [[torch.ones(2), torch.tensor([0.5, 2.0])]], [[torch.zeros(2), torch.tensor([-2.0, 0.0])]]
    assert nano.critic_loss(real, made).item() == pytest.approx(0.25 + 0.5)
    assert nano.persuasion_loss(real, made).item() == pytest.approx(1 + 2 * 1)


def test_pack_takes_a_newer_decoder(tmp_path, call):
    """... of the same encoder: with another the latents would mean something else."""
    model, newer, other, forced = tiny(), tiny(), tiny(), tiny(seed=1)
    newer.autoencoder.decoder[0].weight += 1
    other.autoencoder.encoder[0].weight += 1
    for name in ("model", "newer", "other", "forced"):
        common.save(locals()[name], tmp_path / f"{name}.pt")
    pack = lambda name: call(nano.main, "pack", "--ckpt", tmp_path / "model.pt", "--autoencoder",
                             tmp_path / f"{name}.pt", "--out", tmp_path / "packed.pt", "--steps", 4, "--cfg",
                             1.5)
    status, err = pack("other")
    assert status == 2 and "encoder" in err and not (tmp_path / "packed.pt").exists()
    assert pack("newer")[0] == 0
    packed = sample.load(tmp_path / "packed.pt")
    assert packed.sampling["steps"] == 4 and packed.sampling["cfg"] == 1.5
    assert packed.sampling["prompt"] == model.sampling["prompt"]
    assert torch.allclose(packed.autoencoder.decoder[0].weight, newer.autoencoder.decoder[0].weight,
                          atol=1e-3)
    assert torch.allclose(packed.dit.project_in.weight, model.dit.project_in.weight, atol=1e-3)
    assert call(nano.main, "pack", "--ckpt", "model.pt", "--arc", "forced.pt", "--share", 0.25, "--out",
                "packed.pt")[0] == 0
    for other in dict(depth=2), dict(causal=not TINY.causal), dict(block=TINY.block // 2):
        common.save(tiny(**other), tmp_path / "another.pt")
        status, err = call(nano.main, "pack", "--ckpt", "model.pt", "--arc", "another.pt", "--out", "no.pt")
        assert status == 2 and "other sizes" in err and not (tmp_path / "no.pt").exists()
    mixed = 0.75 * model.dit.project_in.weight + 0.25 * forced.dit.project_in.weight
    packed = sample.load(tmp_path / "packed.pt")
    assert torch.allclose(packed.dit.project_in.weight, mixed, atol=1e-3)
    assert packed.stage == "arc"    # what is finetuned from it is not, and plays with guidance again
    args = argparse.Namespace(init=tmp_path / "packed.pt", causal=None, block=None, context_blocks=None,
                              beats_per_frame=None)
    assert sample.sampling_settings(finetune.start_model(args)) == nano.AFTER_FINETUNING


# -------------------------------------------------------------------------------- band.py
SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
QUALITIES = {"": (0, 4, 7), "m": (0, 3, 7), "dim": (0, 3, 6), "7": (0, 4, 7, 10), "maj7": (0, 4, 7, 11),
             "m7": (0, 3, 7, 10), "m7b5": (0, 3, 6, 10)}


def pitch_classes(symbol):
    """Chord symbol, as "Bbm7" -> its pitch classes, the root first."""
    letter, accidental, quality = re.fullmatch(r"([A-G])([#b]?)(.*)", symbol).groups()
    root = SEMITONES[letter] + {"": 0, "#": 1, "b": -1}[accidental]
    return [(root + interval) % 12 for interval in QUALITIES[quality]]


def scale_of(key):
    tonic, mode = key.split()
    scale = band.SCALES[mode] + ((11,) if mode == "minor" else ())      # the dominant's leading tone
    return {(pitch_classes(tonic)[0] + s) % 12 for s in scale}


def pieces(count=66):
    """Pieces of all genres, with {role: part}."""
    for seed in range(count):
        piece = band.compose(random.Random(seed), list(band.GENRES)[seed % len(band.GENRES)], band.KEYS)
        roles = [role for role in band.ROLES if role[0] in piece.labels["playing"]]
        yield piece, dict(zip(roles, piece.parts, strict=True))


def test_patterns_of_the_genres():
    for genre in band.GENRES.values():
        assert set(genre.progressions) == {"major", "minor"} and set(genre.drums) <= set(band.DRUMS)
        tables = {"xog": genre.drums, "r358n": genre.bass, "xp012345": genre.chords, "x": genre.lead}
        for letters, table in tables.items():
            for names, pattern in table.items():
                assert table is genre.drums or set(names.split(", ")) <= set(band.INSTRUMENTS)
                for line in pattern.split():
                    assert len(line) in ((32,) if table is genre.lead
                                         else (16, 32)) and set(line) <= set(letters + ".-"), line
        assert all(len(fill) == 16 and set(fill) <= {".", *band.FILL} for fill in genre.fill.split())
        assert bool(genre.fill) == bool(genre.drums) == bool(genre.kits)
        assert all(len(set(progressions)) > 1 for progressions in genre.progressions.values())


def test_chords_by_hand():
    def symbols(progression, name, sevenths=False):
        key = next(key for key in band.KEYS if key.name == name)
        return " ".join(band.make_chord(numeral, key, sevenths).symbol for numeral in progression.split())
    assert symbols("i VI III VII", "A minor") == "Am F C G"
    assert symbols("i iv V iio", "G minor") == "Gm Cm D Adim"
    assert symbols("I ii V vi", "C major", True) == "Cmaj7 Dm7 G7 Am7"
    assert symbols("iio V i VII", "D minor", True) == "Em7b5 A7 Dm7 C7"
    assert symbols("IV", "Bb major") == "Eb" and symbols("VI", "C# minor") == "A"
    assert symbols("iii", "F# major") == "A#m"
    minor = next(key for key in band.KEYS if key.name == "A minor")
    assert [p % 12 for p in band.make_chord("V", minor, False).scale] == [9, 11, 0, 2, 4, 5, 8]     # G sharp


def test_notes_of_a_pattern():
    assert band.hits("x--.g.x-........", 5) == [(0, 3, "x"), (4, 1, "g"), (6, 2, "x")]
    assert band.hits("r---------------....5-----......", 1) == [(4, 6, "5")]
    assert band.hits("x" + "." * 31, 1) == []


def test_pieces_lie_on_the_grid_of_latent_frames():
    for piece, parts in pieces():
        labels = piece.labels
        beat, genre = labels["beat_frames"], band.GENRES[labels["genre"]]
        assert beat in (40, 36, 32, 28, 24, 20,
                        16) and labels["beats_per_bar"] == 4 and labels["first_beat"] == 0
        assert labels["bpm"] * beat * band.HOP == pytest.approx(60 * band.RATE)
        assert piece.frames == labels["bars"] * 4 * beat and abs(piece.frames * band.HOP / band.RATE - 48) < 2
        starts = {note.start for part in parts.values() for note in part.notes}
        assert all(isinstance(start, int) and 0 <= start < piece.frames for start in starts)
        assert any(start % beat == 0 for start in starts)
        if genre.swing == band.STRAIGHT:
            assert all(start % (beat // 4) == 0 for start in starts)
        else:
            assert any(start % beat and 4 * (start % beat) % beat for start in starts)
        ends = [note.start + note.length for part in parts.values() for note in part.notes]
        assert max(ends) < piece.frames


def test_labels_say_what_is_played():
    seen = set()
    for piece, parts in pieces():
        labels, bar_frames = piece.labels, 4 * piece.labels["beat_frames"]
        chords, playing = labels["chords"].split(), labels["playing"].split()
        names = labels["instruments"].split(";")
        assert len(chords) == len(playing) == labels["bars"] and len(set(chords)) > 2
        assert len(set(playing)) > 1 or len(names) == 1     # instruments enter and leave
        for name, (role, part) in zip(names, parts.items(), strict=True):
            assert part.drums == (role == "drums") == (name == "drums")
            assert part.drums or part.program == band.INSTRUMENTS[name]
            bars = {note.start // bar_frames for note in part.notes}
            written = {number for number, letters in enumerate(playing) if role[0] in letters}
            assert bars <= written and (role == "lead" or len(written - bars) == 0), (role, labels)
            for note in part.notes:
                number = note.start // bar_frames
                if role == "chords":
                    assert note.pitch % 12 in pitch_classes(chords[number])
                elif not part.drums:
                    assert note.pitch % 12 in scale_of(labels["key"]) and 24 <= note.pitch <= 103
            if role == "bass":
                roots = [note.pitch % 12 == pitch_classes(chords[note.start // bar_frames])[0]
                         for note in part.notes]
                assert np.mean(roots) > 0.2
        seen |= {labels["genre"], *names, labels["key"].split()[1]}
    assert {*band.GENRES, "drums", "major", "minor"} <= seen and len(seen) > 35


def test_fills_and_crashes():
    chord = band.make_chord("I", band.KEYS[0], False)
    drums = {"hat": "o.o.o.o.o.o.o.o."}
    bar = band.Bar(2, 40, band.STRAIGHT, chord, chord, True, "..........s.hm.l")
    played = [(note.start - 320, note.pitch, note.velocity) for note in band.play_drums(bar, drums)]
    # they pause from the fill's start on
    hats = [(step * 10, band.DRUMS["hat"], 82) for step in range(0, 10, 2)]
    fill = [(100, 38, 82), (120, 50, 82), (130, 47, 82), (150, 45, 82)]
    assert sorted(played) == sorted([*hats, *fill, (0, band.DRUMS["crash"], 82)])
    assert len(band.play_drums(bar._replace(crash=False, fill=""), drums)) == 8
    for piece, parts in pieces(44):
        section = 8 if piece.labels["bars"] > 16 else 4
        bar_frames = 4 * piece.labels["beat_frames"]
        crashes = {note.start for note in parts["drums"].notes
                   if note.pitch == 49} if "drums" in parts else set()
        assert crashes <= {number * bar_frames for number in range(section, piece.labels["bars"], section)}


def test_the_ride_does_not_drown_the_trio():
    heard = {"jazz trio": -10}
    genres = set()
    for piece, parts in pieces(44):
        if "drums" in parts:
            genre = piece.labels["genre"]
            genres.add(genre)
            assert parts["drums"].level == band.LEVEL["drums"] + heard.get(genre, 0)
    assert "jazz trio" in genres and len(genres) > 5


def test_prompts_keep_to_the_vocabulary():
    words = band.vocabulary()
    assert len(words) == len(set(words)) < 125 and {"c#", "bb", "rhodes", "92bpm", "161", "bpm"} <= set(words)
    piece = next(piece for piece, _ in pieces() if piece.labels["genre"] == "boom bap")
    row = {name: str(value) for name, value in piece.labels.items()}  # as read from metadata.csv
    row["instruments"] = "drums;upright bass;electric piano;flute"
    row.update(key="C minor", bpm=str(60 * 44100 / (28 * 1024)))
    assert band.prompt(row) == "boom bap, drums, upright bass, electric piano, flute, C minor, 92 bpm"
    written = [band.prompt(row, random.Random(seed)) for seed in range(300)]
    assert len(set(written)) > 150 and any("rhodes" in text for text in written) and all(written)
    assert any(not text.startswith("boom bap") for text in written)
    assert any("92" not in text for text in written)
    for piece, _ in pieces():
        for text in (band.prompt(piece.labels), band.prompt(piece.labels, random.Random(1)),
                     band.prompt(piece.labels, random.Random(2))):
            found = text.lower().replace(",", " ").split()
            assert set(found) <= set(words) and 0 < len(found) <= 16


def test_keys_have_six_signatures_or_more():
    few = [key for key in band.KEYS if key.name in band.FEW]
    assert len(few) == len(band.FEW) and {key.mode for key in few} == {"major",
                                                                       "minor"} and len(band.KEYS) == 24
    assert len({(key.tonic + (3 if key.mode == "minor" else 0)) % 12 for key in few}) >= 6
    assert all(pitch_classes(key.name.split()[0])[0] == key.tonic for key in band.KEYS)


def test_random_notes():
    piece = band.random_notes(random.Random(0))
    notes = [note for part in piece.parts for note in part.notes]
    assert any(note.start % 1 for note in notes) and all((note.start * band.HOP) % band.PERIOD == 0
                                                         for note in notes)
    assert len({note.velocity for note in notes}) > 20 and all(0 <= note.start < piece.frames
                                                               for note in notes)


def band_arguments(out, **changes):
    values = dict(out=str(out), seed=0, kind="music", genres=["techno", "house"], keys="few", hours=0.1,
                  soundfont="a.sf2", **changes)
    return type("Arguments", (), values)


def test_plan_holds_prompts_out_and_is_the_same_again(tmp_path):
    args = band_arguments(tmp_path)
    planned = band.plan(args)
    rows = [row for _, _, row in planned]
    assert planned == band.plan(args) and len({row["file_name"] for row in rows}) == len(rows)
    sides = [{row["text"] for side, _, row in planned if side == wanted}
             for wanted in ("train", "validation")]
    assert not sides[0] & sides[1] and {row["genre"] for row in rows} == {"techno", "house"}
    assert {row["key"] for row in rows} <= set(band.FEW)
    seconds = sum(row["bars"] * 4 * row["beat_frames"] * band.HOP / band.RATE for side, _,
                  row in planned if side == "train")
    assert 360 <= seconds < 410
    args.seed = 1
    assert not {row["file_name"] for row in rows} & {row["file_name"] for _, _, row in band.plan(args)}


@pytest.mark.parametrize("sizes", [nano.FULL, nano.QUICK])
def test_the_recipe_is_made_of_commands_that_the_scripts_understand(sizes, tmp_path, monkeypatch):
    """Each with its stage, in the order in which one needs the other; a folder with a space in its name. What
    was begun is gone on with."""
    folder = str(tmp_path / "my nano")
    lines = [shlex.split(line) for line in nano.commands(sizes, folder, ["my music"])]
    assert [line[0] for line in lines] == ["band.py", "band.py", "nano.py", "finetune.py", "arc_forcing.py",
                                           "nano.py", "nano.py"]
    codec, dit, arc, decoder, pack = lines[2:]
    codec, decoder, pack = (nano.parser().parse_args(line[1:]) for line in (codec, decoder, pack))
    dit, arc = finetune.parser().parse_args(dit[1:]), arc_forcing.parser().parse_args(arc[1:])
    assert codec.data == [f"{folder}/band", f"{folder}/notes", "my music"] == decoder.data
    assert dit.init == codec.out == decoder.init and arc.init == pack.ckpt == dit.out
    assert pack.arc == arc.out and pack.autoencoder == decoder.out
    assert codec.encoder and not decoder.encoder and not dit.resume and not arc.resume
    Path(dit.out).parent.mkdir()
    for script, number, first in (finetune, 3, dit), (arc_forcing, 4, arc):
        Path(first.out).touch()
        resumed = script.parser().parse_args(shlex.split(nano.commands(sizes, folder, [])[number])[1:])
        assert resumed.resume and resumed.out == first.out


def test_band_names_what_is_wrong(tmp_path, monkeypatch):
    def main(*words):
        monkeypatch.setattr(sys, "argv", ["band.py", str(tmp_path / "out"), *words])
        band.main()
    with pytest.raises(UserError, match="--genres polka"):
        main("--genres", "house,polka")
    with pytest.raises(UserError, match="fluidsynth|soundfont"):
        main("--soundfont", str(tmp_path / "missing.sf2"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(band.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(UserError, match="apt-get install fluidsynth"):
        main()


@pytest.fixture
def soundfont():
    path = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
    try:
        band.Synth(path).close()
    except UserError as error:
        pytest.skip(str(error))
    return path


def test_notes_begin_with_their_frame_and_sound_the_same_wherever_they_are(soundfont):
    starts = [3, 203, 507]
    synth = band.Synth(soundfont)
    for program, drums in ((12, False), (0, True)):
        part = band.Part(program, drums,
                         [band.Note(start, 20, 60 if not drums else 37, 108) for start in starts], 0, 0)
        audio = synth.play(part, 700)
        sounds = [audio[start * band.HOP:start * band.HOP + 100 * band.HOP] for start in starts]
        assert np.abs(sounds[0]).max() > 1e-3 and all(np.abs(s - sounds[0])[band.PERIOD:].max() < 1e-3
                                                      for s in sounds)
        heard = np.flatnonzero(np.abs(audio).max(1) > 0.02 * np.abs(audio).max())[0]
        assert 3 * band.HOP <= heard < 3 * band.HOP + 3 * band.PERIOD
    held = band.Part(48, False, [band.Note(0, 500, 60, 108)], 0, 0)
    assert synth.play(held, 20)[-1].any()
    assert not synth.play(held._replace(notes=[]), 3).any()     # nothing rings on
    synth.close()


def test_rendered_pieces_are_loud_enough_and_never_clip(soundfont, monkeypatch):
    monkeypatch.setattr(band, "SECONDS", 9)
    piece = band.compose(random.Random(2), "rock", band.KEYS)
    audio = band.render(piece, soundfont).astype(np.float32) / 32768
    assert audio.shape == (piece.frames * band.HOP, 2) and np.abs(audio).max() < 0.995
    assert -21 < 20 * np.log10(np.sqrt(np.square(audio).mean())) < -19
    assert np.abs(audio[:, 0] - audio[:, 1]).max() > 0.01                            # stereo
    np.testing.assert_array_equal(band.render(piece, soundfont), (audio * 32768).astype(np.int16))


def test_the_room_is_a_convolution():
    audio = np.random.default_rng(0).standard_normal((150000, 2)).astype(np.float32)
    response = band.room_response(0.02)[441:481]
    expected = np.stack([np.convolve(audio[:, i], response[:, i])[:len(audio)] for i in (0, 1)], 1)
    np.testing.assert_allclose(band.convolve(audio, response), expected, atol=1e-4)
    np.testing.assert_allclose(np.square(band.room_response(0.4)).sum(0), 1, rtol=1e-4)


@pytest.mark.parametrize("number, worker", [(signal.SIGINT, "chorales.start_worker, [dict(a=1, b=2)]")])
def test_workers_say_nothing_on_ctrl_c(number, worker):
    """A terminal sends it to all processes at once; only the script itself answers."""
    code = f"""
import time
from multiprocessing import Pool
import chorales, common
def main():
    with Pool(2, {worker}) as pool:
        for name in pool.imap(chorales.NOTES.get, "ab"):
            print(name, flush=True)
        pool.map(time.sleep, [60, 60])
common.run(main)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               # a shell may have it ignored
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for _ in range(2):                                      # both work
        process.stdout.readline()
    os.killpg(process.pid, number)
    assert (process.communicate(timeout=100)[1], process.returncode) == ("", 128 + number)


def test_a_run_goes_on_where_it_stopped(soundfont, tmp_path, monkeypatch):
    monkeypatch.setattr(band, "SECONDS", 4)
    monkeypatch.setattr(band, "HELD_OUT", 1)
    out = tmp_path / "out"

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["band.py", str(out), "--hours", "0.001", "--workers", "1",
                                          "--genres", "arpeggios", *words])
        band.main()
    main()
    files = sorted(out.glob("*/*.flac"))
    rows = list(csv.DictReader(open(out / "metadata.csv")))
    assert sorted(row["file_name"] for row in rows) == [f.relative_to(out).as_posix()
                                                        for f in files] and len(files) >= 2
    for row in rows:
        info = soundfile.info(out / row["file_name"])
        assert (info.samplerate, info.channels) == (44100, 2)
        assert info.frames == (int(row["bars"]) * int(row["beats_per_bar"]) * int(row["beat_frames"])
                               * band.HOP)
        held_out = row["file_name"].startswith("validation")       # others are as people write
        assert (band.prompt(row) == row["text"] if held_out else "arpeggio" in row["text"])
    first = files[0].read_bytes()
    files[0].unlink()
    files[1].write_bytes(b"kept")
    main()
    assert files[0].read_bytes() == first and files[1].read_bytes() == b"kept"
    with pytest.raises(UserError, match="other options"):
        main("--seed", "1")


# -------------------------------------------------------------------------------- measure.py
def test_frechet_by_hand():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(0))[0] * math.sqrt(499)    # mean 0, covariance exactly 1
    a = x * torch.tensor([1.0, 2, 3]) + torch.tensor([0.0, 0, 5])
    b = x.flip(0) * torch.tensor([4.0, 2, 1]) - torch.tensor([2.0, 0, 0])
    assert figures.frechet(a, b) == pytest.approx(2 ** 2 + 5 ** 2 + (1 - 4) ** 2 + (3 - 1) ** 2, rel=1e-6)
    # covariances no longer diagonal
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    assert figures.frechet(a @ turn, b @ turn) == pytest.approx(42, rel=1e-6)
    assert figures.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert figures.frechet(a, b) == pytest.approx(figures.frechet(b, a))


def melody(*pitches, each=0.5, rate=44100):
    """Decaying sines, one after another: (2, n)."""
    t = torch.arange(round(each * rate)) / rate
    return torch.cat([0.3 * torch.exp(-6 * t) * torch.sin(2 * math.pi * 440 * 2 ** (p / 12) * t)
                      for p in pitches]).repeat(2, 1)


def test_onsets_and_chroma():
    # half a second each
    assert figures.onsets_per_second(melody(0, 3, 7, 12, 0, 3, 7, 12), 44100) == pytest.approx(2, abs=0.26)
    assert figures.onsets_per_second(melody(*range(12), each=0.25), 44100) == pytest.approx(4, abs=0.35)
    assert figures.onsets_per_second(torch.zeros(2, 88200), 44100) == 0
    assert figures.chroma_change(melody(*[0] * 20), 44100) < 0.02
    assert figures.chroma_change(melody(*[0, 12, -12, 0] * 5), 44100) < 0.02    # octaves are one pitch class
    # the chord of two seconds ago is gone
    assert figures.chroma_change(melody(*([0] * 4 + [6] * 4) * 3), 44100) > 0.8
    rest = torch.zeros(2, 44100)
    rests = torch.cat([melody(0, 0), rest, melody(6, 6), rest] * 4, dim=1)    # a second each, a second apart
    assert figures.chroma_change(rests, 44100) > 0.8
    assert np.isnan(figures.chroma_change(torch.zeros(2, 4 * 44100), 44100))


def test_drift_summary_and_its_standard_errors():
    """By hand: a line's mean, ends and slope; of a mean of numbers the jackknife is the textbook's standard
    error."""
    mean, gap, slope = measure.summary(np.array([5.0, 7, 9, 11]), 30)
    assert (mean, gap) == (8, 6) and slope == pytest.approx(8)                              # 2 every 30 s
    assert measure.summary(np.arange(20.0), 10)[1] == 17    # three of twenty at each end
    x = [3.0, 4.0, 8.0, 1.0]
    both = measure.jackknife(x, lambda x: (np.mean(x), 10 * np.mean(x)))
    assert both == pytest.approx(np.array([1, 10]) * np.std(x, ddof=1) / 2)


def test_distance_by_chance():
    alike = [melody(0, 3, 7, 12, each=each) for each in (0.3, 0.4, 0.5)]
    quiet = [0.1 * a for a in alike]
    reference = torch.cat([figures.features(a, 44100) for a in alike])
    whole = measure.by_chance(alike, reference, 3, 10 ** 6, 44100, draws=2)
    assert max(whole) < 1e-3    # all recordings, whole: the reference itself
    some = measure.by_chance(alike, reference, 2, 22050, 44100, draws=6)
    assert len(set(some)) > 3 and some == measure.by_chance(alike, reference, 2, 22050, 44100, draws=6)
    assert min(measure.by_chance(quiet, reference, 3, 10 ** 6, 44100, draws=2)) > 1000    # 20 dB in 64 bands


def test_recordings_through_the_autoencoder():
    model = tiny()
    audio = torch.randn(2, 100 * model.config.hop)
    with torch.no_grad():
        expected = model.autoencoder.decode(model.autoencoder.encode(audio[None]))[0]
    assert (measure.through_autoencoder(model, audio) - expected).abs().max() < 1e-5


def spread_clicks(bpm, seconds=10, late=0.0, rate=44100):
    """A short click on every beat, `late` seconds after it: (2, n)."""
    audio = 1e-4 * torch.randn(2, round(seconds * rate), generator=torch.Generator().manual_seed(0))
    click = torch.exp(-torch.arange(400) / 60) * torch.randn(400, generator=torch.Generator().manual_seed(1))
    beats = int((seconds - 0.1) * bpm / 60)
    for beat in range(1, beats):
        at = round((beat * 60 / bpm + late) * rate)
        audio[:, at:at + 400] += 0.5 * click
    return audio


@pytest.mark.parametrize("bpm", (64.6, 92.3, 107.7, 130, 161.5))
def test_tempo_of_clicks(bpm):
    found = figures.tempo_of(spread_clicks(bpm), 44100)
    assert found == pytest.approx(bpm, rel=0.01)
    assert figures.tempo_obeyed(found, bpm, octaves=False)


def test_tempo_is_a_lag_that_repeats(monkeypatch):
    """Dotted rhythms return best after a lag that is no beat: twice and four times as late they do not."""
    similar = torch.zeros(1000)
    similar[58] = 0.9
    similar[[46, 92, 184]] = 0.6
    monkeypatch.setattr(figures, "autocorrelation", lambda audio, rate: similar)
    assert figures.tempo_of(torch.zeros(2, 441000), 44100) == pytest.approx(6000 / 46)
    similar[47] = 0.3                                       # the parabola's top lies towards it
    assert 6000 / 46.5 < figures.tempo_of(torch.zeros(2, 441000), 44100) < 6000 / 46.1


def test_tempo_where_there_is_none():
    assert math.isnan(figures.tempo_of(torch.zeros(2, 10 * 44100), 44100))
    assert math.isnan(figures.tempo_of(spread_clicks(92, seconds=5), 44100))
    assert not figures.tempo_obeyed(math.nan, 92)


def test_tempo_obeyed():
    assert figures.tempo_obeyed(95.5, 92) and not figures.tempo_obeyed(96, 92)
    assert figures.tempo_obeyed(184, 92) and figures.tempo_obeyed(46, 92)
    assert not figures.tempo_obeyed(184, 92, octaves=False)
    assert not figures.tempo_obeyed(138, 92)                # three beats for two


def cadence(tonic, mode, each=0.5, rate=44100):
    """Three chords of a key, the tonic's at both ends: triads of sines with two harmonics each, (2, n)."""
    third = 4 if mode == "major" else 3
    chords = [(0, third, 7), (5, 5 + third, 12), (7, 11, 14), (0, third, 7)] * 3
    t = torch.arange(round(each * rate)) / rate
    sound = []
    for chord in chords:
        notes = [440 * 2 ** ((48 + tonic + step - 69) / 12) for step in chord]
        sound.append(sum(torch.sin(2 * math.pi * hertz * n * t) / n for hertz in notes for n in (1, 2)))
    return 0.05 * torch.cat(sound).repeat(2, 1)


@pytest.mark.parametrize("mode", ("major", "minor"))
def test_key_of_a_cadence(mode):
    for tonic in (0, 1, 6, 9, 11):
        found = figures.key_of(cadence(tonic, mode), 44100)
        assert found == f"{figures.TONICS[tonic]} {mode}"


def test_key_obeyed():
    assert figures.key_obeyed("A minor", "C major") and figures.key_obeyed("C major", "A minor")
    assert figures.key_obeyed("Db minor", "C# minor") and figures.key_obeyed("Ab major", "F minor")
    assert not figures.key_obeyed("C minor", "C major") and not figures.key_obeyed("G major", "C major")
    with pytest.raises(ValueError, match="is not a key"):
        figures.scale_of("H major")


def test_chroma_correlation():
    """The same notes correlate, whatever plays them and however loud; other notes do not, nor the same at
    other times."""
    tune = [0, 3, 7, 12, 5, 2, 9, 4]
    played = melody(*tune * 2)
    assert figures.chroma_correlation(played, 0.1 * played, 44100) == pytest.approx(1, abs=1e-3)
    brighter = (20 * played).tanh()                         # more harmonics
    assert figures.chroma_correlation(played, brighter, 44100) > 0.7
    higher = melody(*[note + 12 for note in tune * 2])
    assert figures.chroma_correlation(played, higher, 44100) > 0.9
    assert figures.chroma_correlation(played, melody(*[note + 6 for note in tune * 2]), 44100) < 0.3
    assert figures.chroma_correlation(played, melody(*tune[::-1] * 2), 44100) < 0.3
    assert figures.chroma_correlation(played, melody(*[tune[0]] * 16), 44100) < 0.5
    fading = played * torch.logspace(0, -2, played.shape[1])
    assert figures.chroma_correlation(played, fading, 44100) > 0.95
    assert figures.chroma_correlation(played, played[:, :44100], 44100) == pytest.approx(1, abs=1e-3)


def test_beats_against_the_grid():
    beat = 60 / 92.3
    for late in (-0.02, 0, 0.015, 0.04):
        offsets = figures.beat_offsets(spread_clicks(92.3, late=late), 44100, beat)
        assert len(offsets) == 14 and (offsets - 1000 * late).abs().max() < 6
        assert figures.on_the_grid(offsets) == (abs(late) < 0.025)
    clicks = spread_clicks(92.3)
    assert len(figures.beat_offsets(clicks, 44100, beat, first=beat / 2)) == 0    # nothing within 60 ms
    assert len(figures.beat_offsets(clicks, 44100, beat, first=-3 * beat)) == 14    # any beat of the grid
    assert len(figures.beat_offsets(clicks, 44100, beat / 2)) == 14    # half of these have no onset
    assert math.isnan(figures.on_the_grid(figures.beat_offsets(torch.zeros(2, 44100), 44100, beat)))
    times, length = torch.tensor([1.0, 2.01, 2.97, 4.04]), 5.0
    assert figures.offsets_of(times, 1.0, 0.0, length).tolist() == pytest.approx([0, 10, -30, 40], abs=0.01)
    assert figures.on_the_grid(figures.offsets_of(times, 1.0, 0.0, length)) == 0.5


def test_seams_of_small_blocks_and_short_streams():
    noise = torch.randn(2, 60000)
    for block in 192, 1024, 12288:
        for samples in range(3 * block + 2000, 4 * block + 2000, 1 + block // 30):
            energy, flux = figures.seams(noise[:, :samples], block)
            assert 0.3 < energy < 3 and 0.3 < flux < 3
    assert all(map(math.isnan, figures.seams(noise[:, :40000], 49152)))


def test_seams():
    block = 20000
    noise = 0.1 * torch.randn(2, 60 * block, generator=torch.Generator().manual_seed(0))
    energy, flux = figures.seams(noise, block)
    assert energy == pytest.approx(1, abs=0.05) and flux == pytest.approx(1, abs=0.05)
    quieter, clicking, elsewhere = noise.clone(), noise.clone(), noise.clone()
    for boundary in range(block, 60 * block, block):
        quieter[:, boundary - 441:boundary + 441] *= 0.5
        clicking[:, boundary] += 5
        elsewhere[:, boundary - block // 2] += 5            # what happens within a block is no seam
    assert figures.seams(quieter, block)[0] == pytest.approx(0.25, abs=0.02)
    assert figures.seams(clicking, block)[1] > 3
    assert figures.seams(elsewhere, block)[1] < 1.1


def test_level_brightness_and_width():
    t = torch.arange(2 * 44100) / 44100
    tone = 0.5 * torch.sin(2 * math.pi * 1000 * t).repeat(2, 1)
    assert figures.level(tone) == pytest.approx(20 * math.log10(0.5) - 10 * math.log10(2), abs=0.01)
    assert figures.brightness(tone, 44100) == pytest.approx(1000, rel=0.05)
    assert figures.width(tone) == 0
    assert figures.width(tone * torch.tensor([[1.0], [0.0]])) == pytest.approx(1)
    assert figures.width(tone * torch.tensor([[1.0], [0.5]])) == pytest.approx(1 / 9)


def test_ends_of_a_stream(capsys):
    """The last seconds of a sound that gets softer, duller and narrower."""
    generator = torch.Generator().manual_seed(0)
    sound = 0.1 * torch.randn(2, 44100, generator=generator)
    dull = torch.nn.functional.avg_pool1d(sound, 3, 1, 1)
    dull = dull * (sound.square().mean() / dull.square().mean()).sqrt()
    narrow = torch.stack([dull[0], dull[0]]) * 0.5 + dull * 0.5
    soft = 0.5 * narrow * (sound.square().mean() / narrow.square().mean()).sqrt()
    reference = figures.features(sound, 44100)
    measure.compare_ends([torch.cat([sound, soft], dim=1)], reference, 44100, 1)
    said = re.search(r"distance ([\d.]+), .* level (\S+) dB, brightness (\S+) %, width (\S+) %",
                        capsys.readouterr().out)
    distance, loudness, bright, wide = map(float, said.groups())
    assert distance > 100 and loudness == pytest.approx(-6, abs=0.1)
    assert bright < -20 and wide < -50


def test_figures_of_an_autoencoder():
    real, other = torch.randn(2, 1, 2, 44100, generator=torch.Generator().manual_seed(0))
    other = other - (other * real).sum() / real.square().sum() * real       # orthogonal
    noise = other * (real.norm() / other.norm())
    for gain in (1, 0.3, -2):                               # neither level nor sign matters
        assert figures.si_sdr(gain * (real + 0.1 * noise), real) == pytest.approx(20, abs=1e-3)
    assert figures.si_sdr(real + noise, real) == pytest.approx(0, abs=1e-3)
    assert figures.log_spectral_distance(0.1 * real, real) == pytest.approx(20, abs=0.01)
    assert figures.log_spectral_distance(1e-7 * real, 1e-8 * real) == 0     # both below the floor
    assert figures.log_spectral_distance(1e-7 * real, 1e-8 * real, floor=1e-9) == pytest.approx(20, abs=0.01)


def test_nearest_genre():
    """What varies within every genre must not decide, however large it is."""
    generator = torch.Generator().manual_seed(0)
    renders = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    genres = ["left", "right", "up"] * 20
    places = {"left": (-1, 0), "right": (1, 0), "up": (0, 3)}
    common = 10 * torch.randn(60, 1, generator=generator, dtype=torch.float64) * torch.ones(1, 2)
    renders = 0.2 * renders + common + torch.tensor([places[genre] for genre in genres])
    for genre, place in places.items():
        heard = torch.tensor(place, dtype=torch.float64) + 4
        assert figures.nearest_genre(heard, renders, genres) == genre
    # a render does not vote for itself
    alone = measure.genre_of_each([{"features": renders[0]}], [0], renders[[0, 1, 2, 4, 5]],
                                  ["only one", "right", "up", "right", "up"])
    assert alone[0] in ("right", "up")


def test_genres_by_their_sound():
    sounds = [spread_clicks(bpm) for bpm in (100, 110, 120)]
    sounds += [cadence(tonic, "major", each) for tonic, each in ((0, 0.8), (2, 0.9), (5, 1.0))]
    features = torch.stack([figures.genre_features(sound, 44100) for sound in sounds])
    genres = ["clicks"] * 3 + ["chords"] * 3
    assert measure.genre_of_each([{"features": x} for x in features], range(6), features, genres) == genres
    softer = torch.stack([figures.genre_features(0.5 * sound, 44100) for sound in sounds])
    assert (softer - features).abs().max() < 0.1            # the level is no part of a genre


def test_excerpts_are_spread_over_all():
    for count in (40, 41, 79, 80, 100, 1000):
        chosen = measure.spread(list(range(count)), 40)
        assert len(set(chosen)) == 40 and chosen == sorted(chosen)
        assert max(np.diff([*chosen, count])) <= math.ceil(count / 40)
    assert measure.spread([1, 2, 3], 40) == [1, 2, 3]


def labelled_folder(folder, **spoiled):
    """Cadences, some with clicks, three held out, and metadata.csv; spoiled: other values of the first
    row."""
    rows = []
    for i in range(8):
        bpm = (92.25, 110, 130)[i % 3]
        tonic = (0, 7, 2, 9)[i % 4]
        name = f"{'validation' if i < 3 else 'train'}/{i}.wav"
        chords = cadence(tonic, "major", each=2 * 60 / bpm)[:, :8 * 44100]      # a piece of 8 s
        audio = chords if i % 2 else chords + spread_clicks(bpm, 8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, audio.T.numpy(), 44100)
        rows.append({"file_name": name, "text": "slow piano", "genre": ("clicks", "chords")[i % 2],
                     "instruments": ("drums;piano", "piano")[i % 2], "key": f"{figures.TONICS[tonic]} major",
                     "bpm": bpm, "first_beat": 0})
    rows[0].update(spoiled)
    measure.write_rows(folder / "metadata.csv", rows)
    return folder


class Table:
    """The printed table of `--obey`: table[row, column] in %."""
    def __init__(self, text):
        lines = text.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("%"))
        self.columns = lines[start].split()[1:]
        self.lines = lines[start + 1:]

    def __getitem__(self, place):
        row, column = place
        line = next(line for line in self.lines if line[:24].strip() == row)
        return int(line[24:].split()[self.columns.index(column)])


def test_obedience_of_players_that_are_known(tmp_path, monkeypatch, capsys):
    """Whoever plays the renders obeys as often as they do; whoever plays another piece does not."""
    folder = labelled_folder(tmp_path)
    tracks = [data.Track(f"{side}/{i}.wav", "slow piano", None, 0, 8 * 44100 // TINY.hop)
              for side, numbers in (("validation", range(3)), ("train", range(3, 8))) for i in numbers]
    dataset = SimpleNamespace(train=tracks[3:], validation=tracks[:3])
    renders = [measure.middle(folder, track, TINY, 8)[0] for track in tracks]
    excerpt = lambda model, track, start, seconds: measure.middle(folder, track, TINY, seconds)[0]
    monkeypatch.setattr(measure, "from_latents", excerpt)
    args = SimpleNamespace(data=folder, seconds=8, seeds=3, excerpts=10, beats=False)

    def table(played):
        monkeypatch.setattr(measure, "make_streams", lambda *_: [(renders[i], None) for i in played])
        measure.obey(tiny(), dataset, args)
        return Table(capsys.readouterr().out)

    obeyed = table([0, 1, 2])
    for row in "key or its relative", "key", "tempo, octaves allowed", "tempo", "genre":
        assert [obeyed[row, column] for column in ("streams", "decoded", "renders")] == [100] * 3
    assert obeyed["beats on the grid", "streams"] == obeyed["beats on the grid", "renders"] > 90
    assert obeyed["key", "others'"] == 0                    # all keys differ
    ignored = table([1, 0, 1])                              # keys and genres of other pieces, no clicks
    assert ignored["key", "streams"] == ignored["key or its relative", "streams"] == 0
    assert ignored["genre", "streams"] == 0 and ignored["tempo", "streams"] == 0
    assert ignored["key", "renders"] == 100


def test_streams_that_are_given_a_pitch(tmp_path, monkeypatch, capsys):
    """What is given are the stored channels of pitch, and they alone. Who plays the piece follows it."""
    folder = labelled_folder(tmp_path)
    for name in range(4, 8):
        (folder / f"train/{name}.wav").unlink()
    model = sketching()
    c = model.config
    dataset = data.prepare(folder, model, tmp_path / "latents", quiet=True)
    args = SimpleNamespace(data=folder, seconds=2, seeds=3, excerpts=1)
    excerpts = [measure.middle(folder, track, c, 2) for track in dataset.validation]
    asked = []

    def figures_of(played):
        def streams(model, prompts, seconds, args, sketch):
            asked.append(sketch(2))
            assert sketch(10 ** 6) is None                  # beyond the piece
            return [(excerpts[i][0], None) for i in played]
        monkeypatch.setattr(measure, "make_streams", streams)
        measure.follow(model, dataset, args)
        return re.findall(r"[-\d.]+(?= \+-)|\d+(?= streams;)", capsys.readouterr().out)
    followed, _, other, _ = map(float, figures_of([0, 1, 2]))
    assert followed == 1 > other + 0.1
    assert float(figures_of([1, 2, 0])[0]) < 0.9
    stored = measure.latents_of(dataset.validation[0], excerpts[0][1], 2, c)
    pitch = slice(8, 11)
    assert torch.equal(asked[0].values[0, pitch], stored[pitch, 2 * c.block:3 * c.block])
    assert asked[0].mask[pitch].all() and asked[0].mask.sum() == 3
    tracks = [track._replace(name=dataset.validation[0].name) for track in dataset.validation]
    with pytest.raises(UserError, match="two genres"):
        measure.follow(model, SimpleNamespace(train=[], validation=tracks), args)


def test_an_excerpt_from_stored_latents(tmp_path):
    """It is the same stretch of music as `middle` reads from the file."""
    folder = labelled_folder(tmp_path)
    for name in ["validation/1", "validation/2", *(f"train/{number}" for number in range(4, 8))]:
        (folder / f"{name}.wav").unlink()
    model = tiny()
    track = data.prepare(folder, model, tmp_path / "latents", quiet=True).validation[0]
    track = track._replace(start=30)
    audio, start = measure.middle(folder, track, TINY, 2)
    made = measure.from_latents(model, track, start, 2)
    expected = model.autoencoder.decode(audio_io.encode_file(model, folder / track.name)[None])[0]
    first = round(start * 44100)
    reach = audio_io.decoder_margin(TINY) * TINY.hop
    assert abs(made.shape[1] - 2 * 44100) < TINY.hop
    inner = slice(reach, made.shape[1] - reach)
    first = round(first / TINY.hop) * TINY.hop
    assert (made - expected[:, first:first + made.shape[1]])[:, inner].abs().max() < 2e-3


def beating(bpm, beats_per_bar=4, prompt="house, drums"):
    """A track of no audio with known beats."""
    return data.Track("a", prompt, Path("a.npy"), 0, 99, library.Beats(bpm, beats_per_bar, 0.0))


def test_streams_told_the_beats_of_their_tracks():
    tracks = [beating(92.0, 3), beating(120.0)]
    bpm, bar, per_bar = measure.beats_of(tracks, 3, PRESETS["nano"])(5)
    assert per_bar.tolist() == [3, 4, 3] and bpm.tolist() == [92, 120, 92] and bar.dtype == torch.float64
    seconds = 5 * PRESETS["nano"].block / PRESETS["nano"].frame_rate
    assert bar.tolist() == pytest.approx([seconds * 92 / 60 / 3 % 1, seconds * 2 / 4 % 1,
                                          seconds * 92 / 60 / 3 % 1])
    features = controls.beat_of((bpm, bar, per_bar), PRESETS["nano"], 3, "cpu")
    assert torch.equal(features[1], controls.beat_of((120, bar[1].item()), PRESETS["nano"], 1, "cpu")[0])
    with pytest.raises(UserError, match="no bpm and first_beat of a"):
        measure.beats_of([beating(92.0)._replace(beats=None)], 1, PRESETS["nano"])


def test_beats_of_the_first_and_the_last_seconds(capsys):
    """A stream a little too fast begins on the grid and leaves it; those without drums are not judged."""
    clicks = {bpm: spread_clicks(bpm, seconds=40) for bpm in (100, 100.15)}
    track = beating(100.0)
    measure.compare_beats([clicks[100]], [track], 44100, 10)
    assert ": 100 and 100 % (1 streams)" in capsys.readouterr().out
    measure.compare_beats([clicks[100.15]], [track], 44100, 10)
    assert ": 100 and 0 % (1 streams)" in capsys.readouterr().out
    measure.compare_beats([clicks[100]], [beating(100.0, prompt="ambient")], 44100, 10)
    assert not capsys.readouterr().out


def test_obey_command(tmp_path, monkeypatch, capsys):
    labelled_folder(tmp_path / "band")
    common.save(tiny(block=48), tmp_path / "long.pt")       # longer blocks, fewer of them
    monkeypatch.chdir(tmp_path)
    options = "--data band --ckpt long.pt --obey --seconds 1 --steps 1 --seeds 4 --excerpts 3 --threads 2"
    monkeypatch.setattr(sys, "argv", ["measure.py", *options.split()])
    common.run(measure.main)
    table = Table(capsys.readouterr().out)
    assert table.columns == ["streams", "decoded", "renders", "others'"]
    assert 0 <= table["genre", "streams"] <= 100


@pytest.mark.parametrize("spoiled, message", (
    ({"bpm": "fast"}, "could not convert"), ({"bpm": ""}, "could not convert"),
    ({"key": "H major"}, "'H major' is not a key")))
def test_bad_labels(spoiled, message, tmp_path, tiny_file, call):
    labelled_folder(tmp_path / "band", **spoiled)
    status, err = call(measure.main, "--data", "band", "--ckpt", tiny_file, "--obey")
    assert status == 2 and message in err and "validation/0.wav" in err


def test_labels_that_are_missing(tmp_path, music, tiny_file, call):
    status, err = call(measure.main, "--data", music, "--ckpt", tiny_file, "--obey")
    assert status == 2 and "--obey needs the labels of" in err
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "metadata.csv").write_text("file_name,text,key\na.wav,piano,C major\n")
    status, err = call(measure.main, "--data", "few", "--ckpt", tiny_file, "--obey")
    assert status == 2 and "needs the columns genre, instruments, bpm, first_beat" in err
    status, err = call(measure.main, "--data", "few", "--ckpt", tiny_file, "--obey", "--drift")
    assert status == 2 and "one at a time" in err


# -------------------------------------------------------------------------------- bench.py
def test_bench_counts_what_it_should(monkeypatch):
    """Columns that need one stream are empty with more; the floors do as many products as the networks."""
    monkeypatch.setitem(PRESETS, "tiny", replace(TINY, block=48))           # a block settles some audio
    args = SimpleNamespace(seed=0, compile=False, repeats=1)
    one, two = (bench.row("tiny", True, 2, batch, args, torch.device("cpu"), "float32") for batch in (1, 2))
    alone = {"floor", "outpaint", "decode floor", "whole"}
    assert {name for name, figure in two.items() if math.isnan(figure)} == alone
    assert not any(math.isnan(figure) for figure in one.values()) and set(one) == set(two)
    model = tiny()
    layers = sum(p.numel() for layer in model.dit.layers for name, p in layer.named_parameters()
                 if not name.startswith("cross_attention.kv"))
    assert one["weights"] == 4 * (2 * layers + sum(p.numel() for p in model.autoencoder.decoder.parameters()))


def test_bench_floor_sees_every_layer():
    model = tiny()
    cond = condition(model, "piano")
    blocks = torch.randn(1, 8, TINY.context)
    seen = bench.recorded(model.dit.layers, torch.nn.Linear,
                          lambda: latents_of(model, cond, 1, steps=1, prime=blocks))
    kinds = {id(layer) for layer, _ in seen}
    linears = {id(m) for name, m in model.dit.layers.named_modules()
               if isinstance(m, torch.nn.Linear) and "cross_attention.kv" not in name}
    assert linears <= kinds
    assert all(not layer._forward_pre_hooks for layer, _ in seen)       # nothing is left behind


# -------------------------------------------------------------------------------- the README and docs
def readme_commands():
    """Every line of the shell blocks of README and docs that runs one of our scripts or copies a file; what
    it is piped into is not ours."""
    text = "".join(page.read_text() for page in (HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))))
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M)
    lines = [re.sub(r"^OMP_NUM_THREADS=\d+ ", "", part.strip()) for block in blocks
             for line in block.replace("\\\n", " ").splitlines() for part in line.split("&&")]
    commands = [re.sub(r"\s*[|>].*", "", line) for line in lines
                if re.match(r"(python|torchrun \S+) \w+\.py|cp ", line)]
    return list(dict.fromkeys(commands))                    # once each


def test_readme_commands(tmp_path, music, call, monkeypatch):
    """In order, with tiny weights and small numbers. Without public text encoders; the recipe's own tools may
    be absent."""
    common.save(tiny(block=48), tmp_path / "nano.pt")       # longer blocks, fewer of them
    for module in (common, finetune):                       # the shipped nano.pt is what lies beside them
        monkeypatch.setattr(module, "__file__", str(tmp_path / "here.py"))
    monkeypatch.setattr(sys, "stdin", open(os.devnull))     # nobody types
    monkeypatch.setitem(sys.modules, "transformers", None)  # nobody downloads a text encoder
    for name in ("path/to/music", "data/nano"):
        shutil.copytree(music, tmp_path / name)
    labelled_folder(tmp_path / "data" / "band")
    shutil.copytree(GOLDEN / "sao_small_tiny", tmp_path / "path/to/stable-audio-open-small")
    shutil.copy(music / "tone 0.wav", tmp_path / "my_song.ogg")
    smaller = [(r"--(steps|batch|rollout) \d+", r"--\1 2"), (r"--accumulate \d+", ""),
               (r"--([dg]-)?warmup \d+", r"--\1warmup 1"), (r"out/(nano_ae|turned).pt", "nano.pt"),
               (r'"[^"]*(marimba|drums)[^"]*"', "tone")]    # what the tiny model has learned
    more = {"finetune": " --sample-every 0 --validation-crops 2 --blocks 1 --threads 1",
            "arc_forcing": " --d-warmup 1 --sample-every 0 --batch 2 --steps 2 --most 2",
            "sample": " --seconds 0.2 --out played.wav",
            "page": " --seconds 0.2 --port 0",
            "measure": " --seeds 2 --seconds 1 --steps 1 --excerpts 2",
            "bench": " --repeats 1 --threads 1 --steps 1 --regime causal --precision float32"}
    commands, ran = readme_commands(), set()
    assert len(commands) > 10
    for command in commands:
        if command.startswith("cp "):
            shutil.copy(*(tmp_path / name for name in command.split()[1:]))
            continue
        name = re.search(r"(\w+)\.py", command)[1]
        if name == "nano" and not re.search(r"nano.py (pack|evaluate)", command):
            command = re.sub(r".*nano.py (\w+)", r"python nano.py \1 --help ", command)
        for pattern, small_ in smaller:
            command = re.sub(pattern, small_, command)
        words = shlex.split(command + more.get(name, "") * ("--help" not in command)
                            + " --seconds 2 --window 1" * ("--drift" in command))
        options = words[words.index(f"{name}.py") + 1:]
        if words[0] == "torchrun":                          # one process of it: other tests start two
            options += ["--init", "nano.pt"]
        status, err = call(importlib.import_module(name).main, *options)
        refused = status == 2 and re.search(r"pip install (transformers|matplotlib|python-osc)", err)
        assert status == 0 or refused, f"{command}\n{err[-1500:]}"
        ran.add(name)
    assert {"sample", "finetune", "arc_forcing", "stable_audio_port", "measure", "nano", "bench"} <= ran


def test_walkthrough(monkeypatch):
    """The notebook's cells, but for those that need a notebook or matplotlib: its claims hold for the shipped
    model. It is stored as it was executed."""
    monkeypatch.chdir(HERE)
    cells = json.loads((HERE / "walkthrough.ipynb").read_text())["cells"]
    names = {}
    with torch.enable_grad():                               # afterwards gradients are as they were
        for cell in cells:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or "IPython" in source or "matplotlib" in source:
                continue
            assert cell["outputs"] or source.startswith("import")
            for long, short in (("blocks=12", "blocks=4, steps=2"), ("blocks=3,", "blocks=3, steps=2,"),
                                ("blocks=14", "blocks=4, steps=2"), ("seconds = 120", "seconds = 12")):
                source = source.replace(long, short)
            exec(source, names)
    assert (names["audio"] - names["whole"]).abs().max() < 1e-4
    assert max((a - b).abs().max() for a, b in zip(names["blocks"], names["slow"])) < 1e-4
