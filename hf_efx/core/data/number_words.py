"""Number words in German, English and Dutch: pairs for translation that need no file, with Dutch as the shift.

German and Dutch compose numbers alike (units before tens, in one word) from other words, so that Dutch sources are
near to German ones and still foreign to a model of German.
"""

import functools
from typing import Any

from datasets import Dataset

_LANGUAGES = ("de", "en", "nl")


@functools.cache  # it takes seconds
def number_words() -> Dataset:
    """Writes 19,000 numbers out by num2words: cardinals, ordinals, years and amounts of money.

    Returns:
        Columns `de`, `en` and `nl`, a number a row; no two German texts are equal.

    Raises:
        ImportError: If num2words isn't installed.
    """
    try:
        from num2words import num2words
    except ImportError:
        raise ImportError(
            "without a dataset pairs are number words, written by num2words: install it with pip install "
            "'hf_efx[mt]', or name a dataset"
        ) from None
    asked: list[tuple[float, dict[str, Any]]] = [
        (number, {}) for number in [*range(6000), *range(6000, 1_000_000, 397)[:2500]]
    ]
    asked += [(number, {"to": "ordinal"}) for number in range(1, 4001)]
    asked += [(year, {"to": "year"}) for year in range(1100, 2000)]  # others read like cardinals in German
    # Of whole numbers num2words makes cents.
    amounts = (euros + euros * 37 % 100 / 100 for euros in range(1, 5601))
    asked += [(amount, {"to": "currency", "currency": "EUR"}) for amount in amounts]
    return Dataset.from_dict({lang: [num2words(n, lang=lang, **kind) for n, kind in asked] for lang in _LANGUAGES})
