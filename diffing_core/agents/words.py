"""From untrusted text to content words: cleaning, splitting, function words, light stemming, idf.

A *surface* is a lower-cased word as it was written, a *stem* is what is compared. Function words never
become stems: counting them rewards style and makes unreadable lists look perfect.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import log

from diffing_core.errors import EvaluationError

_SURFACE = re.compile(r"[^\W\d_]{3,}|\d{2,}")
_VOWEL = re.compile(r"[aeiouy]")

# The closed classes of English: articles, pronouns, prepositions, conjunctions, auxiliaries, adverbs of
# degree and the remains of contractions. Shorter ones are dropped by length already.
FUNCTION_WORDS = frozenset(
    """
    the this that these those all any both each either every few many more most much neither none nor not
    other others another own same several some such too very you your yours yourself yourselves she her hers
    herself him his himself its itself they them their theirs themselves our ours ourselves who whom whose
    which what whatever whichever whoever someone somebody something anyone anybody anything everyone
    everybody everything nobody nothing and but for yet because although though while whereas unless until
    since than whether when whenever where wherever why how about above across after against along among
    around before behind below beneath beside besides between beyond despite down during except from inside
    into like near off onto out outside over past per through throughout toward towards under underneath
    upon via with within without are was were been being has have had having does did done doing can could
    may might must shall should will would ought isn aren wasn weren hasn haven hadn doesn don didn couldn
    mustn shouldn won wouldn let again almost already also always away even ever here hence however instead
    just later maybe never now often once only perhaps quite rather really sometimes soon still then there
    therefore thus together
    """.split()
)


def clean(text: str, limit: int) -> str:
    """One line of at most `limit` characters, without control, format or private characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in text[:limit]).split())


def surfaces(text: str) -> list[str]:
    """Content words as written: 3 letters or 2 digits and longer, lower-cased, no function words."""
    return [word for word in _SURFACE.findall(text.lower()) if word not in FUNCTION_WORDS]


def stem(word: str) -> str:
    """Drops plural, -ing and -ed, a letter doubled before them, and a last e (Porter 1980, step 1, in brief)."""
    if len(word) > 4 and word.endswith(("ies", "ied")):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    root = re.sub(r"(ing|ed)$", "", word)
    if len(root) >= 3 and root != word and _VOWEL.search(root):
        word = re.sub(r"([^aeioulsz])\1$", r"\1", root)
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def stems(text: str) -> list[str]:
    """Stems of the content words, in order."""
    return [stem(word) for word in surfaces(text)]


@dataclass(frozen=True)
class Background:
    """In how many of `n_texts` ordinary texts each stem occurs."""

    n_texts: int
    n_with: Mapping[str, int]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Background":
        """Counts over base-like texts.

        Raises:
            EvaluationError: there is no word to count.
        """
        n_texts, n_with = 0, Counter()
        for text in texts:
            n_texts += 1
            n_with.update(set(stems(text)))
        if not n_with:
            raise EvaluationError(
                f"the background of {n_texts} text(s) holds no content word; pass the texts of the probe corpus"
            )
        return cls(n_texts, n_with)

    def idf(self, word: str) -> float:
        """0 for a stem that every text has, log(n + 1) for one that none has."""
        return log((self.n_texts + 1) / (self.n_with.get(word, 0) + 1))
