"""imageprompt models in lmms-eval, whose many benchmarks then ask them.

lmms-eval finds this by itself where both are installed:

    python -m lmms_eval --model imageprompt --model_args pretrained=runs/answers --tasks … --batch_size 16
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..generating import generate_texts
from ..modeling import ImagePromptForConditionalGeneration
from ..processing import ImagePromptProcessor
from .likelihood import EncodedPrompts

_DEFAULTS = GenerationConfig()


def manifest() -> ModelManifest:
    """What lmms-eval's registry wants to know; the entry point in setup.cfg names this function."""
    return ModelManifest(model_id="imageprompt", simple_class_path=f"{__name__}.ImagePrompt")


class ImagePrompt(lmms):
    """A saved model behind lmms-eval's interface, in one process.

    Answers have at most half as many tokens as the language model has positions, whatever a task asks for.

    Args:
        pretrained: a local folder or Hub id.
        prompt: what the model was trained with around a question, which `{text}` stands for.
        batch_size: questions at once.
        device: where the model runs; the library's choice by default.

    Raises:
        ValueError: if `prompt` has no place for the question.
    """

    def __init__(self, pretrained: str, prompt: str = "{text}", batch_size: int | str = 1, device: str | None = None):
        super().__init__()
        if "{text}" not in prompt:
            raise ValueError(f"`prompt` holds {{text}}, where the question goes; got {prompt!r}.")
        self.model = ImagePromptForConditionalGeneration.from_pretrained(pretrained, device_map=device or "auto")
        self.processor = ImagePromptProcessor.from_pretrained(pretrained)
        self.processor.check_model(self.model)
        self.prompt, self.batch_size = prompt, int(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The model's answer to each request, up to the first of its stop texts."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        answers = [""] * len(requests)
        for indices in groups.values():
            chosen = [requests[index].args for index in indices]
            texts = generate_texts(
                self.model,
                self.processor,
                (self._images(*where) for _, _, *where in chosen),  # read batch by batch
                [self.prompt.replace("{text}", context) for context, *_ in chosen],
                batch_size=self.batch_size,
                progress=True,
                **self._generation(chosen[0][1]),
            )
            for index, text in zip(indices, texts, strict=True):
                answers[index] = _until(text, chosen[0][1].get("until"))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """The loss of each continuation, and whether greedy search would write it.

        The loss, the mean over its tokens, and not the log-likelihood: lmms-eval takes the lowest for the best answer,
        as its own models return losses.
        """
        # The continuations of a question come one after the other and share its images and prompt.
        questions: dict[tuple, list[int]] = {}
        continuations = []
        for index, request in enumerate(requests):
            context, continuation, *where = request.args
            if callable(continuation):
                continuation = continuation(self._document(*where))
            continuations.append(continuation)
            questions.setdefault((context, *where), []).append(index)
        results: list[tuple[float, bool]] = [(float("nan"), False)] * len(requests)
        with tqdm(total=len(requests), desc="likelihoods", unit="text") as bar:
            for batch in _batches(list(questions.items()), self.batch_size):
                images = [self._images(*where) for (_, *where), _ in batch]
                prompts = [self.prompt.replace("{text}", context) for (context, *_), _ in batch]
                for row, prompt in enumerate(prompts):
                    if not prompt and not images[row]:  # how likely a text is by itself: behind the end of another
                        prompts[row] = self.processor.tokenizer.eos_token
                encoded = EncodedPrompts(self.model, self.processor, images, prompts)
                for number in range(max(len(indices) for _, indices in batch)):
                    # Questions with fewer continuations score their last one again.
                    chosen = [indices[min(number, len(indices) - 1)] for _, indices in batch]
                    scores = encoded.score([continuations[index] for index in chosen])
                    losses = (-scores.log_likelihoods / scores.tokens).tolist()
                    for index, loss, is_greedy in zip(chosen, losses, scores.is_greedy.tolist(), strict=True):
                        results[index] = (loss, is_greedy)
                bar.update(sum(len(indices) for _, indices in batch))
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError(
            "imageprompt answers questions one by one; tasks of several rounds are not supported."
        )

    def _document(self, *where: Any) -> dict[str, Any]:
        _, number, task, split = where
        return self.task_dict[task][split][number]

    def _images(self, *where: Any) -> list[Image.Image]:
        """The images of a request; one that asks for a likelihood without its question has none."""
        if not where:
            return []
        images = where[0](self._document(*where)) or []
        for image in images:
            if not isinstance(image, Image.Image):
                raise ValueError(f"{where[2]} shows a {type(image).__name__}; imageprompt takes images.")
        return images

    def _generation(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A task's settings in `generate`'s words, without those that it does not know."""
        known = {name: value for name, value in settings.items() if value is not None and hasattr(_DEFAULTS, name)}
        # Tasks ask for up to thousands of tokens, which language models of 1,024 positions do not have.
        half = self.processor.tokenizer.model_max_length // 2
        known["max_new_tokens"] = min(known.get("max_new_tokens", 1024), half)
        known["do_sample"] = bool(known.get("do_sample", known.get("temperature", 0) > 0))
        unused = () if known["do_sample"] else ("temperature", "top_p", "top_k")
        return {name: value for name, value in known.items() if name not in unused}


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop:
            text = text.split(stop)[0]
    return text


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
