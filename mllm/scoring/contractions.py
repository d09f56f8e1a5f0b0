"""The contractions that the VQA evaluation restores (visualqa.org/evaluation.html)."""

from __future__ import annotations

# Those of the official list. Words that lose a meaning with their apostrophe (we're, he'll, it's)
# are not on it.
_OFFICIAL = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    marks = [index for index, character in enumerate(word) if character == "'"]
    return [word[:index] + word[index + 1 :] for index in marks]


# The official list holds exactly the spellings that lack one apostrophe: dont, couldn'tve,
# couldnt've, but not couldntve. Its I'd've, I'm and I've have a capital, which lower-cased text
# never does: "im" stays as it is. It maps somebody'd the wrong way round; kept, so that a score
# is the one that the official evaluation gives.
CONTRACTIONS: dict[str, str] = {
    misspelt: word for word in _OFFICIAL.split() for misspelt in _without_one_apostrophe(word)
} | {"somebody'd": "somebodyd"}
