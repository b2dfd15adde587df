"""Everything that only makes the rest faster. Nothing needs this file: without it the others are complete, in
float32.

`to_precision` is the way in for playing: bf16 or 8-bit integers, and weights as a CPU wants them in memory.
Then a decoder whose convolutions need fewer products (`StreamingDecoder`, `Winograd`), CUDA graphs
(`Graphed`), compilation, and threads (`prefetch`). What each brings was measured: docs/speed.md and
docs/experiments.md. """
import contextlib
import ctypes
import math
import weakref
from functools import lru_cache
from queue import SimpleQueue
from threading import Thread

import torch
import torch.nn.functional as F
from torch import nn

from model import EncodedPrompt, ResidualUnit, SnakeBeta, UserError


# -------------------------------------------------------------------------------- the autoencoder's layers on a CPU
# One-dimensional convolutions as two-dimensional ones over (B, channels, 1, samples) with the channels last
# in memory: the same numbers, several times faster on CPUs. The layout, once given to the input, goes through
# the whole network.
class ChannelsLastConv(nn.Conv1d):
    def forward(self, x):
        x = channels_last(x)[:, :, None]
        dilation = 1, *self.dilation
        return F.conv2d(
            x, self.weight[:, :, None], self.bias, (1, *self.stride), (0, *self.padding), dilation
        )[:, :, 0]


class ChannelsLastConvTranspose(nn.ConvTranspose1d):
    def forward(self, x):
        x = channels_last(x)[:, :, None]
        stride, padding = (1, *self.stride), (0, *self.padding)
        return F.conv_transpose2d(x, self.weight[:, :, None], self.bias, stride, padding)[:, :, 0]


class PiecewiseSnake(SnakeBeta):
    def forward(self, x):
        return snake(self, x)


def channels_last(x):    # (B, channels, samples), only its memory order changes
    return x[:, :, None].contiguous(memory_format=torch.channels_last)[:, :, 0]


def snake_constants(layer, dtype):
    """alpha and 1 / beta of a SnakeBeta, each (channels,)."""
    return layer.alpha.exp().to(dtype), 1 / (layer.beta.exp().to(dtype) + 1e-9)


def snake(layer, x, out=None):
    """SnakeBeta of x (B, channels, samples). out: where to write, x itself if you like; not where gradients
    are recorded.

    On a CPU long inputs go in pieces that fit its cache, so that what lies between two operations never
    leaves it."""
    alpha, gain = (y[:, None] for y in snake_constants(layer, x.dtype))
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.numel() <= 2 ** 21:
        return torch.addcmul(x, (alpha * x).sin_().square_(), gain, out=out)
    out = torch.empty_like(x) if out is None else out
    piece = max(1, 2 ** 17 // x[..., 0].numel())
    for part, made in zip(x.split(piece, dim=-1), out.split(piece, dim=-1)):
        torch.addcmul(part, (alpha * part).sin_().square_(), gain, out=made)
    return out


FASTER = {nn.Conv1d: ChannelsLastConv, nn.ConvTranspose1d: ChannelsLastConvTranspose,
          SnakeBeta: PiecewiseSnake}


def lay_out(autoencoder):
    """Let an autoencoder's layers compute in the order of memory that a CPU likes. Weights, names and results
    stay."""
    for layer in autoencoder.modules():
        layer.__class__ = FASTER.get(type(layer), type(layer))


# -------------------------------------------------------------------------------- precision
def has_bf16(device):
    """Are bf16 matrix products faster than float32 here? On a CPU it takes AVX-512 BF16, which AMX
    implies."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def has_int8(device):
    """Does this CPU multiply 8-bit integers fastest? With AVX2 and with AVX-512 it does, with AMX bf16 is as
    fast."""
    return device.type == "cpu" and torch.cpu._is_avx2_supported() and not torch.cpu._is_amx_tile_supported()


class Int8Linear(nn.Module):
    """A linear layer on a CPU in 8-bit integers.

    Weights have a scale for each output channel, inputs one for each item of a batch, found anew at every
    call (dynamic quantization). Sums are exact, in 32 bits; input and output are float32."""
    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(dim=1).clamp(min=1e-8) / 127
        zero = torch.zeros(len(scale), dtype=torch.long)
        weight = torch.quantize_per_channel(linear.weight, scale, zero, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, linear.bias)
        # older CPUs add pairs of products in 16 bits: 7 bits for inputs
        self.reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x):                                   # (B, ..., in_features) -> (B, ..., out_features)
        if len(x) > 1:    # or an item's rounding would depend on those beside it
            return torch.cat([self(item) for item in x.split(1)])
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)


def packs(weight):
    """Should oneDNN, PyTorch's library for CPUs, get this weight, of a linear layer or a convolution, in its
    own order?

    It pays with AVX-512 and for weights that do not fit in a CPU's cache. The order that it gives a
    convolution of kernel size 1 does not suit the inputs that come, so each call would rearrange it."""
    return (weight.device.type == "cpu" and weight.numel() >= 2 ** 20 and weight.shape[2:] != (1,)
            and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported())


class PackedLinear(nn.Module):
    """A linear layer on a CPU, its weights in the order in which oneDNN reads them, so that no call
    rearranges them.

    rows: the number of input rows that comes most. On CPUs with AMX, in float32, MKL gets a second copy of
    the weights in an order made for just that number, which is faster still."""
    def __init__(self, linear, rows=None):
        super().__init__()
        weight = linear.weight.detach()
        self.bias = linear.bias
        self.rows = None
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        has_mkl = torch.backends.mkl.is_available() and torch.cpu._is_amx_tile_supported()
        if rows and weight.dtype == torch.float32 and has_mkl:
            self.rows = rows
            self.weight_for_rows = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
            # all that the product asks of the layer's own weights
            self.shape = weight.new_empty(1).expand(weight.shape)

    def forward(self, x):                                   # (B, N, in_features) -> (B, N, out_features)
        n = x.shape[-2]
        if x.shape[:-1].numel() == self.rows:
            return torch.ops.mkl._mkl_linear(x, self.weight_for_rows, self.shape, self.bias, self.rows)
        if x.dtype == torch.bfloat16 and n % 4:  # up to 3 rows that nobody reads: oneDNN likes multiples of 4
            x = torch.cat([x, x[..., :-n % 4, :]], dim=-2)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")[..., :n, :]


@torch.no_grad()
def to_precision(model, name):
    """Put a model that only plays from now on into "auto", "float32", "bf16" or "int8". Returns the one
    taken.

    bf16: the DiT, and a wide decoder but for its last level. int8: most linear layers of the DiT's blocks;
    where the CPU has bf16, in that the rest of those layers and the decoder as above. A narrow decoder stays
    in float32, in which it is as fast. The sampler's state, rotary angles, frequencies, the conditioner and
    the encoder stay in float32. auto takes int8 only for a checkpoint that recommends it. Weights also come
    to lie in memory as a CPU wants them: call it once, and neither train nor save the model after. UserError
    for int8 off the CPU."""
    device = next(model.parameters()).device
    if name == "auto":
        name = "bf16" if has_bf16(device) else "float32"
        if model.sampling.get("int8") and has_int8(device):
            name = "int8"
    if name == "int8" and device.type != "cpu":
        raise UserError(f"--precision int8 is for CPUs; with --device {device.type} take bf16")
    lay_out(model.autoencoder)
    bf16 = name == "bf16" or name == "int8" and has_bf16(device)
    if bf16:
        use_bf16(model, whole_dit=name == "bf16")
    for layer in model.autoencoder.decoder:
        if isinstance(layer, nn.ConvTranspose1d):    # or decoding a whole at once copies them at every call
            layer.weight.data = layer.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
    for layer in model.dit.layers:
        attention, cross = layer.self_attention, layer.cross_attention
        for part, child in ((attention, "qkv"), (attention, "out"), (cross, "q"), (cross, "out"),
                            (layer.ff, "up"), (layer.ff, "down")):
            linear = getattr(part, child)
            # the inputs of "down" have outliers that 8 bits do not hold
            if name == "int8" and child != "down":
                setattr(part, child, Int8Linear(linear))
            elif packs(linear.weight):
                setattr(part, child, PackedLinear(linear, model.config.block + 1))  # the rows of a later step
        if name == "int8" and bf16:
            layer.ff.down.register_forward_pre_hook(to_bf16)
    return name


def use_bf16(model, whole_dit):
    """Weights to bf16: of the DiT, or of its feed-forwards' ends; of a wide decoder but for its last level,
    where 8 bits of mantissa are heard."""
    layers = [*model.dit.modules()] if whole_dit else [layer.ff.down for layer in model.dit.layers]
    decoder = model.autoencoder.decoder
    if model.config.ae_width >= 64:
        layers += decoder[:-5].modules()
        for layer in decoder:    # every part gets its input in the type of its weights
            layer.register_forward_pre_hook(to_type_of_weights)
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d, nn.LayerNorm)):
            layer.to(torch.bfloat16)


def to_bf16(layer, args):                                   # a hook before `forward`
    return args[0].bfloat16(),


def to_type_of_weights(layer, args):                        # the same; a snake takes any type
    convolution = layer.layers[1] if isinstance(layer, ResidualUnit) else layer
    return (args[0] if isinstance(layer, SnakeBeta) else args[0].to(convolution.weight.dtype)),


# -------------------------------------------------------------------------------- CUDA graphs
class Graphed:
    """function(state, *inputs) -> (result, new state), a function of tensors alone, recorded as a CUDA graph.

    On a GPU, once it has met the same shapes twice, all its kernels start with one call, for which Python
    would take longer than the kernels do. Elsewhere the function is just called. state: a list of tensors,
    which from then on stay where the graph keeps them. An input is read again if it is another tensor than
    the last time, not if its values have changed."""

    def __init__(self, function):
        self.function = function
        self.graph = None
        self.shapes = None

    @torch.no_grad()
    def __call__(self, state, *inputs):
        tensors = [*state, *inputs]
        shapes = [x.shape for x in tensors]
        device = tensors[0].device.type
        # autocast keeps copies of weights of its own
        if device != "cuda" or torch.is_autocast_enabled(device):
            return self.function(state, *inputs)
        if shapes != self.shapes:
            self.graph = None
            self.shapes = shapes
            return self.function(state, *inputs)
        if self.graph is None:
            self.record(tensors, len(state))
        for i, x in enumerate(tensors):
            if x is not self.read[i]:
                self.tensors[i].copy_(x)
        self.graph.replay()
        self.read = [*self.tensors[:len(state)], *inputs]
        return self.result.clone(), self.tensors[:len(state)]

    def record(self, tensors, n):
        """Record the function for tensors of these shapes, of which the first n are the state."""
        self.tensors = [x.clone() for x in tensors]
        self.read = tensors[:]
        graph = torch.cuda.CUDAGraph()
        with torch.compiler.set_stance("default"):
            # compiles, and chooses the convolutions' algorithms
            self.function(self.tensors[:n], *self.tensors[n:])
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.result, new = self.function(self.tensors[:n], *self.tensors[n:])
                for kept, x in zip(self.tensors, new):
                    kept.copy_(x)
        self.graph = graph                                  # only once it is whole


def graphed_block(context, denoise_block, levels, sampler, cfg):
    """`sample.stream`'s step, recorded as a CUDA graph: a function of draw() -> noise (B, C, block), on the
    CPU.

    It makes the block (B, C, block) after `context` and appends it. Nothing in it waits for the GPU."""
    objective = context.model.config.objective
    context.start = torch.tensor(context.start, device=context.finished.device)

    def following(state, noise, *told):    # `context` is where it works: what it needs is handed in
        restore(context, state)
        told = iter(told)
        if context.beat is not None:
            context.beat = next(told)
        given = type(recorded["given"])(*(next(told)
                                          for _ in recorded["given"])) if recorded["given"] else None
        global_, *cross = told
        context.prompt = EncodedPrompt(global_, list(zip(cross[::2], cross[1::2])))
        x, *fresh = noise
        x = denoise_block(context.predict, x, levels, sampler, objective, iter(fresh).__next__, cfg, given)
        context.append(x)
        return x, state_of(context)
    graphed = Graphed(following)
    recorded = {}
    draws = len(levels) if sampler == "pingpong" else 1

    def make(draw, given=None):
        noise = torch.stack([draw() for _ in range(draws)])
        recorded["given"] = given
        told = [] if context.beat is None else [context.beat]
        told += given or ()
        told += [context.prompt.global_, *(y for kv in context.prompt.cross for y in kv)]
        x, state = graphed(state_of(context), noise, *told)
        restore(context, state)
        return x
    return make


def state_of(context):
    """Between two blocks: the tensors of a `sample.Context` that change from one to the next."""
    return [context.start, context.finished, *(y for kv in context.kv or () for y in kv)]


def restore(context, state):
    context.start, context.finished, *kv = state
    context.kv = list(zip(kv[::2], kv[1::2])) or None
    context.waiting = True


def compile_layers(model):
    """On a GPU: the transformer's layers compiled, which fuses what lies between their matrix products. On a
    CPU: nothing.

    Only what is recorded as a graph is then compiled: for shapes that come once compiling would take longer
    than they do."""
    if next(model.parameters()).device.type == "cuda":
        torch.compiler.set_stance("force_eager")
        for layer in model.dit.layers:                      # all alike: compiled once for each shape
            layer.compile(dynamic=False)


# -------------------------------------------------------------------------------- the decoder
class Winograd:
    """A convolution of 7 taps without its padding, by 12 matrix products for 6 outputs in place of 42
    (Toom-Cook; Winograd 1980).

    Polynomials of 6 and of 7 coefficients have a product that 12 values settle: take the values of each at 12
    points, multiply, go back to coefficients. Transposed, those three steps are a convolution: 12 inputs are
    mixed into 12 sums, each sum goes through one matrix (the values of the taps' polynomial there), and what
    they give is mixed into 6 outputs. In float32 the result is ten times as far from the exact one as the
    plain convolution's, still within a few millionths."""
    # and infinity: the last coefficient
    points = 1, -1, 0, 1 / 3, -1 / 3, 2 / 3, -2 / 3, 3 / 2, -3 / 2, 3, -3

    def __init__(self, layer, most=512):
        """most: groups of 6 outputs computed at once."""
        back = torch.linalg.inv(self.values(12)).T
        size = back.abs().sum(1, keepdim=True)              # divided by it, sums are about as large as inputs
        weight = layer.weight.detach().double()             # (out, in, 7)
        taps = (size * self.values(7) @ weight.permute(2, 1, 0).flatten(1)).float()
        self.taps = taps.unflatten(1, weight.shape[1::-1])  # (12, in, out)
        self.sums = (back / size).float()
        self.outputs = self.values(6).T.float()
        self.bias = layer.bias.detach()
        self.dilation = layer.dilation[0]
        self.most = most

    @classmethod
    def values(cls, n):
        """The matrix from a polynomial's n coefficients to its values at the 12 points."""
        powers = [[p ** i for i in range(n)] for p in cls.points]
        return torch.tensor([*powers, [0] * (n - 1) + [1]], dtype=torch.float64)

    @staticmethod
    def suits(layer):
        """Is it faster? In float32 on a CPU, but for matrices too small to be worth the mixing."""
        return (layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
                and layer.kernel_size == (7,) and min(layer.in_channels, layer.out_channels) >= 128)

    def __call__(self, x):                                  # (B, in, T) -> (B, out, T - 6 * dilation)
        batch, channels, size = x.shape
        d = self.dilation
        x = x.transpose(1, 2)
        rows = 6 * math.ceil(size / (6 * d))
        if batch * d > 1:    # every d-th frame, and item after item, as one long sequence
            x = F.pad(x, (0, 0, 0, rows * d - size)).unflatten(1, (rows, d)).transpose(1, 2)
        x = x.reshape(-1, channels)
        tiles = batch * d * rows // 6
        y = x.new_empty(tiles, 6, self.taps.shape[2])
        most = min(tiles, self.most)
        sums = x.new_empty(most, 12, channels)
        products = x.new_empty(12, most, y.shape[2])
        for i in range(0, tiles - 1, most):                 # a few at a time, for the CPU's caches
            piece = x[6 * i:6 * (i + most) + 6]
            if len(piece) % 6:
                piece = F.pad(piece, (0, 0, 0, -len(piece) % 6))
            n = len(piece) // 6 - 1
            torch.bmm(self.sums.expand(n, 12, 12), piece.unfold(0, 12, 6).transpose(1, 2), out=sums[:n])
            # the value at 1 counts once in every output: the bias rides there
            torch.addmm(self.bias, sums[:n, 0], self.taps[0], out=products[0, :n])
            for k in range(1, 12):
                torch.mm(sums[:n, k], self.taps[k], out=products[k, :n])
            torch.bmm(self.outputs.expand(n, 6, 12), products[:, :n].transpose(0, 1), out=y[i:i + n])
        # outputs that span two stretches of the long sequence are the last of each, past those that there are
        y = y.view(batch, d, rows, -1).transpose(1, 2).flatten(1, 2)
        return y[:, :size - 6 * d].transpose(1, 2)


class Unpadded:
    """One of the decoder's convolutions without its padding, a copy of its weights lying as a CPU wants them.

    A transposed one has a kernel of two strides: it becomes a convolution over two frames that makes a
    stride's samples as so many channels, which in channels-last memory are the samples one after another. Its
    input starts a frame early."""

    def __init__(self, layer):
        weight = layer.weight.detach()
        self.bias = layer.bias
        self.samples = 1                                    # made of one frame
        self.out_channels = layer.out_channels
        # (in, out, now and before) -> (sample and out, in, before and now)
        if isinstance(layer, nn.ConvTranspose1d):
            self.samples = layer.stride[0]
            weight = weight.unflatten(2, (2, self.samples)).flip(2).permute(3, 1, 0, 2).flatten(0, 1)
            self.bias = self.bias.repeat(self.samples)
        self.reach = (weight.shape[-1] - 1) * layer.dilation[0]
        self.dilation = 1, *layer.dilation
        self.winograd = Winograd(layer) if Winograd.suits(layer) else None
        if self.winograd:
            return
        # dilated, on a GPU: frames in rows of `dilation`, so that the taps are neighbours below each other,
        # which cuDNN likes
        self.folded = layer.dilation[0] if weight.is_cuda else 1
        weight = weight[:, :, None] if self.folded == 1 else weight[..., None]
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.packed = packs(weight[:, :, 0])
        if self.packed:
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self.weight = reorder(self.weight, (0, 0), (1, 1), self.dilation, 1)

    def __call__(self, x):                                  # (B, in, T) -> (B, out, (T - reach) * samples)
        if x.shape[-1] <= self.reach:
            return x.new_zeros(len(x), self.out_channels, 0)
        if self.winograd:
            return self.winograd(x)
        n = x.shape[-1]
        x = x[:, :, None]
        if self.folded > 1:
            rows = F.pad(x, (0, -n % self.folded))[:, :, 0].unflatten(-1, (-1, self.folded))
            return F.conv2d(rows, self.weight, self.bias).flatten(2)[..., :n - self.reach]
        if self.packed:
            convolve = torch.ops.mkldnn._convolution_pointwise
            y = convolve(x, self.weight, self.bias, (0, 0), (1, 1), self.dilation, 1, "none", [], "")
        else:
            y = F.conv2d(x, self.weight, self.bias, dilation=self.dilation)
        return y[:, :, 0].transpose(1, 2).reshape(len(x), -1, self.out_channels).transpose(1, 2)


def plain_snake(layer, x, out):
    """SnakeBeta in float32, for a compiler."""
    alpha, gain = (y[:, None] for y in snake_constants(layer, torch.float32))
    return out.copy_(x + gain * torch.sin(alpha * x.float()).square())


def snake_into(x, alpha, gain, out):
    return out.copy_(x + gain * torch.sin(alpha * x.float()).square())


def snake_in_place(x, alpha, gain):
    return x.copy_(x + gain * torch.sin(alpha * x.float()).square())


@lru_cache
def fused_snake(device, dtype):
    """SnakeBeta compiled, in one pass over memory, as a function (layer, x, out). UserError where that does
    not work."""
    into = torch.compile(snake_into, dynamic=True)
    in_place = torch.compile(snake_in_place, dynamic=True)
    torch._dynamo.config.recompile_limit = 64               # for every precision and number of threads

    def fused(layer, x, out):
        # no parameters: for those every size would be compiled anew
        constants = snake_constants(layer, torch.float32)
        if x.shape[-1] and out is x:
            in_place(x.transpose(1, 2), *constants)
        elif x.shape[-1]:
            into(x.transpose(1, 2), *constants, out.transpose(1, 2))
        return out
    try:    # (B, samples, channels), like the first that comes
        with torch.compiler.set_stance("default"):
            in_place(torch.rand(1, 5, 3, device=device, dtype=dtype), *torch.rand(2, 3, device=device))
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0][:100]
        raise UserError(f"--compile does not work here ({reason})") from None
    return fused


class StreamingDecoder:
    """`audio.StreamingDecoder`, faster: the same idea and the same audio.

    Each layer keeps the end of its input, so no block is decoded twice. Convolutions are `Unpadded`, a snake
    writes where its convolution reads, and a piece is a function of tensors alone, which a GPU records. Has
    its own copy of the weights. compile: the snakes; on a GPU all but the convolutions."""

    @torch.no_grad()
    def __init__(self, autoencoder, compile=False):
        self.layers = autoencoder.decoder
        self.kept = {}                                      # layer -> the end of its input
        self.places = []                                    # the layers that keep something, in order
        self.unpadded = {layer: Unpadded(layer) for layer in self.layers.modules()
                         if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d))}
        self.dtype = self.layers[0].weight.dtype
        device = self.layers[0].weight.device.type
        self.snake = snake
        piece = StreamingDecoder.piece
        if compile:
            self.snake = fused_snake(device, self.dtype)    # raises now what a later block would
        if compile and device != "cpu":                     # in as few passes over memory as can be
            piece = torch.compile(piece, dynamic=False)
            self.snake = plain_snake
        # a weak reference: in a circle the copy of the weights would outlive the decoder
        me = weakref.ref(self)
        self.graphed = Graphed(lambda *args: piece(me(), *args))
        # most values between two layers: a CPU multiplies bf16 so fast that they should stay in its caches
        self.most = 2 ** 21 if device == "cpu" and self.dtype == torch.bfloat16 else math.inf

    @torch.no_grad()
    def __call__(self, latents, last=False):
        """(B, C, T) -> the audio (B, 2, n) that they settle; with `last` also all that is still inside."""
        kept = list(self.kept.values())
        audio, kept = self.piece(kept, latents, last) if last else self.graphed(kept, latents)
        self.places = list(self.kept)
        self.kept = dict(zip(self.places, kept))
        return audio

    def piece(self, kept, latents, last=False):
        """The same as a function of what the layers have kept, returning what they keep now."""
        self.kept = dict(zip(self.places, kept))
        audio = self.through(self.layers, latents[:, :self.layers[0].in_channels].to(self.dtype),
                             last).float()
        return audio, list(self.kept.values())

    def through(self, layers, x, last):
        for i, layer in enumerate(layers):
            # the rest in pieces: to a stream it is all the same
            if x.numel() > self.most and x.shape[-1] > 1:
                pieces = x.split(max(1, self.most // x[..., 0].numel()), dim=-1)
                made = [self.through(layers[i:], piece, last and piece is pieces[-1]) for piece in pieces]
                return torch.cat(made, dim=-1)
            if isinstance(layer, ResidualUnit):
                x = self.unit(layer, x, last)
            elif isinstance(layer, nn.ConvTranspose1d):
                x = self.upsample(layer, x, last)
            elif isinstance(layer, nn.Conv1d):
                x = self.conv(layer, x, last)
            else:
                x = self.snake(layer, x, x)                 # in place: the layer before made x
        return x

    def joined(self, layer, x, first, after=0, snake=None):
        """The end of a layer's input so far (at the start: `first` zeros), then x or snake(x), then `after`
        zeros."""
        before = self.kept[layer] if layer in self.kept else x.new_zeros(*x.shape[:2], first)
        at = before.shape[-1]
        end = at + x.shape[-1]
        whole = x.new_empty(len(x), end + after, x.shape[1]).transpose(1, 2)    # channels last in memory
        whole[..., :at] = before
        if snake is None:
            whole[..., at:end] = x
        else:
            self.snake(snake, x, whole[..., at:end])
        whole[..., end:] = 0
        return whole

    def conv(self, conv, x, last, snake=None):
        pad = conv.padding[0]
        x = self.joined(conv, x, pad, pad * last, snake)
        self.kept[conv] = x[..., max(0, x.shape[-1] - 2 * pad):].clone()
        return self.unpadded[conv](x)

    def unit(self, unit, x, last):
        first_snake, wide, second_snake, narrow = unit.layers
        x = x.to(wide.weight.dtype)                         # in bf16 the last units stay in float32
        y = self.conv(wide, x, last, first_snake)
        y = self.unpadded[narrow](self.snake(second_snake, y, y))
        waiting = self.kept.get(unit, x[..., :0])           # input whose output comes only now
        size = y.shape[-1]
        n = min(waiting.shape[-1], size)
        y[..., :n].add_(waiting[..., :n])
        y[..., n:].add_(x[..., :size - n])
        self.kept[unit] = torch.cat([waiting[..., n:], x[..., size - n:]], dim=-1)
        return y

    def upsample(self, conv, x, last):    # a frame reaches its own samples and those of the next
        pad = conv.padding[0]
        started = conv in self.kept
        x = self.joined(conv, x, 1, int(last))
        if x.shape[-1] > 1:
            self.kept[conv] = x[..., -1:].clone()
        y = self.unpadded[conv](x)
        return y[..., 0 if started else pad:y.shape[-1] - pad * last]


# -------------------------------------------------------------------------------- threads and memory
def prefetch(items):
    """The same items, each made in another thread while the caller is busy with the one before."""
    items = iter(items)
    end = object()
    wanted = SimpleQueue()
    made = SimpleQueue()

    def work():
        while wanted.get():
            try:
                made.put((next(items, end), None))
            except BaseException as error:                  # told to the caller, in whose thread it belongs
                made.put((end, error))
    thread = Thread(target=work, daemon=True)
    thread.start()
    wanted.put(True)
    try:
        item, error = made.get()
        while item is not end:
            wanted.put(True)
            yield item
            item, error = made.get()
        if error is not None:
            raise error
    finally:    # Python must not exit while the thread is inside torch
        wanted.put(False)
        thread.join()


def side_by_side(model, threads):
    """Should half of the CPU's cores make blocks while the other half turns them into sound?

    Yes where layers are too short to be split among all cores. Those of a large network are not, and the half
    that is done first would only wait."""
    return next(model.parameters()).device.type == "cpu" and threads > 1 and model.config.width <= 512


def mallopt(options):
    """Set glibc's options for memory, {option: value}; another C library does as it likes."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)


def keep_memory():
    """glibc returns large tensors to the kernel when freed, and gets them back page by page, zeroed: have it
    keep them."""
    mallopt({-4: 0, -1: 2 ** 31 - 1, -2: 2 ** 26})          # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def return_memory():
    """On the CPU, checkpointing frees activations between what it keeps, and glibc would hold on to all those
    holes: have every tensor over 1 MiB mapped, and so returned, on its own. Half the peak, a little
    slower."""
    mallopt({-4: 2 ** 16, -3: 2 ** 20})                     # M_MMAP_MAX, M_MMAP_THRESHOLD

