"""Chat templates: Jinja as Hugging Face runs it, in a sandbox, over plain data.

The dialect: trim_blocks, lstrip_blocks, loop controls, `raise_exception`, `strftime_now`, a `tojson` that neither
escapes HTML nor sorts keys, and the `{% generation %}` block. A template is code from the internet: it sees only
JSON types, cannot change them, and its loops, repetitions and output are bounded.

Jinja is imported on first use: it costs 60 ms, and `import paceline` should not pay for it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import ChatTemplateError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT_CHARS = 1 << 26  # 64 Mi characters: far above any context, far below a machine's memory
MAX_RANGE_ITEMS = 100_000  # summed over all range() calls of one render; real templates use it for a few dozen
_CONTINUE_MARK = "\ue000paceline-continue\ue001 "  # the final space shows whether the template trims its messages

Messages = Sequence[Mapping[str, Any]]


def render_chat(
    template: str,
    messages: Messages,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of a conversation. `variables` (special tokens, enable_thinking, ...) are names in the template.

    `continue_final_message` leaves the last message open, to be continued, and excludes `add_generation_prompt`.

    Raises ChatTemplateError for messages of the wrong form, a template that does not compile or refuses the
    messages, or one that exceeds the bounds.
    """
    if continue_final_message and add_generation_prompt:
        raise ChatTemplateError(
            "add_generation_prompt and continue_final_message exclude each other: one opens a new reply, "
            "the other continues the last message"
        )
    compiled = _compile(template)
    chat = check_messages(messages, keep_parts=_reads_content_parts(template))
    final_text = _mark_final_message(chat) if continue_final_message else None
    context = {
        **_plain(dict(variables or {}), "chat template variables"),
        "messages": chat,
        "tools": _objects(tools, "tools"),
        "documents": _objects(documents, "documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    text = _render(compiled, context)
    return text if final_text is None else _cut_at_mark(text, final_text)


def read_template(given: str) -> str:
    """The source of a chat template that a user gave: a Jinja source has a brace somewhere, anything else names a file.

    Raises ChatTemplateError where it cannot be read or does not compile.
    """
    source = given
    if "{" not in given:
        try:
            source = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ChatTemplateError(
                f"chat template '{given}' is neither a Jinja template nor a readable file ({error})"
            ) from error
    _compile(source)
    return source


def check_messages(messages: Messages, *, keep_parts: bool = True) -> list[dict[str, Any]]:
    """The messages as fresh plain data, without keys whose value is None (templates test for presence).

    Each needs a `role` string; `content` is a string or a list of {"type": "text", "text": ...} parts, which
    `keep_parts=False` joins by newlines for templates that only know strings.
    Raises ChatTemplateError naming the message.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatTemplateError(
            f"messages must be a list of {{'role', 'content'}} objects, got {type(messages).__name__}"
        )
    if not messages:
        raise ChatTemplateError("messages is empty: a conversation needs at least one message")
    return [_check_message(message, f"messages[{i}]", keep_parts) for i, message in enumerate(messages)]


def _check_message(message: Any, where: str, keep_parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"{where} must be an object with 'role' and 'content', got {type(message).__name__}")
    plain: dict[str, Any] = _plain({k: v for k, v in message.items() if v is not None}, where)
    role = plain.get("role")
    if not isinstance(role, str) or not role:
        raise ChatTemplateError(f"{where} needs a 'role': a string such as 'user', 'assistant' or 'system'")
    content = plain.get("content")
    if isinstance(content, list):
        texts = [_part_text(part, f"{where}.content[{j}]") for j, part in enumerate(content)]
        if not keep_parts:
            plain["content"] = "\n".join(texts)
    elif content is None:
        if not any(key in plain for key in ("tool_calls", "reasoning_content")):
            raise ChatTemplateError(f"{where} (role '{role}') has no 'content'")
    elif not isinstance(content, str):
        raise ChatTemplateError(
            f"{where}.content must be a string or a list of text parts, got {type(content).__name__}"
        )
    return plain


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if not isinstance(part, dict) or kind != "text":
        raise ChatTemplateError(
            f"{where} is of type '{kind}': only {{'type': 'text', 'text': ...}} parts are supported"
        )
    if not isinstance(part.get("text"), str):
        raise ChatTemplateError(f"{where} is a text part without a 'text' string")
    text: str = part["text"]
    return text


def _plain(value: Any, where: str) -> Any:
    """A deep copy in exact JSON types: an object with methods would hand the template a way out of the sandbox."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    raise ChatTemplateError(
        f"{where} holds a {type(value).__name__}: only strings, numbers, lists and objects can be rendered"
    )


def _objects(values: Sequence[Mapping[str, Any]] | None, what: str) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise ChatTemplateError(f"{what}[{i}] must be a JSON object, got {type(value).__name__}")
    plain: list[dict[str, Any]] = _plain(list(values), what)
    return plain


# ------------------------------------------------------------------------------- continuing the last message


def _mark_final_message(chat: list[dict[str, Any]]) -> str:
    """Append the mark to the last message's text, so that the rendering can be cut where that ends; return the text."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_MARK
        return content
    if not content:
        raise ChatTemplateError("continue_final_message needs a last message with text to continue")
    text: str = content[-1]["text"]
    content[-1]["text"] = text + _CONTINUE_MARK
    return text


def _cut_at_mark(text: str, final_text: str) -> str:
    start = text.rfind(_CONTINUE_MARK.rstrip())
    if start < 0 or final_text.strip() not in text[:start]:
        raise ChatTemplateError(
            "continue_final_message: this chat template changes or drops the last message, so it cannot be continued"
        )
    kept = text[:start]
    # A template that trims its messages took the mark's space, and would have taken the text's own trailing ones.
    return kept if text.startswith(_CONTINUE_MARK, start) else kept.rstrip()


# --------------------------------------------------------------------------------------------------- the sandbox


def _render(compiled: Template, context: dict[str, Any]) -> str:
    from jinja2 import TemplateError

    pieces: list[str] = []
    size = 0
    try:
        for piece in compiled.generate(**context, range=_bounded_range()):
            size += len(piece)
            if size > MAX_OUTPUT_CHARS:
                raise ChatTemplateError(f"the chat template writes over {MAX_OUTPUT_CHARS} characters")
            pieces.append(piece)
    except ChatTemplateError:
        raise
    except TemplateError as error:
        raise ChatTemplateError(f"the chat template refuses these messages: {error.message}") from error
    except RecursionError as error:
        raise ChatTemplateError("the chat template recurses without end") from error
    except MemoryError as error:
        raise ChatTemplateError("the chat template needs more memory than there is") from error
    except Exception as error:  # what template code raises is a fact about the template, whatever its type
        raise ChatTemplateError(
            f"the chat template fails on these messages: {type(error).__name__}: {error}"
        ) from error
    return "".join(pieces)


def _bounded_range() -> Any:
    """range() whose calls within one render share a budget: nested loops of allowed length must not multiply."""
    left = MAX_RANGE_ITEMS

    def bounded(*args: int) -> range:
        nonlocal left
        items = range(*args)
        left -= len(items)
        if left < 0:
            raise ChatTemplateError(f"the chat template loops over more than {MAX_RANGE_ITEMS} range() items")
        return items

    return bounded


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(template)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error


@functools.lru_cache(maxsize=16)
def _reads_content_parts(template: str) -> bool:
    """Whether the template iterates over a message's `content`, directly or through a name set to it."""
    from jinja2 import nodes

    tree = _environment().parse(template)

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"

    aliases = {
        assign.target.name
        for assign in tree.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and is_content(assign.node)
    }
    return any(
        is_content(loop.iter) or (isinstance(loop.iter, nodes.Name) and loop.iter.name in aliases)
        for loop in tree.find_all(nodes.For)
    )


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}` marks what the assistant wrote, for training masks; here it is only a scope."""

        tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration style)

        def parse(self, parser: Any) -> nodes.Node:
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=lineno)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _refuse_huge(operator, left, right)
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    del environment.globals["lipsum"]  # writes as much text as it is asked to
    return environment


def _refuse_huge(operator: str, left: Any, right: Any) -> None:
    """`'a' * 10**10` and `9**9**9` would exhaust the machine before anything is written."""
    if operator == "**":
        huge = isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > 4096
    else:
        sizes = [len(v) if isinstance(v, (str, list, tuple)) else abs(v) for v in (left, right)]
        huge = any(isinstance(v, (str, list, tuple)) for v in (left, right)) and sizes[0] * sizes[1] > MAX_OUTPUT_CHARS
    if huge:
        raise ChatTemplateError(f"the chat template computes a value that is too large ('{operator}')")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
