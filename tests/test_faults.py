"""What strangers' machines do: other encodings and paths, two processes, damage, signals, bounds.

Each test was a fault once. Those that need GPT-2's vocabulary skip where it cannot be had.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import train_gpt2_afno
from data import text_to_bin
from data.loader import TokenStream, find_shards
from data.text_to_bin import InputError, ShardWriter, read_bin, relative, run_main, write_shards
from test_data import (END_OF_TEXT, encoding, one_line, package_index,  # noqa: F401
                             shard_bytes, stored, tokens_of_documents)
from test_trainer import (VOCABULARY, Letters, data, flags, losses, main,  # noqa: F401
                                metrics, newest, run_script, script, small)

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


def test_a_long_stretch_of_white_space_is_tokenized(encoding):
    text = "a" + " " * 600_000 + "x"
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
    (("слово " * 2000).encode("cp1251"), r"10,000 of 12,000 bytes \(83.3%\) are not utf-8: name"),
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


@pytest.fixture(params=["rep [v2]", "rep{x}", "rep %s", "ré*?", b"rep \xff".decode(errors="surrogateescape")])
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


def test_the_repositorys_path_inside_another_stays(monkeypatch):
    root = text_to_bin.ROOT
    assert relative(f"{root}/data/x") == "data/x"
    assert relative(f"/backup{root}/data/x") == f"/backup{root}/data/x"


def test_generation_takes_the_end_of_text_for_the_token(data, tmp_path, monkeypatch, capsys):
    main(flags(data, tmp_path / "run", "--num_iterations 1"))
    fed = []
    step = train_gpt2_afno.GPT.step
    monkeypatch.setattr(train_gpt2_afno, "gpt2_encoding", Letters)
    monkeypatch.setattr(train_gpt2_afno, "check_generation", lambda *_: 0.0)
    monkeypatch.setattr(train_gpt2_afno.GPT, "step",
                        lambda self, idx, *more: fed.append(int(idx)) or step(self, idx, *more))
    end = Letters.eot_token
    for text, tokens in (("<|endoftext|>", [end]), ("", [end]), ("a<|endoftext|>b", [97, end, 98]),
                         ("<|endoftext|>a", [end, 97])):
        del fed[:]
        main(["--output_dir", str(tmp_path / "run"), "--device", "cpu", "--generate", text,
              "--max_new_tokens", "1"])
        assert fed == tokens
