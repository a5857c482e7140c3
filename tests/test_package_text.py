"""Texts that ship with packages: whole documents, each once, in an order that stays."""
import numpy as np
import pytest

from data.text_to_bin import END_OF_TEXT, InputError, gpt2_encoding
from experiments import package_text
from experiments.package_text import LICENCE, PAGE, SOURCES, documents, tokens_of


@pytest.fixture
def three(monkeypatch):
    """Make three documents of code, one of them twice and one too short to count."""
    texts = dict(b="x = 1\n" * 50, a="y = 22\n" * 50, again="x = 1\n" * 50, short="z")
    monkeypatch.setitem(SOURCES, "code", lambda: iter(texts.items()))
    return texts


def test_documents_stand_once_and_begin_with_50256(three, monkeypatch):
    found = documents("code")
    assert sorted(found) == sorted({three["a"], three["b"]})
    monkeypatch.setitem(SOURCES, "code", lambda: iter([*three.items()][::-1]))
    assert documents("code") == found
    encode = gpt2_encoding().encode_ordinary
    whole = [token for text in found for token in (END_OF_TEXT, *encode(text))]
    np.testing.assert_array_equal(tokens_of("code", 10**6), whole)
    np.testing.assert_array_equal(tokens_of("code", 100), whole[:100])


def test_a_source_without_documents_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(SOURCES, "code", lambda: iter(()))
    with pytest.raises(InputError, match="--text code: no installed package has any"):
        tokens_of("code", 10)
    monkeypatch.setattr(package_text, "PLAYS", tmp_path / "none.bin")
    with pytest.raises(InputError, match="--text plays: .* run python data/shakespeare.py"):
        tokens_of("plays", 10)


@pytest.mark.parametrize("name, pattern", (
    ("x-1.dist-info/LICENSE", LICENCE), ("x-1.dist-info/licenses/COPYING.txt", LICENCE),
    ("x-1.dist-info/METADATA", PAGE), ("x/README.md", PAGE)))
def test_names_tell_licences_from_pages(name, pattern):
    assert pattern.search(name) and not (LICENCE if pattern is PAGE else PAGE).search(name)


@pytest.mark.slow
def test_this_machine_has_licences_and_pages():
    for source in ("licences", "documentation"):
        assert len(tokens_of(source, 1000)) == 1000
