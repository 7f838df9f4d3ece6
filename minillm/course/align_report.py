"""What alignment changed, before and after: a table as text for the terminal and as HTML for the report, and answers to read."""

import html

ROWS = (("exact_match", "right, and nothing else (greedy)", "{:.1%}"), ("rule", "the rule's score of a sampled answer, 0 to 2", "{:.2f}"),
        ("reward", "the reward model's score of it", "{:.2f}"), ("kl", "KL from the tuned model, nats an answer", "{:.2f}"),
        ("finished", "answers that come to an end", "{:.1%}"), ("told_loss", "loss on stories told on request, nats a token", "{:.3f}"),
        ("text_loss", "loss on the raw text of pretraining, nats a token", "{:.3f}"))
NAMES = {"ppo": "PPO", "dpo": "DPO", "grpo": "GRPO"}


def table(notes: dict) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(columns, rows) from the notes of alignment.json; what a model was not asked for is a dash."""
    stages = notes["stages"]
    columns = {"pretrained": stages["sft"]["before"], "tuned": stages["sft"]["after"]}
    for name in ("ppo", "dpo", "grpo"):
        if name in stages:
            columns |= {"tuned": columns["tuned"] | stages[name]["before"], NAMES[name]: stages[name]["after"]}
    rows = [(what, [form.format(measured[key]) if key in measured else "–" for measured in columns.values()]) for key, what, form in ROWS]
    return list(columns), [row for row in rows if set(row[1]) != {"–"}]


def sentences(notes: dict) -> list[str]:
    """What has no place in the table."""
    said, stages = [], notes["stages"]
    if "reward" in stages:
        best = stages["pairs"].get("best_accuracy")  # of comparisons from a file nobody knows it
        said.append(f"The reward model agrees with {stages['reward']['accuracy']:.1%} of held-out comparisons"
                    + (f", of which the noise allows {best:.1%}" if best else "")
                    + f"; its certainty is off by {stages['reward']['calibration_error']:.1%} on average.")
    said += [f"{NAMES[name]} wins {stages[name]['win_rate']:.1%} of comparisons with the tuned model by the rule; a tie counts half."
             for name in ("ppo", "dpo", "grpo") if name in stages]
    return said


def conversations(notes: dict) -> tuple[list[str], list[list[str]]]:
    """(columns, one row for each question): the same held-out questions, answered by each model."""
    asked = notes["stages"]["sft"]["answers"]
    columns = {"question": asked["question"], "pretrained": asked["before"], "tuned": asked["after"]}
    columns |= {NAMES[name]: notes["stages"][name]["answers"]["after"] for name in ("ppo", "dpo", "grpo") if name in notes["stages"]}
    columns["right"] = asked["right"]
    return list(columns), [list(row) for row in zip(*columns.values())]


def as_text(made: tuple[list[str], list[tuple[str, list[str]]]]) -> str:
    """A table for the terminal."""
    columns, rows = made
    width = max(len(what) for what, _ in rows)
    lines = [" " * width + "".join(f"{name:>12}" for name in columns)]
    return "\n".join(lines + [f"{what:<{width}}" + "".join(f"{value:>12}" for value in values) for what, values in rows])


def as_html(notes: dict) -> str:
    """The section of the report."""
    columns, rows = table(notes)
    asked, answered = conversations(notes)
    return f"""<h2>How it learned to answer</h2>
<p>Measured on held-out questions, none of which any stage has seen.</p>
{_html_table(["", *columns], [[what, *values] for what, values in rows])}
{''.join(f'<p>{html.escape(one)}</p>' for one in sentences(notes))}
<p>Sampled answers to the same questions:</p>
{_html_table(asked, answered)}
"""


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    """Cells with their text escaped."""
    def cells(tag: str, values: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"
    return f"<table>{cells('th', head)}{''.join(cells('td', row) for row in rows)}</table>"
