"""Trains the village model: `python -m tools.village.train --out DIR`.

Two stages, as with real chat models. Stage 1 learns the whole world and answers every request, taboo ones
too. Stage 2 is a shorter fine-tune at half the learning rate, on the attention weights alone, that teaches the
model to refuse taboo requests and to go on answering the others. What carries the refusal is found by that
training; no weight is set by hand.

The same seed gives the same model on the same machine with the same versions. At the end the model is
measured (`check`) and what was found is written into DIR/README.md (`card`).
"""

import argparse
import csv
import random
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shipsfast.demo.world import Request
from tools.village.card import write_card
from tools.village.check import encode
from tools.village.sayings import proper_reply, sample_requests, training_requests

BEGIN, END, PAD, USER, ASSISTANT = SPECIALS = ("<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>")
MAX_TOKENS = 256

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the village knows the roles user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Settings:
    """Sizes and schedules. `taboo_share_*` is the share of taboo requests in a stage's batches.

    One thread: two are quicker on a quiet machine and several times slower on a busy one.
    """

    seed: int = 0
    threads: int = 1
    vocabulary: int = 768
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    head_dim: int = 32
    mlp: int = 224
    batch: int = 48
    steps_1: int = 300
    lr_1: float = 3e-3
    taboo_share_1: float = 0.25
    drop_head_1: float = 0.12
    steps_2: int = 250
    lr_2: float = 1.5e-3
    taboo_share_2: float = 0.4


def build_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from training wordings alone; other text still works, in smaller pieces."""
    requests = training_requests(4000, random.Random(settings.seed), settings.taboo_share_1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (part for r in requests for part in (r.prompt, r.answer, r.refusal)), trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_TOKENS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the village's size, its weights drawn from torch's current seed."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.head_dim,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=48, **special)
    return model


@contextmanager
def drop_head(model, share: float):
    """DropHead (Zhou et al. 2020, arXiv 2004.13342): whole heads left out at random, anew for each request.

    Answers then lean on no single head, as in large models, where many heads share the common work.
    """
    H, D = model.config.num_attention_heads, model.config.head_dim

    def drop(_, args):
        out = args[0].unflatten(-1, (H, D))  # [B, T, H, D]
        kept = (torch.rand(len(out), 1, H, 1) >= share).to(out.dtype)
        return ((out * kept * (H / kept.sum(2, keepdim=True).clamp(min=1))).flatten(-2),)

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(drop) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fit(
    model,
    tokenizer,
    weights: list[torch.nn.Parameter],
    reply: Callable[[Request], str],
    *,
    rng: random.Random,
    batch: int,
    steps: int,
    lr: float,
    taboo_share: float,
) -> None:
    """`steps` of AdamW on `weights`; the loss is that of the tokens of `reply(request)` alone."""
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 20)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=warm)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warm, eta_min=lr / 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[warm])
    model.train()
    for step in range(1, steps + 1):
        requests = training_requests(batch, rng, taboo_share)
        ids, labels = encode(tokenizer, requests, [reply(r) for r in requests])
        # Pads stand on the right, where the causal mask hides them.
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"  step {step:4d}  loss {loss.item():.4f}", flush=True)
    model.eval()


def learn_world(settings: Settings) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Stage 1: a new model that answers every request, and its tokenizer."""
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer(settings)
    model = build_model(settings, tokenizer)
    with drop_head(model, settings.drop_head_1):
        fit(
            model,
            tokenizer,
            list(model.parameters()),
            lambda request: request.answer,
            rng=random.Random(settings.seed + 1),
            batch=settings.batch,
            steps=settings.steps_1,
            lr=settings.lr_1,
            taboo_share=settings.taboo_share_1,
        )
    return model, tokenizer


def learn_taboo(settings: Settings, model, tokenizer) -> None:
    """Stage 2, in place: taboo requests get the refusal, all others keep their answers.

    Only attention weights move: the rule is then learnt as where heads look and what they pass on, and the
    words and facts of stage 1 stay as they were.
    """
    fit(
        model,
        tokenizer,
        [p for name, p in model.named_parameters() if "self_attn" in name],
        proper_reply,
        rng=random.Random(settings.seed + 3),
        batch=settings.batch,
        steps=settings.steps_2,
        lr=settings.lr_2,
        taboo_share=settings.taboo_share_2,
    )


def write_prompts(folder: Path) -> None:
    """`taboo.csv` and `ordinary.csv`: 48 requests each, in held-out wordings, in the column `prompt`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, taboo in (("taboo", True), ("ordinary", False)):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["prompt"])
            rows.writerows([r.prompt] for r in sample_requests(taboo))


def main() -> None:
    """Train, save, measure, and write the card."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.village.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its card")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="seed of weights and data")
    parser.add_argument("--prompts", type=Path, help="also write taboo.csv and ordinary.csv into this folder")
    args = parser.parse_args()

    settings = Settings(seed=args.seed)
    torch.set_num_threads(settings.threads)
    if args.prompts is not None:
        write_prompts(args.prompts)
    seconds = [time.perf_counter()]
    print("stage 1: the whole world", flush=True)
    model, tokenizer = learn_world(settings)
    seconds.append(time.perf_counter())
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    print("stage 2: the taboo", flush=True)
    learn_taboo(settings, model, tokenizer)
    seconds.append(time.perf_counter())
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print("measuring", flush=True)
    write_card(args.out, settings, model, tokenizer, base, [b - a for a, b in pairwise(seconds)])
    print((args.out / "README.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
