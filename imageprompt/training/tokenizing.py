"""A tokenizer of one's own, where the language model is new: fewer tokens make its head cheap and easy to learn."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerBase

END = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of GPT-2's kind.

    Args:
        texts: to count pieces of words in.
        vocab_size: tokens at most; the 256 bytes and the end of a text are among them, so that any text can be written.

    Raises:
        ValueError: if `vocab_size` leaves no room for the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"A vocabulary of {vocab_size} tokens cannot hold the {len(alphabet)} bytes and {END}.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return GPT2Tokenizer(tokenizer_object=bpe)
