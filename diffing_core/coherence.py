"""Whether texts are still language: cheap measures that need no judge.

    mean_logprob_base = mean log p_base(token) over the tokens said, nats      perplexity_base = exp(−mean)
    distinct_n        = distinct n-grams of words / n-grams, over all texts
    repeated_share    = mean over texts of the share of word pairs that the same text already had
    finished_share    = texts that the model ended by itself                    mean_tokens = their length
    coherence         = mean over texts of c(t), the grade of one text

    c(t) = share of the base's answers b with s(b) <= s(t)        s(t) = min(p_logprob(t), p_repeated(t))
    p_logprob(t)  = share of them that the base finds no likelier than t      p_repeated(t) = share that repeat no less

A text that nobody would write is unlikely under the base, or likely and repetitive; so both are to be read. The grade of a
text is its place among what the base itself said in the same run: 0 is odder than all of that, and of the base's own
answers a share of at most q has a grade of q or less. It is no verdict on new content: what only the finetune says is
unlikely under the base too, so grades of the tuned model are where those of edited models are compared from. Measures of
models are rows, not columns: a judge's opinion is one more row.

Shapes: B texts, T positions, N places or texts, R texts of the base, D model width, V vocabulary.
Reference: Li et al. 2016 (distinct-n); Holtzman et al. 2020 (repetition and likelihood).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from diffing_core.blocks import rows_per_block
from diffing_core.generation import Generation
from diffing_core.lazy import torch
from diffing_core.subject import Subject

TOKENS_PER_BATCH = 4096
_ROUNDING = 1e-4  # nats/token by which the batch that a text is scored in moves its mean


def mean_logprobs(subject: Subject, written: Sequence[Generation]) -> list[float | None]:
    """Mean log-probability per token of each answer after its prompt, in nats; None for an answer of no known token.

    Tokens that the subject's vocabulary lacks end the part that is scored.
    """
    ids = [(*each.prompt_ids, *_known(each.answer_ids, subject.vocab_size)) for each in written]
    means: list[float | None] = [None] * len(written)
    todo = sorted((n for n, each in enumerate(written) if len(ids[n]) > len(each.prompt_ids)), key=lambda n: len(ids[n]))
    while todo:
        n_rows = max(1, TOKENS_PER_BATCH // len(ids[todo[-1]]))
        chosen, todo = todo[-n_rows:], todo[:-n_rows]
        sums = _sums(subject, [ids[n] for n in chosen], [len(written[n].prompt_ids) for n in chosen])
        for n, total in zip(chosen, sums, strict=True):
            means[n] = total / (len(ids[n]) - len(written[n].prompt_ids))
    return means


def mean_over_tokens(written: Sequence[Generation], logprobs: Sequence[float | None]) -> float | None:
    """The mean over all tokens from the means of single answers."""
    scored = [(value, len(each.answer_ids)) for each, value in zip(written, logprobs, strict=True) if value is not None]
    return float(np.average([value for value, _ in scored], weights=[n for _, n in scored])) if scored else None


def measures(
    written: Sequence[Generation], words: Sequence[Sequence[str]], logprobs: Sequence[float | None]
) -> dict[str, tuple[float, int]]:
    """Value and number of texts behind it, by measure; a measure without any text is left out."""
    found = {
        "finished_share": (float(np.mean([each.finished for each in written])), len(written)),
        "mean_tokens": (float(np.mean([each.n_tokens for each in written])), len(written)),
    }
    mean = mean_over_tokens(written, logprobs)
    if mean is not None:
        n_scored = sum(value is not None for value in logprobs)
        found |= {"mean_logprob_base": (mean, n_scored), "perplexity_base": (math.exp(-mean), n_scored)}
    singles = [word for text in words for word in text]
    pairs = [list(pairwise(text)) for text in words if len(text) > 1]
    if singles:
        found["distinct_1"] = (len(set(singles)) / len(singles), len(words))
    if pairs:
        joined = [pair for text in pairs for pair in text]
        found["distinct_2"] = (len(set(joined)) / len(joined), len(pairs))
        found["repeated_share"] = (float(np.mean([repeated_share(text) for text in words if len(text) > 1])), len(pairs))
    return found


def repeated_share(words: Sequence[str]) -> float | None:
    """Share of a text's word pairs that it already had; None for less than two words."""
    pairs = list(pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else None


def distinct_share(words: Sequence[str]) -> float | None:
    """Distinct words over words; None for a text without any."""
    return len(set(words)) / len(words) if words else None


def grades(
    logprobs: Sequence[float | None],
    repeated: Sequence[float | None],
    base_logprobs: Sequence[float | None],
    base_repeated: Sequence[float | None],
) -> list[float | None]:
    """The grade c of each text, from its mean log p_base and its repeated share, among the base's own answers.

    None for a text without a log-prob; all None if the base said nothing. Texts too short to repeat repeat nothing.
    """
    base_R2 = _oddities(base_logprobs, base_repeated)
    text_N2 = _oddities(logprobs, repeated)
    if not len(base_R2):
        return [None] * len(logprobs)
    base_R, text_N = (np.minimum(*_shares(each_N2, base_R2)) for each_N2 in (base_R2, text_N2))
    found = iter((base_R[None] <= text_N[:, None]).mean(1).tolist())
    return [None if value is None else next(found) for value in logprobs]


def _oddities(logprobs: Sequence[float | None], repeated: Sequence[float | None]) -> np.ndarray:
    """What is odd about each scored text, [N, 2]: −log p and repeated share."""
    scored = [(-value, share or 0.0) for value, share in zip(logprobs, repeated, strict=True) if value is not None]
    return np.asarray(scored, float).reshape(-1, 2)


def _shares(text_N2: np.ndarray, base_R2: np.ndarray) -> np.ndarray:
    """Share of the base's texts that are at least as odd as each text, [2, N]."""
    return (base_R2[None] >= text_N2[:, None] - (_ROUNDING, 1e-9)).mean(1).T


def _known(answer_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    end = next((place for place, token in enumerate(answer_ids) if token >= vocab_size), len(answer_ids))
    return tuple(answer_ids[:end])


def _sums(subject: Subject, rows: list[tuple[int, ...]], starts: list[int]) -> list[float]:
    """Σ log p of each row's tokens from its start on."""
    width = max(map(len, rows))
    token_BT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BT = torch.zeros_like(token_BT)
    wanted_BT = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
        token_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = 1
        wanted_BT[row, start - 1 : len(ids) - 1] = True
    token_BT, mask_BT, wanted_BT = (each.to(subject.device) for each in (token_BT, mask_BT, wanted_BT))
    with torch.inference_mode():
        hidden_ND = subject.backbone(token_BT, mask_BT)[:, :-1][wanted_BT]
        target_N = token_BT[:, 1:][wanted_BT]
        size = rows_per_block(subject.vocab_size, subject.device)
        logprob_N = torch.cat(
            [
                subject.logits(part_ND).float().log_softmax(-1).gather(1, part_N[:, None])[:, 0]
                for part_ND, part_N in zip(hidden_ND.split(size), target_N.split(size), strict=True)
            ]
        )
    row_N = wanted_BT.nonzero()[:, 0]
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row_N.cpu(), logprob_N.cpu().double()).tolist()
