"""One style for every figure: the Okabe-Ito colours, told apart by the colour-blind, and line styles for print.

Helpers return the axes, so that a lesson can add to them.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from minillm.parallel.mesh import groups
from minillm.plan.timeline import Timeline

# Okabe and Ito, "Color Universal Design" (2008), darkest first so that two lines differ in grey too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))


def use_style() -> None:
    """Make the course's style matplotlib's default from here on."""
    plt.rcParams.update({
        "figure.figsize": (7.0, 3.6), "figure.dpi": 100, "savefig.dpi": 150, "savefig.bbox": "tight",
        "figure.constrained_layout.use": True, "font.family": "DejaVu Sans", "font.size": 10.5,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#DDDDDD",
        "axes.axisbelow": True, "axes.titleweight": "bold", "axes.titlelocation": "left", "lines.linewidth": 1.8,
        "legend.frameon": False, "svg.hashsalt": "minillm",
        "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=STYLES),
    })


def loss_curve(train: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]], *,
               floor: float | None = None, start: float | None = None, title: str = "", ax: Axes | None = None) -> Axes:
    """Training and validation loss over steps, as (step, nats a token) pairs.

    floor: the best possible loss, drawn as a line with its name; start: the loss of a uniform guess.
    """
    ax = ax or plt.figure().gca()
    ax.plot(*zip(*train, strict=True), color=COLOURS[5], linestyle="-", linewidth=1, label="train, each step")
    ax.plot(*zip(*validation, strict=True), color=COLOURS[0], linestyle="-", marker="o", markersize=4, label="validation")
    # the floor's name stands on the left, where the curves are still far above it
    for level, name, style, side in ((start, "uniform guess", ":", 1), (floor, "best possible", "--", 0)):
        if level is not None:
            ax.axhline(level, color=COLOURS[1], linestyle=style, linewidth=1.4)
            ax.annotate(f"{name}: {level:.3f}", (side, level), xycoords=("axes fraction", "data"), va="bottom",
                        xytext=(3 - 6 * side, 1), textcoords="offset points", ha="right" if side else "left",
                        color=COLOURS[1])
    ax.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title, ylim=(0, None))
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    return ax


def bars(names: Sequence[str], values: Sequence[float], *, unit: str = "", title: str = "", fmt: str = "{:,.3g}",
         ax: Axes | None = None) -> Axes:
    """Horizontal bars with each value written at its end, the first on top."""
    ax = ax or plt.figure(figsize=(7.0, 0.42 * len(names) + 1.1)).gca()
    drawn = ax.barh(range(len(names)), values, color=COLOURS[0])
    ax.bar_label(drawn, labels=[fmt.format(value) for value in values], padding=4)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.12)
    ax.set(xlabel=unit, title=title)
    return ax


def tables(pictures: Mapping[str, Sequence], *, labels: Sequence[str] | None = None, rows: str = "query", columns: str = "key",
           signed: bool = False) -> list[Axes]:
    """Square tables of numbers side by side, dark where they are large; signed ones in two colours around 0."""
    figure, axes = plt.subplots(1, len(pictures), figsize=(2.35 * len(pictures) + 0.4, 2.7), squeeze=False)
    for ax, (title, numbers) in zip(axes[0], pictures.items()):
        numbers = numbers.numpy() if hasattr(numbers, "numpy") else numbers
        most = max(abs(float(numbers.min())), abs(float(numbers.max()))) or 1.0
        scale = {"cmap": "PuOr", "vmin": -most, "vmax": most} if signed else {"cmap": "Blues", "vmin": 0, "vmax": most}
        ax.imshow(numbers, **scale)
        ax.grid(visible=False)
        ax.set_title(title, fontsize=10)
        ax.set(xlabel=columns, ylabel=rows if ax is axes[0][0] else "")
        if labels:
            ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
            ax.set_yticks(range(len(labels)), labels if ax is axes[0][0] else [], fontsize=8)
    return list(axes[0])


def tree(parents: Mapping[str, str], labels: Mapping[str, str], *, title: str = "") -> Axes:
    """Who came from whom, from left to right: child -> parent, with a word or two under each name."""
    children: dict[str, list[str]] = {}
    for child, parent in parents.items():
        children.setdefault(parent, []).append(child)
    places: dict[str, tuple[float, float]] = {}

    def place(name: str, depth: int, row: float) -> float:
        below = row
        for child in children.get(name, ()):
            below = place(child, depth + 1, below)
        places[name] = (depth, row)
        return max(below, row + 1)

    rows = 0.0
    for root in dict.fromkeys(parent for parent in parents.values() if parent not in parents):
        rows = place(root, 0, rows)
    ax = plt.figure(figsize=(8.4, 0.5 * rows + 0.6)).gca()
    ax.axis("off")
    for child, parent in parents.items():
        (x, y), (px, py) = places[child], places[parent]
        ax.plot([px + 0.02, px + 0.82, px + 0.82, x], [-py, -py, -y, -y], color="#AAAAAA", linestyle="-", linewidth=1, zorder=0)
    for name, (x, y) in places.items():
        ax.text(x, -y, f" {name} ", fontsize=9.5, va="center", fontweight="bold", color="white",
                bbox=dict(boxstyle="round,pad=0.25", facecolor=COLOURS[0], edgecolor="none"))
        ax.text(x + 0.02, -y - 0.44, labels.get(name, ""), fontsize=7.5, va="center", color="#444444")
    ax.set(xlim=(-0.1, max(x for x, _ in places.values()) + 0.9), ylim=(-rows + 0.1, 0.7), title=title)
    return ax


def mesh_picture(world: int, *, title: str = "", **degrees: int) -> Axes:
    """Who sits where: a square per rank, the tensor axis across, the pipeline down, all other axes side by side.

    A frame is a tensor group; squares of one colour in a row are a data group; a column of squares is a pipeline group.
    """
    lines = groups(world, **degrees)
    sizes = {axis: len(of_axis[0]) for axis, of_axis in lines.items()}
    stages, wide = sizes.get("pp", 1), sizes.get("tp", 1)
    across = world // stages
    ax = plt.figure(figsize=(min(0.8 * (across + 0.35 * across / wide) + 0.8, 12), 0.75 * stages + 0.7)).gca()
    colours = {rank: number % len(COLOURS[:6]) for number, line in enumerate(lines["dp"]) for rank in line}
    for rank in range(world):
        column, stage = rank % across, rank // across
        x, y = column + 0.35 * (column // wide), -stage
        ax.add_patch(plt.Rectangle((x + 0.06, y + 0.08), 0.88, 0.8, facecolor=COLOURS[colours[rank]], edgecolor="none"))
        ax.text(x + 0.5, y + 0.48, str(rank), ha="center", va="center", color="white", fontweight="bold")
        if column % wide == 0 and wide > 1:
            ax.add_patch(plt.Rectangle((x, y), wide, 0.96, facecolor="none", edgecolor="#444444", linewidth=1.2))
    for stage in range(stages if stages > 1 else 0):
        ax.text(-0.15, 0.48 - stage, f"stage {stage}", ha="right", va="center", fontsize=9)
    ax.set(xlim=(-1.2 if stages > 1 else -0.1, across + 0.35 * across / wide), ylim=(0.9 - stages, 1.1), aspect="equal",
           title=title)
    ax.axis("off")
    return ax


# forward, backward or its first part, the part for weights, the update
ACTIONS = {"forward": COLOURS[0], "backward": COLOURS[1], "backward_input": COLOURS[1], "backward_weight": COLOURS[2],
           "update": COLOURS[6]}


def gantt(timeline: Timeline, *, title: str = "", unit: str = "", scale: float = 1.0, until: float | None = None,
          ax: Axes | None = None) -> Axes:
    """Who works when: a row a rank, a box an action with its microbatch's number, later chunks of a rank in lighter colours.

    Forwards are blue, backwards orange, their separate part for weights green, updates black. unit and scale: of the time
    axis, such as "ms" and 1000; until: where it ends, so that two can be compared.
    """
    ax = ax or plt.figure(figsize=(9.2, 0.42 * timeline.ranks + 0.9)).gca()
    begun = min(timed.start for timed in timeline.actions)
    end = until or timeline.makespan * scale
    chunks = 1 + max(timed.action.stage for timed in timeline.actions) // timeline.ranks
    for action, start, stop in timeline.actions:
        chunk, rank = divmod(action.stage, timeline.ranks)
        pale = 0.65 * chunk / chunks
        colour = [pale + (1 - pale) * part for part in to_rgb(ACTIONS[action.kind])]
        left, width = (start - begun) * scale, (stop - start) * scale
        ax.barh(-rank, width, left=left, height=0.82, color=colour, edgecolor="white", linewidth=0.6)
        if width > 0.009 * end * len(str(action.microbatch)):
            ax.text(left + width / 2, -rank - 0.04, action.microbatch, ha="center", va="center", fontsize=7.5,
                    color="black" if pale else "white")
    ax.set(xlim=(0, end), ylim=(0.55 - timeline.ranks, 0.55), xlabel=unit, title=title)
    ax.set_yticks([-rank for rank in range(timeline.ranks)], [f"rank {rank}" for rank in range(timeline.ranks)])
    ax.grid(visible=False)
    return ax
