"""Stage 2: let the model play on its own output, and teach it what music would have done.

    python arc_forcing.py --rollout 4                             # goes on from out/finetune.pt, on a laptop
    python arc_forcing.py --rollout 12 --batch 80 --accumulate 20 --d-warmup 10000 --steps 18000
    torchrun --nproc_per_node=2 arc_forcing.py --rollout 4        # two processes share each batch

Two players. The generator G is the finetuned model; it rolls out blocks with the code that `sample.py` plays
with. The discriminator D is a diffusion transformer in the public geometry (both ways over the whole
sequence, no context path) whose hidden states a small head turns into scores. ARC's losses compare real and
rolled-out music after the same context.

Everything random in a step comes from (seed, phase, number of the step): a resumed run, or one on several
processes, draws the same. G's own streams, which `--on-policy` continues, are kept in the checkpoint.
"""
import argparse
import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
import library
from common import (HelpWithDefaults, UserError, check_streams, finite, load, not_negative,
                    positive_finite, random_seed, read_checkpoint, regime_of, run, save, speed, step_count,
                    thread_count, training_precision, uninterrupted, whole, whole_or_zero)
from finetune import WITHOUT_BEAT, missing_context
from model import (Conditioner, Config, DiT, add_noise, alpha_sigma, denoise, noise_level, schedule,
                   shift_time, velocity)
from sample import Context, denoise_block, sampling_settings, with_null
from training import (Log, average_gradients, check_text_encoder, clip_gradients, condition, describe_batch,
                      encode_texts, keep_earlier_run, millions, parse, prepare_once, progress_bar,
                      render_sample, restore, say, say_changes, say_done, set_up, track_records,
                      training_loop, words_met)

PHASES = "warm D", "warm G", "D", "G"                       # in this order; the last two, the game, in turns
COLUMNS = ("step", "phase", "loss", "contrastive", "real", "fake", "wrong", "spread", "gradient", "seconds")
CONTRAST = 1.0                                              # lambda: weight of D's loss on wrong prompts
PATIENCE = 100                                              # steps of the game that a warning looks back on
OWN_BLOCKS = 2                                              # blocks that G's own streams go on by in a step
RESTART = 1 / 30                                            # chance that such a stream starts over


# -------------------------------------------------------------------------------- losses
# D's scores (B, S) of the same frames, real and rolled out from the same context, at the same level with the
# same noise; weights (B, S) of the scores, adding up to 1 in each item. Each returns (B,).
def generator_loss(real, fake, weights):
    """softplus(D(real) - D(fake))"""
    return (weights * F.softplus(real - fake)).sum(1)


def discriminator_loss(real, fake, weights):
    """softplus(D(fake) - D(real))"""
    return (weights * F.softplus(fake - real)).sum(1)


def contrastive_loss(real, wrong, weights, differs):
    """softplus(D(real, another item's prompt) - D(real)) where the two prompts differ, else 0"""
    return (weights * F.softplus(wrong - real)).sum(1) * differs


def distill_loss(x0, target, sigma):
    """|x0 - target|^2 / sigma^2, the mean over channels and frames: (B, C, T) -> (B,).

    An error of x0 divided by sigma is one of v, so all noise levels weigh alike."""
    return 1 / sigma ** 2 * (x0 - target).square().mean((1, 2))


def flow_loss(critic, cond, x0, noise, t, music, remat=False):
    """|v - velocity|^2 over the frames that are music, a whole sequence x0 (B, C, T) at once: (B,).

    t (B,): levels; music (B, T): 1 where an item is music, else 0."""
    level = t[:, None, None]
    objective = critic.config.objective
    v = critic.dit(add_noise(x0, noise, level, objective), t, cond, remat=remat)
    error = (v.float() - velocity(x0, noise, level, objective)).square().mean(1)        # (B, T)
    return (error * music).sum(1) / music.sum(1)


# -------------------------------------------------------------------------------- the discriminator
class ConvNeXt(nn.Module):
    def __init__(self, width, stride):
        super().__init__()
        self.stride = stride
        self.depthwise = nn.Conv1d(width, width, 7, stride, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):                                   # (B, width, T) -> (B, width, ceil(T / stride))
        y = self.norm(self.depthwise(x).transpose(1, 2))
        return x[..., ::self.stride] + self.down(F.gelu(self.up(y))).transpose(1, 2)


class Discriminator(nn.Module):
    """DiT and conditioner of the base model, and a head on hidden states at three quarters of the depth."""
    def __init__(self, config, width=128, strides=(1, 2, 2)):
        super().__init__()
        self.config = config
        self.layer = round(0.75 * config.depth) - 1         # whose hidden states the head reads
        self.stride = math.prod(strides)                    # frames for each score
        self.dit = DiT(config)
        self.conditioner = Conditioner(config)
        self.norm = nn.LayerNorm(config.width)
        self.project = nn.Linear(config.width, width)
        self.head = nn.Sequential(*(ConvNeXt(width, stride) for stride in strides), nn.Conv1d(width, 1, 1))

    def forward(self, x, t, cond, first, remat=False):
        """Scores (B, S) of x (B, C, T) at levels t (B,), one for every `stride` frames from `first` on.

        Score j is centred on frame (first // stride + j) * stride, so the first may be centred a little
        before `first`."""
        h = self.dit.hidden(x, t, cond, self.layer, remat)[:, 1:]                       # (B, T, D)
        scores = self.head(self.project(self.norm(h)).transpose(1, 2))[:, 0]    # (B, ceil(T / stride))
        return scores[:, first // self.stride:].float()

    def weights(self, music, first):
        """music (B, T): 1 where an item is music -> weights (B, S) for the scores of `forward`."""
        start = first // self.stride * self.stride
        centres = torch.arange(start, music.shape[1], self.stride, device=music.device)
        weights = music[:, centres.clamp(min=first)]
        return weights / weights.sum(1, keepdim=True)

    def trained(self, phase):
        """Parameters that the optimizer of a phase moves: exactly those that get gradient, or weight decay
        would shrink the others."""
        idle = ["dit.context_in.", "dit.beat_in.", "conditioner.proj_out."]
        if phase == "warm D":
            idle += ["norm.", "project.", "head."]
        else:
            idle += ["dit.project_out.", "dit.conv_out."]
            idle += [f"dit.layers.{i}." for i in range(self.layer + 1, self.config.depth)]
        return [p for name, p in self.named_parameters() if not name.startswith(tuple(idle))]


def start_discriminator(base, saved):
    """D with the weights of the model `base` and a new head, or as the checkpoint `saved` holds it."""
    if saved:
        critic = Discriminator(Config.from_dict(saved["discriminator"]["config"]))
        critic.load_state_dict(saved["discriminator"]["weights"])
    else:
        critic = Discriminator(base.config)
        critic.dit.load_state_dict(base.dit.state_dict())
        critic.conditioner.load_state_dict(base.conditioner.state_dict())
    if base.conditioner.words is not None:                  # its rows are no weights
        critic.conditioner.words.known = base.conditioner.words.known
    return critic.eval()


# -------------------------------------------------------------------------------- the rollout
def recorded(predict, calls):
    """predict(x, t), which also appends (x, t) to the list `calls`."""
    def predict_and_record(x, t):
        calls.append((x, t))
        return predict(x, t)
    return predict_and_record


@torch.no_grad()
def rollout(model, prompt, prime, levels, ks, draw, sampler="pingpong", beats=None):
    """Continue prime (B, C, context), block i in ks[i] denoising steps, as `sample.stream` would.

    prompt: EncodedPrompt; levels: of the most denoising steps; draw(): noise of a block; beats (B,
    len(ks), block, 18): `controls.beat_features` of their frames, or None. Returns the latents
    (B, C, len(ks) * block) and (x_t, t) of each block's last evaluation, for `replay`."""
    context = Context(model, prompt, prime)
    blocks = []
    evaluations = []
    for i, k in enumerate(ks):
        calls = []
        context.beat = beat_of_block(beats, i)
        predict = recorded(context.predict, calls)
        block = denoise_block(predict, draw(), levels[:k], sampler, model.config.objective, draw)
        context.append(block)
        blocks.append(block)
        evaluations.append(calls[-1])
    return torch.cat(blocks, dim=-1), evaluations


def beat_of_block(beats, i):
    return None if beats is None else beats[:, i]


def replay(model, prompt, prime, latents, evaluations, gradient, precision, beats=None):
    """The rollout's backward pass: gradient (B, C, T) by its latents -> gradients of G's parameters.

    Each block's last evaluation is made once more, differentiated and forgotten before the next: the memory
    of one block suffices for all. The context is walked through again too, which is cheaper than keeping its
    caches."""
    block = model.config.block
    with precision():
        context = Context(model, prompt, prime)
    blocks = zip(evaluations, latents.split(block, dim=-1), gradient.split(block, dim=-1))
    for i, ((x, t), x0, slope) in enumerate(blocks):
        context.beat = beat_of_block(beats, i)
        # all evaluations share the graph of the encoded prompt, so it must outlive each of them
        evaluate(model, context, x, t, precision).backward(slope, retain_graph=True)
        context.append(x0)


def evaluate(model, context, x, t, precision):
    """x0 of one evaluation with its graph. Nothing else of a rollout has one."""
    with precision():
        return denoise(x, context.predict(x, t), t, model.config.objective)[0]


@torch.no_grad()
def trajectory(teacher, cond, prime, levels, cfg, draw, beats=None):
    """The finetuned model's path to the block after prime.

    Returns (x_t, t) of all evaluations, and its end (B, C, block)."""
    context = Context(teacher, teacher.dit.encode_prompt(with_null(cond, cfg)), prime)
    context.beat = beat_of_block(beats, 0)
    points = []
    predict = recorded(context.predict, points)
    end = denoise_block(predict, draw(), levels, "euler", teacher.config.objective, draw, cfg)
    return points, end


# -------------------------------------------------------------------------------- what a step draws
class Batch(NamedTuple):
    """Rows of a step's batch; everything random is drawn for the whole batch, then cut to them."""
    latents: torch.Tensor                                   # (B, C, context + rollout): real
    music: torch.Tensor                                     # (B, context + rollout): 1 where music, else 0
    prompts: list
    others: list                                            # the prompts of other items
    starts: list                                            # of (Beats or None, frame): where latents begin
    with_beat: torch.Tensor                                 # (B, 1, 1): 0 where G is told no beat, else 1
    noise: torch.Tensor                                     # as latents
    uniform: torch.Tensor                                   # (B,) in [0, 1), for the level
    ks: list                                                # denoising steps of each block, for all items
    draw: Callable                                          # -> noise (B, C, block)
    rng: np.random.Generator                                # for what is left to draw, the same in all rows

    def to(self, device):
        def draw():
            return self.draw().to(device)
        return self._replace(latents=self.latents.to(device), music=self.music.to(device),
                             with_beat=self.with_beat.to(device), noise=self.noise.to(device),
                             uniform=self.uniform.to(device), draw=draw)

    def beats(self, config, blocks=None):
        """Where frames after the context lie in the bar, (B, blocks, block, 18): see `data.beats_at`.

        blocks: how many (None: as many as the crops have)."""
        first = config.context_blocks
        end = self.latents.shape[-1] // config.block if blocks is None else first + blocks
        beats = data.beats_at(self.starts, range(first, end), config)
        if beats is None:
            return None
        return (beats.to(self.latents.device) * self.with_beat).unflatten(1, (-1, config.block))


def draw_batch(tracks, config, batch, blocks, most, rows, seed, phase, step):
    """Rows (a slice) of a step's batch: `blocks` to roll out, each in 1 to `most` denoising steps.

    A track that is too short begins right after an empty context, as a stream would, and what lies beyond its
    end is not scored."""
    c = config
    total = c.context_blocks + blocks
    rng = np.random.default_rng([seed, PHASES.index(phase), step])
    positions = rng.random(batch)
    missing = missing_context(rng, batch, c)
    uniform = torch.from_numpy(rng.random(batch)).float()
    ks = rng.integers(1, most, blocks, endpoint=True).tolist()
    generator = torch.Generator().manual_seed(int(rng.integers(2 ** 31)))

    def draw(length=c.block):
        return torch.randn(batch, c.channels, length, generator=generator)[rows]
    crops = data.crops_at(tracks, total, c.block, positions[rows])
    latents, prompts = crops.latents, crops.prompts
    others = data.crops_at(tracks, 1, c.block, np.roll(positions, 1)[rows]).prompts
    with_beat = torch.from_numpy(rng.random(batch) >= WITHOUT_BEAT)[rows].float()
    starts = list(crops.starts)
    music = torch.ones(len(latents), total)                 # in blocks
    for i, (gone, short) in enumerate(zip(missing[rows], crops.missing.tolist())):
        early = max(0, short - c.context_blocks)            # blocks that a short track is moved to the left
        starts[i] = starts[i][0], starts[i][1] + early * c.block
        latents[i] = latents[i].roll(-early * c.block, dims=-1)
        latents[i, :, :gone * c.block] = 0
        music[i, :max(gone, short - early)] = 0
        music[i, total - early:] = 0
    return Batch(latents, music.repeat_interleave(c.block, dim=1), prompts, others, starts,
                 with_beat[:, None, None], draw(total * c.block), uniform[rows], ks, draw, rng)


# -------------------------------------------------------------------------------- three kinds of step
class Setting(NamedTuple):
    """What all steps of a run share."""
    device: torch.device
    precision: Callable                                     # makes the context manager of mixed precision
    remat: bool
    item_weight: float                                      # of an item's loss in this process's sum
    texts: dict                                             # `encode_texts` of G and its teacher
    critic_texts: dict                                      # `encode_texts` of D
    levels: torch.Tensor                                    # of a block of --most denoising steps


def flow_step(critic, batch, setting):
    """D learns to denoise what it will judge, and gets the gradients. Returns {name: sum over the items}."""
    frames = batch.latents.shape[-1]
    with setting.precision():
        cond = condition(critic, setting.critic_texts, batch.prompts, setting.device, frames=frames)
        losses = flow_loss(critic, cond, batch.latents, batch.noise, shift_time(batch.uniform, frames),
                           batch.music, setting.remat)
    (losses.sum() * setting.item_weight).backward()
    return sums_of(loss=losses)


def distill_step(model, teacher, levels, cfg, batch, setting):
    """G learns to predict, from points on its teacher's path, where the path ends.

    levels, cfg: the teacher's noise levels and guidance. As many points are taken as G will make steps in a
    block. Returns {name: sum over the items}."""
    c = model.config
    prime = batch.latents[..., :c.context]
    with setting.precision():
        prompt = model.dit.encode_prompt(condition(model, setting.texts, batch.prompts, setting.device))
    with setting.precision(), torch.no_grad():
        cond = condition(teacher, setting.texts, batch.prompts, setting.device)
        beats = batch.beats(c)
        points, end = trajectory(teacher, cond, prime, levels, cfg, batch.draw, beats)
        context = Context(model, prompt, prime)
        context.beat = beat_of_block(beats, 0)
    chosen = batch.rng.permutation(len(points))[:len(setting.levels)]
    total = 0
    for i in chosen:
        x, t = points[i]
        x0 = evaluate(model, context, x, t, setting.precision)
        losses = distill_loss(x0, end, alpha_sigma(t, c.objective)[1]) / len(chosen)
        # all evaluations share the graph of the encoded prompt, so it must outlive each of them
        (losses.sum() * setting.item_weight).backward(retain_graph=True)
        total += losses.detach().sum()
    return dict(loss=total)


def game_step(model, critic, batch, phase, setting):
    """G plays on, and D compares that with the music; the player named by phase gets the gradients.

    Both continuations follow the same context and are judged at the same level under the same noise.
    Returns {name: sum over the items}."""
    c = model.config
    prime, real = batch.latents[..., :c.context], batch.latents[..., c.context:]
    with setting.precision(), torch.set_grad_enabled(phase == "G"):
        prompt = model.dit.encode_prompt(condition(model, setting.texts, batch.prompts, setting.device))
    with setting.precision():
        beats = batch.beats(c)
        fake, evaluations = rollout(model, prompt, prime, setting.levels, batch.ks, batch.draw, beats=beats)
    t = noise_level(batch.uniform)
    is_music = batch.music[:, None, c.context:]
    weights = critic.weights(batch.music, c.context)

    def condition_of(prompts):
        return condition(critic, setting.critic_texts, prompts, setting.device,
                         frames=batch.latents.shape[-1])

    def score(continuation, cond):
        x = torch.cat([prime, continuation * is_music], dim=-1)
        x = add_noise(x, batch.noise, t[:, None, None], critic.config.objective)
        return critic(x, t, cond, c.context, setting.remat)

    with setting.precision():
        cond = condition_of(batch.prompts)
        with torch.set_grad_enabled(phase == "D"):
            d_real = score(real, cond)
        d_fake = score(fake.requires_grad_(phase == "G"), cond)
        if phase == "D":
            d_wrong = score(real, condition_of(batch.others))
    sums = sums_of(real=weights * d_real, fake=weights * d_fake, fake_std=(fake * is_music).std((1, 2)),
                   real_std=real.std((1, 2)))
    if phase == "G":
        losses = generator_loss(d_real, d_fake, weights)
        gradient, = torch.autograd.grad(losses.sum() * setting.item_weight, fake)
        replay(model, prompt, prime, fake.detach(), evaluations, gradient, setting.precision, beats)
        return sums_of(loss=losses) | sums
    different = [own != other for own, other in zip(batch.prompts, batch.others)]
    losses = discriminator_loss(d_real, d_fake, weights)
    contrastive = contrastive_loss(d_real, d_wrong, weights, torch.tensor(different, device=t.device).float())
    ((losses + CONTRAST * contrastive).sum() * setting.item_weight).backward()
    return sums_of(loss=losses, contrastive=contrastive, wrong=weights * d_wrong) | sums


def sums_of(**values):
    return {name: value.detach().sum() for name, value in values.items()}


# -------------------------------------------------------------------------------- G's own streams
def pick_up(streams, items, prime, prompts, starts, restart):
    """Where each item's own stream stands: contexts (B, C, context), prompts, starts.

    streams: {item: (context (C, context), prompt, (beats or None, frame where the context begins))}. An item
    that has none yet, or whose flag in restart (one for each of the whole batch) is set, begins with its row
    of prime, prompts and starts."""
    new = dict(zip(items, zip(prime.cpu(), prompts, starts)))
    states = [new[item] if restart[item] else streams.get(item, new[item]) for item in items]
    contexts, prompts, starts = zip(*states)
    starts = [(beats and library.Beats(*beats), frame) for beats, frame in starts]
    return torch.stack(contexts).to(prime.device), list(prompts), starts


def continue_streams(model, batch, items, restart, streams, setting):
    """Play on in the items' own streams: their contexts are what G's playing leads to, and music never does.

    Returns the batch with those contexts, prompts and starts, and what `pick_up` takes for `streams`."""
    c = model.config
    prime, prompts, starts = pick_up(streams, items, batch.latents[..., :c.context], batch.prompts,
                                     batch.starts, restart)
    beats = batch._replace(starts=starts).beats(c, OWN_BLOCKS)
    ks = [len(setting.levels)] * OWN_BLOCKS
    with setting.precision(), torch.no_grad():
        prompt = model.dit.encode_prompt(condition(model, setting.texts, prompts, setting.device))
        # DPM-Solver++ adds no noise of its own
        played, _ = rollout(model, prompt, prime, setting.levels, ks, batch.draw, "dpmpp", beats)
    prime = torch.cat([prime, played], dim=-1)[..., -c.context:]
    latents = torch.cat([prime, batch.latents[..., c.context:]], dim=-1)
    starts = [(beats, frame + OWN_BLOCKS * c.block) for beats, frame in starts]
    plain = [(beats and tuple(beats), frame) for beats, frame in starts]    # as a checkpoint can hold it
    return (batch._replace(latents=latents, prompts=prompts, starts=starts),
            dict(zip(items, zip(prime.cpu(), prompts, plain))))


# -------------------------------------------------------------------------------- phases and reports
def next_phase(done, args):
    """The phase of the next step, or None after the last. done: {phase: steps made}. D begins the game."""
    if done["warm D"] < args.d_warmup:
        return "warm D"
    if done["warm G"] < args.g_warmup:
        return "warm G"
    if done["D"] + done["G"] < args.steps:
        return "D" if done["D"] <= done["G"] else "G"
    return None


def learning_rate(phase, step, args):
    """Constant in the game; in a warm-up falling to zero, so that its last batches change little."""
    if phase == "warm D":
        return args.warmup_lr * (1 - step / max(1, args.d_warmup))
    if phase == "warm G":
        return args.warmup_lr * (1 - step / max(1, args.g_warmup))
    return args.d_lr if phase == "D" else args.lr


def batch_means(sums, batch, world):
    """{name: sum over this process's items} -> {name: mean over the whole batch}.

    The standard deviations of rollout and music become their ratio, the spread."""
    values = torch.stack([value.double().cpu() for value in sums.values()])
    if world > 1:
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values)
    means = {name: value / batch for name, value in zip(sums, values.tolist())}
    if "fake_std" in means:
        means["spread"] = means.pop("fake_std") / max(1e-6, means.pop("real_std"))      # 1e-6: silence
    return means


def gathered(own, world):
    """{item: ...} of this process -> of all processes."""
    parts = [own] * world
    if world > 1:
        dist.all_gather_object(parts, own)
    return {item: value for part in parts for item, value in part.items()}


def verdict(recent):
    """What has gone wrong in the last steps of the game, in words, or None.

    recent: of each step D's margin and the spread of G's latents against that of music."""
    margin, spread = np.mean(recent, axis=0)
    if not 0.5 <= spread <= 2:
        return (f"the rollout's latents have {spread:.2f}x the standard deviation of music: G is falling "
                "apart; lower --lr, warm up longer")
    if not abs(margin) <= 4:                                # softplus(-4) = 0.02
        winner, option = ("D", "--d-lr") if margin > 0 else ("G", "--lr")
        return f"{winner} wins every time (margin {margin:.1f}): lower {option} or warm up longer"
    return None


# -------------------------------------------------------------------------------- the script
def parser():
    p = argparse.ArgumentParser(description="ARC-Forcing: stable for minutes, in a handful of steps.",
                                allow_abbrev=False, formatter_class=HelpWithDefaults)
    p.add_argument("--init", default="out/finetune.pt", help="finetuned checkpoint to start from")
    p.add_argument("--data", help="folder of audio files (default: the one --init was finetuned on)")
    p.add_argument("--base", help="checkpoint for the discriminator, or none: --init itself "
                                  "(default: the public model that --init comes from)")
    p.add_argument("--out", default="out/arc.pt", help="checkpoint to write")
    p.add_argument("--resume", action="store_true",
                   help="go on from --out, with its settings unless given again")
    # the game
    p.add_argument("--rollout", type=whole, default=4, help="blocks that G plays in a row")
    p.add_argument("--most", type=step_count, default=8,
                   help="denoising steps of a block: drawn from 1 to this, and what the result plays with")
    p.add_argument("--steps", type=whole, default=2000,
                   help="steps of the game, half of them D's, half G's")
    p.add_argument("--batch", type=whole, default=8,
                   help="rollouts per step, over all processes and accumulations")
    p.add_argument("--accumulate", type=whole, default=1, help="backward passes per step")
    p.add_argument("--lr", type=positive_finite, default=1e-6, help="learning rate of G in the game")
    p.add_argument("--d-lr", type=positive_finite, default=1e-6, help="learning rate of D in the game")
    p.add_argument("--clip", type=not_negative, default=1.0, help="largest gradient norm, 0 for no clipping")
    p.add_argument("--seed", type=random_seed, default=0, help="of all that is drawn")
    # before the game
    p.add_argument("--d-warmup", type=whole_or_zero, default=500, help="steps of flow matching for D")
    p.add_argument("--g-warmup", type=whole_or_zero, default=0,
                   help="steps of G on the finetuned model's own trajectories")
    p.add_argument("--on-policy", type=whole_or_zero, default=0,
                   help="so many of G's warm-up steps, the last, continue its own streams and not music")
    p.add_argument("--warmup-lr", type=positive_finite, default=5e-5,
                   help="learning rate of both warm-ups, falling to 0")
    p.add_argument("--teacher-steps", type=step_count,
                   help="denoising steps of the finetuned model in G's warm-up (default: as --init plays)")
    p.add_argument("--teacher-cfg", type=finite, help="its guidance there (default: as --init plays)")
    # reports
    p.add_argument("--every", type=whole, default=50, help="steps between checkpoints")
    p.add_argument("--sample-every", type=whole_or_zero, default=500,
                   help="steps between samples in out/samples, 0 for none")
    # machine
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="such as cpu, cuda or cuda:1")
    p.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto",
                   help="auto: bf16 where it is faster")
    p.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True,
                   help="activation checkpointing in D: less memory, slower")
    p.add_argument("--threads", type=thread_count, help="CPU threads (default: PyTorch's choice)")
    return p


def fill_in(args):
    """--data and --base, where not named, as the checkpoint --init was made. Raises UserError."""
    if not Path(args.init).is_file():
        raise UserError(f"no checkpoint at {args.init}: run finetune.py first, or name a finetuned one with "
                        "--init")
    saved = read_checkpoint(args.init)
    check_streams(args.init, saved["stage"])
    finetuned_with = saved.get("args", {})
    args.data = args.data or finetuned_with.get("data")
    if args.data is None:
        raise UserError(f"--data is missing, and {args.init} does not tell what it was finetuned on: name a "
                        "folder of audio files")
    if args.base is None:
        args.base = finetuned_with.get("base") or finetuned_with.get("init") or "none"
        if not Path(args.base).is_file() or read_checkpoint(args.base)["stage"] != "base":
            args.base = "none"


def check_options(args):
    """UserError for options that do not go together."""
    if args.g_warmup and Path(args.init).resolve() == Path(args.out).resolve():
        raise UserError(f"--out {args.out} would overwrite the warm-up's teacher, --init: name another")
    of_warmup = args.on_policy, args.teacher_steps, args.teacher_cfg
    if not args.g_warmup and not args.resume and of_warmup != (0, None, None):
        raise UserError("--on-policy, --teacher-steps and --teacher-cfg are of G's warm-up, which has no "
                        "steps: --g-warmup")


def start_networks(args, saved):
    """G, D, and the model that D comes from. Raises UserError."""
    model = load(args.init if saved is None else args.out)
    base = model if args.base == "none" else load(args.base)
    if data.fingerprint(base) != data.fingerprint(model):
        raise UserError(f"--base {args.base} and --init {args.init} have different autoencoders: their "
                        "latents do not compare")
    return model, start_discriminator(base, saved), base


def prepare_data(folder, model, base, device, rank, world):
    """The Dataset, and what `encode_texts` makes of its prompts for G and for D. Raises UserError."""
    check_text_encoder(model)
    check_text_encoder(base)
    dataset = prepare_once(folder, model, device, rank, world)
    texts = encode_texts(model, dataset.tracks)
    if base is model:
        return dataset, texts, texts
    words_met(base, dataset.train)                          # D's encoder shares the rows of base's
    return dataset, texts, encode_texts(base, dataset.tracks)


def start_optimizers(model, critic, args):
    """{phase: parameters that it moves}, {phase: optimizer}.

    `context_in` is not among G's: the context's keys and values are detached, so it gets no gradient."""
    model.requires_grad_(False)
    of_generator = []
    for part in model.dit, model.conditioner:
        for name, p in part.named_parameters():
            if not name.startswith(("context_in.", "proj_out.")):
                of_generator.append(p.requires_grad_())
    trained = {"warm D": critic.trained("warm D"), "warm G": of_generator, "D": critic.trained("D"),
               "G": of_generator}
    optimizers = {}
    for phase in PHASES:
        optimizers[phase] = torch.optim.AdamW(trained[phase], lr=learning_rate(phase, 0, args),
                                              betas=(0.9, 0.95), weight_decay=0.01)
    return trained, optimizers


def start_teacher(args, config, device):
    """The finetuned model that warms G up, its noise levels and its guidance. Raises UserError."""
    teacher = load(args.init).to(device).requires_grad_(False)
    if teacher.config != config:
        raise UserError(f"--init {args.init} has other sizes, blocks or another regime than {args.out}: it "
                        "is not its teacher")
    settings = sampling_settings(teacher, args.teacher_steps, "euler", args.teacher_cfg)
    return teacher, schedule(settings["steps"])[:-1].to(device), settings["cfg"]


def label(model, done, most, learned):
    """What the checkpoint says of itself: how it is played best, and the words that it knows."""
    if done["D"] + done["G"]:
        model.stage = "arc"
        model.sampling = dict(steps=most, **learned)
    elif done["warm G"]:
        model.sampling |= learned


def describe(args, config, trained, critic):
    """In words, what is trained and on what."""
    c = config
    frames = c.context + args.rollout * c.block
    origin = args.init if args.base == "none" else args.base
    return (f"{regime_of(c)}; G {millions(trained['G'])}, D {millions(trained['D'])} parameters to train, "
            f"D from {args.out if args.resume else origin}, layer {critic.layer}; "
            f"{c.context} + {args.rollout} x {c.block} frames = {frames / c.frame_rate:.1f} s, "
            f"1 to {args.most} denoising steps a block")


def save_state(model, critic, optimizers, done, streams, args, tracks):
    """The checkpoint, from which a run can also be resumed."""
    save(model, args.out, sum(done.values()), " ".join(["arc_forcing.py", *sys.argv[1:]]), args=vars(args),
         tracks=tracks, done=done, streams=streams,
         discriminator={"config": critic.config.to_dict(), "weights": critic.state_dict()},
         optimizers={phase: optimizer.state_dict() for phase, optimizer in optimizers.items()})


def main():
    args, saved = parse(parser(), "discriminator", "ARC-Forcing")
    if saved is None:
        fill_in(args)
    check_options(args)
    rank, world, device, micro_batches = set_up(args)
    if speed and args.remat and device.type == "cpu":
        speed.return_memory()
    model, critic, base = start_networks(args, saved)
    c = model.config
    precision_name, precision = training_precision(args.precision, device)

    dataset, texts, critic_texts = prepare_data(args.data, model, base, device, rank, world)
    del base
    known_words = words_met(model, dataset.train) if model.sampling.get("words") else []
    learned = dict(prompt=dataset.train[0].prompt, words=known_words)
    setting = Setting(device, precision, args.remat, world / args.batch, texts, critic_texts,
                      schedule(args.most)[:-1].to(device))
    tracks = track_records(dataset)
    model.to(device)
    critic.to(device)

    # --- optimizers, and where a resumed run has got to
    trained, optimizers = start_optimizers(model, critic, args)
    done = dict.fromkeys(PHASES, 0) if saved is None else dict(saved["done"])       # steps made in each phase
    streams = {} if saved is None else dict(saved.get("streams", {}))
    if texts is not None:                                   # not those of prompts that are no longer there
        streams = {item: stream for item, stream in streams.items() if stream[1] in texts}
    teacher = None
    if done["warm G"] < args.g_warmup:
        teacher, teacher_levels, teacher_cfg = start_teacher(args, c, device)
    if saved is None:
        keep_earlier_run(args.out, rank)
    else:
        say_changes(saved.get("tracks", tracks), tracks, rank)
        for phase, optimizer in optimizers.items():
            restore([optimizer], saved["optimizers"][phase], args.out)
        del saved                                           # twice the weights' memory
    log = None if rank else Log(args.out, COLUMNS, sum(done.values()))
    say(rank, f"{describe(args, c, trained, critic)}; {describe_batch(args, world, device, precision_name)}; "
        f"done {done}")

    # --- the loop: draw, step, average the gradients, clip, update, log, save
    recent = deque(maxlen=PATIENCE)
    seconds = {phase: [] for phase in PHASES}               # of each step
    clock = time.time()
    bar = progress_bar(args.d_warmup + args.g_warmup + args.steps, sum(done.values()), rank)

    def stop():
        if not rank:
            save_state(model, critic, optimizers, done, streams, args, tracks)
        say(rank, f"\nstopped after step {sum(done.values())}; go on with --resume")

    with training_loop(bar, world, stop):
        while phase := next_phase(done, args):
            step_began = time.time()
            sums = {}
            played = {}                                     # G's own streams, as this step leaves them
            for rows in micro_batches:
                batch = draw_batch(dataset.train, c, args.batch, args.rollout, args.most, rows, args.seed,
                                   phase, done[phase]).to(device)
                if phase == "warm D":
                    part = flow_step(critic, batch, setting)
                elif phase == "warm G":
                    if done[phase] >= args.g_warmup - args.on_policy:
                        restart = batch.rng.random(args.batch) < RESTART
                        batch, own = continue_streams(model, batch, range(rows.start, rows.stop), restart,
                                                      streams, setting)
                        played |= own
                    part = distill_step(model, teacher, teacher_levels, teacher_cfg, batch, setting)
                else:
                    part = game_step(model, critic, batch, phase, setting)
                for name, value in part.items():
                    sums[name] = sums.get(name, 0) + value
            average_gradients(trained[phase], world)
            gradient = clip_gradients(trained[phase], args.clip)
            played = gathered(played, world) if played else {}
            optimizers[phase].param_groups[0]["lr"] = learning_rate(phase, done[phase], args)
            with uninterrupted():
                optimizers[phase].step()
                done[phase] += 1
                streams |= played
                label(model, done, args.most, learned)
                if phase.startswith("warm") and next_phase(done, args) != phase:
                    optimizers[phase].state.clear()         # no longer needed: twice the weights' memory
                    teacher = teacher if phase == "warm D" else None
            optimizers[phase].zero_grad(set_to_none=True)
            bar.update()

            # --- log, warning, checkpoint, sample
            step = sum(done.values())
            game_steps = done["D"] + done["G"]
            means = batch_means(sums, args.batch, world)
            seconds[phase].append(time.time() - step_began)     # the means have waited for a GPU
            if "spread" in means:
                recent.append((means["real"] - means["fake"], means["spread"]))
                if game_steps % PATIENCE == 0 and len(recent) == PATIENCE and verdict(recent) and not rank:
                    bar.write(f"warning, step {step}: {verdict(recent)}", file=sys.stderr)
            if not rank:
                shown = [f"{name} {mean:.3f}" for name, mean in means.items()]
                bar.set_postfix_str(f"{phase}: {', '.join(shown)}")
                logged = {name: f"{mean:.9g}" for name, mean in means.items()}
                log.write(step=step, phase=phase, gradient=f"{gradient.item():.6g}",
                          seconds=f"{time.time() - clock:.1f}", **logged)
                if step % args.every == 0 or not next_phase(done, args):
                    save_state(model, critic, optimizers, done, streams, args, tracks)
                if args.sample_every and phase in ("D", "G") and game_steps % args.sample_every == 0:
                    bar.write(render_sample(model, setting.texts, learned["prompt"], args.out, game_steps, 10,
                                            device, precision), file=sys.stderr)
    a_step = [f"{np.mean(times):.2f} s a step of {phase}" for phase, times in seconds.items() if times]
    nothing = f"nothing is left to do after {args.steps} steps of the game (--steps)"
    say_done(rank, ", ".join(a_step) or nothing, device, args.out)


if __name__ == "__main__":
    run(main)
