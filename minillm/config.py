"""The three configurations that say everything about a run: the model, its training, its layout.

Frozen dataclasses, so a variant is written as a difference: `replace(gpt2, norm="rms", pos="rope")`. Code branches
on these fields and never on the name of a model family. Impossible values are refused here, before any work is done.
"""

import difflib
from dataclasses import dataclass, fields
from typing import Literal

Biased = Literal["qkv", "out", "mlp", "norm", "head"]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. One letter per size, as everywhere: V, L, C, H, G, D, F, T."""

    vocab_size: int = 1024
    """V: number of token ids."""
    layers: int = 4
    """L: number of blocks."""
    width: int = 128
    """C: size of the residual stream."""
    heads: int = 4
    """H: query heads."""
    kv_heads: int | None = None
    """G: key and value heads, each shared by H/G query heads; None means as many as query heads."""
    head_dim: int | None = None
    """D: size of one head; None means width / heads."""
    ffn_width: int | None = None
    """F: width of the feed-forward layer; None means 4C, or 8C/3 when it is gated (the same parameters)."""
    context: int = 256
    """T: tokens in a training sequence, and the most that learned positions can count."""
    block: Literal["pre", "post", "parallel", "parallel2", "sandwich", "branch"] = "pre"
    """Where the norms stand: before each part; after each addition; once before both parts side by side (parallel), or
    once for each of them (parallel2); before and after each part (sandwich); or only after it (branch)."""
    norm: Literal["layer", "rms"] = "rms"
    """LayerNorm (mean and variance) or RMSNorm (root mean square only)."""
    norm_eps: float = 1e-5
    """Added to the variance before its root."""
    final_norm: bool = True
    """A norm before the output head."""
    embed_norm: bool = False
    """A norm after the embedding."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys before they are rotated: of each head, or of all heads at once."""
    residual_alpha: float = 1.0
    """DeepNorm: the stream is multiplied by this before each addition; for block = "post"."""
    mlp: Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"] = "swiglu"
    """Feed-forward activation; the last two are gated, with a third matrix."""
    experts: int = 0
    """E: feed-forward layers to choose from for each token; 0 means one for all."""
    top_k: int = 2
    """How many experts a token goes through."""
    norm_topk: bool = True
    """Whether the chosen experts' probabilities are made to sum to 1."""
    pos: Literal["none", "sinusoidal", "learned", "rope", "alibi", "relative"] = "rope"
    """Where positions come in: waves or a learned table added to the embedding; rotation of queries and keys; a fixed
    penalty on distance in the scores, or a learned one (T5's buckets); or nowhere."""
    relative_buckets: int = 32
    """pos = "relative": into how many buckets distances fall; half of them are exact."""
    relative_distance: int = 128
    """pos = "relative": from this distance on all fall into the last bucket."""
    rope_theta: float = 10_000.0
    """The longest wavelength of rotary positions is 2π · rope_theta tokens."""
    rope_theta_local: float | None = None
    """The same for layers with a window, if it is another."""
    rope_dim: int | None = None
    """How many numbers of each head are rotated; None means all."""
    rope_axes: Literal[1, 2] = 1
    """2: half of what is rotated turns by the place in the prompt, half by the place in the answer (ChatGLM-6B)."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """How rotary positions are stretched to texts longer than those of training; nn/positions.py has each."""
    rope_factor: float = 1.0
    """How many times longer."""
    rope_context: int | None = None
    """The length of training that is stretched; None means context / rope_factor."""
    rope_slow: float = 1.0
    """yarn, llama3: pairs that turn fewer times than this in rope_context tokens are slowed by the whole factor."""
    rope_fast: float = 32.0
    """yarn, llama3: pairs that turn more often than this are left alone."""
    pattern: str = "g"
    """Which layers are global (g) and which have a window (l), in turn: "gl" alternates."""
    window: int | None = None
    """How many tokens a layer with a window sees, itself included."""
    attn_scale: float | None = None
    """What scores are multiplied by; None means 1/√D."""
    attn_softcap: float | None = None
    """Scores are squeezed into ± this by a tanh."""
    logit_softcap: float | None = None
    """The same for the logits."""
    embed_scale: float = 1.0
    """What the embedding is multiplied by."""
    logit_scale: float = 1.0
    """What the logits are multiplied by."""
    bias: tuple[Biased, ...] = ()
    """Which parts have a bias."""
    tied: bool = True
    """Whether the output head is the embedding table itself."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    init_residual: bool = True
    """Divide the initial weights of projections into the residual stream by √(2L), as GPT-2 does."""

    def __post_init__(self):
        """Refuse sizes that cannot work, each with both numbers and the way out."""
        for name in ("vocab_size", "layers", "width", "heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1.")
        for name in ("kv_heads", "head_dim", "ffn_width", "rope_dim", "rope_context", "window", "top_k",
                     "relative_buckets"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1, or None for the default.")
        for name in ("norm_eps", "rope_theta", "rope_theta_local", "rope_factor", "rope_slow", "init_std", "residual_alpha",
                     "attn_scale", "attn_softcap", "logit_softcap", "embed_scale", "logit_scale"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0.")
        _check_choices(self)
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads. "
                             f"Use {_nearest_divisors(self.width, self.heads)} heads, or set head_dim.")
        if self.heads % self.kv_size:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_size} KV heads: heads must be a multiple "
                             f"of kv_heads. Nearest that work: kv_heads = {_nearest_divisors(self.heads, self.kv_size)}.")
        if self.pos == "rope" and self.head_size % 2 and self.rope_dim is None:
            raise ValueError(f"head size {self.head_size} is odd: rotary positions turn pairs of numbers. "
                             f"Use head_dim = {self.head_size + 1}, or pos = \"learned\".")
        _check_families(self)

    @property
    def kv_size(self) -> int:
        """G, the number of KV heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        """D, the size of one head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def rope_size(self) -> int:
        """How many numbers of each head are rotated."""
        return self.head_size if self.rope_dim is None else self.rope_dim

    def layer_kind(self, layer: int) -> str:
        """Whether a layer is global ("g") or has a window ("l")."""
        return self.pattern[layer % len(self.pattern)]

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer multiplies its activation by a second projection."""
        return self.mlp in ("swiglu", "geglu")

    @property
    def ffn_size(self) -> int:
        """F, the feed-forward width; a gated default is 8C/3 rounded up to a multiple of 8."""
        if self.ffn_width is not None:
            return self.ffn_width
        return -(-self.width * 8 // 24) * 8 if self.gated else 4 * self.width


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained: the batch, the optimizer, the schedule, and when to look at it and save it."""

    steps: int = 600
    """Optimizer steps in the run."""
    batch_size: int = 16
    """Sequences in one optimizer step, over all ranks."""
    microbatch_size: int | None = None
    """Sequences that go through the model at once; gradients are accumulated. None means the whole batch."""
    lr: float = 5e-3
    """Peak learning rate."""
    min_lr: float = 0.1
    """Final learning rate as a fraction of the peak."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How the learning rate falls after its warm-up; wsd stays at the peak and falls only at the end (cooldown)."""
    warmup_steps: int = 30
    """Steps over which the learning rate rises from 0 to its peak."""
    cooldown: float = 0.2
    """wsd: the share of all steps at the end in which the learning rate falls, in a straight line."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""
    decay_embeddings: bool = True
    """Whether tables of embeddings decay as other matrices do."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW: decay of the mean of squared gradients."""
    adam_eps: float = 1e-8
    """AdamW: added to the root of the second mean."""
    optimizer: Literal["fused", "by_hand", "muon", "adafactor"] = "fused"
    """torch's fused AdamW; the one written out in minillm/train/optim.py (the same numbers, slower); Muon for the blocks'
    matrices and AdamW for the rest; or Adafactor, which keeps a row and a column where AdamW keeps two matrices."""
    clip_norm: float = 1.0
    """Largest global norm of the gradients; 0 switches clipping off."""
    z_loss: float = 0.0
    """What ln² of the softmax's denominator adds to the loss: it keeps logits from drifting (PaLM: 1e-4)."""
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """What matrix products are computed in; weights and optimizer stay in float32. fp16 scales the loss; fp8 is emulated,
    for its numbers and not for speed."""
    master_weights: bool = False
    """bf16 and fp16: the model itself is kept in 16 bits, and the optimizer keeps float32 copies of its weights."""
    loss_scale: float | None = None
    """fp16: a fixed loss scale; None looks for the largest that does not overflow."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes a CUDA GPU if there is one, else the CPU."""
    compile: bool = False
    """Compile the model with torch.compile: seconds at the start, faster steps after."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    eval_every: int = 50
    """Steps between measurements of the validation loss."""
    eval_sequences: int = 128
    """Validation sequences measured each time; the last measurement uses the whole set."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """How many checkpoints to keep: the newest ones."""

    def __post_init__(self):
        """Refuse values that cannot work, each with the way out."""
        for name in ("steps", "batch_size", "eval_every", "eval_sequences", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1.")
        for name in ("warmup_steps", "weight_decay", "clip_norm", "min_lr", "seed", "z_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative.")
        for name in ("lr", "adam_eps", "cooldown", "loss_scale"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 0 and below 1.")
        _check_choices(self)
        if self.min_lr > 1 or self.cooldown > 1:
            raise ValueError(f"min_lr = {self.min_lr}, cooldown = {self.cooldown}: these are fractions of the peak rate and of "
                             f"the steps, so at most 1.")
        if self.master_weights and self.precision not in ("bf16", "fp16"):
            raise ValueError(f"master_weights with precision = {self.precision!r}: only 16-bit weights need wider copies. "
                             f"Use precision = \"bf16\" or \"fp16\".")
        if self.loss_scale is not None and self.precision != "fp16":
            raise ValueError(f"loss_scale = {self.loss_scale} with precision = {self.precision!r}: only fp16's gradients need "
                             f"scaling. Leave it out, or use precision = \"fp16\".")
        micro = self.microbatch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise ValueError(f"a batch of {self.batch_size} sequences does not divide into microbatches of {micro}. "
                             f"Nearest that work: {_nearest_divisors(self.batch_size, micro)}.")


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is laid out over ranks: dp · tp · pp of them. All axes have been run on CPUs over gloo only."""

    dp: int = 1
    """Data-parallel ranks: each sees its own share of every batch."""
    tp: int = 1
    """Tensor-parallel ranks: each holds a part of every matrix, and sees the same rows."""
    pp: int = 1
    """Pipeline ranks: each holds some of the layers; microbatches (--train.microbatch-size) pass through them."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """With pp: in which order each rank does its forwards and backwards."""
    chunks: int = 1
    """With schedule = "interleaved": stages on each rank."""
    sequence_parallel: bool = False
    """With tp: between the matrices, each of those ranks keeps only its share of the tokens, too."""
    zero: Literal[0, 1, 2, 3] = 0
    """With dp: what those ranks share out instead of each having it: the optimizer's states (1), gradients too (2), weights too (3)."""
    bucket_mb: float = 25.0
    """MiB of gradients that travel together between data-parallel ranks."""
    engine: Literal["ours", "torch"] = "ours"
    """What runs it: this package's code, or torch's DistributedDataParallel (with zero its FSDP2) and DTensor. --engine is short for it."""

    def __post_init__(self):
        """Refuse an axis without ranks, and buckets without room."""
        for axis in ("dp", "tp", "pp"):
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis} = {getattr(self, axis)}: every axis needs at least 1 rank.")
        _check_choices(self)
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel with tp = 1: it shares tokens out among tensor-parallel ranks. Use tp = 2 or more.")
        if self.zero and self.dp == 1:
            raise ValueError(f"zero = {self.zero} with dp = 1: it is data-parallel ranks that share out. Use dp = 2 or more.")
        if self.pp == 1 and self.schedule != "1f1b":
            raise ValueError(f"schedule = {self.schedule!r} with pp = 1: one rank has nobody to wait for. Use pp = 2 or more.")
        if (self.chunks > 1) != (self.schedule == "interleaved"):
            raise ValueError(f"schedule = {self.schedule!r} with chunks = {self.chunks}: interleaving, and nothing else, needs 2 or more "
                             f"stages a rank.")
        if self.bucket_mb <= 0:
            raise ValueError(f"bucket_mb = {self.bucket_mb}: must be above 0.")

    @property
    def world_size(self) -> int:
        """Ranks in all: the product of the axes."""
        return self.dp * self.tp * self.pp

    @property
    def axes(self) -> dict[str, int]:
        """The axes with more than one rank, and their sizes."""
        return {axis: size for axis in ("dp", "tp", "pp") if (size := getattr(self, axis)) > 1}

    def share(self, batch_size: int) -> int:
        """Sequences of a batch for each data-parallel rank. Raises: ValueError if it does not divide."""
        if batch_size % self.dp:
            below = batch_size // self.dp * self.dp
            raise ValueError(f"a batch of {batch_size} sequences does not divide over dp = {self.dp} ranks. Nearest that work: "
                             f"a batch of {f'{below} or ' if below else ''}{below + self.dp}, or dp = "
                             f"{_nearest_divisors(batch_size, self.dp)}.")
        return batch_size // self.dp


def from_dict(cls: type, values: dict, source: str = "configuration"):
    """Build a configuration from a dict; an unknown key is an error that suggests the nearest known one.

    Raises: ValueError for an unknown key or a value that the configuration refuses.
    """
    known = {field.name for field in fields(cls)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known keys: {', '.join(sorted(known))}."
            raise ValueError(f"{source}: {cls.__name__} has no field {key!r}.{hint}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _check_families(config: ModelConfig) -> None:
    """Refuse fields of a ModelConfig that contradict one another."""
    if config.pos == "rope" and (config.rope_size % (2 * config.rope_axes) or config.rope_size > config.head_size):
        raise ValueError(f"rope_dim = {config.rope_size}: with {config.rope_axes} axes it must be a multiple of "
                         f"{2 * config.rope_axes}, and at most the head size {config.head_size}.")
    if set(config.pattern) - set("gl") or not config.pattern:
        raise ValueError(f"pattern = {config.pattern!r}: write g for each global layer and l for each with a window.")
    if ("l" in config.pattern) != (config.window is not None):
        raise ValueError(f"pattern = {config.pattern!r} and window = {config.window}: layers marked l need a window, and a "
                         f"window needs layers marked l.")
    if config.residual_alpha != 1 and config.block != "post":
        raise ValueError(f"residual_alpha = {config.residual_alpha} with block = {config.block!r}: only the norm after each "
                         f"addition keeps a multiplied stream from growing without limit. Use block = \"post\".")
    if config.pos == "relative" and config.relative_distance <= config.relative_buckets // 2:
        raise ValueError(f"relative_distance = {config.relative_distance}: the first {config.relative_buckets // 2} distances have "
                         f"buckets of their own, so it must be larger.")
    if config.experts and not 1 <= config.top_k <= config.experts:
        raise ValueError(f"top_k = {config.top_k}: a token goes through 1 to {config.experts} of {config.experts} experts.")
    if (config.rope_scaling == "none") != (config.rope_factor == 1):
        raise ValueError(f"rope_scaling = {config.rope_scaling!r} and rope_factor = {config.rope_factor}: stretching needs "
                         f"both, and a factor other than 1.")
    if config.rope_slow >= config.rope_fast:
        raise ValueError(f"rope_slow = {config.rope_slow} must be below rope_fast = {config.rope_fast}.")


def _check_choices(config) -> None:
    """Hold every Literal field to its choices: a typo in a notebook must not train another model in silence."""
    for field in fields(config):
        value, choices = getattr(config, field.name), getattr(field.type, "__args__", ())
        if getattr(field.type, "__origin__", None) is Literal:
            chosen, options = (value,), choices
        elif field.name == "bias":
            chosen, options = value, Biased.__args__
        else:
            continue
        for one in chosen:
            if one not in options:
                near = difflib.get_close_matches(str(one), map(str, options), n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{field.name} = {one!r}: choose from {', '.join(map(str, options))}.{hint}")


def _nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` just below and just above `wanted`, as text."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(str(d) for d in below + above)
