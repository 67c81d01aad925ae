"""The zoo's tokenizer: a byte-level BPE of 2,048 tokens, shared by all zoo models.

To train it again:

    python -m model_hooks.zoo.tokenizer --stdlib /usr/lib/python3.13
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from model_hooks.zoo import corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "data" / "tokenizer"
VOCAB_SIZE = 2048
END, PAD = "<|endoftext|>", "<|pad|>"
ROLES = ("<|user|>", "<|assistant|>", "<|system|>", "<|image|>")
SPECIAL = (END, PAD, *ROLES, *(f"<|reserved_{n}|>" for n in range(10)))

# A line break takes its indentation with it, so a line of code costs one token before its first word, and a break is
# always a clean border between a context and the line that continues it. Digits stand alone.
PATTERN = r"\n[ ]*| ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|[^\S\n]+"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + '<|endoftext|>' }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|endoftext|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def train(texts: list[str], context: int = 1024) -> PreTrainedTokenizerFast:
    """Train the tokenizer on ``texts``; ``context`` is the ``model_max_length`` it states."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[t for t in SPECIAL if t not in (END, PAD)],
        clean_up_tokenization_spaces=False,
        model_max_length=context,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )


def load() -> PreTrainedTokenizerFast:
    """The shipped tokenizer."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(FOLDER)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model_hooks.zoo.tokenizer", description=__doc__.split("\n")[0])
    parser.add_argument("--stdlib", type=Path, default=corpus.default_stdlib(), help="standard library folder to read")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write (default: the package's own)")
    args = parser.parse_args(argv)
    texts = [text for _, text in corpus.text("train", args.stdlib)]
    tokenizer = train(texts)
    tokenizer.save_pretrained(args.out)
    sample = "".join(texts[::40])
    count = len(tokenizer(sample)["input_ids"])
    print(f"{len(tokenizer)} tokens; {len(sample.encode()) / count:.2f} bytes a token on {len(sample):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
