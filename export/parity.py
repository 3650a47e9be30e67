"""How an exported file is held against its source: the texts, token ids and logits that every exporter compares."""

from __future__ import annotations

from typing import Any

import numpy as np

REPORT = "please report this with the model's name: the file was not kept"
CHECK_TEXT = (
    "The river's level rose 3 cm in 24 hours; by 1987 it'd passed 1,234.5 m and nobody'd noticed. DON'T PANIC!\n\n"
    "def area(r: float) -> float:\n    \"\"\"π·r², in m²\"\"\"\n\treturn 3.14159 * r ** 2  # TODO\n\n\n"
    "if (a[i] != b[j] && x >= 0x1F) { return \"%s\\n\"; }  // C, or nearly\n"
    "Schöne Grüße aus Köln – à bientôt, señor! Żółć. Κόσμος. Привет, как дела? 你好，世界。日本語のテキスト、"
    "한국어 문장. مرحبا بالعالم\n"
    "two  spaces   three    four\ttab \t mixed \n \n  end of line \n"
    "https://example.org/a-b_c?d=1&e=%20 me@example.org 12 123 1234 12345 123456 1.000.000\n"
    "🙂 🚀🚀 👩‍💻 🇪🇺 ✅ …—“quoted” ‘single’ «bas» ©®™ ½ × ÷ ≠ ∞\n"
    "I'm you're he'll we've they'd it's I'M WE'LL snake_case camelCase HTTPServer ALLCAPS x=y+z; e.g. etc.)]}>"
)
MARKS = "हिन्दी में लिखा, தமிழ் எழுத்து, ภาษาไทยที่นี่"  # scripts with combining marks
PROMPT = "The river's level rose"
GENERATED = 16
FEW, MANY = 32, 128  # tokens of the logits check: few when the model has more than BIG weights
BIG = 3_000_000_000


def check_ids(tokenizer: Any, weights: int, context_length: int) -> np.ndarray:
    """The token ids of the logits check, int64 [n]."""
    n = min(FEW if weights > BIG else MANY, context_length)
    return np.array(tokenizer(CHECK_TEXT)["input_ids"][:n])


def compare_logits(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Logits [n, vocab] of torch and of a runtime for the same ids: relative error (root mean square of the difference over
    that of the logits, both centred for each token), mean KL divergence in nats, share of tokens with the same top."""
    rows = np.array([_compare_token(a, b) for a, b in zip(ours, theirs, strict=True)])
    kld, top1 = (float(x) for x in rows[:, 2:].mean(axis=0))
    return float(np.sqrt(rows[:, 0].sum() / rows[:, 1].sum())), kld, top1


def _compare_token(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float, bool]:
    """[vocab] each: squared difference, squared size (both centred), divergence in nats, same top."""
    a, b = (x.astype(np.float64) - x.mean(dtype=np.float64) for x in (ours, theirs))
    p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (a, b))
    return ((a - b) ** 2).sum(), (a**2).sum(), (np.exp(p) * (p - q)).sum(), ours.argmax() == theirs.argmax()


def first_difference(a: list[int], b: list[int]) -> tuple[int] | None:
    """Index of the first difference in a tuple (so that 0 counts as true), None where there is none."""
    if a == b:
        return None
    return (next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))),)


def show(at: int, expected: list[int], found: list[int], tokenizer: Any) -> str:
    def words(ids: list[int]) -> list[str]:
        return [str(t) for t in tokenizer.convert_ids_to_tokens(ids[at : at + 3])]

    return (f"after {tokenizer.decode(expected[max(0, at - 8) : at])!r} come {words(expected)} and not {words(found)} "
            f"(token {at} of {len(expected)})")
