"""What a model costs and whether it would train, found out without weights: `imageprompt doctor`."""

from .diagnose import diagnose as diagnose
from .report import Diagnosis as Diagnosis
from .report import Plan as Plan
