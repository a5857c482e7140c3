"""Tokens/s of generation: token by token with states, and with the whole text computed again for every token.

    python experiments/generation_speed.py [the trainer's flags]      # --model d12 --attn_layers 5,10 ...

A model at initialisation (speed does not depend on weights) has read all but the last `--max_new_tokens` tokens of
`--sequence_length` random ones; timed are the others, one by one, for a batch of one. Prints one line a method.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.text_to_bin import InputError  # noqa: E402
from train_gpt2_afno import (DEFAULTS, DEVICE_DEFAULTS, GPT, GPTConfig, Runtime, choose_device, model_fields,  # noqa: E402
                             parse_flags, random_tokens, run)


def main(argv: list[str]) -> int:
    flags = parse_flags(argv)
    device = choose_device(flags.get("device", "auto"))
    values = {**DEFAULTS, **DEVICE_DEFAULTS[device.type], "max_new_tokens": 32, **flags}
    config, count = GPTConfig(**model_fields(values)), values["max_new_tokens"]
    if count >= config.sequence_length:
        raise InputError(f"--max_new_tokens must be < --sequence_length {config.sequence_length}, got {count}")
    runtime = Runtime(device, getattr(torch, values["dtype"]), compile=False)
    torch.manual_seed(values["seed"])
    model, T = GPT(config).to(device), config.sequence_length
    idx = random_tokens((1, T), config.vocab_size).to(device)
    print(f"{values['model']}, mixers {' '.join(map(config.mixer_of, range(config.n_layer)))}, afno_form "
          f"{config.afno_form}, {T - count} tokens read, {count} timed, {values['dtype']}, torch {torch.__version__}, "
          + (torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"))

    def with_states():
        state = None
        for t in range(T - count):
            _, state = model.step(idx[:, t], state, T)
        start = now()
        for t in range(T - count, T):
            hidden, state = model.step(idx[:, t], state, T)
            model.lm_head(hidden).argmax().item()  # a token must be known before the next one can be computed
        return now() - start

    def again():
        model.hidden(idx)
        start = now()
        for t in range(T - count, T):
            model.lm_head(model.hidden(idx[:, : t + 1])[:, -1]).argmax().item()
        return now() - start

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with torch.no_grad(), runtime.autocast():
        for name, method in (("token by token, with states", with_states), ("the whole text again", again)):
            print(f"{name}: {count / method():.1f} tokens/s", flush=True)
    return 0


if __name__ == "__main__":
    run(main)
