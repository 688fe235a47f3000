"""One row of messages as the model sees it: chat template, trained answers, EOS.

A conversation is rendered step by step: `messages[:i]` with the generation prompt is what the server will
send to the model, and what `messages[:i+1]` adds to it is the answer. Each answer up to and including its
end-of-turn token is trained, nothing else is. No `{% generation %}` marks are needed in the template.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from ft_ray import recipe as recipes
from ft_ray.errors import DataError, ModelError
from ft_ray.lean_imports import load_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Chat", "Encoded", "chat_of", "load_tokenizer"]

IGNORED = -100
"""Label of a token that carries no loss."""

Message = Mapping[str, str]
_log = logging.getLogger("ft_ray")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder. Raises ModelError when there is none that can be used."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ModelError(f"{folder} holds no tokenizer (tokenizer.json): copy the base model's tokenizer files there.")
    load_transformers()
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds for a broken tokenizer
        raise ModelError(
            f"the tokenizer in {folder} cannot be loaded ({str(error).splitlines()[0]}): "
            "copy the base model's tokenizer files again."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"{folder} holds a {type(tokenizer).__name__}, not a text tokenizer.")
    return tokenizer


def chat_of(model: recipes.Model, folder: Path) -> Chat:
    """The chat format of the model in `folder`, with the recipe's own template where it gives one."""
    template = None
    if model.chat_template is not None:
        try:
            template = Path(model.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"model.chat_template {model.chat_template} cannot be read ({error}).") from error
    return Chat(load_tokenizer(folder, trust_remote_code=model.trust_remote_code), template)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row, and its labels: -100 outside the trained answers; both of equal length."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """Tokens that carry loss."""
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass
class _Pieces:
    """Text of one row cut into (text, trained) pieces, in order."""

    pieces: list[tuple[str, bool]] = field(default_factory=list)

    def add(self, text: str, trained: bool) -> None:
        if not text:
            return
        if self.pieces and not trained and not self.pieces[-1][1]:
            self.pieces[-1] = (self.pieces[-1][0] + text, False)
        else:
            self.pieces.append((text, trained))


class Chat:
    """The chat format of one tokenizer.

    `template` replaces the tokenizer's own chat template (Jinja text). Raises ModelError when there is no
    template or no EOS token, or when the template closes an answer with no end-of-turn token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        own = getattr(tokenizer, "chat_template", None)
        if isinstance(own, dict):
            own = own.get("default")
        text = template if template is not None else own
        if not text:
            raise ModelError(
                "the model has no chat template: set model.chat_template to a Jinja file, "
                "for example one copied from the instruct version of the model."
            )
        self.tokenizer = tokenizer
        self.template: str = text
        self.template_hash = hashlib.sha256(text.encode()).hexdigest()
        # The sandboxed environment that transformers itself renders with. apply_chat_template costs ten times the
        # rendering, which matters at a million rows; a test holds the two equal.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            self._compiled = _compile_jinja_template(text)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template is not valid Jinja (line {error.lineno}: {error.message}).") from error
        # Jinja copies the globals at every rendering; a plain dict is copied five times as fast as its ChainMap.
        self._compiled.globals = dict(self._compiled.globals)
        self._variables = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend if hasattr(backend, "encode_batch_fast") else None
        self._said_last_only = False
        self.eos_ids = self._find_eos()
        decoded = [str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(self.eos_ids)]
        self._eos_texts = tuple(decoded)
        self._joint = not self._pieces_tokenize_alone()

    def __reduce__(self) -> tuple[type[Chat], tuple[PreTrainedTokenizerBase, str]]:
        return (Chat, (self.tokenizer, self.template))

    # Rendering

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        try:
            return str(
                self._compiled.render(
                    messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **self._variables
                )
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(m.get("role", "?") for m in messages)
            raise DataError(
                f"the chat template refuses the roles {roles} ({error}): change the row's roles."
            ) from error

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The messages with the generation prompt: what the server renders."""
        return self._render(messages, True)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of `prompt_text`: exactly what the server will see."""
        return self._tokenize([self.prompt_text(messages)])[0]

    def _cut(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not answers:
            raise DataError("the row has no assistant answer to train on.")
        for i in answers:
            for eos in self._eos_texts:
                if eos in messages[i]["content"]:
                    raise DataError(
                        f"the answer contains the end-of-turn token {eos!r}, at which the model would stop: remove it."
                    )
        pieces = self._cut_at(messages, answers)
        if pieces is None and len(answers) > 1:
            if not self._said_last_only:
                self._said_last_only = True
                _log.warning(
                    "the chat template rewrites earlier turns (it may drop their reasoning), so of a conversation "
                    "with several answers only the last one is trained"
                )
            pieces = self._cut_at(messages, answers[-1:])
        if pieces is None:
            raise DataError(
                "the chat template renders the answer differently from the generation prompt, so the trained "
                "tokens cannot be told from the prompt: use a template whose prompt is a prefix of the whole row."
            )
        return pieces

    def _cut_at(self, messages: Sequence[Message], answers: Sequence[int]) -> list[tuple[str, bool]] | None:
        """Pieces with the given answers trained; None where one rendering is no prefix of the next."""
        out, done = _Pieces(), ""
        for i in answers:
            prompt = self._render(messages[:i], True)
            full = self._render(messages[: i + 1], False)
            if not prompt.startswith(done) or not full.startswith(prompt):
                return None
            answer = full[len(prompt) :]
            ends = [at + len(e) for e in self._eos_texts if (at := answer.find(e)) >= 0]
            if not ends:
                raise DataError(
                    "the chat template ends the answer with none of the tokens "
                    f"{', '.join(self._eos_texts)}: the model would never learn to stop; use a template that adds EOS."
                )
            end = min(ends)
            out.add(prompt[len(done) :], False)
            out.add(answer[:end], True)
            # What follows the EOS (usually a newline) belongs to the next prompt: it is never generated.
            done = full[: len(prompt) + end]
        return out.pieces

    # Tokens

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if self._backend is not None:
            return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [list(self.tokenizer.encode(t, add_special_tokens=False)) for t in texts]

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Token ids and labels of one row. Raises DataError where no answer can be trained."""
        result = self.encode_many([messages])[0]
        if isinstance(result, DataError):
            raise result
        return result

    def encode_many(self, rows: Sequence[Sequence[Message]]) -> list[Encoded | DataError]:
        """`encode` for a batch, on all cores; a row that cannot be encoded gives its DataError in its place."""
        cut: list[list[tuple[str, bool]] | DataError] = []
        for messages in rows:
            try:
                cut.append(self._cut(messages))
            except DataError as error:
                cut.append(error)
        if self._joint:
            return [c if isinstance(c, DataError) else self._checked(self._encode_joint(c)) for c in cut]
        texts = [text for c in cut if not isinstance(c, DataError) for text, _ in c]
        tokens = iter(self._tokenize(texts))
        return [c if isinstance(c, DataError) else self._joined(c, tokens) for c in cut]

    def _joined(self, pieces: Sequence[tuple[str, bool]], tokens: Iterator[list[int]]) -> Encoded | DataError:
        input_ids: list[int] = []
        labels: list[int] = []
        fault: DataError | None = None
        for _, trained in pieces:
            ids = next(tokens)
            input_ids += ids
            labels += ids if trained else [IGNORED] * len(ids)
            if trained and ids[-1] not in self.eos_ids:
                fault = self._no_eos(ids[-1])
        return fault or Encoded(input_ids, labels)

    def _encode_joint(self, pieces: Sequence[tuple[str, bool]]) -> Encoded:
        """For tokenizers that mark the start of a text (SentencePiece): one tokenisation, labels by offsets.

        The tokens of the first prompt must be those that the server sees alone.
        """
        text = "".join(t for t, _ in pieces)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
        labels, at, spans = [IGNORED] * len(ids), 0, []
        for piece, trained in pieces:
            if trained:
                spans.append((at, at + len(piece)))
            at += len(piece)
        for k, (start, end) in enumerate(offsets):
            if end > start and any(a <= start and end <= b for a, b in spans):
                labels[k] = ids[k]
        return Encoded(ids, labels)

    def _checked(self, encoded: Encoded) -> Encoded | DataError:
        """The check on the labels: something is trained, and each trained run ends in EOS."""
        labels, found = encoded.labels, False
        for k, label in enumerate(labels):
            if label != IGNORED and (k + 1 == len(labels) or labels[k + 1] == IGNORED):
                found = True
                if label not in self.eos_ids:
                    return self._no_eos(label)
        return encoded if found else DataError("no token of the row is trained: its answer renders to nothing.")

    def _no_eos(self, token: int) -> DataError:
        return DataError(
            f"the trained answer ends in {self.tokenizer.convert_ids_to_tokens(token)!r}, not in EOS "
            f"({', '.join(self._eos_texts)}): the model would never learn to stop."
        )

    def verify(self) -> None:
        """Raises DataError when even a plain question and answer cannot be trained: the template is to blame."""
        self.encode([{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "Zebra 12"}])

    def segments(self, encoded: Encoded) -> list[tuple[str, bool]]:
        """Text pieces of a row with whether each is trained, for a coloured preview."""
        out: list[tuple[str, bool]] = []
        start = 0
        flags = [label != IGNORED for label in encoded.labels]
        for k in range(1, len(flags) + 1):
            if k == len(flags) or flags[k] != flags[start]:
                out.append((str(self.tokenizer.decode(encoded.input_ids[start:k])), flags[start]))
                start = k
        return out

    # What the tokenizer and its template are like

    def _find_eos(self) -> frozenset[int]:
        ids: set[int] = set()
        if self.tokenizer.eos_token_id is not None:
            ids.add(int(self.tokenizer.eos_token_id))
        folder = Path(str(self.tokenizer.name_or_path))
        known = None
        for file in ("generation_config.json", "config.json"):  # as transformers, vLLM and our merged folders do
            with contextlib.suppress(OSError, ValueError, AttributeError):
                known = json.loads((folder / file).read_text(encoding="utf-8")).get("eos_token_id")
            if known is not None:
                break
        ids |= {int(i) for i in (known if isinstance(known, list) else [known]) if i is not None}
        closing = self._closing_token()
        if closing is not None:
            if ids and closing not in ids:
                _log.warning(
                    "the chat template ends answers with %s, which is not among the model's EOS tokens; it is added",
                    self.tokenizer.convert_ids_to_tokens(closing),
                )
            ids.add(closing)
        if not ids:
            raise ModelError("the tokenizer names no EOS token: set eos_token in tokenizer_config.json.")
        return frozenset(ids)

    def _closing_token(self) -> int | None:
        """The special token that the template puts right after an answer, or None."""
        special = {str(t.content): i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        text = self._render([{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "Zebra"}], False)
        tail = text[text.rfind("Zebra") + len("Zebra") :].lstrip()
        found = [t for t in special if tail.startswith(t)]
        return special[max(found, key=len)] if found else None

    def _pieces_tokenize_alone(self) -> bool:
        """Whether an answer tokenised alone has the tokens that it has after its prompt."""
        for answer in ("Zebra 12", "{}", "a", " x"):
            try:
                pieces = self._cut([{"role": "user", "content": "Q?"}, {"role": "assistant", "content": answer}])
            except DataError:
                return True  # said row by row, with its place
            whole, *parts = self._tokenize(["".join(t for t, _ in pieces), *(t for t, _ in pieces)])
            if whole != [i for part in parts for i in part]:
                return False
        return True
