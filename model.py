"""Live Music Diffusion: the networks.

An autoencoder turns audio into latent frames and back; a diffusion transformer (DiT) denoises one block of
latent frames at a time, given a context of finished blocks. Both are the public Stable Audio networks, plus
one linear layer, `context_in`, through which finished frames enter clean (and `beat_in`, in a model that is
told a beat). Nothing here knows a checkpoint or a loss.

Letters: B batch, C latent channels, T frames, D width, H heads, L conditioning tokens, N tokens of a pass.
Sources: Stable Audio Open (arXiv 2407.14358), Live Music Diffusion Models (arXiv 2605.22717, "the paper").
"""
import gc
import math
import re
import unicodedata
import zlib
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """Something the user can mend: scripts print it as one line and exit with status 2."""


# -------------------------------------------------------------------------------- sizes
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
    latent_limit: float = 0.0                               # latents lie within +-this; 0: anywhere
    # what the DiT makes beside the latents, 0 in public models: controls.py
    pitch_channels: int = 0
    level_channels: int = 0
    # conditioning
    text: str = "t5"                                        # or "words", a table trained with the DiT
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
    beats: bool = False                                     # can be told tempo and place in the bar
    beats_per_frame: bool = False                           # of each new frame; else where the block begins
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
    def channels(self):
        """What the DiT makes: latents, then channels of pitch, then of loudness."""
        return self.latent_channels + self.pitch_channels + self.level_channels

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
        """Values for the number conditioners: the length in seconds, rounded up, of what passes through."""
        seconds = {"seconds_start": 0, "seconds_total": math.ceil(frames / self.frame_rate)}
        return {name: seconds[name] for name, _, _ in self.numbers}

    @property
    def stream_numbers(self):
        """The same while streaming and finetuning: always the window's."""
        return self.numbers_for(self.window)

    def to_dict(self):
        return asdict(self)

    @staticmethod
    def from_dict(values):
        """Inverse of `to_dict`; lists become tuples, unknown fields are an error."""
        unknown = set(values) - {f.name for f in fields(Config)}
        if unknown:
            raise ValueError(f"unknown Config field: {', '.join(sorted(unknown))}")
        return Config(**{name: as_tuple(value) for name, value in values.items()})


def as_tuple(value):
    """Lists, and lists in them, as tuples; anything else as it comes."""
    return tuple(as_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


PRESETS = {
    "nano": Config(
        ae_width=16, ae_multipliers=(2, 4, 8, 16, 32), ae_strides=(4, 4, 4, 4, 4), latent_limit=6.0,
        pitch_channels=12, level_channels=8, text="words", text_tokens=16, text_width=1024, cond_width=128,
        width=256, depth=4, heads=4, beats=True, beats_per_frame=True),
    "sao_small": Config(),
    "sao_1_0": Config(
        text_tokens=128, numbers=(("seconds_start", 0, 512), ("seconds_total", 0, 512)),
        cross_ids=("prompt", "seconds_start", "seconds_total"), global_ids=("seconds_start", "seconds_total"),
        width=1536, depth=24, heads=24, project_cond=False, qk_norm=False, objective="v", clip=1024)}


# -------------------------------------------------------------------------------- noise
# A noise level t runs from 0 (music) to 1 (noise). Who takes its levels from where:
#   playing, rollouts, the warm-up's teacher     schedule(steps)
#   D's judgements in the game                   noise_level(u), u uniform
# finetuning, validation, D's warm-up          shift_time(u, frames), u uniform: as public models are trained
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
    """The level at a share u in [0, 1] of the way from noise to music: t = sigmoid(-l), l linear, -6 to 2."""
    return torch.sigmoid(6 - 8 * u)


def schedule(steps):
    """The steps + 1 noise levels of a block, from 1 down to 0."""
    t = noise_level(torch.linspace(0, 1, steps + 1))
    t[0], t[-1] = 1, 0
    return t


def shift_time(t, frames, more=0.0):
    """The public models' shift of training levels towards noise for longer clips, and `more` on top.

    t in [0, 1]; frames: of the window."""
    mu = -(0.5 + 0.65 * (min(max(frames, 256), 4096) - 256) / 3840) - more
    return t / (t + math.exp(mu) * (1 - t))                 # = 1 - e^mu / (e^mu + t / (1 - t))


# -------------------------------------------------------------------------------- autoencoder
class SnakeBeta(nn.Module):
    """x + sin^2(alpha x) / beta, alpha and beta stored as logs per channel."""
    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x):                                   # (B, channels, samples)
        alpha = self.alpha.exp()[:, None]
        beta = self.beta.exp()[:, None] + 1e-9
        return x + torch.sin(alpha * x) ** 2 / beta


class ResidualUnit(nn.Module):
    def __init__(self, channels, dilation):
        super().__init__()
        self.layers = nn.Sequential(
            SnakeBeta(channels), nn.Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation),
            SnakeBeta(channels), nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        return x + self.layers(x)


def residual_units(channels):
    return [ResidualUnit(channels, dilation) for dilation in (1, 3, 9)]


class Autoencoder(nn.Module):
    """The "Oobleck" variational autoencoder: (B, 2, samples) <-> (B, C, samples / hop)."""
    def __init__(self, config):
        super().__init__()
        self.hop = config.hop
        self.limit = config.latent_limit or math.inf
        widths = [config.ae_width] + [config.ae_width * m for m in config.ae_multipliers]
        levels = list(zip(widths, widths[1:], config.ae_strides))       # (audio side, latent side, stride)

        encoder = [nn.Conv1d(config.audio_channels, widths[0], 7, padding=3)]
        for outer, inner, stride in levels:
            encoder += residual_units(outer)
            encoder += [SnakeBeta(outer)]
            encoder += [nn.Conv1d(outer, inner, 2 * stride, stride, padding=math.ceil(stride / 2))]
        encoder += [SnakeBeta(widths[-1]), nn.Conv1d(widths[-1], 2 * config.latent_channels, 3, padding=1)]
        self.encoder = nn.Sequential(*encoder)

        decoder = [nn.Conv1d(config.latent_channels, widths[-1], 7, padding=3)]
        for outer, inner, stride in reversed(levels):
            decoder += [SnakeBeta(inner)]
            decoder += [nn.ConvTranspose1d(inner, outer, 2 * stride, stride, padding=math.ceil(stride / 2))]
            decoder += residual_units(outer)
        decoder += [SnakeBeta(widths[0])]
        decoder += [nn.Conv1d(widths[0], config.audio_channels, 7, padding=3, bias=False)]
        self.decoder = nn.Sequential(*decoder)

    def posterior(self, audio):
        """(B, 2, samples) -> mean, standard deviation (B, C, T). Samples past the last whole frame are
        dropped."""
        audio = audio[..., :audio.shape[-1] // self.hop * self.hop]
        mean, scale = self.encoder(audio).chunk(2, dim=1)
        return mean.clamp(-self.limit, self.limit), F.softplus(scale) + 1e-4

    def encode(self, audio):
        """(B, 2, samples) in [-1, 1] -> latents (B, C, T): the posterior's mean."""
        return self.posterior(audio)[0]

    def decode(self, latents):
        """(B, C, T) -> audio (B, 2, T * hop), not clipped. Further channels are passed over."""
        return self.decoder(latents[:, :self.decoder[0].in_channels])


# -------------------------------------------------------------------------------- conditioning
class Cond(NamedTuple):
    """The condition: tokens (B, L, cond_width) for cross-attention, global_ (B, ·) for the timestep token."""
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
        features = torch.cat([x, angles.sin(), angles.cos()], dim=-1)                       # (B, 257)
        return self.linear(features.to(self.linear.weight.dtype))                           # (B, width)


NOTE = "(?:[a-h]|do|ré|re|mi|fa|sol|la|si|ti|ut)"
WORD = re.compile(rf"""
    \b{NOTE}(?:m|maj)?\d*[#♭]+\w*                           # c#, f#m7, la♭: an accidental and its note
    | \b\w&\w\b                                             # r&b
    | \d+(?:[./]\d+)+                                       # 92.5, 6/8
    | (?:\w|[\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0e31-\u0e4e])+
    """, re.VERBOSE)                                        # the ranges are vowel signs, which \w leaves out


def words_of(prompt):
    """The words and numbers of a prompt, in lower case: what `Words` reads. B♭ and Bb are one word."""
    text = unicodedata.normalize("NFC", prompt).lower().replace("♯", "#")
    return WORD.findall(re.sub(r"\b[a-h]♭+", lambda note: note[0].replace("♭", "b"), text))


def row_by_hash(word, rows):
    """1 .. rows. crc32 and not hash(): the same in every Python."""
    return 1 + zlib.crc32(word.encode()) % rows


# A text encoder is called with B prompts and gives states (B, text_tokens, its width) and a mask (B,
# text_tokens), True at words. `trains` says whether it is learned with the DiT; one that is not is asked once
# per prompt. One that is also has `learn(prompts)`, `known` and `table`, as `Words` has.
class Words(nn.Module):
    """Words of a prompt as rows of a table that is trained with the DiT: nothing to download.

    A word's row comes from its hash. A word that the model has met keeps its row, and the next one whose hash
    falls there takes the next free row, so no two words that were learned share one while there are rows."""
    trains = True

    def __init__(self, rows, width, tokens):
        super().__init__()
        self.tokens = tokens
        self.table = nn.Embedding(rows + 1, width, padding_idx=0)   # row 0: the zero padding
        self.known = {}                                     # word -> row

    def remember(self, words):
        """Take over the words that a checkpoint has met: {word: row}, or a list, whose rows are their hashes
        (checkpoints written before rows were kept)."""
        rows = self.table.num_embeddings - 1
        self.known = dict(words) if isinstance(words, dict) else {w: row_by_hash(w, rows) for w in words}

    def learn(self, prompts):
        """Give a row of its own to each new word that is read of these prompts. Returns all words met so far,
        {word: row}. Only when all rows are taken do words share one."""
        taken = set(self.known.values())
        for word in sorted({word for prompt in prompts for word in words_of(prompt)[:self.tokens]}):
            if word not in self.known:
                self.known[word] = self.free_row(word, taken)
                taken.add(self.known[word])
        return dict(sorted(self.known.items()))

    def free_row(self, word, taken):
        """From the word's hash on, the first row that is not taken."""
        rows = self.table.num_embeddings - 1
        first = row_by_hash(word, rows)
        if len(taken) >= rows:
            return first
        return next(row for row in (*range(first, rows + 1), *range(1, first)) if row not in taken)

    def row_of(self, word):
        """The row of a word; one never met keeps away from the rows of those that were."""
        return self.known[word] if word in self.known else self.free_row(word, set(self.known.values()))

    def forward(self, prompts):
        rows = torch.zeros(len(prompts), self.tokens, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            words = words_of(prompt)[:self.tokens]
            rows[i, :len(words)] = torch.tensor([self.row_of(word) for word in words])
        rows = rows.to(self.table.weight.device)
        return self.table(rows), rows > 0                   # (B, tokens, width), (B, tokens)


class T5:
    """The public models' text encoder, frozen. It runs on the CPU in float32 (the public tools: float16).

    It is no part of a checkpoint: `transformers` is imported when the first prompt is encoded. Raises
    UserError where that package or the encoder is missing, or where its width is not the checkpoint's."""
    trains = False

    def __init__(self, name, width, tokens):
        self.name, self.width, self.tokens = name, width, tokens

    @torch.no_grad()
    def __call__(self, prompts, batch=16):
        tokenizer, encoder = load_t5(self.name)
        if self.width not in (None, encoder.config.d_model):
            raise UserError(f"the text encoder {self.name!r} is {encoder.config.d_model} wide; "
                            f"this checkpoint expects {self.width}")
        states, masks = [], []
        for start in range(0, len(prompts), batch):
            words = tokenizer(list(prompts[start:start + batch]), truncation=True, max_length=self.tokens,
                              padding="max_length", return_tensors="pt")
            found = encoder(input_ids=words.input_ids, attention_mask=words.attention_mask)
            states.append(found.last_hidden_state)
            masks.append(words.attention_mask.bool())
        return torch.cat(states), torch.cat(masks)


@lru_cache(maxsize=1)
def load_t5(name):
    """A folder, or a name in the usual cache -> tokenizer, encoder, kept until `forget_t5`. Raises
    UserError."""
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ImportError as error:
        raise UserError(f"prompts need T5: pip install transformers sentencepiece ({error}); or stream from "
                        "a --prompt-file made with stable_audio_port.py --prompts where it is") from None
    try:
        return AutoTokenizer.from_pretrained(name), T5EncoderModel.from_pretrained(name).float().eval()
    except Exception as error:    # a missing folder, no network, a broken file, a missing package
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(f"cannot load the text encoder {name!r} ({reason}); "
                        "name a folder that holds it: stable_audio_port.py --text-model FOLDER") from None


def forget_t5():
    """Free T5's memory. Until then it stays loaded, for prompts typed while a stream plays."""
    if load_t5.cache_info().currsize:
        load_t5.cache_clear()
        gc.collect()


class Conditioner(nn.Module):
    """Prompts and numbers -> `Cond`."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.numbers = nn.ModuleDict()
        for name, low, high in config.numbers:
            self.numbers[name] = Number(low, high, config.cond_width)
        if config.text not in ("words", "t5"):
            raise ValueError(f"no text encoder is called {config.text!r}")
        self.words = None
        self.proj_out = None
        if config.text == "words":
            self.words = Words(config.text_width, config.cond_width, config.text_tokens)
        elif config.text_width != config.cond_width:
            self.proj_out = nn.Linear(config.text_width, config.cond_width)

    @property
    def text_encoder(self):
        c = self.config
        return self.words if c.text == "words" else T5(c.text_model, c.text_width, c.text_tokens)

    def embed_text(self, prompts):
        """B strings -> (B, text_tokens, cond_width), zero at padding."""
        states, mask = self.text_encoder(prompts)
        device = next(self.numbers.parameters()).device
        states, mask = states.to(device), mask.to(device)
        if self.proj_out is not None:
            states = self.proj_out(states.to(self.proj_out.weight))
        return states * mask.to(states)[..., None]

    def forward(self, text, **numbers):
        """text: B prompts, or their embeddings (B, L, cond_width). numbers: one value, or B, for each id.

        Raises ValueError when a number is missing or unknown."""
        if set(numbers) != set(self.numbers):
            raise ValueError(f"the conditioner needs the numbers {sorted(self.numbers)}, "
                             f"got {sorted(numbers)}")
        tokens = text if torch.is_tensor(text) else self.embed_text(list(text))
        parts = {"prompt": tokens}
        for name, number in self.numbers.items():
            values = torch.as_tensor(numbers[name], dtype=torch.float32, device=tokens.device)
            parts[name] = number(values.expand(len(tokens)))[:, None]    # (B, 1, cond_width)
        return Cond(torch.cat([parts[name] for name in self.config.cross_ids], dim=1),
                    torch.cat([parts[name][:, 0] for name in self.config.global_ids], dim=-1))


# -------------------------------------------------------------------------------- positions and masks
def rotary(positions, inv_freq):
    """Positions (N,) -> [cos | cos], [-sin | sin], each (N, 2 * len(inv_freq)).

    Angles are computed in float64, so that they are still exact a million frames on."""
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

    Everyone sees their own block, and no clean token ever sees a noisy one. Block-causal, finished (clean)
    blocks are seen by whoever comes after, `context_blocks` back; encoder-decoder, everyone sees every clean
    block, of which the caller gives only a window. A timestep token counts as a noisy token of its block. Use
    differences of block numbers only: a pass counts from its own first block."""
    q_block, q_noisy = q_block[:, None], q_noisy[:, None]
    own = (k_block == q_block) & (k_noisy == q_noisy)
    if causal:
        behind = (k_block < q_block) & (k_block >= q_block - context_blocks)
        return own | (behind & ~k_noisy)
    return own | ~k_noisy.expand_as(own)


class AttentionPlan(NamedTuple):
    """Who attends to whom in one pass. A piece is a block or a timestep token: its tokens see and are seen
    alike.

    query_sizes, key_sizes: tokens in each piece; groups: [(query pieces, key pieces)] that attend
    together."""
    query_sizes: list
    key_sizes: list
    groups: list


@lru_cache(maxsize=64)
def attention_plan(cached, clean, noisy, block, context_blocks, causal):
    """`visible` for a pass over [cached keys | clean blocks | noisy blocks | a timestep token each].

    cached, clean, noisy: tuples of block indices. Returns an AttentionPlan, or None when everything is
    seen."""
    pieces = []    # (block index, is it noisy?, tokens), as in the pass
    pieces += [(i, False, block) for i in (*cached, *clean)]
    pieces += [(i, True, block) for i in noisy]
    pieces += [(i, True, 1) for i in noisy]
    index = torch.tensor([i for i, _, _ in pieces])
    is_noisy = torch.tensor([flag for _, flag, _ in pieces])
    sizes = [size for _, _, size in pieces]
    new = len(cached)                                       # cached pieces are keys only
    mask = visible(index[new:], is_noisy[new:], index, is_noisy, context_blocks, causal)
    if mask.all():
        return None
    groups = {}                                             # key pieces -> the query pieces that see them
    for query, row in enumerate(mask.tolist()):
        keys = tuple(key for key, seen in enumerate(row) if seen)
        groups.setdefault(keys, []).append(query)
    return AttentionPlan(sizes[new:], sizes, [(queries, keys) for keys, queries in groups.items()])


# -------------------------------------------------------------------------------- transformer
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
        self.q_norm = nn.LayerNorm(config.head_width, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(config.head_width, eps=1e-6) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, rope, plan=None, cached=None):
        """Self-attention over cached and new tokens. cached: (k, v), already rotated, or None.

        Tokens that see the same others attend together, so nothing that a mask would hide is multiplied.
        Returns the output (B, N, D) and the new tokens' own (k, v), each (B, H, N, d), for the caller's
        cache."""
        q, k, v = (split_heads(y, self.head_width) for y in self.qkv(x).chunk(3, dim=-1))
        q, k = rotate(torch.cat([self.q_norm(q), self.k_norm(k)], dim=1), rope).to(v.dtype).chunk(2, dim=1)
        new = k, v
        if cached is not None:
            k = torch.cat([cached[0], k], dim=2)
            v = torch.cat([cached[1], v], dim=2)
        if plan is None:
            return self.merge_heads(F.scaled_dot_product_attention(q, k, v)), new
        q = q.split(plan.query_sizes, dim=2)
        k = k.split(plan.key_sizes, dim=2)
        v = v.split(plan.key_sizes, dim=2)
        y = [None] * len(q)
        for queries, keys in plan.groups:
            q_seeing, k_seen, v_seen = (torch.cat([pieces[i] for i in chosen], dim=2)
                                        for pieces, chosen in ((q, queries), (k, keys), (v, keys)))
            together = F.scaled_dot_product_attention(q_seeing, k_seen, v_seen)
            for i, piece in zip(queries, together.split([plan.query_sizes[i] for i in queries], dim=2)):
                y[i] = piece
        return self.merge_heads(torch.cat(y, dim=2)), new

    def merge_heads(self, y):                               # (B, H, N, d) -> (B, N, D)
        return self.out(y.transpose(1, 2).flatten(-2))

    def tokens(self, tokens):
        """Conditioning tokens (B, L, ·) -> this layer's cross-attention (k, v). They depend on the prompt
        alone."""
        k, v = (split_heads(y, self.head_width) for y in self.kv(tokens).chunk(2, dim=-1))
        return self.k_norm(k), v

    def cross(self, x, kv):
        """Cross-attention of x (B, N, D). With fewer key than query heads, each key head serves consecutive
        query heads."""
        k, v = kv
        q = self.q_norm(split_heads(self.q(x), self.head_width))
        q, k = q.to(v.dtype), k.to(v.dtype)
        return self.merge_heads(F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]))


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
        self.self_norm = nn.LayerNorm(config.width, eps=1e-5, bias=False)
        self.self_attention = Attention(config)
        self.cross_norm = nn.LayerNorm(config.width, eps=1e-5, bias=False)
        self.cross_attention = Attention(config, config.token_width)
        self.ff_norm = nn.LayerNorm(config.width, eps=1e-5, bias=False)
        self.ff = FeedForward(config.width)

    def forward(self, x, rope, cross_kv, plan=None, cached=None):       # x (B, N, D)
        y, new = self.self_attention(self.self_norm(x), rope, plan, cached)
        x = x + y
        x = x + self.cross_attention.cross(self.cross_norm(x), cross_kv)
        return x + self.ff(self.ff_norm(x)), new


class EncodedPrompt(NamedTuple):
    """What the DiT computes from `Cond` once per prompt: global_ (B, D) and each layer's cross-attention (k,
    v)."""
    global_: torch.Tensor
    cross: list


class Numbered(NamedTuple):
    """Consecutive blocks, and their numbers along the stream.

    data: latents (B, C, n * block), or, of cached blocks, each layer's (k, v)."""
    data: object
    index: tuple


NO_BLOCKS = Numbered(None, ())


def mlp(inputs, width, bias):
    return nn.Sequential(nn.Linear(inputs, width, bias=bias), nn.SiLU(), nn.Linear(width, width, bias=bias))


class DiT(nn.Module):
    """Stable Audio's "continuous transformer", and the same weights run over blocks with context."""
    def __init__(self, config):
        super().__init__()
        C, D = config.channels, config.width
        self.config = config
        self.time_frequencies = nn.Parameter(torch.randn(128))
        self.time_embed = mlp(256, D, bias=True)
        self.global_embed = mlp(config.cond_width * len(config.global_ids), D, bias=False)
        self.token_embed = mlp(config.cond_width, config.token_width, bias=False)
        self.conv_in = nn.Conv1d(C, C, 1, bias=False)
        self.conv_out = nn.Conv1d(C, C, 1, bias=False)
        self.project_in = nn.Linear(C, D, bias=False)
        self.project_out = nn.Linear(D, C, bias=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        rotated = max(config.head_width // 2, 32)
        inv_freq = [10000.0 ** (-i / rotated) for i in range(0, rotated, 2)]
        self.register_buffer("inv_freq", torch.tensor(inv_freq))
        self.context_in = nn.Linear(1 + C, D, bias=False)
        self.beat_in = None
        if config.beats:
            self.beat_in = nn.Linear(18, D, bias=False)
            nn.init.zeros_(self.beat_in.weight)
        for conv in (self.conv_in, self.conv_out):
            nn.init.zeros_(conv.weight)
        self.reset_context_in()

    @torch.no_grad()
    def reset_context_in(self):
        """Start training calmly: a clean frame first enters as the noisy input path would take it, plus a
        small mark."""
        if self.context_in.weight.is_meta:    # arithmetic there would import 100 MB of compiler for nothing
            return
        conv = self.conv_in.weight[..., 0]
        identity = torch.eye(len(conv), device=conv.device)
        self.context_in.weight[:, 1:] = self.project_in.weight @ (conv + identity)
        self.context_in.weight[:, 0].normal_(std=0.02)

    def encode_prompt(self, cond):
        """Cond -> EncodedPrompt: everything that depends on the prompt alone."""
        tokens, global_ = (y.to(self.project_in.weight.dtype) for y in cond)
        tokens = self.token_embed(tokens)
        cross = [layer.cross_attention.tokens(tokens) for layer in self.layers]
        return EncodedPrompt(self.global_embed(global_), cross)

    def embed_noisy(self, x):                               # (B, C, T) -> (B, T, D)
        x = x.to(self.project_in.weight.dtype)
        # contiguous, or the matrix product, and its rounding, would depend on whether weights need gradients
        return self.project_in((x + self.conv_in(x)).transpose(1, 2).contiguous())

    def embed_clean(self, x):                               # (B, C, T) -> (B, T, D)
        return self.context_in(F.pad(x.transpose(1, 2), (1, 0), value=1.0).to(self.context_in.weight.dtype))

    def embed_time(self, t, global_):                       # (B, n), (B, D) -> (B, n, D)
        angles = 2 * math.pi * t[..., None].float() * self.time_frequencies.float()
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)                          # (B, n, 256)
        return self.time_embed(features.to(global_.dtype)) + global_[:, None]

    def unembed(self, h):                                   # (B, T, D) -> (B, C, T)
        v = self.project_out(h).transpose(1, 2)
        return v + self.conv_out(v)

    def blocks(self, prompt, noisy=NO_BLOCKS, t=None, clean=NO_BLOCKS, cached=NO_BLOCKS, start=0, beat=None,
               remat=False):
        """One pass over [clean blocks | noisy blocks | one timestep token per noisy block], after cached
        ones.

        Every use of the model with context is this pass: training (many noisy blocks), streaming (one),
        filling the cache (none). prompt: EncodedPrompt; noisy, clean, cached: Numbered; t (B, n): the noisy
        blocks' levels; start: the stream's frame at which block 0 begins, a number or a tensor of one; beat
        (B, n * block, 18): `controls.beat_features` of the noisy frames, zeros or None where nothing is known
        of it; remat: recompute activations in the backward pass instead of keeping them (activation
        checkpointing). Returns v (B, C, n * block) or None, and each layer's (k, v) of the clean blocks."""
        c, device = self.config, prompt.global_.device
        embedded, positions = [], []
        if clean.index:
            embedded.append(self.embed_clean(clean.data))
            positions.append(frames_of(clean.index, c.block, device))
        if noisy.index:
            frames, token = self.embed_noisy(noisy.data), self.embed_time(t, prompt.global_)
            if beat is not None and c.beats_per_frame:
                frames = frames + self.beat_in(beat.to(frames.dtype))
            elif beat is not None:
                # contiguous: the product of a strided tensor would be rounded otherwise
                token = token + self.beat_in(beat[:, ::c.block].contiguous().to(token.dtype))
            embedded += [frames, token]
            positions.append(frames_of(noisy.index, c.block, device))
            # a timestep token rides one before the first frame of its block's window, as in the public model
            positions.append(frames_of(noisy.index, c.block, device)[::c.block] - c.context - 1)
        h = torch.cat([y.to(embedded[0].dtype) for y in embedded], dim=1)                   # (B, N, D)
        rope = rotary(torch.cat(positions) + start, self.inv_freq)

        # only differences of numbers decide who sees whom: counted from the first block, few plans are kept
        first = min((*cached.index, *clean.index, *noisy.index))
        relative = [tuple(i - first for i in blocks.index) for blocks in (cached, clean, noisy)]
        plan = attention_plan(*relative, c.block, c.context_blocks, c.causal)

        keys_values = []
        for i, layer in enumerate(self.layers):
            args = h, rope, prompt.cross[i], plan, cached.data and cached.data[i]
            h, kv = checkpoint(layer, *args, use_reentrant=False) if remat else layer(*args)
            keys_values.append(kv)
        n_clean, n_noisy = len(clean.index) * c.block, len(noisy.index) * c.block
        v = self.unembed(h[:, n_clean:n_clean + n_noisy]) if noisy.index else None
        return v, [(k[:, :, :n_clean], v_[:, :, :n_clean]) for k, v_ in keys_values]

    def pad_context(self, context):
        """Missing context becomes zeros on the left; encoder-decoder keeps only the last `context_blocks`."""
        context = F.pad(context, (max(0, self.config.context - context.shape[-1]), 0))
        return context if self.config.causal else context[..., -self.config.context:]

    def forward(self, x, t, cond, context=None, beat=None, remat=False):
        """Predict v for x (B, C, T) at levels t (B,). beat (B, block, 18): `controls.beat_features`, with
        context only.

        Without context: the public model over a whole clip, any T. With context (B, C, whole blocks): x is
        the block that follows it. Nothing is cached. Raises ValueError where either is not whole blocks."""
        if context is None:
            return self.unembed(self.hidden(x, t, cond, None, remat)[:, 1:])
        block = self.config.block
        if x.shape[-1] != block or context.shape[-1] % block:
            raise ValueError(f"a block is {block} frames: got a block of {x.shape[-1]} after "
                             f"{context.shape[-1]} of context")
        context = self.pad_context(context)
        n = context.shape[-1] // block
        history = Numbered(context, tuple(range(n)))
        return self.blocks(self.encode_prompt(cond), Numbered(x, (n,)), t[:, None], history, beat=beat,
                           remat=remat)[0]

    def hidden(self, x, t, cond, layer, remat=False):
        """Hidden states (B, 1 + T, D), timestep token first, of the public model after `layer`.

        layer: 0-based; None: the last."""
        prompt = self.encode_prompt(cond)
        h = torch.cat([self.embed_time(t[:, None], prompt.global_), self.embed_noisy(x)], dim=1)
        rope = rotary(torch.arange(h.shape[1], device=h.device), self.inv_freq)
        for module, kv in zip(self.layers[:None if layer is None else layer + 1], prompt.cross):
            h, _ = checkpoint(module, h, rope, kv, use_reentrant=False) if remat else module(h, rope, kv)
        return h


def frames_of(index, block, device):
    """Frame numbers of blocks that follow one another, counted where the network runs."""
    return torch.arange(index[0] * block, (index[-1] + 1) * block, device=device)


class LMDM(nn.Module):
    """The three networks and their sizes.

    stage: "scratch", "autoencoder" (the DiT's weights say nothing yet), "base" (public weights), "finetune"
    or "arc". sampling: the settings the checkpoint recommends, over its stage's defaults, and the words its
    text encoder has met, each with its row of the table."""
    def __init__(self, config, stage="scratch", sampling=None):
        super().__init__()
        self.config = config
        self.stage = stage
        self.sampling = sampling or {}
        self.autoencoder = Autoencoder(config)
        if config.channels > config.latent_channels:        # how features become channels: controls.py
            self.register_buffer("sketch_mean", torch.zeros(84))
            self.register_buffer("sketch_directions",
                                 torch.zeros(config.channels - config.latent_channels, 84))
        self.conditioner = Conditioner(config)
        if self.conditioner.words is not None:
            self.conditioner.words.remember(self.sampling.get("words", []))
        self.dit = DiT(config)
