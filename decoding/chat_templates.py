"""How a checkpoint's model is talked to: the Jinja template in its files.

Rendered as `transformers` does it (`apply_chat_template`), in a sandbox: a template is somebody
else's program.
"""

import datetime
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tilescan.models.checkpoint_errors import CheckpointError, short
from tilescan.models.json_files import read_json

Messages = Sequence[Mapping[str, str]]


class ChatTemplate:
    """A template from messages to the text that the model reads.

    Args:
      source: in Jinja.
      variables: that it may use besides the messages, such as bos_token.
      where: the file, for errors.

    Raises:
      CheckpointError: the source is not a template.
    """

    def __init__(self, source: str, variables: Mapping[str, str], where: str):
        import jinja2

        self.source, self.variables, self.where = source, dict(variables), where
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{where}: the chat template is not Jinja: {error}") from error

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """Returns the text of a conversation.

        Args:
          messages: each with "role" ("system", "user" or "assistant") and "content".
          add_generation_prompt: whether it ends with what an answer begins with.

        Raises:
          CheckpointError: the template fails, or refuses these messages.
        """
        given = dict(messages=list(messages), add_generation_prompt=add_generation_prompt)
        absent = dict(tools=None, documents=None)
        try:
            return self._template.render(**self.variables, **absent, **given)
        except Exception as error:  # of any kind: it is a program
            raise CheckpointError(f"{self.where}: the chat template fails: {error}") from error


@functools.cache
def _environment() -> Any:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks answers for training; here it is text."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, **options):  # Jinja's own filter escapes HTML
        return json.dumps(value, **(dict(ensure_ascii=False) | options))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def folder_template(folder: pathlib.Path) -> ChatTemplate | None:
    """Returns the template of a folder of Hugging Face, or None if it has none.

    It is that of chat_template.jinja, of chat_template.json, or of tokenizer_config.json; of
    several with names, the one named "default".

    Raises:
      CheckpointError: a file that can't be read, a template of a wrong type, or one that is not
        Jinja.
    """
    file = folder / "tokenizer_config.json"
    config = read_json(file, "is not a configuration") if file.exists() else {}
    source = config.get("chat_template")
    for path in (folder / "chat_template.json", folder / "chat_template.jinja"):
        if path.is_file():
            file, source = path, path.read_text("utf-8", errors="replace")
            if path.suffix == ".json":
                source = read_json(path, "is not a template").get("chat_template")
    if isinstance(source, list):
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{file}: chat_template={short(source)} must be a text")
    contents = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    variables = {key: value for key, value in contents.items() if isinstance(value, str)}
    return ChatTemplate(source, variables, str(file))


def gguf_template(metadata: Mapping[str, Any], where: str) -> ChatTemplate | None:
    """Returns the template of a GGUF file's metadata (arrays hold bytes), or None.

    Raises:
      CheckpointError: a template that is not Jinja, or not a text.
    """
    source = metadata.get("tokenizer.chat_template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{where}: tokenizer.chat_template={short(source)} must be a text")
    tokens, variables = metadata.get("tokenizer.ggml.tokens") or [], {}
    for name in ("bos", "eos", "padding"):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(index) is int and 0 <= index < len(tokens):
            key = "pad_token" if name == "padding" else f"{name}_token"
            variables[key] = tokens[index].decode("utf-8", "replace")
    return ChatTemplate(source, variables, where)
