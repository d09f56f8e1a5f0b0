"""open_clip's byte-pair tokenizer as transformers' ``CLIPTokenizer``, for ``AutoTokenizer`` and
pipelines."""

from functools import lru_cache

from open_clip import SimpleTokenizer
from transformers import CLIPTokenizer


@lru_cache(maxsize=4)
def transformers_tokenizer(context_length: int) -> CLIPTokenizer:
    """The same tokens; padded by the end-of-text token, the first of which is read."""
    ours = SimpleTokenizer(context_length=context_length)
    # open_clip's own names of the two special tokens are not those of transformers.
    names = {ours.sot_token_id: "<|startoftext|>", ours.eot_token_id: "<|endoftext|>"}
    vocabulary = {names.get(number, token): number for token, number in ours.encoder.items()}
    return CLIPTokenizer(
        vocab=vocabulary, merges=list(ours.bpe_ranks), model_max_length=context_length
    )
