"""The recipe of `nano.pt`, the small model that ships with this repository. Each stage runs alone and can be resumed:

    python nano.py data           # public-domain scores (Bach chorales) -> audio and prompts
    python nano.py autoencoder --steps 4500 --batch 32 --crop 32768
    python finetune.py --init out/nano_ae.pt --data data/nano --out out/nano.pt --causal --steps 2400 --batch 64 \
        --lr 1e-3 --lr-end 1e-5 --warmup 100 --shift 1.5
    python arc_forcing.py --init out/nano.pt --base none --rollout 4 --most 4 --steps 300 --batch 16 --lr 1e-5 --d-lr 2e-5 \
        --d-warmup 150 --warmup-lr 2e-4 --no-remat
    python nano.py pack --arc out/arc.pt --share 0.15 --steps 6 --autoencoder out/nano_ae.pt    # float16 -> nano.pt

What ships went on from there, by one more round with a guided teacher (docs/nano.md).

A GPU needs ten minutes for it; two CPU cores, with smaller batches and `OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 nano.py
autoencoder --threads 1`, an afternoon.
`data` needs fluidsynth with its General MIDI soundfont (Debian: fluidsynth fluid-soundfont-gm) and `pip install music21`.
"""
import argparse
import contextlib
import csv
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchaudio.functional import melscale_fbanks

from audio import read_audio
from common import UserError, finite, load, random_seed, read_checkpoint, run, save, save_whole, speed, whole, writable
from data import audio_files, split
from finetune import average_gradients, micro_rows, start_processes
from model import LMDM, PRESETS, ResidualUnit, SnakeBeta
from sample import SAMPLERS

INSTRUMENTS = {"marimba": 12}                               # General MIDI programs
# latent frames per beat. Every note begins with a frame: then the same note is the same latents whenever it is played,
# its phases too, and a small transformer can learn the notes themselves
TEXTURES = {"chorale": {"slow": 48, "moderate": 32, "fast": 24}, "arpeggios": {"slow": 64, "moderate": 48, "fast": 32}}
HOP, RATE = PRESETS["nano"].hop, PRESETS["nano"].sample_rate
PATTERNS = (0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 2), (0, 3, 1, 2)     # of an arpeggio's four notes a beat, 0 the lowest
PITCHES, NOTE_SECONDS = range(28, 100), 5
AFTER_FINETUNING = dict(steps=16, cfg=4.5, sampler="euler")    # what a model finetuned from nano.pt plays best with: it needs guidance
NOTES = {}                                                  # {instrument: {pitch: int16 (samples, 2)}}, in each worker


# -------------------------------------------------------------------------------- scores -> audio
def read_chorale(path):
    """A chorale of music21's corpus, moved to C major or A minor -> (key name, beats, notes [(beat, pitch, voice)])."""
    from music21 import corpus
    score = corpus.parse(path)
    parts = list(score.parts)
    if len(parts) != 4:
        return None
    key = score.analyze("key")
    shift = ((0 if key.mode == "major" else 9) - key.tonic.pitchClass + 5) % 12 - 5
    notes = [(float(n.getOffsetInHierarchy(part)), float(n.quarterLength), pitch.midi + shift, voice)
             for voice, part in enumerate(parts) for n in part.stripTies().recurse().notes for pitch in n.pitches]
    return "C major" if key.mode == "major" else "A minor", max(start + length for start, length, _, _ in notes), notes


def arpeggiate(notes, beats, rng):
    """Break each beat's chord into sixteenths, in two patterns of the piece's own, in turns."""
    out, patterns = [], rng.choices(PATTERNS, k=2)
    for beat in range(int(beats)):
        chord = sorted({pitch for start, length, pitch, _ in notes if start < beat + 0.99 and start + length > beat + 0.01})
        order = [(chord * 4)[i] for i in patterns[beat % 2]] if chord else []
        out += [(beat + i / 4, 1, pitch, 0 if i == 0 else 1) for i, pitch in enumerate(order)]
    return out


def write_midi(path, program):
    """All pitches, one after the other, at 480 ticks a second."""
    track, step = bytearray([0, 0xC0, program, 0, 0xFF, 0x51, 3]) + round(1e6).to_bytes(3, "big"), 480 * NOTE_SECONDS
    delta = lambda ticks: bytes([ticks >> 7 | 128, ticks & 127])            # variable-length quantity, below 16384
    for pitch in PITCHES:
        track += bytes([0, 0x90, pitch, 84]) + delta(step - 240) + bytes([0x80, pitch, 0]) + delta(240) + bytes([0xB0, 120, 0])       # all sound off
    track += b"\x00\xff\x2f\x00"
    Path(path).write_bytes(b"MThd" + struct.pack(">IHHH", 6, 0, 1, 480) + b"MTrk" + struct.pack(">I", len(track)) + track)


def sample_notes(program, soundfont):
    """{pitch: int16 (samples, 2)}: what fluidsynth makes of each note, held until it has died away."""
    with tempfile.TemporaryDirectory() as tmp:
        midi, wav = f"{tmp}/a.mid", f"{tmp}/a.wav"
        write_midi(midi, program)
        subprocess.run(["fluidsynth", "-ni", "-q", "-r", str(RATE), "-g", "0.8", "-R", "0", "-C", "0", "-F", wav, "-T", "wav",
                        soundfont, midi], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        audio = soundfile.read(wav, dtype="int16", always_2d=True)[0]
    n = NOTE_SECONDS * RATE
    notes = {pitch: audio[i * n:(i + 1) * n - RATE // 20] for i, pitch in enumerate(PITCHES)}
    return {pitch: note[:1 + note.any(1).nonzero()[0].max(initial=0)] for pitch, note in notes.items()}


def share_notes(notes):                                     # what each worker starts with
    NOTES.update(notes)


def render(job):
    """One performance of a score -> one FLAC file. Returns (file name, prompt), or None where the score has not four parts."""
    score, index, performance, folder = job
    rng = random.Random(1000 * performance + index)
    instrument, texture = list(NOTES)[index % len(NOTES)], list(TEXTURES)[(index // len(NOTES) + performance) % 2]
    speed, frames = rng.choice(list(TEXTURES[texture].items()))
    target = folder / f"{index:03d}{chr(97 + performance)}_{texture}_{instrument.replace(' ', '_')}.flac"
    chorale = read_chorale(score)
    if chorale is None:
        return None
    key, beats, notes = chorale
    if texture == "arpeggios":
        notes = arpeggiate(notes, beats, rng)
    if not target.exists():
        audio = np.zeros((int((beats + 2) * frames) * HOP, 2), np.float32)
        for start, _, pitch, voice in notes:
            at, note = round(start * frames) * HOP, NOTES[instrument][pitch]
            audio[at:at + len(note)] += note[:len(audio) - at] * (1.4 if voice == 0 else 1.05)
        part = target.with_suffix(".part")
        soundfile.write(part, audio.clip(-32767, 32767).round().astype(np.int16), RATE, format="FLAC", subtype="PCM_16")
        part.rename(target)
    return f"{folder.name}/{target.name}", f"{speed} {texture} in {key} on {instrument}"


def make_data(args):
    """Render the first `--tracks` chorales that have four parts to `--data`, with metadata.csv.

    One in sixteen is held out, in a folder `validation`; of the others `--performances` are made, each with its own texture,
    speed and patterns."""
    if not shutil.which("fluidsynth"):
        raise UserError("fluidsynth is not installed: on Debian, apt-get install fluidsynth fluid-soundfont-gm")
    if not Path(args.soundfont).exists():
        raise UserError(f"no soundfont at {args.soundfont}: name one with --soundfont")
    try:
        from music21 import corpus
    except ImportError:
        raise UserError("the scores come from music21: pip install music21")
    folder = Path(args.data)
    scores = [str(p) for p in corpus.getComposer("bach") if p.stem.startswith("bwv")]
    scores.sort()
    random.Random(0).shuffle(scores)
    held_out, jobs = set(split([Path(s).stem for s in scores[:args.tracks]])[1]), []
    for i, score in enumerate(scores[:args.tracks]):
        side = "validation" if Path(score).stem in held_out else "train"
        (folder / side).mkdir(parents=True, exist_ok=True)
        jobs += [(score, i, performance, folder / side) for performance in range(1 if side == "validation" else args.performances)]
    started, rows = time.time(), []
    notes = {name: sample_notes(program, args.soundfont) for name, program in INSTRUMENTS.items()}
    with Pool(args.workers, share_notes, (notes,)) as pool:
        for row in pool.imap(render, jobs):
            if row:
                rows.append(row)
                print(f"{len(rows):4d} {row[0]}: {row[1]}", file=sys.stderr)
    with open(folder / "metadata.csv", "w", newline="") as f:
        csv.writer(f).writerows([("file_name", "text"), *rows])
    hours = sum(soundfile.info(folder / name).duration for name, _ in rows) / 3600
    print(f"{len(rows)} tracks, {hours:.2f} h in {folder}, {time.time() - started:.0f} s", file=sys.stderr)


# -------------------------------------------------------------------------------- autoencoder
def mid_side(audio):                                        # (B, 2, n) -> (B, 4, n): left, right, mid, side
    left, right = audio.unbind(1)
    return torch.stack([left, right, (left + right) / 2, (left - right) / 2], dim=1)


def magnitudes(audio, size):                                # (B, channels, n) -> (B * channels, size / 2 + 1, frames)
    return spectrum(audio, size).abs()


def spectrum(audio, size):                                  # (B, channels, n) -> complex, as `magnitudes`
    return torch.stft(audio.flatten(0, 1), size, size // 4, window=torch.hann_window(size, device=audio.device), return_complex=True)


@lru_cache
def mel_bands(bins, device):                                # (bins / 16, bins)
    return melscale_fbanks(bins, 30, RATE / 2, (bins - 1) // 16, RATE).T.to(device)


def mel(magnitude):                                         # (B, size / 2 + 1, frames) -> (B, size / 32, frames)
    return mel_bands(magnitude.shape[1], magnitude.device) @ magnitude


def reconstruction_loss(made, real):
    """Log, log-mel and linear magnitudes at four resolutions, on left, right, mid and side, and the waveform, which keeps phases."""
    loss = (made - real).square().mean().sqrt() / real.square().mean().sqrt().clamp(min=1e-3)
    made4, real4 = mid_side(made), mid_side(real)
    for size in (4096, 2048, 1024, 256):
        a, b = magnitudes(made4, size), magnitudes(real4, size)
        loss = loss + (a.clamp(min=1e-5).log() - b.clamp(min=1e-5).log()).abs().mean() / 4
        loss = loss + (mel(a).clamp(min=1e-3).log() - mel(b).clamp(min=1e-3).log()).abs().mean() / 4
        loss = loss + (a - b).abs().mean() / b.mean().clamp(min=1e-3) / 4
    return loss


def log_spectral_distance(made, real):
    """Mean |difference| of 20 log10 of 2048-point STFT magnitudes, floor 1e-5, in dB. (B, 2, n) each."""
    a, b = (magnitudes(x, 2048).clamp(min=1e-5).log10() for x in (made, real))
    return 20 * (a - b).abs().mean().item()


def snr(made, real):
    """Waveform signal-to-noise ratio in dB."""
    return 10 * torch.log10(real.square().sum() / (made - real).square().sum()).item()


def read_tracks(folder, validation, longer, most=350):
    """Tracks of one side of the split, at most so many, evenly spread, as int16 arrays (n, 2).

    What cannot be read or is no longer than `longer` samples is left out; UserError where nothing remains."""
    names, tracks = split([f.relative_to(folder).as_posix() for f in audio_files(folder)])[validation], []
    for name in names[::max(1, math.ceil(len(names) / most))]:      # of four performances one: the sounds are the same
        with contextlib.suppress(UserError):
            audio = torch.cat(list(read_audio(Path(folder, name), PRESETS["nano"])), dim=1)
            tracks.append((audio.T * 32768).round().clamp(-32768, 32767).short().numpy())
    tracks = [track for track in tracks if len(track) > longer]
    if not tracks:
        raise UserError(f"{folder}: no readable audio of more than {longer} samples {'held out' if validation else 'to train on'}")
    return tracks


def to_audio(samples):                                      # int16 (n, 2) -> (2, n)
    return torch.from_numpy(samples.T.astype(np.float32) / 32768)


@torch.no_grad()
def validate_autoencoder(autoencoder, tracks):
    """Log-spectral distance and SNR in dB over ten seconds of each held-out track."""
    n, device = 10 * RATE, next(autoencoder.parameters()).device
    pairs = [(autoencoder.decode(autoencoder.encode(x)), x) for x in
             (to_audio(t[max(0, len(t) - n) // 2:][:n])[None].to(device) for t in tracks)]
    pairs = [(made, real[..., :made.shape[-1]]) for made, real in pairs]
    return np.mean([log_spectral_distance(*p) for p in pairs]), np.mean([snr(*p) for p in pairs])


def mdct(size):
    """The basis of the modified discrete cosine transform, (size, 2 size): frames overlap by half, its transpose inverts it."""
    n, k = torch.arange(2 * size) + 0.5, torch.arange(size)[:, None] + 0.5
    return math.sqrt(2 / size) * torch.sin(math.pi * n / (2 * size)) * torch.cos(math.pi / size * (n + size / 2) * k)


def principal_components(x, n):
    """Features (B, F, T) -> the n directions that hold most of their energy (n, F), and the RMS along each (n,)."""
    x = x.transpose(0, 1).flatten(1).double()
    energy, directions = torch.linalg.eigh(x @ x.T / x.shape[1])
    return directions.T.flip(0)[:n].float(), energy.flip(0)[:n].clamp(min=1e-8).sqrt().float()


@torch.no_grad()
def start_as_transform(autoencoder, audio):
    """Make the autoencoder a linear codec fitted to `audio`: from there training has only to improve on it.

    Each strided convolution becomes a lapped transform followed by the principal components of what comes out of it, the
    decoder's the transpose. What is not linear starts as (nearly) nothing: the snakes' sine damped to a twentieth, residual units silent.
    From a random start the same network first has to discover that a latent must carry phase for a pitch to survive."""
    for layer in [*autoencoder.encoder, *autoencoder.decoder]:
        if isinstance(layer, SnakeBeta):
            layer.beta.fill_(3)
        elif isinstance(layer, ResidualUnit):
            nn.init.zeros_(layer.layers[3].weight)
            nn.init.zeros_(layer.layers[3].bias)
        else:
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    first, *down, last = (m for m in autoencoder.encoder if isinstance(m, nn.Conv1d))
    decoder_last, *up, decoder_first = reversed([m for m in autoencoder.decoder if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d))])
    for conv in (first, decoder_last):
        conv.weight[:, :, 3] = torch.eye(*conv.weight.shape[:2])
    x = first(audio)
    for conv, back in zip(down, up):
        basis = mdct(conv.stride[0]).to(x)
        bands = F.conv1d(x.flatten(0, 1)[:, None], basis[:, None], stride=conv.stride, padding=conv.padding)
        directions, _ = principal_components(bands.unflatten(0, x.shape[:2]).flatten(1, 2), conv.out_channels)
        conv.weight.copy_(torch.einsum("ocb,bk->ock", directions.unflatten(1, (x.shape[1], -1)), basis))
        back.weight.copy_(conv.weight)
        x = conv(x)
    C = decoder_first.in_channels
    directions, rms = principal_components(x, C)
    scale = rms.sqrt() * rms.mean().sqrt()                  # half way to equal loudness of all channels, 1 on the whole
    last.weight[:C, :, 1] = directions / scale[:, None]
    last.bias[C:] = -2                                      # the posterior: a standard deviation of 0.13
    decoder_first.weight[:, :, 3] = directions.T * scale


class Critic(nn.Module):
    """Scores patches of complex spectrograms at three resolutions, real high and made low (EnCodec, arXiv 2210.13438)."""
    def __init__(self, width=32, sizes=(2048, 1024, 512)):
        super().__init__()
        conv = lambda n, m, kernel, stride=1, dilation=1: weight_norm(nn.Conv2d(
            n, m, kernel, (stride, 1), [d * (k - 1) // 2 for k, d in zip(kernel, (1, dilation))], (1, dilation)))
        self.sizes, self.stacks = sizes, nn.ModuleList(nn.ModuleList(
            [conv(4, width, (9, 3)), *(conv(width, width, (9, 3), 2, dilation) for dilation in (1, 2, 4)),
             conv(width, width, (3, 3)), conv(width, 1, (3, 3))]) for _ in sizes)

    def forward(self, audio):                               # (B, 2, n) -> for each resolution, what each layer makes
        out = []
        for size, stack in zip(self.sizes, self.stacks):
            z = spectrum(audio, size).unflatten(0, (-1, 2))
            z = torch.view_as_real(z / (z.abs() + 1e-4) ** 0.7)     # quiet partials count too
            x, made = z.permute(0, 1, 4, 2, 3).flatten(1, 2), []    # (B, 4, frequencies, frames)
            for i, layer in enumerate(stack):
                x = layer(x if i == 0 else F.leaky_relu(x, 0.2))
                made.append(x)
            out.append(made)
        return out


def critic_loss(real, made):
    """Hinge: max(0, 1 - D(real)) + max(0, 1 + D(made))"""
    return sum(F.relu(1 - a[-1]).mean() + F.relu(1 + b[-1]).mean() for a, b in zip(real, made)) / len(real)


def persuasion_loss(real, made):
    """-D(made), and how far the critic's features are from those of the real, relative to their size."""
    apart = [(x - y).abs().mean() / y.abs().mean() for a, b in zip(real, made) for x, y in zip(b[:-1], a[:-1])]
    return sum(-b[-1].mean() for b in made) / len(made) + 2 * sum(apart) / len(apart)


def train_autoencoder(args):
    """Train the decoder alone, from `--init` or a linear start; run again to go on from the last `--out`.train.

    The encoder stays as it is, so latents never change: the DiT can be trained before the decoder is done."""
    rank, world, device = start_processes(args.device)
    rows, = micro_rows(args.batch, 1, world, rank)
    torch.manual_seed(args.seed)
    out, state = writable(args.out), Path(f"{args.out}.train")
    out.parent.mkdir(parents=True, exist_ok=True)
    model = load(args.init) if args.init else LMDM(PRESETS["nano"])
    model.stage, model.sampling, config = "autoencoder", {}, model.config
    autoencoder, decoder = model.autoencoder.to(device), model.autoencoder.decoder
    if speed:
        speed.lay_out(autoencoder)
    say = lambda text: rank or print(text, file=sys.stderr, flush=True)
    made = " ".join(["nano.py", *sys.argv[1:]])
    if args.crop % config.hop or args.crop <= 2048:         # half of the loss's longest spectrum
        raise UserError(f"--crop {args.crop}: it takes a multiple of {config.hop} samples, above 2048")
    train, held_out = (read_tracks(args.data, side, args.crop) for side in (False, True))
    critic, start = Critic().to(device), 0
    adam = lambda player: torch.optim.AdamW(player.parameters(), lr=args.lr, betas=(0.8, 0.99), weight_decay=1e-3, fused=True)
    optimizer, critic_optimizer = adam(decoder), adam(critic)
    if state.exists():
        saved = torch.load(state, weights_only=True)
        autoencoder.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        critic.load_state_dict(saved["critic"])
        critic_optimizer.load_state_dict(saved["critic_optimizer"])
        start = saved["step"]
    elif not args.init:
        part = slice(5 * RATE, 5 * RATE + 2 ** 17)
        parts = [to_audio(t[part]) for t in train if len(t) >= part.stop][:96]
        if not parts:
            raise UserError(f"{args.data}: a linear start is fitted to tracks of {part.stop / RATE:.0f} s or more, and there is none; take --init")
        start_as_transform(autoencoder, torch.stack(parts).to(device))
        for parameter in autoencoder.parameters():          # the precision of the packed file, so that latents stay those
            parameter.data = parameter.data.half().float()
        if not rank:
            save(model, out, 0, made, torch.float16)
            say("linear start, held out: log-spectral distance {:.2f} dB, SNR {:.1f} dB".format(*validate_autoencoder(autoencoder, held_out)))
    if world > 1:                                           # the transform is only found up to signs: everyone takes the first's
        for tensor in autoencoder.state_dict().values():
            dist.broadcast(tensor, 0)
    autoencoder.encoder.requires_grad_(False)
    say(f"decoder: {sum(p.numel() for p in decoder.parameters()) / 1e6:.1f} M parameters, {config.hop} samples a frame; "
        f"{len(train)} tracks, {len(held_out)} held out; from step {start} of {args.steps}, {world} processes, {device.type}")
    share = np.array([len(t) for t in train]) / sum(map(len, train))

    def draw(step):                                         # the same crops whether or not the run was interrupted
        rng = np.random.default_rng([args.seed, step])
        tracks = [train[i] for i in rng.choice(len(train), args.batch, p=share)]
        starts = [rng.integers(len(t) - args.crop) for t in tracks]
        noise = rng.standard_normal((args.batch, config.latent_channels, args.crop // config.hop), np.float32)
        noise *= rng.uniform(0, args.noise, (args.batch, 1, 1)).astype(np.float32)
        return torch.stack([to_audio(t[at:at + args.crop]) for t, at in list(zip(tracks, starts))[rows]]), torch.from_numpy(noise[rows])

    def update(player, optimizer, step):
        average_gradients(list(player.parameters()), world)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        norm = nn.utils.clip_grad_norm_(player.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm
    draws, clock = map(draw, range(start, args.steps)), time.time()
    draws = speed.prefetch(draws) if speed else draws
    for step in range(start, args.steps):
        audio, noise = (x.to(device) for x in next(draws))
        with torch.no_grad():
            mean = autoencoder.encode(audio)
        copy = autoencoder.decode(mean + noise)
        loss = reconstruction_loss(copy, audio)
        if args.adversary:
            verdict = critic_loss(critic(audio), critic(copy.detach()))
            verdict.backward()
            update(critic, critic_optimizer, step)
            critic.requires_grad_(False)
            with torch.no_grad():
                real = critic(audio)
            (loss + args.adversary * persuasion_loss(real, critic(copy))).backward()
            critic.requires_grad_(True)
        else:
            loss.backward()
        norm = update(decoder, optimizer, step)
        if step % 50 == 49:
            say(f"step {step + 1} loss {loss.item():.3f} norm {norm:.1f}, {(time.time() - clock) / 50:.2f} s/step"
                + (f", critic {verdict.item():.3f}" if args.adversary else ""))
            clock = time.time()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            if not rank:
                saved = {"weights": autoencoder.state_dict(), "optimizer": optimizer.state_dict(), "critic": critic.state_dict(),
                         "critic_optimizer": critic_optimizer.state_dict(), "step": step + 1}
                save_whole(saved, state)
                save(model, out, step + 1, made, torch.float16)
                distance, ratio = validate_autoencoder(autoencoder, held_out)
                say(f"step {step + 1} held out: log-spectral distance {distance:.2f} dB, SNR {ratio:.1f} dB -> {out}")
            clock = time.time()
    if speed:
        draws.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


@torch.no_grad()
def evaluate_autoencoder(args):
    """Log-spectral distance and SNR of a checkpoint's autoencoder on the held-out tracks of any folder of audio."""
    autoencoder, rate = load(args.ckpt).autoencoder, PRESETS["nano"].sample_rate
    names = split([f.relative_to(args.data).as_posix() for f in audio_files(args.data)])[1]
    if not names:
        raise UserError(f"{args.data}: no audio to evaluate on")
    tracks = [torch.cat(list(read_audio(Path(args.data, name), PRESETS["nano"])), dim=1)[:, :15 * rate] for name in names]
    distance, ratio = validate_autoencoder(autoencoder, [(32768 * t.T).clamp(-32768, 32767).short().numpy() for t in tracks])
    if args.picture:
        from measure import picture
        made = autoencoder.decode(autoencoder.encode(tracks[0][None]))[0]
        picture(args.picture, {f"original: {names[0]}": tracks[0], "reconstruction": made}, rate)
    print(f"{args.ckpt} on {len(tracks)} held-out tracks of {args.data}: log-spectral distance {distance:.2f} dB, SNR {ratio:.1f} dB")


@torch.no_grad()
def blend(model, forced, share):
    """Move a model's weights a share of the way to those that training it further has led to (as WiSE-FT, arXiv 2109.01903)."""
    for part in ("dit", "conditioner"):
        for mine, theirs in zip(getattr(model, part).parameters(), getattr(forced, part).parameters(), strict=True):
            mine.lerp_(theirs, share)


def pack(args):
    """Half the size, the newest decoder, and what `sample.py` should do when nothing is said -> `nano.pt`."""
    model = load(args.ckpt)
    if args.arc:
        forced, model.stage = load(args.arc), "arc"
        if forced.config != model.config:
            raise UserError(f"{args.arc} has other sizes, blocks or another regime than {args.ckpt}: it cannot have been trained from it")
        blend(model, forced, args.share)
    if args.autoencoder:
        newest = load(args.autoencoder).autoencoder
        audio = 0.1 * torch.randn(1, 2, 1 << 15)
        same = newest.hop == model.config.hop and newest.encoder[-1].weight.shape == model.autoencoder.encoder[-1].weight.shape
        if not same or not (newest.encode(audio) - model.autoencoder.encode(audio)).abs().max() <= 1e-3:
            raise UserError(f"the encoder of {args.autoencoder} is not the one that {args.ckpt} was trained with")
        model.autoencoder.decoder = newest.decoder
    model.sampling = dict(steps=args.steps, cfg=args.cfg, sampler=args.sampler, prompt=args.prompt, int8=args.int8, finetuned=AFTER_FINETUNING,
                          words=model.sampling.get("words", []))
    saved = read_checkpoint(args.ckpt)
    save(model, args.out, saved["step"], f"{saved['made']}; {' '.join(['nano.py', *sys.argv[1:]])}", torch.float16)
    print(f"-> {args.out}, {os.path.getsize(args.out) / 1e6:.1f} MB", file=sys.stderr)


# -------------------------------------------------------------------------------- command line
def main():
    p = argparse.ArgumentParser(description="Make the small model that ships here, stage by stage.", allow_abbrev=False)
    stages = p.add_subparsers(dest="stage", required=True)
    s = stages.add_parser("data", help="render scores")
    s.add_argument("--data", default="data/nano")
    s.add_argument("--tracks", type=whole, default=413, help="chorales to look at; 45 have other than four parts")
    s.add_argument("--performances", type=whole, default=4, help="of each chorale that is trained on")
    s.add_argument("--workers", type=whole, default=2)
    s.add_argument("--soundfont", default="/usr/share/sounds/sf2/FluidR3_GM.sf2")
    s.set_defaults(run=make_data)
    s = stages.add_parser("autoencoder", help="train the autoencoder; run again to go on where it stopped")
    s.add_argument("--data", default="data/nano")
    s.add_argument("--out", default="out/nano_ae.pt")
    s.add_argument("--init", help="checkpoint whose autoencoder to go on from (default: a linear start)")
    s.add_argument("--steps", type=whole, default=8000)
    s.add_argument("--batch", type=whole, default=4)
    s.add_argument("--crop", type=whole, default=16384, help="samples")
    s.add_argument("--lr", type=float, default=1e-3)
    s.add_argument("--clip", type=float, default=1.0, help="gradient norm")
    s.add_argument("--noise", type=float, default=0.25, help="most noise on latents: the DiT's are never quite clean")
    s.add_argument("--adversary", type=float, default=0.0, help="weight of an adversarial loss")
    s.add_argument("--every", type=whole, default=250, help="steps between validation and checkpoint")
    s.add_argument("--seed", type=random_seed, default=0)
    s.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    s.add_argument("--threads", type=whole, default=2)
    s.set_defaults(run=train_autoencoder)
    s = stages.add_parser("evaluate", help="how well an autoencoder keeps held-out audio")
    s.add_argument("--data", default="data/nano")
    s.add_argument("--ckpt", default="nano.pt")
    s.add_argument("--picture", help="PNG with the mel spectrograms of an original and its reconstruction")
    s.set_defaults(run=evaluate_autoencoder)
    s = stages.add_parser("pack", help="make nano.pt")
    s.add_argument("--ckpt", default="out/nano.pt")
    s.add_argument("--autoencoder", help="checkpoint to take the decoder from, where it was trained on after the DiT")
    s.add_argument("--arc", help="ARC-forced checkpoint that --ckpt was trained to, to go part of the way to")
    s.add_argument("--share", type=float, default=0.2, help="of that way")
    s.add_argument("--out", default="nano.pt")
    s.add_argument("--steps", type=whole, default=4)
    s.add_argument("--cfg", type=finite, default=1.0)
    s.add_argument("--sampler", choices=SAMPLERS, default="dpmpp")
    s.add_argument("--int8", action="store_true", help="recommend int8 on CPUs: measure.py --precision int8 gave the same figures")
    s.add_argument("--prompt", default="moderate arpeggios in C major on marimba")
    s.set_defaults(run=pack)
    args = p.parse_args()
    torch.set_flush_denormal(True)
    if speed:
        speed.keep_memory()
    if "threads" in args:
        torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    run(main)
