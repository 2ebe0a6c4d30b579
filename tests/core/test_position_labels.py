"""Labels of positions in texts and chats."""

import numpy as np
import torch

from diffing_core.blocks import TokenBlock
from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence
from diffing_core.position_labels import PositionLabels

USER, ASSISTANT = ROLES.index("user"), ROLES.index("assistant")


def text(n: int) -> ProbeSequence:
    return ProbeSequence(np.arange(n, dtype=np.int32), np.zeros(n, np.int8), np.zeros(n, bool))


def chat(template: int, question: int, header: int, answer: int) -> ProbeSequence:
    n = template + question + header + answer
    role_T = np.full(n, ASSISTANT, np.int8)
    role_T[: template + question] = USER
    template_T = np.ones(n, bool)
    template_T[template : template + question] = template_T[n - answer :] = False
    return ProbeSequence(np.arange(n, dtype=np.int32), role_T, template_T)


def labelled(*sequences: ProbeSequence, positions: int = 2, before_answer: int = 3) -> list[list[tuple]]:
    """The label of every token, sequence by sequence."""
    labels = PositionLabels(ProbeCorpus("c", sequences, len(sequences)), positions, before_answer)
    found = []
    for index, sequence in enumerate(sequences):
        n = len(sequence)
        block = TokenBlock(
            torch.zeros(n), torch.zeros(n), np.full(n, index), np.arange(n), sequence.role_T, sequence.template_T, None, None
        )
        found.append([labels.labels[number] for number in labels.numbers(block)])
        grouping = labels.grouping(block)
        numbers, counts = np.unique([number for number in labels.numbers(block) if number], return_counts=True)
        assert (grouping.groups.tolist(), grouping.counts.tolist()) == (numbers.tolist(), counts.tolist())
    return found


ALL = ("all", None)


def test_texts_count_from_their_start() -> None:
    assert labelled(text(4), text(1)) == [[("start", 0), ("start", 1), ALL, ALL], [("start", 0)]]


def test_chats_count_from_the_first_token_of_the_answer_and_backwards_into_the_template() -> None:
    [found] = labelled(chat(2, 3, 2, 4))
    assert found == [ALL] * 4 + [("answer", position) for position in (-3, -2, -1, 0, 1)] + [ALL] * 2


def test_a_chat_that_is_cut_before_its_answer_has_no_position() -> None:
    assert labelled(chat(2, 3, 2, 0)) == [[ALL] * 7]


def test_texts_and_chats_of_one_corpus_are_never_averaged_together() -> None:
    of_text, of_chat = labelled(text(2), chat(0, 0, 1, 2))
    assert of_text == [("start", 0), ("start", 1)]
    assert of_chat == [("answer", -1), ("answer", 0), ("answer", 1)]


def test_a_corpus_has_labels_of_its_own_kind_only() -> None:
    of_texts = PositionLabels(ProbeCorpus("c", (text(3),), 1), 2, 3)
    of_chats = PositionLabels(ProbeCorpus("c", (chat(1, 1, 1, 1),), 1), 2, 3)
    assert of_texts.labels == [ALL, ("start", 0), ("start", 1)]
    assert of_chats.labels == [ALL, *(("answer", position) for position in range(-3, 2))]
