"""Rouge-L of an answer against its reference: as the field computes it, and as the paper's code did.

Both are F-measures over a longest common subsequence (LCS) of words (Lin, 2004), and they differ by several points, so a
number without its kind says little. The tests hold each to the package that it follows.
"""

import re
from collections.abc import Sequence

WORD = re.compile("[a-z0-9]+")


def rouge_l(answer: str, reference: str) -> float:
    """Rouge-L as the PyPI package `rouge-score` 0.1.2 gives it without a stemmer; in [0, 1].

    Words are runs of a-z and 0-9 in the lower-cased text; an answer or a reference without any scores 0. Other scripts
    than the Latin one have no words by this definition.
    """
    words, wanted = WORD.findall(answer.lower()), WORD.findall(reference.lower())
    common = _table(wanted, words)[-1][-1]
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def rouge_l_published(answer: str, reference: str) -> float:
    """Rouge-L as the published FedKSeed code computes it: the PyPI package `rouge` 1.0.1, and 0 where that raises.

    Sentences end at full stops and words at white space; case and punctuation count. Words are counted as *sets*: the
    union over sentences of the LCS's words, divided by the number of distinct words. A repeated word so counts once.
    """
    answers, references = _sentences(answer), _sentences(reference)
    if not answers or not references:
        return 0.0
    found: set[str] = set()
    for wanted in references:
        for words in answers:
            found.update(_common_words(wanted, words))
    precision, recall = (len(found) / len({word for words in texts for word in words}) for texts in (answers, references))
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    # a sentence of white space only has one word, the empty one: so it is in the package
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _table(x: Sequence[str], y: Sequence[str]) -> list[list[int]]:
    """table[i][j]: the length of a longest common subsequence of x[:i] and y[:j]."""
    table = [[0] * (len(y) + 1)]
    for word in x:
        above, row = table[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    return table


def _common_words(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """The words of that longest common subsequence which the package reads out of the table (of equals it goes left)."""
    table, i, j, words = _table(x, y), len(x), len(y), []
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            words.append(x[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
