"""Just enough of PromQL to find the series behind a query, so that their age can be watched.

Not a parser: it tells selectors from functions, keywords, labels, durations and strings. Where it is wrong, the age is
no data, and an objective INCONCLUSIVE; `Promql(series=…)` then says what to watch.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"""\s+ | \#[^\n]*                                      # space, comments
    | (?P<string>"(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | `[^`]*`)
    | (?P<number>[0-9.][0-9a-zA-Z_.]*(?:[eE][+-]?[0-9]+)?)    # 1, .5, 0x1f, 5m, 1e-3
    | (?P<range>\[[^\]]*\])                                   # [1m], [1h:30s]
    | (?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
    | (?P<matchers>\{(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`|[^}"'`])*\})
    | (?P<open>\()
    | .""",
    re.VERBOSE | re.DOTALL,
)
_LABELS = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})  # a list of labels may follow
_WORDS = _LABELS | {"and", "or", "unless", "atan2", "bool", "offset", "inf", "nan"}
_AGGREGATES = frozenset(
    {"sum", "min", "max", "avg", "group", "stddev", "stdvar", "count", "count_values", "bottomk", "topk", "quantile"}
    | {"limitk", "limit_ratio"}
)


def selectors(query: str) -> tuple[str, ...]:
    """The series selectors of a query, each once, in their order: `rate(a{x="1"}[1m]) / b` has `a{x="1"}` and `b`."""
    tokens = [m for m in _TOKEN.finditer(query) if m.lastgroup or not (m[0].isspace() or m[0].startswith("#"))]
    found: list[str] = []
    i = 0
    while i < len(tokens):
        token, following = tokens[i], tokens[i + 1] if i + 1 < len(tokens) else None
        word = token[0].lower()
        i += 1
        if token.lastgroup == "matchers":
            found.append(token[0])
        if token.lastgroup != "name":
            continue
        if following is not None and following.lastgroup == "open":
            if word in _LABELS:
                i = _after_labels(tokens, i)
            continue  # a function, or a list of labels
        if word in _WORDS or word in _AGGREGATES:
            continue
        if following is not None and following.lastgroup == "matchers":
            found.append(token[0] + following[0])
            i += 1
        else:
            found.append(token[0])
    return tuple(dict.fromkeys(found))


def _after_labels(tokens: list[re.Match[str]], opened: int) -> int:
    """The index after the parenthesis that closes the one at `opened`."""
    while opened < len(tokens) and tokens[opened][0] != ")":
        opened += 1
    return opened + 1


def age_of_any(alternatives: tuple[str, ...]) -> str:
    """The query for the age, in seconds, of the oldest series of the first selector that exists."""
    return " or ".join(f"max(time() - timestamp({one}))" for one in alternatives)


def age_of_all(every: tuple[str, ...]) -> str:
    """The query for the age, in seconds, of the oldest series of all selectors; no data where one has no series.

    A selector that finds nothing must not hide behind one that does: `misspelt or 0 * up` answers 0 all the same.
    """
    if len(every) == 1:
        return age_of_any(every)
    # A label tells the selectors apart, for `or` keeps one series for each set of labels.
    each = (f'label_replace(time() - timestamp({one}), "selector", "{i}", "", "")' for i, one in enumerate(every))
    ages = " or ".join(each)
    return f"max({ages}) and count(count by (selector) ({ages})) == {len(every)}"
