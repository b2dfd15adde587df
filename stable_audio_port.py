"""Read public Stable Audio weights into model.py: Open 1.0, Open Small, and checkpoints of the paper's original code.

    python stable_audio_port.py path/to/stable-audio-open-small --out out/sao_small.pt

A public checkpoint is `model_config.json` and, beside it, `model.safetensors` or `model.ckpt`. The config becomes a
`Config`; an option in it that we do not implement is refused by name. Every tensor goes through TABLE, strictly both
ways. Text needs T5, thus `transformers`: only here, only when a prompt is encoded, and `--prompts` does that ahead.
"""
import argparse
import json
import math
import os
import pickle
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common import UserError, run, save, save_whole, whole
from model import LMDM, Config


def say(text):
    print(text, file=sys.stderr)


def first_few(names):
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -------------------------------------------------------------------------------- model_config.json
# The public name of what the network predicts -> ours. The "denoiser" ones are the same networks after adversarial
# post-training, meant for few-step ping-pong sampling.
OBJECTIVES = {"v": "v", "v_denoiser": "v", "rectified_flow": "rectified_flow", "rf_denoiser": "rectified_flow"}
# How they are played until finetuned; the "denoiser" ones as every base model.
BASE_SAMPLING = {"v": dict(sampler="euler", steps=100, cfg=7.0), "rectified_flow": dict(sampler="euler", steps=50, cfg=7.0)}
T5_WIDTHS = {f"{family}-{size}": width for family in ("t5", "google/flan-t5")
             for size, width in (("small", 512), ("base", 768), ("large", 1024))}
ANY = None
AE = r"pretransform\.config\."
OPTIONS = [                                                 # everything under "model", and the values that we implement
    # read into Config below, or proved by the shapes of the weights
    (r"io_channels|conditioning\.(cond_dim|configs)|diffusion\.(cross_attention|global)_cond_ids", ANY),
    (AE + r"(latent_dim|downsampling_ratio|io_channels)", ANY),
    (AE + r"(en|de)coder\.config\.(in_channels|out_channels|channels|c_mults|strides|latent_dim)", ANY),
    (r"diffusion\.config\.(io_channels|embed_dim|depth|num_heads|cond_token_dim|global_cond_dim|project_cond_tokens)", ANY),
    # what makes the network this network
    (r"pretransform\.type", ["autoencoder"]), (r"pretransform\.scale", [1]),
    (AE + r"(en|de)coder\.type", ["oobleck"]), (AE + r"bottleneck\.type", ["vae"]),
    (AE + r"(en|de)coder\.config\.use_snake", [True]), (AE + r"decoder\.config\.final_tanh", [False]),
    (r"diffusion\.type", ["dit"]), (r"diffusion\.diffusion_objective", list(OBJECTIVES)),
    (r"diffusion\.config\.diffusion_objective", list(OBJECTIVES)),
    (r"diffusion\.config\.transformer_type", ["continuous_transformer"]),
    (r"diffusion\.config\.global_cond_type", ["prepend"]), (r"diffusion\.config\.timestep_cond_type", ["global"]),
    (r"diffusion\.config\.(project_global_cond|rotary_pos_emb)", [True]), (r"diffusion\.config\.patch_size", [1]),
    (r"diffusion\.config\.attn_kwargs\.qk_norm", ["ln", "none"]),
    # of the paper's original code: how it feeds the context and orders the tokens, which `causal` and TABLE settle here
    (r"diffusion\.input_add_ids|diffusion\.config\.(input_add_dims|postpend|split_qkv)", ANY),
    # only for training and speed
    (r"pretransform\.(iterate_batch|model_half|enable_grad)|" + AE + r"(en|de)coder\.requires_grad", ANY),
    (r"diffusion\.(sampling_)?distribution_shift_options\..*|diffusion\.config\.zero_init_branch_outputs", ANY),
]
# public defaults that differ from what we implement: leaving the option out means these
UNSAID = {"pretransform.config.encoder.config.use_snake": False, "pretransform.config.decoder.config.use_snake": False,
          "pretransform.config.decoder.config.final_tanh": True}


def flatten(tree, path=""):
    """Nested dictionaries -> {dotted path: value}; lists are values."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {p: v for k, branch in tree.items() for p, v in flatten(branch, f"{path}.{k}" if path else k).items()}


def read_stream(training, frames):
    """The "training" part of the config of a model that the paper's original code made -> the fields of Config that it tells.

    frames: of the window."""
    told = {name.split(".")[-1]: value for name, value in flatten(training).items()
            if name.startswith(("inpainting.mask_kwargs.", "arc.self_forcing."))}
    stream, context = {}, told.get("fixed_mask_size") or 0
    if (pattern := told.get("context_router_attention_pattern")) in ("enc-dec", "block-causal"):
        stream["causal"] = pattern == "block-causal"
    block = told.get("block_causal_chunk_size") or told.get("chunk_size") or frames - context
    if context and block > 0 and context % block == 0:
        stream.update(block=block, context_blocks=context // block)
    return stream


def read_config(path):
    """model_config.json -> Config, the public objective, and what it says of a stream (`read_stream`).

    Raises UserError naming what is absent or not implemented."""
    try:
        public = json.loads(path.read_text())
        options = {**UNSAID, **flatten(public["model"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a readable model_config.json ({type(error).__name__}: {error})") from None

    def refuse(option, value):
        raise UserError(f"{path}: {option} = {json.dumps(value)} is not implemented here")

    def need(option, tree=options):
        if option not in tree:
            raise UserError(f"{path} lacks {option}")
        return tree[option]

    if need("model_type", public) != "diffusion_cond":
        refuse("model_type", public["model_type"])
    for option, value in options.items():
        accepted = next((a for pattern, a in OPTIONS if re.fullmatch(pattern, option)), [])
        if accepted is not ANY and value not in accepted and (accepted or value):   # unknown but empty or false: off
            refuse(f"model.{option}", value)

    text, numbers = None, []
    for conditioner in need("conditioning.configs"):
        name, kind, c = conditioner.get("id"), conditioner.get("type"), conditioner.get("config", {})
        known = {"t5": {"t5_model_name", "max_length"}, "number": {"min_val", "max_val"}}.get(kind, set())
        for option in c:
            if option not in known and c[option]:
                refuse(f"conditioner {name}, {option}", c[option])
        if kind == "number" and name in ("seconds_start", "seconds_total"):
            numbers.append((name, c.get("min_val", 0), c.get("max_val", 1)))
        elif kind == "t5" and name == "prompt" and c.get("t5_model_name", "t5-base") in T5_WIDTHS:
            text = c.get("t5_model_name", "t5-base"), c.get("max_length", 128)
        else:
            refuse("conditioner", conditioner)
    ids = [name for name, _, _ in numbers]
    cross_ids, global_ids = need("diffusion.cross_attention_cond_ids"), need("diffusion.global_cond_ids")
    if text is None or not set(cross_ids) <= {"prompt", *ids} or not set(global_ids) <= set(ids):
        refuse("cross_attention_cond_ids, global_cond_ids", [cross_ids, global_ids])

    latent_channels, strides = need("io_channels"), need("pretransform.config.encoder.config.strides")
    inputs = [width for _, width in options.get("diffusion.config.input_add_dims") or []]
    if inputs not in ([], [1, latent_channels]):            # the mark first, then the clean latents
        refuse("model.diffusion.config.input_add_dims", options["diffusion.config.input_add_dims"])
    objective = options.get("diffusion.diffusion_objective", options.get("diffusion.config.diffusion_objective", "v"))
    return Config(
        sample_rate=need("sample_rate", public), audio_channels=public.get("audio_channels", 2),
        latent_channels=latent_channels, ae_width=need("pretransform.config.encoder.config.channels"),
        ae_multipliers=tuple(need("pretransform.config.encoder.config.c_mults")), ae_strides=tuple(strides),
        text_model=text[0], text_tokens=text[1], text_width=T5_WIDTHS[text[0]], cond_width=need("conditioning.cond_dim"),
        numbers=tuple(numbers), cross_ids=tuple(cross_ids), global_ids=tuple(global_ids),
        width=need("diffusion.config.embed_dim"), depth=need("diffusion.config.depth"),
        heads=need("diffusion.config.num_heads"), project_cond=options.get("diffusion.config.project_cond_tokens", True),
        qk_norm=options.get("diffusion.config.attn_kwargs.qk_norm") == "ln", objective=OBJECTIVES[objective],
        clip=(frames := need("sample_size", public) // math.prod(strides))), objective, read_stream(public.get("training", {}), frames)


# -------------------------------------------------------------------------------- weight files
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path):
    """-> {name: function that reads that tensor}. The format: the header's length in 8 bytes, a JSON header, raw data."""
    try:
        with open(path, "rb") as file:
            start, size = 8 + int.from_bytes(file.read(8), "little"), path.stat().st_size
            header = json.loads(file.read(start - 8)) if start <= size else {}
        entries = {k: (SAFETENSORS_DTYPES[v["dtype"]], v["shape"], *v["data_offsets"])
                   for k, v in header.items() if k != "__metadata__"}
        if start + max(end for *_, end in entries.values()) != size:
            raise ValueError("its length is not what its header says")
        for name, (dtype, shape, begin, end) in entries.items():
            if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} does not fit its place")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from None

    def read(dtype, shape, begin, end):
        tensor = torch.empty(shape, dtype=dtype)
        with open(path, "rb") as file:                      # read, not mapped: so that no page is held twice
            file.seek(start + begin)
            file.readinto(tensor.view(-1).view(torch.uint8).numpy())
        return tensor
    return {name: partial(read, *entry) for name, entry in entries.items()}


def read_ckpt(path):
    """-> {name: function that gives that tensor away}. Only weights are unpickled, never code."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        weights = saved["state_dict"]
        if not all(torch.is_tensor(w) for w in weights.values()):
            raise TypeError("state_dict holds more than tensors")
    except Exception as error:                              # torch.load raises a dozen types for a damaged file
        wanted = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if wanted:
            raise UserError(f"{path} is a pickle that wants to run code ({wanted[1]}), not only weights: refused. Save "
                            "{'state_dict': ...} alone, or unwrap it with the tools that made it") from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path} is truncated or not a checkpoint with a state_dict ({reason})") from None
    return {name: partial(weights.pop, name) for name in list(weights)}


def unwrap(weights):
    """The model inside a training checkpoint of the public tools: under `diffusion.`, its moving average beside it."""
    if not any(name.startswith("diffusion.") for name in weights):
        return weights
    parts = {"diffusion.": "", "diffusion_ema.ema_model.": "model."}    # later ones win: the average is what they export
    inner = {new + name.removeprefix(old): read for old, new in parts.items()
             for name, read in weights.items() if name.startswith(old)}
    say(f"training checkpoint: took {len(inner)} of its {len(weights)} tensors, "
        f"{'averaged' if any(name.startswith('diffusion_ema.ema_model.') for name in weights) else 'as trained'}")
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
    """Weight norm: g * v / |v|, the norm over every dimension but 0, also where 0 is the input (transposed)."""
    if g.shape != (len(v), *[1] * (v.ndim - 1)):
        raise ValueError(f"weight_g is {tuple(g.shape)} beside a weight_v of {tuple(v.shape)}")
    return v.mul_(g / v.flatten(1).norm(dim=1).view_as(g))


M, T = "model.model.", "model.model.transformer."
OURS, THEIRS = r"dit\.layers\.(\d+)\.", T + r"layers.\1."
CONDITIONERS, PRE = "conditioner.conditioners.", "pretransform.model."
TABLE = [                                                   # our name, the public names that it is made of, how
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
    (OURS + r"cross_norm\.weight", [THEIRS + "cross_attend_norm.gamma", THEIRS + "cross_attend_norm.beta"], without_beta),
    (OURS + r"ff_norm\.weight", [THEIRS + "ff_norm.gamma", THEIRS + "ff_norm.beta"], without_beta),
    (OURS + r"(self|cross)_attention\.([qk]_norm)\.(.*)", [THEIRS + r"\2_attn.\3.\4"], same),
    (OURS + r"(self|cross)_attention\.(qkv|q|kv|out)\.(.*)", [THEIRS + r"\2_attn.to_\3.\4"], same),
    (OURS + r"self_attention\.qkv\.(.*)", [THEIRS + r"self_attn.to_q.\2", THEIRS + r"self_attn.to_kv.\2"], stacked),
    (OURS + r"ff\.up\.(.*)", [THEIRS + r"ff.ff.0.proj.\2"], same),
    (OURS + r"ff\.down\.(.*)", [THEIRS + r"ff.ff.2.\2"], same),
    (r"conditioner\.proj_out\.(.*)", [CONDITIONERS + r"prompt.proj_out.\1"], same),
    (r"conditioner\.numbers\.(\w+)\.frequencies", [CONDITIONERS + r"\1.embedder.embedding.0.weights"], same),
    (r"conditioner\.numbers\.(\w+)\.linear\.(.*)", [CONDITIONERS + r"\1.embedder.embedding.1.\2"], same),
    (r"autoencoder\.(.*)\.weight", [PRE + r"\1.weight_g", PRE + r"\1.weight_v"], fused),
    (r"autoencoder\.(.*)\.weight", [PRE + r"\1.weight"], same),   # fused before it was saved
    (r"autoencoder\.(.*)\.(bias|alpha|beta)", [PRE + r"\1.\2"], same),
]


def nested(name, levels):
    """Our flat place in the autoencoder -> the public one: one layer, then per level a block of five, then two layers."""
    if not (m := re.fullmatch(r"autoencoder\.(\w+)\.(\d+)\.(.*)", name)):
        return name
    i, inside = int(m[2]), divmod(int(m[2]) - 1, 5)
    place = "0" if i == 0 else f"{inside[0] + 1}.layers.{inside[1]}" if i <= 5 * levels else f"{i - 4 * levels}"
    return f"autoencoder.{m[1]}.layers.{place}.{m[3]}"


def source(name, levels, weights):
    """Our tensor -> the public names that it is made of, and how: the first row of TABLE that the file can serve."""
    matches = [(re.fullmatch(ours, nested(name, levels)), theirs, how) for ours, theirs, how in TABLE]
    rows = [([m.expand(t) for t in theirs], how) for m, theirs, how in matches if m]
    return next((row for row in rows if set(row[0]) <= set(weights)), rows[0])


def fill(model, weights, path):
    """Give a model on the meta device its weights, one tensor at a time. Returns whether `context_in` was among them.

    Raises UserError unless every tensor of the file is used, every one of ours is filled and all shapes agree."""
    wanted = model.state_dict()
    plan = {name: source(name, len(model.config.ae_strides), weights) for name in wanted}
    if not set(plan["dit.context_in.weight"][0]) <= set(weights):
        del plan["dit.context_in.weight"]                   # public weights have none
    used = {key for keys, _ in plan.values() for key in keys}
    problems = [f"{len(names)} {what}: {first_few(names)}" for what, names in
                (("missing", used - set(weights)), ("not understood", set(weights) - used)) if names]
    if problems:
        raise UserError(f"{path} does not hold the network that its model_config.json describes; tensors {'; '.join(problems)}")
    tensors, wrong = {}, []
    for name, (keys, how) in plan.items():
        parts = [weights.pop(key)().float() for key in keys]
        try:
            tensors[name] = how(*parts).contiguous()
            if tensors[name].shape != wanted[name].shape:
                raise ValueError(f"{tuple(tensors[name].shape)} where {tuple(wanted[name].shape)} is expected")
        except (ValueError, RuntimeError) as error:
            wrong.append(f"{' + '.join(keys)}: {error}")
    if wrong:
        raise UserError(f"{path}: {len(wrong)} of the wrong shape or content: {'; '.join(wrong[:3])}{' ...' * (len(wrong) > 3)}")
    model.load_state_dict(tensors, strict=False, assign=True)
    say(f"matched {len(used)} of {len(used)}")
    return "dit.context_in.weight" in plan


def load_stable_audio(path, **overrides):
    """Read public weights -> model.LMDM in eval mode, float32, CPU.

    path: a folder with model_config.json and model.safetensors or model.ckpt, or one such file (for x.ckpt the config
    may be called x_config.json). overrides: fields of Config, such as block=12, context_blocks=4, causal=True.
    Raises UserError for anything missing, damaged, unknown or not implemented. Source: the public checkpoints."""
    path = Path(path)
    found = [p for p in (path / "model.safetensors", path / "model.ckpt", path) if p.is_file()]
    if not found:
        raise UserError(f"{path} holds no model.safetensors or model.ckpt" if path.is_dir() else f"no file or folder {path}")
    path = found[0]
    beside = [p for p in (path.with_name(f"{path.stem}_config.json"), path.with_name("model_config.json")) if p.is_file()]
    if not beside:
        raise UserError(f"no model_config.json beside {path}: it comes with the weights and holds the network's sizes")
    try:
        config, objective, told = read_config(beside[0])
        with torch.device("meta"):                          # shapes only: no memory, no time spent on random weights
            model = LMDM(replace(config, **{**told, **overrides}), "base")
    except (TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{beside[0]} describes no network that can be built here ({error})") from None
    weights = unwrap((read_safetensors if path.suffix == ".safetensors" else read_ckpt)(path))
    if fill(model, weights, path):
        model.stage = "arc" if objective.endswith("denoiser") else "finetune"
        if "causal" not in {**told, **overrides}:
            say(f"made for blocks, but not saying how: taken as {regime(model.config)}; name it with --causal or --no-causal")
    else:
        model.sampling = BASE_SAMPLING.get(objective, {})
        model.dit.context_in.weight = nn.Parameter(torch.empty(model.dit.context_in.weight.shape))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)                            # the same file twice: the same model twice
            model.dit.reset_context_in()
        say("new: dit.context_in.weight, nothing else (public weights have no context path; finetuning teaches it)")
    return model.eval()


def regime(config):
    return "block-causal" if config.causal else "encoder-decoder"


# -------------------------------------------------------------------------------- text
def save_prompts(model, prompts, path):
    """Encode prompts once and write them, so that a machine without `transformers` can stream. Returns (n, L, cond_width)."""
    with torch.no_grad():
        embeddings = model.conditioner.embed_text(prompts)
    save_whole({"prompts": list(prompts), "embeddings": embeddings, "text_model": str(model.config.text_model)}, path)
    return embeddings


def load_prompts(path):
    """What `save_prompts` wrote -> list of n prompts, embeddings (n, L, cond_width). Raises UserError."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        prompts, embeddings = saved["prompts"], saved["embeddings"]
        if not prompts or embeddings.ndim != 3 or len(embeddings) != len(prompts):
            raise ValueError("one embedding per prompt is expected")
    except Exception as error:                              # as in read_ckpt
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path} is not a file of encoded prompts ({reason}); stable_audio_port.py --prompts makes one") from None
    return prompts, embeddings


# -------------------------------------------------------------------------------- command line
def parse(argv=None):
    p = argparse.ArgumentParser(description="Convert public Stable Audio weights.", allow_abbrev=False)
    p.add_argument("path", help="folder with model_config.json and model.safetensors or model.ckpt, or one of those files")
    p.add_argument("--out", help="where to write the checkpoint, e.g. out/sao_small.pt (without it: only report)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the matrices in it")
    # the stream: how the model will be finetuned, or was
    p.add_argument("--causal", action=argparse.BooleanOptionalAction, help="block-causal (default), or encoder-decoder")
    p.add_argument("--block", type=whole, help="frames made at once (default: 48)")
    p.add_argument("--context-blocks", type=whole, help="finished blocks that a new one sees (default: 4)")
    # text
    p.add_argument("--text-model", help="folder of the T5 encoder (default: the name in model_config.json)")
    p.add_argument("--prompts", nargs="+", help="encode these now, so that streaming them needs no T5")
    p.add_argument("--prompts-out", default="out/prompts.pt", help="where to write them (default: out/prompts.pt)")
    return p.parse_args(argv)


def parameters(model):
    """Parameters per part as the public checkpoints hold them: weight norm's scales included, `context_in` apart."""
    count = lambda part: sum(p.numel() for p in part.parameters())
    scales = lambda part: sum(len(m.weight) for m in part.modules() if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d)))
    new, coder = count(model.dit.context_in), model.autoencoder
    return {"DiT": count(model.dit) - new, "context_in": new, "encoder": count(coder.encoder) + scales(coder.encoder),
            "decoder": count(coder.decoder) + scales(coder.decoder), "conditioner": count(model.conditioner)}


def report(model):
    """Lines that say what a model is: objective, sample rate, conditioning, parameters per part, the stream's geometry."""
    c = model.config
    numbers = ", ".join(f"{name} {low:g}-{high:g}" for name, low, high in c.numbers)
    return [f"{model.stage}: {'rectified flow' if c.objective == 'rectified_flow' else 'v'} objective, {c.sample_rate} Hz, "
            f"{c.audio_channels} channels, clips of {c.clip} frames = {c.clip / c.frame_rate:.1f} s",
            f"conditioning: prompt ({c.text_model}, {c.text_tokens} tokens), {numbers}",
            "parameters: " + ", ".join(f"{part} {n:,}" for part, n in parameters(model).items()),
            f"stream: {regime(c)}, blocks of {c.block} frames after {c.context_blocks} blocks of context, "
            f"window {c.window} frames = {c.window / c.frame_rate:.2f} s"]


def main():
    args = parse()
    names = "causal", "block", "context_blocks", "text_model"
    model = load_stable_audio(args.path, **{k: getattr(args, k) for k in names if getattr(args, k) is not None})
    for line in report(model):
        say(line)
    if args.prompts:
        embeddings = save_prompts(model, args.prompts, args.prompts_out)
        say(f"{len(args.prompts)} prompts, {tuple(embeddings.shape)} -> {args.prompts_out}")
    if args.out:
        dtype = getattr(torch, args.dtype)
        for p in model.parameters():                        # in place: a second copy would double the memory
            p.data = p.data.to(dtype) if p.ndim > 1 else p.data     # vectors (norms, biases, frequencies) stay exact
        save(model, args.out, made=f"stable_audio_port.py from {Path(args.path).name}")
        say(f"{args.dtype}, {os.path.getsize(args.out) / 2 ** 20:.0f} MiB -> {args.out}")


if __name__ == "__main__":
    run(main)
