"""The stored experiments belong to the code that is there, and a row of them can be trained again."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch

from minillm.course import experiments
from minillm.course.experiments import alignment, classifying, families, instructing, positions, scaling, spikes, staleness, tuning, writing
from minillm.align.self_instruct import Task
from minillm.data.instructions import instructions
from minillm.data.loader import Loader
from minillm.data.prepare import DataConfig, prepare
from minillm.model.transformer import Transformer, num_params
from minillm.course.scaling_law import fit_scaling_law, residuals

EXPERIMENTS = {"positions": positions, "families": families, "scaling": scaling, "spikes": spikes, "staleness": staleness,
               "tuning": tuning, "classifying": classifying, "instructing": instructing, "alignment": alignment,
               "writing": writing}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_stored_rows_are_those_of_the_code(name):
    stored, code = experiments.results(name), EXPERIMENTS[name]
    assert list(stored["rows"]) == list(code.ROWS)
    for row, runs in stored["rows"].items():
        assert [run["seed"] for run in runs] == list(experiments.seeds_of(code, row))
        assert {run["parameters"] for run in runs} == {num_params(Transformer(code.ROWS[row], device="meta"))}
    assert stored["made"]["plan"]["steps"] == code.PLAN.steps and stored["made"]["command"].endswith(name)


def test_the_families_have_one_size():
    counts = [num_params(Transformer(config, device="meta")) for config in families.ROWS.values()]
    assert max(counts) / min(counts) < 1.04


def test_a_row_is_trained_and_measured(tmp_path):
    data = prepare(tmp_path, DataConfig(size=200_000), 512)
    seen = []
    model = experiments.train_row(positions.ROWS["rope"], replace(positions.PLAN, steps=3, batch_size=2), data, 128, 0,
                                  lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == [1, 2, 3] and seen[2][1] < seen[0][1]
    assert set(families.measure(model, data)) == {"loss", "above best"}


def test_a_probe_and_damaged_batches(tmp_path):
    data, probe = prepare(tmp_path, DataConfig(size=200_000), 512), spikes.Probe()
    asked = []

    def change(step, batch):
        asked.append(step)
        return spikes.damage(spikes.DAMAGED[step % 2], batch)

    plan = replace(spikes.PLAN, steps=6, batch_size=2)
    experiments.train_row(spikes.ROWS["damage: nothing"], plan, data, 128, 0, probe=probe, change=change)
    assert asked == [1, 2, 3, 4, 5, 6] and len(probe.found["losses"]) == 6
    # every fifth step; scores and log Z of a model that has hardly begun: V equal logits give ln 512 = 6.2
    assert [len(probe.found[key]) for key in ("norm", "score", "log Z")] == [1, 1, 1]
    assert 0 < probe.found["score"][0] < 20 and 5 < probe.found["log Z"][0] < 8


def test_damage_is_a_short_gram_over_and_over(tmp_path):
    data = prepare(tmp_path, DataConfig(size=200_000), 512)
    batch = next(Loader(data.train, batch_size=4, context=128))
    assert spikes.damage(spikes.DAMAGED.start - 1, batch) is batch
    bad = spikes.damage(spikes.DAMAGED.start, batch)
    assert bad.ids.shape == (4, 128) and torch.equal(bad.ids[:, 1:], bad.targets[:, :-1])
    for row in bad.ids:
        assert any(torch.equal(row[n:], row[:-n]) for n in range(1, 14))


@torch.no_grad()
def test_the_probe_sees_the_largest_score():
    # without positions the scores are the products of the two projections, which hooks can see
    model, kept = Transformer(replace(spikes.MODEL, pos="none"), seed=3), []
    ids = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    for block in model.blocks:
        for projection in (block.attention.q, block.attention.k):
            projection.register_forward_hook(lambda module, inputs, output: kept.append(output.unflatten(-1, (4, 16)).transpose(1, 2)))
    with spikes._Scores() as seen:
        model(ids)
    largest = max(float((q @ k.mT).tril().abs().max()) / 4 for q, k in zip(kept[::2], kept[1::2]))
    assert len(kept) == 6 and seen.largest == pytest.approx(largest, rel=1e-5)  # float32: another order of the products


def test_the_jump_of_a_curve():
    clean, bad = [3.0] * 150, [9.0] * 5
    assert spikes.jump(clean + bad + [4.5, 3.5] + [3.05] * 20) == pytest.approx((1.5, 2))
    assert spikes.jump(clean + bad + [4.5] * 20) == (1.5, None)


def test_the_spread_of_the_seeds():
    mean, deviation = experiments.spread("positions", "128")["rope"]
    assert 0.5 < mean < 2 and 0 < deviation < 0.2


def test_the_stored_law_and_the_size_held_out():
    points, held = scaling.runs(scaling.FITTED), scaling.runs(scaling.HELD_OUT)
    assert len(points) == 16 and len(held) == 2 and min(held)[0] > 2 * max(points)[0]
    best = experiments.results("scaling")["rows"]["width 24, 1M"][0]["best"]
    law, fixed = fit_scaling_law(points), fit_scaling_law(points, floor=best)
    # the seeds of short runs differ by 4 percent, and no law of this form is nearer to all of them than about 6
    for one in (law, fixed):
        assert 0.04 < math.sqrt(sum(r * r for r in residuals(one, points)) / 16) < 0.07
    # E is near the entropy, which no loss can be below; the predictions are low, by less than the residuals when E is free
    assert best < law.E < 1.2 * best
    for parameters, tokens, loss in held:
        assert 0.93 < law.loss(parameters, tokens) / loss < 1
        assert 0.85 < fixed.loss(parameters, tokens) / loss < law.loss(parameters, tokens) / loss


def test_what_calmed_the_stored_spikes():
    rows = experiments.results("spikes")["rows"]
    jumps = {row: [spikes.jump(run["losses"]) for run in runs] for row, runs in rows.items()}
    # the bands leave out nothing that was seen: 3.0 and 3.9 nats for 44 and 56 steps; a batch's own luck is 0.15
    assert all(up > 2.5 and back > 30 for up, back in jumps["damage: nothing"])
    assert all(abs(up) < 0.2 for up, _ in jumps["no damage"])
    for remedy in ("clipping", "beta2 0.95", "clipping, beta2 0.95"):
        assert all(up < 1 and back < 20 for up, back in jumps[f"damage: {remedy}"])
    for no_remedy in ("QK-norm", "z-loss", "warm-up 100"):
        assert all(up > 2.5 and back > 30 for up, back in jumps[f"damage: {no_remedy}"])
    # the high rate: scores grow some 40 times as large unless queries and keys have norms, and the loss stalls
    largest = {row: [max(run["score"]) for run in runs] for row, runs in rows.items()}
    assert min(largest["lr x 4: nothing"]) > 1000 and max(largest["no damage"] + largest["lr x 4: QK-norm"]) < 50
    assert min(run["loss"] for run in rows["lr x 4: nothing"]) > max(run["loss"] for run in rows["no damage"]) + 0.5


def test_more_parameters_and_more_tokens_always_helped():
    found = {row: loss for row, (_, _, loss) in zip(scaling.ROWS, scaling.runs(list(scaling.ROWS)))}
    for row, (width, millions) in scaling.SIZES.items():
        for smaller in (f"width {width}, {millions // 2}M", f"width {width - 8}, {millions}M", f"width {width - 16}, {millions}M",
                        f"width {width - 32}, {millions}M"):
            assert found.get(smaller, math.inf) > found[row]


def test_without_delay_a_pipeline_that_does_not_stop_is_plain_training(tmp_path):
    data, plan = prepare(tmp_path, DataConfig(size=100_000, val_fraction=0.1), 512), replace(staleness.PLAN, steps=4, lr=1e-2, warmup_steps=2)
    usual = experiments.train_row(staleness.MODEL, plan, data, staleness.CONTEXT, 3)
    models = {way: staleness.trained_late(*how, staleness.MODEL, plan, data, staleness.CONTEXT, 3) for way, how in staleness.WAYS.items()}
    for name, weight in usual.named_parameters():
        # float32, and AdamW's first steps divide a gradient by its own size: rounding is 1e-6 of a rate of 1e-2
        torch.testing.assert_close(models["no delay"].get_parameter(name), weight, rtol=1e-4, atol=1e-4)
    ends = [model.head.weight for model in models.values()]
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in ((ends[0], ends[1]), (ends[1], ends[2])))
    assert 4 < families.measure(models["stash"], data)["loss"] < 7


def test_what_late_gradients_cost():
    found = {row: mean for row, (mean, _) in experiments.spread("staleness", "loss").items()}
    best = {way: min(staleness.RATES, key=lambda rate: found[f"{way}, lr {rate:g}"]) for way in staleness.WAYS}
    assert best == {"no delay": 0.004, "stash": 0.002, "no stash": 0.002}
    # 2.82, 3.19 and 3.25 at these rates; at 0.004, 3.33 and 3.83. The seeds of the first two differ by 0.05 at most
    assert found["stash, lr 0.002"] - found["no delay, lr 0.004"] > 0.3
    assert abs(found["stash, lr 0.002"] - found["no stash, lr 0.002"]) < 0.1
    assert found["no stash, lr 0.004"] - found["stash, lr 0.004"] > 0.3
    assert abs(found["no stash, lr 0.0005"] - found["no delay, lr 0.0005"]) < 0.05


def test_a_tuning_is_what_its_row_says(tmp_path):
    data = prepare(tmp_path, DataConfig(size=60_000), tokenizer=tuning.tokenizer())
    for row in ("full fine-tuning", "QLoRA, r = 8"):
        seen = []
        model = tuning.TRAIN[row](tuning.ROWS[row], replace(tuning.PLAN, steps=2, batch_size=2), data, 128, 0,
                                  lambda *step: seen.append(step))
        found, stored = tuning.measure(model, data), experiments.results("tuning")["rows"][row][0]
        assert [step for step, _ in seen] == [1, 2] and found.keys() == stored.keys() - {"seed"}
        assert all(found[key] == stored[key] for key in ("parameters", "trained", "weights", "states"))
        assert found["states"] == 12 * found["trained"]


def test_the_names_that_are_asked_about_have_no_label(tmp_path):
    data = prepare(tmp_path, DataConfig(size=60_000), tokenizer=classifying.tokenizer())
    known, others = classifying.sentences(0)
    names = [{text.removesuffix(".").split()[-1] for text, _ in some} for some in (known, others)]
    assert names[0] and names[1] and not names[0] & names[1]
    ids, real, label = classifying.pad_left(known[:4])
    assert ids.shape == real.shape and real[:, -1].all() and len(label) == 4
    model = classifying.TRAIN["the head alone"](classifying.ROWS["the head alone"], replace(classifying.PLAN, steps=2), data, 64, 0)
    assert classifying.measure(model, data)["trained"] == 2 * model.model.config.width


def test_a_way_of_alignment_is_what_its_row_says():
    for row in ("PPO, 24 comparisons", "instruction tuning"):
        seen = []
        plan = replace(experiments.plan_of(alignment, row), steps=4)
        model, noted = alignment.TRAIN[row](alignment.ROWS[row], plan, None, alignment.CONTEXT, 0, lambda *round_: seen.append(round_))
        found, stored = alignment.measure(model, None) | noted, experiments.results("alignment")["rows"][row][0]
        assert found.keys() == stored.keys() - {"seed", "parameters"} and noted["answers"].keys() == stored["answers"].keys()
        assert [number for number, _ in seen] == ([1] if "PPO" in row else [])
    # what was not taught is the reference; a draw that falls between two tokens may fall otherwise on another machine
    assert found["kl"] == 0 and sum(found["answers"][asked] == said for asked, said in stored["answers"].items()) >= 10
    curves = experiments.results("alignment")["rows"]["PPO, 24 comparisons"][0]["curves"]
    assert curves["kl"][0] == 0 and all(len(curve) == 20 for curve in curves.values())


def test_dpo_learns_from_the_comparisons():
    seen, few = [], alignment.Way("dpo", pairs=64, lr=3e-4)
    plan = replace(alignment.PLAN, steps=12, lr=few.lr)
    model, noted = alignment.taught(few, alignment.ROWS["DPO"], plan, None, alignment.CONTEXT, 0, lambda step, loss: seen.append(loss))
    # ln 2 where policy and reference are one; six passes over 64 pairs are learned by heart
    assert seen[0] == pytest.approx(math.log(2), rel=1e-4) and seen[-1] < 0.6 and noted.keys() == {"answers"}
    assert alignment.measure(model, None)["kl"] > 0.02


def test_what_alignment_came_to():
    rows = experiments.results("alignment")["rows"]
    rule, exact = ({row: mean for row, (mean, _) in experiments.spread("alignment", key).items()} for key in ("rule", "exact"))
    before = rule["instruction tuning"]
    # seeds of rows that stay near the reference differ by 0.01 to 0.06; 1.40 before, then 1.56, 1.63 and 1.66
    assert all(rule[row] > before + 0.1 for row in ("DPO", "PPO", "PPO, 24 comparisons", "GRPO, a program checks"))
    assert exact["GRPO, a program checks"] > exact["instruction tuning"] > exact["GRPO"] + 0.02
    # without KL the reward model is more content in every seed, and the rule less by far: 1.00 and 0.65, seeds differ by 0.2
    for held in ("PPO", "PPO, 24 comparisons"):
        free = f"{held}, no KL"
        assert all(ours["reward"] > theirs["reward"] and ours["rule"] < theirs["rule"] - 0.3 for ours, theirs in zip(rows[free], rows[held]))
        assert all(run["kl"] > 1 for run in rows[free]) and all(run["kl"] < 0.5 for run in rows[held])


def test_the_world_understands_its_own_questions():
    for split in ("train", "test"):
        for one in islice(instructions(5, split, writing.KINDS), 1_000):
            assert writing.understood(one.question) == one
    assert writing.understood("3-50=").answer == "-47" and writing.understood("Take 3 from 50.").answer == "47"
    for strange in ("What is 63+35=", "Sort these numbers: 4 288?", "Add 1 and 2", "Say: ", "3+4= "):
        assert writing.understood(strange) is None


def test_what_the_world_says_of_proposals():
    seeds, learned = [Task("Add 3 and 4.", "7"), Task("Say: red lake", "red lake")], {"Add 3 and 4.", "12+30="}
    proposed = [Task("Add 3 and 5.", "8"), Task("12+30=", "42"), Task("Add 4 and 3.", "8"), Task("Name a fox", "Lily"), Task("Sort: 2 1", "")]
    found = writing.judged(proposed, seeds, learned, 0.7)
    assert {key: count for key, count in found.items() if count and key != "right of a kind"} == {
        "proposed, understood": 4, "proposed, right": 2, "proposed, right and its own": 1, "proposed, copied": 1, "kept, understood": 2,
        "kept, right": 1, "kept, copied": 1, "kept, a fact again": 1, "not new, another fact": 1}
    assert found["right of a kind"] == {"sum": [1, 2], "sort": [0, 0], "reverse": [0, 0], "repeat": [0, 0]}


def test_a_writer_is_what_its_row_says(monkeypatch):
    monkeypatch.setattr(writing, "REQUESTS", 2)
    for row in ("not tuned", "175 tasks"):
        seen, plan = [], replace(writing.PLAN, steps=2, batch_size=2)
        model, noted = writing.TRAIN[row](writing.ROWS[row], plan, None, writing.CONTEXT, 0, lambda step, loss: seen.append(step))
        found, stored = writing.measure(model, None) | noted, experiments.results("writing")["rows"][row][0]
        assert seen == ([1, 2] if "175" in row else []) and found.keys() == stored.keys() - {"seed", "parameters"}
        assert found["limit 0.7"]["requests"] == 2 and set(writing.COUNTED) < found["limit 0.7"].keys()
    assert writing.tasks(0, "train", 400)[:175] == writing.tasks(0, "train", 175)  # the seeds are among what is learned
    rows = writing.lists(writing.tasks(0, "train", 20), 3, 0)
    assert all(len(ids) <= writing.CONTEXT + 1 and all(learned) for ids, learned in rows)


def test_what_the_filters_let_through():
    rows = experiments.results("writing")["rows"]
    found = {row: {limit: {key: sum(run[limit][key] for run in runs) for key in ("proposed", "kept", *writing.COUNTED)}
                   for limit in ("limit 0.7", "limit 1")} for row, runs in rows.items()}
    for run in (run[limit] for runs in rows.values() for run in runs for limit in ("limit 0.7", "limit 1")):
        reasons = ("contradicts", "not new", "too short or too long")  # no other filter ever objected
        assert run["proposed"] == run["kept"] + sum(run.get(reason, 0) for reason in reasons)
        assert run["kept, understood"] == sum(asked for _, asked in run["right of a kind"].values())
    assert found["not tuned"]["limit 0.7"]["proposed"] == 0
    few, many = found["175 tasks"]["limit 0.7"], found["2,800 tasks"]["limit 0.7"]
    # what was right had been learned by heart, and is in the pool already
    assert few["proposed, right"] > 60 and few["proposed, right and its own"] == few["kept, right"] == few["kept, copied"] == 0
    assert many["kept"] > 0.7 * many["proposed"] and many["kept, understood"] > 0.98 * many["kept"] and many["kept, right"] < 0.1 * many["kept"]
    # ROUGE-L kept out new facts, and a repeated one is rare
    lost = sum(run["limit 0.7"]["not new"] for run in rows["2,800 tasks"])
    assert many["not new, another fact"] > 0.9 * lost and many["kept, a fact again"] < 0.05 * many["kept"]
    # one fact in eight is the test's, with a deviation of 0.02 over 264 tasks
    assert 0.06 < many["kept, of the test"] / many["kept, understood"] < 0.19
