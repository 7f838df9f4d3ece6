from dataclasses import fields

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.config import ModelConfig
from minillm.model import families
from minillm.model.families import BY_SIZE, PRESETS, changes, preset
from minillm.model.huggingface import layout_for
from minillm.model.transformer import Transformer, num_params

# Published counts: what the checkpoints on Hugging Face's hub hold. (OPT's table has two more rows there, for padding.)
PUBLISHED = {
    "gpt1": 116_534_784, "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "bloom-560m": 559_214_592, "bloom-7b": 7_069_016_064, "bloom": 176_247_271_424, "gptj": 6_050_882_784,
    "gpt-neox": 20_554_567_680, "falcon-7b": 6_921_720_704, "opt-1.3b": 1_315_758_080 - 2 * 2048, "chatglm-6b": 6_173_286_400,
    "glm-4-9b": 9_399_951_360, "glm-4-9b-0414": 9_400_279_040, "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616, "llama-65b": 65_285_660_672, "llama2-7b": 6_738_415_616, "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248, "llama3.1-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496, "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400, "mistral-7b": 7_241_732_096, "mixtral-8x7b": 46_702_792_704, "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360, "qwen3-30b-a3b": 30_532_122_624, "olmoe-1b-7b": 6_919_161_856,
    "olmo2-7b": 7_298_617_344, "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984, "gemma2-27b": 27_227_128_320, "gemma3-1b": 999_885_952,
}
# Billions, as their papers round them: there are no weights to count.
ROUNDED = {"gpt3-6.7b": 6.7, "gpt3-13b": 12.9, "gpt3": 174.6, "mt-nlg": 530, "opt-13b": 12.9, "palm-8b": 8.63, "palm-62b": 62.50,
           "palm": 540.35, "falcon-40b": 41.3}


def counted(name: str) -> int:
    return num_params(Transformer(PRESETS[name], device="meta"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert counted(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_parameter_counts(name):
    assert counted(name) / 1e9 == pytest.approx(ROUNDED[name], rel=0.01)  # the papers' rounding


def test_every_preset_is_counted_but_the_courses_own():
    assert set(PRESETS) - set(PUBLISHED) - set(ROUNDED) == {"first"}


def small_enough_for_meta(name: str) -> bool:
    layout = layout_for(PRESETS[name])
    return layout is not None and layout.model_type != "chatglm"  # transformers has no class of its own for ChatGLM-6B


@pytest.mark.parametrize("name", [name for name in PRESETS if small_enough_for_meta(name)])
def test_hugging_face_builds_the_same_number_of_parameters(name):
    config, layout = PRESETS[name], layout_for(PRESETS[name])
    theirs = AutoConfig.for_model(layout.model_type, **layout.config_json(config), tie_word_embeddings=config.tied,
                                  bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    padding_rows = 2 * config.width if layout.model_type == "opt" else 0
    assert num_params(model) == counted(name) + padding_rows
    assert type(model).__name__ == layout.architecture


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'llama-7b'"):
        preset("lama-7b")
    assert preset("gpt2", layers=2).layers == 2


@pytest.mark.parametrize("name", BY_SIZE)
def test_names_by_size_say_the_size(name):
    assert name not in PRESETS and preset(name) == PRESETS[BY_SIZE[name]]
    number, unit = float(name.rpartition("-")[2][:-1]), {"m": 1e6, "b": 1e9}[name[-1]]
    # one unit of the last digit; the GPT-2 paper's table has 1,542M for what its checkpoint holds 1,558M of
    digit = 0.1 if "." in name else 1
    assert counted(BY_SIZE[name]) / unit == pytest.approx(number, abs=digit)


def test_a_name_by_size_is_suggested_too():
    with pytest.raises(ValueError, match="Did you mean 'gpt3-175b'"):
        preset("gpt3-157b")


def test_a_step_of_the_evolution_is_short():
    steps = [(families.gpt1, families.gpt2), (families.gpt2, families.gpt3), (families.gpt2, families.bloom), (families.gpt2, families.gptj),
             (families.gptj, families.palm), (families.palm, families.falcon), (families.gpt2, families.llama), (families.bloom, families.chatglm),
             (families.llama2, families.gemma), (families.llama2, families.mistral), (families.mistral, families.mixtral)]
    for before, after in steps:
        assert 1 <= len(changes(before, after)) <= 6, changes(before, after)
    assert changes(families.gpt1, families.gpt2) == {"block": ("post", "pre"), "final_norm": (False, True)}


def test_sizes_are_fields():
    assert set(families.SIZES) <= {f.name for f in fields(ModelConfig)}
