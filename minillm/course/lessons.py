"""The lessons in reading order, and a picture of where one is."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from minillm.course.plots import COLOURS

PARTS = {
    "From bytes to a language model": ("00 start here", "01 tokenization", "02 attention", "03 transformer",
                                       "04 GPT-1 to LLaMA", "05 pretraining"),
    "One device": ("06 mixed precision", "07 memory"),
    "Many devices": ("08 collectives", "09 data parallel", "10 tensor parallel", "11 pipeline parallel", "12 ZeRO",
                     "13 3D parallel", "14 mixture of experts"),
    "Using it and steering it": ("15 inference", "16 LoRA and relatives", "17 instruction tuning", "18 RLHF",
                                 "19 capstone"),
}


def written(folder: str | Path = ".") -> set[str]:
    """Numbers of the lessons whose notebooks are in a folder."""
    return {path.name[:2] for path in Path(folder).glob("[0-9][0-9]_*.ipynb")}


def draw_map(here: str, folder: str | Path = ".") -> Axes:
    """All lessons by part: the one you are in filled, those that can be opened in colour, those to come in grey."""
    there = written(folder)
    ax = plt.figure(figsize=(7.4, 3.9)).gca()
    ax.axis("off")
    for column, (part, lessons) in enumerate(PARTS.items()):
        ax.text(column * 2.1, 0.75, part.replace("language", "\nlanguage").replace("and steering", "\nand steering"),
                fontsize=9, fontweight="bold", va="bottom")
        for row, lesson in enumerate(lessons):
            number = lesson[:2]
            colour = COLOURS[0] if number in there or number == here else "#AAAAAA"
            face = COLOURS[0] if number == here else "white"
            ax.add_patch(FancyBboxPatch((column * 2.1, -row - 0.1), 1.85, 0.55, boxstyle="round,pad=0.08",
                                        edgecolor=colour, facecolor=face, linewidth=1.5))
            ax.text(column * 2.1 + 0.05, -row + 0.17, lesson, fontsize=8.5, va="center",
                    color="white" if number == here else colour)
    ax.set(xlim=(-0.2, 8.4), ylim=(-6.5, 1.5))
    return ax
