"""Measure tokens/s of generation: with states, and with the whole text computed for every token.

    python experiments/generation_speed.py --preset fineweb --sequence_length 4096

Flags are the trainer's: those of the model, --preset, --device, --dtype, --seed, --max_new_tokens.
A model at initialisation (speed does not depend on weights) has read all but the last
`--max_new_tokens` tokens (32) of `--sequence_length` random ones. Timed are the others, one by one,
for a batch of one. Prints one line a method.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.text_to_bin import InputError, show  # noqa: E402
from runtime import Runtime, choose_device, refuse_too_large, run  # noqa: E402
from test_causality import random_tokens  # noqa: E402
from train_gpt2_afno import (CONFIG_FLAGS, FLAGS, GPT, GPTConfig, merge_flags,  # noqa: E402
                             model_fields, parse_flags)

TAKEN = ("device", "dtype", "seed", "max_new_tokens")  # beside the model's


def main(argv: list[str]) -> int:
    """Time both methods and return the exit status."""
    given = parse_flags(argv, __doc__)
    if idle := [name for name in given if FLAGS[name].group != "model" and name not in TAKEN]:
        raise InputError(f"--{idle[0]} has no effect here: this does not train, it takes the "
                         f"model's flags, --preset, --{', --'.join(TAKEN)}")
    flags = {"max_new_tokens": 32, **given}
    device = choose_device(flags.get("device", "auto"))
    args = merge_flags(flags, device, None, print)
    config, count = GPTConfig(**model_fields(vars(args))), args.max_new_tokens
    if count >= config.sequence_length:
        raise InputError("--max_new_tokens must be < --sequence_length "
                         f"{config.sequence_length}, got {count}")
    if config.afno_form == "reference" and "afno" in map(config.mixer_of, range(config.n_layer)):
        raise InputError("--afno_form reference reads whole rows: it has no step for one token")
    refuse_too_large(GPT, config, args, device, only_read=True)
    runtime = Runtime(device, getattr(torch, args.dtype), compile=False)
    torch.manual_seed(args.seed)
    model, T = GPT(config).to(device), config.sequence_length
    idx = random_tokens((1, T), config.vocab_size).to(device)
    chip = torch.cuda.get_device_name() if device.type == "cuda" \
        else f"CPU, {torch.get_num_threads()} threads"
    changed = [f"{flag.name} {show(getattr(args, flag.name))}" for flag in CONFIG_FLAGS
               if flag.group == "model" and getattr(args, flag.name) != flag.default]
    print(f"{args.model}, mixers {' '.join(map(config.mixer_of, range(config.n_layer)))}, "
          f"{', '.join(changed)}")
    print(f"{T - count} tokens read, {count} timed, {args.dtype}, torch {torch.__version__}, "
          f"{chip}")

    def with_states():
        state = None
        for t in range(T - count):
            _, state = model.step(idx[:, t], state, T)
        start = now()
        for t in range(T - count, T):
            hidden, state = model.step(idx[:, t], state, T)
            # a token must be known before the next one can be computed
            model.lm_head.logits(hidden).argmax().item()
        return now() - start

    def again():
        model.hidden(idx)
        start = now()
        for t in range(T - count, T):
            hidden = model.hidden(idx[:, : t + 1])[:, -1]
            model.lm_head.logits(hidden).argmax().item()
        return now() - start

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with torch.no_grad(), runtime.autocast():
        for name, method in (("token by token, with states", with_states),
                             ("the whole text again", again)):
            print(f"{name}: {count / method():.1f} tokens/s", flush=True)
    return 0


if __name__ == "__main__":
    run(main, memory="--sequence_length or --model")
