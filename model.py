"""Live Music Diffusion: the networks.

An autoencoder turns audio into latent frames and back; a diffusion transformer (DiT) denoises one block of latent
frames at a time, given a context of finished blocks. Both are the public Stable Audio networks, plus one linear layer,
`context_in`, through which finished frames enter clean. Nothing here reads a file or knows a loss.

Letters: B batch, C latent channels, T frames, D width, H heads, L conditioning tokens, N tokens of a pass.
Sources: Stable Audio Open (arXiv 2407.14358), Live Music Diffusion Models (arXiv 2605.22717, "the paper").
"""
import math
import re
import zlib
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


# ------------------------------------------------------------------------------------------------ sizes
@dataclass(frozen=True)
class Config:
    """Every size of the model and of its stream, saved in each checkpoint. Derived sizes are properties."""
    # audio and autoencoder
    sample_rate: int = 44100
    audio_channels: int = 2
    latent_channels: int = 64                               # C
    ae_width: int = 128
    ae_multipliers: tuple = (1, 2, 4, 8, 16)
    ae_strides: tuple = (2, 4, 4, 8, 8)
    # conditioning
    text: str = "t5"                                        # "t5", or "words": a small table trained with the DiT
    text_model: str = "t5-base"                             # name or folder of the T5 encoder
    text_tokens: int = 64
    text_width: int = 768                                   # of T5; rows of the table for "words"
    cond_width: int = 768
    numbers: tuple = (("seconds_total", 0, 256),)           # (id, min, max)
    cross_ids: tuple = ("prompt", "seconds_total")          # what cross-attention reads, in order
    global_ids: tuple = ("seconds_total",)                  # what is added to the timestep embedding
    # diffusion transformer
    width: int = 1024                                       # D
    depth: int = 16
    heads: int = 8                                          # H
    project_cond: bool = True                               # project conditioning tokens to D
    qk_norm: bool = True
    objective: str = "rectified_flow"                       # or "v"
    # the stream
    block: int = 48                                         # frames made at once
    context_blocks: int = 4                                 # finished blocks that a new one sees
    causal: bool = True                                     # block-causal, or (False) encoder-decoder
    clip: int = 256                                         # frames that the public model makes at once

    @property
    def hop(self):
        """Audio samples per latent frame."""
        return math.prod(self.ae_strides)

    @property
    def frame_rate(self):
        return self.sample_rate / self.hop

    @property
    def context(self):
        """Frames of context."""
        return self.context_blocks * self.block

    @property
    def window(self):
        """Frames of context and new block together."""
        return self.context + self.block

    @property
    def head_width(self):
        return self.width // self.heads

    @property
    def token_width(self):
        """Width of a conditioning token inside the DiT."""
        return self.width if self.project_cond else self.cond_width

    @property
    def reach_blocks(self):
        """Blocks that can influence a new one through all layers: what `use_cache=False` must recompute."""
        return self.context_blocks * (self.depth if self.causal else 1)

    def numbers_for(self, frames):
        """Values for the number conditioners where `frames` pass through the network: their length, rounded up."""
        seconds = {"seconds_start": 0, "seconds_total": math.ceil(frames / self.frame_rate)}
        return {name: seconds[name] for name, _, _ in self.numbers}

    @property
    def stream_numbers(self):
        """The same while streaming and finetuning: always the window's."""
        return self.numbers_for(self.window)

    @property
    def decoder_margin(self):
        """Latent frames on each side that one frame's audio depends on."""
        reach = 3                                           # audio samples: the last convolution
        for stride in self.ae_strides:                      # from the audio side inwards
            reach = math.ceil((reach + 3 * (1 + 3 + 9) + stride) / stride)
        return reach + 3

    @property
    def encoder_margin(self):
        """Latent frames of audio on each side that one latent frame depends on."""
        reach = 1                                           # frames: the last convolution
        for stride in reversed(self.ae_strides):            # from the latent side outwards
            reach = reach * stride + stride + 3 * (1 + 3 + 9)
        return math.ceil((reach + 3) / self.hop)

    def to_dict(self):
        return asdict(self)

    @staticmethod
    def from_dict(values):
        """Inverse of `to_dict`; lists become tuples, unknown fields are an error."""
        freeze = lambda v: tuple(map(freeze, v)) if isinstance(v, (list, tuple)) else v
        unknown = set(values) - {f.name for f in fields(Config)}
        if unknown:
            raise ValueError(f"unknown Config field: {', '.join(sorted(unknown))}")
        return Config(**{k: freeze(v) for k, v in values.items()})


PRESETS = {
    "nano": Config(ae_width=16, ae_strides=(4, 4, 4, 4, 4), text="words", text_tokens=16, text_width=1024,
                   cond_width=128, width=256, depth=6, heads=4),
    "sao_small": Config(),
    "sao_1_0": Config(text_tokens=128, numbers=(("seconds_start", 0, 512), ("seconds_total", 0, 512)),
                      cross_ids=("prompt", "seconds_start", "seconds_total"),
                      global_ids=("seconds_start", "seconds_total"),
                      width=1536, depth=24, heads=24, project_cond=False, qk_norm=False, objective="v", clip=1024),
}


# ------------------------------------------------------------------------------------------------ noise
def alpha_sigma(t, objective):
    """Weights of signal and noise at level t in [0, 1]: x_t = alpha * x0 + sigma * eps."""
    if objective == "rectified_flow":
        return 1 - t, t
    return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)


def add_noise(x0, eps, t, objective):
    """x_t. t broadcasts against x0."""
    alpha, sigma = alpha_sigma(t, objective)
    return alpha * x0 + sigma * eps


def velocity(x0, eps, t, objective):
    """What the DiT is trained to predict from x_t."""
    if objective == "rectified_flow":
        return eps - x0
    alpha, sigma = alpha_sigma(t, objective)
    return alpha * eps - sigma * x0


def denoise(x, v, t, objective):
    """(x_t, v) -> (x0, eps), the inverse of `add_noise` and `velocity`."""
    alpha, sigma = alpha_sigma(t, objective)
    if objective == "rectified_flow":
        return x - sigma * v, x + alpha * v
    return alpha * x - sigma * v, sigma * x + alpha * v


def noise_level(u):
    """The noise level a share u in [0, 1] of the way from noise to music: t = sigmoid(-l), l linear from -6 to 2."""
    return torch.sigmoid(6 - 8 * u)


def schedule(steps):
    """The steps + 1 noise levels of a block, from 1 down to 0."""
    t = noise_level(torch.linspace(0, 1, steps + 1))
    t[0], t[-1] = 1, 0
    return t


def shift_time(t, frames, more=0.0):
    """The public models' shift of training levels towards noise for longer clips, and `more` on top. t in [0, 1], frames of the window."""
    mu = -(0.5 + 0.65 * (min(max(frames, 256), 4096) - 256) / 3840) - more
    return t / (t + math.exp(mu) * (1 - t))                 # = 1 - e^mu / (e^mu + t / (1 - t))


# ------------------------------------------------------------------------------------------------ autoencoder
class SnakeBeta(nn.Module):
    """x + sin^2(alpha x) / beta, alpha and beta stored as logs per channel."""
    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def constants(self, dtype):
        """alpha and 1 / beta, each (channels,)."""
        return self.alpha.exp().to(dtype), 1 / (self.beta.exp().to(dtype) + 1e-9)

    def forward(self, x, out=None):
        """x (B, channels, samples). out: where to write, x itself if you like; not where gradients are recorded."""
        alpha, gain = (y[:, None] for y in self.constants(x.dtype))
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.numel() <= 2 ** 21:
            return torch.addcmul(x, (alpha * x).sin_().square_(), gain, out=out)
        # above 2^21 values in pieces that fit a CPU's cache, so that what lies between two operations never goes to main memory
        out, piece = torch.empty_like(x) if out is None else out, max(1, 2 ** 17 // x[..., 0].numel())
        for part, made in zip(x.split(piece, dim=-1), out.split(piece, dim=-1)):
            torch.addcmul(part, (alpha * part).sin_().square_(), gain, out=made)
        return out


# Run as two-dimensional convolutions over (B, channels, 1, samples) with the channels last in memory: the same numbers,
# several times faster on CPUs. The layout, once given to the input, goes through the whole network.
class Conv1d(nn.Conv1d):
    def forward(self, x):
        return F.conv2d(x[:, :, None], self.weight[:, :, None], self.bias, (1, *self.stride), (0, *self.padding),
                        (1, *self.dilation))[:, :, 0]


class ConvTranspose1d(nn.ConvTranspose1d):
    def forward(self, x):
        return F.conv_transpose2d(x[:, :, None], self.weight[:, :, None], self.bias, (1, *self.stride),
                                  (0, *self.padding))[:, :, 0]


def channels_last(x):                                       # (B, channels, samples), only its memory order changes
    return x[:, :, None].contiguous(memory_format=torch.channels_last)[:, :, 0]


class ResidualUnit(nn.Module):
    def __init__(self, channels, dilation):
        super().__init__()
        self.layers = nn.Sequential(
            SnakeBeta(channels), Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation),
            SnakeBeta(channels), Conv1d(channels, channels, 1))

    def forward(self, x):
        x = x.to(self.layers[1].weight.dtype)               # in bf16 the last units stay in float32
        return x + self.layers(x)


def residual_units(channels):
    return [ResidualUnit(channels, dilation) for dilation in (1, 3, 9)]


class Autoencoder(nn.Module):
    """The "Oobleck" variational autoencoder: (B, 2, samples) <-> (B, C, samples / hop)."""
    def __init__(self, config):
        super().__init__()
        strides = config.ae_strides
        self.hop = config.hop
        widths = [config.ae_width] + [config.ae_width * m for m in config.ae_multipliers]
        levels = list(zip(widths, widths[1:], strides))     # (audio side, latent side, stride), from the audio inwards

        encoder = [Conv1d(config.audio_channels, widths[0], 7, padding=3)]
        for outer, inner, stride in levels:
            encoder += [*residual_units(outer), SnakeBeta(outer),
                        Conv1d(outer, inner, 2 * stride, stride, padding=math.ceil(stride / 2))]
        encoder += [SnakeBeta(widths[-1]), Conv1d(widths[-1], 2 * config.latent_channels, 3, padding=1)]

        decoder = [Conv1d(config.latent_channels, widths[-1], 7, padding=3)]
        for outer, inner, stride in reversed(levels):
            decoder += [SnakeBeta(inner),
                        ConvTranspose1d(inner, outer, 2 * stride, stride, padding=math.ceil(stride / 2)),
                        *residual_units(outer)]
        decoder += [SnakeBeta(widths[0]), Conv1d(widths[0], config.audio_channels, 7, padding=3, bias=False)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def posterior(self, audio):
        """(B, 2, samples) -> mean, standard deviation (B, C, T). Samples past the last whole frame are dropped."""
        audio = audio[..., :audio.shape[-1] // self.hop * self.hop]
        mean, scale = self.encoder(channels_last(audio)).chunk(2, dim=1)
        return mean, F.softplus(scale) + 1e-4

    def encode(self, audio):
        """(B, 2, samples) in [-1, 1] -> latents (B, C, T): the posterior's mean."""
        return self.posterior(audio)[0]

    def decode(self, latents):
        """(B, C, T) -> audio (B, 2, T * hop), not clipped."""
        return self.decoder(channels_last(latents.to(self.decoder[0].weight.dtype)))


# ------------------------------------------------------------------------------------------------ conditioning
class Cond(NamedTuple):
    """What the DiT is told. tokens (B, L, cond_width) go to cross-attention, global_ (B, ·) to the timestep token."""
    tokens: torch.Tensor
    global_: torch.Tensor

    def null(self):
        """The unconditional branch of classifier-free guidance: zero tokens, the global vector stays."""
        return Cond(torch.zeros_like(self.tokens), self.global_)


class Number(nn.Module):
    """A number, clamped to [low, high], as one token."""
    def __init__(self, low, high, width):
        super().__init__()
        self.low, self.high = low, high
        self.frequencies = nn.Parameter(torch.randn(128))
        self.linear = nn.Linear(257, width)

    def forward(self, values):                              # (B,)
        x = ((values.clamp(self.low, self.high) - self.low) / (self.high - self.low))[:, None]
        angles = 2 * math.pi * x * self.frequencies
        return self.linear(torch.cat([x, angles.sin(), angles.cos()], dim=-1).to(self.linear.weight.dtype))    # (B, width)


def words_of(prompt):
    return re.findall(r"\w+", prompt.lower())


class Words(nn.Module):
    """Lower-cased words and numbers of a prompt, hashed into a table: a text encoder that needs no download."""
    def __init__(self, rows, width, tokens):
        super().__init__()
        self.tokens = tokens
        self.table = nn.Embedding(rows + 1, width, padding_idx=0)   # row 0: the zero padding

    def forward(self, prompts):                             # B strings
        ids = torch.zeros(len(prompts), self.tokens, dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            words = words_of(prompt)[:self.tokens]
            # crc32 and not hash(): the same on every machine and in every Python
            row[:len(words)] = torch.tensor([1 + zlib.crc32(w.encode()) % (self.table.num_embeddings - 1) for w in words])
        return self.table(ids.to(self.table.weight.device))         # (B, tokens, width)


class Conditioner(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.numbers = nn.ModuleDict({name: Number(low, high, config.cond_width) for name, low, high in config.numbers})
        if config.text == "words":
            self.words = Words(config.text_width, config.cond_width, config.text_tokens)
        elif config.text_width != config.cond_width:
            self.proj_out = nn.Linear(config.text_width, config.cond_width)

    def embed_text(self, prompts):
        """B strings -> (B, text_tokens, cond_width), zero at padding."""
        if self.config.text == "words":
            return self.words(prompts)
        from stable_audio_port import encode_t5             # which itself imports this file
        device = next(self.numbers.parameters()).device     # T5 itself runs on the CPU
        states, mask = (y.to(device) for y in encode_t5(prompts, self.config.text_model, self.config.text_tokens, self.config.text_width))
        if self.config.text_width != self.config.cond_width:
            states = self.proj_out(states.to(self.proj_out.weight))
        return states * mask.to(states)[..., None]

    def forward(self, text, **numbers):
        """text: B prompts, or their embeddings (B, L, cond_width). numbers: one value, or B, for each number id.

        Raises ValueError when a number is missing or unknown."""
        if set(numbers) != set(self.numbers):
            raise ValueError(f"the conditioner needs the numbers {sorted(self.numbers)}, got {sorted(numbers)}")
        tokens = text if torch.is_tensor(text) else self.embed_text(list(text))
        parts = {"prompt": tokens}
        for name, number in self.numbers.items():
            values = torch.as_tensor(numbers[name], dtype=torch.float32, device=tokens.device).expand(len(tokens))
            parts[name] = number(values)[:, None]           # (B, 1, cond_width)
        return Cond(torch.cat([parts[name] for name in self.config.cross_ids], dim=1),
                    torch.cat([parts[name][:, 0] for name in self.config.global_ids], dim=-1))


# ------------------------------------------------------------------------------------------------ positions and masks
def rotary(positions, inv_freq):
    """Positions (N,) -> [cos | cos], [-sin | sin], each (N, 2 * len(inv_freq)). Angles in float64: exact a million frames on."""
    angles = torch.outer(positions.double(), inv_freq.double()).remainder(2 * math.pi)
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, rope):
    """Rotate the first channels of each head, half-split convention. x (B, H, N, d)."""
    cos, sin = rope                                         # (N, r) each
    r = cos.shape[-1]
    head = x[..., :r].float()
    head = head * cos + head.roll(r // 2, dims=-1) * sin    # the halves change places
    return torch.cat([head.to(x.dtype), x[..., r:]], dim=-1)


def visible(q_block, q_noisy, k_block, k_noisy, context_blocks, causal):
    """The one mask. Block indices and noisy flags of queries (Q,) and keys (K,) -> (Q, K), True where seen.

    Everyone sees their own block; finished (clean) blocks are seen by whoever comes after, `context_blocks` back.
    Without `causal` the clean frames are a window of their own: all of them see each other, both ways.
    A timestep token counts as a noisy token of its block. No clean token ever sees a noisy one."""
    q_block, q_noisy = q_block[:, None], q_noisy[:, None]
    own = (k_block == q_block) & (k_noisy == q_noisy)
    if causal:
        return own | ~k_noisy & (k_block < q_block) & (k_block >= q_block - context_blocks)
    return own | ~k_noisy.expand_as(own)


class Plan(NamedTuple):
    """Tokens come in pieces, a block or a timestep token, whose tokens see and are seen alike.

    queries, keys: sizes of the pieces; groups: [(pieces of queries, pieces of keys)] that attend together."""
    queries: list
    keys: list
    groups: list


@lru_cache(maxsize=64)
def attention_plan(past, clean, noisy, block, context_blocks, causal):
    """`visible` for one pass over [past keys | clean blocks | noisy blocks | a timestep token each], as a Plan.

    past, clean, noisy: tuples of block indices. None when everything is seen."""
    index, first_noisy = torch.tensor([*past, *clean, *noisy, *noisy]), len(past) + len(clean)
    sizes, is_noisy, new = [block] * (first_noisy + len(noisy)) + [1] * len(noisy), torch.arange(len(index)) >= first_noisy, len(past)
    mask = visible(index[new:], is_noisy[new:], index, is_noisy, context_blocks, causal)
    groups = {}
    for piece, row in enumerate(mask.tolist()):
        groups.setdefault(tuple(i for i, seen in enumerate(row) if seen), []).append(piece)
    return None if mask.all() else Plan(sizes[new:], sizes, [(queries, keys) for keys, queries in groups.items()])


# ------------------------------------------------------------------------------------------------ transformer
def split_heads(x, width):                                  # (B, N, H * d) -> (B, H, N, d)
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention (`token_width` None) or cross-attention to conditioning tokens. No biases."""
    def __init__(self, config, token_width=None):
        super().__init__()
        self.head_width = config.head_width
        if token_width is None:
            self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        else:
            self.q = nn.Linear(config.width, config.width, bias=False)
            self.kv = nn.Linear(token_width, 2 * token_width, bias=False)
        norm = (lambda: nn.LayerNorm(config.head_width, eps=1e-6)) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()
        self.out = nn.Linear(config.width, config.width, bias=False)

    def attend(self, q, k, v, plan=None):
        """What a mask would give, without multiplying what is not seen. q, k, v (B, H, N, d) -> (B, H, N, d)."""
        if plan is None:                                    # fewer key than query heads: each serves consecutive ones
            return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, enable_gqa=q.shape[1] != k.shape[1])
        q, k, v, y = q.split(plan.queries, dim=2), k.split(plan.keys, dim=2), v.split(plan.keys, dim=2), {}
        join = lambda pieces, chosen: torch.cat([pieces[i] for i in chosen], dim=2)
        for queries, keys in plan.groups:
            made = self.attend(join(q, queries), join(k, keys), join(v, keys))
            y |= zip(queries, made.split([plan.queries[i] for i in queries], dim=2))
        return join(y, range(len(q)))

    def merge_heads(self, y):                               # (B, H, N, d) -> (B, N, D)
        return self.out(y.transpose(1, 2).flatten(-2))

    def forward(self, x, rope, plan, past):
        """Self-attention over past and new tokens. past: (k, v) already rotated, or None.

        Returns the output (B, N, D) and the new tokens' own (k, v), each (B, H, N, d), for the caller's cache."""
        q, k, v = (split_heads(y, self.head_width) for y in self.qkv(x).chunk(3, dim=-1))
        q, k = rotate(torch.cat([self.q_norm(q), self.k_norm(k)], dim=1), rope).to(v.dtype).chunk(2, dim=1)
        new = k, v
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        return self.merge_heads(self.attend(q, k, v, plan)), new

    def tokens(self, tokens):
        """Conditioning tokens (B, L, ·) -> this layer's cross-attention (k, v). They depend on the prompt alone."""
        k, v = (split_heads(y, self.head_width) for y in self.kv(tokens).chunk(2, dim=-1))
        return self.k_norm(k), v

    def cross(self, x, kv):
        return self.merge_heads(self.attend(self.q_norm(split_heads(self.q(x), self.head_width)), *kv))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        a, gate = self.up(x).chunk(2, dim=-1)
        return self.down(a * F.silu(gate))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        norm = lambda: nn.LayerNorm(config.width, eps=1e-5, bias=False)
        self.self_norm, self.self_attention = norm(), Attention(config)
        self.cross_norm, self.cross_attention = norm(), Attention(config, config.token_width)
        self.ff_norm, self.ff = norm(), FeedForward(config.width)

    def forward(self, x, rope, cross_kv, plan, past):       # x (B, N, D)
        y, new = self.self_attention(self.self_norm(x), rope, plan, past)
        x = x + y
        x = x + self.cross_attention.cross(self.cross_norm(x), cross_kv)
        return x + self.ff(self.ff_norm(x)), new


class Memory(NamedTuple):
    """What the DiT computes from `Cond` once per prompt: global_ (B, D) and each layer's cross-attention (k, v)."""
    global_: torch.Tensor
    cross: list

    def tensors(self):
        return [self.global_, *(y for kv in self.cross for y in kv)]

    @staticmethod
    def of(tensors):
        """Inverse of `tensors`."""
        return Memory(tensors[0], list(zip(tensors[1::2], tensors[2::2])))


class DiT(nn.Module):
    """Stable Audio's "continuous transformer", and the same weights run over blocks with context."""
    def __init__(self, config):
        super().__init__()
        self.config, C, D = config, config.latent_channels, config.width
        mlp = lambda n, d, bias: nn.Sequential(nn.Linear(n, d, bias=bias), nn.SiLU(), nn.Linear(d, d, bias=bias))
        self.time_frequencies = nn.Parameter(torch.randn(128))
        self.time_embed = mlp(256, D, True)
        self.global_embed = mlp(config.cond_width * len(config.global_ids), D, False)
        self.token_embed = mlp(config.cond_width, config.token_width, False)
        self.conv_in, self.conv_out = nn.Conv1d(C, C, 1, bias=False), nn.Conv1d(C, C, 1, bias=False)
        self.project_in, self.project_out = nn.Linear(C, D, bias=False), nn.Linear(D, C, bias=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        rotated = max(config.head_width // 2, 32)
        self.register_buffer("inv_freq", torch.tensor([10000.0 ** (-i / rotated) for i in range(0, rotated, 2)]))
        self.context_in = nn.Linear(1 + C, D, bias=False)
        for conv in (self.conv_in, self.conv_out):
            nn.init.zeros_(conv.weight)
        self.reset_context_in()

    @torch.no_grad()
    def reset_context_in(self):
        """Start training calmly: a clean frame first enters as the noisy input path would take it, plus a small mark."""
        if self.context_in.weight.is_meta:                  # arithmetic there would import 100 MB of compiler for nothing
            return
        conv = self.conv_in.weight[..., 0]
        self.context_in.weight[:, 1:] = self.project_in.weight @ (conv + torch.eye(len(conv), device=conv.device))
        self.context_in.weight[:, 0].normal_(std=0.02)

    def memory(self, cond):
        """Cond -> Memory: everything that depends on the prompt alone."""
        tokens, global_ = (y.to(self.project_in.weight.dtype) for y in cond)
        tokens = self.token_embed(tokens)
        return Memory(self.global_embed(global_), [layer.cross_attention.tokens(tokens) for layer in self.layers])

    def embed_noisy(self, x):                               # (B, C, T) -> (B, T, D)
        x = x.to(self.project_in.weight.dtype)
        # contiguous, or PyTorch picks the matrix product, and its rounding, by whether weights require gradients
        return self.project_in((x + self.conv_in(x)).transpose(1, 2).contiguous())

    def embed_clean(self, x):                               # (B, C, T) -> (B, T, D)
        return self.context_in(F.pad(x.transpose(1, 2), (1, 0), value=1.0).to(self.context_in.weight.dtype))

    def embed_time(self, t, global_):                       # (B, n), (B, D) -> (B, n, D)
        angles = 2 * math.pi * t[..., None].float() * self.time_frequencies.float()
        return self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1).to(global_.dtype)) + global_[:, None]

    def unembed(self, h):                                   # (B, T, D) -> (B, C, T)
        v = self.project_out(h).transpose(1, 2)
        return v + self.conv_out(v)

    def transform(self, h, positions, memory, plan=None, past=None, layers=None, remat=False):
        """Run the layers (or the first `layers`). Returns h (B, N, D) and each layer's new (k, v).

        remat: recompute activations in the backward pass instead of keeping them (activation checkpointing)."""
        rope, new = rotary(positions, self.inv_freq), []
        for i, layer in enumerate(self.layers[:layers]):
            args = h, rope, memory.cross[i], plan, None if past is None else past[i]
            h, kv = checkpoint(layer, *args, use_reentrant=False) if remat else layer(*args)
            new.append(kv)
        return h, new

    def blocks(self, memory, noisy=None, t=None, noisy_index=(), clean=None, clean_index=(), past=None, past_index=(),
               start=0, remat=False):
        """One pass over [clean blocks | noisy blocks | one timestep token per noisy block], after cached blocks.

        noisy (B, C, n * block) at levels t (B, n); clean (B, C, m * block); the *_index tuples number their blocks, which
        follow one another, along the stream, whose block 0 has frame `start` first, a number or a tensor of one. past: each
        layer's (k, v) of the blocks past_index. One of noisy and clean may be absent.
        Returns v (B, C, n * block) or None, and each layer's (k, v) of the clean blocks. Every use of the model with
        context is this pass: training (many noisy blocks), streaming (one), filling the cache (none)."""
        c, block = self.config, self.config.block
        # counted where the network runs: nothing comes from the host
        frames = lambda index, step=1: torch.arange(index[0] * block, (index[-1] + 1) * block, step, device=memory.global_.device)
        parts, positions = [], []
        if clean_index:
            parts.append(self.embed_clean(clean))
            positions.append(frames(clean_index))
        if noisy_index:
            parts += [self.embed_noisy(noisy), self.embed_time(t, memory.global_)]
            # the timestep token rides one before the first frame of its block's window, as in the public model
            positions += [frames(noisy_index), frames(noisy_index, step=block) - c.context - 1]
        h = torch.cat([p.to(parts[0].dtype) for p in parts], dim=1)
        first = min((*past_index, *clean_index, *noisy_index))      # only differences matter to who sees whom: fewer to cache
        past_, clean_, noisy_ = (tuple(i - first for i in index) for index in (past_index, clean_index, noisy_index))
        plan = attention_plan(past_, clean_, noisy_, block, c.context_blocks, c.causal)
        h, new = self.transform(h, torch.cat(positions) + start, memory, plan, past, remat=remat)
        n_clean, n_noisy = len(clean_index) * block, len(noisy_index) * block
        v = self.unembed(h[:, n_clean:n_clean + n_noisy]) if noisy_index else None
        return v, [(k[:, :, :n_clean], v_[:, :, :n_clean]) for k, v_ in new]

    def pad_context(self, context):
        """Missing context is blocks of zeros on the left; encoder-decoder keeps only the last `context_blocks`."""
        context = F.pad(context, (max(0, self.config.context - context.shape[-1]), 0))
        return context if self.config.causal else context[..., -self.config.context:]

    def forward(self, x, t, cond, context=None, remat=False):
        """Predict v for x (B, C, T) at levels t (B,).

        Without context: the public model over a whole clip, any T. With context (B, C, whole blocks): x is the block
        that follows it. Nothing is cached. Raises ValueError where x or context is not whole blocks."""
        if context is None:
            h = self.hidden(x, t, cond, None, remat)
            return self.unembed(h[:, 1:])
        block = self.config.block
        if x.shape[-1] != block or context.shape[-1] % block:
            raise ValueError(f"a block is {block} frames: got a block of {x.shape[-1]} after {context.shape[-1]} of context")
        context = self.pad_context(context)
        n = context.shape[-1] // block
        return self.blocks(self.memory(cond), x, t[:, None], (n,), context, tuple(range(n)), remat=remat)[0]

    def hidden(self, x, t, cond, layer, remat=False):
        """The public model's hidden states after `layer` (0-based; None: the last): (B, 1 + T, D), timestep token first."""
        memory = self.memory(cond)
        h = torch.cat([self.embed_time(t[:, None], memory.global_), self.embed_noisy(x)], dim=1)
        positions = torch.arange(h.shape[1], device=h.device)
        return self.transform(h, positions, memory, layers=None if layer is None else layer + 1, remat=remat)[0]


class LMDM(nn.Module):
    """The three networks and their sizes. stage: "scratch", "autoencoder" (the DiT's weights say nothing yet),
    "base" (public weights), "finetune" or "arc";
    sampling: what the checkpoint recommends, over the stage's defaults, and the words that its own text encoder has met."""
    def __init__(self, config, stage="scratch", sampling=None):
        super().__init__()
        self.config, self.stage, self.sampling = config, stage, sampling or {}
        self.autoencoder, self.conditioner, self.dit = Autoencoder(config), Conditioner(config), DiT(config)
