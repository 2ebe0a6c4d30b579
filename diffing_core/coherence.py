"""Whether texts are still language: cheap measures that need no judge.

    mean_logprob_base = mean log p_base(token) over the tokens said, nats      perplexity_base = exp(−mean)
    distinct_n        = distinct n-grams of words / n-grams, over all texts
    repeated_share    = mean over texts of the share of word pairs that the same text already had
    finished_share    = texts that the model ended by itself                    mean_tokens = their length

A text that nobody would write is unlikely under the base, or likely and repetitive; so both are to be read. Measures are
rows, not columns: a judge's opinion is one more row.

Shapes: B texts, T positions, N places, D model width, V vocabulary.
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
        found["repeated_share"] = (float(np.mean([1 - len(set(text)) / len(text) for text in pairs])), len(pairs))
    return found


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
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row_N.cpu(), logprob_N.double().cpu()).tolist()
