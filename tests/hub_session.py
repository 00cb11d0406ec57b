"""Run by test_pushing.py in a process of its own: load a private model by its name, with nothing but the Hub's files.

    python hub_session.py NAME OLDER_COMMIT RESULT

Expects HF_ENDPOINT, and no token in the environment. Logits of the newest and of an older commit, and what the code of
the card printed, go to RESULT; a session without a token, and one with a wrong one, must be refused. What was loaded is
pushed again, as NAME-again.
"""

import contextlib
import io
import json
import os
import re
import sys

from remote_session import NotInstalled


def main(name, older, result):
    sys.meta_path.insert(0, NotInstalled())
    import numpy as np
    import torch
    from huggingface_hub import hf_hub_download
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    refused = {}
    for kind, token in (("none", False), ("wrong", "hf_wrong"), ("other", "hf_grace")):
        try:
            AutoModelForImageTextToText.from_pretrained(name, token=token, trust_remote_code=True)
        except OSError as error:
            refused[kind] = str(error)
    image = np.arange(70 * 90 * 3, dtype=np.uint8).reshape(70, 90, 3)
    os.environ["HF_TOKEN"] = "hf_ada"
    logits = {}
    for key, revision in (("older", older), ("newest", "main")):
        model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.no_grad():
            inputs = processor(images=image, text="A photo of", return_tensors="pt")
            logits[key] = model(**inputs).logits.flatten().tolist()

    model.push_to_hub(f"{name}-again", commit_message="Again")
    processor.push_to_hub(f"{name}-again")

    with open(hf_hub_download(name, "README.md"), encoding="utf-8") as card:
        (code,) = re.findall(r"^```python\n(.*?)^```", card.read(), re.MULTILINE | re.DOTALL)
    Image.fromarray(image).save("photo.jpg")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert not any(module.partition(".")[0] == "imageprompt" for module in sys.modules)
    with open(result, "w", encoding="utf-8") as file:
        json.dump({"refused": refused, "logits": logits, "printed": printed.getvalue()}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
