"""Lesson 18's exercises: the ranking loss, GAE, PPO's objective with its KL reward, DPO, and GRPO."""

import torch
from torch.nn import functional as F

from minillm.course.exercise import Draw, Exercise, Mutant, Test, Variant

COMMON = {"lesson": "18", "packages": ("torch", "numpy", "einops"), "rtol": 1e-4, "atol": 1e-5,
          "why": "float32: the same sums of numbers of size 1, in another order"}


def drive_loss(answer, learned, *others):
    """The loss, and its gradient in what is learned."""
    learned = learned.clone().requires_grad_()
    loss = answer(learned, *others)
    if loss.requires_grad:
        loss.backward()
    grad = learned.new_zeros(learned.shape) if learned.grad is None else learned.grad
    return {"loss": loss, "gradient": grad}


def answer_places(draw: Draw, rows: int, length: int) -> torch.Tensor:
    """Where each row's answer stands: after a prompt of 2 or 3 tokens, two to four tokens long, and padding behind."""
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        start = draw.int(2, 3)
        mask[row, start:start + draw.int(2, 4)] = True
    mask[0] = torch.arange(length) >= length - 3  # one without padding
    return mask


def written(draw: Draw, rows: int, spread: float = 0.4) -> tuple[torch.Tensor, ...]:
    """Log-probabilities of the same tokens three times, near one another, as of a policy now and then and of a reference."""
    base = -1.5 + 0.3 * draw.tensor(rows, 9)
    return *(base + spread * draw.tensor(rows, 9) for _ in range(3)), answer_places(draw, rows, 9)


# ranking_loss

def scores_at(scores, answer, where):
    """Each row's score at a place."""
    last = answer.shape[1] - 1 - answer.flip(1).int().argmax(1)
    if where == "mean":
        return (scores * answer).sum(1) / answer.sum(1)
    place = {"last": last, "first": answer.int().argmax(1), "column": torch.full_like(last, scores.shape[1] - 1), "early": last - 1,
             "prompt": answer.int().argmax(1) - 1, "start": torch.zeros_like(last)}[where]
    return scores[torch.arange(len(scores)), place]


def altered_ranking(where="last", sign=1.0, pairs="all", total="mean", safe=True, squash="log", order="groups"):
    """The mean over prompts of the mean over pairs; with arguments, with something wrong."""
    def loss(scores, answer, K):
        found = scores_at(scores, answer, where)
        found = found.view(-1, K) if order == "groups" else found.view(K, -1).T
        better, worse = torch.triu_indices(K, K, 1)
        if pairs != "all":
            keep = worse == better + 1 if pairs == "neighbours" else better == 0
            better, worse = better[keep], worse[keep]
        gap = sign * (found[:, better] - found[:, worse])
        each = {"log": -F.logsigmoid(gap) if safe else -torch.log(torch.sigmoid(gap)), "none": -gap, "sigmoid": 1 - torch.sigmoid(gap)}[squash]
        return {"mean": each.mean(), "sum": each.sum(1).mean(), "all": each.sum(), "K": each.sum(1).mean() / K,
                "K²": each.sum(1).mean() / K ** 2}[total]
    return loss


def ranking_inputs(draw: Draw, low: int = 3, high: int = 4, size: float = 1.5) -> tuple:
    K = draw.int(low, high)
    rows = K * draw.int(2, 3)
    return size * draw.tensor(rows, 9), answer_places(draw, rows, 9), K


RANKING = Exercise(
    name="ranking_loss", reference=altered_ranking(), driver=drive_loss, minutes=15, difficulty=1, **COMMON,
    tests=(Test("two answers to a prompt", lambda draw: ranking_inputs(draw, 2, 2), points=2), Test("several answers", ranking_inputs, points=2),
           Test("scores far apart", lambda draw: ranking_inputs(draw, 2, 4, 150.0))),
    hints=("answer is True from the answer's first token to its last: count from the end to find the last True of a row.",
           "One score a row, then .view(-1, K). torch.triu_indices(K, K, 1) gives the pairs (better, worse).",
           "-logsigmoid(better - worse), the mean over the pairs of a prompt and then over the prompts, which are equally many: one mean."),
    mutants=(Mutant(altered_ranking("first"), "The score is read at the answer's first token, which has not seen the rest. Read it at the last."),
             Mutant(altered_ranking("column"), "The score is read in the last column, which is padding for most rows. Read it at the answer's last token."),
             Mutant(altered_ranking("early"), "The score is read one token too early; the answer's last token counts, too."),
             Mutant(altered_ranking("prompt"), "The score is read at the prompt's last token: it says nothing of the answer."),
             Mutant(altered_ranking("start"), "The score is read at a row's first token, which has seen nothing."),
             Mutant(altered_ranking("mean"), "That is the mean score over the answer; only its last token, which has read it all, is asked."),
             Mutant(altered_ranking(sign=-1.0), "The loss is reversed: it falls when the worse answer has the higher score."),
             Mutant(altered_ranking(total="sum"), "A prompt's pairs are added up; take their mean, so that many answers do not make one prompt weigh more."),
             Mutant(altered_ranking(total="all"), "That is the sum over prompts and pairs; the mean over both is asked for."),
             Mutant(altered_ranking(total="K²"), "You divide by K², as if each answer were compared with itself and twice with the others. There are K(K-1)/2 pairs."),
             Mutant(altered_ranking(total="K"), "You divide by K, the number of answers. There are K(K-1)/2 pairs."),
             Mutant(altered_ranking(pairs="neighbours"), "Only neighbours in the order are compared: every answer should be above every one after it."),
             Mutant(altered_ranking(pairs="best"), "Only the best is compared with the others; they have an order among themselves, too."),
             Mutant(altered_ranking(safe=False), "sigmoid of a large negative number rounds to 0, whose logarithm is infinite: take logsigmoid at once."),
             Mutant(altered_ranking(squash="none"), "That is the difference itself, which can be made as large as one likes: take -logsigmoid of it."),
             Mutant(altered_ranking(squash="sigmoid"), "That is the probability of the wrong order; the loss is the negative logarithm of the right one's."),
             Mutant(altered_ranking(order="columns"), "Rows that stand one after another answer one prompt: the groups are .view(-1, K).")),
    variants={"best": Variant("only the best answer is compared with each of the others.", altered_ranking(pairs="best"))})


# gae

def altered_gae(sign=1.0, stops=("value", "advantage"), lam_used=True, decay_gamma=True, value_gamma=True, next_value=True, back=True,
                returned="both", same_value=False, baseline=True):
    """(advantages, returns); with arguments, with something wrong."""
    def run(rewards, values, ends, gamma, lam):
        places = range(rewards.shape[1])
        advantages, coming, value = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
        for t in reversed(places) if back else places:
            inside = ~ends[:, t]
            later = (values[:, t] if same_value else value) * (inside if "value" in stops else 1) * next_value
            surprise = rewards[:, t] + (gamma if value_gamma else 1) * later - baseline * values[:, t]
            fade = (gamma if decay_gamma else 1) * (lam if lam_used else 1)
            coming = sign * surprise + fade * coming * (inside if "advantage" in stops else 1)
            advantages[:, t], value = coming, values[:, t]
        returns = {"both": advantages + values, "advantages": advantages.clone(), "minus": advantages - values}[returned]
        return {"advantages": advantages, "returns": returns}
    return run


def drive_gae(answer, *inputs):
    """Both tensors, by name."""
    found = answer(*inputs)
    return found if isinstance(found, dict) else {"advantages": found[0], "returns": found[1]}


def gae_inputs(draw: Draw, several: bool = False) -> tuple:
    rows, length = draw.int(2, 4), draw.int(6, 9)
    ends = torch.zeros(rows, length, dtype=torch.bool)
    ends[:, -1] = True
    if several:
        for row in range(rows):
            ends[row, draw.int(1, 3)] = True
    return draw.tensor(rows, length), draw.tensor(rows, length) + 0.5, ends, 0.1 * draw.int(7, 9), 0.1 * draw.int(5, 8)


GAE = Exercise(
    name="gae", reference=altered_gae(), driver=drive_gae, minutes=15, difficulty=2, **COMMON,
    tests=(Test("one episode a row", gae_inputs, points=2), Test("episodes one after another", lambda draw: gae_inputs(draw, True), points=3)),
    hints=("Go from the last place to the first, and keep two things: the advantage and the value of the place behind.",
           "Where ends[:, t] is True, neither of the two counts: torch.where(ends[:, t], 0, ...) on both.",
           "surprise = r[t] + gamma * next value - V[t]; A[t] = surprise + gamma * lam * A[t+1]; the return is A + V."),
    mutants=(Mutant(altered_gae(sign=-1.0), "The sign is wrong: it is a good surprise when more came than the critic had guessed."),
             Mutant(altered_gae(stops=()), "You look across the end of an episode: neither value nor advantage of the next one belongs to this one."),
             Mutant(altered_gae(stops=("advantage",)), "The value behind an end still counts: it belongs to the next episode. There it is 0."),
             Mutant(altered_gae(stops=("value",)), "The advantage behind an end is still carried over: it belongs to the next episode."),
             Mutant(altered_gae(lam_used=False), "lambda is forgotten: A[t] = surprise + gamma · lambda · A[t+1]."),
             Mutant(altered_gae(decay_gamma=False), "What comes later fades by gamma · lambda; yours fades by lambda alone."),
             Mutant(altered_gae(value_gamma=False), "The next value is not discounted: gamma · V[t+1]."),
             Mutant(altered_gae(next_value=False), "The next place's value is missing: a step earns its reward and the place where it leads."),
             Mutant(altered_gae(same_value=True), "You take V[t] for the value of the next place: that is V[t+1]."),
             Mutant(altered_gae(baseline=False), "V[t] is not subtracted: an advantage is what came beyond the critic's guess."),
             Mutant(altered_gae(back=False), "You go from the front, so each place collects what came before it. An action has a share in what comes after it."),
             Mutant(altered_gae(returned="advantages"), "The returns are the advantages once more; what the critic is to learn is A + V."),
             Mutant(altered_gae(returned="minus"), "The return is A + V, not A - V.")))


# ppo_loss

def drive_ppo(answer, log_probs, old, reference, scores, mask, values, beta, clip):
    """The loss, its gradient, and the rewards that the answer was about to learn from."""
    log_probs, seen = log_probs.clone().requires_grad_(), []

    def advantages_of(rewards):
        seen.append(rewards.detach().clone())
        return (rewards.flip(1).cumsum(1).flip(1) - values) * mask
    loss = answer(log_probs, old, reference, scores, mask, advantages_of, beta, clip)
    if loss.requires_grad:
        loss.backward()
    grad = log_probs.new_zeros(log_probs.shape) if log_probs.grad is None else log_probs.grad
    return {"rewards": seen[-1] if seen else None, "loss": loss, "gradient": grad}


def altered_ppo(kl="old", charge=1.0, place="last", masked=True, ratio="old", choose="min", band="both", mean="tokens", sign=-1.0, detach=True):
    """KL reward, advantages, clipped objective; with arguments, with something wrong."""
    def loss(log_probs, old, reference, scores, answer, advantages_of, beta, clip):
        now = log_probs.detach() if detach else log_probs
        distance = {"old": old - reference, "now": now - reference, "reversed": reference - old}[kl]
        rewards = -charge * beta * distance * (answer if masked else 1)
        first = answer & (answer.cumsum(1) == 1)
        last = answer & (answer.flip(1).cumsum(1).flip(1) == 1)
        if place == "column":
            last = torch.zeros_like(last)
            last[:, -1] = True
        rewards = rewards + {"last": last, "column": last, "every": answer, "first": first}[place] * scores[:, None]
        advantages = advantages_of(rewards)
        against = {"old": old, "self": log_probs, "now": log_probs.detach(), "reference": reference, "upside down": old}[ratio]
        r = torch.exp(log_probs - against)
        r = torch.exp(old - log_probs) if ratio == "upside down" else r
        kept = {"both": r.clamp(1 - clip, 1 + clip), "above": r.clamp(max=1 + clip), "below": r.clamp(min=1 - clip), "none": r}[band]
        gain = {"min": torch.minimum(r * advantages, kept * advantages), "max": torch.maximum(r * advantages, kept * advantages),
                "clipped": kept * advantages}[choose]
        gain = gain * answer
        return sign * {"tokens": gain.sum() / answer.sum(), "all": gain.mean(), "rows": (gain.sum(1) / answer.sum(1)).mean(), "sum": gain.sum()}[mean]
    return loss


def ppo_inputs(draw: Draw, spread: float = 0.4) -> tuple:
    rows = draw.int(3, 5)
    log_probs, old, reference, answer = written(draw, rows, spread)
    return log_probs, old, reference, 2 * draw.tensor(rows), answer, draw.tensor(rows, 9), 0.1 * draw.int(2, 5), 0.1 * draw.int(1, 3)


ITSELF = "The ratio is 1 at every step, since you compare the policy with itself: divide by the probability under the policy that wrote, `old`."
PPO = Exercise(
    name="ppo_loss", reference=altered_ppo(), driver=drive_ppo, minutes=20, difficulty=3, **COMMON,
    tests=(Test("rewards, loss and gradient", ppo_inputs, points=6, cases=5),),
    hints=("First the rewards (B, T): -beta * (old - reference) on the answer's tokens, 0 elsewhere, and the score added at the last of them.",
           "ratio = exp(log_probs - old). The objective is the smaller of ratio * A and ratio.clamp(1 - clip, 1 + clip) * A.",
           "The loss is minus the sum of it over all answers' tokens, divided by their number. The rewards are numbers: no gradient goes through them."),
    mutants=(Mutant(altered_ppo(ratio="self"), "The ratio is taken between the policy and itself, gradient and all, so nothing can be learned: divide by `old`."),
             Mutant(altered_ppo(ratio="now"), ITSELF),
             Mutant(altered_ppo(ratio="reference"), "The ratio is taken to the reference; it belongs to the policy that wrote, `old`. The reference's place is in the reward."),
             Mutant(altered_ppo(ratio="upside down"), "The ratio is upside down: new over old."),
             Mutant(altered_ppo(kl="reversed"), "The KL is reversed: a token costs when the policy finds it likelier than the reference does."),
             Mutant(altered_ppo(charge=-1.0), "The KL is reversed: a token costs when the policy finds it likelier than the reference does."),
             Mutant(altered_ppo(kl="now"), "The KL is taken with the policy of now; rewards belong to the policy that wrote, and do not change while one learns from them."),
             Mutant(altered_ppo(kl="now", detach=False), "The rewards have a gradient: they should be made from `old`, and be numbers."),
             Mutant(altered_ppo(charge=0.0), "Nothing is paid for the distance to the reference: -beta · KL at each token."),
             Mutant(altered_ppo(masked=False), "Prompt and padding pay KL, too; only the answer's tokens were chosen by the policy."),
             Mutant(altered_ppo(place="column"), "The score lies in the last column, behind most answers. It comes with the answer's last token."),
             Mutant(altered_ppo(place="every"), "Each token gets the whole score; it comes once, with the last."),
             Mutant(altered_ppo(place="first"), "The score comes with the first token; it is known when the answer ends."),
             Mutant(altered_ppo(choose="max"), "You take the larger of the two, so that clipping is used just when it helps the policy to run away. Take the smaller."),
             Mutant(altered_ppo(choose="clipped"), "You use the clipped ratio alone: a mistake beyond the band then has no gradient to undo it. Take the smaller of both."),
             Mutant(altered_ppo(band="above"), "The ratio is kept below 1 + clip only; it should stay above 1 - clip as well."),
             Mutant(altered_ppo(band="below"), "The ratio is kept above 1 - clip only; it should stay below 1 + clip as well."),
             Mutant(altered_ppo(band="none"), "Nothing is clipped."),
             Mutant(altered_ppo(mean="all"), "The mean runs over prompts and padding, too: divide by the number of the answers' tokens."),
             Mutant(altered_ppo(mean="rows"), "That is the mean of the answers' means; here all tokens weigh alike."),
             Mutant(altered_ppo(mean="sum"), "That is the sum over the tokens; divide by their number."),
             Mutant(altered_ppo(sign=1.0), "The sign: a loss is minus the objective.")))


# dpo_loss

def altered_dpo(with_reference=True, swapped=False, beta_used="inside", length=False, masked=True, rows="turns", total="mean", safe=True,
                kind="dpo", flipped=False, both=True):
    """-ln sigmoid(beta · h); with arguments, with something wrong."""
    def loss(policy, reference, answer, beta):
        ratio = policy - reference if with_reference else policy
        ratio = reference - policy if flipped else ratio
        each = (ratio * (answer if masked else 1)).sum(1)
        each = each / answer.sum(1) if length else each
        chosen, rejected = each.view(-1, 2).unbind(1) if rows == "turns" else each.view(2, -1)
        h = chosen - rejected if both else chosen
        h = -h if swapped else h
        inside = beta * h if beta_used == "inside" else h
        found = -F.logsigmoid(inside) if safe else -torch.log(torch.sigmoid(inside))
        if kind == "ipo":
            found = (h - 1 / (2 * beta)).square()
        if kind == "sigmoid":
            found = -torch.sigmoid(inside)
        found = beta * found if beta_used == "outside" else found
        return found.mean() if total == "mean" else found.sum()
    return loss


def dpo_inputs(draw: Draw, size: float = 1.0) -> tuple:
    rows = 2 * draw.int(2, 3)
    policy, _, reference, answer = written(draw, rows, 0.6)
    return size * policy, size * reference, answer, 0.1 * draw.int(2, 6)


DPO = Exercise(
    name="dpo_loss", reference=altered_dpo(), driver=drive_loss, minutes=12, difficulty=2, **COMMON,
    tests=(Test("pairs of answers", dpo_inputs, points=4), Test("answers far apart", lambda draw: dpo_inputs(draw, 200.0))),
    hints=("Per row one number: the sum over the answer's tokens of policy - reference. Rows 0, 2, 4 … are the chosen ones.",
           "h = that of the chosen minus that of the rejected answer; the loss of a pair is -logsigmoid(beta * h).",
           "((policy - reference) * answer).sum(1).view(-1, 2), and the mean over pairs."),
    mutants=(Mutant(altered_dpo(with_reference=False), "The reference is missing: what counts is how much likelier an answer has become than it was there."),
             Mutant(altered_dpo(flipped=True), "The sign is wrong: chosen minus rejected, policy minus reference. Yours learns the rejected answers."),
             Mutant(altered_dpo(swapped=True), "The sign is wrong: chosen minus rejected, policy minus reference. Yours learns the rejected answers."),
             Mutant(altered_dpo(beta_used="outside"), "beta stands outside: it only scales the loss there. Inside the sigmoid it says how far from the reference an answer may go."),
             Mutant(altered_dpo(beta_used="nowhere"), "beta is not used."),
             Mutant(altered_dpo(length=True), "You divide by the answer's length; the probability of an answer is the sum of its tokens' logarithms."),
             Mutant(altered_dpo(masked=False), "Prompt and padding are counted; only the answer's tokens are."),
             Mutant(altered_dpo(rows="halves"), "Chosen and rejected stand in turns: rows 0, 2, 4 … are chosen, 1, 3, 5 … rejected."),
             Mutant(altered_dpo(total="sum"), "That is the sum; the mean over pairs is asked for."),
             Mutant(altered_dpo(safe=False), "sigmoid rounds to 0 far out, and its logarithm is infinite: take logsigmoid at once."),
             Mutant(altered_dpo(kind="sigmoid"), "That is the probability; the loss is its negative logarithm."),
             Mutant(altered_dpo(both=False), "Only the chosen answer counts in yours; its rejected twin is subtracted, so that what both share cancels."),
             Mutant(altered_dpo(kind="ipo"), "That is IPO's square; here it is -ln sigmoid(beta · h).")),
    variants={"IPO": Variant("the loss of a pair is IPO's, (h - 1 / (2 · beta))².", altered_dpo(kind="ipo"))})


# grpo_loss

def altered_grpo(baseline="group", scale="group", correction=1, eps=1e-4, estimate="k3", mean="answers", choose="min", penalty=1.0, ratio="old"):
    """Advantages from the group, clipped objective and KL in the loss; with arguments, with something wrong."""
    def loss(log_probs, old, reference, rewards, answer, clip, beta):
        middle = {"group": rewards.mean(1, keepdim=True), "batch": rewards.mean(), "none": 0.0, "others": rewards.mean(0, keepdim=True)}[baseline]
        size = {"group": rewards.std(1, keepdim=True, correction=correction), "batch": rewards.std(), "none": 1.0 - eps}[scale]
        advantages = ((rewards - middle) / (size + eps)).flatten()[:, None]
        against = {"old": old, "now": log_probs.detach()}[ratio]
        r = torch.exp(log_probs - against)
        both = r * advantages, r.clamp(1 - clip, 1 + clip) * advantages
        gain = torch.minimum(*both) if choose == "min" else torch.maximum(*both) if choose == "max" else both[0]
        d = reference - log_probs
        distance = {"k3": torch.exp(d) - d - 1, "k1": -d, "reversed": torch.exp(-d) + d - 1, "k2": d.square() / 2}[estimate]
        each = (-gain + penalty * beta * distance) * answer
        return {"answers": (each.sum(1) / answer.sum(1)).mean(), "tokens": each.sum() / answer.sum(), "all": each.mean(),
                "sum": each.sum(1).mean()}[mean]
    return loss


def grpo_inputs(draw: Draw) -> tuple:
    prompts, K = draw.int(2, 3), draw.int(3, 5)
    log_probs, old, reference, answer = written(draw, prompts * K)
    rewards = torch.tensor([[float(draw.int(0, 2)) for _ in range(K)] for _ in range(prompts)]) + torch.arange(prompts)[:, None]
    rewards[0] = torch.tensor([2.0, *[0.0] * (K - 1)])
    return log_probs, old, reference, rewards, answer, 0.1 * draw.int(1, 3), 0.1 * draw.int(2, 5)


def agreed_inputs(draw: Draw) -> tuple:
    log_probs, old, reference, rewards, *rest = grpo_inputs(draw)
    rewards[1] = 1.0  # all answers to the second prompt are alike
    return log_probs, old, reference, rewards, *rest


GRPO = Exercise(
    name="grpo_loss", reference=altered_grpo(), driver=drive_loss, minutes=18, difficulty=2, **COMMON,
    tests=(Test("some right, some wrong", grpo_inputs, points=4), Test("a prompt whose answers are all alike", agreed_inputs)),
    hints=("rewards is (B, K): mean(1, keepdim=True) and std(1, keepdim=True) are each prompt's own. Flatten the advantages to one a row.",
           "Per token: minus the smaller of ratio * A and clipped ratio * A, plus beta * (exp(d) - d - 1) with d = reference - log_probs.",
           "Zero outside the answer, the sum of a row divided by its number of answer tokens, and then the mean over rows."),
    mutants=(Mutant(altered_grpo(baseline="none"), "There is no baseline: subtract the mean of the prompt's answers, or a hard prompt's best answer looks bad."),
             Mutant(altered_grpo(baseline="batch", scale="batch"), "Mean and deviation are those of all answers; each prompt is to be compared with itself."),
             Mutant(altered_grpo(baseline="batch"), "The mean is that of all answers; each prompt has its own."),
             Mutant(altered_grpo(scale="batch"), "The deviation is that of all answers; each prompt has its own."),
             Mutant(altered_grpo(baseline="others"), "You take the mean over prompts; it runs over the K answers to one prompt, the second dim."),
             Mutant(altered_grpo(scale="none"), "The deviation is forgotten: divide by the group's standard deviation + 1e-4. (Dr. GRPO leaves it out on purpose.)"),
             Mutant(altered_grpo(correction=0), "The deviation divides by K - 1, as torch's std does."),
             Mutant(altered_grpo(eps=0.0), "When all answers to a prompt are alike the deviation is 0: add 1e-4 to it."),
             Mutant(altered_grpo(estimate="k1"), "The KL is the plain difference, which may be negative; here it is exp(d) - d - 1, with d = reference - policy."),
             Mutant(altered_grpo(estimate="reversed"), "The KL has its two models swapped: d is reference minus policy in exp(d) - d - 1."),
             Mutant(altered_grpo(estimate="k2"), "That is d²/2, a good estimate where the two are near; here it is exp(d) - d - 1."),
             Mutant(altered_grpo(penalty=0.0), "The distance to the reference costs nothing: + beta · KL."),
             Mutant(altered_grpo(penalty=-1.0), "The KL is subtracted from the loss, so distance pays: it is + beta · KL."),
             Mutant(altered_grpo(mean="tokens"), "All tokens weigh alike, so a long answer weighs more: divide each answer's sum by its own length, then take the mean."),
             Mutant(altered_grpo(mean="all"), "The mean runs over prompts and padding, too."),
             Mutant(altered_grpo(mean="sum"), "An answer's tokens are added up; divide by their number. (Dr. GRPO divides by the same number for all.)"),
             Mutant(altered_grpo(choose="max"), "You take the larger of the clipped and the unclipped; take the smaller."),
             Mutant(altered_grpo(choose="none"), "The ratio is not clipped."),
             Mutant(altered_grpo(ratio="now"), "The ratio is 1 whatever the policy does, since you divide by the policy of now: divide by `old`.")),
    variants={"Dr. GRPO": Variant("advantages are not divided by the deviation.", altered_grpo(scale="none"))})

EXERCISES = [RANKING, GAE, PPO, DPO, GRPO]
