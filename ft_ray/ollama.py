"""An Ollama Modelfile whose template and stop tokens are those that were trained.

Ollama renders prompts with Go templates, not Jinja. Nothing is guessed: the model's own template is rendered for
probing conversations, read as `before + content + after` for each role, written in Go's words, and the result is held
against renderings of the Jinja template that the reading has not seen. What differs anywhere is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ft_ray.chat import Chat
from ft_ray.errors import DataError, ModelError

__all__ = ["Turns", "modelfile", "translate"]

_MARKS = {"system": "⟦SYS⟧", "user": "⟦USR⟧", "assistant": "⟦ANS⟧"}
_PROBES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "one"),),
    (("system", "be brief"), ("user", "one")),
    (("user", "one"), ("assistant", "two"), ("user", "three")),
    (("system", "s"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "4"), ("user", "five")),
    (("user", "  spaces around  "), ("assistant", " x "), ("user", "a\n\nb ")),
)


@dataclass(frozen=True)
class Turns:
    """A template read as text around each role's content. `start` opens every prompt, `prompt` asks for an answer.

    `default` is what a conversation without a system message begins with instead (a system turn of the template's own).
    `trims`: the Jinja template strips white space around messages, which Ollama cannot: clients must.
    """

    start: str
    around: dict[str, tuple[str, str]]
    prompt: str
    default: str = ""
    trims: bool = False

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """What Ollama's engine makes of the Go template below."""
        parts = [self.start]
        if self.default and messages[0][0] != "system":
            parts.append(self.default)
        for role, content in messages:
            before, after = self.around[role]
            parts += [before, content, after]
        return "".join(parts) + self.prompt

    def go(self) -> str:
        """The Go template, over Ollama's .Messages."""
        out = [_go(self.start)]
        if self.default:
            out.append('{{- if ne (index .Messages 0).Role "system" }}' + _go(self.default) + "{{ end }}")
        out.append("{{- range .Messages }}")
        for k, role in enumerate(r for r in ("system", "user", "assistant") if r in self.around):
            before, after = self.around[role]
            word = "if" if k == 0 else "else if"
            out.append(f'{{{{- {word} eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{_go(after)}')
        out.append("{{- end }}{{- end }}" + _go(self.prompt))
        return "".join(out)


def _go(text: str) -> str:
    """Literal text as a Go string action: nothing in it is read as markup, and no white space is trimmed."""
    if not text:
        return ""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return '{{ "' + quoted.replace("\r", "\\r") + '" }}'


def translate(chat: Chat) -> Turns:
    """The chat's template as `Turns`. Raises ModelError where it cannot be had with Ollama's means, with the reason."""
    messages = [{"role": r, "content": _MARKS[r]} for r in ("system", "user", "assistant", "user")]
    try:
        whole = chat.prompt_text(messages)
        has_system = _MARKS["system"] in whole
    except DataError:
        has_system = False
    turns = _read(chat, has_system)
    for probe in _PROBES:
        if not has_system and probe[0][0] == "system":
            continue
        wanted = chat.prompt_text([{"role": r, "content": c} for r, c in probe])
        if turns.render(probe) == wanted:
            continue
        if turns.render([(r, c.strip()) for r, c in probe]) == wanted:
            turns = replace(turns, trims=True)
        else:
            roles = ", ".join(r for r, _ in probe)
            raise ModelError(
                "the chat template cannot be written for Ollama: it is more than text around each message (a "
                f"conversation of {roles} comes out otherwise{_why(chat)}); serve this model with vLLM, which renders "
                "the template itself."
            )
    return turns


def _why(chat: Chat) -> str:
    signs = {
        "strftime_now": "it prints the date",
        "tools": "it lists tools",
        "loop.last": "its last turn differs",
        "split(": "it cuts answers",
    }
    for sign, said in signs.items():
        if sign in chat.template:
            return f"; {said}"
    return ""


def _read(chat: Chat, has_system: bool) -> Turns:
    """Reads the pieces off two renderings: with a system message where there can be one, and without."""
    user, answer = _MARKS["user"], _MARKS["assistant"]
    plain = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}] * 2
    text = chat.prompt_text([*plain, {"role": "user", "content": user}])
    pieces = re.split(f"({re.escape(user)}|{re.escape(answer)})", text)
    if len(pieces) != 11:
        raise ModelError(
            "the chat template cannot be written for Ollama: it drops or repeats earlier turns; serve this model with "
            "vLLM, which renders the template itself."
        )
    opening, ask, again, ask2, last = pieces[0], pieces[2], pieces[4], pieces[6], pieces[10]
    single = chat.prompt_text([{"role": "user", "content": user}])
    if single != opening + user + last or not ask == ask2 == last or again != pieces[8]:
        raise ModelError(
            "the chat template cannot be written for Ollama: its turns depend on their place in the conversation; "
            "serve this model with vLLM, which renders the template itself."
        )
    # An answer's end and the next question's beginning: the part that also ends the opening is the latter. Where a
    # question's end stops and an answer's beginning starts cannot be told, and need not: Ollama puts both.
    start, before_user = _common_end(opening, again)
    around = {"user": (before_user, ""), "assistant": (ask, again[: len(again) - len(before_user)])}
    default = ""
    if has_system:
        begun = chat.prompt_text([{"role": "system", "content": _MARKS["system"]}, {"role": "user", "content": user}])
        first, _, rest = begun.partition(_MARKS["system"])
        middle = rest.partition(user)[0]
        after_system = middle[: len(middle) - len(before_user)] if middle.endswith(before_user) else middle
        same = len(_common_start(start, first))
        start, default = start[:same], start[same:]
        around["system"] = (first[same:], after_system)
    return Turns(start, around, last, default)


def _common_start(a: str, b: str) -> str:
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:size]


def _common_end(a: str, b: str) -> tuple[str, str]:
    """(`a` without the end it shares with `b`, that end)."""
    size = len(_common_start(a[::-1], b[::-1]))
    return a[: len(a) - size], a[len(a) - size :]


def modelfile(chat: Chat, weights: str, *, temperature: float = 0.0, context: int | None = None) -> str:
    """The Modelfile for `weights` (a GGUF beside it). Raises ModelError where the template cannot be translated."""
    turns = translate(chat)
    stops = [str(chat.tokenizer.convert_ids_to_tokens(i)) for i in sorted(chat.eos_ids)]
    lines = ["# The trained template strips white space around messages: clients must too."] if turns.trims else []
    lines += [f"FROM {weights}", f'TEMPLATE """{turns.go()}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines.append(f"PARAMETER temperature {temperature:g}")
    if context:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"
