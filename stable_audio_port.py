"""Read public Stable Audio weights into model.py: Open 1.0, Open Small, checkpoints of the paper's own code.

    python stable_audio_port.py path/to/stable-audio-open-small --out out/sao_small.pt

A public checkpoint is `model_config.json` and, beside it, `model.safetensors` or `model.ckpt`. The config
becomes a `Config`; an option in it that is not implemented here is refused by name. Every tensor goes through
TABLE, and a tensor too many or too few is an error. Prompts need T5, thus `transformers`; `--prompts` encodes
them ahead, for a machine without it.
"""
import argparse
import json
import math
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common import (UserError, check_sizes, first_bytes, is_floats, is_safetensors, keep_inputs, load_plain,
                    not_weights, reason_of, regime_of, run, save, save_whole, say, whole, writable)
from model import LMDM, Config


def first_few(names):
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -------------------------------------------------------------------------------- model_config.json
# The public name of what the network predicts -> ours. The "denoiser" ones are the same networks after
# adversarial post-training, meant for few-step ping-pong sampling.
OBJECTIVES = {
    "v": "v",
    "v_denoiser": "v",
    "rectified_flow": "rectified_flow",
    "rf_denoiser": "rectified_flow",
}
# How they are played until finetuned; the "denoiser" ones as every base model.
BASE_SAMPLING = {
    "v": dict(sampler="euler", steps=100, cfg=7.0),
    "rectified_flow": dict(sampler="euler", steps=50, cfg=7.0),
}
T5_WIDTHS = {f"{family}-{size}": width for family in ("t5", "google/flan-t5")
             for size, width in (("small", 512), ("base", 768), ("large", 1024))}
ANY = None
AE = r"pretransform\.config\."
DIT = r"diffusion\.config\."
OPTIONS = [    # everything under "model", and the values that are implemented here
    # read into Config below, or proved by the shapes of the weights
    (r"io_channels|conditioning\.(cond_dim|configs)|diffusion\.(cross_attention|global)_cond_ids", ANY),
    (AE + r"(latent_dim|downsampling_ratio|io_channels)", ANY),
    (AE + r"(en|de)coder\.config\.(in_channels|out_channels|channels|c_mults|strides|latent_dim)", ANY),
    (DIT + r"(io_channels|embed_dim|depth|num_heads)", ANY),
    (DIT + r"(cond_token_dim|global_cond_dim|project_cond_tokens)", ANY),
    # what makes the network this network
    (r"pretransform\.type", ["autoencoder"]),
    (r"pretransform\.scale", [1]),
    (AE + r"(en|de)coder\.type", ["oobleck"]),
    (AE + r"bottleneck\.type", ["vae"]),
    (AE + r"(en|de)coder\.config\.use_snake", [True]),
    (AE + r"decoder\.config\.final_tanh", [False]),
    (r"diffusion\.type", ["dit"]),
    (r"diffusion\.(config\.)?diffusion_objective", list(OBJECTIVES)),
    (DIT + r"transformer_type", ["continuous_transformer"]),
    (DIT + r"global_cond_type", ["prepend"]),
    (DIT + r"timestep_cond_type", ["global"]),
    (DIT + r"(project_global_cond|rotary_pos_emb)", [True]),
    (DIT + r"patch_size", [1]),
    (DIT + r"attn_kwargs\.qk_norm", ["ln", "none"]),
    # of the paper's original code: how it feeds the context and orders the tokens, which `causal` and TABLE
    # settle here
    (r"diffusion\.input_add_ids|" + DIT + "(input_add_dims|postpend|split_qkv)", ANY),
    # only for training and speed
    (r"pretransform\.(iterate_batch|model_half|enable_grad)|" + AE + r"(en|de)coder\.requires_grad", ANY),
    (r"diffusion\.(sampling_)?distribution_shift_options\..*|" + DIT + "zero_init_branch_outputs", ANY),
]
# public defaults that differ from what is implemented here: leaving the option out means these
PUBLIC_DEFAULTS = {
    "pretransform.config.encoder.config.use_snake": False,
    "pretransform.config.decoder.config.use_snake": False,
    "pretransform.config.decoder.config.final_tanh": True,
}
CONDITIONER_OPTIONS = {"t5": {"t5_model_name", "max_length"}, "number": {"min_val", "max_val"}}


def flatten(tree, path=""):
    """Nested dictionaries -> {dotted path: value}; lists are values."""
    if not isinstance(tree, dict):
        return {path: tree}
    flat = {}
    for name, branch in tree.items():
        flat |= flatten(branch, f"{path}.{name}" if path else name)
    return flat


def need(option, tree):
    if option not in tree:
        raise UserError(f"lacks {option}")
    return tree[option]


def refuse(option, value):
    raise UserError(f"asks for {option} = {json.dumps(value)}, which is not implemented here")


def check_options(options):
    """UserError for an option of "model" that is not implemented here; unknown but empty or false is off."""
    for option, value in options.items():
        accepted = next((values for pattern, values in OPTIONS if re.fullmatch(pattern, option)), [])
        if accepted is not ANY and value not in accepted and (accepted or value):
            refuse(f"model.{option}", value)


def read_conditioning(options):
    """The fields of Config that say what the network is conditioned on."""
    text, numbers = None, []
    for conditioner in need("conditioning.configs", options):
        name, kind, settings = conditioner.get("id"), conditioner.get("type"), conditioner.get("config", {})
        for option in settings:
            if option not in CONDITIONER_OPTIONS.get(kind, set()) and settings[option]:
                refuse(f"conditioner {name}, {option}", settings[option])
        t5 = settings.get("t5_model_name", "t5-base")
        if kind == "number" and name in ("seconds_start", "seconds_total"):
            low, high = float(settings.get("min_val", 0)), float(settings.get("max_val", 1))
            if not low < high < math.inf:
                refuse(f"range of conditioner {name}", [low, high])
            numbers.append((name, settings.get("min_val", 0), settings.get("max_val", 1)))
        elif kind == "t5" and name == "prompt" and t5 in T5_WIDTHS:
            text = dict(text_model=t5, text_width=T5_WIDTHS[t5], text_tokens=settings.get("max_length", 128))
        else:
            refuse("conditioner", conditioner)
    ids = {name for name, _, _ in numbers}
    cross_ids = need("diffusion.cross_attention_cond_ids", options)
    global_ids = need("diffusion.global_cond_ids", options)
    if text is None or not set(cross_ids) <= {"prompt", *ids} or not set(global_ids) <= ids:
        refuse("cross_attention_cond_ids, global_cond_ids", [cross_ids, global_ids])
    return dict(**text, cond_width=need("conditioning.cond_dim", options), numbers=tuple(numbers),
                cross_ids=tuple(cross_ids), global_ids=tuple(global_ids))


def read_stream(training, frames):
    """What the "training" part of the config says of a stream, as fields of Config: the paper's original code
    writes it there.

    frames: of the window."""
    settings = {name.split(".")[-1]: value for name, value in flatten(training).items()
                if name.startswith(("inpainting.mask_kwargs.", "arc.self_forcing."))}
    stream = {}
    pattern = settings.get("context_router_attention_pattern")
    if pattern in ("enc-dec", "block-causal"):
        stream["causal"] = pattern == "block-causal"
    context = settings.get("fixed_mask_size") or 0
    block = settings.get("block_causal_chunk_size") or settings.get("chunk_size") or frames - context
    if context and block > 0 and context % block == 0:
        stream.update(block=block, context_blocks=context // block)
    return stream


def read_config(public):
    """The content of a model_config.json -> Config, the public objective, and what `read_stream` gives.

    Raises UserError naming what is absent or not implemented."""
    if need("model_type", public) != "diffusion_cond":
        refuse("model_type", public["model_type"])
    options = {**PUBLIC_DEFAULTS, **flatten(need("model", public))}
    check_options(options)
    latent_channels = need("io_channels", options)
    added = options.get("diffusion.config.input_add_dims") or []
    if [width for _, width in added] not in ([], [1, latent_channels]):    # the mark, then clean latents
        refuse("model.diffusion.config.input_add_dims", added)
    objective = options.get("diffusion.config.diffusion_objective", "v")
    objective = options.get("diffusion.diffusion_objective", objective)
    strides = tuple(need("pretransform.config.encoder.config.strides", options))
    frames = need("sample_size", public) // math.prod(strides)
    config = Config(
        sample_rate=need("sample_rate", public),
        audio_channels=public.get("audio_channels", 2),
        latent_channels=latent_channels,
        ae_width=need("pretransform.config.encoder.config.channels", options),
        ae_multipliers=tuple(need("pretransform.config.encoder.config.c_mults", options)),
        ae_strides=strides,
        width=need("diffusion.config.embed_dim", options),
        depth=need("diffusion.config.depth", options),
        heads=need("diffusion.config.num_heads", options),
        project_cond=options.get("diffusion.config.project_cond_tokens", True),
        qk_norm=options.get("diffusion.config.attn_kwargs.qk_norm") == "ln",
        objective=OBJECTIVES[objective],
        clip=frames,
        **read_conditioning(options))
    return config, objective, read_stream(public.get("training", {}), frames)


# -------------------------------------------------------------------------------- weight files
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_header(path):
    """The header of a safetensors file -> {name: (dtype, shape, first byte in the file)}. Raises UserError.

    The format: the header's length in 8 bytes, a JSON header, raw data."""
    complaint = not_weights(first_bytes(path))
    if complaint:
        raise UserError(f"{path} {complaint}")
    size = path.stat().st_size
    entries = {}
    try:
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8)) if start <= size else {}
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (start + int(offset) for offset in entry["data_offsets"])
            entries[name] = str(entry["dtype"]), [int(n) for n in entry["shape"]], begin, end
        end = max([start, *(end for *_, end in entries.values())])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is damaged, or no safetensors file ({reason_of(error)})") from None
    if size != end:
        raise UserError(f"{path} is {'truncated' if size < end else 'damaged'}: it has {size:,} bytes, "
                        f"by its header {end:,}; download or copy it again")
    for name, (kind, shape, begin, end) in entries.items():
        if kind not in SAFETENSORS_DTYPES:
            raise UserError(f"{path}: {name} is of type {kind}; known are {', '.join(SAFETENSORS_DTYPES)}")
        dtype = SAFETENSORS_DTYPES[kind]
        if begin < start or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path} is damaged: {name} has {end - begin} bytes for {kind} {shape}")
        entries[name] = dtype, shape, begin
    return entries


def read_safetensors(path):
    """-> {name: function that reads that tensor}. Raises UserError."""
    def read(dtype, shape, begin):
        tensor = torch.empty(shape, dtype=dtype)
        with open(path, "rb") as file:    # read, not mapped: so that no page is held twice
            file.seek(begin)
            file.readinto(tensor.view(-1).view(torch.uint8).numpy())
        return tensor
    return {name: partial(read, *entry) for name, entry in read_header(path).items()}


def read_ckpt(path):
    """-> {name: function that gives that tensor away}. Only weights are unpickled, never code. UserError."""
    saved = load_plain(path)
    weights = saved.get("state_dict") if isinstance(saved, dict) else None
    if not isinstance(weights, dict):
        raise UserError(f"{path} {without_state_dict(saved)}")
    others = [str(name) for name, weight in weights.items() if not torch.is_tensor(weight)]
    if others:
        raise UserError(f"{path}: its state_dict holds other things than tensors: {first_few(others)}")
    return {name: partial(weights.pop, name) for name in list(weights)}


def without_state_dict(saved):
    """What a file is that was unpickled and has no "state_dict", with the mend."""
    if isinstance(saved, dict) and {"config", "weights", "stage"} <= set(saved):
        return "is a checkpoint of this project already: finetune.py --init takes it as it is"
    if isinstance(saved, dict) and saved and all(torch.is_tensor(value) for value in saved.values()):
        return ("is a bare state_dict: save it as {'state_dict': ...}, as public checkpoints are, "
                f"if its names are theirs ({first_few(saved)})")
    return "holds no state_dict, thus no weights that this script knows"


def unwrap(weights):
    """The model in a training checkpoint of the public tools: `diffusion.`, its moving average beside it."""
    if not any(name.startswith("diffusion.") for name in weights):
        return weights
    # later ones win: the average is what the public tools export
    parts = {"diffusion.": "", "diffusion_ema.ema_model.": "model."}
    inner = {new + name.removeprefix(old): read for old, new in parts.items()
             for name, read in weights.items() if name.startswith(old)}
    averaged = any(name.startswith("diffusion_ema.ema_model.") for name in weights)
    say(f"training checkpoint: took {len(inner)} of its {len(weights)} tensors, "
        f"{'averaged' if averaged else 'as trained'}")
    return inner


# -------------------------------------------------------------------------------- weights
def same(x):
    return x


def flat(x):                                                # (n, 1) -> (n,)
    return x.flatten()


def stacked(q, kv):                                         # self-attention stored in two pieces
    return torch.cat([q, kv])


def without_beta(gamma, beta):
    if beta.shape != gamma.shape or beta.any():
        raise ValueError("a LayerNorm's beta must be zeros: a shift is not implemented here")
    return gamma


def fused(g, v):
    """Weight norm: g * v / |v|, the norm over all dimensions but 0, also where that is the input's."""
    if g.shape != (len(v), *[1] * (v.ndim - 1)):
        raise ValueError(f"weight_g is {tuple(g.shape)} beside a weight_v of {tuple(v.shape)}")
    return v.mul_(g / v.flatten(1).norm(dim=1).view_as(g))


M = "model.model."
T = "model.model.transformer."
OURS = r"dit\.layers\.(\d+)\."
THEIRS = T + r"layers.\1."
CONDITIONERS = "conditioner.conditioners."
PRE = "pretransform.model."
TABLE = [    # our name, the public names that it is made of, how
    (r"dit\.time_frequencies", [M + "timestep_features.weight"], flat),
    (r"dit\.time_embed\.(.*)", [M + r"to_timestep_embed.\1"], same),
    (r"dit\.global_embed\.(.*)", [M + r"to_global_embed.\1"], same),
    (r"dit\.token_embed\.(.*)", [M + r"to_cond_embed.\1"], same),
    (r"dit\.conv_in\.(.*)", [M + r"preprocess_conv.\1"], same),
    (r"dit\.conv_out\.(.*)", [M + r"postprocess_conv.\1"], same),
    (r"dit\.project_(in|out)\.(.*)", [T + r"project_\1.\2"], same),
    (r"dit\.inv_freq", [T + "rotary_pos_emb.inv_freq"], same),
    (r"dit\.context_in\.weight", [M + "to_input_add_embed.weight"], same),
    (OURS + r"self_norm\.weight", [THEIRS + "pre_norm.gamma", THEIRS + "pre_norm.beta"], without_beta),
    (OURS + r"cross_norm\.weight",
     [THEIRS + "cross_attend_norm.gamma", THEIRS + "cross_attend_norm.beta"], without_beta),
    (OURS + r"ff_norm\.weight", [THEIRS + "ff_norm.gamma", THEIRS + "ff_norm.beta"], without_beta),
    (OURS + r"(self|cross)_attention\.([qk]_norm)\.(.*)", [THEIRS + r"\2_attn.\3.\4"], same),
    (OURS + r"(self|cross)_attention\.(qkv|q|kv|out)\.(.*)", [THEIRS + r"\2_attn.to_\3.\4"], same),
    (OURS + r"self_attention\.qkv\.(.*)",
     [THEIRS + r"self_attn.to_q.\2", THEIRS + r"self_attn.to_kv.\2"], stacked),
    (OURS + r"ff\.up\.(.*)", [THEIRS + r"ff.ff.0.proj.\2"], same),
    (OURS + r"ff\.down\.(.*)", [THEIRS + r"ff.ff.2.\2"], same),
    (r"conditioner\.proj_out\.(.*)", [CONDITIONERS + r"prompt.proj_out.\1"], same),
    (r"conditioner\.numbers\.(\w+)\.frequencies", [CONDITIONERS + r"\1.embedder.embedding.0.weights"], same),
    (r"conditioner\.numbers\.(\w+)\.linear\.(.*)", [CONDITIONERS + r"\1.embedder.embedding.1.\2"], same),
    (r"autoencoder\.(.*)\.weight", [PRE + r"\1.weight_g", PRE + r"\1.weight_v"], fused),
    (r"autoencoder\.(.*)\.weight", [PRE + r"\1.weight"], same),    # fused before it was saved
    (r"autoencoder\.(.*)\.(bias|alpha|beta)", [PRE + r"\1.\2"], same),
]


def nested(name, levels):
    """Our flat place in the autoencoder -> the public one: a layer, then per level a block of five, then two
    layers."""
    m = re.fullmatch(r"autoencoder\.(\w+)\.(\d+)\.(.*)", name)
    if not m:
        return name
    i = int(m[2])
    if i == 0:
        place = "0"
    elif i <= 5 * levels:
        level, layer = divmod(i - 1, 5)
        place = f"{level + 1}.layers.{layer}"
    else:
        place = f"{i - 4 * levels}"
    return f"autoencoder.{m[1]}.layers.{place}.{m[3]}"


def source(name, levels, weights):
    """Our tensor -> the public names that it is made of, and how: the first row of TABLE whose names all
    exist."""
    rows = []
    for ours, theirs, how in TABLE:
        m = re.fullmatch(ours, nested(name, levels))
        if m:
            rows.append(([m.expand(t) for t in theirs], how))
    return next((row for row in rows if set(row[0]) <= set(weights)), rows[0])


def fill(model, weights, path):
    """Give a model on the meta device its weights, one tensor at a time. Returns whether `context_in` was
    among them.

    Raises UserError unless every tensor of the file is used, every one of ours filled, and all shapes
    agree."""
    wanted = model.state_dict()
    plan = {name: source(name, len(model.config.ae_strides), weights) for name in wanted}
    if not set(plan["dit.context_in.weight"][0]) <= set(weights):
        del plan["dit.context_in.weight"]                   # public weights have none
    used = {key for keys, _ in plan.values() for key in keys}
    problems = [f"{len(names)} {what}: {first_few(names)}" for what, names in
                (("missing", used - set(weights)), ("not understood", set(weights) - used)) if names]
    if problems:
        raise UserError(f"{path} does not hold the network that its model_config.json describes; "
                        f"tensors {'; '.join(problems)}")
    tensors, wrong = {}, []
    for name, (keys, how) in plan.items():
        parts = [weights.pop(key)() for key in keys]
        try:
            if not all(is_floats(part) for part in parts):
                raise ValueError("not all finite floats")
            tensor = how(*(part.float() for part in parts)).contiguous()
            if tensor.shape != wanted[name].shape:
                raise ValueError(f"{tuple(tensor.shape)} where {tuple(wanted[name].shape)} is expected")
            tensors[name] = tensor
        except (ValueError, RuntimeError) as error:
            wrong.append(f"{' + '.join(keys)}: {error}")
    if wrong:
        more = " ..." if len(wrong) > 3 else ""
        raise UserError(f"{path}: {len(wrong)} of the wrong shape or content: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(tensors, strict=False, assign=True)
    say(f"matched {len(used)} of {len(used)}")
    return "dit.context_in.weight" in plan


def find_files(path):
    """The weights and the model_config.json that a folder or a file names. Raises UserError."""
    path = Path(path)
    found = [p for p in (path / "model.safetensors", path / "model.ckpt", path) if p.is_file()]
    if not found:
        if not path.is_dir():
            raise UserError(f"no file or folder {path}")
        others = [p.name for p in path.glob("model*") if p.name != "model_config.json"]
        raise UserError(f"{path} holds no model.safetensors or model.ckpt"
                        + f", only {first_few(others)}: has the download finished?" * bool(others))
    weights = found[0]
    names = f"{weights.stem}_config.json", "model_config.json"
    configs = [weights.with_name(name) for name in names if weights.with_name(name).is_file()]
    if not configs:
        raise UserError(f"no model_config.json beside {weights}: it comes with the weights and holds the "
                        "network's sizes")
    return weights, configs[0]


def empty_model(path, overrides):
    """model_config.json and overrides -> LMDM without weights, the public objective, and the fields of a
    stream that the file names. Raises UserError."""
    try:
        public = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = not_weights(first_bytes(path)) or f"is not readable: {reason_of(error)}"
        raise UserError(f"{path} {reason.replace('not weights', 'not a model_config.json')}") from None
    try:
        config, objective, stream = read_config(public)
        config = replace(config, **{**stream, **overrides})
        check_sizes(config)
        with torch.device("meta"):    # shapes only: no memory, no time spent on random weights
            return LMDM(config, "base"), objective, stream
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{path} describes no network that can be built here ({error})") from None


def load_stable_audio(path, **overrides):
    """Read public weights -> model.LMDM in eval mode, float32, CPU.

    path: a folder with model_config.json and model.safetensors or model.ckpt, or one such file (for x.ckpt
    the config may be called x_config.json). overrides: fields of Config, such as block=12, context_blocks=4,
    causal=True. Raises UserError for anything missing, damaged, unknown or not implemented. Source: the
    public checkpoints."""
    file, config_file = find_files(path)
    model, objective, stream = empty_model(config_file, overrides)
    safe = file.suffix == ".safetensors" or is_safetensors(first_bytes(file))
    weights = read_safetensors(file) if safe else read_ckpt(file)
    if fill(model, unwrap(weights), file):
        model.stage = "arc" if objective.endswith("denoiser") else "finetune"
        if "causal" not in {**stream, **overrides}:
            say(f"made for blocks, but not saying how: taken as {regime_of(model.config)}; "
                "name it with --causal or --no-causal")
    else:
        model.sampling = BASE_SAMPLING.get(objective, {})
        model.dit.context_in.weight = nn.Parameter(torch.empty(model.dit.context_in.weight.shape))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)                            # the same file twice: the same model twice
            model.dit.reset_context_in()
        say("new: dit.context_in.weight, nothing else (public weights have no context path; "
            "finetuning teaches it)")
    return model.eval()


# -------------------------------------------------------------------------------- text
def save_prompts(model, prompts, path):
    """Encode prompts once and write them, so that a machine without `transformers` can stream.

    Returns (n, L, cond_width)."""
    with torch.no_grad():
        embeddings = model.conditioner.embed_text(prompts)
    content = {"prompts": list(prompts), "embeddings": embeddings, "text_model": str(model.config.text_model)}
    save_whole(content, path)
    return embeddings


def load_prompts(path):
    """What `save_prompts` wrote -> list of n prompts, embeddings (n, L, cond_width). Raises UserError."""
    try:
        saved = load_plain(path, own=True)
        prompts, embeddings = saved["prompts"], saved["embeddings"]
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError("it holds no list of prompts")
        if not is_floats(embeddings) or embeddings.ndim != 3 or len(embeddings) != len(prompts):
            raise ValueError("one embedding per prompt is expected, of finite floats")
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a file of encoded prompts ({error}); "
                        "stable_audio_port.py --prompts makes one") from None
    return prompts, embeddings


# -------------------------------------------------------------------------------- command line
def parse(argv=None):
    p = argparse.ArgumentParser(description="Convert public Stable Audio weights.", allow_abbrev=False)
    p.add_argument("path", help="folder with model_config.json and model.safetensors or model.ckpt, "
                   "or one of those files")
    p.add_argument("--out", help="where to write the checkpoint, e.g. out/sao_small.pt (default: nowhere)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                   help="of the matrices in it")
    # the stream: how the model will be finetuned, or was
    p.add_argument("--causal", action=argparse.BooleanOptionalAction,
                   help="block-causal (default), or encoder-decoder")
    p.add_argument("--block", type=whole, help="frames made at once (default: 48)")
    p.add_argument("--context-blocks", type=whole, help="finished blocks that a new one sees (default: 4)")
    # text
    p.add_argument("--text-model", help="folder of the T5 encoder (default: the name in model_config.json)")
    p.add_argument("--prompts", nargs="+", help="encode these now, so that streaming them needs no T5")
    p.add_argument("--prompts-out", default="out/prompts.pt",
                   help="where to write them (default: out/prompts.pt)")
    return p.parse_args(argv)


def count_parameters(part):
    return sum(p.numel() for p in part.parameters())


def count_scales(part):
    """Weight norm's scales, which public checkpoints hold beside each convolution's weight."""
    return sum(len(m.weight) for m in part.modules() if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d)))


def parameters(model):
    """Parameters per part as the public checkpoints hold them, {part: number}; `context_in` apart."""
    new = count_parameters(model.dit.context_in)
    coder = model.autoencoder
    return {"DiT": count_parameters(model.dit) - new,
            "context_in": new,
            "encoder": count_parameters(coder.encoder) + count_scales(coder.encoder),
            "decoder": count_parameters(coder.decoder) + count_scales(coder.decoder),
            "conditioner": count_parameters(model.conditioner)}


def report(model):
    """Lines that say what a model is: objective, sample rate, conditioning, parameters per part, stream."""
    c = model.config
    objective = "rectified flow" if c.objective == "rectified_flow" else "v"
    numbers = ", ".join(f"{name} {low:g}-{high:g}" for name, low, high in c.numbers)
    return [f"{model.stage}: {objective} objective, {c.sample_rate} Hz, {c.audio_channels} channels, "
            f"clips of {c.clip} frames = {c.clip / c.frame_rate:.1f} s",
            f"conditioning: prompt ({c.text_model}, {c.text_tokens} tokens), {numbers}",
            "parameters: " + ", ".join(f"{part} {n:,}" for part, n in parameters(model).items()),
            f"stream: {regime_of(c)}, blocks of {c.block} frames after {c.context_blocks} blocks of context, "
            f"window {c.window} frames = {c.window / c.frame_rate:.2f} s"]


def check_outputs(args):
    """UserError where an output cannot be written, or would be written over what is read or the other one."""
    outputs = {"--out": args.out, "--prompts-out": args.prompts_out if args.prompts else None}
    outputs = {option: writable(path) for option, path in outputs.items() if path}
    for option, path in outputs.items():
        for source in find_files(args.path):
            keep_inputs(path, {"the public": source})
        if list(outputs.values()).count(path) > 1:
            raise UserError("--out and --prompts-out name the same file")


def main():
    args = parse()
    check_outputs(args)
    overrides = dict(causal=args.causal, block=args.block, context_blocks=args.context_blocks,
                     text_model=args.text_model)
    model = load_stable_audio(args.path, **{k: v for k, v in overrides.items() if v is not None})
    for line in report(model):
        say(line)
    if args.prompts:
        embeddings = save_prompts(model, args.prompts, args.prompts_out)
        say(f"{len(args.prompts)} prompts, {tuple(embeddings.shape)} -> {args.prompts_out}")
    if args.out:
        dtype = getattr(torch, args.dtype)
        for p in model.parameters():    # in place: a second copy would double the memory
            p.data = p.data.to(dtype) if p.ndim > 1 else p.data     # vectors (norms, biases) stay exact
        save(model, args.out, made=f"stable_audio_port.py from {Path(args.path).name}")
        say(f"{args.dtype}, {os.path.getsize(args.out) / 2 ** 20:.0f} MiB -> {args.out}")


if __name__ == "__main__":
    run(main)
