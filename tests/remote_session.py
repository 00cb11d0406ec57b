"""Run by test_saving.py in a process of its own: load a checkpoint with nothing but what is in its folder.

    python remote_session.py CHECKPOINT RESULT [RESAVED]

Loads through every Auto class, writes logits, generated ids and features to RESULT, and saves both parts to RESAVED.
"""

import importlib.abc
import importlib.util
import sys


class NotInstalled(importlib.abc.MetaPathFinder):
    """Makes `import imageprompt` fail as where it is not installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "imageprompt":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def hide_package():
    """From here on, nothing of imageprompt can be imported."""
    sys.meta_path.insert(0, NotInstalled())
    try:
        importlib.util.find_spec("imageprompt")
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("imageprompt can be imported: this process proves nothing")


def main(checkpoint, result, resaved=None):
    hide_package()

    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )
    from transformers.cli.serving.model_manager import Modality, ModelManager
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # First, while no code of the checkpoint is loaded: `transformers serve` must find the class by its name.
    manager = ModelManager(device="cpu", trust_remote_code=True, force_model=checkpoint)
    (served,) = (timed.model for timed in manager.loaded_models.values())
    assert manager.get_model_modality(served) is Modality.MULTIMODAL

    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    image_processor = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    base = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    same = AutoModelForMultimodalLM.from_pretrained(checkpoint, trust_remote_code=True)
    for part in (config, processor, image_processor, base, model, same, served):
        assert type(part).__module__.startswith("transformers_modules."), type(part)
    assert type(base).__name__ == "ImagePromptModel" and type(model) is type(same)
    assert type(processor.image_processor) is type(image_processor)

    # By this name the Trainer knows to shift labels when it smooths them.
    assert type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    image = np.arange(70 * 90 * 3, dtype=np.uint8).reshape(70, 90, 3)
    inputs = processor(images=image, text="A photo of", return_tensors="pt")
    assert torch.equal(image_processor(image, return_tensors="pt")["pixel_values"], inputs["pixel_values"])
    with torch.no_grad():
        outputs = {
            "logits": model(**inputs).logits,
            "same_logits": same(**inputs).logits,
            "hidden_states": base(**inputs).last_hidden_state,
            "ids": model.generate(**inputs, max_new_tokens=8, num_beams=2),
        }
    save_file({name: value.contiguous() for name, value in outputs.items()}, result)
    if resaved:
        model.save_pretrained(resaved)
        processor.save_pretrained(resaved)
    assert not any(name.partition(".")[0] == "imageprompt" for name in sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
