"""Everything that must always hold. Tiny random models, no network, no timing: python -m pytest -q"""
import csv
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
import finetune
import sample

from model import LMDM, PRESETS, Autoencoder, Cond, Config, UserError, add_noise, denoise, schedule, shift_time, velocity, visible

HERE = Path(__file__).parent
torch.set_num_threads(2)
torch.set_flush_denormal(True)

TINY = Config(ae_width=4, ae_strides=(2, 4, 4), ae_multipliers=(1, 2, 4), latent_channels=8, text="words", text_tokens=6,
              text_width=64, cond_width=16, width=64, depth=3, heads=2, block=6, context_blocks=3)


def tiny(seed=0, **overrides):
    """A random model whose every weight matters (no zero-initialised layer)."""
    torch.manual_seed(seed)
    model = LMDM(replace(TINY, **overrides), stage="finetune", sampling=dict(steps=3, cfg=1.0, prompt="slow piano")).eval()
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
    sample.save(tiny(), path)
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


def call(main, monkeypatch, capsys, *args):
    """A script's main in this process -> (status, standard error)."""
    monkeypatch.setattr(sys, "argv", [main.__module__ + ".py", *map(str, args)])
    try:
        sample.run(main)
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ noise, masks
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
    assert shift_time(torch.tensor(t), 1000).item() == pytest.approx(1 - math.exp(mu) / (math.exp(mu) + t / (1 - t)), abs=1e-6)
    assert shift_time(torch.tensor(1.0), 240) == 1 and shift_time(torch.tensor(0.0), 240) == 0


def test_mask_by_hand():
    """Two clean blocks (0, 1), noisy block 2, context of one block; one token each."""
    block, noisy = torch.tensor([0, 1, 2]), torch.tensor([False, False, True])
    rows = lambda causal: visible(block, noisy, block, noisy, 1, causal).int().tolist()
    assert rows(True) == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert rows(False) == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]


# ------------------------------------------------------------------------------------------------ the cache
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
    """A block by way of the cache == model.dit(x, t, cond, context) at every step, with the whole history given:
    a stream's history starts with context_blocks blocks of zeros."""
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


@pytest.mark.parametrize("causal", [True, False])
def test_a_million_frames_on(causal):
    model = tiny(causal=causal)
    memory = model.dit.memory(condition(model))
    prime, noise, out = torch.randn(2, 8, 4 * 6), torch.randn(3, 2, 8, 6), []
    for first in (0, 10 ** 6):
        context, blocks = sample.Context(model, memory, prime, first=first), []
        for x in noise:
            draw = lambda: torch.ones(2, 8, 6)
            blocks.append(sample.denoise_block(context.predict, x, schedule(2)[:-1], "pingpong", "rectified_flow", draw))
            context.append(blocks[-1])
        out.append(torch.cat(blocks, dim=-1))
    assert (out[0] - out[1]).abs().max() < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_context_does_not_depend_on_block_or_level(causal):
    model = tiny(causal=causal)
    memory, context = model.dit.memory(condition(model)), torch.randn(2, 8, 18)
    def keys(x, t):
        return model.dit.blocks(memory, x, t, (3,), context, (0, 1, 2))[1]
    a, b = keys(torch.randn(2, 8, 6), torch.full((2, 1), 0.1)), keys(torch.randn(2, 8, 6), torch.full((2, 1), 0.9))
    assert all(torch.equal(x, y) for kv, kv2 in zip(a, b) for x, y in zip(kv, kv2))
    v = [model.dit.blocks(memory, torch.zeros(2, 8, 6), torch.full((2, 1), t), (3,), context, (0, 1, 2))[0] for t in (0.1, 0.9)]
    assert (v[0] - v[1]).abs().max() > 1e-3                 # while the block itself does


def test_stream_is_reproducible_and_a_prefix():
    model = tiny()
    cond = condition(model)
    short, long = (latents_of(model, cond, n, seed=7, sampler="pingpong") for n in (3, 9))
    assert torch.equal(short, long[..., :short.shape[-1]])
    assert not torch.allclose(short, latents_of(model, cond, 3, seed=8, sampler="pingpong"))


def test_cache_does_not_grow():
    model = tiny()
    context = sample.Context(model, model.dit.memory(condition(model)), torch.zeros(2, 8, 0))
    sizes = []
    for _ in range(8):
        context.predict(torch.randn(2, 8, 6), torch.tensor(0.5))
        context.append(torch.randn(2, 8, 6))
        sizes.append((context.kv[0][0].shape[2], len(context.history)))
    assert sizes[3:] == [(18, 3)] * 5


def test_wrong_lengths_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="block is 6 frames"):
        model.dit(torch.zeros(2, 8, 5), torch.ones(2), condition(model), context=torch.zeros(2, 8, 6))
    with pytest.raises(ValueError, match="seconds_total"):
        model.conditioner(["x"])


def test_words_are_stable():
    """The ids are part of every checkpoint: they must never change. Unknown words and long prompts do no harm."""
    words = tiny().conditioner.words
    with torch.no_grad():
        words.table.weight[1:] = torch.arange(1, 65)[:, None]
    ids = words(["Slow PIANO, 120 bpm"])[0, :, 0].int().tolist()
    assert ids == [47, 12, 63, 24, 0, 0], ids
    assert words(["one two three four five six seven eight"]).shape == (1, 6, 16)


# ------------------------------------------------------------------------------------------------ streaming audio
@pytest.mark.parametrize("sizes", [[6] * 10, [1] * 60, [48, 12], [60]])
def test_streamed_decode_equals_whole(sizes):
    model = tiny()
    latents = torch.randn(1, 8, 60)
    whole = model.autoencoder.decode(latents)
    streamed = torch.cat(list(sample.decode_stream(model.autoencoder, latents.split(sizes, dim=-1))), dim=-1)
    assert streamed.shape == whole.shape and (streamed - whole).abs().max() < 1e-5


@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_margins_cover_the_receptive_field(side):
    """A change outside the margin changes nothing; one inside, a little short of it, does (so it is not far too wide)."""
    ae, hop = tiny().autoencoder, TINY.hop
    margin, T = (TINY.decoder_margin, TINY.encoder_margin)[side == "encoder"], 80
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


def test_command_line_wav(tiny_file, tmp_path):
    """Exact length; a pipe gets a true header; the short file is the start of the long one; --out says the same."""
    short, long = (script("sample.py", "--ckpt", tiny_file, "--seconds", s) for s in (0.5, 1.2))
    assert short.returncode == 0, short.stderr.decode()
    audio, rate = soundfile.read(io.BytesIO(short.stdout), dtype="int16")
    assert rate == 44100 and audio.shape == (22050, 2) and soundfile.info(io.BytesIO(short.stdout)).subtype == "PCM_16"
    assert len(short.stdout) == 44 + 4 * 22050
    assert short.stdout[44:] == long.stdout[44:len(short.stdout)]
    for name in ("a.wav", "a.flac"):
        assert script("sample.py", "--ckpt", tiny_file, "--seconds", 0.5, "--out", tmp_path / name).returncode == 0
        assert np.array_equal(soundfile.read(tmp_path / name, dtype="int16")[0], audio)


def test_streamed_file_is_the_latents_decoded_at_once(tiny_file, tmp_path):
    assert script("sample.py", "--ckpt", tiny_file, "--seconds", 0.4, "--seed", 5, "--out", tmp_path / "a.wav").returncode == 0
    model = sample.load(tiny_file)
    latents = latents_of(model, condition(model, "slow piano"), 100, seed=5)
    whole = sample.pcm(model.autoencoder.decode(latents))[:17640]
    assert np.abs(soundfile.read(tmp_path / "a.wav", dtype="int16")[0].astype(int) - whole).max() <= 1


def test_priming_continues_the_recording(tiny_file, tmp_path, music):
    """--prime: blocks made after the recording's own latents, decoded over the join."""
    track = music / "tone 0.wav"
    assert script("sample.py", "--ckpt", tiny_file, "--seconds", 0.2, "--prime", track, "--out", tmp_path / "a.wav").returncode == 0
    model = sample.load(tiny_file)
    prime = data.encode_file(model, track)[None]
    latents = latents_of(model, condition(model, "slow piano"), 100, prime=prime)
    whole = model.autoencoder.decode(torch.cat([prime, latents], dim=-1))[..., prime.shape[-1] * TINY.hop:]
    assert np.abs(soundfile.read(tmp_path / "a.wav", dtype="int16")[0].astype(int) - sample.pcm(whole)[:8820]).max() <= 1


def test_closed_pipe_and_interrupt(tiny_file, tmp_path):
    line = f"{shlex.quote(sys.executable)} {HERE}/sample.py --ckpt {tiny_file} --seconds inf | head -c 1000 | wc -c"
    done = subprocess.run(line, shell=True, capture_output=True, timeout=60)
    assert done.stdout.strip() == b"1000" and b"Traceback" not in done.stderr and b"rror" not in done.stderr
    with open(tmp_path / "a.wav", "wb") as f:
        player = subprocess.Popen([sys.executable, HERE / "sample.py", "--ckpt", tiny_file, "--seconds", "inf"], stdout=f, stderr=subprocess.PIPE)
        while os.path.getsize(tmp_path / "a.wav") < 50000:
            time.sleep(0.05)
        player.send_signal(signal.SIGINT)
        err = player.communicate(timeout=30)[1]
    assert player.returncode == 130 and b"Traceback" not in err
    size = os.path.getsize(tmp_path / "a.wav")
    assert soundfile.info(tmp_path / "a.wav").frames == (size - 44) // 4


# ------------------------------------------------------------------------------------------------ checkpoints
def test_save_and_load(tmp_path):
    model = tiny(causal=False)
    sample.save(model, tmp_path / "a.pt", step=5)
    again = sample.load(tmp_path / "a.pt")
    assert again.config == model.config and again.stage == "finetune" and again.sampling == model.sampling
    cond = condition(model)
    assert torch.equal(latents_of(model, cond, 3), latents_of(again, condition(again), 3))
    assert not list(tmp_path.glob("*.part"))


def test_presets_round_trip_and_geometry():
    for config in PRESETS.values():
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    small = PRESETS["sao_small"]
    assert (small.hop, small.window, small.context, small.stream_numbers) == (2048, 240, 192, {"seconds_total": 12})


BAD = [
    (sample.main, ["--ckpt", "{tmp}/none.pt"], "no checkpoint at"),
    (sample.main, ["--ckpt", "{tmp}/corrupt.pt"], "not a readable checkpoint"),
    (sample.main, ["--ckpt", "{tmp}/other.pt"], "not a checkpoint of this project"),
    (sample.main, ["--ckpt", "{tmp}/shape.pt"], "project_in.weight is"),
    (sample.main, ["--ckpt", "{tmp}/missing.pt"], "context_in.weight missing"),
    (sample.main, ["--ckpt", "{tiny}", "--seconds", "0"], "not positive"),
    (sample.main, ["--ckpt", "{tiny}", "--seconds", "nan"], "not positive"),
    (sample.main, ["--ckpt", "{tiny}", "--steps", "0"], "less than 1"),
    (sample.main, ["--ckpt", "{tiny}", "--sampler", "magic"], "invalid choice"),
    (sample.main, ["--ckpt", "{tiny}", "--sec", "3"], "unrecognized"),
    (sample.main, ["--ckpt", "{tiny}", "--out", "{tmp}/no/such/a.wav"], "cannot write"),
    (sample.main, ["--ckpt", "{tiny}", "--out", "{tmp}/a.xyz"], "must end in .wav or .flac"),
    (sample.main, ["--ckpt", "{tiny}", "--prime", "{tmp}/none.wav", "--out", "{tmp}/a.wav"], "no such file"),
    (sample.main, ["--ckpt", "{tiny}", "--device", "warp", "--out", "{tmp}/a.wav"], "warp"),
    (finetune.main, ["--init", "{tiny}"], "--data is missing"),
    (finetune.main, ["--init", "{tiny}", "--data", "{tmp}/nowhere"], "no such folder"),
    (finetune.main, ["--init", "{tiny}", "--data", "{tmp}/empty"], "no readable audio"),
    (finetune.main, ["--init", "{tiny}", "--data", "{tmp}/text"], "no readable audio"),
    (finetune.main, ["--init", "{tiny}", "--data", "{tmp}/text", "--batch", "3", "--accumulate", "2"], "does not divide"),
    (finetune.main, ["--resume", "--out", "{tiny}"], "no training to resume"),
]


@pytest.mark.parametrize("main, args, message", BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_input(main, args, message, tiny_file, tmp_path, monkeypatch, capsys):
    """One line that names the thing, status 2, no traceback, nothing half-written."""
    (tmp_path / "corrupt.pt").write_bytes(b"PK\x03\x04 not a zip")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    saved = torch.load(tiny_file, weights_only=True)
    weights = saved["weights"]
    torch.save({**saved, "weights": {**weights, "dit.project_in.weight": torch.zeros(3, 3)}}, tmp_path / "shape.pt")
    torch.save({**saved, "weights": {k: v for k, v in weights.items() if "context_in" not in k}}, tmp_path / "missing.pt")
    for folder in ("empty", "text"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text" / "song.wav").write_text("not audio")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    status, err = call(main, monkeypatch, capsys, *(a.format(tmp=tmp_path, tiny=tiny_file) for a in args))
    lines = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in err, err
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and "out" not in p.parts] == []


def test_terminal_is_refused(tiny_file):
    import pty
    master, slave = pty.openpty()
    done = subprocess.run([sys.executable, HERE / "sample.py", "--ckpt", tiny_file, "--seconds", "1"], stdout=slave, stderr=subprocess.PIPE)
    os.close(slave), os.close(master)
    assert done.returncode == 2 and b"terminal" in done.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------------------------ finetuning
def test_parallel_loss_equals_one_window_at_a_time():
    """The blocks of a crop learned at once == each alone, noisy at the end of its whole clean history."""
    model = tiny(causal=True)
    c, m = model.config, 4
    latents, noise, t = torch.randn(2, 8, 7 * 6), torch.randn(2, 8, m * 6), torch.rand(2, m)
    memory = model.dit.memory(condition(model))
    together = finetune.block_losses(model, memory, latents, noise, t)
    for i in range(m):
        alone = finetune.block_losses(model, memory, latents[..., :(4 + i) * 6], noise[..., i * 6:(i + 1) * 6], t[:, i:i + 1])
        assert (together[:, i:i + 1] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_loss_is_the_stream_s_own_prediction(causal):
    """What is trained is what plays: the loss's v for the last block is `Context.predict`'s."""
    model = tiny(causal=causal)
    memory, latents, noise, t = model.dit.memory(condition(model)), torch.randn(2, 8, 24), torch.randn(2, 8, 6), torch.tensor(0.4)
    loss = finetune.block_losses(model, memory, latents, noise, t.expand(2, 1))
    x0 = latents[..., -6:]
    v = sample.Context(model, memory, latents[..., :-6]).predict(add_noise(x0, noise, t, "rectified_flow"), t)
    assert ((v - (noise - x0)).square().mean((1, 2)) - loss[:, 0]).abs().max() < 1e-5


def test_context_dropout_shares():
    rng, n = np.random.default_rng(0), 20000
    gone = finetune.missing_context(rng, n, replace(TINY, causal=False, context_blocks=4))
    share = np.bincount(gone, minlength=5) / n
    assert np.allclose(share, [0.5, 0.075, 0.075, 0.075, 0.275], atol=0.01)
    gone = finetune.missing_context(rng, n, replace(TINY, causal=True, context_blocks=4))
    assert set(gone) == {0, 4} and abs((gone == 4).mean() - 0.5) < 0.01


TRAIN = ["--steps", 4, "--batch", 4, "--blocks", 2, "--every", 1, "--validation-crops", 4, "--sample-every", 0,
         "--precision", "float32", "--lr", "1e-3", "--threads", 1]


def rows_of(path):
    with open(path) as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


@pytest.mark.parametrize("causal", ["--causal", "--no-causal"])
def test_kill_and_resume_equals_unbroken(causal, tiny_file, music, tmp_path):
    """kill -9 somewhere after step 2, then --resume: the same losses to the last digit, the same weights."""
    args = ["--init", tiny_file, "--data", music, causal, *TRAIN]
    assert (done := script("finetune.py", *args, "--out", "a/ft.pt", cwd=tmp_path)).returncode == 0, done.stderr.decode()
    broken = subprocess.Popen([sys.executable, HERE / "finetune.py", *map(str, args), "--out", "b/ft.pt"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    log = tmp_path / "b" / "ft.csv"
    while not (log.exists() and any(row["step"] >= "2" for row in rows_of(log))):
        time.sleep(0.01)
    broken.kill()
    broken.wait()
    assert script("finetune.py", "--resume", "--out", "b/ft.pt", cwd=tmp_path).returncode == 0
    assert rows_of(log) == rows_of(tmp_path / "a" / "ft.csv") and len(rows_of(log)) == 5
    a, b = (torch.load(tmp_path / side / "ft.pt", weights_only=True) for side in "ab")
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])
    start = torch.load(tiny_file, weights_only=True)["weights"]
    moved = [k for k in start if not torch.equal(start[k], a["weights"][k])]
    assert moved and not any(k.startswith("autoencoder") for k in moved) and "dit.context_in.weight" in moved


def test_accumulation_checkpointing_and_processes_change_nothing(tiny_file, music, tmp_path):
    """One step: plain; in two accumulations; with activation checkpointing; on two processes."""
    args = ["--init", tiny_file, "--data", music, *TRAIN, "--steps", 1]
    assert script("finetune.py", *args, "--out", "a.pt", cwd=tmp_path).returncode == 0
    assert script("finetune.py", *args, "--out", "b.pt", "--accumulate", 2, cwd=tmp_path).returncode == 0
    assert script("finetune.py", *args, "--out", "c.pt", "--remat", cwd=tmp_path).returncode == 0
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29631", HERE / "finetune.py", *args, "--out", "d.pt"]
    done = subprocess.run(list(map(str, run)), cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    a, *others = (rows_of(tmp_path / f"{name}.csv")[-1] for name in "abcd")
    start = rows_of(tmp_path / "a.csv")[0]
    assert a["validation"] != start["validation"]
    for other in others:                                    # the loss before the update, and the validation after it
        assert float(other["validation"]) == pytest.approx(float(a["validation"]), abs=1e-5)
    assert float(others[0]["loss"]) == pytest.approx(float(a["loss"]), abs=1e-5)
