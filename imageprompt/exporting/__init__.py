"""Models outside this package: `torch.export` and ONNX graphs, and a loop that generates from them."""

from .exported_model import ExportedModel as ExportedModel
from .exported_model import OnnxModel as OnnxModel
from .exported_model import TorchModel as TorchModel
from .exporter import export as export
