"""Personal data, secrets and damage in text, by patterns that are bounded and, where they can be, verified.

A pattern is here only when a match is rarely something else: card numbers pass Luhn, IBANs pass mod 97,
secrets have their issuer's prefix, or a name such as `api_key` before a value that is no word. Names that RFC 2606
and numbers that the North American plan reserve for documentation and fiction do not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["KINDS", "Kind", "find", "masked", "redacted"]


@dataclass(frozen=True)
class Kind:
    """One thing to look for: `code` is the finding that it belongs to, `name` what a person reads.

    `needs` is a literal without which nothing matches: most texts are passed over by it alone.
    """

    code: str
    name: str
    pattern: re.Pattern[str]
    verify: Callable[[str], bool]
    needs: str


def _luhn(text: str) -> bool:
    digits = [int(c) for c in text if c.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) < 3:
        return False
    total = sum(digits[-1::-2]) + sum(sum(divmod(2 * d, 10)) for d in digits[-2::-2])
    return total % 10 == 0


def _iban(text: str) -> bool:
    compact = text.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def _ssn(text: str) -> bool:
    area, group, serial = text.split("-")
    # Areas never issued (000, 666, 900-999) and the numbers once printed in advertisements.
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000" and text not in (
        "123-45-6789", "078-05-1120", "219-09-9999"
    )  # fmt: skip


# RFC 2606: example.com, .org and .net, and four top-level domains. Every other name may be a person's.
_RESERVED = re.compile(r"(?i)(?:[@.]example\.(?:com|org|net)|\.(?:example|test|invalid|localhost))$")


_FILES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".ico")  # icon@2x.png is no address


def _email(text: str) -> bool:
    lowered = text.lower()
    nobody = lowered.startswith(("noreply@", "no-reply@", "git@"))  # git@HOST is how repositories are written
    return not _RESERVED.search(text) and not nobody and not lowered.endswith(_FILES)


def _phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    # 555-01xx is reserved for fiction; a run of one digit is a placeholder.
    return 10 <= len(digits) <= 15 and len(set(digits)) > 3 and "55501" not in digits


_PLACEHOLDER = ("example", "xxx", "your", "placeholder", "changeme", "123456", "****", "redacted", "secret", "password")


_NAMED = re.compile(r"[a-z_]+\.\w+|[A-Z][A-Z0-9_]+")


def _assigned(text: str) -> bool:
    """Whether the value behind the name is one that a person or a generator chose, and no word or variable."""
    value = re.split(r"[:=]", text, maxsplit=1)[1].strip("\"'` \t").rstrip(".!?)")
    odd = any(not c.isalnum() and c not in "._-/" for c in value)
    kinds = [any(map(str.isalpha, value)), any(map(str.isdigit, value)), odd]
    # A variable, a template's hole, a call, an attribute, a constant's name.
    called = value[:1] in "$<{%[(" or "(" in value or "[" in value or _NAMED.fullmatch(value)
    return sum(kinds) >= 2 and len(set(value)) > 4 and not called and not any(w in value.lower() for w in _PLACEHOLDER)


def _real_key(text: str) -> bool:
    lowered = text.lower()
    return len(set(text)) > 8 and not any(w in lowered for w in ("example", "xxxx", "your", "placeholder", "123456789"))


def _any(text: str) -> bool:
    return True


def _kind(code: str, name: str, pattern: str, verify: Callable[[str], bool] = _any, needs: str = "") -> Kind:
    return Kind(code, name, re.compile(pattern), verify, needs)


KINDS: tuple[Kind, ...] = (
    _kind("pii", "e-mail address", r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,12}\b", _email,
          "@"),
    _kind("pii", "payment card number", r"(?<![\w.-])[3-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7}(?![\w-])", _luhn),
    _kind("pii", "IBAN", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", _iban),
    _kind("pii", "US social security number", r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])", _ssn),
    _kind("pii", "phone number",
          r"(?<![\w+])\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}(?!\w)", _phone, "+"),
    # Of the North American plan: neither area nor exchange begins with 0 or 1.
    _kind("pii", "phone number",
          r"(?<![\w.+-])(?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])[2-9]\d\d[-.]\d{4}(?![\w-]|\.\d)", _phone),
    _kind("secret", "AWS access key", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", _real_key, "IA"),
    _kind("secret", "GitHub token", r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{50,90})\b", _real_key,
          "_"),
    _kind("secret", "GitLab token", r"\bglpat-[A-Za-z0-9_-]{20,64}(?![\w-])", _real_key, "glpat-"),
    _kind("secret", "secret by its name",
          r"(?i)(?:passw(?:or)?d|passphrase|api[_-]?key|secret[_-]?(?:access[_-]?)?key|access[_-]?token|auth[_-]?token|"
          r"client[_-]?secret)[\"']?[ \t]{0,3}[:=][ \t]{0,3}[\"']?[^\s\"',;<>]{6,200}", _assigned),
    _kind("secret", "API key", r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,200}(?![\w-])", _real_key, "sk-"),
    _kind("secret", "Hugging Face token", r"\bhf_[A-Za-z0-9]{34,40}\b", _real_key, "hf_"),
    _kind("secret", "Slack token", r"\bxox[abprs]-[A-Za-z0-9-]{20,120}(?![\w-])", _real_key, "xox"),
    _kind("secret", "Google API key", r"\bAIza[0-9A-Za-z_-]{35}(?![\w-])", _real_key, "AIza"),
    _kind("secret", "Stripe key", r"\b[rs]k_live_[0-9A-Za-z]{20,100}\b", _real_key, "k_live_"),
    _kind("secret", "private key", r"-----BEGIN (?:RSA |EC |OPENSSH |DSA |PGP )?PRIVATE KEY(?: BLOCK)?-----"),
    _kind("secret", "signed token (JWT)",
          r"\beyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,2000}\.[A-Za-z0-9_-]{20,600}", needs="eyJ"),
    _kind("secret", "password in a URL",
          r"\b[a-z][a-z0-9+]{2,12}://[^\s/:@]{1,64}:[^\s/:@]{6,64}@[\w.-]{4,100}", _real_key, "://"),
    _kind("broken_text", "replacement character", "\ufffd"),
    _kind("broken_text", "text decoded twice", "Ã[\u0080-\u00bf\u0178]|â€[\u2122\u0153\u009d\u201c\u201d\u02dc]"),
    _kind("placeholder", "unfilled placeholder", r"\{\{ ?[A-Za-z_ ]{2,30} ?\}\}"),
    _kind("placeholder", "text to be inserted", r"\[(?:insert|Insert|INSERT) [A-Za-z ]{2,30}\]"),
    _kind("placeholder", "filler text", r"[Ll]orem ipsum dolor", needs="orem ipsum"),
    _kind("boilerplate", "a model speaking of itself", r"\b[Aa]s an AI (?:language model|assistant)\b",
          needs="s an AI"),
)  # fmt: skip


def find(text: str) -> Iterator[tuple[Kind, int, str]]:
    """(kind, offset, matched text) in one long text; run it over many rows joined by newlines and NUL."""
    taken: list[tuple[int, int]] = []  # what is a secret is not an address too: the password and host of a URL
    for kind in sorted(KINDS, key=lambda k: k.code != "secret"):
        if kind.needs not in text:
            continue
        for match in kind.pattern.finditer(text):
            inside = any(start < match.end() and match.start() < end for start, end in taken)
            if inside or not kind.verify(match[0]):
                continue
            if kind.code == "secret":
                taken.append(match.span())
            yield kind, match.start(), match[0]


def masked(kind: Kind, text: str) -> str:
    """What may be shown of a match: secrets and personal data never whole."""
    if kind.code in ("pii", "secret"):
        return f"{kind.name} {text[:4]}…"
    return f"{kind.name} {text[:40]!r}"


def redacted(text: str) -> str:
    """The text with personal data and secrets masked, for excerpts in reports and logs."""
    for kind, _, match in list(find(text)):
        if kind.code in ("pii", "secret"):
            text = text.replace(match, f"[{masked(kind, match)}]")
    return text
