"""The text on which tokenizers are compared. It contains what tokenizers split differently."""

from __future__ import annotations

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
