"""SVG elements. Attributes and content are escaped, because names in them come from users."""

from __future__ import annotations

from markupsafe import Markup

COLOURS = 8  # --c0 … --c7 of page.css


def element(tag: str, *content: str, **attributes: float | str) -> Markup:
    """Return <tag key="value">content</tag>. Floats get one decimal. class_ becomes class, text_anchor text-anchor."""
    given = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value)
        for key, value in attributes.items())
    inside = Markup("").join(content)
    return Markup("<{0}{1}>{2}</{0}>").format(tag, given, inside) if content else Markup("<{}{}/>").format(tag, given)


def text(x: float, y: float, content: str, style: str, anchor: str = "start") -> Markup:
    """One line of text at (x, y); style is a CSS class."""
    return element("text", content, class_=style, x=float(x), y=float(y), text_anchor=anchor)


def colour(index: int) -> str:
    """The CSS colour of item `index`. Colours repeat after COLOURS items."""
    return f"var(--c{index % COLOURS})"
