import pytest

from minillm.model.families import PRESETS, preset
from minillm.model.transformer import Transformer, num_params

# Published counts: the Hugging Face checkpoints of openai-community/gpt2* and of LLaMA (arXiv:2302.13971 rounds them).
PUBLISHED = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
             "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-33b": 32_528_943_616,
             "llama-65b": 65_285_660_672, "llama2-70b": 68_976_648_192}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert num_params(Transformer(PRESETS[name], device="meta")) == PUBLISHED[name]


def test_every_preset_is_counted_but_the_courses_own():
    assert set(PRESETS) - set(PUBLISHED) == {"first"}


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'llama-7b'"):
        preset("lama-7b")
    assert preset("gpt2", layers=2).layers == 2
