"""minillm: a language model from bytes to a model that talks, small enough to read and real enough to run.

The names most used are here; everything else by its full path, so that an import line says where to read.
"""

from minillm.config import ModelConfig, ParallelConfig, TrainConfig
from minillm.infer.generate import generate
from minillm.model.families import preset
from minillm.model.huggingface import load_pretrained, save_pretrained
from minillm.model.transformer import Transformer
from minillm.parallel.launch import launch
from minillm.text.bpe import BPETokenizer

__all__ = ["BPETokenizer", "ModelConfig", "ParallelConfig", "TrainConfig", "Transformer", "generate", "launch",
           "load_pretrained", "preset", "save_pretrained"]
