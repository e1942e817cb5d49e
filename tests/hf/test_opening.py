"""What transformers trips over when it opens a directory is told in one line."""

import pytest
from transformers import AutoModelForCausalLM

from nemo_longctx.config import ConfigError
from nemo_longctx.hf.model import load_hf_model


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError(""), "ValueError: ValueError"),
        (KeyError(), "KeyError: KeyError"),
        (RuntimeError("\n  first\nsecond"), "RuntimeError: first"),
    ],
)
def test_the_first_line_of_an_error_is_told_or_its_kind(tmp_path, monkeypatch, error, said):
    def stop(source, **more):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stop)
    with pytest.raises(ConfigError, match=rf"transformers cannot load it \({said}\)") as caught:
        load_hf_model(tmp_path)
    assert caught.value.__cause__ is error
    assert "second" not in str(caught.value)


def test_what_is_wrong_in_the_files_of_a_known_family_is_told_instead(directory, monkeypatch):
    def stop(source, **more):
        raise RuntimeError("a word of transformers' own")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stop)
    folder = directory(hidden_act="none such")
    with pytest.raises(ConfigError, match="hidden_act") as caught:
        load_hf_model(folder)
    assert "a word of transformers' own" not in str(caught.value)
