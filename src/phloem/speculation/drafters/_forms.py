"""Lines of one form: objects of JSON, rows of tables, entries of lists. What stands between their values is the same in
each, whatever the values are, so that nothing agrees with the text's end but for its last tokens.

An index maps two tokens, and how far they lie back, to the positions of the output where they stood so. The tokens that
follow most of those positions are drafted, as far as the latest two of these go on alike: up to the next value. Prompts
are left out: what is copied from there is found by what agrees, and its values are no reason to leave it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from phloem.speculation.drafters._match import KEPT, agreement

if TYPE_CHECKING:
    from phloem.speculation.texts import Text

GAP = 3  # last tokens that may differ: most values have no more
ALONE = 6  # drafts behind a position that was found once: how far the form goes is not known then
MOST = 12


def index(text: Text) -> None:
    """Take in what has come of the output since the last time."""
    tokens, places = text.tokens, text.forms
    for end in range(max(text.formed, text.num_prompt, GAP + 1), len(tokens) - 1):
        found = places.setdefault((tokens[end - GAP - 1], tokens[end - GAP]), [])
        if len(found) == KEPT:
            del found[0]
        found.append(end)
    text.formed = max(text.formed, len(tokens) - 1)


def follow(text: Text, most: int) -> tuple[list[int], int, bool] | None:
    """(Tokens that may come next, how many tokens before the gap agree up to `most`, whether nothing else has followed
    there); None where no more than half of the places go on alike, or there is none."""
    tokens = text.tokens
    found = text.forms.get((tokens[-GAP - 2], tokens[-GAP - 1])) if len(tokens) > GAP + 1 else None
    if not found:
        return None
    followers = Counter(tokens[end + 1] for end in found)
    token, count = followers.most_common(1)[0]
    if 2 * count <= len(found) and len(found) > 1:
        return None
    same = [end for end in found if tokens[end + 1] == token]
    last = same[-1]
    drafts = tokens[last + 1 : last + 1 + (MOST if len(same) > 1 else ALONE)]
    if len(same) > 1:
        before = tokens[same[-2] + 1 : same[-2] + 1 + len(drafts)]
        differs = [at for at, (one, other) in enumerate(zip(drafts, before, strict=False)) if one != other]
        drafts = drafts[: differs[0] if differs else len(before)]
    return drafts, agreement(tokens, tokens, last, most, GAP), len(followers) == 1
