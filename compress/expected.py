"""What calibration text will give to the experts of a mixture, before it runs: the mean, from the counts in config.json.

The router decides which experts see more. The true counts of each expert are known after the run and are in the manifest."""

from __future__ import annotations

from typing import Any

from llmc.compress.skeleton import Skeleton
from llmc.console import say, warn
from llmc.errors import UserError
from llmc.formats.experts import chosen_of, described
from llmc.formats.linears import get_weight


def expected(skeleton: Skeleton, tokens: int) -> dict[str, Any] | None:
    """What the experts will see on average. None for a pass without text, and for a model without experts or with experts
    that stay as they are. If layers have different counts, those of the layer with the most experts.

    tokens: of the calibration text.  Returns {'tokens', 'experts' (of a layer), 'chosen' (experts of a token), 'columns'
    (inputs of an expert's widest linear), 'tokens_per_expert', 'tokens_per_column' (means), 'tokens_for_one' (tokens that
    would give 1 a column)}.  UserError if config.json does not say how many experts a token takes.
    """
    changed = [m for path, m in skeleton.experts.items() if any(f"{path}.{n}" not in skeleton.kept for n in m.linears(0))]
    if not tokens or not changed:
        return None
    experts = max(changed, key=lambda m: m.count)
    chosen = chosen_of(skeleton.config.get_text_config().to_dict())
    if chosen is None:
        raise UserError(f"{skeleton.checkpoint.folder}: config.json does not say how many of {experts.count} experts a token "
                        "takes", "add num_experts_per_tok, as this model's code reads it")
    columns = max(get_weight(linear).shape[1] for linear in experts.linears(0).values())
    mean = tokens * chosen / experts.count
    return {"tokens": tokens, "experts": experts.count, "chosen": chosen, "columns": columns, "tokens_per_expert": mean,
            "tokens_per_column": mean / columns, "tokens_for_one": -(-columns * experts.count // chosen)}


def say_expected(skeleton: Skeleton, tokens: int, seq_len: int) -> None:
    """Print what the experts will see, and warn if it is less than one token a column."""
    seen = expected(skeleton, tokens)
    if seen is None:
        return
    say(described(seen))
    if seen["tokens_per_column"] < 1:
        samples = -(-seen["tokens_for_one"] // seq_len)
        warn(f"an expert sees {seen['tokens_per_column']:.2g} tokens per column on average, so its statistics lean on its "
             f"layer's; 1 per column takes {seen['tokens_for_one']:,} tokens: --samples {samples}")
