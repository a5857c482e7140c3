"""The adapter for lm-evaluation-harness: against the model's own logits, and on three lines."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import runtime
from data.text_to_bin import InputError, gpt2_encoding
from experiments import harness
from experiments.harness import Adapter, windows
from helpers import tiny
from runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32, compile=False)
EOT = 50256
PASSAGES = ("The old king lived in a small house by the", "She sat down.", "")
WORDS = (" sea", " and then she wrote a long letter to her mother", "Once upon a time")


@pytest.fixture(scope="module")
def model():
    return tiny(vocab_size=50257, mixer="afno", attn_layers=(1,), sequence_length=24).eval()


@pytest.fixture(scope="module")
def adapter(model):
    return Adapter(model, CPU, batch_size=2)


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


@torch.no_grad()
def log_probabilities(model, tokens):
    """Return log p of each token but the first, and whether it is the likeliest."""
    logits = model(torch.tensor([tokens[:-1]]))[0][0]
    after = torch.tensor(tokens[1:])
    return -F.cross_entropy(logits, after, reduction="none"), logits.argmax(-1) == after


def test_likelihoods_are_the_models(model, adapter):
    encode = gpt2_encoding().encode_ordinary
    found = adapter.loglikelihood(requests(*zip(PASSAGES, WORDS)))
    for passage, word, (value, greedy) in zip(PASSAGES, WORDS, found):
        count = len(encode(word))
        values, likeliest = log_probabilities(model, [EOT, *encode(passage + word)])
        assert value == pytest.approx(values[-count:].sum().item(), abs=1e-3)
        assert greedy == likeliest[-count:].all().item()


def test_spaces_before_the_answer_are_part_of_it(adapter):
    one, other = adapter.loglikelihood(requests(("by the ", "sea"), ("by the", " sea")))
    assert one == other


def test_an_answer_that_merges_into_the_context_is_scored(model, adapter):
    found = adapter.loglikelihood(requests(("Hel", "lo"), ("Hel", "p"), ("Hel", "lo there")))
    for text, (value, _) in zip(("Hello", "Help", "Hello there"), found):
        tokens = adapter.encode(text)
        assert len(tokens) == 1 + len(text.split())  # one token a word
        values, _ = log_probabilities(model, tokens)
        assert value == pytest.approx(values[-1].item(), abs=1e-3)


def test_an_empty_answer_is_the_end_of_the_document(model, adapter):
    for context in ("", "by the", "by the "):
        (value, _), = adapter.loglikelihood(requests((context, "")))
        values, _ = log_probabilities(model, [*adapter.encode(context), EOT])
        count = 1 + context.endswith(" ")  # the space is the answer's
        assert value == pytest.approx(values[-count:].sum().item(), abs=1e-3) and value < 0


def test_the_likeliest_answer_is_said_to_be(adapter):
    text = adapter.generate("The old king", [], 3)
    assert text and adapter.loglikelihood(requests(("The old king", text)))[0][1]


def test_a_long_context_keeps_its_end(model, adapter):
    context = "one two three four five six seven eight nine ten " * 4
    tokens = adapter.encode(context + "end")
    (value, _), = adapter.loglikelihood(requests((context, "end")))
    count = len(tokens) - len(adapter.encode(context.rstrip()))
    values, _ = log_probabilities(model, tokens[-25:])
    assert value == pytest.approx(values[-count:].sum().item(), abs=1e-3)
    with pytest.raises(InputError, match="a continuation has .* tokens, the model's rows 24"):
        adapter.loglikelihood(requests(("", context)))


@pytest.mark.parametrize("count", (1, 5, 6, 7, 12, 13, 31))
def test_windows_predict_every_token_once(count):
    tokens, T = [*range(count + 1)], 6
    pairs = windows(tokens, T)
    assert [token for _, after in pairs for token in after] == tokens[1:]
    for before, after in pairs:  # neighbours in the text, and as long a window as there can be
        assert before + after == tokens[before[0] : after[-1] + 1]
        assert len(before) + len(after) - 1 == min(T, count)
    utils = sys.modules.get("lm_eval.utils")
    if utils:
        theirs = utils.get_rolling_token_windows(tokens[1:], tokens[0], T, 1)
        assert pairs == [tuple(map(list, utils.make_disjoint_window(pair))) for pair in theirs]


def test_rolling_sums_over_windows(model, adapter):
    text = "A text of more tokens than a row has. " * 4
    total, = adapter.loglikelihood_rolling(requests((text,)))
    tokens, expected = adapter.encode(text), 0.0
    for before, after in windows(tokens, 24):
        expected += log_probabilities(model, before + after)[0][-len(after):].sum().item()
    assert total == pytest.approx(expected, abs=1e-2) and len(tokens) > 25
    assert adapter.loglikelihood_rolling(requests(("",))) == [0]


def test_generation_is_the_trainers_and_stops(model, adapter, capsys):
    options = SimpleNamespace(seed=1, temperature=0, top_k=1, max_new_tokens=8)
    runtime.generate(model, "<|endoftext|>The old king", options, 24, CPU)
    text = capsys.readouterr().out.removeprefix("<|endoftext|>The old king").rstrip("\n")
    whole, = adapter.generate_until(requests(("The old king", dict(max_gen_toks=8))))
    assert whole == text and len(whole) > 4
    stop = whole[3:5]
    for until in (stop, ["no such text", stop]):
        cut, = adapter.generate_until(requests(("The old king", dict(until=until,
                                                                      max_gen_toks=8))))
        assert cut == whole[: whole.index(stop)]
    with pytest.raises(InputError, match="asks for sampling"):
        adapter.generate_until(requests(("x", dict(do_sample=True, temperature=1.0))))


def test_learned_positions_leave_room_for_what_is_generated():
    model = tiny(vocab_size=50257, mixer="attn", position="learned", sequence_length=24).eval()
    adapter = Adapter(model, CPU, batch_size=1)
    context = "one two three four five six seven eight nine ten " * 4
    tokens = adapter.encode(context)[-(24 - 8):]
    for _ in range(8):
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    assert EOT not in tokens
    text, = adapter.generate_until(requests((context, dict(max_gen_toks=8))))
    assert text == gpt2_encoding().decode(tokens[-8:])
    adapter.generate_until(requests((context, dict(max_gen_toks=23))))
    with pytest.raises(InputError, match="wants 24 new tokens .* fewer than those of a row, 24"):
        adapter.generate_until(requests((context, dict(max_gen_toks=24))))


def test_errors_are_one_line(tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(InputError, match=f"{tmp_path}: not a folder of report.py --export"):
        harness.load_exported(tmp_path)
    with pytest.raises(InputError, match="the model's 97 tokens are not GPT-2's"):
        Adapter(tiny(), CPU, 1)


@pytest.mark.parametrize("change", (
    lambda x: x.index_fill(0, torch.tensor([0]), torch.nan), lambda x: x / 0,
    torch.Tensor.double, torch.Tensor.bfloat16, torch.Tensor.int))
def test_weights_that_no_export_writes_are_refused(tmp_path, change):
    safetensors = pytest.importorskip("safetensors.torch")
    model, path = tiny(), tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(dict(model=vars(model.config))))
    safetensors.save_model(model, str(path))
    loaded = harness.load_exported(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in model.state_dict().items())
    weights = safetensors.load_file(path)
    name = next(name for name in weights if name.startswith("transformer.h.0"))
    safetensors.save_file(weights | {name: change(weights[name])}, path)
    with pytest.raises(InputError, match=f"^{tmp_path}: not a folder of report.py --export "
                                         rf"\(model.{name} (.not finite. )?is damaged\)$"):
        harness.load_exported(tmp_path)


@pytest.fixture
def fake_harness(monkeypatch):
    """An installed harness that has a task x, and evaluates nothing."""
    fake = SimpleNamespace(simple_evaluate=None, make_table=None, TaskManager=lambda include_path:
                           SimpleNamespace(all_tasks=["x"]))
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.utils"):
        monkeypatch.setitem(sys.modules, name, fake)


@pytest.mark.parametrize("missing", ("lm_eval", "lm_eval.tasks"))
def test_a_harness_that_is_missing_or_broken_is_one_line(
        tmp_path, monkeypatch, fake_harness, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match="needs the package lm-eval: pip install lm-eval "
                                         rf"\(import of {missing} halted"):
        harness.main([str(tmp_path), "--tasks", "x"])


def test_an_evaluation_that_fails_leaves_no_output(tmp_path, fake_harness):
    pytest.importorskip("safetensors")
    argv = [str(tmp_path / "gone"), "--tasks", "x", "--device", "cpu", "--output"]
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    before = json.dumps(dict.fromkeys(("results", "versions", "n-samples")))
    old.write_text(before)
    for path in (old, new):
        with pytest.raises(InputError, match="gone: not a folder of report.py --export"):
            harness.main([*argv, str(path)])
    assert old.read_text() == before and not new.exists()
    foreign = dict.fromkeys(("results", "versions", "n-samples"), 1)
    for text in ("# mine", "{}", "[1]", "3", json.dumps([*foreign]),
                 json.dumps(dict(foreign, of=3)), json.dumps(dict(foreign, mine=3))):
        old.write_text(text)
        with pytest.raises(InputError, match="old.json: is there, and not of this script"):
            harness.main([*argv, str(old)])
        assert old.read_text() == text
    with pytest.raises(InputError, match="--output .*: Is a directory"):
        harness.main([*argv, str(tmp_path)])


@pytest.mark.parametrize("flags, message", (
    (["--tasks", ""], "--tasks must be names with commas between them, got ''"),
    (["--tasks", "x,"], "--tasks must be names with commas between them, got 'x,'"),
    (["--tasks", "x", "--include", "gone"], "--include gone: no such folder"),
    (["--tasks", "x", "--include", ""], "--include: must be a folder's name, not empty"),
    (["--tasks", "x,y"], r"--tasks: the harness has no task y \(see `lm-eval ls tasks`\)$"),
    (["--tasks", "y", "--include", "."], "--tasks: the harness has no task y .*, nor has "
                                         "--include .$")))
def test_names_of_tasks_and_their_folder_are_checked(fake_harness, flags, message):
    with pytest.raises(InputError, match=f"^{message}"):
        harness.main(["gone", *flags])


@pytest.fixture
def exported(model, tmp_path, fake_harness):
    """A function that exports a model as of a step, into a folder of this name."""
    save_model = pytest.importorskip("safetensors.torch").save_model

    def export(name: str, step: int, model=model):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(
            dict(model=vars(model.config), step=step, commit="abc")))
        save_model(model, str(tmp_path / name / "model.safetensors"))
        return str(tmp_path / name)

    return export


@pytest.mark.parametrize("error, message", (
    (IndexError("list index\nout of range"), "--tasks x: IndexError: list index$"),
    (FileNotFoundError("Unable to find 'x'"), "--tasks x: FileNotFoundError: Unable .* 'x'$"),
    (ConnectionError("no"), "--tasks x: ConnectionError: no; is the network there.$"),
    (InputError("a continuation is too long"), "a continuation is too long$"),
    (RuntimeError("out of memory"), None), (KeyboardInterrupt(), None)))
def test_a_task_that_cannot_be_evaluated_is_one_line(exported, monkeypatch, error, message):
    def simple_evaluate(*_, **__):
        raise error

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", simple_evaluate)
    with pytest.raises(InputError if message else type(error), match=message and f"^{message}"):
        harness.main([exported("a", 1), "--tasks", "x", "--device", "cpu"])


def test_results_of_another_model_or_other_tasks_are_not_replaced(exported, tmp_path, monkeypatch):
    fake, out = sys.modules["lm_eval"], tmp_path / "out.json"
    found = dict.fromkeys((*harness.RESULTS, "more"), 1)
    monkeypatch.setattr(fake, "simple_evaluate", lambda *_, **__: found)
    monkeypatch.setattr(fake, "make_table", lambda found: "")
    monkeypatch.setattr(fake, "TaskManager", lambda include_path:
                        SimpleNamespace(all_tasks=["x", "y"]))
    first, other = exported("a", 1), exported("b", 1)
    go = lambda folder, tasks, *more: harness.main(
        [folder, "--tasks", tasks, "--device", "cpu", "--output", str(out), *more])
    for tasks in ("x,y", "y, x"):  # the same again
        assert go(first, tasks) == 0
    with monkeypatch.context() as patch:
        patch.chdir(first)
        assert go(".", "x,y") == 0  # the same folder
    before = out.read_text()
    of = dict(folder="a", step=1, commit="abc", weights=json.loads(before)["of"]["weights"],
              tasks="x,y", shots=None, limit=None)
    assert json.loads(before) == dict(of=of, **dict.fromkeys(harness.RESULTS, 1))
    says = f"^--output {out}: is of another model or other tasks "
    for arguments, message in (((other, "x,y"), "folder: a, here b"),
                               ((first, "x"), "tasks: x,y, here x"),
                               ((first, "x,y", "--limit", "3"), "limit: not given, here 3")):
        with pytest.raises(InputError, match=rf"{says}\({message}\): name another file$"):
            go(*arguments)
    twin = exported("other/a", 1, tiny(vocab_size=50257, mixer="attn"))
    with pytest.raises(InputError, match=rf"{says}\(weights: \w{{12}}, here \w{{12}}\)"):
        go(twin, "x,y")
    (tmp_path / "a/config.json").write_text(
        (tmp_path / "a/config.json").read_text().replace('"step": 1', '"step": 2'))
    with pytest.raises(InputError, match=rf"{says}\(step: 1, here 2\)"):
        go(first, "x,y")
    assert out.read_text() == before
    out.write_bytes(before.encode().replace(b'"a"', b'"\xff"'))
    with pytest.raises(InputError, match=rf"{says}\(folder: \ufffd, here a\)"):
        go(first, "x,y")
    out.write_text(json.dumps(dict.fromkeys(harness.RESULTS)))  # of before it said so
    with pytest.raises(InputError, match=rf"{says}\(folder: not given, here a\)"):
        go(first, "x,y")


def test_a_model_that_leaks_is_refused(model, tmp_path, fake_harness, monkeypatch):
    save_model = pytest.importorskip("safetensors.torch").save_model
    (tmp_path / "config.json").write_text(json.dumps(dict(model=vars(model.config))))
    save_model(model, str(tmp_path / "model.safetensors"))
    hidden = type(model).hidden
    monkeypatch.setattr(type(model), "hidden", lambda self, idx:  # of the next place
                        hidden(self, idx) + 1e-4 * hidden(self, idx).roll(-1, 1))
    with pytest.raises(InputError, match=f"^{tmp_path}: causality check: the model leaks"):
        harness.main([str(tmp_path), "--tasks", "x", "--device", "cpu"])


@pytest.mark.slow
def test_a_task_of_three_lines(model, adapter, tmp_path, monkeypatch, capsys):
    """What the harness reports is what the model's own losses say."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("lm_eval")
    save_model = pytest.importorskip("safetensors.torch").save_model
    (tmp_path / "config.json").write_text(json.dumps(dict(model=vars(model.config))))
    save_model(model, str(tmp_path / "model.safetensors"))
    best = adapter.generate("The old king", [], 1)
    lines = [dict(context="The old king", word=best),
             *(dict(context=context, word=word) for context, word in zip(PASSAGES[:2], WORDS))]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "three.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tasks / "three.yaml").write_text(
        "task: three\ndataset_path: json\ntest_split: test\noutput_type: loglikelihood\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks}/three.jsonl}}}}\n"
        "doc_to_text: '{{context}}'\ndoc_to_target: '{{word}}'\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n")
    assert harness.main([str(tmp_path), "--tasks", "three", "--include", str(tasks), "--device",
                         "cpu", "--output", str(tmp_path / "out.json")]) == 0
    right = [greedy for _, greedy in adapter.loglikelihood(
        requests(*((line["context"], line["word"]) for line in lines)))]
    assert right[0] and json.loads((tmp_path / "out.json").read_text())["results"]["three"][
        "acc,none"] == pytest.approx(sum(right) / 3)
    assert "|three" in capsys.readouterr().out
    with pytest.raises(InputError, match="--output .*: No such file or directory"):
        harness.main([str(tmp_path), "--tasks", "three", "--include", str(tasks), "--device",
                      "cpu", "--output", str(tmp_path / "no/out.json")])
    with pytest.raises(InputError, match="--tasks: the harness has no task four"):
        harness.main([str(tmp_path), "--tasks", "four", "--include", str(tasks)])
