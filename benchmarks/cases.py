"""The models and prompts of the benchmarks: true shapes, random weights, seeded."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shipsfast.demo.run import MODEL, PROMPTS
from shipsfast.models.loading import load_model, load_tokenizer
from shipsfast.prompts.datasets import load_prompts
from shipsfast.prompts.tokens import to_token_ids


@dataclass(frozen=True)
class Case:
    """A Llama-architecture shape and prompts with `shared` common first tokens and `own` tokens each."""

    name: str
    layers: int
    heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    prompts: int
    shared: int
    own: int
    dtype: torch.dtype = torch.float32
    std: float = 0.02  # of the weights; 0.02 is transformers' own

    @property
    def num_scores(self) -> int:
        return self.layers * self.heads * self.prompts

    @property
    def units(self) -> list[tuple[int, int]]:
        return [(layer, head) for layer in range(self.layers) for head in range(self.heads)]

    @property
    def title(self) -> str:
        return (
            f"{self.layers} layers x {self.heads} heads, d {self.hidden}, vocabulary {self.vocabulary}, float32, "
            f"{self.prompts} prompts of {self.shared} shared + {self.own} own tokens"
        )

    def model(self) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=4096,
            initializer_range=self.std,
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(self.dtype).eval()

    def token_ids(self) -> list[list[int]]:
        draw = random.Random(0)
        prefix = [draw.randrange(self.vocabulary) for _ in range(self.shared)]
        return [
            prefix + [draw.randrange(self.vocabulary) for _ in range(self.own)] for _ in range(self.prompts)
        ]


@dataclass(frozen=True)
class GenerationCase:
    """Answers of `new_tokens` to prompts with groups of heads off: none, and single ones drawn with a seed.

    shape: a random model and prompts; None for the embedded model and its first taboo requests, as a chat.
    """

    name: str
    shape: Case | None
    groups: int = 16
    new_tokens: int = 64

    @property
    def prompts(self) -> int:
        return 8 if self.shape is None else self.shape.prompts

    @property
    def num_tokens(self) -> int:
        return self.groups * self.prompts * self.new_tokens

    @property
    def title(self) -> str:
        model = "the embedded model, 8 taboo requests as a chat" if self.shape is None else self.shape.title
        return f"{model}; {self.groups} groups of heads, {self.new_tokens} new tokens"

    def model(self) -> LlamaForCausalLM:
        if self.shape is not None:
            return self.shape.model()
        return load_model(str(MODEL), device="cpu")

    def tokenizer(self):
        """The model's own; for a random model words without meaning, the cheapest there is."""
        if self.shape is None:
            return load_tokenizer(str(MODEL))
        words = Tokenizer(WordLevel({f"w{i}": i for i in range(self.shape.vocabulary)}))
        words.pre_tokenizer = WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=words)

    def token_ids(self) -> list[list[int]]:
        if self.shape is not None:
            return self.shape.token_ids()
        return to_token_ids(load_prompts(PROMPTS / "taboo.csv")[: self.prompts], self.tokenizer(), "chat")

    def heads(self, model: LlamaForCausalLM) -> list[list[tuple[int, int]]]:
        config = model.config
        every = [(i, h) for i in range(config.num_hidden_layers) for h in range(config.num_attention_heads)]
        return [[], *([head] for head in sorted(random.Random(0).sample(every, self.groups - 1)))]


@dataclass(frozen=True)
class AnswerCase:
    """Answers of `answer_tokens` given tokens, each its own, behind the prompts of a shape."""

    name: str
    shape: Case
    answer_tokens: int

    @property
    def num_scores(self) -> int:
        return self.shape.num_scores * self.answer_tokens

    @property
    def title(self) -> str:
        return f"{self.shape.title}, each with an answer of {self.answer_tokens} tokens"

    def model(self) -> LlamaForCausalLM:
        return self.shape.model()

    def answers(self) -> list[list[int]]:
        draw = random.Random(1)
        return [
            [draw.randrange(self.shape.vocabulary) for _ in range(self.answer_tokens)]
            for _ in range(self.shape.prompts)
        ]


_CPU = dict(layers=10, heads=10, hidden=640, intermediate=1728, vocabulary=8000, prompts=8)

CPU_CASES = (
    Case("cpu-10x10-d640-short", **_CPU, shared=6, own=18),
    Case("cpu-10x10-d640-template", **_CPU, shared=48, own=16),
)
# Small enough for a test of the benchmark itself.
SMOKE_CASES = (
    Case(
        "smoke-2x2-d32",
        layers=2,
        heads=2,
        hidden=32,
        intermediate=64,
        vocabulary=50,
        prompts=3,
        shared=2,
        own=3,
    ),
)

# By what the command line calls them.
GENERATION_CASES = {
    "village": GenerationCase("village", None),
    "large": GenerationCase(
        "gen-12x12-d768",
        # With weights so wide, texts vary, and few choices between two tokens are close.
        Case(
            "gen-12x12-d768",
            layers=12,
            heads=12,
            hidden=768,
            intermediate=2048,
            vocabulary=8000,
            prompts=8,
            shared=6,
            own=18,
            std=0.05,
        ),
    ),
}
GENERATION_SMOKE = GenerationCase(
    "gen-smoke-2x2-d32", replace(SMOKE_CASES[0], std=0.3), groups=3, new_tokens=6
)

REAL_MODEL = "smollm2-135m"
ANSWER_REAL = "beyond-smollm2-135m"
ANSWER_CASES = (
    AnswerCase(
        "beyond-10x10-d640",
        Case("beyond-10x10-d640", **_CPU | dict(prompts=2), shared=6, own=58),
        answer_tokens=32,
    ),
)
ANSWER_SMOKE = AnswerCase("beyond-smoke-2x2-d32", replace(SMOKE_CASES[0], std=0.3), answer_tokens=4)
