"""The recipes of small models. Each stage runs alone and can be resumed.

    python nano.py recipe --quick               # a band of eleven genres, all stages, little of everything
    python nano.py recipe --music MUSIC ...     # in full; MUSIC: recordings that its autoencoder shall know

Its stages are `commands`. docs/nano.md says how `nano.pt`, which ships here, departs from them, and
docs/marimba.md how the model before it was made, from the audio of `nano.py data`.

Two CPU cores share the autoencoder with `OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 nano.py autoencoder
--threads 1`.
"""
import argparse
import math
import os
import shlex
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchaudio.functional import melscale_fbanks

import controls
from chorales import make_data
from common import (UserError, finite, load, not_negative, positive_finite, random_seed, read_checkpoint,
                    run, save, save_whole, say, speed, step_count, thread_count, whole, writable)
from figures import log_spectral_distance
from library import audio_files, split
from model import LMDM, PRESETS, ResidualUnit, SnakeBeta
from recordings import read_audio
from sample import SAMPLERS
from training import average_gradients, micro_rows, start_processes

RATE = PRESETS["nano"].sample_rate
# what a model finetuned from nano.pt plays best with: it needs guidance
AFTER_FINETUNING = dict(steps=8, cfg=3.5, sampler="dpmpp")
RESOLUTIONS = 4096, 2048, 1024, 512, 256                    # samples of its spectra


# -------------------------------------------------------------------------------- autoencoder: audio
def read_tracks(folders, validation, longer, most=700):
    """Tracks of one side of the split of each folder, as int16 arrays (n, 2).

    At most so many a folder, evenly spread; a folder's only file is on both sides. What cannot be read is
    named, and left out as is what is no longer than `longer` samples; UserError where nothing remains."""
    tracks = []
    for folder in folders:
        names = [f.relative_to(folder).as_posix() for f in audio_files(folder)]
        if len(names) > 1:
            names = split(names)[validation]
        for name in names[::max(1, math.ceil(len(names) / most))]:
            try:
                audio = torch.cat(list(read_audio(Path(folder, name), PRESETS["nano"])), dim=1)
            except UserError as error:
                say(f"left out: {error}")
                continue
            tracks.append((audio.T * 32768).round().clamp(-32768, 32767).short().numpy())
    tracks = [track for track in tracks if len(track) > longer]
    if not tracks:
        side = "held out" if validation else "to train on"
        raise UserError(f"{', '.join(folders)}: no readable audio of more than {longer} samples {side}")
    return tracks


def to_audio(samples):                                      # int16 (n, 2) -> (2, n)
    return torch.from_numpy(samples.T.astype(np.float32) / 32768)


def draw_crops(tracks, batch, crop, seed, step):
    """A batch of crops (batch, 2, crop) for the step, the same whether or not the run was interrupted.

    Gains, signs and sides vary, and one in seven is a mix of two: what an autoencoder hears is not what a few
    recordings happen to be."""
    rng = np.random.default_rng([seed, step])
    lengths = np.array([len(track) for track in tracks])

    def crops():
        chosen = [tracks[i] for i in rng.choice(len(tracks), batch, p=lengths / lengths.sum())]
        starts = [rng.integers(len(track) - crop) for track in chosen]
        return torch.stack([to_audio(track[at:at + crop]) for track, at in zip(chosen, starts)])

    def uniform(low, high):
        return torch.from_numpy(rng.uniform(low, high, (batch, 1, 1)).astype(np.float32))
    audio = crops()
    mixed = (uniform(0, 1) < 0.15) * 10 ** (uniform(-20, 0) / 20)
    audio = audio + mixed * crops()
    audio = audio * 10 ** (uniform(-10, 3) / 20) * torch.where(uniform(0, 1) < 0.5, 1.0, -1.0)
    audio = torch.where(uniform(0, 1) < 0.5, audio, audio.flip(1))
    return audio / audio.abs().amax((1, 2), keepdim=True).clamp(min=1)


# -------------------------------------------------------------------------------- autoencoder: losses
def mid_side(audio):                                        # (B, 2, n) -> (B, 4, n): left, right, mid, side
    left, right = audio.unbind(1)
    return torch.stack([left, right, (left + right) / 2, (left - right) / 2], dim=1)


def spectrum(audio, size):    # (B, channels, n) -> (B * channels, size / 2 + 1, frames)
    window = torch.hann_window(size, device=audio.device)
    return torch.stft(audio.flatten(0, 1), size, size // 4, window=window, return_complex=True)


@lru_cache
def mel_bands(bins, device):                                # (bins / 16, bins)
    return melscale_fbanks(bins, 30, RATE / 2, (bins - 1) // 16, RATE).T.to(device)


def mel(magnitude):    # (B, size / 2 + 1, frames) -> (B, size / 32, frames)
    return mel_bands(magnitude.shape[1], magnitude.device) @ magnitude


def reconstruction_loss(made, real, waveform=5.0, log_mel=1.0):
    """How far audio (B, 2, n) is from the real one: log, log-mel and linear magnitudes at five resolutions,
    on left, right, mid and side, and the error of the waveform relative to its level, which keeps the phases.

    waveform, log_mel: weights. What cannot be foretold, such as the phases of noise, is least wrong in the
    waveform where it is missing, so a large weight there makes cymbals dull. Logs have a floor at the level
    of 16-bit noise: below it lies nothing that is heard."""
    error = (made - real).square().mean((1, 2)).sqrt()
    level = real.square().mean((1, 2)).sqrt().clamp(min=1e-2)
    loss = waveform * (error / level).mean()
    made, real = mid_side(made), mid_side(real)
    for size in RESOLUTIONS:
        a, b = spectrum(made, size).abs(), spectrum(real, size).abs()
        apart = (a.clamp(min=1e-3).log() - b.clamp(min=1e-3).log()).abs().mean()
        in_bands = (mel(a).clamp(min=1e-3).log() - mel(b).clamp(min=1e-3).log()).abs().mean()
        apart = apart + log_mel * in_bands
        apart = apart + (a - b).abs().mean() / b.mean().clamp(min=1e-2)
        loss = loss + apart / len(RESOLUTIONS)
    return loss


def posterior_loss(mean, std):
    """Kullback-Leibler divergence of the posterior from a unit Gaussian, in nats a frame. (B, C, T) each."""
    return 0.5 * (mean.square() + std.square() - 2 * std.log() - 1).sum(1).mean()


def snr(made, real):
    """Waveform signal-to-noise ratio in dB."""
    return 10 * torch.log10(real.square().sum() / (made - real).square().sum()).item()


@torch.no_grad()
def validate_autoencoder(autoencoder, tracks):
    """Log-spectral distance and SNR in dB over ten seconds of each held-out track."""
    n = 10 * RATE
    device = next(autoencoder.parameters()).device
    distances, ratios = [], []
    for track in tracks:
        real = to_audio(track[max(0, len(track) - n) // 2:][:n])[None].to(device)
        made = autoencoder.decode(autoencoder.encode(real))
        real = real[..., :made.shape[-1]]
        distances.append(log_spectral_distance(made, real))
        ratios.append(snr(made, real))
    return np.mean(distances), np.mean(ratios)


# -------------------------------------------------------------------------------- autoencoder: a linear start
def mdct(size):
    """The basis of the modified discrete cosine transform, (size, 2 size): frames overlap by half, its
    transpose inverts it."""
    n, k = torch.arange(2 * size) + 0.5, torch.arange(size)[:, None] + 0.5
    window = torch.sin(math.pi * n / (2 * size))
    return math.sqrt(2 / size) * window * torch.cos(math.pi / size * (n + size / 2) * k)


def principal_components(x, n):
    """Features (B, F, T) -> the n directions that hold most of their energy (n, F), and the RMS along each
    (n,)."""
    x = x.transpose(0, 1).flatten(1).double()
    energy, directions = torch.linalg.eigh(x @ x.T / x.shape[1])
    return directions.T.flip(0)[:n].float(), energy.flip(0)[:n].clamp(min=1e-8).sqrt().float()


@torch.no_grad()
def start_as_transform(autoencoder, audio):
    """Make the autoencoder a linear codec fitted to `audio`: from there training has only to improve on it.

    Each strided convolution becomes a lapped transform followed by the principal components of what comes out
    of it, the decoder's the transpose. What is not linear starts as (nearly) nothing: the snakes' sine damped
    to a twentieth, residual units silent. From a random start the same network first has to discover that a
    latent must carry phase for a pitch to survive."""
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
    decoder_last, *up, decoder_first = reversed([m for m in autoencoder.decoder
                                                 if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d))])
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
    scale = rms.sqrt() * rms.mean().sqrt()    # half way to equal loudness of all channels, 1 on the whole
    last.weight[:C, :, 1] = directions / scale[:, None]
    last.bias[C:] = -2                                      # the posterior: a standard deviation of 0.13
    decoder_first.weight[:, :, 3] = directions.T * scale


# -------------------------------------------------------------------------------- autoencoder: the critic
def critic_layer(channels, made, kernel, stride=1, dilation=1):
    """A convolution over (frequencies, frames): strided along the first, dilated along the second."""
    padding = (kernel[0] - 1) // 2, dilation * (kernel[1] - 1) // 2
    return weight_norm(nn.Conv2d(channels, made, kernel, (stride, 1), padding, (1, dilation)))


class Critic(nn.Module):
    """Scores patches of complex spectrograms at three resolutions, real high and made low (EnCodec, arXiv
    2210.13438)."""
    def __init__(self, width=32, sizes=(2048, 1024, 512)):
        super().__init__()
        self.sizes = sizes
        self.stacks = nn.ModuleList()
        for _ in sizes:
            layers = [critic_layer(4, width, (9, 3))]
            layers += [critic_layer(width, width, (9, 3), 2, dilation) for dilation in (1, 2, 4)]
            layers += [critic_layer(width, width, (3, 3)), critic_layer(width, 1, (3, 3))]
            self.stacks.append(nn.ModuleList(layers))

    def forward(self, audio):    # (B, 2, n) -> for each resolution, what each layer makes
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
    apart = [(x - y).abs().mean() / y.abs().mean()
             for a, b in zip(real, made) for x, y in zip(b[:-1], a[:-1])]
    return sum(-b[-1].mean() for b in made) / len(made) + 2 * sum(apart) / len(apart)


# -------------------------------------------------------------------------------- autoencoder: training
class Player:
    """A network that is trained: its parameters, optimizer and one step, with a learning rate that falls to a
    hundredth."""
    def __init__(self, network, args):
        self.network = network
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.args = args
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, betas=(0.8, 0.99), weight_decay=1e-3,
                                           fused=True)

    def update(self, step, world):
        """Apply the gradients of all processes. Returns their norm."""
        args = self.args
        average_gradients(self.parameters, world)
        falling = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        self.optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 100) * falling
        norm = nn.utils.clip_grad_norm_(self.parameters, args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self):
        return {"weights": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state):
        self.network.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])


def autoencoder_step(codec, critic, audio, noise, args, step, world):
    """One step of the autoencoder (a Player) and, once --critic-from is reached, of the critic, on audio (B,
    2, n).

    noise (B, C, T), for the latents. Returns figures for the log."""
    autoencoder = codec.network
    if args.encoder:
        mean, std = autoencoder.posterior(audio)
        copy = autoencoder.decode(mean + std * noise)
    else:
        with torch.no_grad():
            mean = autoencoder.encode(audio)
        copy = autoencoder.decode(mean + noise)
    loss = reconstruction_loss(copy, audio, args.waveform_weight, args.mel_weight)
    if args.encoder:
        loss = loss + args.kl * posterior_loss(mean, std)
    figures = {"loss": loss.item(), "latents": mean.std().item()}
    if args.adversary and step >= args.critic_from * args.steps:
        verdict = critic_loss(critic.network(audio), critic.network(copy.detach()))
        verdict.backward()
        critic.update(step, world)
        critic.network.requires_grad_(False)
        with torch.no_grad():
            real = critic.network(audio)
        loss = loss + args.adversary * persuasion_loss(real, critic.network(copy))
        critic.network.requires_grad_(True)
        figures["critic"] = verdict.item()
    loss.backward()
    figures["norm"] = codec.update(step, world).item()
    return figures


@torch.no_grad()
def equalize(autoencoder, audio):
    """Rescale the latents half way to equal loudness of all channels, 1 on the whole, and centre them.

    What the encoder's last convolution is divided by, the decoder's first is multiplied by: the audio
    stays."""
    # (C, frames)
    latents = torch.cat([autoencoder.encode(x[None]) for x in audio]).transpose(0, 1).flatten(1)
    centre, spread = latents.mean(1), latents.std(1).clamp(min=1e-3)
    scale = (spread * spread.mean()).sqrt()
    last, first = autoencoder.encoder[-1], autoencoder.decoder[0]
    C = len(scale)
    last.weight[:C] /= scale[:, None, None]
    last.bias[:C] = (last.bias[:C] - centre) / scale
    last.bias[C:] -= scale.log()                            # small deviations are divided by it as well
    first.bias += (first.weight * centre[None, :, None]).sum((1, 2))
    first.weight *= scale[None, :, None]


def start_autoencoder(args, device):
    """The model whose autoencoder is trained, --init's or a new one. Raises UserError."""
    model = load(args.init) if args.init else LMDM(PRESETS["nano"])
    hop = model.config.hop
    if args.crop % hop or args.crop <= RESOLUTIONS[0] // 2:
        raise UserError(f"--crop {args.crop}: it takes a multiple of {hop} samples, "
                        f"above {RESOLUTIONS[0] // 2}")
    model.stage = "autoencoder"
    model.sampling = {}
    model.autoencoder.to(device).encoder.requires_grad_(args.encoder)
    if speed:
        speed.lay_out(model.autoencoder)
    return model


@torch.no_grad()
def fit_sketch(model, audio):
    """Choose the channels of pitch and loudness that the DiT will make, unless --init has them already.

    audio (n, 2, samples)."""
    if model.config.channels > model.config.latent_channels and not model.sketch_directions.any():
        columns = torch.cat([controls.features(x[None], model.config)[0].T for x in audio])
        controls.fit(model, columns)


def fit_transform(autoencoder, tracks, device):
    """A linear start, fitted to the tracks. Raises UserError where none is long enough."""
    part = slice(5 * RATE, 5 * RATE + 2 ** 17)
    parts = [to_audio(track[part]) for track in tracks if len(track) >= part.stop][:96]
    if not parts:
        raise UserError(f"a linear start is fitted to tracks of {part.stop / RATE:.0f} s or more, "
                        "and there is none in --data; take --init")
    start_as_transform(autoencoder, torch.stack(parts).to(device))
    for parameter in autoencoder.parameters():              # the precision of the packed file: latents stay
        parameter.data = parameter.data.half().float()


def train_autoencoder(args):
    """Train the decoder, and with --encoder the encoder too; run again to go on from the last `--out`.train.

    Without --encoder latents never change: the DiT can be trained before the decoder is done."""
    rank, world, device = start_processes(args.device)
    rows, = micro_rows(args.batch, 1, world, rank)
    torch.manual_seed(args.seed)
    out, state = writable(args.out), Path(f"{args.out}.train")
    out.parent.mkdir(parents=True, exist_ok=True)
    model = start_autoencoder(args, device)
    autoencoder = model.autoencoder
    train = read_tracks(args.data, False, args.crop)
    held_out = read_tracks(args.data, True, args.crop, most=12)
    if not args.init and not state.exists():
        fit_transform(autoencoder, train, device)
    fit_sketch(model, draw_crops(train, 256, args.crop, args.seed, 0))
    hop = model.config.hop
    codec, critic = Player(autoencoder, args), Player(Critic().to(device), args)
    step = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        codec.load(saved["codec"])
        critic.load(saved["critic"])
        step = saved["step"]
    if world > 1:    # a transform is found only up to signs: all take the first's
        for tensor in autoencoder.state_dict().values():
            dist.broadcast(tensor, 0)

    def write():
        if not rank:
            save_whole({"codec": codec.state(), "critic": critic.state(), "step": step}, state)
            save(model, out, step, " ".join(["nano.py", *sys.argv[1:]]), torch.float16)
            distance, ratio = validate_autoencoder(autoencoder, held_out)
            say(f"step {step} held out: log-spectral distance {distance:.2f} dB, SNR {ratio:.1f} dB -> {out}")
    millions = sum(p.numel() for p in codec.parameters) / 1e6
    if not rank:
        say(f"{millions:.1f} M parameters to train, {hop} samples a frame; {len(train)} tracks, "
            f"{len(held_out)} held out; from step {step} of {args.steps}, {world} processes, {device.type}")
    if step == 0:
        write()

    # --- the loop
    began, clock = step, time.time()
    while step < args.steps:
        audio = draw_crops(train, args.batch, args.crop, args.seed, step)[rows].to(device)
        generator = torch.Generator().manual_seed(args.seed + step)
        noise = torch.randn(args.batch, model.config.latent_channels, args.crop // hop, generator=generator)
        if not args.encoder:                                # a DiT's latents are never quite clean
            noise *= args.noise * torch.rand(args.batch, 1, 1, generator=generator)
        figures = autoencoder_step(codec, critic, audio, noise[rows].to(device), args, step, world)
        step += 1
        if step % 50 == 0 and not rank:
            pace = (time.time() - clock) / (step - began)
            say(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
                + f", {pace:.2f} s a step")
        if step == args.steps and args.encoder:
            equalize(autoencoder, draw_crops(train, 256, args.crop, args.seed, step).to(device))
        if step % args.every == 0 or step == args.steps:
            write()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


@torch.no_grad()
def evaluate_autoencoder(args):
    """Log-spectral distance and SNR of a checkpoint's autoencoder on the held-out tracks of any folder of
    audio."""
    autoencoder = load(args.ckpt).autoencoder
    if speed:
        speed.lay_out(autoencoder)
    if not audio_files(args.data):
        raise UserError(f"{args.data}: no audio to evaluate on")
    tracks = read_tracks([args.data], True, RATE // 10)
    distance, ratio = validate_autoencoder(autoencoder, tracks)
    if args.picture:
        from measure import picture
        original = to_audio(tracks[0][:15 * RATE])
        made = autoencoder.decode(autoencoder.encode(original[None]))[0]
        picture(args.picture, {"original": original, "reconstruction": made}, RATE)
    print(f"{args.ckpt} on {len(tracks)} held-out tracks of {args.data}: "
          f"log-spectral distance {distance:.2f} dB, SNR {ratio:.1f} dB")


@torch.no_grad()
def blend(model, forced, share):
    """Move a model's weights a share of the way to those that training it further has led to (as WiSE-FT,
    arXiv 2109.01903)."""
    for part in ("dit", "conditioner"):
        for mine, theirs in zip(getattr(model, part).parameters(), getattr(forced, part).parameters(),
                                strict=True):
            mine.lerp_(theirs, share)


def pack(args):
    """Half the size, the newest decoder, and what `sample.py` should do when nothing is said -> `nano.pt`."""
    model = load(args.ckpt)
    if args.arc:
        forced, model.stage = load(args.arc), "arc"
        if forced.config != model.config:
            raise UserError(f"{args.arc} has other sizes, blocks or another regime than {args.ckpt}: "
                            "it cannot have been trained from it")
        blend(model, forced, args.share)
    if args.autoencoder:
        newest = load(args.autoencoder).autoencoder
        audio = 0.1 * torch.randn(1, 2, 1 << 15)
        mine = model.autoencoder
        same = newest.hop == mine.hop and newest.encoder[-1].weight.shape == mine.encoder[-1].weight.shape
        if not same or not (newest.encode(audio) - mine.encode(audio)).abs().max() <= 1e-3:
            raise UserError(f"the encoder of {args.autoencoder} is not the one that {args.ckpt} "
                            "was trained with")
        model.autoencoder.decoder = newest.decoder
    model.sampling = dict(steps=args.steps, cfg=args.cfg, sampler=args.sampler,
                          prompt=args.prompt or model.sampling.get("prompt", ""),
                          int8=args.int8, finetuned=AFTER_FINETUNING, words=model.sampling.get("words", []))
    saved = read_checkpoint(args.ckpt)
    save(model, args.out, saved["step"], f"{saved['made']}; {' '.join(['nano.py', *sys.argv[1:]])}",
         torch.float16)
    say(f"-> {args.out}, {os.path.getsize(args.out) / 1e6:.1f} MB")


# -------------------------------------------------------------------------------- the whole recipe
class Sizes(NamedTuple):
    """How much of everything."""
    hours: float                                            # of labelled pieces
    note_hours: float                                       # of random notes, for the autoencoder
    autoencoder: str                                        # options of its training
    dit: str                                                # options of the DiT's
    arc: str                                                # options of ARC-Forcing
    decoder: str                                            # options of the decoder's training, at the end


FULL = Sizes(24, 5, "--steps 8000 --batch 32 --crop 32768", "--steps 20000 --batch 32",
             "--g-warmup 300 --on-policy 240 --d-warmup 40 --steps 160",
             "--steps 4000 --batch 16 --crop 32768")
QUICK = Sizes(0.5, 0.1, "--steps 120 --batch 8 --crop 16384 --every 60",
              "--steps 120 --batch 8 --every 60 --validation-crops 8 --sample-every 0",
              "--g-warmup 4 --on-policy 2 --d-warmup 2 --steps 4 --batch 4 --sample-every 0",
              "--steps 40 --batch 8 --crop 16384 --every 20")


def commands(sizes, folder, music):
    """The recipe: what is run one after the other, each a script of this repository and its options.

    folder: for everything that is made; music: folders of further recordings for the autoencoder."""
    begun = {name for name in ("dit", "arc") if Path(folder, f"{name}.pt").exists()}
    folder = shlex.quote(folder)
    pieces, notes = f"{folder}/band", f"{folder}/notes"
    codec, dit, arc, decoder = (f"{folder}/{name}.pt" for name in ("codec", "dit", "arc", "decoder"))
    sounds = " ".join([pieces, notes, *map(shlex.quote, music)])
    dit_from = "--resume" if "dit" in begun else f"--init {codec}"
    arc_from = "--resume" if "arc" in begun else f"--init {dit} --base none"
    return [f"band.py {pieces} --keys few --hours {sizes.hours}",
            f"band.py {notes} --kind notes --hours {sizes.note_hours}",
            f"nano.py autoencoder --encoder --data {sounds} --out {codec} {sizes.autoencoder}",
            f"finetune.py {dit_from} --data {pieces} --out {dit} --causal --muon --lr 1.5e-3 --lr-end 3e-5 "
            f"--warmup 50 --shift 1 --ema 0.995 --tag-dropout 0.3 {sizes.dit}",
            f"arc_forcing.py {arc_from} --out {arc} --most 4 --teacher-steps 12 --teacher-cfg 5 "
            f"--warmup-lr 1.5e-4 --lr 1e-5 --d-lr 5e-5 {sizes.arc}",
            f"nano.py autoencoder --init {codec} --waveform-weight 2 --mel-weight 3 --adversary 0.1 "
            f"--data {sounds} --out {decoder} {sizes.decoder}",
            f"nano.py pack --ckpt {dit} --arc {arc} --autoencoder {decoder} --out {folder}/nano.pt "
            "--steps 6 --cfg 3 --int8"]


def follow(args):
    """Run all commands. What an earlier run has finished is passed over quickly, what it began is gone on
    with."""
    for command in commands(QUICK if args.quick else FULL, args.folder, args.music):
        script, *options = shlex.split(command)
        say(f"$ python {command}")
        began = time.time()
        done = subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *options])
        if done.returncode:
            raise UserError(f"the recipe ends here: {script} failed; mend it and run the same again")
        say(f"{time.time() - began:.0f} s")


# -------------------------------------------------------------------------------- command line
def parser():
    p = argparse.ArgumentParser(description="Make the small model that ships here, stage by stage.",
                                allow_abbrev=False)
    stages = p.add_subparsers(dest="stage", required=True)
    s = stages.add_parser("recipe", help="all stages, one after the other; run again to go on")
    s.add_argument("--folder", default="out/nano", help="for all that is made, 20 GB (--quick: 1 GB)")
    s.add_argument("--music", nargs="*", default=[], help="folders of recordings that the autoencoder shall "
                   "know too")
    s.add_argument("--quick", action="store_true", help="little of everything: a test of the recipe")
    s.set_defaults(run=follow)
    s = stages.add_parser("data", help="render scores")
    s.add_argument("--data", default="data/nano")
    s.add_argument("--tracks", type=whole, default=413,
                   help="chorales to look at; 45 have other than four parts")
    s.add_argument("--performances", type=whole, default=4, help="of each chorale that is trained on")
    s.add_argument("--workers", type=whole, default=2)
    s.add_argument("--soundfont", default="/usr/share/sounds/sf2/FluidR3_GM.sf2")
    s.set_defaults(run=make_data)
    s = stages.add_parser("autoencoder", help="train the autoencoder; run again to go on where it stopped")
    s.add_argument("--data", nargs="+", default=["data/nano"], help="folders of audio, of any kind")
    s.add_argument("--out", default="out/nano_ae.pt")
    s.add_argument("--init", help="checkpoint whose autoencoder to go on from (default: a linear start)")
    s.add_argument("--encoder", action="store_true",
                   help="train the encoder too; latents are rescaled at the end")
    s.add_argument("--steps", type=whole, default=8000)
    s.add_argument("--batch", type=whole, default=4)
    s.add_argument("--crop", type=whole, default=16384, help="samples")
    s.add_argument("--lr", type=positive_finite, default=1e-3)
    s.add_argument("--clip", type=positive_finite, default=1.0, help="gradient norm")
    s.add_argument("--noise", type=not_negative, default=0.25,
                   help="most noise on latents, without --encoder")
    s.add_argument("--waveform-weight", type=not_negative, default=5.0,
                   help="weight of the waveform's error in the loss")
    s.add_argument("--mel-weight", type=not_negative, default=1.0,
                   help="weight of the mel bands' error, in logs")
    s.add_argument("--kl", type=not_negative, default=1e-4,
                   help="weight of the posterior's divergence, with --encoder")
    s.add_argument("--adversary", type=not_negative, default=0.0, help="weight of an adversarial loss")
    s.add_argument("--critic-from", type=not_negative, default=0.0,
                   help="share of the steps after which that begins")
    s.add_argument("--every", type=whole, default=250, help="steps between validation and checkpoint")
    s.add_argument("--seed", type=random_seed, default=0)
    s.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    s.add_argument("--threads", type=thread_count, default=2)
    s.set_defaults(run=train_autoencoder)
    s = stages.add_parser("evaluate", help="how well an autoencoder keeps held-out audio")
    s.add_argument("--data", default="data/nano")
    s.add_argument("--ckpt", default="nano.pt")
    s.add_argument("--picture", help="PNG with the mel spectrograms of an original and its reconstruction")
    s.set_defaults(run=evaluate_autoencoder)
    s = stages.add_parser("pack", help="make nano.pt")
    s.add_argument("--ckpt", default="out/nano.pt")
    s.add_argument("--autoencoder",
                   help="checkpoint to take the decoder from, where it was trained on after the DiT")
    s.add_argument("--arc", help="ARC-forced checkpoint that --ckpt was trained to, to go part of the way to")
    s.add_argument("--share", type=finite, default=0.2, help="of that way")
    s.add_argument("--out", default="nano.pt")
    s.add_argument("--steps", type=step_count, default=4)
    s.add_argument("--cfg", type=finite, default=1.0)
    s.add_argument("--sampler", choices=SAMPLERS, default="dpmpp")
    s.add_argument("--int8", action="store_true",
                   help="recommend int8 on CPUs; compare with measure.py --precision int8 first")
    s.add_argument("--prompt", help="what is played when nothing is said (default: the checkpoint's own)")
    s.set_defaults(run=pack)
    return p


def main():
    args = parser().parse_args()
    torch.set_flush_denormal(True)
    if speed:
        speed.keep_memory()
    if "threads" in args:
        torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    run(main)
