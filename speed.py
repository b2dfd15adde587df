"""What only makes the rest faster. Only bench.py needs this file: without it the rest works, in float32.

    layers on a CPU       `lay_out`: convolutions and snakes that suit a CPU's caches
    precision             `to_precision`: bf16, 8-bit integers, weights in the order in which a CPU reads them
    CUDA graphs           `Graphed`, `graphed_block`: one call starts a whole block; `compile_layers`
    the decoder           `StreamingDecoder`, with convolutions that need fewer products (`Winograd`)
    threads and memory    `prefetch`, `side_by_side`, `keep_memory`, `return_memory`

What each of them gains was measured: docs/speed.md and docs/experiments.md.
"""
import contextlib
import ctypes
import math
import sys
import weakref
from functools import lru_cache
from queue import SimpleQueue
from threading import Thread

import torch
import torch.nn.functional as F
from torch import nn

from controls import Given
from model import EncodedPrompt, ResidualUnit, SnakeBeta, UserError


# -------------------------------------------------------------------------------- layers on a CPU
# One-dimensional convolutions run as two-dimensional ones over (B, channels, 1, samples), channels last in
# memory: the same numbers, but much faster on CPUs. What a layer returns lies in memory as its input does.
class ChannelsLastConv(nn.Conv1d):
    def forward(self, x):                                   # (B, in, samples) -> (B, out, samples)
        y = F.conv2d(channels_last(x)[:, :, None], self.weight[:, :, None], self.bias,
                     (1, *self.stride), (0, *self.padding), (1, *self.dilation))
        return y[:, :, 0]


class ChannelsLastConvTranspose(nn.ConvTranspose1d):
    def forward(self, x):                                   # (B, in, samples) -> (B, out, more samples)
        y = F.conv_transpose2d(channels_last(x)[:, :, None], self.weight[:, :, None], self.bias,
                               (1, *self.stride), (0, *self.padding))
        return y[:, :, 0]


class PiecewiseSnake(SnakeBeta):
    def forward(self, x):
        return snake(self, x)


def channels_last(x):                                       # (B, channels, samples): only the order changes
    return x[:, :, None].contiguous(memory_format=torch.channels_last)[:, :, 0]


def snake_constants(layer, dtype):
    """alpha and 1 / beta of a SnakeBeta, each (channels,)."""
    return layer.alpha.exp().to(dtype), 1 / (layer.beta.exp().to(dtype) + 1e-9)


def snake(layer, x, out=None):
    """SnakeBeta of x (B, channels, samples). out: where to write, possibly x; not with gradients recorded.

    On a CPU a long input goes in pieces so short that intermediate results stay in the cache."""
    alpha, gain = (y[:, None] for y in snake_constants(layer, x.dtype))
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.numel() <= 2 ** 21:
        return torch.addcmul(x, (alpha * x).sin_().square_(), gain, out=out)
    out = torch.empty_like(x) if out is None else out
    size = max(1, 2 ** 17 // x[..., 0].numel())
    for piece, piece_out in zip(x.split(size, dim=-1), out.split(size, dim=-1)):
        torch.addcmul(piece, (alpha * piece).sin_().square_(), gain, out=piece_out)
    return out


CPU_LAYERS = {nn.Conv1d: ChannelsLastConv, nn.ConvTranspose1d: ChannelsLastConvTranspose,
              SnakeBeta: PiecewiseSnake}


def lay_out(autoencoder):
    """Give an autoencoder's layers the classes above. Weights, their names and results stay the same."""
    for layer in autoencoder.modules():
        layer.__class__ = CPU_LAYERS.get(type(layer), type(layer))


# -------------------------------------------------------------------------------- precision
def has_bf16(device):
    """Are bf16 matrix products faster than float32 here? On CPUs with AVX-512 BF16, which AMX implies."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def has_int8(device):
    """Are 8-bit products the fastest here? On CPUs with AVX2 or AVX-512; with AMX, bf16 is as fast."""
    return device.type == "cpu" and torch.cpu._is_avx2_supported() and not torch.cpu._is_amx_tile_supported()


class Int8Linear(nn.Module):
    """A linear layer on a CPU in 8-bit integers. Its input and output are float32.

    Weights have a scale for each output channel, inputs one for each item of a batch, computed at every call
    (dynamic quantization). Sums are exact, in 32 bits."""
    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(dim=1).clamp(min=1e-8) / 127
        zero = torch.zeros(len(scale), dtype=torch.long)
        weight = torch.quantize_per_channel(linear.weight, scale, zero, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, linear.bias)
        # CPUs without VNNI add pairs of products in 16 bits: inputs may then fill only 7 bits
        self.reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x):                                   # (B, ..., in_features) -> (B, ..., out_features)
        if len(x) > 1:                                      # one by one: no item changes another's rounding
            return torch.cat([self(item) for item in x.split(1)])
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)


def packs(weight):
    """Should oneDNN, PyTorch's library for CPUs, store this weight in an order of its own?

    weight: of a linear layer or a convolution. It pays with AVX-512, for weights too large for a CPU's cache.
    Kernels of size 1 get an order for inputs of another size, which every call would have to undo."""
    return (weight.device.type == "cpu" and weight.numel() >= 2 ** 20 and weight.shape[2:] != (1,)
            and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported())


class PackedLinear(nn.Module):
    """A linear layer on a CPU, its weights stored in oneDNN's own order, so that no call rearranges them.

    rows: the most frequent number of input rows. On CPUs with AMX, in float32, there is a second copy of the
    weights, in the order in which MKL is fastest for just that number."""
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
            # the call also takes the plain weights, but reads only their shape
            self.shape = weight.new_empty(1).expand(weight.shape)

    def forward(self, x):                                   # (B, N, in_features) -> (B, N, out_features)
        n = x.shape[-2]
        if x.shape[:-1].numel() == self.rows:
            return torch.ops.mkl._mkl_linear(x, self.weight_for_rows, self.shape, self.bias, self.rows)
        if x.dtype == torch.bfloat16 and n % 4:             # oneDNN is faster with a multiple of 4 rows
            x = torch.cat([x, x[..., :-n % 4, :]], dim=-2)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")[..., :n, :]


@torch.no_grad()
def to_precision(model, name):
    """Put a model that will only play into "auto", "float32", "bf16" or "int8". Returns the precision chosen.

    bf16: the DiT, and a wide decoder but for its last level; a narrow one is as fast in float32. int8: most
    linear layers of the DiT's blocks; on CPUs with bf16, the rest of these layers and the decoder are as in
    bf16. auto: int8 only for checkpoints that recommend it. Always float32: the sampler's state, rotary
    angles, frequencies, the conditioner, the encoder. Weights are also put in the order that suits a CPU:
    call it once, and neither train nor save the model afterwards. Raises UserError for int8 on a GPU."""
    device = next(model.parameters()).device
    if name == "auto":
        int8 = model.sampling.get("int8") and has_int8(device)
        name = "int8" if int8 else "bf16" if has_bf16(device) else "float32"
    if name == "int8" and device.type != "cpu":
        raise UserError(f"--precision int8 is for CPUs; with --device {device.type} take bf16")
    lay_out(model.autoencoder)
    bf16 = name == "bf16" or name == "int8" and has_bf16(device)
    if bf16:
        use_bf16(model, whole_dit=name == "bf16")
    for layer in model.autoencoder.decoder:
        if isinstance(layer, nn.ConvTranspose1d):           # or decoding all at once copies them each time
            layer.weight.data = layer.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
    for layer in model.dit.layers:
        attention, cross = layer.self_attention, layer.cross_attention
        for module, child in ((attention, "qkv"), (attention, "out"), (cross, "q"), (cross, "out"),
                              (layer.ff, "up"), (layer.ff, "down")):
            linear = getattr(module, child)
            # inputs of "down" have outliers, which leave too few of the 8 bits to the other values
            if name == "int8" and child != "down":
                setattr(module, child, Int8Linear(linear))
            elif packs(linear.weight):                      # most steps run a block and its timestep token
                setattr(module, child, PackedLinear(linear, rows=model.config.block + 1))
        if name == "int8" and bf16:
            layer.ff.down.register_forward_pre_hook(input_to_bf16)
    return name


def use_bf16(model, whole_dit):
    """To bf16: the DiT, or its feed-forwards' second layers alone; a wide decoder but for its last level."""
    layers = [*model.dit.modules()] if whole_dit else [layer.ff.down for layer in model.dit.layers]
    decoder = model.autoencoder.decoder
    if model.config.ae_width >= 64:
        layers += decoder[:-5].modules()                    # in the last level, rounding to 8 bits is heard
        for layer in decoder:
            layer.register_forward_pre_hook(input_to_type_of_weights)
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d, nn.LayerNorm)):
            layer.to(torch.bfloat16)


def input_to_bf16(layer, args):                             # a hook before `forward`
    return (args[0].bfloat16(),)


def input_to_type_of_weights(layer, args):                  # the same; a snake takes any type
    convolution = layer.layers[1] if isinstance(layer, ResidualUnit) else layer
    return args if isinstance(layer, SnakeBeta) else (args[0].to(convolution.weight.dtype),)


# -------------------------------------------------------------------------------- CUDA graphs
class Graphed:
    """function(state, *inputs) -> (result, new state), a function of tensors alone, recorded as a CUDA graph.

    On a GPU, when shapes come a second time in a row, the function's kernels are recorded. From then on one
    call starts them all: Python would take longer to start them than the GPU to run them. On a CPU the
    function is just called. state: a list of tensors; the new ones lie in the graph, and the next call writes
    over them. An input is read again if it is another tensor than last time, not if its values changed."""
    def __init__(self, function):
        self.function = function
        self.graph = None
        self.shapes = None

    @torch.no_grad()
    def __call__(self, state, *inputs):
        tensors = [*state, *inputs]
        shapes = [x.shape for x in tensors]
        device = tensors[0].device.type
        # a graph would outlive the converted copies of weights that autocast makes
        if device != "cuda" or torch.is_autocast_enabled(device):
            return self.function(state, *inputs)
        if shapes != self.shapes:
            self.graph = None
            self.shapes = shapes
            return self.function(state, *inputs)
        if self.graph is None:
            self.record(tensors, len(state))
        for i, x in enumerate(tensors):
            if x is not self.copied[i]:
                self.tensors[i].copy_(x)
        self.graph.replay()
        self.copied = [*self.tensors[:len(state)], *inputs]
        return self.result.clone(), self.tensors[:len(state)]

    def record(self, tensors, n):
        """Record the function for tensors of these shapes, of which the first n are the state."""
        self.tensors = [x.clone() for x in tensors]         # where the graph reads
        self.copied = tensors[:]                            # what was last copied there
        graph = torch.cuda.CUDAGraph()
        with compiling():
            # once outside of the graph: this compiles, and chooses the convolutions' algorithms
            self.function(self.tensors[:n], *self.tensors[n:])
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.result, new_state = self.function(self.tensors[:n], *self.tensors[n:])
                for x, new in zip(self.tensors, new_state):
                    x.copy_(new)
        self.graph = graph                                  # only now, when recording has succeeded


def graphed_block(context, denoise_block, levels, sampler, cfg):
    """One step of `sample.stream` as a CUDA graph: make(draw) -> the block (B, C, block) after `context`.

    make also appends that block. It first draws all its noise with draw() -> (B, C, block), on the model's
    device; after that, nothing waits for the GPU. denoise_block: sample.py's, not to be imported here."""
    objective = context.model.config.objective
    context.start = torch.as_tensor(context.start, device=context.finished.device)

    n = 1 + 2 * len(context.prompt.cross)                   # tensors of a prompt

    def next_block(state, noise, *told):
        # it works on `context`, but everything there that changes between two blocks is an argument;
        # told: a beat or none, the three tensors of a `Given` or none, and those of the prompt
        context.restore(state)
        *beat_and_given, global_ = told[:1 - n]
        context.prompt = EncodedPrompt(global_, list(zip(told[1 - n::2], told[2 - n::2])))
        given = Given(*beat_and_given[-3:]) if len(beat_and_given) >= 3 else None
        context.beat = beat_and_given[0] if len(beat_and_given) % 3 else None
        x, *fresh = noise
        x = denoise_block(context.predict, x, levels, sampler, objective, iter(fresh).__next__, cfg, given)
        context.append(x)
        return x, context.tensors()
    graphed = Graphed(next_block)
    draws = len(levels) if sampler == "pingpong" else 1

    def make(draw, given=None):
        noise = torch.stack([draw() for _ in range(draws)])    # (draws, B, C, block)
        told = [] if context.beat is None else [context.beat]
        told += given or ()
        told += [context.prompt.global_, *(y for kv in context.prompt.cross for y in kv)]
        x, state = graphed(context.tensors(), noise, *told)
        context.restore(state)
        return x
    return make


def compile_layers(model):
    """On a GPU: compile the transformer's layers, which fuses what lies between their products.

    From then on, in the whole process, PyTorch compiles only what `Graphed` records (`compiling`): for shapes
    that come once, at a stream's start, compiling would take longer than running them. On a CPU: nothing."""
    if next(model.parameters()).device.type == "cuda":
        torch.compiler.set_stance("force_eager")
        for layer in model.dit.layers:                      # all alike: compiled once for each shape
            layer.compile(dynamic=False)


def compiling():
    """A context manager in which PyTorch compiles, also after `compile_layers`."""
    if "torch._dynamo" not in sys.modules:                  # nothing asks for it: spare its long import
        return contextlib.nullcontext()
    return torch.compiler.set_stance("default")


# -------------------------------------------------------------------------------- the decoder
class Winograd:
    """A convolution of 7 taps without padding, by 12 matrix products for 6 outputs in place of 42.

    Polynomials of 6 and of 7 coefficients have a product that 12 of its values determine: evaluate both at 12
    points, multiply, interpolate (Toom-Cook). Transposed, these steps are a convolution (Winograd 1980): 12
    inputs are mixed into 12 sums, each sum goes through one matrix (the taps' polynomial at one point), and
    the products are mixed into 6 outputs. In float32 it rounds more than a plain convolution, but little."""
    # the twelfth is infinity, where the value of a polynomial is its last coefficient
    points = (1, -1, 0, 1 / 3, -1 / 3, 2 / 3, -2 / 3, 3 / 2, -3 / 2, 3, -3)

    def __init__(self, layer, tiles_at_once=512):
        back = torch.linalg.inv(self.values(12)).T
        size = back.abs().sum(1, keepdim=True)              # divided by it, sums are about as large as inputs
        weight = layer.weight.detach().double()             # (out, in, 7)
        taps = (size * self.values(7) @ weight.permute(2, 1, 0).flatten(1)).float()
        self.taps = taps.unflatten(1, weight.shape[1::-1])  # (12, in, out)
        self.sums = (back / size).float()
        self.outputs = self.values(6).T.float()
        self.bias = layer.bias.detach()
        self.dilation = layer.dilation[0]
        self.tiles_at_once = tiles_at_once                  # 6 outputs each; few, for the CPU's caches

    @classmethod
    def values(cls, n):
        """The matrix (12, n) from a polynomial's n coefficients to its values at the 12 points."""
        powers = [[p ** i for i in range(n)] for p in cls.points]
        return torch.tensor([*powers, [0] * (n - 1) + [1]], dtype=torch.float64)

    @staticmethod
    def suits(layer):
        """Is it faster? In float32 on a CPU, unless matrices are too small to be worth the mixing."""
        return (layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
                and layer.kernel_size == (7,) and min(layer.in_channels, layer.out_channels) >= 128)

    def __call__(self, x):                                  # (B, in, T) -> (B, out, T - 6 * dilation)
        batch, channels, size = x.shape
        d = self.dilation
        x = x.transpose(1, 2)
        rows = 6 * math.ceil(size / (6 * d))
        if batch * d > 1:                                   # every d-th frame, item after item: one sequence
            x = F.pad(x, (0, 0, 0, rows * d - size)).unflatten(1, (rows, d)).transpose(1, 2)
        x = x.reshape(-1, channels)
        tiles = batch * d * rows // 6
        y = x.new_empty(tiles, 6, self.taps.shape[2])
        at_once = min(tiles, self.tiles_at_once)
        sums = x.new_empty(at_once, 12, channels)
        products = x.new_empty(12, at_once, y.shape[2])
        for i in range(0, tiles - 1, at_once):
            piece = x[6 * i:6 * (i + at_once) + 6]
            if len(piece) % 6:
                piece = F.pad(piece, (0, 0, 0, -len(piece) % 6))
            n = len(piece) // 6 - 1
            torch.bmm(self.sums.expand(n, 12, 12), piece.unfold(0, 12, 6).transpose(1, 2), out=sums[:n])
            # every output contains the product at point 1 exactly once: the bias is added there
            torch.addmm(self.bias, sums[:n, 0], self.taps[0], out=products[0, :n])
            for k in range(1, 12):
                torch.mm(sums[:n, k], self.taps[k], out=products[k, :n])
            torch.bmm(self.outputs.expand(n, 6, 12), products[:, :n].transpose(0, 1), out=y[i:i + n])
        # outputs that span two parts of the one sequence are the last of each part, and are cut off here
        y = y.view(batch, d, rows, -1).transpose(1, 2).flatten(1, 2)
        return y[:, :size - 6 * d].transpose(1, 2)


class Unpadded:
    """One of the decoder's convolutions without its padding, with its own copy of the weights, well ordered.

    A transposed convolution has a kernel of two strides. It becomes a convolution over two frames that makes
    a stride's samples as so many channels: with channels last in memory, they lie there one after another.
    Its input begins one frame early."""
    def __init__(self, layer):
        weight = layer.weight.detach()
        self.bias = layer.bias
        self.samples = 1                                    # that one frame becomes
        self.out_channels = layer.out_channels
        if isinstance(layer, nn.ConvTranspose1d):
            # (in, out, samples of this frame and of the last) -> (samples * out, in, last frame and this one)
            self.samples = layer.stride[0]
            weight = weight.unflatten(2, (2, self.samples)).flip(2).permute(3, 1, 0, 2).flatten(0, 1)
            self.bias = self.bias.repeat(self.samples)
        self.reach = (weight.shape[-1] - 1) * layer.dilation[0]
        self.dilation = (1, *layer.dilation)
        self.winograd = Winograd(layer) if Winograd.suits(layer) else None
        if self.winograd:
            return
        # cuDNN is slow with dilation: on a GPU, frames go in rows of `dilation`, where taps are neighbours
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
    """SnakeBeta in float32, as part of what is compiled."""
    alpha, gain = (y[:, None] for y in snake_constants(layer, torch.float32))
    return out.copy_(x + gain * torch.sin(alpha * x.float()).square())


@lru_cache
def fused_snake(device, dtype):
    """SnakeBeta compiled alone, in one pass over memory: a function (layer, x, out). May raise UserError."""
    @torch.compile(dynamic=True)
    def into(x, alpha, gain, out):
        return out.copy_(x + gain * torch.sin(alpha * x.float()).square())

    @torch.compile(dynamic=True)
    def in_place(x, alpha, gain):
        return x.copy_(x + gain * torch.sin(alpha * x.float()).square())
    torch._dynamo.config.recompile_limit = 64               # for every precision and number of threads

    def fused(layer, x, out):
        constants = snake_constants(layer, torch.float32)   # parameters would be compiled size by size
        if x.shape[-1] and out is x:
            in_place(x.transpose(1, 2), *constants)
        elif x.shape[-1]:
            into(x.transpose(1, 2), *constants, out.transpose(1, 2))
        return out
    try:
        with compiling():                                   # x (B, samples, channels), as above
            in_place(torch.rand(1, 5, 3, device=device, dtype=dtype), *torch.rand(2, 3, device=device))
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0][:100]
        raise UserError(f"--compile does not work here ({reason})") from None
    return fused


class StreamingDecoder:
    """`audio.StreamingDecoder`, faster: the same idea and the same audio.

    Convolutions are `Unpadded`, a snake writes where its convolution reads, and `Graphed` records a piece.
    compile: the snakes, on a GPU all but the convolutions (see `compile_layers`). May raise UserError."""
    @torch.no_grad()
    def __init__(self, autoencoder, compile=False):
        self.layers = autoencoder.decoder
        self.kept = {}                                      # layer -> the end of its input so far
        self.keepers = []                                   # the layers in `kept`, in its order
        self.unpadded = {layer: Unpadded(layer) for layer in self.layers.modules()
                         if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d))}
        self.dtype = self.layers[0].weight.dtype
        device = self.layers[0].weight.device.type
        # most values between two layers: a CPU multiplies bf16 so fast that they should stay in its caches
        self.most = 2 ** 21 if device == "cpu" and self.dtype == torch.bfloat16 else math.inf
        self.snake = snake
        piece = StreamingDecoder.piece
        if compile:
            self.snake = fused_snake(device, self.dtype)    # on a GPU only to raise now what recording would
        if compile and device != "cpu":
            self.snake = plain_snake
            piece = torch.compile(piece, dynamic=False)
        if compile and device == "cuda":
            torch.compiler.set_stance("force_eager")        # as in `compile_layers`
        # a weak reference: in a circle of references, the copy of the weights would outlive the decoder
        this = weakref.ref(self)
        self.graphed = Graphed(lambda kept, latents: piece(this(), kept, latents))

    @torch.no_grad()
    def __call__(self, latents, last=False):
        """(B, C, T) -> the audio (B, 2, n) that they settle; with `last` also all that is still inside."""
        kept = list(self.kept.values())
        audio, kept = self.piece(kept, latents, last) if last else self.graphed(kept, latents)
        self.keepers = list(self.kept)
        self.kept = dict(zip(self.keepers, kept))
        return audio

    def piece(self, kept, latents, last=False):
        """The same, as a function of what layers have kept; returns the audio and what they keep now."""
        self.kept = dict(zip(self.keepers, kept))
        latents = latents[:, :self.layers[0].in_channels]  # what is beside the latents is not for the decoder
        return self.run(self.layers, latents.to(self.dtype), last).float(), list(self.kept.values())

    def run(self, layers, x, last):
        for i, layer in enumerate(layers):
            if x.numel() > self.most and x.shape[-1] > 1:
                # the remaining layers in pieces, which changes nothing: to them x is a stream
                pieces = x.split(max(1, self.most // x[..., 0].numel()), dim=-1)
                done = [self.run(layers[i:], piece, last and piece is pieces[-1]) for piece in pieces]
                return torch.cat(done, dim=-1)
            if isinstance(layer, ResidualUnit):
                x = self.residual(layer, x, last)
            elif isinstance(layer, nn.ConvTranspose1d):
                x = self.upsample(layer, x, last)
            elif isinstance(layer, nn.Conv1d):
                x = self.convolve(layer, x, last)
            else:                                           # a snake, in place: the layer before made x
                x = self.snake(layer, x, x)
        return x

    def with_past(self, layer, x, first, after=0, snake_layer=None):
        """What the layer kept (at the start: `first` zeros), then x or its snake, then `after` zeros."""
        past = self.kept[layer] if layer in self.kept else x.new_zeros(*x.shape[:2], first)
        begin = past.shape[-1]
        end = begin + x.shape[-1]
        # (B, channels, samples), channels last in memory
        whole = x.new_empty(len(x), end + after, x.shape[1]).transpose(1, 2)
        whole[..., :begin] = past
        if snake_layer is None:
            whole[..., begin:end] = x
        else:
            self.snake(snake_layer, x, whole[..., begin:end])
        whole[..., end:] = 0
        return whole

    def convolve(self, conv, x, last, snake_layer=None):    # an output looks `padding` samples ahead
        pad = conv.padding[0]
        x = self.with_past(conv, x, pad, pad * last, snake_layer)
        self.kept[conv] = x[..., max(0, x.shape[-1] - 2 * pad):].clone()
        return self.unpadded[conv](x)

    def residual(self, unit, x, last):
        first_snake, wide, second_snake, narrow = unit.layers
        x = x.to(wide.weight.dtype)                         # in bf16 the last units stay in float32
        y = self.convolve(wide, x, last, first_snake)
        y = self.unpadded[narrow](self.snake(second_snake, y, y))
        waiting = self.kept.get(unit, x[..., :0])           # input whose output comes only now
        size = y.shape[-1]
        n = min(waiting.shape[-1], size)
        y[..., :n].add_(waiting[..., :n])
        y[..., n:].add_(x[..., :size - n])
        self.kept[unit] = torch.cat([waiting[..., n:], x[..., size - n:]], dim=-1)
        return y

    def upsample(self, conv, x, last):                      # a frame reaches its samples and the next one's
        pad = conv.padding[0]
        begins = conv not in self.kept
        x = self.with_past(conv, x, 1, int(last))
        if x.shape[-1] > 1:
            self.kept[conv] = x[..., -1:].clone()
        y = self.unpadded[conv](x)
        return y[..., pad if begins else 0:y.shape[-1] - pad * last]


# -------------------------------------------------------------------------------- threads and memory
def prefetch(items):
    """The same items, each made in another thread while the caller is busy with the one before."""
    items = iter(items)
    end = object()
    wanted, made = SimpleQueue(), SimpleQueue()

    def work():
        while wanted.get():
            try:
                made.put((next(items, end), None))
            except BaseException as error:                  # to be raised in the caller's thread
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
    finally:                                                # Python must not exit with a thread inside torch
        wanted.put(False)
        thread.join()


def side_by_side(model, threads):
    """Should half of the CPU's cores make blocks while the other half decodes them?

    Yes where layers are too small to be divided among all cores. Those of a large network are not, and the
    half that finishes first would only wait."""
    return next(model.parameters()).device.type == "cpu" and threads > 1 and model.config.width <= 512


def mallopt(options):
    """Set options {number: value} of glibc's memory allocation. Does nothing with another C library."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)


def keep_memory():
    """Let glibc keep the memory of freed tensors: the kernel would zero it, page by page, for the next."""
    mallopt({-4: 0, -1: 2 ** 31 - 1, -2: 2 ** 26})          # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def return_memory():
    """Let glibc return the memory of freed tensors over 1 MiB, by mapping each of them on its own.

    On a CPU, checkpointing frees activations between some that stay, and glibc would keep all these holes."""
    mallopt({-4: 2 ** 16, -3: 2 ** 20})                     # M_MMAP_MAX, M_MMAP_THRESHOLD
