"""The outer loop: it learns, the price of KL holds it, it goes on bit for bit, and ranks agree."""

import copy
from dataclasses import replace

import pytest
import torch
from answers import MODEL, PLAN
from ranks import functions_travel_by_value  # noqa: F401  a fixture

import minillm.align.online as online_loop
from minillm.align.online import Online, OnlineConfig, distance_from
from minillm.align.ppo import AdaptiveKL, whiten
from minillm.align.reward import Scorer
from minillm.align.rollout import sample
from minillm.config import ParallelConfig
from minillm.data.loader import IGNORED
from minillm.model.transformer import Transformer
from minillm.parallel.launch import launch
from minillm.peft.lora import LoraConfig, add_lora

CONFIG = OnlineConfig(rounds=12, prompts=8, answers=4, epochs=2, max_new_tokens=6, beta=0.02)
TRAIN = replace(PLAN, batch_size=16, lr=1e-2, steps=CONFIG.steps(16), warmup_steps=2)
PROMPTS = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14]] * 2
DIFFERENT = [[number, 5] for number in range(8)]


def even(asked, rollouts):
    """The share of even tokens, which is 1/2 by chance; what was asked belongs to its answer."""
    assert [prompt[0] for prompt in asked] == rollouts.batch.ids[:, 0].tolist()
    return torch.tensor([sum(token % 2 == 0 for token in answer) / 6 for answer in rollouts.answers])


def made(critic=True, config=CONFIG, parallel=ParallelConfig(), model=None, **changes):
    reference = Transformer(MODEL, seed=2)
    return Online(model or copy.deepcopy(reference), reference, even, (), config, replace(TRAIN, **changes), parallel,
                  critic=Scorer.of(reference) if critic else None)


def rounds(online, count):
    return [online.round(PROMPTS, PROMPTS) for _ in range(count)]


@pytest.mark.parametrize("critic", [True, False], ids=["ppo", "grpo"])
def test_it_learns_what_is_rewarded(critic):
    online = made(critic)
    found = rounds(online, 12)
    assert found[0]["reward"] == pytest.approx(0.5, abs=0.1) and found[-1]["reward"] > 0.7
    assert found[0]["kl"] == 0 and found[-1]["kl"] > 0.5 and ("critic_loss" in found[0]) == critic
    assert all(round_["length"] == 6 and round_["finished"] == 0 and round_["tokens"] == 8 * 4 * 6 for round_ in found)
    fresh = sample(online.policy.model, PROMPTS, 6, (), generator=torch.Generator().manual_seed(9))
    assert distance_from(online.reference, fresh) > 0.5  # the reference stays where it was


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "bf16", "master_weights": True}], ids=["autocast", "masters"])
def test_it_learns_in_16_bits(options):
    """The ratio is then off 1 by rounding where the training forward runs under autocast, and it still learns."""
    assert rounds(made(**options), 12)[-1]["reward"] > 0.6


def test_without_scaling_a_hundredth_of_the_reward_is_a_hundredth_of_the_gradient():
    def first_gradients(scaled):
        found = []
        for factor in (1.0, 0.01):
            online = made(False, replace(CONFIG, scaled=scaled, beta=0.0))
            online.reward = lambda asked, rollouts: factor * even(asked, rollouts)
            rollouts = sample(online.policy.model.eval(), [p for p in PROMPTS for _ in range(4)], 6, (), generator=torch.Generator().manual_seed(1))
            batch, _ = online._learned_from(rollouts, online.reward([p for p in PROMPTS for _ in range(4)], rollouts))
            online.policy.forward_backward(batch)
            found.append(online.policy.clip(0.0).item())
        return found[0] / found[1]
    assert first_gradients(False) == pytest.approx(100, rel=1e-3) and first_gradients(True) < 1.5  # float32


def test_the_reference_and_the_caller_s_critic_stay_as_they_are():
    online = made()
    before = copy.deepcopy(online.reference.state_dict())
    rounds(online, 2)
    assert all(torch.equal(before[name], weight) for name, weight in online.reference.state_dict().items())


@pytest.mark.parametrize("critic", [True, False], ids=["ppo", "grpo"])
def test_a_price_on_distance_holds_it_back(critic):
    gone = [rounds(made(critic, replace(CONFIG, beta=beta)), 10)[-1]["kl"] for beta in (0.0, 2.0)]
    assert gone[0] > 2 * gone[1]


def test_the_price_is_steered():
    near, far = ([round_["beta"] for round_ in rounds(made(config=replace(CONFIG, target_kl=target)), 4)] for target in (1e-4, 50.0))
    assert near[1:] == sorted(near[1:]) and near[-1] > near[1] and far == sorted(far, reverse=True) and far[-1] < far[0]


@pytest.mark.parametrize("critic", [True, False], ids=["ppo", "grpo"])
def test_stopped_after_two_rounds_it_goes_on_to_the_same_numbers(critic):
    def numbers(found):
        return [{name: value for name, value in round_.items() if not name.startswith("seconds")} for round_ in found]
    config = replace(CONFIG, target_kl=0.01) if critic else CONFIG  # beta moves
    whole, first, again = (made(critic, config) for _ in range(3))
    wanted = numbers(rounds(whole, 4))
    assert numbers(rounds(first, 2)) == wanted[:2]
    again.policy.load_weights(first.policy.whole_model().state_dict())
    again.load_state_dict(first.state_dict())
    assert numbers(rounds(again, 2)) == wanted[2:]
    assert all(torch.equal(a, b) for a, b in zip(again.policy.weights.values(), whole.policy.weights.values(), strict=True))


def test_an_adapter_learns_and_its_base_does_not():
    policy = Transformer(MODEL, seed=2)
    torch.nn.init.normal_(policy.embed.weight, std=0.3, generator=torch.Generator().manual_seed(1))  # frozen, so it has to be heard
    add_lora(policy, LoraConfig(rank=8, targets=("attention.*", "ffn.*")), seed=0)
    online = made(critic=False, model=policy, lr=3e-2)
    frozen = {name: weight.clone() for name, weight in policy.named_parameters() if not weight.requires_grad}
    assert rounds(online, 12)[-1]["reward"] > 0.6
    assert frozen and all(torch.equal(dict(policy.named_parameters())[name], weight) for name, weight in frozen.items())


def test_experience_is_asked_for_with_the_beta_of_the_round_and_lambda(monkeypatch):
    asked, experience = [], online_loop.experience

    def recorded(*args, **options):
        asked.append((args[4], options["lam"]))
        return experience(*args, **options)
    monkeypatch.setattr(online_loop, "experience", recorded)
    found = rounds(made(config=replace(CONFIG, target_kl=0.01, lam=0.7)), 4)
    assert asked == [(round_["beta"], 0.7) for round_ in found] and len(set(asked)) > 2
    price = AdaptiveKL(CONFIG.beta, 0.01)
    for round_ in found:
        assert round_["beta"] == price.beta
        price.update(round_["kl"], 8 * 4)


@pytest.mark.parametrize("critic, losses", [(True, {"ppo": (0.05,), "critic_loss": (0.05,)}), (False, {"grpo": (0.05, 0.3)})])
def test_the_losses_have_the_options(monkeypatch, critic, losses):
    given = {}
    for name in losses:
        real = getattr(online_loop, name)
        monkeypatch.setattr(online_loop, name, lambda *args, name=name, real=real: given.update({name: args}) or real(*args))
    made(critic, config=replace(CONFIG, clip=0.05, beta=0.3))
    assert given == losses


def test_every_round_rank_and_use_has_random_numbers_of_its_own():
    online, seeds = made(), []
    for online.rounds_done in range(3):
        for online.policy.rank in range(3):
            seeds += [online._generator("cpu", use).initial_seed() for use in (0, 1)]
    other = made(config=replace(CONFIG, seed=1))
    assert len(set(seeds)) == 18 and other._generator("cpu", 0).initial_seed() not in seeds


def on_ranks(me):
    found = {}
    for name, parallel, critic in (("ppo", ParallelConfig(dp=2), True), ("zero", ParallelConfig(dp=2, zero=2), True),
                                   ("grpo", ParallelConfig(dp=2), False)):
        online = made(critic, parallel=parallel)
        last = rounds(online, 8)[-1]
        found[name] = (last["reward"], last["kl"], {key: weight.detach().clone() for key, weight in online.policy.model.named_parameters()})
    values = torch.arange(12.0, dtype=torch.float64).view(2, 6).square()
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    found["white"] = whiten(values[me.rank:me.rank + 1], mask[me.rank:me.rank + 1], me.group)
    found["white alone"] = whiten(values, mask)[me.rank:me.rank + 1]
    asked, scored = [], []

    def recorded(prompts, rollouts):
        asked.extend(prompts)
        scored.append(even(prompts, rollouts))
        return scored[-1]
    online = made(True, parallel=ParallelConfig(dp=2), config=replace(CONFIG, target_kl=0.01))
    online.reward = recorded
    found["round"] = [online.round(DIFFERENT, DIFFERENT) for _ in range(2)]
    found["asked"], found["scored"] = asked, [float(scores.mean()) for scores in scored]
    seen = []
    online_loop.improve = lambda engine, batch, *rest: seen.append(batch) or [0.0]  # this process ends with the test
    rounds(made(True, parallel=ParallelConfig(dp=2)), 1)
    found["advantages"] = seen[0].advantages[seen[0].targets != IGNORED]
    return found


def test_ranks_share_a_round_and_end_with_the_same_policy():
    first, second = launch(on_ranks, 2, backend="gloo")
    for name in ("ppo", "zero", "grpo"):
        assert first[name][:2] == second[name][:2] and first[name][0] > 0.55
        for key, weight in first[name][2].items():
            assert torch.equal(weight, second[name][2][key])
    for key, weight in first["ppo"][2].items():  # float32: ZeRO-2 adds the ranks' gradients in another order
        torch.testing.assert_close(weight, first["zero"][2][key], rtol=1e-3, atol=1e-4)
    for rank in (first, second):  # float64, sums in another order
        torch.testing.assert_close(rank["white"], rank["white alone"], rtol=1e-12, atol=1e-12)
    assert sorted(first["asked"] + second["asked"]) == [prompt for prompt in DIFFERENT for _ in range(4 * 2)]
    price = AdaptiveKL(CONFIG.beta, 0.01)
    for number, (here, there) in enumerate(zip(first["round"], second["round"], strict=True)):
        own = [rank["scored"][number] for rank in (first, second)]
        assert here["reward"] == there["reward"] == pytest.approx(sum(own) / 2, rel=1e-12)
        assert here["beta"] == there["beta"] == price.beta  # steered by all answers, not by one rank's
        price.update(here["kl"], 8 * 4)
    assert first["scored"] != second["scored"]
    everyones = torch.cat([rank["advantages"].double() for rank in (first, second)])  # float32 before
    assert abs(everyones.mean()) < 1e-6 and everyones.std() == pytest.approx(1, abs=1e-6) and abs(first["advantages"].mean()) > 1e-3


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="8 prompts with 4 answers each make 32, which do not divide into minibatches of 12"):
        made(batch_size=12)
    with pytest.raises(ValueError, match="answers = 1, target_kl = None without a critic"):
        made(critic=False, config=replace(CONFIG, answers=1), batch_size=8)
    with pytest.raises(ValueError, match="answers = 4, target_kl = 1.0 without a critic"):
        made(critic=False, config=replace(CONFIG, target_kl=1.0))
    with pytest.raises(ValueError, match="zero = 3.*every rank needs the whole policy"):
        made(parallel=ParallelConfig(dp=2, zero=3))
    with pytest.raises(ValueError, match="7 prompts with 8 askers, and a round has 8"):
        made().round(PROMPTS[:7], PROMPTS)
    with pytest.raises(ValueError, match="epochs = 0: must be at least 1"):
        replace(CONFIG, epochs=0)
