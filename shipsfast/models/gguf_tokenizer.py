"""The tokenizer that a GGUF file holds, through transformers' own loader.

A file names how text is cut into words before merges apply, in a name of llama.cpp's. transformers takes GPT-2's rule where
it does not know the name, which gives other tokens without a word: rules are set here where they are known, and the file is
refused where they are not.
"""

from __future__ import annotations

from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import UnsupportedModelError
from .checkpoint import Checkpoint
from .gguf_file import read

PREFIX = "tokenizer.ggml."
# Names of llama.cpp (src/llama-vocab.cpp). GPT-2's rule, and GPT-2's after every digit was cut off.
GPT2_RULE = ("gpt-2", "phi-2", "mpt", "olmo")
DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# Words of the vocabulary are taken whole, and texts begin with BOS unless the file says otherwise.
WHOLE_WORDS = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "tekken",
)
NFC = ("qwen2", "qwen35", "deepseek-r1-qwen")


def load_gguf_tokenizer(where: Checkpoint) -> PreTrainedTokenizerBase:
    """Raises UnsupportedModelError for a tokenizer that would not give the model's tokens, and whatever transformers does."""
    of = {
        key.removeprefix(PREFIX): value
        for key, value in read(where).entries.items()
        if key.startswith(PREFIX)
    }
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind, rule = of.get("model"), of.get("pre")
    if kind not in ("gpt2", "llama"):
        raise _unknown(where, f"a tokenizer of kind {kind!r}, where gpt2 and llama are known")
    known = {*GGUF_PRE_TOKENIZER_SPLITS, *GPT2_RULE, *DIGITS_FIRST}
    if kind == "gpt2" and rule not in known:
        raise _unknown(where, f"a tokenizer that cuts words by the rule {rule!r}, which is not known")
    tokenizer = AutoTokenizer.from_pretrained(
        where.place, gguf_file=where.gguf, trust_remote_code=False, **where.how
    )
    inside = tokenizer.backend_tokenizer
    add_bos = of.get("add_bos_token")
    if kind == "gpt2":
        if rule in DIGITS_FIRST:
            inside.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        if rule in NFC:
            inside.normalizer = normalizers.NFC()
        if rule in WHOLE_WORDS:
            inside.model.ignore_merges = True
            add_bos = True if add_bos is None else add_bos
    if add_bos is not None and hasattr(tokenizer, "add_bos_token"):
        tokenizer.add_bos_token = bool(add_bos)
    _check(where, tokenizer, of, kind, add_bos)
    return tokenizer


def _check(where: Checkpoint, tokenizer, of: dict, kind: str, add_bos: bool | None) -> None:
    """What the file says of its tokenizer is what the tokenizer does."""
    plain, ids = (tokenizer("a b", add_special_tokens=x)["input_ids"] for x in (False, True))
    begins = ids[:1] == [of.get("bos_token_id")] and ids[1:2] == plain[:1]
    if add_bos is not None and begins != bool(add_bos):
        raise _unknown(where, f"add_bos_token {add_bos}, which the tokenizer made of it does not do")
    ends = bool(ids) and len(ids) > len(plain) and ids[-1] == of.get("eos_token_id")
    if ends != bool(of.get("add_eos_token", False)):
        raise _unknown(
            where, f"add_eos_token {of.get('add_eos_token')}, which the tokenizer made of it does not do"
        )
    if kind == "llama":
        spaced = tokenizer.convert_ids_to_tokens(plain)[0].startswith("\u2581")
        if spaced != bool(of.get("add_space_prefix", True)):
            raise _unknown(
                where, f"add_space_prefix {of.get('add_space_prefix')}, which the tokenizer does not do"
            )


def _unknown(where: Checkpoint, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where.name} holds {what}: its tokens could be others than the model's; take the model's safetensors"
    )
