"""An OpenAI-compatible server for one model: the library's own `transformers serve`, with imageprompt's classes.

The library's server loads the checkpoint, reads a request's images, applies the chat template, generates and streams.
Added here is what it does not do for such models: an answer ends where the positions end (the server asks for 1,024
new tokens when the client does not say), a mistake in a request is answered with its message, and the list of models
names the one that is served.
"""

from functools import partial, wraps
from typing import Any

from transformers import AutoConfig, AutoModelForMultimodalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

from .configuration import ImagePromptConfig
from .cpu import prepack_weights
from .modeling import ImagePromptForConditionalGeneration

logger = logging.get_logger(__name__)


class ServedModel(ImagePromptForConditionalGeneration):
    """The model behind the server, where `max_new_tokens` is an upper bound, as `max_tokens` is for OpenAI."""

    def generate(self, *, input_ids, generation_config: GenerationConfig, tokenizer, **kwargs):
        """`generate` for the one row of a request.

        Args:
            generation_config: its `max_new_tokens` is lowered in place to the positions that the prompt leaves; the
                server compares it with the length of the answer to tell "length" from "stop".
            tokenizer: what the server passes, the processor; the library's stop strings take a tokenizer only.

        Raises:
            ValueError: if the prompt leaves no position.
        """
        positions = getattr(self.config, "max_position_embeddings", None)
        if positions is not None and generation_config.max_new_tokens is not None:
            room = max(1, positions - input_ids.shape[-1])
            generation_config.max_new_tokens = min(generation_config.max_new_tokens, room)
        return super().generate(
            input_ids, generation_config, tokenizer=getattr(tokenizer, "tokenizer", tokenizer), **kwargs
        )


def serve(arguments: list[str]) -> None:
    """Run `transformers serve` with these arguments, until it is stopped.

    Raises:
        ValueError: if packages are missing, or the model is not one of imageprompt's with its own processor.
    """
    if not is_serve_available():
        raise ValueError('Serving needs more packages: pip install "imageprompt[serve]".')
    import typer
    from transformers.cli.serve import Serve

    @wraps(Serve)
    def command(force_model: str | None = None, **options):
        if force_model is None:
            raise ValueError("Name the model to serve, a local folder or Hub id: `imageprompt serve MODEL`.")
        name, _, revision = force_model.partition("@")
        config = AutoConfig.from_pretrained(name, revision=revision or "main")
        if not isinstance(config, ImagePromptConfig):
            raise ValueError(f"{name} is a {config.model_type} model: serve it with `transformers serve`.")
        _prepare_library()
        Serve(force_model, **options)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app(arguments, prog_name="imageprompt serve")


def _prepare_library() -> None:
    """Let the library's server, in this process, load `ServedModel` and build its web application with `_build`."""
    from transformers.cli.serving import server

    AutoModelForMultimodalLM.register(ImagePromptConfig, ServedModel, exist_ok=True)
    # The server tells from a class's name that it takes images.
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[ImagePromptConfig.model_type] = ServedModel.__name__
    server.build_server = partial(_build, server.build_server)


def _build(build_server, model_manager, *handlers, **settings):
    """The library's web application, for one model that was checked and with errors that say what is wrong."""
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError

    def refuse(request, error: Exception) -> JSONResponse:
        logger.warning(f"{request.url.path} refused: {error}")
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    name = model_manager.force_model
    model, processor = model_manager.load_model_and_processor(model_manager.process_model_name(name))
    processor.check_model(model)
    prepack_weights(model, strict=False)
    # The library would list what lies in the Hub's cache, and fail where there is none.
    model_manager.get_gen_models = lambda: [{"id": name, "object": "model", "created": 0, "owned_by": ""}]
    chat_handler = handlers[0]
    answer = chat_handler.handle_request

    async def check_and_answer(body: dict, request_id: str):
        _check_chat(body)
        return await answer(body, request_id)

    chat_handler.handle_request = check_and_answer
    app = build_server(model_manager, *handlers, **settings)
    for kind in (ValueError, TemplateError):
        app.add_exception_handler(kind, refuse)
    return app


def _check_chat(body: dict[str, Any]) -> None:
    """Refuse what the library's server would drop in silence, such as an image of another form, or stumble over."""
    messages, stop = body.get("messages"), body.get("stop")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages` is a list of at least one message, got {messages!r}.")
    if not isinstance(stop, (str, list, type(None))):
        raise ValueError(f"`stop` is a text or a list of texts, got {stop!r}.")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"Message {number} has no `role`.")
        content = message.get("content")
        if not isinstance(content, (str, list)):
            raise ValueError(f"Message {number} has no `content`: a text, or a list of parts.")
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            is_text = kind == "text" and isinstance(part.get("text"), str)
            url = part.get("image_url") if kind == "image_url" else None
            if not is_text and not (isinstance(url, dict) and isinstance(url.get("url"), str)):
                raise ValueError(
                    f"Message {number} has a part of type {kind!r} that is not understood: parts are "
                    '{"type": "text", "text": …} and {"type": "image_url", "image_url": {"url": …}}.'
                )
