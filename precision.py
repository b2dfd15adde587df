"""In which precision a model plays, and how its weights lie in memory: float32, bf16, or 8-bit integers on a CPU.

`to_precision` is the one way in. What each choice costs and brings was measured: "Results" in the README, and
docs/experiments.md.
"""
import contextlib

import torch
from torch import nn

from common import UserError
from model import ConvTranspose1d

PRECISIONS = "auto", "float32", "bf16", "int8"


def has_bf16(device):
    """Are bf16 matrix products faster than float32 here? On a CPU it takes AVX-512 BF16, which AMX implies."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def has_int8(device):
    """Does this CPU multiply 8-bit integers fastest? With AVX2 alone twice as fast as float32, with AVX-512 BF16 1.7 times as
    fast as bf16; with AMX not."""
    return device.type == "cpu" and torch.cpu._is_avx2_supported() and not torch.cpu._is_amx_tile_supported()


def choose_precision(name, device):
    """"auto", "float32", "bf16" or "int8" -> one of the last three. Here auto never means int8, which is for playing alone."""
    return name if name != "auto" else "bf16" if has_bf16(device) else "float32"


def precision_of(name, device):
    """"auto", "float32" or "bf16" -> a context manager to train the network in. Weights and optimizer stay float32."""
    if choose_precision(name, device) == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext


class Int8Linear(nn.Module):
    """A linear layer on a CPU in 8-bit integers: weights with a scale for each output channel, inputs with one scale, found
    anew for each item of a batch (dynamic quantization). Sums are exact, in 32 bits; input and output are float32."""
    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(dim=1).clamp(min=1e-8) / 127
        weight = torch.quantize_per_channel(linear.weight, scale, torch.zeros(len(scale), dtype=torch.long), 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, linear.bias)
        self.reduce_range = not torch.cpu._is_vnni_supported()      # older CPUs add pairs of products in 16 bits: 7 bits for inputs

    def forward(self, x):                                   # (B, ..., in_features) -> (B, ..., out_features)
        if len(x) > 1:                                      # or how a stream is rounded would depend on those beside it
            return torch.cat([self(item) for item in x.split(1)])
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)


def packs(weight):
    """Should oneDNN, PyTorch's library for CPUs, get this weight, of a linear layer or a convolution, in its own order?

    With AVX-512 the products of a block of Stable Audio Open Small took 0.8 times as long in float32 and 0.93 in bf16;
    nano's, which fit in cache, 1.3 times; with AVX2 alone nothing changed. The order that it gives a convolution of kernel
    size 1 does not suit the inputs that come, and each call rearranged it: 31 ms in place of 2."""
    return (weight.device.type == "cpu" and weight.numel() >= 2 ** 20 and weight.shape[2:] != (1,)
            and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported())


class PackedLinear(nn.Module):
    """A linear layer on a CPU, its weights in the order in which oneDNN reads them, so that no call has to rearrange them.

    rows: the number of rows that comes most. In float32 MKL, with an order for just that number, took 0.87 times as long
    with 49 of them (and no less with 97 or 241), at the price of a second copy of the weights. With AMX, where MKL is at home."""
    def __init__(self, linear, rows=None):
        super().__init__()
        weight, self.bias, self.rows = linear.weight.detach(), linear.bias, None
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        if rows and weight.dtype == torch.float32 and torch.backends.mkl.is_available() and torch.cpu._is_amx_tile_supported():
            self.rows, self.weight_for_rows = rows, torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
            self.shape = weight.new_empty(1).expand(weight.shape)       # all that the product asks of the layer's own weights

    def forward(self, x):                                   # (B, N, in_features) -> (B, N, out_features)
        n = x.shape[-2]
        if x.shape[:-1].numel() == self.rows:
            return torch.ops.mkl._mkl_linear(x, self.weight_for_rows, self.shape, self.bias, self.rows)
        if x.dtype == torch.bfloat16 and n % 4:             # up to 3 rows that nobody reads: oneDNN is slower with 49 than with 52
            x = torch.cat([x, x[..., :-n % 4, :]], dim=-2)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")[..., :n, :]


@torch.no_grad()
def to_precision(model, name):
    """What the model plays in. bf16: the DiT, and the decoder but for its last level. int8: most linear layers of the DiT's
    blocks; where the CPU has bf16, in that the rest of those layers and the decoder as above. A narrow decoder (nano's has 16
    channels at the audio's own rate, Stable Audio's 128) stays in float32, in which it is as fast. Returns the precision taken.

    auto takes int8 only for a checkpoint that recommends it. Weights also come to lie in memory as a CPU wants them: call it
    once, and neither train nor save the model after. The sampler's state, rotary angles, frequencies, the conditioner and the
    encoder stay in float32. UserError for int8 off the CPU."""
    device = next(model.parameters()).device
    recommended = name == "auto" and model.sampling.get("int8") and has_int8(device)
    name = "int8" if recommended else choose_precision(name, device)
    if name == "int8" and device.type != "cpu":
        raise UserError(f"--precision int8 is for CPUs; with --device {device.type} take bf16")
    bf16 = name == "bf16" or name == "int8" and has_bf16(device)
    if bf16:
        # not the decoder's last level, where 8 bits are heard: nano's distance to held-out audio was 3531 in place of 864
        of_dit = model.dit.modules() if name == "bf16" else [layer.ff.down for layer in model.dit.layers]
        of_decoder = model.autoencoder.decoder[:-5].modules() if model.config.ae_width >= 64 else ()
        for layer in (*of_dit, *of_decoder):
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d, nn.LayerNorm)):
                layer.to(torch.bfloat16)
    for layer in model.autoencoder.decoder:
        if isinstance(layer, ConvTranspose1d):              # or decoding a whole at once copies them at every call
            layer.weight.data = layer.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
    for layer in model.dit.layers:
        for part, names in (layer.self_attention, ("qkv", "out")), (layer.cross_attention, ("q", "out")), (layer.ff, ("up", "down")):
            for child in names:
                linear = getattr(part, child)
                if name == "int8" and child != "down":      # its input has outliers, and v was off by 14 % instead of 2 %
                    setattr(part, child, Int8Linear(linear))
                elif packs(linear.weight):
                    setattr(part, child, PackedLinear(linear, model.config.block + 1))      # the rows of a later step
        if name == "int8" and bf16:
            layer.ff.down.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
    return name
