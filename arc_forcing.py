"""Stage 2: let the model play on its own output, and teach it what music would have done (the paper, section 4).

    python arc_forcing.py --rollout 4                             # goes on from out/finetune.pt, on a laptop
    python arc_forcing.py --rollout 12 --batch 80 --accumulate 20 --d-warmup 10000 --steps 18000
    torchrun --nproc_per_node=2 arc_forcing.py --rollout 4        # data parallel: the same batch, shared out

Two players. The generator G is the finetuned model; it rolls out blocks with the code that `sample.py` plays with. The
discriminator D is a diffusion transformer in the public geometry (both ways over the whole sequence, no context path)
whose hidden states a small head turns into scores. ARC's losses compare real and rolled-out music from the same context.
Everything random in a step comes from (seed, phase, number of the step): a resumed run, and one shared by several
processes, draws the same. What `--on-policy` goes on from, G's own streams so far, is kept in the checkpoint.
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
from tqdm import tqdm

import data
from common import (UserError, check_streams, finite, load, random_seed, read_checkpoint, run, save, speed,
                    training_precision, whole, writable)
from finetune import (Log, average_gradients, condition, encode_texts, micro_rows, missing_context, parse, peak_memory, prepare_once,
                      render_sample, start_processes, words_met)
from model import Conditioner, Config, DiT, add_noise, alpha_sigma, denoise, noise_level, schedule, shift_time, velocity
from sample import Context, denoise_block, sampling_settings, with_null

PHASES = "warm D", "warm G", "D", "G"                       # in this order; the last two, the game, in turns
CONTRAST = 1.0                                              # lambda: weight of D's loss on wrong prompts
PATIENCE = 100                                              # steps of the game that a warning looks back on
OWN_BLOCKS, RESTART = 2, 1 / 30                             # of a stream of G's own: blocks a step, and the chance of a new one


# -------------------------------------------------------------------------------- losses
# D's scores (B, S) of the same frames, real and rolled out from the same context, at the same level with the same noise;
# weights (B, S) of the frames, adding up to 1 in each item. Each returns (B,).
def generator_loss(real, fake, weights):
    """softplus(D(real) - D(fake))"""
    return (weights * F.softplus(real - fake)).sum(1)


def discriminator_loss(real, fake, weights):
    """softplus(D(fake) - D(real))"""
    return (weights * F.softplus(fake - real)).sum(1)


def contrastive_loss(real, wrong, weights, differs):
    """softplus(D(real, another item's prompt) - D(real)), where the other prompt differs from the item's own"""
    return (weights * F.softplus(wrong - real)).sum(1) * differs


# -------------------------------------------------------------------------------- the discriminator
class ConvNeXt(nn.Module):
    def __init__(self, width, stride):
        super().__init__()
        self.stride = stride
        self.depthwise = nn.Conv1d(width, width, 7, stride, padding=3, groups=width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):                                   # (B, width, T) -> (B, width, ceil(T / stride))
        y = self.norm(self.depthwise(x).transpose(1, 2))
        return x[..., ::self.stride] + self.down(F.gelu(self.up(y))).transpose(1, 2)


class Discriminator(nn.Module):
    """DiT and conditioner of the base model, and a head on the hidden states at three quarters of its depth."""
    def __init__(self, config, width=128, strides=(1, 2, 2)):
        super().__init__()
        self.config, self.layer, self.stride = config, round(0.75 * config.depth) - 1, math.prod(strides)
        self.dit, self.conditioner = DiT(config), Conditioner(config)
        self.norm, self.project = nn.LayerNorm(config.width), nn.Linear(config.width, width)
        self.head = nn.Sequential(*(ConvNeXt(width, stride) for stride in strides), nn.Conv1d(width, 1, 1))

    def forward(self, x, t, cond, first, remat=False):
        """Scores (B, S) of x (B, C, T) at levels t (B,), from frame `first` on: one for every `stride` frames.

        Score j looks around frame (first // stride + j) * stride; where `first` is no multiple, the first begins before it."""
        h = self.dit.hidden(x, t, cond, self.layer, remat)[:, 1:]                           # (B, T, D)
        scores = self.head(self.project(self.norm(h)).transpose(1, 2))[:, 0]                # (B, ceil(T / stride))
        return scores[:, first // self.stride:].float()

    def weights(self, music, first):
        """music (B, T): 1 where an item is music -> weights (B, S) for the scores of `forward`."""
        at = torch.arange(first // self.stride * self.stride, music.shape[1], self.stride, device=music.device)
        weights = music[:, at.clamp(min=first)]
        return weights / weights.sum(1, keepdim=True)

    def trained(self, phase):
        """What the optimizer of a phase moves: exactly what gets gradient, so that nothing else decays."""
        idle = ["dit.context_in.", "conditioner.proj_out."]
        if phase == "warm D":
            idle += ["norm.", "project.", "head."]
        else:
            idle += ["dit.project_out.", "dit.conv_out.", *(f"dit.layers.{i}." for i in range(self.layer + 1, self.config.depth))]
        return [p for name, p in self.named_parameters() if not name.startswith(tuple(idle))]


def start_discriminator(base, saved):
    """D with the weights of a model `base` and a new head, or as a checkpoint holds it."""
    critic = Discriminator(Config.from_dict(saved["discriminator"]["config"]) if saved else base.config).eval()
    if saved:
        critic.load_state_dict(saved["discriminator"]["weights"])
    else:
        critic.dit.load_state_dict(base.dit.state_dict())
        critic.conditioner.load_state_dict(base.conditioner.state_dict())
    return critic


def flow_loss(critic, cond, x0, noise, t, music, remat=False):
    """Plain flow matching over a whole sequence x0 (B, C, T), each item at its level t (B,), where it is music: (B,)."""
    level, objective = t[:, None, None], critic.config.objective
    v = critic.dit(add_noise(x0, noise, level, objective), t, cond, remat=remat)
    error = (v.float() - velocity(x0, noise, level, objective)).square().mean(1)            # (B, T)
    return (error * music).sum(1) / music.sum(1)


# -------------------------------------------------------------------------------- the rollout
def recorded(predict, seen):
    def predict_and_record(x, t):
        seen.append((x, t))
        return predict(x, t)
    return predict_and_record


@torch.no_grad()
def rollout(model, memory, prime, levels, ks, draw, sampler="pingpong"):
    """Go on from prime (B, C, context), block i in ks[i] denoising steps, as `sample.stream` would; draw() gives its noise.

    Returns the latents (B, C, len(ks) * block) and (x_t, t) of each block's last evaluation, for `replay`."""
    context, blocks, last = Context(model, memory, prime), [], []
    for k in ks:
        seen = []
        predict = recorded(context.predict, seen)
        blocks.append(denoise_block(predict, draw(), levels[:k], sampler, model.config.objective, draw))
        context.append(blocks[-1])
        last.append(seen[-1])
    return torch.cat(blocks, dim=-1), last


def replay(model, memory, prime, latents, last, gradient, precision):
    """The rollout's backward pass: gradient (B, C, T) of a loss by its latents -> gradients of G's parameters.

    Each block's last evaluation is made once more, differentiated and forgotten before the next: what would need the memory
    of all blocks needs that of one. The context is walked through again too, which is cheaper than keeping its caches."""
    block = model.config.block
    with precision():
        context = Context(model, memory, prime)
    for (x, t), x0, slope in zip(last, latents.split(block, dim=-1), gradient.split(block, dim=-1)):
        evaluate(model, context, x, t, precision).backward(slope, retain_graph=True)        # of the prompt's part, for the others
        context.append(x0)


def evaluate(model, context, x, t, precision):
    """x0 of one evaluation with its graph. Nothing else of a rollout has one."""
    with precision():
        return denoise(x, context.predict(x, t), t, model.config.objective)[0]


@torch.no_grad()
def trajectory(teacher, cond, prime, levels, cfg, draw):
    """The finetuned model's own path to the block after prime: (x_t, t) of every evaluation, and its end (B, C, block)."""
    context, seen = Context(teacher, teacher.dit.encode_prompt(with_null(cond, cfg)), prime), []
    end = denoise_block(recorded(context.predict, seen), draw(), levels, "euler", teacher.config.objective, draw, cfg)
    return seen, end


def pick_up(streams, items, prime, prompts, anew):
    """Where the items' own streams {item: (context (C, context), prompt)} have got to: contexts as prime, prompts.

    One begins from prime and prompts where there is none yet, and where anew (of the whole batch) says so."""
    starts = dict(zip(items, zip(prime.cpu(), prompts)))
    contexts, prompts = zip(*(starts[item] if anew[item] else streams.get(item, starts[item]) for item in items))
    return torch.stack(contexts).to(prime.device), list(prompts)


# -------------------------------------------------------------------------------- what a step draws
class Batch(NamedTuple):
    """Rows of a batch; everything random is drawn for the whole batch, then cut to them."""
    latents: torch.Tensor                                   # (B, C, context + rollout): real
    music: torch.Tensor                                     # (B, context + rollout): 1 where latents are music, 0 where absent
    prompts: list
    others: list                                            # the prompts of other items
    noise: torch.Tensor                                     # as latents
    uniform: torch.Tensor                                   # (B,) in [0, 1), for the level
    ks: list                                                # denoising steps of each block, the same for all items
    draw: Callable                                          # -> noise (B, C, block)
    rng: np.random.Generator                                # for what is left to draw, the same in all rows


def draw_batch(tracks, config, batch, blocks, most, rows, seed, phase, step):
    """Rows (a slice) of the batch of a phase's step: `blocks` to roll out, each in 1 to `most` denoising steps.

    A track too short begins right after an empty context, as a stream would, and what lies beyond its end is not scored."""
    c, rng = config, np.random.default_rng([seed, PHASES.index(phase), step])
    positions, missing, total = rng.random(batch), missing_context(rng, batch, config), config.context_blocks + blocks
    uniform, ks = torch.from_numpy(rng.random(batch)).float(), rng.integers(1, most, blocks, endpoint=True).tolist()
    generator = torch.Generator().manual_seed(int(rng.integers(2 ** 31)))
    draw = lambda length=c.block: torch.randn(batch, c.channels, length, generator=generator)[rows]
    latents, prompts, absent = data.crops_at(tracks, total, c.block, positions[rows])
    others = data.crops_at(tracks, 1, c.block, np.roll(positions, 1)[rows])[1]
    music = torch.ones(len(latents), total)
    for i, (gone, short) in enumerate(zip(missing[rows], absent.tolist())):
        early = max(0, short - c.context_blocks)            # blocks that such a track is moved to the left
        latents[i] = latents[i].roll(-early * c.block, dims=-1)
        latents[i, :, :gone * c.block] = 0
        music[i, :max(gone, short - early)] = music[i, total - early:] = 0
    return Batch(latents, music.repeat_interleave(c.block, dim=1), prompts, others, draw(total * c.block), uniform[rows], ks, draw, rng)


def verdict(recent):
    """What has gone wrong in the last steps of the game [(D's margin, latents' spread against music's)], or None."""
    margin, spread = np.mean(recent, axis=0)
    if not 0.5 <= spread <= 2:
        return f"the rollout's latents have {spread:.2f}x the standard deviation of music: G is falling apart; lower --lr, warm up longer"
    if not abs(margin) <= 4:                                # softplus(-4) = 0.02
        return f"{'D' if margin > 0 else 'G'} wins every time (margin {margin:.1f}): lower {'--d-lr' if margin > 0 else '--lr'} or warm up longer"


# -------------------------------------------------------------------------------- the script
def parser():
    p = argparse.ArgumentParser(description="ARC-Forcing: stable for minutes, in a handful of steps.", allow_abbrev=False)
    p.add_argument("--init", default="out/finetune.pt", help="finetuned checkpoint to start from")
    p.add_argument("--data", help="folder of audio files (default: the one --init was finetuned on)")
    p.add_argument("--base", help="checkpoint for the discriminator, or none: --init itself (default: the public model that --init comes from)")
    p.add_argument("--out", default="out/arc.pt")
    p.add_argument("--resume", action="store_true", help="go on from --out, with its settings unless given anew")
    # the game
    p.add_argument("--rollout", type=whole, default=4, help="blocks that G plays in a row")
    p.add_argument("--most", type=whole, default=8, help="denoising steps of a block: drawn from 1 to this, and what the result plays with")
    p.add_argument("--steps", type=whole, default=2000, help="of the game, half of them D's, half G's")
    p.add_argument("--batch", type=whole, default=8, help="rollouts per step, over all processes and accumulations")
    p.add_argument("--accumulate", type=whole, default=1, help="backward passes per step")
    p.add_argument("--lr", type=float, default=1e-6, help="of G")
    p.add_argument("--d-lr", type=float, default=1e-6, help="of D")
    p.add_argument("--clip", type=float, default=1.0, help="gradient norm")
    p.add_argument("--seed", type=random_seed, default=0)
    # before the game
    p.add_argument("--d-warmup", type=int, default=500, help="steps of flow matching for D")
    p.add_argument("--g-warmup", type=int, default=0, help="steps of G on the finetuned model's own trajectories")
    p.add_argument("--on-policy", type=int, default=0, help="the last so many of those steps start from where G's own streams have got to, not from music")
    p.add_argument("--warmup-lr", type=float, default=5e-5, help="of both, falling to 0")
    p.add_argument("--teacher-steps", type=whole, help="steps of those trajectories (default: as --init plays)")
    p.add_argument("--teacher-cfg", type=finite, help="guidance of those trajectories (default: as --init plays)")
    # reports
    p.add_argument("--every", type=whole, default=50, help="steps between checkpoints")
    p.add_argument("--sample-every", type=int, default=500, help="steps between samples in out/samples, 0 for none")
    # machine
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto")
    p.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True, help="activation checkpointing in D: less memory, slower")
    p.add_argument("--threads", type=whole, help="CPU threads (default: PyTorch's choice)")
    return p


def fill_in(args):
    """--data and --base, where not named, as the checkpoint --init was made."""
    if not Path(args.init).is_file():
        raise UserError(f"no checkpoint at {args.init}: run finetune.py first, or name a finetuned one with --init")
    saved = read_checkpoint(args.init)
    check_streams(args.init, saved["stage"])
    made = saved.get("args", {})
    args.data = args.data or made.get("data")
    if args.data is None:
        raise UserError(f"--data is missing, and {args.init} does not tell what it was finetuned on: name a folder of audio files")
    if args.base is None:
        args.base = made.get("base") or made.get("init") or "none"
        if not Path(args.base).is_file() or read_checkpoint(args.base)["stage"] != "base":
            args.base = "none"


def next_phase(done, args):
    """done: steps made in each phase. None when all is done. D begins."""
    if done["warm D"] < args.d_warmup:
        return "warm D"
    if done["warm G"] < args.g_warmup:
        return "warm G"
    if done["D"] + done["G"] < args.steps:
        return "D" if done["D"] <= done["G"] else "G"


def over_processes(sums, world):
    """{name: sum over this process's items} -> over everyone's."""
    values = torch.stack([v.double().cpu() for v in sums.values()])
    if world > 1:
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values)
    return dict(zip(sums, values.tolist()))


def of_all(mine, world):
    """{item: ...} of this process -> of all processes."""
    everyone = [mine] * world
    if world > 1:
        dist.all_gather_object(everyone, mine)
    return {item: value for theirs in everyone for item, value in theirs.items()}


def main():
    args, saved = parse(parser())
    if saved is None:
        fill_in(args)
    elif "discriminator" not in saved:
        raise UserError(f"{args.out} holds no ARC-Forcing to resume")
    if args.g_warmup and Path(args.init).resolve() == Path(args.out).resolve():
        raise UserError(f"--out {args.out} would overwrite the warm-up's teacher, --init: name another")
    writable(args.out)
    torch.set_flush_denormal(True)
    if args.threads:
        torch.set_num_threads(args.threads)
    rank, world, device = start_processes(args.device)
    if args.remat and device.type == "cpu":
        if speed:
            speed.return_memory()
    rows = micro_rows(args.batch, args.accumulate, world, rank)
    torch.manual_seed(args.seed)                            # for the head's first weights
    say = lambda text: rank or print(text, file=sys.stderr)
    model = load(args.init if saved is None else args.out)
    base = load(args.base) if args.base != "none" else model
    if data.fingerprint(base) != data.fingerprint(model):
        raise UserError(f"--base {args.base} and --init {args.init} have different autoencoders: their latents do not compare")
    critic = start_discriminator(base, saved)
    c = model.config
    precision_name, precision = training_precision(args.precision, device)
    frames, levels = c.context + args.rollout * c.block, schedule(args.most)[:-1].to(device)

    dataset = prepare_once(args.data, model, device, rank, world)
    texts = encode_texts(model, dataset.tracks)
    critic_texts = texts if base is model else encode_texts(base, dataset.tracks)
    learns = dict(prompt=dataset.train[0].prompt, words=words_met(model, dataset.train) if model.sampling.get("words") else [])
    del base
    model.to(device).requires_grad_(False)
    critic.to(device)

    # --- optimizers: the context's own layer gets no gradient here, its keys and values are always detached
    players = {phase: critic.trained(phase) for phase in ("warm D", "D")}
    players["G"] = [p.requires_grad_() for part in (model.dit, model.conditioner) for name, p in part.named_parameters()
                    if not name.startswith(("context_in.", "proj_out."))]
    players["warm G"] = players["G"]
    adam = lambda phase, lr: torch.optim.AdamW(players[phase], lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    rates = {"warm D": args.warmup_lr, "warm G": args.warmup_lr, "D": args.d_lr, "G": args.lr}
    optimizers, done, streams = {phase: adam(phase, rates[phase]) for phase in PHASES}, dict.fromkeys(PHASES, 0), {}
    if saved is not None:
        done, streams = dict(saved["done"]), dict(saved.get("streams", {}))
        for phase, optimizer in optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][phase])
            if not phase.startswith("warm"):                # one given anew counts; a warm-up's is set at each step
                optimizer.param_groups[0]["lr"] = rates[phase]
        del saved
    teacher = None
    if done["warm G"] < args.g_warmup:
        teacher = load(args.init).to(device).requires_grad_(False)
        if teacher.config != c:
            raise UserError(f"--init {args.init} has other sizes, blocks or another regime than {args.out}: it is not its teacher")
        teaching = sampling_settings(teacher, args.teacher_steps, "euler", args.teacher_cfg)
    log = Log(Path(args.out).with_suffix(".csv"), ("step", "phase", "loss", "contrastive", "real", "fake", "wrong", "spread", "gradient",
                                                   "seconds"), sum(done.values())) if not rank else None
    million = lambda parameters: f"{sum(p.numel() for p in parameters) / 1e6:.1f} M"
    say(f"{'block-causal' if c.causal else 'encoder-decoder'}; G {million(players['G'])}, D {million(players['D'])} parameters to train, D from "
        f"{args.out if args.resume else args.init if args.base == 'none' else args.base}, layer {critic.layer}; {c.context} + {args.rollout} x {c.block} frames = "
        f"{frames / c.frame_rate:.1f} s, 1 to {args.most} denoising steps a block; batch {args.batch} = {world} processes x {args.accumulate} x "
        f"{args.batch // world // args.accumulate}; {device.type}, {precision_name}; done {done}")

    def write():
        if not rank:
            save(model, args.out, sum(done.values()), " ".join(["arc_forcing.py", *sys.argv[1:]]), args=vars(args), done=done, streams=streams,
                 discriminator={"config": critic.config.to_dict(), "weights": critic.state_dict()},
                 optimizers={phase: optimizer.state_dict() for phase, optimizer in optimizers.items()})

    # --- the loop: one phase's step at a time, all its accumulations, then its optimizer
    recent, clock, spent = deque(maxlen=PATIENCE), time.time(), {phase: [] for phase in PHASES}
    bar = tqdm(total=args.d_warmup + args.g_warmup + args.steps, initial=sum(done.values()), file=sys.stderr, disable=None if not rank else True)
    try:
        while phase := next_phase(done, args):
            sums, moved, begun = {}, {}, time.time()
            def add(**values):
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + value.detach().sum()
            for part in rows:
                b = draw_batch(dataset.train, c, args.batch, args.rollout, args.most, part, args.seed, phase, done[phase])
                latents, music, noise, uniform = (y.to(device) for y in (b.latents, b.music, b.noise, b.uniform))
                prime, real, draw = latents[..., :c.context], latents[..., c.context:], lambda: b.draw().to(device)
                share = world / args.batch                  # of one item: the mean over processes is the batch's

                # --- D learns to denoise what it will judge
                if phase == "warm D":
                    with precision():
                        cond = condition(critic, critic_texts, b.prompts, device, frames=frames)
                        losses = flow_loss(critic, cond, latents, noise, shift_time(uniform, frames), music, args.remat)
                    (losses.sum() * share).backward()
                    add(loss=losses)
                    continue
                prompts, on_policy = b.prompts, phase == "warm G" and done[phase] >= args.g_warmup - args.on_policy
                if on_policy:
                    items = range(part.start, part.stop)
                    prime, prompts = pick_up(streams, items, prime, prompts, b.rng.random(args.batch) < RESTART)
                with precision(), torch.set_grad_enabled(phase != "D"):
                    cond = condition(model, texts, prompts, device)
                    memory = model.dit.encode_prompt(cond)

                # --- G learns where its teacher's path leads, from some of the points on the way
                if phase == "warm G":
                    if on_policy:                           # what G's own playing leads to, and music never does
                        with precision():
                            played, _ = rollout(model, memory, prime, levels, [args.most] * OWN_BLOCKS, draw, "dpmpp")   # no noise of its own
                        prime = torch.cat([prime, played], dim=-1)[..., -c.context:]
                        moved.update(zip(items, zip(prime.cpu(), prompts)))
                    with precision(), torch.no_grad():
                        cond = condition(teacher, texts, prompts, device)
                        points, end = trajectory(teacher, cond, prime, schedule(teaching["steps"])[:-1].to(device), teaching["cfg"], draw)
                        context = Context(model, memory, prime)
                    chosen = b.rng.permutation(len(points))[:args.most]
                    for i in chosen:
                        x, t = points[i]
                        weight = 1 / alpha_sigma(t, c.objective)[1] ** 2 / len(chosen)      # an error of x0 over sigma is one of v: all levels weigh alike
                        losses = weight * (evaluate(model, context, x, t, precision) - end).square().mean((1, 2))
                        (losses.sum() * share).backward(retain_graph=True)
                        add(loss=losses)
                    continue

                # --- the game: both are judged at the same level, under the same noise
                with precision():
                    fake, last = rollout(model, memory, prime, levels, b.ks, draw)
                t, judged = noise_level(uniform), music[:, None, c.context:]
                weights = critic.weights(music, c.context)
                def score(x, cond):
                    x = torch.cat([prime, x * judged], dim=-1)
                    return critic(add_noise(x, noise, t[:, None, None], critic.config.objective), t, cond, c.context, args.remat)
                with precision():
                    told = condition(critic, critic_texts, b.prompts, device, frames=frames)
                    with torch.set_grad_enabled(phase == "D"):
                        d_real = score(real, told)
                    d_fake = score(fake.requires_grad_(phase == "G"), told)
                    if phase == "D":
                        d_wrong = score(real, condition(critic, critic_texts, b.others, device, frames=frames))
                if phase == "G":
                    losses = generator_loss(d_real, d_fake, weights)
                    gradient, = torch.autograd.grad(losses.sum() * share, fake)
                    replay(model, memory, prime, fake.detach(), last, gradient, precision)
                else:
                    differs = torch.tensor([mine != other for mine, other in zip(b.prompts, b.others)], device=device).float()
                    losses, contrastive = discriminator_loss(d_real, d_fake, weights), contrastive_loss(d_real, d_wrong, weights, differs)
                    ((losses + CONTRAST * contrastive).sum() * share).backward()
                    add(contrastive=contrastive, wrong=weights * d_wrong)
                add(loss=losses, real=weights * d_real, fake=weights * d_fake, fake_std=(fake * judged).std((1, 2)), real_std=real.std((1, 2)))

            # --- the phase's one update
            optimizer, trained = optimizers[phase], players[phase]
            average_gradients(trained, world)
            norm = nn.utils.clip_grad_norm_(trained, args.clip)
            if phase.startswith("warm"):                    # falls to zero: a warm-up ends settled, not shaken by its last batches
                optimizer.param_groups[0]["lr"] = args.warmup_lr * (1 - done[phase] / (args.d_warmup if phase == "warm D" else args.g_warmup))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done[phase] += 1
            if moved:
                streams.update(of_all(moved, world))
            step, game = sum(done.values()), done["D"] + done["G"]
            if phase.startswith("warm") and next_phase(done, args) != phase:
                optimizer.state.clear()                     # it has served: twice the weights' memory
                teacher = teacher if phase == "warm D" else None
            if game:
                model.stage, model.sampling = "arc", dict(steps=args.most, **learns)
            elif phase == "warm G":
                model.sampling |= learns
            bar.update()

            # --- log, warning, checkpoint, sample
            sums = {name: value / args.batch for name, value in over_processes(sums, world).items()}
            spent[phase].append(time.time() - begun)        # a GPU has been waited for
            if phase in ("D", "G"):
                sums["spread"] = sums.pop("fake_std") / max(1e-6, sums.pop("real_std"))     # 1e-6: silence
                recent.append((sums["real"] - sums["fake"], sums["spread"]))
                if len(recent) == PATIENCE and game % PATIENCE == 0 and (warning := verdict(recent)) and not rank:
                    bar.write(f"warning, step {step}: {warning}", file=sys.stderr)
            if not rank:
                bar.set_postfix_str(f"{phase}: " + ", ".join(f"{name} {value:.3f}" for name, value in sums.items()))
                log.write(step=step, phase=phase, gradient=f"{norm.item():.6g}", seconds=f"{time.time() - clock:.1f}",
                          **{name: f"{value:.9g}" for name, value in sums.items()})
            if step % args.every == 0 or not next_phase(done, args):
                write()
            if args.sample_every and phase in ("D", "G") and game % args.sample_every == 0 and not rank:
                name = Path(args.out).parent / "samples" / f"{Path(args.out).stem}_{game}.wav"
                render_sample(model, texts, learns["prompt"], name, 10, device, precision)
                bar.write(f"-> {name}", file=sys.stderr)
    except KeyboardInterrupt:                               # `done` is right, unless it fell into the update itself
        write()
        say(f"\nstopped after step {sum(done.values())}; go on with --resume")
        raise
    else:
        if world > 1:
            dist.barrier()                                  # nobody leaves while another still talks
    finally:
        bar.close()
        if world > 1:
            dist.destroy_process_group()
    say(", ".join([*(f"{np.mean(seconds):.2f} s a step of {phase}" for phase, seconds in spent.items() if seconds), peak_memory(device)]))
    say(f"-> {args.out}; hear it with: python sample.py --ckpt {args.out} > out.wav")


if __name__ == "__main__":
    run(main)
