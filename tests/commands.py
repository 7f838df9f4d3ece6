"""For tests that type `minillm train`: the options of a tiny run, and how to start it, alone or under torchrun."""

import os
import subprocess
import sys

TRAIN = ["train", "--data.size", "40000", "--data.val-fraction", "0.2", "--model.vocab-size", "300", "--model.layers", "1",
         "--model.width", "16", "--model.heads", "2", "--model.context", "32", "--train.steps", "6", "--train.batch-size", "4",
         "--train.checkpoint-every", "2", "--train.eval-every", "2", "--train.device", "cpu"]


def start(*words, ranks=None, restarts=0):
    """A process, under torchrun when ranks are given (which starts all anew so often when one dies), whose standard output and error are pipes."""
    command = [sys.executable, "-m"]
    if ranks:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "-m"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen([*command, "minillm", *map(str, words)], env=environment | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)


def ended(process):
    """(exit code, standard output, standard error) of a process that ends by itself."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err
