"""Check that every file of every run can be restored and that the tables are up to date."""
import errno
import hashlib
import json
import lzma
import os
import re
import sys
from pathlib import Path

import pytest

from data.text_to_bin import InputError
from experiments import archive, results

HERE = Path(results.__file__).parent
LOG = archive.RULE + b"a.py\n" + archive.RULE + b"x = 1\n" + archive.RULE + b"step:0/1\n"


@pytest.fixture(scope="module")
def restored(tmp_path_factory) -> Path:
    """Return a folder with every file of every archive."""
    folder = tmp_path_factory.mktemp("restored")
    for name in archive.archives():
        archive.restore(name, folder)
    return folder


@pytest.fixture
def packed(tmp_path) -> Path:
    """Return a folder of archives with one of one run."""
    run = tmp_path / "2026-01-02-question/run"
    archive.write(run / "train.log", LOG)
    archive.write(run / "metrics.jsonl", b"{}\n")
    archive.write(run / "state_step000001.pt", b"a checkpoint")
    assert archive.pack(run.parent, tmp_path / "runs") == 2
    return tmp_path / "runs"


def test_packing_that_was_cut_off_is_done_again(packed, tmp_path):
    run, manifest = tmp_path / "2026-01-02-question", packed / "archive/MANIFEST"
    with pytest.raises(archive.ArchiveError, match="an archive 2026-01-02-question exists"):
        archive.pack(run, packed)
    whole = manifest.read_bytes()
    manifest.write_bytes(b"")  # a kill before it was written
    assert archive.pack(run, packed) == 2 and manifest.read_bytes() == whole
    for folder in (tmp_path / "2026-01-02-nothing", tmp_path / "2026-01-02-empty"):
        if folder.name.endswith("empty"):
            folder.mkdir()
        with pytest.raises(archive.ArchiveError, match="no folder with files to pack"):
            archive.pack(folder, packed)
    assert archive.archives(packed) == ["2026-01-02-question"]
    assert not [*packed.rglob("*.part")]


@pytest.mark.xdist_group("restored")
def test_every_file_is_restored_byte_for_byte(restored):
    files = {path.relative_to(restored).as_posix(): path
             for path in restored.rglob("*") if path.is_file()}
    manifest = archive.read_manifest()
    assert files.keys() == manifest.keys() and len(files) >= 1096
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest[name], name


@pytest.mark.xdist_group("restored")
def test_restored_log_is_sources_and_readable_log(restored):
    logs, sources = [*archive.RUNS.glob("2*/**/train.log")], archive.read_sources()
    assert len(logs) >= sum(len(names) for _, _, names in results.ROWS)
    for log in logs:
        text, wanted = log.read_bytes(), b""
        while text.startswith(b"source: "):
            line, text = text.split(b"\n", 1)
            _, name, _, digest = line.split()
            wanted += archive.RULE + name + b"\n" + archive.RULE
            wanted += sources[f"{digest[:12].decode()}.py"]
        wanted += (archive.RULE if wanted else b"") + text  # new logs have no sources
        assert wanted == (restored / log.relative_to(archive.RUNS)).read_bytes(), log


@pytest.mark.slow
def test_archives_and_readable_files_are_what_the_manifest_says():
    assert archive.verify() >= 1242
    readable = [path.relative_to(archive.RUNS).as_posix() for path in archive.RUNS.rglob("*")
                if path.is_file() and path.parent.name != "archive"
                and path.suffix not in (".png", ".xz")]  # plots can be drawn again
    assert set(readable) <= archive.read_manifest().keys()


def test_sources_have_the_names_of_their_sha256():
    sources = archive.read_sources()
    assert len(sources) >= 200
    for name, text in sources.items():
        assert name == f"{hashlib.sha256(text).hexdigest()[:12]}.py"


def test_pages_are_up_to_date():
    for path, page in results.pages().items():
        assert page == path.read_text(), f"{path.name}: run python experiments/results.py"


@pytest.mark.parametrize("damage, message", (
    (lambda log: log[:1000], "no line with its machine"), (lambda log: b"", "no line with its"),
    (lambda log: log[:log.index(b"step:1400/")], "no line with its speed"),
    (lambda log: log + b"steps: 2800 of 65,536 tokens (1 x 64 x 1024)\n",
     "last validated at step 1400 of 2800"),
    (lambda log: log + b"\xff", "'utf-8' codec can't decode"),
    (lambda log: log.replace(b"/val_*.bin'", b"/val_*.bin"), "No closing quotation"),
    (lambda log: log + b"step:1400/1400 val_loss:3.4.4 train_time:1.0s\n", "could not convert")))
def test_a_log_that_is_not_whole_is_named(tmp_path, monkeypatch, damage, message):
    for _, _, names in results.ROWS:
        for name in names:
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "train.log").symlink_to(archive.RUNS / name / "train.log")
    path = tmp_path / results.GOALS / "b-92/train.log"
    archive.write(path, damage(path.read_bytes()))
    monkeypatch.setattr(archive, "RUNS", tmp_path)
    with pytest.raises(InputError, match=f"^{path}: damaged, or cut off \\({message}[^\n]*$"):
        results.main_table("")


@pytest.mark.parametrize("file, data, message", (
    ("train.log", b"\xff", "'utf-8' codec"), ("train.log", b"command: x.py '", "No closing"),
    ("stdout.txt", b"command: x.py '", "No closing"),
    ("metrics.jsonl", b'{"val_loss"', "Expecting"),
    ("metrics.jsonl", b"5", "argument of type 'int'"),
    ("metrics.jsonl", b'{"val_loss": 4}', "'tokens'")))
def test_an_archived_log_that_cannot_be_read_is_named(monkeypatch, file, data, message):
    monkeypatch.setattr(archive, "members", lambda folder: iter([(f"{folder}/run/{file}", data)]))
    with pytest.raises(InputError, match=f"^x/run/{file}: damaged, or cut off \\({message}"):
        results.archived_runs("x")


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """Return a folder with the three pages, whose tables are out of date."""
    for name in ("README.md", "experiments/README.md", "experiments/benchmark_results.md"):
        archive.write(tmp_path / name, b"Head\n<!-- table -->\nold\n<!-- /table -->\nEnd\n")
    monkeypatch.setattr(results, "HERE", tmp_path / "experiments")
    monkeypatch.setattr(results, "main_table", lambda root: "new \\1")
    monkeypatch.setattr(results, "all_runs", lambda: "new \\1")
    return tmp_path


def run_results(monkeypatch, *words: str):
    monkeypatch.setattr(sys, "argv", ["results.py", *words])
    results.main()


def test_pages_are_checked_and_written(site, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    before = everything(site)
    with pytest.raises(SystemExit, match="1"):
        run_results(monkeypatch, "--check")
    assert everything(site) == before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        run_results(monkeypatch)
    assert {path: data for path, data in everything(site).items() if path in before} == before
    run_results(monkeypatch)
    for path in before:
        assert path.read_text() == "Head\n<!-- table -->\nnew \\1\n<!-- /table -->\nEnd\n"
    run_results(monkeypatch, "--check")


@pytest.mark.parametrize("old, new", (
    ("<!-- /table -->\n", ""), ("<!-- table -->\n", ""), ("End\n", "<!-- table -->\n"),
    ("End\n", "<!-- /table -->\n"), ("<!-- table -->", "<!-- table --> |"),
    ("<!-- table -->\nold\n<!-- /table -->\n", "<!-- /table -->\n<!-- table -->\n"),
    ("Head", "\xff")))
@pytest.mark.parametrize("words", ((), ("--check",)))
def test_a_page_without_both_marks_is_refused(site, monkeypatch, words, old, new):
    path = site / "README.md"
    path.write_text(path.read_text().replace(old, new), encoding="latin-1")
    before = everything(site)
    message = "damaged" if old == "Head" else "must have the lines <!-- table --> and <!-- /table"
    with pytest.raises(InputError, match=f"^{path}: {message}[^\n]*$"):
        run_results(monkeypatch, *words)
    assert everything(site) == before


def test_tree_is_small_and_has_no_old_code():
    made_here = {"__pycache__", "studies"}  # by Python and by ablation_studies.py, not in git
    paths = [path for path in HERE.rglob("*") if path.is_file()
             and not made_here & {*path.relative_to(HERE).parts}]
    assert sum(path.stat().st_size for path in paths) < 22_000_000
    assert not [path for path in paths if path.suffix == ".py" and path.parent != HERE]
    assert len([path for path in paths if path.suffix == ".png"]) <= 10  # nine of runs, causality's


def test_a_clock_that_stood_still_says_nothing():
    run = results.Run("x")
    results.add_metrics(run, json.dumps(dict(
        peak_memory_usage=2**30, tokens_per_s=-5.0, train_time_s=-0.1,
        train_time_with_compilation_s=12.0)))
    assert run.peak == 1 and run.speed is run.seconds is run.with_compilation is None


def test_mean_curve_reads_between_validations_and_takes_the_last_of_a_step():
    one = results.Run("one", curve=[(10, 1.0, 5.0), (20, 9.0, 9.0), (20, 2.0, 4.0), (30, 3.0, 3.0)])
    other = results.Run("other", curve=[(10, 2.0, 5.0), (30, 4.0, 2.0), (40, 5.0, 1.0)])
    assert results.mean_curve([one, other]) == [(1.5, 5.0), (2.5, 3.75), (3.5, 2.5)]


@pytest.mark.parametrize("name", ("README.md", "benchmark_results.md"))
def test_pages_have_no_words_of_the_workshop(name):
    assert "sitting" not in (HERE / name).read_text().lower()


def prose(page: Path) -> str:
    """Return a page without its code."""
    text = re.sub("```.*?```", "", page.read_text(), flags=re.DOTALL)
    return "\n".join(line if line.startswith("#") else re.sub("`[^`\n]*`", "", line)
                     for line in text.splitlines())


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, made as GitHub makes them."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall("^#+ (.*)$", prose(page), re.MULTILINE)}


def test_links_lead_somewhere():
    pages = [*HERE.glob("*.md"), HERE.parent / "README.md"]
    assert len(pages) > 3
    for page in pages:
        text = prose(page)
        links = re.findall(r"\]\(([^) ]+)\)", text) + re.findall(r"^\[.*\]: (\S+)$", text, re.M)
        for link in (link for link in links if "://" not in link):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
        if page.name == "README.md":  # others have brackets that are no links
            defined = {*re.findall(r"^\[(.*)\]: ", text, re.M)}
            used = {" ".join(name.split()) for name in re.findall(r"\[([^][]+)\](?![(:[])", text)}
            assert used == defined, f"{page.name}: {used ^ defined}"


def test_archive_round_trip_and_what_it_refuses(packed, tmp_path):
    digest = hashlib.sha256(b"x = 1\n").hexdigest()
    kept = archive.keep("2026-01-02-question/run", packed)
    assert kept.read_bytes() == b"source: a.py sha256 %s\nstep:0/1\n" % digest.encode()
    assert archive.verify(packed) == 3
    assert archive.restore("2026-01-02-question", tmp_path / "out", packed) == 2
    assert (tmp_path / "out/2026-01-02-question/run/train.log").read_bytes() == LOG
    with pytest.raises(archive.ArchiveError, match="exists"):
        archive.pack(tmp_path / "2026-01-02-question", packed)
    with pytest.raises(archive.ArchiveError, match="<date>-<question>"):
        archive.pack(tmp_path / "out", packed)
    with pytest.raises(archive.ArchiveError, match="no archive has"):
        archive.keep("2026-01-02-question/other", packed)
    with pytest.raises(archive.ArchiveError, match="no archive 2026"):
        archive.restore("2026-01-03-other", tmp_path / "out", packed)


def test_what_a_pack_would_leave_out_is_refused(packed, tmp_path):
    folder, elsewhere = tmp_path / "2026-12-09-link", tmp_path / "elsewhere"
    for path in (folder, elsewhere):
        path.mkdir()
        (path / "train.log").write_text("x\n")
    (folder / "run").symlink_to(elsewhere)
    before = (packed / "archive/MANIFEST").read_text()
    with pytest.raises(archive.ArchiveError, match="link/run: neither a folder nor a file, so it "):
        archive.pack(folder, packed)
    assert (packed / "archive/MANIFEST").read_text() == before


@pytest.mark.parametrize("locked", ("run", "source"))
def test_a_folder_that_cannot_be_read_is_refused(packed, tmp_path, monkeypatch, locked):
    folder, scandir = tmp_path / "2026-01-03-locked", os.scandir
    for parent in (folder, packed / "2026-01-02-question"):
        archive.write(parent / "run/source/a.txt", b"a")
    before = everything(packed)

    def refusing(path):
        if Path(path).name == locked:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    for act in (lambda: archive.pack(folder, packed), lambda: archive.verify(packed)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", refusing)  # root reads all
            with pytest.raises(archive.ArchiveError, match=f"/{locked}: cannot be read \\(Permi"):
                act()
        assert everything(packed) == before


def test_verify_finds_a_changed_log_source_and_manifest(packed):
    log = archive.keep("2026-01-02-question/run", packed)
    manifest, old = packed / "archive/MANIFEST", log.read_bytes()
    log.write_bytes(old.replace(b"step:0", b"step:1"))
    with pytest.raises(archive.ArchiveError, match="not what its archive has"):
        archive.verify(packed)
    log.write_bytes(old)
    entries = manifest.read_text()
    manifest.write_text(entries + "0" * 64 + "  2026-01-02-question/run/lost.txt\n")
    with pytest.raises(archive.ArchiveError, match="lacks .*lost.txt"):
        archive.verify(packed)
    manifest.write_text(entries)
    (name,) = archive.read_sources(packed)
    (packed / "sources.tar.xz").write_bytes(archive.solid({name: b"x = 2\n"}))
    with pytest.raises(archive.ArchiveError, match="not what MANIFEST says"):
        archive.verify(packed)


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_packs_at_once_lose_no_entry(packed, tmp_path, monkeypatch):
    other, write = tmp_path / "2026-01-03-other", archive.write
    write(other / "run/a.txt", b"a")
    write(tmp_path / "2026-01-04-third/run/a.txt", b"a")

    def interrupted(path, data):
        if path.name == "MANIFEST":
            with pytest.raises(InputError, match="archive is in use by process"):
                archive.pack(tmp_path / "2026-01-04-third", packed)
        write(path, data)

    monkeypatch.setattr(archive, "write", interrupted)
    assert archive.pack(other, packed) == 1
    assert archive.pack(tmp_path / "2026-01-04-third", packed) == 1
    assert archive.verify(packed) == 4 and not [*packed.rglob(".lock")]


@pytest.mark.parametrize("name, message", (
    (b"a\nb.txt", "printable characters"), (b"\xff.txt", "must be UTF-8"),
    (b"x" * 120, "too long for tar")))
def test_a_name_that_cannot_be_archived_is_refused_before_anything_is_written(
        packed, tmp_path, name, message):
    folder, before = tmp_path / "2026-01-03-names", everything(packed)
    archive.write(folder / "a.txt", b"a")
    archive.write(folder / os.fsdecode(name), b"a")
    with pytest.raises(archive.ArchiveError, match=f"^[^\n]*{message}[^\n]*$"):
        archive.pack(folder, packed)
    assert everything(packed) == before


@pytest.mark.parametrize("log", (
    b"source: a.py sha256 %s\nstep:0/1\n" % hashlib.sha256(b"x = 1\n").hexdigest().encode(),
    b"source: a.py sha256 %s\nstep:0/1\n" % (b"0" * 64), archive.RULE + b"a.py\n" + archive.RULE))
def test_a_log_that_would_not_come_back_is_refused_before_anything_is_written(
        packed, tmp_path, log):
    before = everything(packed)
    archive.write(tmp_path / "2026-01-03-readable/train.log", log)
    with pytest.raises(archive.ArchiveError, match="would not come back|lacks 000000000000.py"):
        archive.pack(tmp_path / "2026-01-03-readable", packed)
    assert everything(packed) == before


def test_a_source_is_kept_once_whichever_runs_had_it(packed, tmp_path):
    text = LOG.split(archive.RULE)[2]  # the log of the other archive begins with it
    for day in ("03", "04"):
        run = tmp_path / f"2026-01-{day}-sources/run"
        archive.write(run / "source/train.py", text)
        archive.write(run / "source/kernels/new.py", b"y = 2\n")
        archive.write(run / "source/change.diff", b"a diff\n")
        assert archive.pack(run.parent, packed) == 3
        assert archive.restore(run.parent.name, tmp_path / "out", packed) == 3
        for file in ("train.py", "kernels/new.py", "change.diff"):
            restored = tmp_path / "out" / run.parent.name / "run/source" / file
            assert restored.read_bytes() == (run / "source" / file).read_bytes()
        held = dict(archive.unpacked(packed / f"archive/{run.parent.name}.tar.xz"))
        assert text not in held.values() and b"a diff\n" in held.values()
    assert text in archive.read_sources(packed).values() and archive.verify(packed) == 8
    (packed / "sources.tar.xz").unlink()
    with pytest.raises(archive.ArchiveError, match="sources.tar.xz is missing"):
        archive.restore("2026-01-03-sources", tmp_path / "again", packed)


def test_a_file_that_differs_is_not_replaced(packed, tmp_path):
    out, name = tmp_path / "out", "2026-01-02-question"
    mine = out / name / "run/train.log"
    archive.restore(name, out, packed)
    (out / name / "run/metrics.jsonl").unlink()
    mine.write_bytes(b"changed")
    with pytest.raises(archive.ArchiveError, match=f"^{mine} is there and differs"):
        archive.restore(name, out, packed)
    assert mine.read_bytes() == b"changed" and not (out / name / "run/metrics.jsonl").exists()
    mine.write_bytes(LOG)  # one that is equal is no reason
    assert archive.restore(name, out, packed) == 2
    kept = archive.keep(f"{name}/run", packed)
    kept.write_bytes(b"changed")
    with pytest.raises(archive.ArchiveError, match=f"^{kept} is there and differs"):
        archive.keep(f"{name}/run", packed)
    assert kept.read_bytes() == b"changed"


def flipped(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


@pytest.mark.parametrize("file", ("archive/2026-01-02-question.tar.xz", "sources.tar.xz"))
@pytest.mark.parametrize("damage", (
    flipped, lambda data: data[:-30], lambda data: b"", lambda data: None,
    lambda data: b"foreign", lambda data: lzma.compress(b"foreign")))
def test_a_damaged_archive_is_refused_whole_in_one_line(packed, tmp_path, file, damage):
    path = packed / file
    if (data := damage(path.read_bytes())) is None:
        path.unlink()
    else:
        path.write_bytes(data)
    with pytest.raises(archive.ArchiveError) as error:
        archive.restore("2026-01-02-question", tmp_path / "out", packed)
    assert "\n" not in str(error.value) and path.name.removesuffix(".tar.xz") in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", (b"junk", b"0  run/a.txt", b"\xff" * 80, b"0" * 64 + b"  "))
def test_a_manifest_with_a_line_of_junk_is_refused(packed, tmp_path, line):
    manifest = packed / "archive/MANIFEST"
    manifest.write_bytes(manifest.read_bytes() + line + b"\n")
    archive.write(tmp_path / "2026-01-03-other/a.txt", b"a")
    before = everything(packed)
    for act in (lambda: archive.verify(packed),
                lambda: archive.pack(tmp_path / "2026-01-03-other", packed)):
        with pytest.raises(archive.ArchiveError, match="MANIFEST: line 3 is not <sha256>  <file>"):
            act()
    assert everything(packed) == before


def test_times_to_the_same_loss():
    one = dict(machine="H100", with_compilation=30.0)
    slow = results.Run("f/slow", curve=[(0, 0.0, 8.0), (10, 20.0, 4.0)], seconds=20.0, **one)
    fast = results.Run("f/fast", curve=[(0, 0.0, 8.0), (10, 10.0, 5.0)], seconds=10.0, **one)
    other = results.Run("f/other", curve=[(0, 0.0, 8.0), (10, 99.0, 3.0)], machine="H200")
    assert results.times_faster([fast], [slow]) == pytest.approx(15 / 10)
    assert results.times_faster([fast], [slow], compilation=True) == pytest.approx(25 / 30)
    assert results.times_faster([slow], [fast]) == pytest.approx(10 / 15)
    assert results.mean_curve([fast, other]) == [(0.0, 8.0), (10.0, 4.0)]


def test_run_is_read_from_its_log():
    run = results.read_log("f/run", "\n".join((
        "command: train.py --seed 2 --n_head 6 --n_head 3 --eval_only",
        "torch 2.11.0, 1 x NVIDIA H100 80GB HBM3, CUDA 13.0",
        "model: d12, 112,016,568 parameters, mixers afno attn afno afno, 3 heads",
        "afno layers of form state: 2",
        "steps: 10 of 65,536 tokens (1 x 64 x 1024); optimizer muon",
        "step:0/10 val_loss:10.6 train_time:0.0s step_avg:0.0ms",
        "step:10/10 val_loss:3.5 train_time:1.5s step_avg:1.0ms",
        "tokens/s: 492,457  peak_memory_usage: 2,048 MiB  "
        "train_time: 1.5 s, 2.5 s with compilation",
    )))
    assert run.flags == {"seed": "2", "n_head": "3", "eval_only": ""} and run.seed == "2"
    assert run.mixers == "AFNO x2; attention in 1; state in 2" and run.machine == "H100"
    assert (run.length, run.steps, run.tokens, run.loss) == (1024, 10, 655360, 3.5)
    assert (run.speed, run.seconds, run.with_compilation, run.peak) == (492457, 1.5, 2.5, 2.0)
    assert results.read_log("f/empty", "").loss is None


def test_new_log_names_its_text_and_a_preset_hides_its_flags():
    run = results.read_log("f/run", "\n".join((
        "commit: 3e5ee23 and source/", f"sha256: {'0' * 64} afno.py",
        "command: train.py --preset fineweb --n_head 3",
        "torch 2.11.0, 1 x NVIDIA H200, CUDA 13.0",
        "data: data/web/train_*.bin, 100,000,000 tokens; validation: data/web/web_val.bin",
        "steps: 10 of 65,536 tokens (1 x 32 x 2048), optimizer muon",
        "step:10/10 val_loss:4.1 train_time:1.5s step_avg:1.0ms",
        "step:10/10 val_loss_fp32:4.0",
    )))
    assert (run.text, run.length, run.loss) == ("**web English**", 2048, 4.1)
    assert "| 4.1000 | **web English** |" in results.run_row(run, "")
    both = results.read_log("f/run", "data: data/all/train_*.bin, 180,000,000 tokens; "
                            "validation: data/web/web_val.bin")
    assert both.text == "**web English**, trained on data/all"  # losses compare by what validates
    spelled = results.Run("f/other", flags={"n_head": "6", "swiglu": "1"})
    assert results.differences([spelled, spelled, run]) == ["", "", "n_head 3 preset fineweb"]
