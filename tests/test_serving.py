"""Serving: `imageprompt serve`, asked over HTTP, and what vLLM's Transformers backend does with a model.

The server is the one that docs/serving.md starts, in a process of its own; the real `openai` client asks it, and every
answer must be the text that `generate` gives in this process. vLLM itself is not installed: the tests of pain 24 do
what its Transformers backend does with a model, step by step, and compare with the model called directly.
"""

import base64
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from conftest import max_difference, picture, tiny, tiny_gpt2
from fastapi import FastAPI
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer, LlamaConfig
from transformers.cli.serving import server as library_server
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from imageprompt import ImagePromptConfig, ImagePromptForConditionalGeneration
from imageprompt.cli import main
from imageprompt.cpu import PrepackedLinear
from imageprompt.serving import _build, serve

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
SHELL, PYTHON = (
    re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for language in ("sh", "python")
)
NAME = "runs/dog"  # as the page calls the model
POSITIONS = 128


# --- a server in its own process


@pytest.fixture(scope="module")
def served(tokenizer, tmp_path_factory):
    """(working directory, model, processor) with the checkpoint and the photo that the page speaks of."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("serving")
    # Lively weights, so that answers depend on what was asked.
    model, processor = tiny(tokenizer, text_config=tiny_gpt2(initializer_range=0.3, n_positions=POSITIONS))
    # Half a character cannot be streamed, so the answers are spelt in ASCII.
    pieces = processor.tokenizer.batch_decode([[token] for token in range(model.config.vocab_size)])
    ascii = re.compile(r"[ -~]+")
    model.generation_config.suppress_tokens += [i for i, piece in enumerate(pieces) if not ascii.fullmatch(piece)]
    model.save_pretrained(folder / NAME)
    processor.save_pretrained(folder / NAME)
    picture().save(folder / "photo.jpg")
    return folder, model, processor


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def running(command: list[str], port: int, folder: Path, **environment: str):
    """Run a server until the test module ends; yields its base URL as soon as it is healthy."""
    log = folder / f"{port}.log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        client = openai.OpenAI(base_url=f"http://localhost:{port}", api_key="-", max_retries=0)
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                client.get("/health", cast_to=object)
                break
            except openai.APIConnectionError:
                time.sleep(0.1)
        yield f"http://localhost:{port}"
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def address(served):
    """The server that the page starts, on a free port."""
    folder, _, _ = served
    port = free_port()
    arguments = shlex.split(SHELL[0].replace("8000", str(port)))[1:]
    assert str(port) in arguments and NAME in arguments
    yield from running([sys.executable, "-m", "imageprompt.cli", *arguments, "--device", "cpu"], port, folder)


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)


@pytest.fixture(scope="module")
def photos(served):
    """The URL of a folder of pictures: 0.png, 1.png and 2.png."""
    folder = served[0] / "photos"
    folder.mkdir()
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("localhost", 0), partial(Quiet, directory=str(folder))) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://localhost:{web.server_port}"
        web.shutdown()


def data_uri(seed: int) -> str:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(client, *parts, model=NAME, history=(), **settings):
    """A request: the parts of the user's message are texts, numbers of pictures, and URLs of images."""
    content = []
    for part in parts:
        url = data_uri(part) if isinstance(part, int) else part
        is_image = url.startswith(("data:", "http:"))
        content.append({"type": "image_url", "image_url": {"url": url}} if is_image else {"type": "text", "text": url})
    messages = [*history, {"role": "user", "content": content}]
    settings = {"max_tokens": 12, "temperature": 0} | settings
    return client.chat.completions.create(model=model, messages=messages, **settings)


def expected(served, *parts, history=(), **generation) -> tuple[str, int]:
    """What `generate` answers in this process, and the number of tokens in the prompt."""
    _, model, processor = served
    content = [
        {"type": "image", "image": picture(part)} if isinstance(part, int) else {"type": "text", "text": part}
        for part in parts
    ]
    inputs = processor.apply_chat_template(
        [*history, {"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, **{"max_new_tokens": 12} | generation)
    return processor.decode(ids[0, length:], skip_special_tokens=True), length


def answer(response) -> str:
    return response.choices[0].message.content


def test_an_image_in_the_request(client, served):
    response = ask(client, 0, "What is it?")
    text, length = expected(served, 0, "What is it?")
    assert answer(response) == text and text.strip()
    assert response.choices[0].finish_reason == "length"
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (length, 12)
    assert answer(ask(client, 1, "What is it?")) != text  # the image counts


def test_images_by_url_and_several_of_them(client, served, photos):
    response = ask(client, f"{photos}/1.png", "and", f"{photos}/2.png", "What is it?")
    assert answer(response) == expected(served, 1, "and", 2, "What is it?")[0]


def test_streaming(client, served):
    chunks = list(ask(client, 0, "What is it?", stream=True))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(texts) > 3
    assert "".join(texts) == expected(served, 0, "What is it?")[0]
    assert chunks[-1].choices[0].finish_reason == "length"


def test_text_only_and_a_system_message(client, served):
    history = [{"role": "system", "content": "Two cats."}]
    assert answer(ask(client, "What is it?", history=history)) == expected(served, "What is it?", history=history)[0]


def test_a_conversation_goes_on(client, served):
    image = {"type": "image_url", "image_url": {"url": data_uri(0)}}
    question = {"type": "text", "text": "What is it?"}
    reply = {"role": "assistant", "content": answer(ask(client, 0, "What is it?"))}
    second = ask(client, "A photo of?", history=[{"role": "user", "content": [image, question]}, reply])
    image = {"type": "image", "image": picture(0)}
    history = [{"role": "user", "content": [image, question]}, reply]
    assert answer(second) == expected(served, "A photo of?", history=history)[0]


@pytest.mark.parametrize("content", [" A dog.", "A dog."])
def test_an_answer_that_comes_back_reads_as_it_was_generated(served, content):
    """Answers begin with a space, as GPT-2 writes them; in the history it must not be written twice."""
    _, _, processor = served
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": content}]
    prompt = processor.apply_chat_template(chat[:1], add_generation_prompt=True)
    assert processor.apply_chat_template(chat) == f"{prompt} A dog.{processor.tokenizer.eos_token}\n"


def test_requests_at_the_same_time(client, served):
    wanted = [expected(served, seed, "What is it?")[0] for seed in range(3)]
    assert len(set(wanted)) > 1
    with ThreadPoolExecutor(6) as pool:
        responses = list(pool.map(lambda seed: ask(client, seed, "What is it?"), [0, 1, 2] * 2))
    assert [answer(response) for response in responses] == wanted * 2


@pytest.mark.parametrize("asked", [{"max_tokens": openai.omit}, {"max_tokens": POSITIONS}], ids=["default", "too many"])
def test_an_answer_ends_where_the_positions_end(client, served, asked):
    """The server asks for 1,024 new tokens when the client does not say, which may be more than there are."""
    _, length = expected(served, 0, "What is it?")
    room = POSITIONS - length
    response = ask(client, 0, "What is it?", **asked)
    assert answer(response) == expected(served, 0, "What is it?", max_new_tokens=room)[0]
    assert (response.usage.total_tokens, response.choices[0].finish_reason) == (POSITIONS, "length")
    *_, last = ask(client, 0, "What is it?", stream=True, **asked)
    assert (last.usage.completion_tokens, last.choices[0].finish_reason) == (room, "length")


def test_max_tokens_and_stop_strings(client, served):
    assert ask(client, 0, "A", max_tokens=3).usage.completion_tokens == 3
    text = expected(served, 0, "A")[0]
    response = ask(client, 0, "A", stop=[text[4]])
    assert text.startswith(answer(response)) and len(answer(response)) < len(text)
    assert text[4] in answer(response)  # the library leaves the stop string in
    assert response.choices[0].finish_reason == "stop"


def test_answers_are_greedy_unless_the_generation_config_samples(client, served):
    text = expected(served, 0, "A")[0]
    assert answer(ask(client, 0, "A", temperature=2.0)) == text
    sampled = {"extra_body": {"generation_config": '{"do_sample": true}'}, "temperature": 2.0, "seed": 7}
    torch.manual_seed(7)
    wanted, _ = expected(served, 0, "A", do_sample=True, temperature=2.0)
    assert answer(ask(client, 0, "A", **sampled)) == wanted != text


def test_on_a_cpu_weights_are_prepacked(tokenizer):
    parts = tiny(tokenizer)
    manager = SimpleNamespace(
        force_model=NAME, process_model_name=str, load_model_and_processor=lambda name: parts, get_gen_models=None
    )
    _build(lambda *handlers: FastAPI(), manager, SimpleNamespace(handle_request=None))
    assert isinstance(parts[0].lm_head, PrepackedLinear)


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        (["data:image/png;base64,AAAA"], {}, "Image 0: no readable image"),
        (["http://localhost:9/none.png"], {}, "no readable image in 'http://localhost:9/none.png'"),
        ([0, "<image> and"], {}, "Row 0 has 2 <image> in its text but 1 images"),
        (["dog " * POSITIONS], {}, f"more than the {POSITIONS} positions"),
        (["A"], {"history": [{"role": "tool", "content": "B"}]}, "roles are 'system', 'user' and 'assistant'"),
        (["A"], {"max_tokens": "many"}, "invalid literal"),
        (["A"], {"model": "gpt-4o"}, "Server is pinned to 'runs/dog'"),
    ],
    ids=["broken image", "no such image", "stray mark", "too long", "role", "number", "model"],
)
def test_a_wrong_request_is_refused_with_the_reason_and_the_server_lives_on(client, served, parts, settings, message):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refusal:
            ask(client, *parts, stream=stream, **settings)
        assert message in refusal.value.response.text
    assert answer(ask(client, "A")) == expected(served, "A")[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "`messages` is a list of at least one message"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, "at least one message"),
        ({"messages": [{"content": "hi"}]}, "Message 0 has no `role`"),
        ({"messages": [{"role": "user"}]}, "Message 0 has no `content`"),
        ({"messages": [{"role": "user", "content": "A"}], "stop": 5}, "`stop` is a text or a list"),
        *(
            ({"messages": [{"role": "user", "content": [part]}]}, "is not understood")
            for part in (
                {"type": "image_url"},
                {"type": "image", "image": "data:image/png;base64,AAAA"},
                {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
                "A",
            )
        ),
    ],
    ids=str,
)
def test_what_the_library_would_drop_or_stumble_over_is_refused(client, body, message):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.post("/chat/completions", body={"model": NAME, **body}, cast_to=object)
    assert message in refusal.value.response.text


def test_the_list_of_models_names_the_one_that_is_served(client):
    assert [model.id for model in client.models.list()] == [NAME]


def test_plain_completions(client, served):
    _, model, processor = served
    inputs = processor(text="A photo of", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    response = client.completions.create(model=NAME, prompt="A photo of", max_tokens=6)
    assert response.choices[0].text == processor.decode(ids, skip_special_tokens=True)


@pytest.mark.slow  # a second server; that the library loads the remote code is tested in test_saving.py, too
def test_the_library_serves_the_remote_code_where_imageprompt_is_not_installed(served):
    folder, _, _ = served
    port = free_port()
    program = (
        "import sys; sys.modules['imageprompt'] = None\n"
        "from transformers.cli.transformers import app\n"
        "app(sys.argv[1:], prog_name='transformers')"
    )
    command = [sys.executable, "-P", "-c", program, "serve", NAME, "--trust-remote-code", "--device", "cpu"]
    home = str(folder / "home")
    for address in running([*command, "--port", str(port)], port, folder, HF_HOME=home, PYTHONPATH=""):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        assert answer(ask(client, 0, "What is it?")) == expected(served, 0, "What is it?")[0]


# --- the documentation


def test_the_page_runs(address, served, monkeypatch, capsys):
    folder, _, _ = served
    monkeypatch.chdir(folder)
    monkeypatch.setenv("no_proxy", "localhost")
    assert len(PYTHON) == 1 and len(SHELL) == 2
    exec(compile(PYTHON[0].replace("http://localhost:8000", address), "serving.md", "exec"), {})
    answers = capsys.readouterr().out.split("\n---\n")
    assert len(answers) == 2 and answers[0].strip() == answers[1].strip() != ""
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    command = SHELL[1].replace("http://localhost:8000", address)
    run = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert '"object":"chat.completion"' in run.stdout and '"finish_reason"' in run.stdout


# --- refusals before a server starts


@pytest.fixture
def library(monkeypatch):
    """The library as it was, after a test has run `serve` in this process."""
    monkeypatch.setattr(library_server, "build_server", library_server.build_server)
    monkeypatch.setitem(
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, "imageprompt", MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["imageprompt"]
    )
    classes = AutoModelForMultimodalLM._model_mapping._extra_content
    monkeypatch.setitem(classes, ImagePromptConfig, classes[ImagePromptConfig])


def test_a_model_must_be_named_and_be_one_of_imageprompts(tmp_path):
    with pytest.raises(ValueError, match="Name the model to serve"):
        serve([])
    tiny_gpt2().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a gpt2 model: serve it with `transformers serve`"):
        serve([str(tmp_path)])


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr("imageprompt.serving.is_serve_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["imageprompt", "serve", NAME])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert 'pip install "imageprompt[serve]"' in capsys.readouterr().err


def test_a_processor_of_another_model_is_refused(served, tokenizer, tmp_path, library):
    _, model, _ = served
    model.save_pretrained(tmp_path)
    tiny(tokenizer, num_image_tokens=1)[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_image_tokens 1 here, 4 in the model"):
        serve([str(tmp_path), "--device", "cpu"])


def test_continuous_batching_falls_back_to_one_request_at_a_time(served):
    _, model, processor = served
    modality = ModelManager.get_model_modality(model, processor)
    assert not GenerationState(continuous_batching=True).use_continuous_batching(model, modality)


# --- pain 24: what vLLM's Transformers backend does, vllm/model_executor/models/transformers/{base,multimodal}.py


class PackedAttention:
    """Stands for vLLM's `Attention` of one layer: sequences end to end, (tokens, heads * width of a head)."""

    def __init__(self, heads: int, lengths: list[int]):
        self.heads, self.lengths, self.calls = heads, lengths, 0
        self.impl = SimpleNamespace(scale=None)

    def forward(self, query, key, value):
        self.calls += 1
        outputs = []
        for parts in zip(*(states.split(self.lengths) for states in (query, key, value)), strict=True):
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(0, 1) for part in parts)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.impl.scale)
            outputs.append(attended.transpose(0, 1).flatten(1))
        return torch.cat(outputs)


def packed_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """The attention function that vLLM registers: it finds its layer among the keywords of the model's forward."""
    layer = attention_instances[module.layer_idx]
    layer.impl.scale = scaling
    states = (states.transpose(1, 2).flatten(0, 1).flatten(1) for states in (query, key, value))
    return layer.forward(*states), None


LANGUAGE_MODELS = {
    "gpt2": tiny_gpt2(n_positions=16, initializer_range=0.2),
    "llama": LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


@pytest.fixture(scope="module", params=LANGUAGE_MODELS)
def checkpoint(request, tokenizer, tmp_path_factory):
    """(folder, model, processor); the folder is all that vLLM sees."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = tiny(tokenizer, text_config=LANGUAGE_MODELS[request.param])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def vllm_model(folder, monkeypatch):
    """The base model on the meta device, its embeddings exchanged, its weights loaded by their names."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", packed_attention)
    config = AutoConfig.from_pretrained(folder)
    text_config = config.get_text_config()
    assert text_config is config.text_config and text_config != config  # makes it multimodal
    text_config._attn_implementation = "vllm"
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config).eval()
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}  # what is computed is not in the file
    model.set_input_embeddings(torch.nn.Embedding(text_config.vocab_size, text_config.hidden_size))
    state = {name.removeprefix("model."): value for name, value in load_file(folder / "model.safetensors").items()}
    assert dict(model.named_parameters()).keys() <= state.keys()
    model.load_state_dict(state, strict=True, assign=True)
    return model


def vllm_image_fields(processor, images):
    """Per image: its rows of pixels, and the token ids that take the place of one placeholder."""
    fields = processor(
        text=processor.image_token * len(images),
        images=images,
        return_tensors="pt",
        return_text_replacement_offsets=True,
        add_special_tokens=False,
        truncation=False,
    )
    (entries,) = fields.pop("text_replacement_offsets")
    assert {entry["type"] for entry in entries} == {"image"} and len(entries) == len(images)
    replacements = [processor.tokenizer(e["replacement"], add_special_tokens=False).input_ids for e in entries]
    sizes = [(image.height, image.width) for image in images]
    rows = processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_patches"]
    assert set(fields) - {"input_ids", "attention_mask", "mm_token_type_ids"} == {"pixel_values"}
    return fields["pixel_values"].split(rows), replacements


def vllm_prompt(processor, text, replacements):
    """The tokens of a text, with each placeholder replaced by the tokens of its image."""
    (mark,) = processor.tokenizer(processor.image_token, add_special_tokens=False).input_ids
    remaining = iter(replacements)
    ids = processor.tokenizer(text).input_ids
    return [token for i in ids for token in (next(remaining) if i == mark else [i])]


REQUESTS = [("<image> and <image>", [0, 1]), ("A photo of", []), ("<image>What is it?", [2])]


def test_pain_24_the_parts_that_vllm_looks_for(checkpoint):
    folder, model, processor = checkpoint
    config = AutoConfig.from_pretrained(folder)
    assert config.auto_map["AutoModel"] == "modeling.ImagePromptModel"
    assert config.architectures == [ImagePromptForConditionalGeneration.__name__]
    base = AutoModel.from_pretrained(folder)
    assert base.is_backend_compatible() and base._supports_attention_backend
    assert base.base_model_prefix == "model"  # the prefix of the names in the checkpoint
    assert base.get_decoder() is base.language_model
    assert base.get_encoder(modality="image") is base.vision_tower
    assert type(base.get_encoder(modality="audio")) is type(base)  # there is none
    embeddings = torch.nn.Embedding(*base.get_input_embeddings().weight.shape)
    base.set_input_embeddings(embeddings)
    assert base.get_input_embeddings() is embeddings is base.language_model.get_input_embeddings()
    text_config = config.get_text_config()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert getattr(text_config, name) == getattr(model.config.text_config, name)
    # The processor is opened with a tokenizer that vLLM has loaded before.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reopened = AutoProcessor.from_pretrained(folder, tokenizer=tokenizer)
    assert reopened.tokenizer is tokenizer
    assert (reopened.image_token, reopened.image_token_ids) == (processor.image_token, [config.image_token_id])
    assert reopened.image_processor.model_input_names == ["pixel_values"]


def test_pain_24_vllm_counts_and_places_the_image_tokens(checkpoint):
    _, model, processor = checkpoint
    size = processor.image_processor.size  # the profiling run asks for the size with the most tokens
    for sizes in ([[size.get("height"), size.get("width")]], [[10_000, 10_000]], [[70, 90], [3, 500]]):
        counted = processor._get_num_multimodal_tokens(image_sizes=sizes)
        assert counted["num_image_tokens"] == [model.config.num_image_tokens] * len(sizes)
        assert counted["num_image_patches"] == [1] * len(sizes)
    for text, seeds in REQUESTS:
        if not seeds:
            continue
        images = [picture(seed) for seed in seeds]
        pixels, replacements = vllm_image_fields(processor, images)
        assert [part.shape[0] for part in pixels] == [1] * len(images)
        whole = processor(text=text, images=images, return_mm_token_type_ids=True, return_tensors="pt")
        ids = vllm_prompt(processor, text, replacements)
        assert ids == whole["input_ids"][0].tolist()
        assert torch.equal(torch.cat(pixels), whole["pixel_values"])
        is_image = torch.tensor(ids) == model.config.image_token_id
        assert torch.equal(whole["mm_token_type_ids"][0].bool(), is_image)


def test_pain_24_vllm_runs_requests_end_to_end_in_one_row(checkpoint, monkeypatch):
    folder, model, processor = checkpoint
    base = vllm_model(folder, monkeypatch)
    text_config = base.config.text_config
    embeds, lengths, wanted = [], [], []
    for text, seeds in REQUESTS:
        images = [picture(seed) for seed in seeds]
        features, replacements = [], []
        if images:
            pixels, replacements = vllm_image_fields(processor, images)
            encoded = base.get_image_features(torch.cat(pixels)).pooler_output
            assert torch.equal(base.get_image_features(torch.cat(pixels), return_dict=True).pooler_output, encoded)
            features = encoded.flatten(0, 1).split([len(replacement) for replacement in replacements])
        ids = torch.tensor(vllm_prompt(processor, text, replacements))
        merged = base.get_input_embeddings()(ids)
        if images:
            merged = merged.masked_scatter((ids == base.config.image_token_id)[:, None], torch.cat(features))
        embeds.append(merged)
        lengths.append(len(ids))
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        wanted.append(model(**inputs).logits[0])
    # Together they have more tokens than the language model has positions; each of them alone has fewer.
    assert max(lengths) <= text_config.max_position_embeddings < sum(lengths)
    heads = text_config.num_attention_heads
    layers = {index: PackedAttention(heads, lengths) for index in range(text_config.num_hidden_layers)}
    with torch.no_grad():
        outputs = base(
            input_ids=None,
            inputs_embeds=torch.cat(embeds)[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            use_cache=False,
            attention_instances=layers,
            return_dict=False,
        )
    assert [layer.calls for layer in layers.values()] == [1] * len(layers)
    logits = outputs[0][0] @ base.get_input_embeddings().weight.T  # the head is tied
    for found, reference in zip(logits.split(lengths), wanted, strict=True):
        assert max_difference(found, reference) <= 1e-4


def test_pain_24_a_sequence_of_too_many_positions_is_refused_also_in_a_packed_row(checkpoint):
    folder, _, _ = checkpoint
    base = AutoModel.from_pretrained(folder)
    positions = torch.cat([torch.arange(17), torch.arange(3)])[None]
    with pytest.raises(ValueError, match="17 tokens in a row"):
        base(inputs_embeds=torch.zeros(1, 20, 32), position_ids=positions)
