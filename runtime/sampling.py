"""From logits to tokens: sampling parameters, the warpers they switch on, and the draw.

Every function here is pure in its row: what a row yields depends on its logits, its prefix and its absolute position,
never on the other rows. A draft tree may therefore evaluate its nodes together, and plain decoding one at a time.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..ir.errors import SmeltError
from . import noise


@dataclass(frozen=True)
class Context:
    """The tokens that each row has seen, for the repetition penalty.

    seen: bool [V], the committed tokens, shared by all rows (or [N, V] where rows belong to different requests).
    paths: int64 [N, P], the tokens from a tree's root down to each row's node; entries outside 0..V-1 are padding.
    A tree of N nodes so costs N short rows of ids, not N copies of a vocabulary.
    """

    seen: torch.Tensor | None = None
    paths: torch.Tensor | None = None


def tree_paths(tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    """`Context.paths` of a tree, int64 [N, depth + 1]; parents: int64 [N], node 0 is the root and its own parent.

    A row shorter than the deepest one repeats the root, which changes nothing for a set of seen tokens.
    """
    node = torch.arange(len(parents), device=parents.device)
    columns = [tokens]
    while node.any():
        node = parents[node]
        columns.append(tokens[node])
    return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; names, meaning and order of the steps are those of transformers' `generate`.

    temperature 0 is greedy: the repetition penalty holds, the warpers (which only shape a law to draw from) do not.
    Off: top_k 0, top_p 1, min_p 0, typical_p 1, repetition_penalty 1.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= _number(self.temperature) < math.inf, "0 (greedy) or above")
        _check("top_k", self.top_k, _is_int(self.top_k) and self.top_k >= 0, "a whole number, 0 (off) or above")
        _check("top_p", self.top_p, 0 <= _number(self.top_p) <= 1, "between 0 and 1 (off)")
        _check("min_p", self.min_p, 0 <= _number(self.min_p) <= 1, "between 0 (off) and 1")
        _check("typical_p", self.typical_p, 0 < _number(self.typical_p) <= 1, "above 0, at most 1 (off)")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < _number(penalty) < math.inf, "above 0 (1 is off)")
        _check("seed", self.seed, _is_int(self.seed) and 0 <= self.seed < 2**64, "a whole number from 0 to 2^64 - 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether a choice looks at nothing but a token's own logit, the temperature and noise."""
        return self.repetition_penalty == 1 and (self.greedy or self.unwarped)

    @property
    def unwarped(self) -> bool:
        """Whether no token is taken out of the law."""
        return not (self.top_k or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1)

    def process(self, logits: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        """The logits to choose from, float32 [N, V]; the input is left as it is. Forbidden tokens are -inf.

        `context` is needed only where `repetition_penalty` is on.
        """
        logits = logits.to(torch.float32)
        if self.repetition_penalty != 1:
            if context is None:
                raise ValueError("repetition_penalty needs the context: which tokens each row has seen")
            logits = penalize(logits, context, self.repetition_penalty)
        if self.greedy:
            return logits
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p > 0:
            logits = keep_min_p(logits, self.min_p)
        if self.typical_p < 1:
            logits = keep_typical(logits, self.typical_p)
        return logits


def penalize(logits: torch.Tensor, context: Context, penalty: float) -> torch.Tensor:
    """Divides the positive and multiplies the negative logits of seen tokens by `penalty`, once however often seen."""
    out = logits
    if context.seen is not None:
        out = torch.where(context.seen, _penalized(logits, penalty), logits)
    if context.paths is None:
        return out
    inside = (context.paths >= 0) & (context.paths < logits.shape[-1])
    ids = context.paths.clamp(0, logits.shape[-1] - 1)
    # Written from the raw logits, so that a token which is also in `seen`, or twice on the path, is penalized once.
    # A penalty moves logits one way only: min or max over the writers lets padding (±inf) lose without any branch.
    mode, padding = ("amin", math.inf) if penalty > 1 else ("amax", -math.inf)
    values = _penalized(logits.gather(1, ids), penalty).masked_fill(~inside, padding)
    return out.scatter_reduce(1, ids, values, mode)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keeps the k largest logits of each row, and all that tie with the last of them."""
    cut = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < cut, -math.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keeps the fewest most likely tokens whose probability reaches p, at least one; of tied tokens the later ids."""
    probability = logits.softmax(dim=-1)
    for room in _rooms(logits):
        # descending ids first, then a stable sort by logit: ties fall as in an ascending stable sort read backwards
        ids = logits.topk(room).indices.sort(descending=True).values
        head, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, order)
        before = F.pad(probability.gather(1, ids).cumsum(dim=-1)[:, :-1], (1, 0))
        kept = before < p
        kept[:, 0] = True
        # the last token kept must lie above the smallest in the head, which may tie with tokens outside of it
        last = head.gather(1, kept.sum(dim=-1, keepdim=True) - 1)
        if room == logits.shape[-1] or (last > head[:, -1:]).all():
            break
    return torch.full_like(logits, -math.inf).scatter_(1, ids, head.masked_fill(~kept, -math.inf))


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keeps the tokens at least p times as likely as the likeliest one (Nguyen et al., 2024)."""
    probability = logits.softmax(dim=-1)
    return logits.masked_fill(probability < p * probability.amax(dim=-1, keepdim=True), -math.inf)


def keep_typical(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """Keeps the tokens whose surprise is nearest to the entropy until their probability reaches `mass`, ties included.

    Locally typical sampling (Meister et al., 2023). The likeliest token may go: it can be less surprising than typical.
    """
    log_probability = logits.log_softmax(dim=-1)
    probability = log_probability.exp()
    entropy = -(log_probability * probability).nansum(dim=-1, keepdim=True)
    distance = (-log_probability - entropy).abs()
    for room in _rooms(logits):
        head, ids = distance.topk(room, largest=False)
        reached = probability.gather(1, ids).cumsum(dim=-1)
        if room == logits.shape[-1] or (reached[:, -1] >= mass).all():
            break
    last = (reached < mass).sum(dim=-1, keepdim=True).clamp(max=room - 1)
    return logits.masked_fill(distance > head.gather(1, last), -math.inf)


def choose(
    processed: torch.Tensor, sampling: Sampling, request: int | torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The chosen token of each row, int64 [N]: the argmax when greedy, else a draw from softmax(processed).

    processed: float32 [N, V] from `Sampling.process`. positions: int64 [N], the absolute positions that the chosen
    tokens will take. Of tied tokens the lowest id wins. Raises SmeltError where a row holds nothing to choose from.
    """
    if sampling.greedy and processed.device.type == "cpu" and processed.dtype is torch.float32:
        best = torch.from_numpy(processed.numpy().argmax(-1))  # one thread, a quarter of what torch takes; NaN wins
        _check_finite(processed.gather(1, best[:, None])[:, 0], positions)
        return best
    return choose_with_margin(processed, sampling, request, positions)[0]


def choose_with_margin(
    processed: torch.Tensor, sampling: Sampling, request: int | torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`choose`, and by how much the winner led: best minus second best score (with noise when sampling), float32 [N].

    Moving each processed logit by less than half the margin, and none to or from -inf, cannot change the token.
    """
    score, ids = (processed, None) if sampling.greedy else _noisy(processed, sampling.seed, request, positions)
    top = score.topk(min(2, score.shape[-1])).values
    _check_finite(top[:, 0], positions)
    best = score.argmax(dim=-1, keepdim=True)
    token = best if ids is None else ids.gather(1, best)
    margin = top[:, 0] - top[:, 1] if top.shape[-1] == 2 else torch.full_like(top[:, 0], math.inf)
    return token[:, 0], margin


def _check_finite(best: torch.Tensor, positions: torch.Tensor) -> None:
    """Refuses rows whose greatest score is no number."""
    bad = ~best.isfinite()
    if bad.any():
        row = int(bad.nonzero()[0])
        raise not_finite(row, int(positions[row]))


def not_finite(row: int, position: int) -> SmeltError:
    """What to raise where the greatest score of a row is no number."""
    return SmeltError(
        f"row {row} of the logits, position {position}, holds NaN or inf, or no allowed token: "
        "the model overflowed or has broken weights; try a wider dtype (float32 or bfloat16) for it"
    )


def _noisy(
    processed: torch.Tensor, seed: int, request: int | torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gumbel-max scores [N, M] and the ids they belong to; no ids means all of the vocabulary, in order."""
    vocabulary = processed.shape[-1]
    # the row maximum instead of log_softmax: same law, exact whatever the order of evaluation
    centred = processed - processed.amax(dim=-1, keepdim=True)
    on_cpu = processed.device.type == "cpu"
    allowed = int((processed != -math.inf).sum(dim=-1).amax()) if on_cpu else vocabulary
    if allowed > vocabulary // 8:
        return centred + noise.gumbel(seed, request, positions, vocabulary), None
    # few tokens survived the warpers: noise for them alone, in ascending order of id so that ties fall as before
    ids = centred.topk(max(allowed, 1)).indices.sort().values
    return centred.gather(1, ids) + noise.gumbel(seed, request, positions, ids), ids


def _penalized(logits: torch.Tensor, penalty: float) -> torch.Tensor:
    return torch.where(logits < 0, logits * penalty, logits / penalty)


def _rooms(logits: torch.Tensor) -> list[int]:
    """Sizes of head to try: on a CPU core a full sort of 32,000 logits takes 2 ms, the top 256 take 0.05 ms.

    Elsewhere only the full size, which needs no look at the values and so no synchronisation.
    """
    vocabulary = logits.shape[-1]
    smaller = (256, 4096) if logits.device.type == "cpu" else ()
    return [room for room in smaller if room < vocabulary] + [vocabulary]


def _number(value: object) -> float:
    """The value as a float; NaN, which fails every comparison, where it is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, value: object, holds: bool, range_: str) -> None:
    if not holds:
        raise SmeltError(f"sampling: {name} must be {range_}, got {value!r}")
