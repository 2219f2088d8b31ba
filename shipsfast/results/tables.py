"""Results as a person reads them in a terminal, and as a program reads them. Results call what prints them; nothing here
knows their classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..text import counted, visible
from .agreement import RankAgreement
from .groups import recorded
from .statistics import Concentration

SAID = ("degenerate", "incoherent", "cut", "perplexity")  # of answers with a head off
LEVELS = ("log_prob", "prob")  # metrics that are no change
NAMED = 10  # heads that a line lists
FIRST = 4  # heads of a group
PAIRS = 10  # of groups


def _say(console: Console, text: str) -> None:
    """A line of its own: names in it are of models, metrics and folders, and neither markup nor control codes."""
    console.print(Text(visible(text)), soft_wrap=True)


def show(result, top: int, out: Path | None = None, console: Console | None = None) -> None:
    """Print a result, and in one line each what ran and where it lies."""
    console = console or Console(highlight=False)
    result.show(top, console)
    record = result.record
    _say(
        console,
        f"{record.get('attention_backend')} attention, {record.get('layers')} layers, "
        f"{result.identity.get('dtype')}{_template(record)}, {record.get('seconds', 0):.2f} s in all",
    )
    if out is not None:
        _say(console, f"run folder: {out}")


def _template(record: dict) -> str:
    """`auto` chose it; a text of one's own is long, and known."""
    name = (record.get("prompting") or {}).get("template")
    return f", template {name}" if name in ("chat", "query-answer", "none") else ""


def as_json(result, top: int, out: Path | None = None) -> dict:
    """The same as an object."""
    return result.as_json(top) | {"run_folder": None if out is None else str(out)}


def _grid(*names: str, wide: int = 0) -> Table:
    """wide: how many columns, the first ones, have names of somebody else's, which may take lines."""
    table = Table()
    for at, name in enumerate(names):
        table.add_column(Text(name), justify="right", no_wrap=name != "rank interval" and at >= wide)
    return table


def _weak(result, layer: int, head: int) -> str:
    return "" if result.above_noise()[layer, head] else f" (not above {visible(result.floor_name)})"


def _ranking(result, top: int, score: str, console: Console) -> None:
    """The top heads, and how firm their order is."""
    if result.is_rate:
        return _rates(result, top, console)
    stability, problem = result.quick_stability(top)
    names, heads = ["rank", f"layer-{result.unit}", score], int((~np.isnan(result.mean())).sum())
    ranks = stability is not None and heads > 1  # one head has no other rank
    some = ranks and stability.k < heads  # all heads are in a top as large
    if stability is not None:
        names += [f"{stability.confidence:.0%} interval"]
        names += ["rank interval"] * ranks + [f"in top {stability.k}"] * some
    table = _grid(*names)
    for rank, (layer, head, value) in enumerate(result.top(top), 1):
        row = [str(rank), f"{layer}-{head}", f"{value:.6g}{_weak(result, layer, head)}"]
        if stability is not None:
            at = (layer, head)
            row += [f"{stability.low[at]:.3g} to {stability.high[at]:.3g}"]
            row += [f"{stability.rank_low[at]:.0f} to {stability.rank_high[at]:.0f}"] * ranks
            row += [f"{stability.top_k_frequency[at]:.0%}"] * some
        table.add_row(*map(Text, row))
    console.print(table)
    if stability is None:
        _say(console, problem)
    elif some:
        _say(
            console,
            f"resampling the prompts {stability.resamples} times keeps {stability.top_k_overlap:.0%} of the top "
            f"{stability.k}",
        )


def _rates(result, top: int, console: Console) -> None:
    """The heads with the highest rates; equal rates share a rank."""
    compared = "unablated_scores" in result.record
    table = _grid(
        "rank", unit := f"layer-{result.unit}", "rate", "95% interval", *["less unablated, points"] * compared
    )
    said = _grid(unit, *SAID)  # of its own: eight columns are more than a terminal shows
    best, above = result.top(top), result.above_noise()
    for layer, head, rate in best:
        low, high = result.rate_interval(layer, head)
        mark = "" if above[layer, head] else " *"
        rank = 1 + int((result.mean() > rate).sum())
        row = [str(rank), f"{layer}-{head}", f"{rate:.0%}{mark}", f"{low:.0%} to {high:.0%}"]
        if compared:
            d, d_low, d_high = (100 * x for x in result.difference(layer, head))
            row += [f"{d:+.0f} ({d_low:+.0f} to {d_high:+.0f})"]
            *shares, perplexity = (result.record[name][layer][head] for name in SAID)
            said.add_row(f"{layer}-{head}", *(f"{x:.0%}" for x in shares), f"{perplexity:.3g}")
        table.add_row(*map(Text, row))
    console.print(table)
    if compared:
        console.print(said)
    if not all(above[s.layer, s.head] for s in best):
        _say(console, f"* not above {result.floor_name}")


def _concentration(found: Concentration, unit: str, of: str, console: Console) -> None:
    """Of all heads the share is 100 %, and one head is not concentrated."""
    if found.heads < 2 or np.isnan(found.gini):
        return
    shares = "".join(f"top {k} {share:.0%}, " for k, share in found.top_share.items() if k < found.heads)
    _say(
        console,
        f"concentration{of}: {shares}Gini {found.gini:.2f}, {found.effective_heads:.1f} effective {unit}s",
    )


def _among(result) -> str:
    """Of what a share is one, where some heads have no score."""
    scored, of = int((~np.isnan(result.mean())).sum()), result.mean().size
    return "" if scored == of else f" among {scored:,} of {counted(of, result.unit)}"


def _error(result, unit: str, console: Console, score: str = "a score") -> None:
    for line in result.error.lines(unit, score) if result.error else ():
        _say(console, line)


def _noise(result, unit: str) -> str:
    weak = int((~np.isnan(result.mean())).sum() - result.above_noise().sum())
    left = f"{counted(weak, result.unit)} not above it" if weak else "all above it"
    return (
        f"{result.floor_name.removeprefix('the ')} {result.noise_floor:.2g}{' ' * bool(unit)}{unit}, {left}"
    )


def show_ships(result, top: int, console: Console) -> None:
    metric = result.metric
    unit = f", {metric['unit']}" if metric["unit"] else ""
    name = "" if "title" in metric else "Ships: "
    _say(console, f"{name}{metric['label']}, {result.record.get('ablation', '')}")
    _ranking(result, top, visible(f"mean{unit}"), console)
    scanned = int((~np.isnan(result.mean())).sum())
    _say(
        console,
        f"{counted(scanned, result.unit)} x {result.reads_in_words()} in {result.record.get('scan_seconds', 0):.2f} s; "
        f"{_noise(result, metric['unit'])}",
    )
    if metric["name"] in LEVELS:
        name = metric["name"]
        _say(
            console,
            f"{name} is what is left with a head off, and no change: a ranking by size says little; {name}_diff says what a head does",
        )
    _error(result, metric["unit"], console)
    _concentration(result.concentration(), result.unit, _among(result), console)
    for line in _of_answers(result.record):
        _say(console, line)
    for line in marks(result):
        _say(console, line)
    if recorded(result.record) is not None:
        show_groups(result.by_group(), top, console)
    for other in result.also.values():
        console.print()
        show_ships(other, top, console)
    if result.control is not None:
        found, problem = result.quick_contrast()
        console.print()
        _say(console, problem) if found is None else found.show(top, console)


def show_contrast(result, top: int, console: Console) -> None:
    metric, sizes = result.metric, [each.reads_in_words() for each in (result.a, result.b)]
    unit, ablation = (f", {x}" if x else "" for x in (metric["unit"], result.a.record.get("ablation", "")))
    _say(console, f"Contrast of {sizes[0]} (a) with {sizes[1]} (b): {metric['label']}{unit}{ablation}")
    # "layer-head" and "rank in a" would be wider than a terminal
    table = _grid("rank", result.unit, "mean a", "mean b", "a less b", "AUROC", "q", "in a")
    columns, above, best = result.columns, result.above_noise(), result.top(top)
    for layer, head, difference in best:
        of = {name: values[layer, head] for name, values in columns.items()}
        mark = "" if above[layer, head] else " *"
        table.add_row(
            f"{of['rank']:.0f}", f"{layer}-{head}", f"{of['mean_a']:.3g}", f"{of['mean_b']:.3g}", f"{difference:.3g}{mark}",
            f"{of['auroc']:.3f}", f"{of['q']:.2g}", f"{of['rank_a']:.0f}",
        )  # fmt: skip
    console.print(table)
    if not all(above[s.layer, s.head] for s in best):
        _say(console, f"* not above the noise floor, {result.noise_floor:.2g}")
    how = "all there are" if result.exact else f"drawn, seed {result.seed}"
    _say(
        console,
        f"{result.found()}: Benjamini-Hochberg over permutation tests of the {result.statistic_name}, {result.alternative}, "
        f"{counted(result.relabellings, 'relabelling')} ({how})",
    )
    leader = result.a.top(1)[0]
    layer, head = leader[:2]
    place = result.rank[layer, head]
    if not np.isnan(place):
        _say(
            console,
            f"head {layer}-{head}, the first of a alone, is number {place:.0f} of {int((~np.isnan(result.p)).sum())} here: AUROC "
            f"{result.auroc[layer, head]:.3f}, q {result.q[layer, head]:.2g}",
        )
    if result.marked_heads:
        names = ", ".join(f"{i}-{j}" for i, j in result.marked_heads[:NAMED])
        _say(
            console,
            f"left out, with scores that are not finite: {counted(len(result.marked_heads), result.unit)}: {names}",
        )
    for line in result.warnings:
        _say(console, f"Warning: {line}")
    for other in result.also.values():
        console.print()
        show_contrast(other, top, console)


def show_groups(groups, top: int, console: Console | None = None) -> None:
    """Each group's first heads, and how far the groups agree."""
    console = console or Console(highlight=False)
    unit, few = groups.result.metric["unit"], min(top, FIRST)
    best = groups.top(few)
    places = [f"rank {rank}" for rank in range(1, 1 + max(map(len, best.values())))]
    table = _grid(visible(groups.column), "prompts", *places, wide=1)
    for (name, heads), number in zip(best.items(), groups.prompts, strict=True):
        table.add_row(
            *map(Text, (visible(name), f"{number:,}", *(f"{s.layer}-{s.head} {s.score:.3g}" for s in heads)))
        )
    console.print(table)
    _say(console, f"by {groups.column}: layer-{groups.result.unit} and its mean{f', {unit}' if unit else ''}")
    if len(groups.names) < 2:
        return _say(console, "one group: nothing to compare")
    _agreement(groups.agreement(top), groups.names, groups.result.unit, console)


def show_rates(rates, column: str, console: Console) -> None:
    """Attack success rates by group of prompts, of EvalResult.by_group."""
    table = _grid("heads off", visible(column), "prompts", "ASR", "95% interval", wide=2)
    for row in rates.itertuples():
        texts = (
            row.heads,
            row.group,
            f"{row.prompts:,}",
            f"{row.asr:.0%}",
            f"{row.asr_low:.0%} to {row.asr_high:.0%}",
        )
        table.add_row(*(Text(visible(each)) for each in texts))
    console.print(table)


def _agreement(found: RankAgreement, names: list[str], unit: str, console: Console) -> None:
    """The least alike first."""
    tops = found.k < found.heads  # else all heads are in them
    table = _grid("between", "Spearman", "shuffled", *[f"tops of {found.k} share", "shuffled"] * tops, wide=1)
    pairs = found.pairs()
    for at in pairs[:PAIRS]:
        row = [f"{names[at[0]]}, {names[at[1]]}", f"{found.spearman[at]:.2f}"]
        row += [" to ".join(f"{x:.2f}" for x in found.spearman_shuffled[at])]
        if tops:
            low, high = 100 * found.overlap_shuffled[at]
            row += [f"{found.overlap[at]:.0%}", f"{low:.0f} to {high:.0f}%"]
        table.add_row(*(Text(visible(each)) for each in row))
    console.print(table)
    if len(pairs) > PAIRS:
        _say(console, f"the {PAIRS} pairs that are least alike, of {len(pairs):,}")
    chance = f"; tops of {found.k} that have nothing to do with each other share {found.chance:.0%}" * tops
    _say(
        console,
        f"over {counted(found.heads, unit)}{chance}; shuffled: the middle 90 % with prompts dealt out to the groups at random, "
        "below which groups differ",
    )


def _of_answers(record: dict) -> Iterator[str]:
    """What the unablated model said to the prompts, where it was asked, and what follows for the scores."""
    found = record.get("refusals")
    if found is not None:
        yield (
            f"the unablated model refuses {found['refused']} of {counted(found['prompts'], 'prompt')} ({found['low']:.0%} to "
            f"{found['high']:.0%}, 95%), judge {found['judge']}"
        )
    for line in record.get("warnings", []):
        yield f"Warning: {line}"


def marks(result) -> Iterator[str]:
    """What the ranking leaves out."""
    found = result.marks()
    if not found:
        return
    heads = [f"{layer}-{head}" for layer, head in found["heads"]]
    names = ", ".join(heads[:NAMED]) + (f" and {len(heads) - NAMED} more" if len(heads) > NAMED else "")
    yield (
        f"not finite, marked and left out of the ranking: {counted(found['count'], 'score')}, of "
        f"{counted(len(heads), result.unit)}: {names}"
    )
    if "first" in found:
        first = found["first"]
        yield (
            f"the first: {result.unit} {first['layer']}-{first['head']} on prompt {first['prompt']}: {first['why']}"
        )


def show_subspace(result, top: int, console: Console) -> None:
    _say(
        console,
        f"Dataset-level Ships: rank {result.identity.get('rank')}, {result.record.get('ablation', '')}",
    )
    _ranking(result, top, "degrees", console)
    _say(console, _noise(result, "degrees"))
    _error(result, "degrees", console, "an angle")
    _concentration(result.concentration(), result.unit, _among(result), console)


def show_sahara(result, console: Console) -> None:
    _say(console, f"Sahara: rank {result.identity.get('rank')}, {result.record.get('ablation', '')}")
    firm = [result.quick_stability(1, step) for step in range(len(result.heads))]
    controlled, above = result.penalty is not None, result.above_noise()
    name = f"layer-{result.unit}"
    table = _grid("step", name, "objective" if controlled else "degrees", "next best")
    parts = _grid("step", name, "degrees", "control KL, nats")  # of what the objective is made
    if firm[0][0] is not None:
        for name in (f"{firm[0][0].confidence:.0%} interval", "chosen again"):
            table.add_column(name, justify="right", no_wrap=True)
    for step, ((layer, head), angle) in enumerate(zip(result.heads, result.scores, strict=True)):
        others = [s for s in result.top(2, step) if (s.layer, s.head) != (layer, head)][:1]
        runner_up = "".join(f"{s.layer}-{s.head} ({s.score:.4g})" for s in others)
        weak = "" if above[step, layer, head] else " (gain not above the noise floor)"
        first, degrees = [str(step + 1), f"{layer}-{head}"], f"{angle:.6g}{weak}"
        if controlled:
            nats = result.control_kl_nats[step, layer, head]
            parts.add_row(*map(Text, [*first, degrees, f"{nats:.4g}"]))
        row = [*first, f"{result.objective[step, layer, head]:.6g}" if controlled else degrees, runner_up]
        stability = firm[step][0]
        if stability is not None:
            low, high = stability.low[layer, head], stability.high[layer, head]
            row += [f"{low:.3g} to {high:.3g}", f"{stability.top_k_frequency[layer, head]:.0%}"]
        table.add_row(*map(Text, row))
    console.print(table)
    if controlled:
        console.print(parts)
        _say(
            console,
            f"objective: degrees - {result.penalty:g} x control KL, of the next token, mean of "
            f"{counted(result.control_by_prompt.shape[1], 'control prompt')}",
        )
    control = [f", control KL {nats:.4g} nats" for nats in result.beam_control_kl_nats] or [""] * len(
        result.beams
    )
    for (group, angle), nats in list(zip(result.beams, control, strict=True))[1:]:
        _say(console, f"also kept: {', '.join(f'{i}-{j}' for i, j in group)} ({angle:.6g} degrees{nats})")
    if firm[0][0] is None:
        _say(console, firm[0][1])
    else:
        _say(
            console,
            f"interval, chosen again: of {firm[0][0].resamples} resamples of the prompts{', and of the control prompts' * controlled}, "
            "the group before each step given",
        )
    packing = result.record.get("control_noise_floor")
    control = "" if packing is None else f"; packing moves the control KL by {packing:.2g} nats"
    _say(console, f"noise floor {result.noise_floor:.2g} degrees{control}")
    _error(result, "degrees", console, "a gain")
    for step in range(len(result.heads)):
        _concentration(result.concentration(step), result.unit, f" of step {step + 1}", console)


def show_tokens(result, console: Console | None = None) -> None:
    """The tokens that each head raises and lowers."""
    console = console or Console(highlight=False)
    _say(
        console,
        f"mean probability of the next token over {counted(result.prompts, 'prompt')}, {result.record.get('ablation', '')}",
    )
    for (layer, head), moved in result.moved.items():
        table = _grid(
            f"{result.unit} {layer}-{head} off", "token", "id", "before", "after", "difference", wide=2
        )
        for name in ("raised", "lowered"):
            for at, each in enumerate(getattr(result, name)[layer, head]):
                weak = "" if abs(each.difference) > result.noise_floor else " *"
                row = (
                    name * (not at),
                    visible(repr(each.text)),
                    str(each.token),
                    f"{each.before:.4g}",
                    f"{each.after:.4g}",
                )
                table.add_row(*map(Text, (*row, f"{each.difference:+.4g}{weak}")))
            table.add_section()
        console.print(table)
        _say(console, f"{moved:.4g} of the probability goes elsewhere with {result.unit} {layer}-{head} off")
    _say(console, f"noise floor {result.noise_floor:.2g}; * not above it")
