"""Shape checking for the suite, and for the ranks that it starts: importing this file switches the import hook on.

The type checker is beartype, with an int accepted where a float is meant. `minillm.config` is left out: its own errors
for a wrong value are part of what is tested.
"""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
PARTS = ("data", "nn", "model", "train", "parallel", "infer", "peft", "plan", "layout", "engine", "zero_engine", "fsdp_engine",
         "torch_engine", "trainer", "align")
install_import_hook([f"minillm.{part}" for part in PARTS],
                    "shapes.checked")
