"""What `sample.py` can be asked on the command line, and which questions do not go together."""
import argparse
import math
import os
import sys

import torch

from common import (PRECISIONS, UserError, finite, fraction, needs_speed, not_negative, positive,
                    positive_finite, random_seed, step_count, tempo, thread_count, whole,
                    whole_or_zero)
from controls import GIVES, takes_tempo

SAMPLERS = "euler", "dpmpp", "pingpong"


def add_stage_options(p):
    """What a performer plays with besides the prompt."""
    p.add_argument("--osc", type=whole, metavar="PORT", help="take the same lines as OSC messages over UDP")
    p.add_argument("--osc-beats", metavar="HOST:PORT", help="send /beat there as OSC when a beat is heard")
    p.add_argument("--forget", type=whole_or_zero, help="blocks of the past to drop when the prompt changes "
                   "(default: all of the context; in a morph, or with --listen, all but one)")
    p.add_argument("--no-transitions", action="store_true", help="when the prompt changes, neither read the "
                   "past again nor drop any, and sample as ever")
    p.add_argument("--chords", help="such as 'Am F C G', a bar each, with --bpm (for models with channels of "
                   "pitch)")
    p.add_argument("--sketch", help="audio file, or - for a WAV on standard input, whose pitch and loudness "
                   "are played (for models with such channels)")
    p.add_argument("--sketch-what", choices=GIVES, default="both")
    p.add_argument("--sketch-until", type=fraction, default=0.0,
                   help="noise level down to which it is given: 0 strictly, towards 1 more freely")
    p.add_argument("--listen", help="audio file, or - for a WAV on standard input, which the model answers")
    p.add_argument("--delay", type=positive_finite,
                   help="seconds by which the answer follows what it answers (default: a block)")
    p.add_argument("--mix", type=not_negative, default=0.0,
                   help="how loud what is heard is mixed in, 1 as it is")


def parse(argv=None):
    p = argparse.ArgumentParser(description="Stream music, block by block, as a WAV on standard output.",
                                allow_abbrev=False)
    p.add_argument("--ckpt", help="checkpoint (default: out/arc.pt, else out/finetune.pt, else nano.pt)")
    # what to play
    p.add_argument("--prompt", help="what to play, such as 'slow piano' or 'house:0.7 + reggae:0.3' "
                   "(default: the checkpoint's own example)")
    p.add_argument("--prompt-file", help="embeddings written by stable_audio_port.py --prompts; "
                   "the first, or the one --prompt names")
    p.add_argument("--seconds", type=positive,
                   help="length (default: 30, or a whole clip if that is shorter; with --live inf); "
                   "inf plays until stopped")
    p.add_argument("--prime", help="audio file to go on from")
    p.add_argument("--bpm", type=tempo,
                   help="beats a minute to keep to, four to a bar (for models that can be told)")
    p.add_argument("--at", nargs=2, action="append", default=[], metavar=("TIME", "LINE"),
                   help="a prompt or /command at this time of the stream, 20 or 1:05; may be repeated")
    p.add_argument("--schedule", help="a file of lines '@TIME prompt or /command'")
    p.add_argument("--live", action="store_true",
                   help="each line typed while a player plays, a prompt or a /command, holds from the next "
                   "block on (not on Windows)")
    add_stage_options(p)
    # where to, and how far ahead
    p.add_argument("--out", help=".wav or .flac instead of standard output")
    p.add_argument("--realtime", nargs="?", type=positive_finite, const=1.0, metavar="LEAD",
                   help="hand audio out at most so many seconds before it is heard (LEAD: 1)")
    p.add_argument("--save-state", help="file to write at the end, or at Ctrl-C, from which ...")
    p.add_argument("--resume-state", help="... a stream goes on to the sample, --seconds more, with "
                   "the settings and the seed that it had")
    # sampling
    p.add_argument("--seed", type=random_seed, default=0)
    p.add_argument("--steps", type=step_count, help="denoising steps per block (default: the checkpoint's)")
    p.add_argument("--cfg", type=finite, help="guidance, 1 for none (default: the checkpoint's)")
    p.add_argument("--sampler", choices=SAMPLERS, help="(default: the checkpoint's)")
    p.add_argument("--no-cache", action="store_true",
                   help="recompute the whole context at every step: slow, the same music but "
                   "for rounding (in int8 that makes another tune)")
    # machine
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=PRECISIONS, default="auto",
                   help="auto: int8 where CPU and checkpoint suit it, else bf16 where it is faster")
    p.add_argument("--threads", type=thread_count, help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--compile", action="store_true",
                   help="compile part of the decoder, 20 s more before the first block, then "
                   "faster; on a GPU also the transformer, a minute")
    return p.parse_args(argv)


def longest_clip(config):
    """Seconds that the public model makes at once."""
    return config.clip * config.hop / config.sample_rate


def default_seconds(model, live):
    """Without --seconds: live for ever, a clip no longer than it can be."""
    if live:
        return math.inf
    return min(30, longest_clip(model.config)) if model.stage == "base" else 30


def check(model, args):
    """UserError for what the arguments ask of a checkpoint, or of this machine, that cannot do it."""
    base = model.stage == "base"
    for option in ("live", "compile", "prime", "no_cache", "schedule", "at", "bpm", "chords", "sketch",
                   "listen", "realtime", "osc", "osc_beats", "save_state", "resume_state"):
        if getattr(args, option) and base:
            raise UserError(f"--{option.replace('_', '-')} is for models that stream; this one makes a clip")
    if model.stage == "autoencoder":
        raise UserError("this checkpoint holds only an autoencoder yet: finetune.py --init trains the rest")
    for option in "live", "at", "schedule", "osc":
        if getattr(args, option) and args.no_cache and model.config.causal:
            raise UserError(f"--{option} needs the cache of a block-causal model, which remembers what was "
                            "made under which prompt: leave out --no-cache")
    if args.live and (os.name == "nt" or sys.stdin is None):
        raise UserError("--live reads standard input without waiting, but it is closed, or this is Windows, "
                        "where that cannot be done")
    if base and args.seconds > longest_clip(model.config):
        raise UserError(f"this checkpoint makes one clip of at most {longest_clip(model.config):.1f} s; to "
                        "stream, finetune it first (finetune.py --init)")
    if args.bpm and not takes_tempo(model.config):
        raise UserError("--bpm: this checkpoint cannot be told a beat; put the tempo in its prompt")
    if args.forget is not None and args.no_transitions:
        raise UserError("--forget: with --no-transitions no past is dropped")
    if args.compile:
        needs_speed("--compile")
    readers = [name for name, reads in (("--live", args.live), ("--sketch -", args.sketch == "-"),
                                        ("--listen -", args.listen == "-")) if reads]
    if len(readers) > 1:
        raise UserError(f"{' and '.join(readers)} cannot both read standard input")
    if args.listen and (args.prime or args.save_state or args.resume_state):
        raise UserError("--listen goes with neither --prime nor --save-state and --resume-state")
    for option in "prime", "steps", "cfg", "sampler", "forget", "bpm", "chords", "sketch":
        if args.resume_state and getattr(args, option) is not None:
            raise UserError(f"--resume-state goes on with what was played and set: no --{option} beside it")
    if (args.delay or args.mix) and not args.listen:
        raise UserError("--delay and --mix belong to --listen")
