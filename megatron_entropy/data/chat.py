"""Chat templates: the jinja environment that Hugging Face templates are written for.

Source: transformers, `utils/chat_template_utils.py`; the same whitespace rules, filters and functions.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from megatron_entropy.data.schemas import Message
from megatron_entropy.errors import ConfigError

if TYPE_CHECKING:
    import jinja2
    from jinja2.nodes import Node
    from jinja2.parser import Parser


def render_chat(source: str, messages: Sequence[Message], names: Mapping[str, object]) -> str:
    """Render a conversation, with the opening of the assistant's turn at the end.

    Args:
        source: the template.
        messages: in their order.
        names: what else the template may use (`bos_token`, `enable_thinking`, ...).

    Raises:
        ConfigError: the template is not valid jinja, or refuses the conversation.
    """
    import jinja2

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return _compile(source).render(messages=turns, add_generation_prompt=True, **names)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the tokenizer's chat template fails: {error}; data.template replaces it") from error


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    import jinja2.ext
    import jinja2.sandbox

    class GenerationBlock(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's tokens; here only its content counts."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
